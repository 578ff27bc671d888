"""Progress bars with rate, tokens per second and time left."""

import time
from typing import Any

from tqdm import tqdm

from refine_af import interruptions
from refine_af.models import processes


class bar(tqdm):
    """A tqdm bar (standard error of the writer) that also shows tokens per second."""

    def __init__(self, description: str, *, total: int, unit: str, done: int = 0) -> None:
        """Show `description` and count to `total` in `unit`; `done` of it was done earlier."""
        super().__init__(
            desc=description,
            total=total,
            unit=f" {unit}",
            unit_scale=unit == "B",  # bytes as kB, MB, GB
            initial=done,
            dynamic_ncols=True,
            disable=not processes.is_writer(),
        )
        self._tokens = 0
        self._began = time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        """Count; also stop where a signal has come.

        Raises:
            KeyboardInterrupt: it has.
        """
        interruptions.check()
        shown: bool | None = super().update(n)
        return shown

    def count_tokens(self, new: int) -> None:
        """Add to the tokens behind the rate that is shown."""
        self._tokens += new
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self.show(tokens_per_second=f"{rate:.0f}")

    def show(self, **values: Any) -> None:
        """Show values after the bar."""
        self.set_postfix(values, refresh=False)
        self.update(0)  # redraws, but no more often than tqdm finds useful
