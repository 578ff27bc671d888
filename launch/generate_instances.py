"""Stage 3: write inputs and outputs with the tuned model, and save the data set."""

from refine_af.launch import _stages, flags

_WORKDIR = flags.workdir_flags()


def main() -> None:
    """Run the stage in the workdir."""
    _stages.run(["generate_instances"], *_WORKDIR)


if __name__ == "__main__":
    flags.start(main, with_config=True)
