"""Traces of training steps, for XProf (TensorBoard's profile tab) and Perfetto."""

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging

from refine_af.models import processes

_FIRST = 2  # the first steps of a start compile


@dataclass(frozen=True)
class Profile:
    """What to trace: so many steps of a start, behind its first two.

    Attributes:
        folder: `plugins/profile/DATE/` in it gets `HOST.xplane.pb` and `perfetto_trace.json.gz`;
            of several processes each has a folder of its own in it.
        num_steps: 0 for none.
    """

    folder: Path
    num_steps: int

    def over(self, steps: range) -> Generator[int, None, None]:
        """The same steps; those to trace run inside a trace, which ends when they are left, too."""
        first = steps[_FIRST : _FIRST + self.num_steps]
        if len(first) < self.num_steps:
            text = "%d of %d steps are traced: %d are left, and the first %d of a start compile"
            logging.warning(text, len(first), self.num_steps, len(steps), _FIRST)
        with ExitStack() as stack:
            for step in steps:
                if first and step == first[0]:
                    stack.enter_context(_trace(processes.own_folder(self.folder)))
                with jax.profiler.StepTraceAnnotation("step", step_num=step):
                    yield step
                if first and step == first[-1]:
                    stack.close()


@contextmanager
def _trace(folder: Path) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of every function makes files that nothing opens
    with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
        yield
