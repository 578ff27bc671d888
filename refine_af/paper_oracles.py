"""The paper's oracles: OpenAssistant's preference model and UniEval-dialog.

`OasstRewardModel` gives `rew`, `UniEval` gives `nat`, `und` and `coh`; together they are all that
`rewards.combine` needs. Both read a Hugging Face directory: config.json, the tokenizer's files and
weights as safetensors or `pytorch_model.bin`. No code of a directory is ever run.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_af import mesh as mesh_lib
from refine_af import scoring
from refine_af.models import gpt_neox, hf_config, sources, t5
from refine_af.models.gpt_neox import GPTNeoXConfig
from refine_af.models.t5 import T5Config
from refine_af.models.transformer import Params
from refine_af.rewards import Example

_PROMPTER, _ASSISTANT, _END = "<|prompter|>", "<|assistant|>", "<|endoftext|>"
_UNIEVAL_TOKENS = 1024  # of a question, the end token included: UniEval's own limit

_VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")


@dataclasses.dataclass(frozen=True)
class OasstRewardModel:
    """OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5 (OpenAssistant, arXiv 2304.07327).

    Attributes:
        params: on `mesh`, as `gpt_neox.logical_axes`.
    """

    published: ClassVar = "OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5"
    config: GPTNeoXConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    mesh: jax.sharding.Mesh

    @classmethod
    def load(cls, directory: str | Path, mesh: jax.sharding.Mesh, dtype: str = "float32") -> Self:
        """Read a directory.

        Args:
            dtype: of weights and activations; scores are float32.

        Raises:
            ValueError: the directory lacks something, or is not such a model's.
        """
        directory = Path(directory)
        raw, where = _raw_config(directory)
        config = gpt_neox.from_hf_config(raw, where, dtype=dtype, param_dtype=dtype)
        tokenizer = _tokenizer(directory, config.vocab_size)
        for token in (_PROMPTER, _ASSISTANT, _END):
            if len(_ids(tokenizer, token)) != 1:
                raise ValueError(
                    f"{directory}: {token} is not one token of the tokenizer; expected that of an "
                    "OpenAssistant reward model"
                )
        axes = gpt_neox.logical_axes(config)
        shardings = mesh_lib.shardings_of(axes, mesh, head_dim=config.head_dim)
        params = gpt_neox.open_weights(directory, config).load(dtype, shardings)
        return cls(config, params, tokenizer, mesh)

    def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Score of each example, higher is better, without bounds."""

        def score(tokens: jax.Array, lengths: jax.Array, _: jax.Array) -> jax.Array:
            return gpt_neox.rewards(self.config, self.params, tokens, lengths)

        rows = [self.token_ids(example) for example in examples]
        return {"rew": scoring.by_length(score, rows, self.mesh)}

    def token_ids(self, example: Example) -> list[int]:
        """Ids of `<|prompter|>{task}<|endoftext|><|assistant|>{output}<|endoftext|>`.

        A text of more than `max_positions` tokens loses the beginning of its task, and an answer
        that alone is too long loses its end as well; the four special tokens always stay.
        """
        answer = f"{_END}{_ASSISTANT}{example.output}{_END}"
        row = _ids(self.tokenizer, f"{_PROMPTER}{example.context}{answer}")
        limit = self.config.max_positions
        if len(row) <= limit:
            return row
        tail = _ids(self.tokenizer, answer)
        if len(tail) < limit:
            return [row[0], *row[1 - limit :]]
        return [row[0], *tail[: limit - 2], tail[-1]]


@dataclasses.dataclass(frozen=True)
class UniEval:
    """UniEval-dialog (arXiv 2210.07197): yes/no questions to a T5.

    Attributes:
        params: on `mesh`, as `t5.logical_axes`.
        answers: ids of the tokens Yes and No.
    """

    published: ClassVar = "MingZhong/unieval-dialog"
    config: T5Config
    params: Params
    tokenizer: PreTrainedTokenizerBase
    mesh: jax.sharding.Mesh
    answers: tuple[int, int]

    @classmethod
    def load(cls, directory: str | Path, mesh: jax.sharding.Mesh, dtype: str = "float32") -> Self:
        """Read a directory.

        Args:
            dtype: of weights and activations; scores are float32.

        Raises:
            ValueError: the directory lacks something, or is not such a model's.
        """
        directory = Path(directory)
        raw, where = _raw_config(directory)
        config = t5.from_hf_config(raw, where, dtype=dtype, param_dtype=dtype)
        tokenizer = _tokenizer(directory, config.vocab_size)
        yes, no = (_ids(tokenizer, answer)[0] for answer in ("Yes", "No"))
        if yes == no:
            raise ValueError(
                f"{directory}: the tokenizer begins Yes and No with the same token {yes}; expected "
                "that of a UniEval model"
            )
        axes = t5.logical_axes(config)
        shardings = mesh_lib.shardings_of(axes, mesh, head_dim=config.head_dim)
        params = t5.open_weights(directory, config).load(dtype, shardings)
        return cls(config, params, tokenizer, mesh, (yes, no))

    def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Naturalness, understandability and coherence of each example, in [0, 1]."""

        def score(tokens: jax.Array, lengths: jax.Array, _: jax.Array) -> jax.Array:
            return t5.yes_probability(self.config, self.params, tokens, lengths, *self.answers)

        texts = [questions(example) for example in examples]
        rows = [self.token_ids(text[name]) for name in _QUESTIONS for text in texts]
        scores = scoring.by_length(score, rows, self.mesh)
        columns = scores.reshape(len(_QUESTIONS), len(examples))
        return dict(zip(_QUESTIONS, columns, strict=True))

    def token_ids(self, text: str) -> list[int]:
        """Ids of a question with the end token; one too long loses what comes last before it."""
        encoded = self.tokenizer(text, truncation=True, max_length=_UNIEVAL_TOKENS)
        return list(encoded["input_ids"])


_QUESTIONS = {
    "nat": "question: Is this a natural response in the dialogue? </s> response: {output}",
    "und": "question: Is this an understandable response in the dialogue? </s> response: {output}",
    "coh": "question: Is this a coherent response given the dialogue history? </s> "
    "response: {output} </s> dialogue history: {context}",
}


def questions(example: Example) -> dict[str, str]:
    """UniEval's texts by component; `</s>` is the end token, here between their parts."""
    parts = {"output": example.output, "context": example.context}
    return {name: text.format(**parts) for name, text in _QUESTIONS.items()}


def _raw_config(directory: Path) -> tuple[hf_config.Raw, str]:
    path = directory / "config.json"
    return hf_config.read_json(path), str(path)


def _tokenizer(directory: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Tokenizer of a directory, whose ids the model knows."""
    # Without these, transformers makes up a vocabulary of special tokens alone.
    present = [name for name in _VOCABULARIES if (directory / name).exists()]
    if present == ["spiece.model"] and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f'{directory}: reading spiece.model needs sentencepiece: pip install -e ".[oracles]"'
        )
    tokenizer = sources.read_tokenizer(directory) if present else None
    if tokenizer is None:
        raise ValueError(f"{directory}: no tokenizer; expected one of {', '.join(_VOCABULARIES)}")
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {vocab_size}"
        )
    return tokenizer


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])
