"""Programs compiled for devices: collectives and operations by hand, a whole run as shapes."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Program, only_its_own_flags, program, refused

from refine_af import abstract_run, compilation, flops, hlo, memory, topologies
from refine_af.compilation import GIB, Figures
from refine_af.config import Mesh
from refine_af.configs import tiny
from refine_af.hlo import Collective

__all__ = ["only_its_own_flags", "program"]

HLO = """HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: bf16[4]) -> bf16[8] {
  %gather = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
  %piece = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = bf16[8] fusion(%q), kind=kLoop, calls=%inner
  %reduce = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(%a, %b), to_apply=%add
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %first = bf16[8,4] all-reduce(%a), channel_id=9, to_apply=%add
  %copy = bf16[8,4] all-reduce(%b), channel_id=9, to_apply=%add
  ROOT %out = f32[8] all-reduce(%y), to_apply=%add
}
"""


def test_collectives_count_as_often_as_their_loops_run() -> None:
    assert hlo.collectives(HLO) == [
        Collective("all-gather", "bf16[8,16]", 256, 5),
        Collective("all-reduce", "f32[8] f32[2,2]", 48, 5),
        Collective("all-gather", "f32[32]", 128, 1),
        Collective("all-reduce", "bf16[8,4]", 64, 2),
        Collective("all-reduce", "f32[8]", 32, 1),
    ]


GPU = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = ((f32[4]{0}, bf16[2]{0}), (f32[32]{0}, bf16[16]{0})) all-gather-start(%x, %y)
  %move = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%compare
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = () while(%t), condition=%condition, body=%body, c={"known_trip_count":{"n":"7"}}
}
"""


def test_collectives_as_the_compiler_of_gpus_writes_them() -> None:
    assert hlo.collectives(GPU) == [
        Collective("all-gather", "f32[32] bf16[16]", 160, 7),
        Collective("collective-permute", "f32[4]", 16, 7),
    ]


