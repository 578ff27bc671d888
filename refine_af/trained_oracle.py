"""A reward oracle that was trained: LoRA and four linear heads on a frozen decoder.

One forward pass reads a task and an answer; the final hidden state of the last token, the end
token, gives all four components:

    h = Transformer(base + adapter)("Task: {context}\\nResponse: {output}" <end>)[last]
    rew = h . w_rew + b_rew                  nat, und, coh = sigmoid(h . w + b)

`rew` is a Bradley-Terry strength (Biometrika 39, 1952): of two answers to one task the first is
the better one with probability sigmoid(rew_1 - rew_2). An oracle is a directory that
`launch.train_oracle` wrote, or one that is shipped with this package.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from refine_af import base_model, config_reading, records, scoring, validation
from refine_af import config as config_lib
from refine_af.base_model import BaseModel
from refine_af.models import heads, processes, transformer
from refine_af.models.one_line import one_line
from refine_af.models.transformer import Definition, Params
from refine_af.models.weights import flat, misfits, put, refuse
from refine_af.rewards import Example

SHIPPED = Path(__file__).parent / "shipped_oracles"
DESCRIPTION, ADAPTER = "oracle.json", "adapter.safetensors"
HEADS = config_lib.PAPER_COMPONENTS  # columns of the heads' kernel; `rew` first
_FORMAT = 1
# What changes how a model is computed, not what it is.
_NOT_IDENTITY = (
    "dtype",
    "param_dtype",
    "attention_kernel",
    "decode_kernel",
    "int8_weights",
    "int8_cache",
)


@dataclasses.dataclass(frozen=True)
class Description:
    """What `oracle.json` says."""

    model: str  # as `--model` takes it
    config_hash: str  # of the model's shape
    weights_hash: str  # of some rows of every array
    lora: config_lib.Lora
    max_length: int  # tokens that are read of an example

    def __post_init__(self) -> None:
        """Validate."""
        validation.require_at_least(8, self, "", "max_length")

    def to_json(self) -> str:
        """The file's content."""
        content = {"format": _FORMAT, **dataclasses.asdict(self), "heads": HEADS}
        return json.dumps(content, indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class TrainedOracle:
    """Scores examples with the weights of `base`, which stay as they are."""

    description: Description
    base: BaseModel
    params: Params  # {"adapter": LoRA, "heads": {"kernel": [D, 4], "bias": [4]}}

    def __call__(
        self, examples: Sequence[Example], progress: Callable[[int], Any] | None = None
    ) -> dict[str, np.ndarray]:
        """`rew`, any number, and `nat`, `und`, `coh` in [0, 1]: float64 [B] each."""
        if not examples:
            return {name: np.zeros(0) for name in HEADS}
        base = self.base
        definition = base.adapted(self.description.lora)
        rows = [
            tuple(encode(example, base.tokenizer, base.end_id, self.description.max_length))
            for example in examples
        ]

        def score(padded: Array, lengths: Array, _: Array) -> Array:
            return _components(definition, base.params, self.params, padded, lengths)

        table = scoring.by_length(score, rows, base.mesh, progress=progress)
        return dict(zip(HEADS, table.T, strict=True))


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, end_id: int, max_length: int
) -> list[int]:
    """Token ids of a task and an answer, at most `max_length`, the last one `end_id`.

    Of a task that is too long the beginning goes; of an answer too long for three quarters of
    `max_length`, its end.
    """
    context = tokenizer(f"Task: {example.context}\nResponse:").input_ids
    output = tokenizer(f" {example.output}", add_special_tokens=False).input_ids
    output = output[: max_length * 3 // 4 - 1]
    return [*context[max(len(context) + len(output) + 1 - max_length, 0) :], *output, end_id]


def logits(
    definition: Definition,
    base: Params,
    params: Params,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B *T"],
    rows: Int[Array, "N"],
    columns: Int[Array, "N"],
    *,
    remat: str = "none",
) -> Float[Array, "N 4"]:
    """What the heads say of N texts whose last tokens stand in these rows and columns."""
    model = transformer.bind(definition, base, params["adapter"])
    hidden, _ = model(tokens, start, remat=remat)
    return heads.scores(params["heads"], hidden[rows, columns])


@functools.partial(jax.jit, static_argnums=0)
def _components(
    definition: Definition,
    base: Params,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B 4"]:
    rows = jnp.arange(tokens.shape[0])
    found = logits(definition, base, params, tokens, jnp.zeros_like(lengths), rows, lengths - 1)
    return jnp.concatenate([found[:, :1], jax.nn.sigmoid(found[:, 1:])], axis=1)


# On disk


def shipped() -> list[str]:
    """Names of the oracles that come with this package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{DESCRIPTION}"))


def find(where: str | Path) -> Path:
    """Directory of an oracle.

    Raises:
        ValueError: it is neither a shipped name nor a directory that holds one.
    """
    if str(where) in shipped():
        return SHIPPED / where
    path = Path(where).expanduser()
    if not records.exists(path / DESCRIPTION):
        raise ValueError(
            f"oracle {str(where)!r}: expected a directory with {DESCRIPTION}, as train_oracle "
            f"writes it, or one of {shipped()}"
        )
    return path


def describe(where: str | Path) -> Description:
    """What an oracle is, without its weights.

    Raises:
        ValueError: there is none, or its description is not one.
    """
    path = find(where) / DESCRIPTION
    raw = records.read_json(path)
    if raw.get("format") != _FORMAT or raw.get("heads") != list(HEADS):
        raise ValueError(
            f"{path}: format {raw.get('format')!r} with heads {raw.get('heads')!r}; expected "
            f"format {_FORMAT} with {list(HEADS)}"
        )
    try:
        found: Description = config_reading.from_dict(Description, raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def identity(base: BaseModel) -> dict[str, str]:
    """Hashes of a model's shape and of some of its weights, of every array the first row.

    Weights are compared as bfloat16: the same for a model in memory in either precision.
    """
    shape = dataclasses.asdict(base.config)
    shape = {name: value for name, value in shape.items() if name not in _NOT_IDENTITY}
    digest = hashlib.sha256()
    for path, leaf in flat(base.params):
        row = leaf[..., :1, :] if leaf.ndim > 1 else leaf
        row = processes.to_host(row.astype(jnp.bfloat16))
        digest.update(path.encode() + row.tobytes())
    text = json.dumps(shape, sort_keys=True)
    return {
        "config_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
        "weights_hash": digest.hexdigest()[:16],
    }


def _differences(description: Description, base: BaseModel) -> list[str]:
    return [
        f"{name} {getattr(description, name)} is not {mine}"
        for name, mine in identity(base).items()
        if getattr(description, name) != mine
    ]


def load(
    where: str | Path,
    base: BaseModel | None = None,
    *,
    mesh: config_lib.Mesh | None = None,
    dtype: str = "bfloat16",
) -> TrainedOracle:
    """Oracle of a directory or of a shipped name.

    Args:
        base: the model that it was trained on, whose weights it shares; None loads that model in
            `dtype` on `mesh`.

    Raises:
        ValueError: there is no such oracle, its files do not fit, or `base` is another model.
    """
    description, path = describe(where), find(where) / ADAPTER
    if base is None:
        model = config_lib.Model(source=description.model, dtype=dtype, param_dtype=dtype)
        base = base_model.load(model, mesh or config_lib.Mesh())
    if differences := _differences(description, base):
        raise ValueError(
            f"oracle {str(where)!r} was trained on {description.model!r}, which "
            f"{base.source.name!r} is not: {'; '.join(differences)}"
        )
    return TrainedOracle(description, base, base.replicate(_read(path, description, base)))


def _read(path: Path, description: Description, base: BaseModel) -> Params:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable ({one_line(error)})") from None
    shape = base_model.lora_config(description.lora)
    _, adapter = transformer.logical_axes(base.config, shape)
    wanted = {
        f"adapter/{name}": leaf[0].shape
        for name, leaf in flat(adapter, is_leaf=lambda node: isinstance(node, tuple))
    }
    width = base.config.embed_dim
    wanted |= {"heads/kernel": (width, len(HEADS)), "heads/bias": (len(HEADS),)}
    refuse(misfits({name: tensor.shape for name, tensor in tensors.items()}, wanted), str(path))
    params: Params = {}
    for name, tensor in tensors.items():
        put(params, name, jnp.asarray(tensor, jnp.float32))
    return params


def write(params: Params, description: Description, directory: Path) -> None:
    """Write adapter and description; factors as float16, of which `load` makes float32."""
    tensors = {
        name: np.asarray(leaf, np.float16 if name.startswith("adapter/") else np.float32)
        for name, leaf in flat(processes.to_host(params))
    }
    processes.by_writer(lambda: save_file(tensors, directory / ADAPTER))
    records.write_text(directory / DESCRIPTION, description.to_json())
