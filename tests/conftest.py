"""Eight host devices, no network, and JAX's strict modes, all set before JAX is imported."""

import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # cuda: the tests that need a GPU run, too
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest

pytest_plugins = ["programs", "runs"]  # their fixtures

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# The first example of a property compiles, so no deadline; the same examples in every run.
hypothesis.settings.register_profile("refine_af", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile("refine_af")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Thousands of compiled programs use up the memory maps that Linux grants a process."""
    yield
    jax.clear_caches()
