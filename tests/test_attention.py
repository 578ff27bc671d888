"""Attention against a plain transcription, kernels against it, caches against a list."""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import LLAMA, random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as cudnn_lib
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from refine_af.config import Mesh
from refine_af.mesh import attention_layout, make_mesh
from refine_af.models import attention, cache, decode_kernel, kernels, rotary, transformer
from refine_af.models.attention import Seen
from refine_af.models.cache import Stored
from refine_af.models.config import LinearRope, Llama3Rope, ModelConfig

BATCH = 2


def config(heads: int, kv_heads: int, head_dim: int, **changes: Any) -> ModelConfig:
    return dataclasses.replace(
        LLAMA, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **changes
    )


def operands(c: ModelConfig, length: int, keys: int | None = None) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = [(c.num_heads, length), *[(c.num_kv_heads, keys or length)] * 2]
    return tuple(
        jnp.asarray(rng.standard_normal((BATCH, n, t, c.head_dim)), c.dtype) for n, t in shapes
    )


def mask_of(start: Any, length: int, window: int | None) -> jax.Array:
    columns = jnp.arange(length)
    return attention.visible(jnp.asarray(start)[:, None], columns, columns, window)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, c: ModelConfig) -> jax.Array:
    return attention.attend(q, [Seen(Stored(k, v), mask)], c)


# The reference


def plainly(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float, cap: float | None
) -> np.ndarray:
    """One query at a time, float64."""
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for b, n, t in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, n // group, seen].astype(float) @ q[b, n, t].astype(float) * scale
        scores = scores if cap is None else np.tanh(scores / cap) * cap
        weights = np.exp(scores - scores.max())
        out[b, n, t] = weights @ v[b, n // group, seen] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("kv_heads", "window", "softcap", "scalar"),
    [(4, None, None, None), (2, 3, None, None), (1, None, 0.7, 5.0), (2, 4, 2.0, 9.0)],
)
def test_attend_is_softmax_attention(
    kv_heads: int, window: int | None, softcap: float | None, scalar: float | None
) -> None:
    c = config(4, kv_heads, 8, attention_softcap=softcap, query_pre_attn_scalar=scalar)
    q, k, v = operands(c, 10)
    mask = mask_of([0, 0], 10, window)
    expected = plainly(*map(np.asarray, (q, k, v, mask)), (scalar or 8) ** -0.5, softcap)
    np.testing.assert_allclose(attend(q, k, v, mask, c), expected, atol=1e-5, rtol=0)


def test_a_query_that_sees_nothing_is_finite_forward_and_backward() -> None:
    c = config(2, 1, 8)
    q, k, v = operands(c, 6)
    mask = mask_of([0, 4], 6, None)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, mask, c).sum()

    assert jnp.isfinite(total(q, k, v))
    assert all(jnp.isfinite(g).all() for g in jax.grad(total, (0, 1, 2))(q, k, v))


# Kernels against the reference, on the queries that are not padding


def compare(
    kernel: Callable[..., jax.Array],
    c: ModelConfig,
    length: int,
    window: int | None,
    start: list[int],
    atol: float,
) -> None:
    q, k, v = operands(c, length)
    weight = operands(c, length)[0].astype(jnp.float32)
    real = (jnp.arange(length)[None] >= jnp.asarray(start)[:, None])[:, None, :, None]
    mask = mask_of(start, length, window)
    fused = functools.partial(
        kernel,
        start=jnp.asarray(start, jnp.int32)[:, None],
        window=window,
        scale=attention.scale(c),
        softcap=c.attention_softcap,
    )
    plain = functools.partial(attend, mask=mask, c=c)

    def value(attend: Callable[..., jax.Array], *operands: jax.Array) -> Any:
        out = jnp.where(real, attend(*operands).astype(jnp.float32), 0.0)
        return jnp.sum(out * weight), out

    results = [
        jax.jit(jax.value_and_grad(functools.partial(value, f), (0, 1, 2), has_aux=True))(q, k, v)
        for f in (fused, plain)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=atol, rtol=atol
        ),
        *results,
    )


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "window", "softcap", "start"),
    [
        (128, 4, 2, 64, None, None, [0, 5]),
        (384, 2, 2, 64, 100, None, [0, 140]),
        (384, 2, 1, 128, 128, None, [3, 0]),
        (256, 4, 1, 128, None, 3.0, [0, 130]),
        (256, 2, 1, 64, 300, 1.0, [0, 0]),
    ],
)
def test_splash_attention_is_the_reference(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    start: list[int],
) -> None:
    """Interpreted on the CPU, forward and backward."""
    c = config(heads, kv_heads, head_dim, attention_softcap=softcap)
    kernel = functools.partial(kernels.splash, interpret=True)
    compare(kernel, c, length, window, start, atol=2e-5)


