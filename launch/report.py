"""Write report.html from whatever stages have run in a workdir, or compare evaluated runs.

With --workdir: the report of a run. With --compare and --output: comparison.json, comparison.md,
gains.png and report.html of two or more runs side by side.
"""

from absl import flags as absl_flags

from refine_af import comparison, comparison_report, report
from refine_af.launch import _files, flags

_WORKDIR = absl_flags.DEFINE_string("workdir", None, "Directory of the run to report on.")
_COMPARE = absl_flags.DEFINE_list(
    "compare",
    None,
    "Runs [NAME=]DIR[:ARM][+DIR[:ARM]...], a baseline before what is held against it. DIR has an "
    "evaluation.json: a workdir, or an --output of evaluate. Without ARM refine_af, "
    "self_instruct or base, the first that is there. With + the mean of several, as of seeds.",
)
_OUTPUT = absl_flags.DEFINE_string("output", None, "Directory to write the comparison in.")
_SEED = absl_flags.DEFINE_integer(
    "seed", 0, "Random seed of the bootstrap intervals.", lower_bound=0
)


def main() -> None:
    """Read the files of the runs; no model is loaded."""
    if (_WORKDIR.value is None) == (_COMPARE.value is None):
        raise ValueError("give --workdir, or --compare and --output; see --help")
    if _WORKDIR.value is not None:
        print(report.write_report(_files.directory(_WORKDIR)))
        return
    output = _files.output_directory(_OUTPUT, "report")
    runs = [comparison.open_run(text) for text in _COMPARE.value or ()]
    found = comparison_report.write_comparison(runs, output, _SEED.value or 0)
    for pair in found["pairs"]:
        print(comparison_report.summary(pair))
    print(output / comparison_report.PAGE)


if __name__ == "__main__":
    flags.start(main, resumes=False, one_process=True)
