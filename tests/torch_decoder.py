"""A decoder in torch: whole logits, one text at a time, no padding, float64."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from decoders import write_directory

from refine_af.config import Lora
from refine_af.models import sources
from refine_af.models.config import ModelConfig
from refine_af.models.transformer import Params


def leaf(x: Any) -> torch.Tensor:
    """An array as a parameter."""
    return torch.tensor(np.asarray(x, np.float64), requires_grad=True)


class Torch:
    """The model of some weights; what is trained of it, as in `refine_af.trunk`, are leaves."""

    def __init__(
        self, folder: Path, config: ModelConfig, base: Params, trained: Params, lora: Lora
    ) -> None:
        torch.set_num_threads(1)  # its threads and XLA's, spinning on the same cores
        write_directory(config, trained.get("model", base), folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=torch.float64, attn_implementation="eager")
        self.adapter = jax.tree.map(leaf, trained.get("adapter", {}))
        self.scale = lora.alpha / lora.rank

    @property
    def leaves(self) -> list[torch.Tensor]:
        return jax.tree.leaves(self.adapter) or list(self.model.parameters())

    def __call__(self, ids: list[int]) -> Any:
        """Logits and hidden states of a text."""
        call = {"input_ids": torch.tensor([ids]), "output_hidden_states": True}
        return torch.func.functional_call(self.model, self._weights(), (), call)

    def _weights(self) -> dict[str, torch.Tensor]:
        """With alpha / rank * A B added, where there is an adapter."""
        weights = dict(self.model.named_parameters())
        blocks = {"attention": "self_attn", "feed_forward": "mlp"}
        for block, linears in self.adapter.get("layers", {}).items():
            for name, pair in linears.items():
                for i, (a, b) in enumerate(zip(pair["lora_a"], pair["lora_b"], strict=True)):
                    key = f"model.layers.{i}.{blocks[block]}.{name}_proj.weight"
                    weights[key] = weights[key] + self.scale * (a @ b).T
        return weights

    def tree(self, folder: Path, of: Callable[[torch.Tensor], torch.Tensor]) -> Params:
        """Something of each leaf as our tree; that of a whole model goes through its file."""
        if self.adapter:
            return {"adapter": jax.tree.map(lambda x: of(x).detach().numpy(), self.adapter)}
        twin = copy.deepcopy(self.model)
        found = {name: of(x) for name, x in self.model.named_parameters()}
        twin.load_state_dict(found, strict=False)  # a tied head has none of its own
        twin.float().save_pretrained(folder)
        return {"model": sources.open_model(str(folder), param_dtype="float32").load()}


def gradient(x: torch.Tensor) -> torch.Tensor:
    """For `Torch.tree`."""
    assert x.grad is not None
    return x.grad
