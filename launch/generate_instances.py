"""Stage 3: write inputs and outputs with the tuned model, and save the data set.

With --arms=self_instruct the base model writes them. --push_to_hub takes the data set to the
Hugging Face hub, also that of a run that is done.
"""

from absl import flags as absl_flags

from refine_af import hub
from refine_af.arms import folder
from refine_af.launch import _stages, flags
from refine_af.models import processes

_WORKDIR = flags.workdir_flags()
_ARMS = _stages.arms_flag()
_PUSH = absl_flags.DEFINE_string(
    "push_to_hub",
    None,
    "OWNER/NAME of a data set on the hub, made as a private one when missing, with the token of "
    "`hf auth login` or HF_TOKEN.",
)


def main() -> None:
    """Run the stage in the workdir, and push what it made when asked to."""
    arms = _stages.chosen(_ARMS)
    if _PUSH.value is not None:
        hub.check(_PUSH.value, arms)
    run = _stages.run(["generate_instances"], *_WORKDIR, arms)
    if _PUSH.value is not None:
        target, repo_id = folder(run.workdir, arms[0]), _PUSH.value
        print(f"pushed: {processes.once(lambda: hub.push(target, repo_id))}")


if __name__ == "__main__":
    flags.start(main, with_config=True)
