"""Codebooks against the recorded E8P tables and searches, brute force, and the definitions of the scalar ones."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odlri_jax import codebooks
from odlri_jax.codebooks import E8P12, E8P12RVQ3B, E8P12RVQ4B

LATTICES = [E8P12, E8P12RVQ3B, E8P12RVQ4B]


@pytest.fixture(scope="module")
def recorded(fixtures):
    with np.load(fixtures / "odlri" / "e8p_codebook.npz") as file:
        return dict(file)


@functools.cache
def searches(codebook):
    return jax.jit(codebook.nearest), jax.jit(codebook.encode)


def test_every_point_has_its_published_index(recorded):
    index = np.arange(1 << 16)
    np.testing.assert_array_equal(np.asarray(E8P12.decode(jnp.asarray(index))) * 4, recorded["grid_times4"])
    np.testing.assert_array_equal(codebooks.e8_points() * 2, recorded["e81b_grid_times2"])


def test_every_point_is_its_own_nearest_point(recorded):
    points = jnp.asarray(recorded["grid_times4"] / np.float32(4))
    nearest, encode = searches(E8P12)
    np.testing.assert_array_equal(nearest(points), points)
    np.testing.assert_array_equal(encode(points), np.arange(1 << 16))


@pytest.mark.parametrize("codebook", LATTICES, ids=lambda c: c.name)
def test_nearest_points_and_indices_equal_the_recorded_ones(recorded, codebook):
    nearest, encode = searches(codebook)
    x = jnp.asarray(recorded["x"])
    values = np.asarray(nearest(x))
    np.testing.assert_array_equal(values, recorded[f"{codebook.name}_values"])
    np.testing.assert_array_equal(encode(x), recorded[f"{codebook.name}_index"])
    np.testing.assert_array_equal(codebook.decode(encode(x)), values)


@pytest.mark.parametrize("codebook", LATTICES, ids=lambda c: c.name)
def test_values_tell_their_index(recorded, codebook):
    # The sum of any two points, also one that the search would make from another pair.
    rng = np.random.default_rng(0)
    index = rng.integers(0, 1 << 16, 2048).astype(np.uint32)
    if codebook.residual:
        index = index << 16 | rng.integers(0, 256 if codebook.residual == "e8" else 1 << 16, 2048).astype(np.uint32)
    scale = np.float32(0.37)
    values = codebook.decode(jnp.asarray(index)) * scale / scale
    np.testing.assert_array_equal(jax.jit(codebook.encode_points)(values), index)


@pytest.mark.parametrize("codebook", LATTICES[1:], ids=lambda c: c.name)
def test_another_residual_scale_gives_the_recorded_values(recorded, codebook):
    changed = dataclasses.replace(codebook, residual_scale=0.9)
    values = jax.jit(changed.nearest)(jnp.asarray(recorded["x"]))
    # 0.9 is no recorded constant but one computed along the way: the last bit is free.
    np.testing.assert_allclose(values, recorded[f"{codebook.name}_values_residscale0p9"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [0.3, 1.03, 2.0, 5.0])
def test_no_point_is_nearer_than_the_one_found(recorded, spread):
    x = np.random.default_rng(0).standard_normal((2046, 8)) * spread
    ties = np.random.default_rng(1).integers(-6, 7, (2048, 8)) / 2  # halfway between points, and equal magnitudes
    x = np.concatenate([x, ties, np.zeros((1, 8)), np.ones((1, 8))]).astype(np.float32)
    found = np.asarray(searches(E8P12)[0](jnp.asarray(x)), np.float64)
    grid = recorded["grid_times4"].astype(np.float32) / 4
    best = np.concatenate([(part @ grid.T - (grid**2).sum(1) / 2).max(axis=1) for part in np.split(x, 8)])
    nearest = (x.astype(np.float64) ** 2).sum(1) / 2 - best
    np.testing.assert_allclose(((x - found) ** 2).sum(1) / 2, nearest, atol=3e-5 * max(spread, 1) ** 2)


def test_gaussian_error_is_that_of_the_reference(fixtures):
    recorded = json.loads((fixtures / "odlri" / "metrics.json").read_text())["codebook"]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8192, 8)), jnp.float32)
    for codebook in LATTICES:
        error = jnp.mean((x - searches(codebook)[0](x * codebook.opt_scale) / codebook.opt_scale) ** 2)
        assert float(error) == pytest.approx(recorded[codebook.name]["gaussian_mse_per_dim_at_opt_scale"], rel=0.03)


def test_scalar_codebooks_round_to_the_nearest_level():
    x = np.linspace(-1.2, 1.2, 481, dtype=np.float32)
    for codebook in (codebooks.uniform(2), codebooks.uniform(4), codebooks.normal_float(4), codebooks.normal_float(2)):
        levels = np.array(codebook.levels, np.float32)
        assert len(levels) == 2**codebook.bits and levels.max() == 1 and levels.min() >= -1
        error = np.abs(x - codebook.nearest(jnp.asarray(x)))
        np.testing.assert_allclose(error, np.abs(x[:, None] - levels).min(axis=1))


def test_normal_float_levels_are_those_of_the_paper():
    # arXiv 2305.14314, appendix E.
    paper = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    paper += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    np.testing.assert_allclose(codebooks.normal_float(4).levels, paper, atol=2e-6)


def test_an_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match="2, 3 or 4 bits"):
        codebooks.get_codebook("e8p", 5)
    with pytest.raises(ValueError, match="is unknown"):
        codebooks.get_codebook("e9", 2)