def loss(kernel: Callable[..., jax.Array], window: int | None) -> Callable[..., jax.Array]:
    """Something to differentiate."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
        out = kernel(q, k, v, start, window=window, scale=0.1, softcap=None)
        return out.astype(jnp.float32).sum()

    return run


def lowered(kernel: Callable[..., jax.Array], window: int | None, platform: str) -> str:
    """StableHLO of forward and backward for a platform that is not here."""
    c = config(4, 2, 128, dtype="bfloat16")
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(c, 256))
    start = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)
    traced = jax.jit(jax.grad(loss(kernel, window), (0, 1, 2))).trace(q, k, v, start)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window", [None, 100])
def test_splash_attention_lowers_for_a_tpu(window: int | None) -> None:
    """One kernel forward, two backward."""
    assert lowered(kernels.splash, window, "tpu").count("tpu_custom_call") == 3


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_attention_lowers_for_a_gpu(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here, so JAX is told of one; what cuDNN then computes is not looked at."""
    monkeypatch.setattr(cudnn_lib, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn_lib, "check_compute_capability", lambda *_: True)
    text = lowered(kernels.cudnn, window, "cuda")
    assert "__cudnn$fmha" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert ("sliding_window_length" in text) and (
        f"sliding_window_length\\22: {window}" in text
    ) == (window is not None)


@pytest.mark.parametrize("window", [None, 5])
def test_the_arguments_of_cudnn_mean_the_reference(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call, computed by XLA: causal, windowed and padded as it should be."""
    call = jax.nn.dot_product_attention

    def by_xla(*args: Any, implementation: str, **kwargs: Any) -> jax.Array:
        assert implementation == "cudnn"
        return call(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    with jax.numpy_rank_promotion("allow"):
        compare(kernels.cudnn, config(4, 2, 16), 24, window, [0, 7], atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_attention_is_the_reference(window: int | None) -> None:
    c = config(4, 2, 128, dtype="bfloat16")
    compare(kernels.cudnn, c, 256, window, [0, 37], atol=3e-2)


@pytest.mark.parametrize("window", [None, 20])
def test_texts_packed_into_a_row_do_not_see_each_other(window: int | None) -> None:
    """Segments of the kernel, and of the reference's mask, against each text alone."""
    c = config(4, 2, 64)
    q, k, v = operands(c, 128)
    first = jnp.where(jnp.arange(128) < 50, 0, 50)[None].repeat(BATCH, 0)
    columns = jnp.arange(128)
    packed = attend(q, k, v, attention.visible(first, columns, columns, window), c)
    fused = kernels.splash(
        q, k, v, first, window=window, scale=attention.scale(c), softcap=None, interpret=True
    )
    np.testing.assert_allclose(fused, packed, atol=2e-5)
    for part in (slice(0, 50), slice(50, 128)):
        length = part.stop - part.start
        alone = attend(
            q[:, :, part], k[:, :, part], v[:, :, part], mask_of([0, 0], length, window), c
        )
        np.testing.assert_allclose(packed[:, :, part], alone, atol=1e-5)


# Decoding


@pytest.mark.parametrize("groups", [1, 4, 20])
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("end", [50, 192, 400])
def test_the_decode_kernel_is_the_reference(groups: int, splits: int | None, end: int) -> None:
    """A ring in its first round, at its end, in a later one; a text before column 0."""
    c = config(2 * groups, 2, 32, dtype="bfloat16")
    q, k, v = operands(c, 1, 192)
    first = jnp.asarray([end - 192, end - 3])
    mask = cache.columns(192, jnp.int32(end))[None, None] >= first[:, None, None]
    scaled = (q * attention.scale(c)).reshape(BATCH, 2, groups, 32)
    parts = decode_kernel.attend(
        scaled, Stored(k, v), first, jnp.int32(end), splits=splits, interpret=True
    )
    mixed = decode_kernel.merged(parts).reshape(q.shape)
    np.testing.assert_allclose(mixed, attend(q, k, v, mask, c).astype(jnp.float32), atol=1e-2)


def test_partial_softmaxes_make_one() -> None:
    """Of a row that sees nothing of the first part, and of one that sees some of both."""
    c = config(4, 2, 32, dtype="bfloat16")
    q, k, v = operands(c, 1, 96)
    mask = jnp.arange(96)[None, None] >= jnp.asarray([[[40]], [[7]]])
    scaled = (q * attention.scale(c)).reshape(BATCH, 2, 2, 32)
    parts = [
        Seen(Stored(x[:, :, a], y[:, :, a]), mask[..., a])
        for x, y, a in ((k, v, slice(0, 32)), (k, v, slice(32, 96)))
    ]
    merged = decode_kernel.merged([x for p in parts for x in attention._partials(scaled, p)])
    expected = attend(q, k, v, mask, c).astype(jnp.float32)
    np.testing.assert_allclose(merged.reshape(q.shape), expected, atol=1e-2)


@pytest.mark.parametrize(("groups", "places"), [(4, 256), (1, 192)])
def test_the_decode_kernel_lowers_for_a_gpu(groups: int, places: int) -> None:
    c = config(2 * groups, 2, 128, dtype="bfloat16")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(c, 1, places)]

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> list[decode_kernel.Partial]:
        first, end = jnp.zeros(BATCH, jnp.int32), jnp.int32(9)
        return decode_kernel.attend(q.reshape(BATCH, 2, groups, 128), Stored(k, v), first, end)

    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text or "triton_kernel_call" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "it needs bfloat16 or float16, not float32"),
        ({"int8_cache": True}, "it reads no int8 cache"),
        ({"attention_softcap": 5.0}, "it has no soft cap of scores"),
        ({"head_dim": 96}, "it needs a head_dim that is a power of two from 16 on, not 96"),
        ({}, "it needs a GPU; take decode_kernel='xla'"),
    ],
)
def test_a_decode_kernel_that_cannot_is_refused(changes: dict[str, Any], message: str) -> None:
    c = dataclasses.replace(
        LLAMA, decode_kernel="pallas", **{"dtype": "bfloat16", "head_dim": 64, **changes}
    )
    with pytest.raises(ValueError, match=f"decode_kernel='pallas': {message}"):
        attention.check_decode_kernel(c, jax.devices()[:1])
    attention.check_decode_kernel(dataclasses.replace(c, decode_kernel="xla"), jax.devices()[:1])


