"""Hadamard transform: H H^T = n I for every width of the supported models, recorded transforms, the block form."""

import jax.numpy as jnp
import numpy as np
import pytest

from odlri_jax import hadamard

WIDTHS = {
    "SmolLM2-135M": (192, 576, 1536, 49152),
    "LLaMA-2-7B": (4096, 11008, 32000),
    "LLaMA-2-13B": (5120, 13824),
    "LLaMA-2-70B": (1024, 8192, 28672),
    "LLaMA-3-8B and Mistral-7B": (1024, 4096, 14336),
    "LLaDA-8B": (4096, 12288),
    "Dream-7B": (512, 3584, 18944),
}
ALL_WIDTHS = sorted({n for widths in WIDTHS.values() for n in widths})


def hadamard_matrix(n):
    """(n, n) kron(K, S) of +-1, which the transform never forms."""
    kernel = hadamard.odd_hadamard(n // (n & -n), n)
    return np.kron(kernel, hadamard.sylvester(n // len(kernel)))


@pytest.mark.parametrize("n", ALL_WIDTHS)
def test_the_matrix_of_every_model_width_is_a_hadamard_matrix(n):
    assert hadamard.block_sizes(n) == (n,)
    kernel = hadamard.odd_hadamard(n // (n & -n), n).astype(np.float64)
    assert n % len(kernel) == 0 and (n // len(kernel)).bit_count() == 1
    assert set(np.unique(kernel)) <= {-1, 1}
    np.testing.assert_array_equal(kernel @ kernel.T, len(kernel) * np.eye(len(kernel)))  # the rest is Sylvester's


@pytest.mark.parametrize("order", [12, 20, 28, 36, 52, 60, 100, 108, 140, 148, 172, 196])
def test_constructions(order):
    matrix = hadamard_matrix(order).astype(np.int64)
    assert set(np.unique(matrix)) == {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("n", [64, 96, 576, 1376])
def test_the_fast_transform_is_the_matrix(n):
    x = np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)
    expected = x.astype(np.float64) @ hadamard_matrix(n).T / np.sqrt(n)
    np.testing.assert_allclose(hadamard.rotate(jnp.asarray(x)), expected, atol=2e-6)
    np.testing.assert_allclose(hadamard.rotate(jnp.asarray(expected, jnp.float32), inverse=True), x, atol=4e-6)


@pytest.mark.parametrize("name", ["ldlq_64x128", "ldlq_96x256"])
def test_recorded_transforms(fixtures, name):
    with np.load(fixtures / "odlri" / f"{name}.npz") as file:
        w, h, out, into = (jnp.asarray(file[k]) for k in ("W", "H", "SV", "SU"))
        rotated = hadamard.incoherent_weight(w, out, into)
        scale = np.abs(file["W_incoh"]).max()
        np.testing.assert_allclose(rotated, file["W_incoh"], atol=1e-6 * scale)
        h_incoh = file["H_incoh"]
        np.testing.assert_allclose(hadamard.incoherent_hessian(h, into), h_incoh, atol=1e-6 * np.abs(h_incoh).max())
        np.testing.assert_allclose(hadamard.coherent_weight(rotated, out, into), w, atol=2e-6 * np.abs(w).max())


def test_a_width_without_a_matrix_warns_and_stays_orthogonal():
    hadamard.block_sizes.cache_clear()
    with pytest.warns(UserWarning, match=r"order 536 .* blocks of \(512, 16, 8\)"):
        matrix = np.asarray(hadamard.rotate(jnp.eye(536)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(536), atol=1e-6)


def test_an_outlier_is_spread_evenly():
    w = jnp.zeros((16, 192)).at[3, 5].set(1.0)
    signs = np.where(np.arange(192) % 3 == 0, -1.0, 1.0)
    rotated = hadamard.incoherent_weight(w, jnp.asarray(signs[:16]), jnp.asarray(signs))
    np.testing.assert_allclose(np.abs(rotated), 1 / np.sqrt(16 * 192), rtol=1e-5)
