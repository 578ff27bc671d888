"""Score triplets with the reward oracle of a config: adds `reward` and each component to rows."""

from pathlib import Path

from absl import flags as absl_flags

from refine_af import pipeline, records, rewards
from refine_af.launch import flags
from refine_af.rewards import Example

_EXAMPLES = absl_flags.DEFINE_string(
    "examples", None, "JSONL file of rows with strings instruction, input and output."
)
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSONL file to write.")


def main() -> None:
    """Score all rows and write them as a whole."""
    source, target = Path(flags.require(_EXAMPLES)), Path(flags.require(_OUTPUT))
    rows = flags.read_input(source, ("instruction", "input", "output"))
    config = flags.experiment()
    oracle = pipeline.Run(config, target.parent).oracle()
    examples = [Example(row["instruction"], row["input"], row["output"]) for row in rows]
    judged = rewards.judge(oracle, examples, [True] * len(rows), config.reward)
    scored = [
        {**row, "reward": result.reward, **(result.components or {})}
        for row, result in zip(rows, judged, strict=True)
    ]
    records.write_text(target, "".join(map(records.to_line, scored)))
    print(f"{len(scored)} rows: {target}")


if __name__ == "__main__":
    flags.start(main, with_config=True, resumes=False)
