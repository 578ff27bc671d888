"""The data set that a run leaves behind: parquet for `datasets.load_dataset`, with a card."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jinja2
from datasets import Dataset, Features, Value

from refine_af.config import Experiment, config_hash
from refine_af.models.writing import writing
from refine_af.records import Row, write_text

FIELDS = ("id", "instruction", "input", "output")  # of each row, besides is_classification
_FEATURES = Features(
    {
        "id": Value("string"),
        "instruction": Value("string"),
        "input": Value("string"),
        "output": Value("string"),
        "is_classification": Value("bool"),
    }
)
_CARD = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
    """---
license: other
task_categories: [text-generation]
language: [en]
configs:
- config_name: default
  data_files: train.parquet
---
# Instruction data written by {{ config.model.source }}

{{ rows|length }} triplets (instruction, input, output) for {{ num_instructions }} instructions,
written by the model itself with REFINE-AF (arXiv 2505.06548): Self-Instruct prompts,
PPO from automated feedback ({{ config.ppo.num_steps }} steps of {{ config.ppo.batch_size }}
answers), then one pass over all instructions. No human has checked the rows. The licence of the
model's output is that of the model.

| | |
|---|---|
| model | `{{ config.model.source }}` |
| config hash | `{{ hash }}` |
| seed | {{ config.seed }} |
| classification rows | {{ rows|selectattr("is_classification")|list|length }} |
| rows with an input | {{ rows|selectattr("input")|list|length }} |

| dropped because | answers |
|---|---|
{% for reason, count in reasons %}
| {{ reason }} | {{ count }} |
{% endfor %}

```python
import datasets

rows = datasets.load_dataset("parquet", data_files="train.parquet")["train"]
```
"""
)


def write_dataset(
    config: Experiment, rows: Sequence[Row], rejected: Sequence[Row], directory: Path
) -> None:
    """Write `train.parquet` and `README.md`; each file is replaced as a whole.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError(
            "dataset: no instance was accepted; see the reasons in rejected_instances.jsonl, and "
            "raise instances.sampling.max_new_tokens or answers_per_instruction"
        )
    directory.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list([{k: row[k] for k in _FEATURES} for row in rows], _FEATURES)
    partial = directory / "train.parquet.partial"
    with writing(directory / "train.parquet"):
        table.to_parquet(str(partial))
    partial.replace(directory / "train.parquet")
    reasons = Counter(row["reason"] for row in rejected).most_common()
    card = _CARD.render(
        config=config,
        rows=rows,
        num_instructions=len({row["id"] for row in rows}),
        hash=config_hash(config),
        reasons=reasons,
    )
    write_text(directory / "README.md", card)
