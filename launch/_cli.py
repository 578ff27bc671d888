"""Console scripts: `refine-af-train-ppo` runs `python -m refine_af.launch.train_ppo`."""

import runpy
from collections.abc import Callable


def __getattr__(name: str) -> Callable[[], None]:
    """Entry point of the program `name`; pyproject.toml lists those that become console scripts.

    The program runs as `__main__` because absl shows in `--help` the flags of that module only.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def run() -> None:
        runpy.run_module(f"refine_af.launch.{name}", run_name="__main__", alter_sys=True)

    return run
