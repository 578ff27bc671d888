"""What PPO did in the runs that are kept here, and what became of it: tables in Markdown.

    python docs/experiment/tables.py [FOLDER ...]

A folder has what a run's workdir has: `ppo/evaluation.json`, `dataset/statistics.json` and, with
both arms, `self_instruct/dataset/statistics.json`. Without an argument: all that are kept here.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from refine_af.comparison_report import table

PPO, DATA = "ppo/evaluation.json", "dataset/statistics.json"
ARMS = {"refine-af": ".", "self-instruct": "self_instruct"}


def ppo_row(folder: Path) -> list[str]:
    """Held-out rewards before and after."""
    found = json.loads((folder / PPO).read_text())
    before, after, gain = (found[name] for name in ("before", "after", "difference"))
    return [
        folder.name,
        f"{before['reward']:.2f}",
        f"{after['reward']:.2f}",
        f"{gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})",
        f"{gain['share_better']:.0%}",
        f"{before['usable']:.0%} to {after['usable']:.0%}",
        f"{before['tokens']:.0f} to {after['tokens']:.0f}",
        f"{after['kl']:.1f}",
    ]


def data_row(folder: Path, arm: str) -> list[str]:
    """What stage 3 made."""
    found = json.loads((folder / ARMS[arm] / DATA).read_text())
    dropped = dict(found["dropped"]["instances"])
    shares = found["output_shares"]
    return [
        folder.name,
        arm,
        str(found["rows"]),
        str(dropped.pop("input_equals_output", 0)),
        str(sum(dropped.values())),
        f"{found['rewards']['reward']['mean']:.2f}",
        *(f"{found[name].get('mean', 0):.1f}" for name in ("input_words", "output_words")),
        *(f"{shares[name]:.0%}" for name in ("one_word", "nothing_of_their_own", "different")),
    ]


def main(folders: Sequence[Path]) -> None:
    """Print a table of what PPO did and one of what stage 3 made."""
    for folder in folders:
        if not any((folder / name).exists() for name in (PPO, DATA)):
            sys.exit(f"{folder}: expected {PPO} or {DATA} in it")
    ppo = ("run", "reward before", "after", "gain, 95% interval", "better on")
    ppo += ("answers that can be used", "tokens", "KL, nats")
    print(table(ppo, (ppo_row(folder) for folder in folders if (folder / PPO).exists())))
    data = ("run", "arm", "rows kept", "dropped: copies", "dropped: unreadable, empty or cut")
    data += ("mean reward", "words of the input", "of the output", "outputs of one word")
    data += ("with no word that the input lacks", "different")
    rows = (
        data_row(folder, arm)
        for folder in folders
        for arm, place in ARMS.items()
        if (folder / place / DATA).exists()
    )
    print(table(data, rows))


if __name__ == "__main__":
    kept = sorted(x for x in Path(__file__).parent.iterdir() if x.is_dir())
    main([*map(Path, sys.argv[1:])] or [x for x in kept if (x / PPO).exists()])
