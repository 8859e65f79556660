"""The TPU kernel of packed layers, interpreted, against the plain path; compiled in `test_launch_tpu.py`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import a2d_jax
from odlri_jax import kernel, linear
from odlri_jax.codebooks import E8P12, E8P12RVQ3B, E8P12RVQ4B, e8_points
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.kernel import packed_product
from odlri_jax.linear import CompressedLinear
from odlri_jax.packing import decode


def random_words(rng, m: int, n: int, codebook) -> dict[str, jax.Array]:
    arrays = {"q_index": rng.integers(0, 1 << 16, (m, n // 8), np.uint16), "q_scale": np.float32(0.37)}
    if codebook.residual:
        dtype = np.uint16 if codebook.residual == "e8p" else np.uint8
        arrays["q_residual"] = rng.integers(0, np.iinfo(dtype).max + 1, (m, n // 8), dtype)
    return jax.tree.map(jnp.asarray, arrays)


def test_every_index_is_decoded_to_its_point():
    index = jnp.arange(1 << 16).reshape(-1, 128)
    planes = kernel._e8p_coordinates(jnp.asarray(kernel._table("e8p")), index)
    np.testing.assert_array_equal(jnp.stack(planes, axis=-1), E8P12.decode(index))
    index = jnp.arange(256).reshape(-1, 128)
    planes = kernel._e8_coordinates(jnp.asarray(kernel._table("e8")), index)
    np.testing.assert_array_equal(jnp.stack(planes, axis=-1), e8_points()[index])


@pytest.mark.parametrize("codebook", [E8P12, E8P12RVQ3B, E8P12RVQ4B], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("num_tokens", "m", "n", "rank"),
    [(5, 24, 64, 8), (1, 264, 1040, 16), (33, 40, 4800, None)],  # one tile; edges of every axis; several steps
)
def test_the_kernel_is_the_plain_product(codebook, num_tokens, m, n, rank):
    rng = np.random.default_rng(0)
    arrays = random_words(rng, m, n, codebook)
    x = jnp.asarray(rng.standard_normal((num_tokens, n)), jnp.bfloat16)
    factors = None
    if rank:
        factors = tuple(jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((num_tokens, rank), (m, rank)))
    q = np.asarray(decode(arrays, "q", codebook).astype(jnp.bfloat16), np.float64)
    expected = np.asarray(x, np.float64) @ q.T * 0.37
    if rank:
        expected += np.asarray(factors[0], np.float64) @ np.asarray(factors[1], np.float64).T
    found = packed_product(x, arrays, codebook, factors, is_interpreted=True)
    assert found.shape == (num_tokens, m) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_tokens_beyond_a_tile_take_another(monkeypatch):
    monkeypatch.setattr(kernel, "MAX_TILE_TOKENS", 16)
    rng = np.random.default_rng(0)
    arrays, x = random_words(rng, 24, 64, E8P12), jnp.asarray(rng.standard_normal((40, 64)), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(decode(arrays, "q", E8P12)).T * 0.37
    np.testing.assert_allclose(packed_product(x, arrays, E8P12, None, True), expected, atol=1e-3)


@pytest.fixture
def interpreted(monkeypatch):
    """The path of a TPU, its kernel interpreted; how often it was taken."""
    calls = []

    def product(*arguments, **options):
        calls.append(arguments)
        return packed_product(*arguments, **options, is_interpreted=True)

    monkeypatch.setattr(linear, "is_for_tpu", lambda: True)
    monkeypatch.setattr(linear, "packed_product", product)
    return calls


def layer(config: DecomposeConfig, shape=(32, 64), axes=("embed", "heads")) -> CompressedLinear:
    module = CompressedLinear(shape, config, axes=axes, dtypes=a2d_jax.DTypes(jnp.bfloat16, jnp.bfloat16))
    rng = np.random.default_rng(0)
    for suffix in module.suffixes:
        variable = getattr(module, suffix)
        dtype = variable[...].dtype
        if dtype.kind == "f":
            variable[...] = jnp.asarray(rng.standard_normal(variable.shape) ** 2 + 0.1, dtype)
        else:
            variable[...] = jnp.asarray(rng.integers(0, np.iinfo(dtype).max + 1, variable.shape), dtype)
    return module


CONFIG = DecomposeConfig(rank=8)


@pytest.mark.parametrize(
    "settings", [{}, {"q_bits": 3}, {"q_bits": 4, "lr_bits": 4}, {"lr_bits": 4, "hadamard": False}], ids=str
)
def test_a_layer_by_the_kernel_gives_the_values_and_gradients_of_the_plain_one(settings, interpreted, monkeypatch):
    module = layer(dataclasses.replace(CONFIG, **settings))
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.standard_normal((2, 3, size)), jnp.float32) for size in (64, 32))
    call = lambda x: module(x, out_dtype=jnp.float32)
    y, pull = jax.vjp(call, x)
    gradient = pull(g)[0]
    assert interpreted
    monkeypatch.undo()
    expected, pull = jax.vjp(call, x)
    np.testing.assert_allclose(y, expected, atol=2e-3 * float(jnp.abs(expected).max()))
    np.testing.assert_array_equal(gradient, pull(g)[0])


@pytest.mark.parametrize("axes", [("embed", "heads"), ("heads", "embed")])
def test_chips_share_the_weights_of_the_kernel(interpreted, monkeypatch, axes):
    """Outputs split over two chips, or inputs and their sum; rows over the other four."""
    module = layer(CONFIG, axes=axes)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, 64)), jnp.bfloat16)
    call = functools.partial(module, out_dtype=jnp.float32)
    with jax.set_mesh(a2d_jax.make_mesh(data=2, fsdp=2, tensor=2)):
        found = jax.jit(call)(x)
    (rows, arrays, *_), *_ = interpreted
    assert rows.shape == ((6, 32) if axes[0] == "heads" else (6, 64))
    assert arrays["q_index"].shape == ((32, 4) if axes[0] == "heads" else (16, 8))
    monkeypatch.undo()
    expected = call(x)
    np.testing.assert_allclose(found, expected, atol=2e-3 * float(jnp.abs(expected).max()))


def test_other_codes_and_precisions_take_the_plain_path(interpreted):
    layer(dataclasses.replace(CONFIG, q_codebook="uniform", q_bits=4))(jnp.ones((2, 64)))
    module = layer(CONFIG)
    module.dtypes = a2d_jax.DTypes()
    module(jnp.ones((2, 64)))
    assert not interpreted
