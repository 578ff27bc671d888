"""All stages, the evaluation and the report."""

from refine_af import pipeline
from refine_af.launch import _stages, flags

_WORKDIR = flags.workdir_flags()


def main() -> None:
    """Run what is not done yet."""
    _stages.run(list(pipeline.STAGES), *_WORKDIR)


if __name__ == "__main__":
    flags.start(main, with_config=True)
