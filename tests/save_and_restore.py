"""One of several processes that save an array, a part each, and restore it, for tests."""

from pathlib import Path

import numpy as np
from absl import flags as absl_flags
from jax.sharding import NamedSharding, PartitionSpec

from refine_af import checkpoints, mesh
from refine_af.config import Mesh
from refine_af.launch import flags
from refine_af.models import processes

_DIRECTORY = absl_flags.DEFINE_string("directory", None, "Of the checkpoints.")


def main() -> None:
    """Save steps 1 and 2 where nothing is, else print the step that comes back."""
    where = NamedSharding(mesh.make_mesh(Mesh(fsdp=-1)), PartitionSpec("fsdp"))
    host = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    directory = Path(flags.require(_DIRECTORY))
    with checkpoints.open_manager(directory, keep=3) as manager:
        if not checkpoints.latest_step(directory):
            for step in (1, 2):
                checkpoints.save(manager, step, {"x": processes.to_devices(host + step, where)})
            return
        step, tree = checkpoints.restore_latest(manager, {"x": processes.to_devices(host, where)})
    np.testing.assert_array_equal(processes.to_host(tree)["x"], host + step)
    print("restored", step)


if __name__ == "__main__":
    flags.start(main)
