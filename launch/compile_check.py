"""Compile a run's programs for devices that need not be there, and say whether they fit.

--topology is a TPU slice (v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:2x4, ...) or GPUs of one host (h100:1,
h200:1, h100:8, ...), whose real compilers run on any machine after `pip install -e ".[tpu]"` or
`".[cuda]"`, or `local`: the devices at hand. Exit status 1 when a program does not leave a tenth of
the memory free.
"""

import sys
import textwrap

from absl import flags as absl_flags

from refine_af import abstract_run, compilation
from refine_af.compilation import GIB, Figures, TooLargeError
from refine_af.config import Experiment
from refine_af.launch import flags

_TOPOLOGY = absl_flags.DEFINE_string("topology", "local", "TPU slice, GPUs, or local.")
_PROGRAM = absl_flags.DEFINE_list(
    "program", ["update", "sample"], f"Of {', '.join(abstract_run.KINDS)}."
)
_PROMPT = absl_flags.DEFINE_integer(
    "prompt_length", 1024, "Tokens of the longest prompt.", lower_bound=1
)
_SHARDING = absl_flags.DEFINE_bool(
    "print_sharding", False, "Print every parameter's sharding and its bytes on a device."
)
_MOST_COLLECTIVES = 8  # that are printed
_WIDEST_SHAPE = 60  # characters


def main() -> None:
    """Compile, print, and exit 1 where something does not fit."""
    unknown = [name for name in _PROGRAM.value if name not in abstract_run.KINDS]
    if unknown or not _PROGRAM.value:
        given = ",".join(unknown)
        raise ValueError(f"--program={given}: expected some of {list(abstract_run.KINDS)}")
    config = flags.experiment()
    run = abstract_run.abstract_run(config, _TOPOLOGY.value, _PROMPT.value)
    if _SHARDING.value:
        print("\n".join(compilation.sharding_table(run)))
    if run.base.mesh.devices.flat[0].platform == "gpu" and _TOPOLOGY.value != "local":
        print("as with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95; unset, a run takes three quarters")
    fits = True
    for kind in _PROGRAM.value:
        for program in run.programs(kind):
            try:
                figures = compilation.compiled(program, run.base)
            except TooLargeError as error:
                what = compilation.remedy(program.name, config)
                print(f"{program.name}: does not fit: {error}; {what}")
                fits = False
            else:
                _show(figures, config)
                fits &= figures.fits
    if not fits:
        sys.exit(1)


def _show(figures: Figures, config: Experiment) -> None:
    """Print the figures of a program."""
    print(f"{figures.program}: compiled in {figures.seconds:.0f} s; on each device")
    parts = ("arguments", "outputs", "temporaries", "aliased", "resident")
    sizes = ", ".join(f"{part} {getattr(figures, part) / GIB:.2f}" for part in parts)
    print(
        f"  memory (GiB): {sizes}; in all {figures.total / GIB:.2f} of {figures.memory / GIB:.0f}"
    )
    ratio = figures.operations / figures.model_operations
    print(f"  operations: {figures.operations:.3g}, {ratio:.2f} times the model's own")
    if figures.moved is not None:
        print(f"  memory traffic: {figures.moved:.3g} bytes, loops counted once")
    if figures.least_seconds is not None:
        print(f"  time: {1e3 * figures.least_seconds:.3g} ms at the least")
    for one in figures.collectives[:_MOST_COLLECTIVES]:
        shape = textwrap.shorten(one.shape, _WIDEST_SHAPE, placeholder=" ...")
        print(f"  {one.times} x {one.kind} {shape}, {one.size * one.times / 2**20:.0f} MiB")
    left = figures.collectives[_MOST_COLLECTIVES:]
    if left:
        rest = sum(one.size * one.times for one in left)
        print(f"  {len(left)} smaller kinds of collectives, {rest / 2**20:.0f} MiB")
    for warning in figures.warnings:
        print(f"  warning: {warning}")
    if not figures.fits:
        print(f"  does not fit: {compilation.shortage(figures, config)}")


if __name__ == "__main__":
    flags.start(main, with_config=True, resumes=False, one_process=True)
