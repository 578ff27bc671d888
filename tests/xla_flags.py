"""Flags of XLA that are set before JAX is imported, so that this imports nothing."""

_SIMPLE = "--xla_cpu_use_fusion_emitters=false"

# For programs that are compiled a lot and compute little: it halves the time of most tests.
LITTLE_OPTIMIZATION = f"--xla_backend_optimization_level=0 {_SIMPLE}"

# For whole runs, of which the same programs are compiled once and used by many.
SOME_OPTIMIZATION = f"--xla_backend_optimization_level=1 {_SIMPLE}"
