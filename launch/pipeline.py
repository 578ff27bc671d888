"""All stages, the evaluation and the report; with --arms=refine_af,self_instruct of both arms."""

from refine_af import pipeline
from refine_af.launch import _stages, flags

_WORKDIR = flags.workdir_flags()
_ARMS = _stages.arms_flag()
_PROFILE = _stages.profile_flag()


def main() -> None:
    """Run what is not done yet."""
    _stages.run(list(pipeline.STAGES), *_WORKDIR, _stages.chosen(_ARMS), _PROFILE.value)


if __name__ == "__main__":
    flags.start(main, with_config=True)
