"""Score triplets with the reward oracle of a config: adds `reward` and each component to rows.

The oracle is --config.reward.oracle: judge, judge:MODEL, trained:NAME_OR_DIR, oasst:DIR,
unieval:DIR, rules, FILE.py:FUNCTION or an http(s) address; several with commas. See
docs/rewards.md.
"""

from pathlib import Path

import numpy as np
from absl import flags as absl_flags

from refine_af import pipeline, records, rewards
from refine_af.launch import _files, flags
from refine_af.models import processes
from refine_af.progress import bar
from refine_af.rewards import Example

_EXAMPLES = absl_flags.DEFINE_string(
    "examples", None, "JSONL file of rows with strings instruction, input and output."
)
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSONL file to write.")
_AT_ONCE = 256  # examples that the oracle is given together


def main() -> None:
    """Score all rows and write them as a whole."""
    source, target = Path(flags.require(_EXAMPLES)).expanduser(), _files.output_file(_OUTPUT)
    rows = _files.read_input(source, ("instruction", "input", "output"))
    config = flags.experiment()
    known = target.with_name(f"{target.name}.scores")  # until all rows are scored
    oracle = pipeline.Run(config, target.parent).oracle(known)
    examples = [Example(row["instruction"], row["input"], row["output"]) for row in rows]
    parts = []
    with bar("score", total=len(rows), unit="example") as progress:
        for first in range(0, len(rows), _AT_ONCE):
            some = examples[first : first + _AT_ONCE]
            parts.append(rewards.components(oracle, some))
            rewards.combine(parts[-1], config.reward)  # raises now what it would at the end
            if parts[-1].keys() != parts[0].keys():
                raise ValueError(
                    f"reward oracle gave {sorted(parts[0])} first, then {sorted(parts[-1])}"
                )
            progress.update(len(some))
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    table = {rewards.WHOLE: rewards.combine(table, config.reward)} | {
        name: column for name, column in table.items() if name != rewards.WHOLE
    }
    taken = [name for name in table if name != rewards.WHOLE and any(name in row for row in rows)]
    if taken:
        raise ValueError(f"{source}: rows have {taken} already, as the oracle would name its own")
    scored = [
        {**row, **{name: float(column[i]) for name, column in table.items()}}
        for i, row in enumerate(rows)
    ]
    records.write_text(target, "".join(map(records.to_line, scored)))
    processes.by_writer(lambda: known.unlink(missing_ok=True))
    print(f"{len(scored)} rows: {target}")


if __name__ == "__main__":
    flags.start(main, with_config=True)
