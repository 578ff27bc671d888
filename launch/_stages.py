"""What the stage programs do once their flags are parsed."""

from collections.abc import Sequence

from absl import flags as absl_flags
from absl.flags import FlagHolder

from refine_af import checkpoints, pipeline
from refine_af.arms import ARMS, REFINE_AF
from refine_af.launch import _files, flags
from refine_af.validation import require_one_of

_TELL = ("evaluate", "report")  # they print a result also where there was nothing to do


def run(
    names: Sequence[str],
    workdir: "FlagHolder[str | None]",
    force: "FlagHolder[bool]",
    arms: Sequence[str] = (REFINE_AF,),
    profile_steps: int = 0,
) -> pipeline.Run:
    """Run the named stages one after another in `--workdir`, each for all `arms`."""
    directory = _files.directory(workdir)
    config = flags.experiment()
    job = pipeline.Run(config, directory, arms, profile_steps)
    job.check(names)
    with pipeline.alone_in(directory):
        pipeline.claim(config, directory, force=force.value)
        for name in names:
            try:
                _run_stage(job, name)
            except checkpoints.DamagedError:  # it was set aside: PPO goes on from the one before
                if name != "generate_instances" or "train_ppo" not in names:
                    raise
                for again in ("train_ppo", name):
                    _run_stage(job, again)
    return job


def _run_stage(job: pipeline.Run, name: str) -> None:
    if not pipeline.run_stage(job, name) and name not in _TELL:
        print(f"{name}: nothing to do in {job.workdir}")


def arms_flag() -> "FlagHolder[list[str]]":
    """`--arms`, for programs whose stages an arm has for itself."""
    return absl_flags.DEFINE_list(
        "arms",
        [REFINE_AF],
        "Arms of the run: refine_af, the method, and self_instruct, the same without PPO.",
    )


def profile_flag() -> "FlagHolder[int]":
    """`--profile_steps`, for programs that train."""
    return absl_flags.DEFINE_integer(
        "profile_steps",
        0,
        "Training steps to trace, behind the first two of this start: ppo/profile and sft/profile "
        "in the workdir, for XProf (TensorBoard) and Perfetto.",
        lower_bound=0,
    )


def chosen(arms: "FlagHolder[list[str]]") -> list[str]:
    """The arms of `--arms`, in their order of work.

    Raises:
        ValueError: one is not known, or there is none.
    """
    given = [name.strip() for name in arms.value]
    for name in given or [""]:
        require_one_of("--arms", name, ARMS)
    return [arm for arm in ARMS if arm in given]