def test_a_decode_kernel_works_on_one_gpu() -> None:
    c = dataclasses.replace(LLAMA, dtype="bfloat16", head_dim=64)
    gpu: Any = SimpleNamespace(platform="gpu")
    assert decode_kernel.obstacle(c, [gpu]) is None
    assert decode_kernel.obstacle(c, [gpu] * 8) == "it works on one device, not 8"


# The choice


@pytest.mark.parametrize(
    ("backend", "changes", "length", "expected"),
    [
        ("cpu", {}, 128, None),
        ("gpu", {"dtype": "bfloat16"}, 100, kernels.cudnn),
        ("gpu", {"dtype": "bfloat16"}, 101, None),
        ("gpu", {"dtype": "float32"}, 100, None),
        ("gpu", {"dtype": "bfloat16", "head_dim": 256}, 100, None),
        ("gpu", {"dtype": "bfloat16", "attention_softcap": 5.0}, 100, None),
        ("tpu", {}, 256, kernels.splash),
        ("tpu", {}, 100, None),
        ("tpu", {"attention_kernel": "xla"}, 256, None),
    ],
)
def test_the_kernel_is_chosen_by_device_and_model(
    backend: str,
    changes: dict[str, Any],
    length: int,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=backend)])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert attention.kernel_for(dataclasses.replace(LLAMA, **changes), 2, length) is expected


