"""Devices that need not be there: TPU slices and GPUs, for their compilers.

Neither compiler needs its hardware: that of TPUs comes with `pip install -e ".[tpu]"`, that of GPUs
with `".[cuda]"`.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies as jax_topologies

from refine_af import flops

# What the libraries would ask the machine for.
_NO_DEVICE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations at a time
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # part of it asks the driver
}


# Device kinds by their name in a topology.
_GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
_MOST_GPUS = 8  # of a host
_EXPECTED = "local, a slice such as v5e:4x4, v5p:2x2x2, v6e:2x4, or GPUs such as h100:8, h200:1"

# Both have 132 multiprocessors (NVIDIA H100 Tensor Core GPU Architecture, table 3; H200 data
# sheet); the rest is what a program may use of one (CUDA C++ programming guide, compute
# capability 9.0), with the oldest libraries that jax's extra `cuda13` brings.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""


def devices(topology: str) -> Sequence[Any]:
    """Devices of a TPU slice such as `v5e:4x4`, GPUs such as `h100:8`, those at hand for `local`.

    Sets environment variables that keep the compilers from looking for hardware, and turns the
    compilation cache off, which cannot read their programs back.

    Raises:
        ValueError: no such topology, nothing is known of its devices, or its compiler is not
            installed.
    """
    if topology == "local":
        return jax.devices()
    for name, value in _NO_DEVICE.items():
        os.environ.setdefault(name, value)
    gpu = re.fullmatch(rf"({'|'.join(_GPUS)}):(\d+)", topology)
    if gpu and not 1 <= int(gpu[2]) <= _MOST_GPUS:
        raise ValueError(
            f"--topology={topology}: a host has 1 to {_MOST_GPUS} GPUs; of several hosts check "
            "one, with its part of the batch"
        )
    if not gpu and not re.fullmatch(r"v\d+[a-z]*:\d+(x\d+)+", topology):
        raise ValueError(f"--topology={topology}: expected {_EXPECTED}")
    try:
        if gpu:
            asked = {"target_config": _hopper(_GPUS[gpu[1]]), "topology": f"1x1x{gpu[2]}"}
            found = jax_topologies.get_topology_desc(platform="cuda", **asked)
        else:
            found = jax_topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except NotImplementedError:  # of jax, where it finds no such compiler
        extra = "cuda" if gpu else "tpu"
        raise ValueError(
            f"--topology={topology}: the compiler is not installed; pip install -e '.[{extra}]'"
        ) from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:120]
        raise ValueError(
            f"--topology={topology}: {reason}; expected {_EXPECTED}; the compilers come with "
            "pip install -e '.[tpu]' and '.[cuda]'"
        ) from None
    made: list[Any] = list(found.devices)
    kind = made[0].device_kind
    if kind not in flops.CHIPS:
        raise ValueError(f"--topology={topology}: {kind}; expected one of {list(flops.CHIPS)}")
    jax.config.update("jax_enable_compilation_cache", False)
    return made


def _hopper(kind: str) -> str:
    """What the compiler wants to know of a GPU."""
    chip = flops.CHIPS[kind]
    return _HOPPER.format(kind=kind, memory=chip.memory * 2**30, bandwidth=round(chip.bandwidth))