def test_operations_of_products_in_loops_and_branches() -> None:
    """A product of [2, 3] and [3, 4] takes 48, of [2, 4] and [4, 4] 64: 48 + 7 * 64 + 64.

    That of a and b once more is not asked for.
    """

    @jax.jit
    def f(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
            return (jnp.tanh(carry[0] @ c), a @ b), None

        x = jax.lax.scan(step, (a @ b, a @ b), None, length=7)[0][0]
        return jax.lax.cond(x.sum() > 0, lambda: x @ c, lambda: x)

    traced = f.trace(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert hlo.operations(traced.jaxpr) == 48 + 7 * 64 + 64


@pytest.mark.parametrize("whole", [False, True])
def test_shapes_that_a_device_has_whole(whole: bool) -> None:
    """Eight devices and a product that is split over them, or not."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split, layout = NamedSharding(mesh, P("x")), NamedSharding(mesh, P() if whole else P("x"))

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        return jnp.tanh(jax.lax.with_sharding_constraint(jnp.tanh(x @ x.T), layout)).sum(0)

    traced = f.trace(jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=split))
    made = hlo.shapes_made(traced.jaxpr, 64 * 16 * 4)
    assert made == {(64, 64), (16, 64)}
    assert hlo.shapes_made(traced.jaxpr, 64 * 16 * 4 + 1) == {(64, 64)}
    there = hlo.shapes_in(traced.lower().compile().as_text())
    assert ((64, 64) in there) == whole
    assert (8, 64) in there


CONFIG = dataclasses.replace(tiny.get_config(), mesh=Mesh(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("kind", abstract_run.KINDS)
def test_every_program_compiles_as_shapes(kind: str) -> None:
    run = abstract_run.abstract_run(CONFIG, "local", 40)
    for one in run.programs(kind):
        figures = compilation.compiled(one, run.base)
        assert figures.fits
        assert figures.arguments > 0
        assert not figures.warnings, "nothing of the tiny model is large"
        share = 0.8 if one.name == "sample prefill" else 1.0  # nobody asks its last layer
        assert figures.operations >= share * figures.model_operations
        assert figures.collectives
        if kind in ("update", "sft"):
            assert figures.aliased > 0.9 * abstract_run.bytes_on_device(one.donated)
        if kind == "sample":
            assert figures.resident > abstract_run.bytes_on_device(run.base.params)


def test_int8_makes_sampling_smaller() -> None:
    """Of a float32 model: weights of linears and the cache shrink to a quarter, and scales come."""
    ppo = dataclasses.replace(CONFIG.ppo, int8_weights=True, int8_cache=True)
    sizes = []
    for config in (CONFIG, dataclasses.replace(CONFIG, ppo=ppo)):
        run = abstract_run.abstract_run(config, "local", 40)
        sizes.append(compilation.compiled(run.programs("sample")[1], run.base).arguments)
    assert sizes[1] < 0.7 * sizes[0]


def test_decoding_is_compiled_with_the_guesses_that_it_reads() -> None:
    found = []
    for count in (0, 3):
        model = dataclasses.replace(CONFIG.model, draft_tokens=count)
        run = abstract_run.abstract_run(dataclasses.replace(CONFIG, model=model), "local", 40)
        found.append(compilation.compiled(run.programs("sample")[1], run.base))
    plain, guessing = found
    assert guessing.model_operations == 4 * plain.model_operations
    assert guessing.operations > 3 * plain.operations
    assert guessing.fits and not guessing.warnings


def test_a_mesh_that_a_run_refuses_is_refused() -> None:
    config = dataclasses.replace(CONFIG, mesh=Mesh(fsdp=1, tensor=8))
    with pytest.raises(ValueError, match="mesh tensor=8 does not divide the model's num_heads=4"):
        abstract_run.abstract_run(config, "local", 40)


def test_what_looks_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny model everything is large."""
    monkeypatch.setattr(compilation, "_LARGE", 0)
    run = abstract_run.abstract_run(CONFIG, "local", 40)
    (update,), (_, decode) = run.programs("update"), run.programs("sample")
    gate = run.base.params["layers"]["feed_forward"]["gate"]["kernel"]
    dims = ",".join(map(str, gate.shape))
    moved = [Collective("all-gather", f"f32[{dims}]", 4 * gate.size, 1)]
    one_layer = [Collective("all-gather", f"f32[1,{dims[2:]}]", 2 * gate.size, 1)]
    stack = [f"all-gather of a whole parameter, f32[{dims}]"]
    assert compilation._whole_parameters(moved, update, run.base) == stack
    assert not compilation._whole_parameters(one_layer, update, run.base)
    assert len(compilation._whole_parameters(one_layer, decode, run.base)) == 1
    reduced = [one._replace(kind="all-reduce") for one in one_layer]
    assert not compilation._whole_parameters(reduced, decode, run.base)
    whole = NamedSharding(run.base.mesh, P())
    held = {"table": jax.ShapeDtypeStruct((64, 2), jnp.float32, sharding=whole)}
    assert compilation._replicated(held, run.base.mesh) == [
        "every device holds all of ['table'], float32[64, 2]"
    ]
    assert compilation._not_donated(3 * GIB, GIB) == [
        "2.00 GiB of the donated state are not reused"
    ]
    assert compilation._not_split([(8, 96)], run.base) == ["every device computes all of [8, 96]"]
    assert not compilation._not_split([gate.shape[1:]], run.base)


def test_the_table_of_shardings_adds_up() -> None:
    run = abstract_run.abstract_run(CONFIG, "local", 40)
    header, *lines, total = compilation.sharding_table(run)
    assert header.endswith("MiB a device")
    assert any(line.startswith("ppo/value_head") for line in lines)
    assert any(line.startswith("ppo/policy/adapter/layers/attention/q") for line in lines)
    sizes = [float(line.split()[-1]) for line in lines]
    assert total.startswith("all ") and float(total.split()[-1]) == pytest.approx(sum(sizes), abs=1)


def test_operations_are_those_of_the_model_where_attention_is_small() -> None:
    """6 N D of an update of all weights, 4 N D of an adapter's, without recomputation."""
    shape = run_of("lora").base.config
    for trained, passes in (("lora", 2), ("full", 3)):
        run = run_of(trained)
        (update,) = run.programs("update")
        n, t = CONFIG.ppo.batch_size, run._row_length
        forward = flops.forward(shape, n * t, n * CONFIG.ppo.sampling.max_new_tokens)
        assert update.model_operations == pytest.approx(2 * passes * forward)  # of two epochs


def test_the_least_time_by_hand() -> None:
    """A v5e multiplies 197e12 times a second and reads 819e9 bytes."""
    assert flops.least_seconds("TPU v5 lite", 197e12, 819e9 / 2) == pytest.approx(1.0)
    assert flops.least_seconds("TPU v5 lite", 197e12, 819e9 * 2) == pytest.approx(2.0)
    assert flops.least_seconds("cpu", 1.0, 1.0) is None


@pytest.mark.parametrize(("topology", "kind"), [("h200:2", "NVIDIA H200"), ("v5e:2x2", "TPU v9")])
def test_devices_that_are_not_there(
    topology: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers are asked by name; a device of which nothing is known is refused."""
    asked: dict[str, str] = {}

    def describe(**arguments: str) -> SimpleNamespace:
        asked.update(arguments)
        return SimpleNamespace(devices=[SimpleNamespace(device_kind=kind)])

    for name in topologies._NO_DEVICE:
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setattr(jax.experimental.topologies, "get_topology_desc", describe)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    if kind == "TPU v9":
        with pytest.raises(ValueError, match="--topology=v5e:2x2: TPU v9; expected one of"):
            topologies.devices(topology)
        assert asked == {"platform": "tpu", "topology_name": topology}
        return
    assert [device.device_kind for device in topologies.devices(topology)] == [kind]
    assert (asked["platform"], asked["topology"]) == ("cuda", "1x1x2")
    assert f"device_memory_size: {139 * GIB}\n" in asked["target_config"]
    assert f'device_description_str: "{kind}"' in asked["target_config"]


def test_memory_of_a_device_that_is_not_there() -> None:
    def none() -> None:
        raise jax.errors.JaxRuntimeError("only addressable devices say")

    absent = SimpleNamespace(device_kind="NVIDIA H200", memory_stats=none)
    assert compilation.memory_of(absent, 1) == 139 * GIB
    present = SimpleNamespace(device_kind="NVIDIA H200", memory_stats=lambda: {"bytes_limit": 7})
    assert compilation.memory_of(present, 1) == 7
    assert set(topologies._GPUS.values()) <= flops.CHIPS.keys()


def run_of(trained: str) -> abstract_run.Run:
    ppo = dataclasses.replace(CONFIG.ppo, trained=trained)
    return abstract_run.abstract_run(dataclasses.replace(CONFIG, ppo=ppo), "local", 40)


def figures(**changes: Any) -> Figures:
    sizes = {"outputs": 2, "temporaries": 3, "aliased": 2, "resident": 1, "memory": 16}
    made: dict[str, Any] = {name: size * GIB for name, size in sizes.items()} | {
        "arguments": 4 * GIB
    }
    rest = {"program": "update", "operations": 1.0, "model_operations": 1.0, "moved": 0.0}
    empty = {"collectives": [], "warnings": [], "least_seconds": None, "seconds": 0.0}
    return Figures(**{**made, **rest, **empty, **changes})


def test_what_does_not_fit_and_what_to_do() -> None:
    assert figures().total == 8 * GIB
    assert figures().fits
    crowded = figures(temporaries=12 * GIB)
    assert not crowded.fits
    cheap = dataclasses.replace(CONFIG, ppo=dataclasses.replace(CONFIG.ppo, remat="cheap"))
    assert compilation.shortage(crowded, cheap) == (
        "2.6 GiB too much for 90% of the memory; lower ppo.batch_size (now 8), "
        "raise ppo.num_microbatches (now 2), set ppo.remat=full (now cheap), or use more devices"
    )
    full = dataclasses.replace(CONFIG, ppo=dataclasses.replace(CONFIG.ppo, remat="full"))
    assert "remat" not in compilation.shortage(crowded, full)
    more = "use more devices, or more of them for mesh.fsdp and mesh.tensor"
    assert more in compilation.shortage(figures(arguments=14 * GIB), full)
    trained = figures(arguments=8 * GIB, outputs=8 * GIB, aliased=8 * GIB, temporaries=10 * GIB)
    assert more in compilation.shortage(trained, full)
    sampling = figures(program="sample decode", arguments=14 * GIB)
    assert "lower ppo.batch_size" in compilation.shortage(sampling, full)
    assert "set ppo.int8_cache=True (now False)" in compilation.shortage(sampling, full)
    ppo = dataclasses.replace(full.ppo, trained="full", int8_cache=True)
    other = dataclasses.replace(full, ppo=ppo)
    assert "int8_cache" not in compilation.shortage(sampling, other)
    for one in (crowded, trained):
        assert "set ppo.trained=lora (now full)" in compilation.shortage(one, other)


ARGS = ("--config=tiny", "--config.mesh.fsdp=8", "--program=score", "--prompt_length=40")


def refuse(*_: Any) -> None:
    raise compilation.TooLargeError("88 GiB")


def test_the_program_prints_and_exits_1_where_something_does_not_fit(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = program("compile_check", *ARGS, "--print_sharding")
    assert good.code == 0
    assert "layers/attention/q/kernel" in good.out
    assert "P(None, 'fsdp', None)" in good.out
    assert "score: compiled in" in good.out
    assert "x all-" in good.out
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "compiled", refuse)
        bad = program("compile_check", *ARGS)
        assert bad.code == 1
        assert bad.out == (
            f"score: does not fit: 88 GiB; lower ppo.batch_size (now {CONFIG.ppo.batch_size}), "
            "or use more devices\n"
        )
    monkeypatch.setattr(compilation, "memory_of", lambda *_: 1000)
    bad = program("compile_check", *ARGS)
    assert bad.code == 1
    assert "does not fit: 0.0 GiB too much" in bad.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RESOURCE_EXHAUSTED: 4 GiB", True),
        ("INTERNAL: Out of memory allocating 4 bytes", True),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("INTERNAL: a bug", False),
    ],
)
def test_memory_that_has_run_out_is_known_by_what_jax_says(text: str, expected: bool) -> None:
    assert memory.ran_out(jax.errors.JaxRuntimeError(text)) == expected


def test_bad_flags_are_refused(program: Program) -> None:
    assert program("compile_check", "--config=tiny", "--program=all") == refused(
        "--program=all: expected some of ['read', 'update', 'sample', 'score', 'sft']"
    )
    assert program("compile_check", "--config=tiny", "--program=") == refused(
        "--program=: expected some of ['read', 'update', 'sample', 'score', 'sft']"
    )
    for topology, expected in (
        ("v9:1x1", "expected local, a slice such as v5e:4x4"),
        ("v5e:4x", "or GPUs such as h100:8"),
        ("h100:16", "a host has 1 to 8 GPUs"),
    ):
        wrong = program("compile_check", "--config=tiny", f"--topology={topology}")
        assert (wrong.code, wrong.out) == (2, "")
        assert f"--topology={topology}: " in wrong.err and expected in wrong.err
