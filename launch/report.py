"""Write report.html from whatever stages have run in a workdir."""

from pathlib import Path

from absl import flags as absl_flags

from refine_af import report
from refine_af.launch import flags

_WORKDIR = absl_flags.DEFINE_string("workdir", None, "Directory of the run.")


def main() -> None:
    """Read the workdir's files; no model is loaded."""
    print(report.write_report(Path(flags.require(_WORKDIR)).expanduser()))


if __name__ == "__main__":
    flags.start(main, resumes=False, one_process=True)
