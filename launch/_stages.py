"""What the stage programs do once their flags are parsed."""

from collections.abc import Sequence
from pathlib import Path

from absl.flags import FlagHolder

from refine_af import mesh, oracles, pipeline, rlaf
from refine_af.launch import flags


def run(names: Sequence[str], workdir: "FlagHolder[str | None]", force: "FlagHolder[bool]") -> None:
    """Run the named stages one after another in `--workdir`."""
    directory = Path(flags.require(workdir)).expanduser()
    config = flags.experiment()
    will_score = {"generate_instructions", "train_ppo"} & set(names)
    if will_score and not rlaf.finished(config, directory):
        oracles.check(config)
    if "finetune" in names:
        size, pieces = config.sft.batch_size, config.sft.num_microbatches
        mesh.check_batch("sft", size, pieces, mesh.make_mesh(config.mesh))
    pipeline.claim(config, directory, force=force.value)
    job = pipeline.Run(config, directory)
    for name in names:
        pipeline.run_stage(job, name)
