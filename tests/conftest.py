"""Eight host devices, no network, and JAX's strict modes, all set before JAX is imported."""

import os
import shutil
import tempfile
from collections.abc import Iterator

from xla_flags import LITTLE_OPTIMIZATION

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # cuda: the tests that need a GPU run, too
# Compiling takes most of the time. What was compiled is kept until the end, for all workers.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        LITTLE_OPTIMIZATION,
    ]
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="refine-af-compiled-")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest
import xdist

pytest_plugins = ["programs", "runs"]  # their fixtures

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# The first example of a property compiles, so no deadline; the same examples in every run.
hypothesis.settings.register_profile("refine_af", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile("refine_af")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not xdist.is_xdist_worker(session):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Thousands of compiled programs use up the memory maps that Linux grants a process."""
    yield
    jax.clear_caches()