@pytest.mark.parametrize(
    ("kernel", "length", "message"),
    [
        ("cudnn", 128, "attention_kernel='cudnn': cuDNN needs bfloat16 or float16, not float32"),
        ("splash", 100, "splash attention needs a length that is a multiple of 128, not 100"),
        ("splash", 128, "splash attention needs a layout over devices"),
    ],
)
def test_a_kernel_that_cannot_is_refused_by_name(kernel: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention.kernel_for(dataclasses.replace(LLAMA, attention_kernel=kernel), 2, length)


def test_a_kernel_serves_the_whole_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scanned layers of both kinds, whose kind is known at run time only, and unrolled ones."""
    c = dataclasses.replace(LLAMA, num_layers=3, sliding_window=40, global_layers=(1,))
    ids, start = jnp.arange(256).reshape(2, 128) % 90, jnp.asarray([0, 9])
    params = random_params(c)

    def logits(c: ModelConfig, stacked: bool) -> jax.Array:
        definition = transformer.define(c, stacked=stacked)
        laid_out = params if stacked else transformer.unstack_layers(params)
        model = transformer.bind(definition, laid_out)
        return model.logits(model(ids, start)[0])[:, 9:]

    expected = logits(c, stacked=True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    interpreted = functools.partial(kernels.splash, interpret=True)
    monkeypatch.setitem(kernels.KERNELS, "splash", interpreted)
    by_kernel = dataclasses.replace(c, attention_kernel="splash")
    for stacked in (True, False):
        np.testing.assert_allclose(logits(by_kernel, stacked), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        (Mesh(data=2, fsdp=2, tensor=2), "none"),
        (Mesh(fsdp=2, sequence=2, tensor=2), "full"),
        (Mesh(fsdp=1, sequence=8), "cheap"),
    ],
)
def test_a_kernel_works_on_each_device_s_rows_heads_and_columns(
    mesh: Mesh, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of the decoder on eight devices, kernel against reference."""
    c = config(4, 2, 16, num_layers=2, sliding_window=40, global_layers=(1,))
    params, ids = random_params(c), jnp.arange(4096).reshape(4, 1024) % 90
    start = jnp.where(jnp.arange(1024) < 500, 0, 500)[None].repeat(4, 0)
    layout = attention_layout(make_mesh(mesh))

    def results(c: ModelConfig) -> Any:
        definition = transformer.define(c, layout=layout)

        def loss(params: Any) -> jax.Array:
            hidden = transformer.bind(definition, params)(ids, start, remat=remat)[0]
            return jnp.square(hidden - 1).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = results(c)
    interpreted = functools.partial(kernels.splash, interpret=True)
    monkeypatch.setitem(kernels.KERNELS, "splash", interpreted)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4),
        results(dataclasses.replace(c, attention_kernel="splash")),
        expected,
    )


def test_what_does_not_divide_is_refused() -> None:
    c = dataclasses.replace(LLAMA, attention_kernel="splash", num_kv_heads=1)
    short = attention_layout(make_mesh(Mesh(data=2, fsdp=2, tensor=2)))
    long = attention_layout(make_mesh(Mesh(fsdp=1, sequence=8)))
    for num_rows, layout, message in (
        (3, short, "3 rows do not divide among 4"),
        (4, short, "1 kv heads do not divide among 2"),
        (1, long, "4 blocks do not divide among 8"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.kernel_for(c, num_rows, 512, layout)


# Caches


@settings(max_examples=30)
@given(
    window=st.sampled_from([None, 1, 2, 5]),
    first=st.integers(1, 9),
    pieces=st.lists(st.integers(1, 7), max_size=4),
)
def test_a_cache_holds_the_last_columns(window: int | None, first: int, pieces: list[int]) -> None:
    """A list of column numbers stands in for keys: what a query may see is all there."""
    c = dataclasses.replace(LLAMA, num_layers=1, num_kv_heads=1, head_dim=2, sliding_window=window)
    length = first + sum(pieces) + 1

    def numbers(start: int, count: int) -> jax.Array:
        column = jnp.arange(start, start + count, dtype=jnp.float32)
        return jnp.broadcast_to(column[None, None, :, None], (1, 1, count, 2))

    whole = cache.KVCache((Stored(numbers(0, first), -numbers(0, first)),), jnp.asarray(first))
    (stored,), end = cache.resize(c, whole, length).layers, first
    for count in pieces:
        new = Stored(numbers(end, count), -numbers(end, count))
        stored = cache.append(stored, new, jnp.asarray(end), window)
        end += count
    places = stored.keys.shape[2]
    assert places == cache.num_places(c, 0, length) <= (window or length)
    columns = cache.columns(places, jnp.asarray(end))
    present = sorted(int(column) for column in columns if column >= 0)
    assert present == list(range(max(end - places, 0), end))
    for place, column in enumerate(columns):
        if column >= 0:
            assert stored.keys[0, 0, place, 0] == column == -stored.values[0, 0, place, 1]


def test_an_empty_cache_shows_nothing() -> None:
    assert (cache.columns(4, jnp.asarray(0)) < 0).all()
    c = dataclasses.replace(LLAMA, sliding_window=3, global_layers=(1,))
    made = cache.empty(c, BATCH, 8)
    assert [stored.keys.shape[2] for stored in made.layers] == [3, 8]


# Rotary frequencies


def test_frequencies_by_hand() -> None:
    """theta 10,000 and 4 entries: 1 and 1/100 radians; scaled by 4."""
    np.testing.assert_allclose(rotary.frequencies(4, 1e4, None), [1, 0.01])
    np.testing.assert_allclose(rotary.frequencies(4, 1e4, LinearRope(4.0)), [0.25, 0.0025])


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_scaled_frequencies_are_those_of_transformers(factor: float, head_dim: int) -> None:
    numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "original_max_position_embeddings": 8192,
            **numbers,
        },
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    ours = rotary.frequencies(head_dim, 5e5, Llama3Rope(**numbers, original_positions=8192))
    assert attention_factor == 1.0
    np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
