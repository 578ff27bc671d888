"""Flags of XLA that are set before JAX is imported, so that this imports nothing."""

# For programs that are compiled a lot and compute little: it halves the time of most tests.
LITTLE_OPTIMIZATION = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
