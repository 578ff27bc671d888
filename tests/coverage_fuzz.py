"""Coverage-guided fuzzing of one property of test_fuzz*.py, by Atheris (pip install atheris).

    python tests/coverage_fuzz.py test_gguf -max_total_time=600 -timeout=60

Further arguments are libFuzzer's. A failure is kept in .hypothesis, where pytest finds it.
"""

import sys

import atheris
import conftest  # noqa: F401 - sets JAX up

with atheris.instrument_imports(include=["refine_af", "gguf"]):
    import test_fuzz
    import test_fuzz_models

name = sys.argv.pop(1)
fuzzed = getattr(test_fuzz, name, None) or getattr(test_fuzz_models, name)
# The bytes are hypothesis's choices, from the first on: short ones make no input at all.
atheris.Setup([*sys.argv, "-len_control=0", "-max_len=2048"], fuzzed.hypothesis.fuzz_one_input)
atheris.Fuzz()
