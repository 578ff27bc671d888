"""Fine-tune the base model on the data set and export it as a Hugging Face directory."""

from refine_af.launch import _stages, flags

_WORKDIR = flags.workdir_flags()
_ARMS = _stages.arms_flag()
_PROFILE = _stages.profile_flag()


def main() -> None:
    """Run the stage in the workdir."""
    _stages.run(["finetune"], *_WORKDIR, _stages.chosen(_ARMS), _PROFILE.value)


if __name__ == "__main__":
    flags.start(main, with_config=True)
