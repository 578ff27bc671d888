"""Meshes that do not fit: refused before any weight is read, with a remedy."""

import dataclasses

import jax
import pytest

from refine_af import mesh
from refine_af.config import Mesh
from refine_af.models.tiny import PRESETS

TINY = PRESETS["tiny"]


def of(num_devices: int = 8, **axes: int) -> jax.sharding.Mesh:
    return mesh.make_mesh(Mesh(**axes), jax.devices()[:num_devices])


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_a_mesh_that_divides_the_model_is_taken(axes: dict[str, int]) -> None:
    mesh.check(TINY, of(**axes))


@pytest.mark.parametrize(
    ("change", "axes", "message"),
    [
        (
            {"num_heads": 9, "num_kv_heads": 3},
            {"fsdp": 2, "tensor": 4},
            "mesh tensor=4 does not divide the model's num_heads=9; take tensor=1, and give the "
            "other devices to another axis",
        ),
        (
            {"num_heads": 6},
            {"data": 2, "fsdp": 1, "tensor": 4},
            "mesh tensor=4 does not divide the model's num_heads=6; take tensor=2, and give the "
            "other devices to another axis",
        ),
        (
            {"hidden_dim": 130},
            {"fsdp": 2, "tensor": 4},
            "mesh tensor=4 does not divide the model's hidden_dim=130; take tensor=2, and give the "
            "other devices to another axis",
        ),
        (
            {"embed_dim": 36},
            {"fsdp": 8},
            "mesh fsdp=8 does not divide the model's embed_dim=36; take fsdp=4, and give the other "
            "devices to another axis",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(
    change: dict[str, int], axes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        mesh.check(dataclasses.replace(TINY, **change), of(**axes))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("axes", "remedy"),
    [
        ({"fsdp": 4}, "give one axis as -1 to take the rest"),
        (
            {"data": 3, "fsdp": -1},
            "the others multiply to 3, which does not divide it: change one",
        ),
        ({"data": 16, "fsdp": -1}, "the others multiply to 16, which"),
        ({"data": -1}, "give one axis as -1 to take the rest"),
        ({"fsdp": 0}, "give one axis as -1 to take the rest"),
    ],
)
def test_a_mesh_of_other_devices_is_refused(axes: dict[str, int], remedy: str) -> None:
    with pytest.raises(ValueError, match=f"must be the number of devices, 8; {remedy}"):
        of(**axes)


@pytest.mark.parametrize(
    ("kv_heads", "axes", "advice"),
    [
        (8, {"fsdp": 8}, None),
        (4, {"data": 2, "fsdp": 4}, None),
        (3, {"fsdp": 8}, None),
        (8, {"data": 8, "fsdp": 1}, None),
        (8, {"data": 2, "fsdp": 4}, None),
        (
            4,
            {"fsdp": 8},
            "while sampling, 8 devices hold the same cache: mesh fsdp*sequence*tensor=8 does not "
            "divide the model's 4 kv heads; take fsdp=4, sequence=1, tensor=1, data=-1, which cuts "
            "the weights into 4, too",
        ),
        (
            20,
            {"data": 2, "fsdp": 2, "tensor": 2},
            None,
        ),
    ],
)
def test_heads_that_every_device_would_sample_with(
    kv_heads: int, axes: dict[str, int], advice: str | None
) -> None:
    """Three heads cannot be shared; eight of four can be, by half of the devices each."""
    model = dataclasses.replace(TINY, num_heads=4 * kv_heads, num_kv_heads=kv_heads)
    assert mesh.whole_heads(model, of(**axes)) == advice


def test_weights_are_cut_over_all_axes_but_data() -> None:
    devices = of(data=1, fsdp=2, sequence=2, tensor=2)
    axes = ("embed", "hidden")
    assert mesh.spec(axes, (8, 8), devices) == jax.P(("fsdp", "sequence"), "tensor")
    sampling = mesh.spec(axes, (8, 8), devices, rules=mesh.SAMPLING_RULES)
    assert sampling == jax.P(None, ("fsdp", "sequence", "tensor"))
