"""The loops that TPUs take, against LAPACK: bases, singular vectors, least squares, and a decomposition by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odlri_jax import cholesky, ldlq, loop_linalg, lowrank
from odlri_jax.decompose import decompose_arrays
from odlri_jax.decompose_config import DecomposeConfig

KEY = jax.random.key(0)


def graded(m: int, k: int, condition: float) -> np.ndarray:
    """(m, k) of singular values from 1 to 1 / condition, float32."""
    rng = np.random.default_rng(k)
    left, right = (np.linalg.qr(rng.standard_normal((n, k)))[0] for n in (m, k))
    return ((left * np.geomspace(1, 1 / condition, k)) @ right.T).astype(np.float32)


def assert_orthonormal(q, atol=2e-6):
    q = np.asarray(q, np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=atol)


@pytest.fixture
def on_tpu(monkeypatch):
    """The forms for TPUs, on this processor."""
    for module in (cholesky, ldlq, lowrank):
        monkeypatch.setattr(module, "is_for_tpu", lambda: True)


@pytest.mark.parametrize("condition", [1, 1e4, 1e8, 1e12])
def test_columns_of_any_condition_become_orthonormal_and_span_the_same(condition):
    y = graded(150, 40, condition)
    q = np.asarray(loop_linalg.orthonormal(jnp.asarray(y * 1e-15)), np.float64)  # and of any scale
    assert_orthonormal(q)
    np.testing.assert_allclose(q @ (q.T @ y), y, atol=1e-6)


def test_dependent_columns_are_completed_and_empty_ones_stay_empty():
    y = graded(60, 10, 10)
    q = loop_linalg.orthonormal(jnp.asarray(np.concatenate([y, y[:, :3]], axis=1)))
    assert_orthonormal(q)
    y[:, 4] = 0
    q = np.asarray(loop_linalg.orthonormal(jnp.asarray(y)))
    assert not q[:, 4].any()
    assert_orthonormal(np.delete(q, 4, axis=1))
    np.testing.assert_array_equal(loop_linalg.orthonormal(jnp.zeros((6, 2))), 0)


@pytest.mark.parametrize(("size", "condition"), [(48, 1), (47, 1e3), (64, 1e6), (2, 10), (1, 1)])
def test_singular_vectors_leave_the_error_of_the_discarded_values(size, condition):
    matrix = graded(size, size, condition)
    left = np.asarray(loop_linalg.left_singular(jnp.asarray(matrix)), np.float64)
    assert_orthonormal(left)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(left.T @ matrix, axis=1), values, rtol=1e-2, atol=1e-7)
    for rank in (size // 4, size // 2):
        kept = left[:, :rank]
        error = np.linalg.norm(matrix - kept @ (kept.T @ matrix))
        assert error <= np.sqrt((values[rank:] ** 2).sum()) * (1 + 1e-4) + 1e-7


def test_an_outlier_does_not_drown_the_other_singular_vectors():
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.standard_normal((32, 32)))[0] for _ in range(2)]
    values = np.concatenate([[3e4], np.linspace(2, 1, 31)])
    matrix = jnp.asarray((bases[0] * values) @ bases[1].T, jnp.float32)
    left = np.asarray(loop_linalg.left_singular(matrix), np.float64)
    overlap = np.abs(np.sum(left * bases[0], axis=0))
    assert overlap[0] > 0.9999 and overlap[1:].min() > 0.99  # rounding of the matrix itself turns them by a little


def test_of_a_singular_matrix_the_columns_without_value_are_empty():
    matrix = np.zeros((6, 6), np.float32)
    matrix[:, :2] = np.random.default_rng(0).standard_normal((6, 2))
    left = np.asarray(loop_linalg.left_singular(jnp.asarray(matrix)))
    assert_orthonormal(left[:, :2])
    np.testing.assert_allclose(left[:, :2] @ (left[:, :2].T @ matrix), matrix, atol=1e-6)
    np.testing.assert_array_equal(loop_linalg.left_singular(jnp.zeros((4, 4))), 0)


def test_definite_systems_are_solved_and_singular_ones_stay_finite():
    rng = np.random.default_rng(0)
    basis = graded(50, 24, 30)
    gram, target = basis.T @ basis, rng.standard_normal((24, 7)).astype(np.float32)
    found = loop_linalg.solve_definite(jnp.asarray(gram), jnp.asarray(target))
    np.testing.assert_allclose(found, np.linalg.solve(gram.astype(np.float64), target), rtol=2e-3, atol=2e-2)
    basis = graded(50, 24, 1e9)  # least squares: the fit is what counts, the solution is not unique
    signal = basis @ rng.standard_normal((24, 7)).astype(np.float32)
    found = np.asarray(loop_linalg.solve_definite(jnp.asarray(basis.T @ basis), jnp.asarray(basis.T @ signal)))
    assert np.linalg.norm(basis @ found - signal) < 2e-3 * np.linalg.norm(signal)
    np.testing.assert_array_equal(loop_linalg.solve_definite(jnp.zeros((4, 4)), jnp.zeros((4, 2))), 0)


def test_small_blocks_are_inverted_side_by_side():
    x = np.random.default_rng(0).standard_normal((5, 8, 24))
    definite = x @ x.transpose(0, 2, 1)
    for blocks in (definite, np.linalg.cholesky(definite)):
        found = loop_linalg.block_inverse(jnp.asarray(blocks, jnp.float32))
        np.testing.assert_allclose(found, np.linalg.inv(blocks), atol=2e-5)


def test_the_block_factors_are_those_of_lapack(monkeypatch):
    x = np.random.default_rng(0).standard_normal((192, 600))
    h = ldlq.damp(jnp.asarray(x @ x.T / 600, jnp.float32), 1e-2)
    expected = ldlq.factorise(h)
    for module in (cholesky, ldlq):
        monkeypatch.setattr(module, "is_for_tpu", lambda: True)
    found = ldlq.factorise(h)
    np.testing.assert_allclose(found.lower, expected.lower, atol=1e-5)
    np.testing.assert_allclose(found.inverse, expected.inverse, rtol=1e-4, atol=1e-5)


def test_the_low_rank_step_is_within_one_percent_of_the_exact_one(on_tpu):
    """Among inputs of very different size: H of a condition of 10^6."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((160, 500)) * np.geomspace(1e3, 1, 160)[:, None]
    a = rng.standard_normal((200, 160)) * np.arange(1, 161) ** -0.5
    h = x @ x.T / 500
    left, right = lowrank.low_rank(jnp.asarray(a, jnp.float32), cholesky.cholesky(jnp.asarray(h, jnp.float32)), 16, KEY)
    assert_orthonormal(left)
    error = a - np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    least = (np.linalg.svd(a @ np.linalg.cholesky(h), compute_uv=False)[16:] ** 2).sum()
    assert least * 0.9999 < np.trace(error @ h @ error.T) < least * 1.02


