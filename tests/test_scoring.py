"""Ragged rows through a model: order, duplicates and batches change nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from refine_af import scoring
from refine_af.config import Mesh
from refine_af.mesh import make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh())


def total(tokens, lengths, extras):
    inside = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return jnp.sum(jnp.where(inside, tokens, 0), axis=1) + extras


def test_every_row_has_its_own_result_in_its_place(mesh):
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 9, rng.integers(1, 300)).tolist() for _ in range(50)]
    extras = rng.integers(0, 3, 50).astype(np.int32)
    wanted = [sum(row) + extra for row, extra in zip(rows, extras, strict=True)]
    for size in (32, 512, 1 << 20):
        found = scoring.by_length(total, rows, mesh, extras, tokens_per_batch=size)
        np.testing.assert_array_equal(found, wanted)


def test_equal_rows_are_computed_once_unless_their_extras_differ(mesh):
    seen = []

    def count(tokens, lengths, extras):
        seen.append(tokens.shape)
        return total(tokens, lengths, extras)

    rows = [[1, 2]] * 40 + [[3]] * 3
    np.testing.assert_array_equal(scoring.by_length(count, rows, mesh), [3] * 40 + [3] * 3)
    assert seen == [(8, 16)]  # two rows, filled up to the devices
    extras = np.arange(43, dtype=np.int32)
    np.testing.assert_array_equal(
        scoring.by_length(count, rows, mesh, extras), 3 + np.arange(43, dtype=np.int32)
    )


def test_a_batch_holds_about_the_tokens_that_were_asked_for(mesh):
    shapes = []

    def watch(tokens, lengths, extras):
        shapes.append(tokens.shape)
        return total(tokens, lengths, extras)

    rows = [[i] * length for i, length in enumerate((5, 30, 100, 1000) * 64, start=1)]
    done = []
    scoring.by_length(watch, rows, mesh, tokens_per_batch=2048, progress=done.append)
    assert all(b * t <= 2048 or b == 8 for b, t in shapes)  # at least a row for each device
    assert done[-1] == len(rows) and done == sorted(done)
    assert len(set(shapes)) <= 6


def test_no_rows(mesh):
    assert scoring.by_length(total, [], mesh).shape == (0,)
