"""Stage 2: PPO from automated feedback on writing input and output."""

from refine_af.launch import _stages, flags

_WORKDIR = flags.workdir_flags()
_PROFILE = _stages.profile_flag()


def main() -> None:
    """Run the stage in the workdir."""
    _stages.run(["train_ppo"], *_WORKDIR, profile_steps=_PROFILE.value)


if __name__ == "__main__":
    flags.start(main, with_config=True)
