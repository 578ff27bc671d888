"""Low-rank adapters as trees of their own: `{..., "q": {"lora_a": [L, in, R], "lora_b": ...}}`."""

from typing import Any

import jax
import jax.numpy as jnp

from refine_af.models.config import LoraConfig
from refine_af.models.transformer import Params


def merge(base: Params, adapter: Params, config: LoraConfig) -> Params:
    """Base parameters with `scale * A @ B` added to every adapted kernel (sum in float32).

    Works on stacked and on unstacked layouts; `base` itself stays as it is.
    """

    def visit(node: Any, adapted: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "lora_a" in adapted:
            a, b = adapted["lora_a"], adapted["lora_b"]
            delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * config.scale
            kernel = node["kernel"]
            return {**node, "kernel": (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)}
        return {key: visit(child, adapted.get(key, {})) for key, child in node.items()}

    return visit(base, adapter)
