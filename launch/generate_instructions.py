"""Stage 1: write new instructions from the seed tasks."""

from refine_af.launch import _stages, flags

_WORKDIR = flags.workdir_flags()


def main() -> None:
    """Run the stage in the workdir."""
    _stages.run(["generate_instructions"], *_WORKDIR)


if __name__ == "__main__":
    flags.start(main, with_config=True)
