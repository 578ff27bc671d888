"""Fine-tune the base model on the data set and export it as a Hugging Face directory."""

from refine_af.launch import _stages, flags

_WORKDIR = flags.workdir_flags()


def main() -> None:
    """Run the stage in the workdir."""
    _stages.run(["finetune"], *_WORKDIR)


if __name__ == "__main__":
    flags.start(main, with_config=True)