def primitives(jaxpr) -> set[str]:
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                names |= primitives(inner)
    return names


@pytest.mark.parametrize("lr_bits", [16, pytest.param(4, marks=pytest.mark.slow)])
def test_the_whole_decomposition_by_loops_ends_as_low(on_tpu, monkeypatch, lr_bits):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((136, 400)) * np.geomspace(10, 0.3, 136)[:, None]
    w, h = jnp.asarray(rng.standard_normal((48, 136)), jnp.float32), jnp.asarray(x @ x.T / 400, jnp.float32)
    config = DecomposeConfig(
        rank=16, num_outliers=24, init="odlri", lr_bits=lr_bits, outer_iters=3, inner_iters=3, tune_iters=1
    )
    run = lambda: jax.jit(lambda w, h: decompose_arrays(w, h, config, KEY))
    traced = run().trace(w, h)
    assert not {"geqrf", "householder_product", "qr", "svd", "eigh", "lu"} & primitives(traced.jaxpr.jaxpr)
    by_loops = float(traced.lower().compile()(w, h).error)
    monkeypatch.undo()
    jax.clear_caches()
    assert "eigh" in primitives(jax.make_jaxpr(run())(w, h).jaxpr)
    assert by_loops == pytest.approx(float(run()(w, h).error), rel=0.02)
    jax.clear_caches()
