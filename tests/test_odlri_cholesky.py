"""The Cholesky factor by panels, which TPUs take, against LAPACK's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odlri_jax import cholesky as module
from odlri_jax.cholesky import by_panels, cholesky


def definite(n: int) -> np.ndarray:
    x = np.random.default_rng(n).normal(size=(n, 3 * n))
    return (x @ x.T / n).astype(np.float32)


@pytest.mark.parametrize("n", [384, 200, 144, 131])  # whole panels, narrower ones, and a prime
def test_panels_give_the_factor_of_lapack(n):
    h = definite(n)
    lower = np.asarray(by_panels(jnp.asarray(h)))
    np.testing.assert_allclose(lower, np.linalg.cholesky(h.astype(np.float64)), atol=2e-5)
    assert not np.triu(lower, 1).any()


def test_what_is_not_definite_ends_in_nan():
    h = definite(256)
    h[200, 200] = -1
    assert np.isnan(by_panels(jnp.asarray(h))).any()


def test_the_loop_is_taken_on_tpus_alone(monkeypatch):
    h = jnp.asarray(definite(256))
    np.testing.assert_array_equal(cholesky(h), jnp.linalg.cholesky(h))
    monkeypatch.setattr(module, "is_for_tpu", lambda: True)
    loops = lambda h: "scan" in str(jax.make_jaxpr(cholesky)(h))
    assert loops(h) and not loops(h[:64, :64])
