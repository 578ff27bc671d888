"""Stage 2: PPO from automated feedback on writing input and output."""

from refine_af.launch import _stages, flags

_WORKDIR = flags.workdir_flags()


def main() -> None:
    """Run the stage in the workdir."""
    _stages.run(["train_ppo"], *_WORKDIR)


if __name__ == "__main__":
    flags.start(main, with_config=True)
