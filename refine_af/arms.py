"""The arms of a run: `refine_af` is the method, `self_instruct` the same without PPO.

The second is the paper's baseline. Both write instances for the same instructions, from the same
prompts and seeds, and are fine-tuned and evaluated alike.
"""

from pathlib import Path

REFINE_AF, SELF_INSTRUCT = "refine_af", "self_instruct"
ARMS = (REFINE_AF, SELF_INSTRUCT)
# What is evaluated, with its name for people: before training first, the method itself last.
TITLES = {"base": "base model", SELF_INSTRUCT: "Self-Instruct", REFINE_AF: "REFINE-AF"}


def folder(workdir: Path, arm: str) -> Path:
    """Where the files are that belong to one arm alone: the workdir itself, or a folder in it."""
    return workdir if arm == REFINE_AF else workdir / arm
