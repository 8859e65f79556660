"""Low-rank factors in the metric of H: closed form, randomised for large matrices, and with lattice-quantised factors.

    L, R = argmin tr((A - L R) H (A - L R)^T) over rank r:   L = U_r,   R = U_r^T A,   A H A^T = U S^2 U^T

With S_H S_H^T = H the objective is |A S_H - L R S_H|^2; the best rank-r projection keeps the leading left singular
vectors U_r of A S_H, and U_r U_r^T (A S_H) S_H^{-1} = U_r (U_r^T A): no inverse of H is needed.

Factors below 16 bits follow LPLR (arXiv 2310.11028): L <- least squares for R, rounded; R <- least squares for L,
rounded; the best pair is kept. Here each factor is rounded with error feedback in its own metric,

    tr(dL (R H R^T) dL^T)   and   tr((L^T L) dR H dR^T),

rows of L against R H R^T, rows of R against H. L is kept orthonormal up to rounding, so L^T L is near the identity
and the rows of R hardly see each other; the singular values all sit in R H R^T, where feedback makes use of their
spread. It needs a basis in which no coordinate stands out: the caller rotates inputs and outputs (`hadamard.py`), and
a random rotation mixes the rank. `plain_rounding` replays the published code, which rounds both factors to nearest
points.

A (m, n), H (n, n), L (m, r), R (r, n). Eigenvectors and least squares are float32: only r leading directions are used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from a2d_jax.sharding import is_for_tpu
from odlri_jax import ldlq, loop_linalg
from odlri_jax.codebooks import BLOCK, LatticeCodebook
from odlri_jax.matmul import matmul

MAX_EXACT = 1024  # smaller side of A up to which the singular vectors are computed in full
OVERSAMPLING = 16
POWER_ITERATIONS = 4
NUM_SWEEPS = 2  # after each rounding of a factor


def _orthonormal(y: jax.Array) -> jax.Array:
    return loop_linalg.orthonormal(y) if is_for_tpu() else jnp.linalg.qr(y)[0]


def _ritz(weighted: jax.Array, right: jax.Array, rank: int) -> jax.Array:
    """Leading left singular vectors (m, r) of A S_H (m, n), found near the span of `right` (n, k), k >= r."""
    product = matmul(weighted, right)  # (m, k)
    if is_for_tpu():
        basis = loop_linalg.orthonormal(product)
        return matmul(basis, loop_linalg.left_singular(matmul(basis.T, product))[:, :rank])
    basis, triangle = jnp.linalg.qr(product)  # (m, k), (k, k)
    return matmul(basis, jnp.linalg.svd(triangle)[0][:, :rank])


def leading_exact(weighted: jax.Array, rank: int) -> jax.Array:
    """Leading left singular vectors of A S_H (m, n) from the smaller of its Gram matrices. -> (m, r)

    Squared singular values drown in rounding errors beside those of outliers; a step on A S_H itself restores them.
    """
    (m, n), size = weighted.shape, min(rank + OVERSAMPLING, *weighted.shape)
    if m > n:
        right = jnp.linalg.eigh(matmul(weighted.T, weighted))[1][:, : -size - 1 : -1]  # (n, k)
    else:
        left = jnp.linalg.eigh(matmul(weighted, weighted.T))[1][:, : -size - 1 : -1]  # (m, k)
        right = _orthonormal(matmul(weighted.T, left))
    return _ritz(weighted, right, rank)


def leading_randomised(weighted: jax.Array, rank: int, key: jax.Array) -> jax.Array:
    """The same by subspace iteration from a random start (Halko et al., arXiv 0909.4061). -> (m, r)"""
    size = min(rank + OVERSAMPLING, *weighted.shape)
    start = _orthonormal(jax.random.normal(key, (weighted.shape[1], size), weighted.dtype))

    def step(_, right):
        return _orthonormal(matmul(weighted.T, _orthonormal(matmul(weighted, right))))  # (n, k)

    return _ritz(weighted, jax.lax.fori_loop(0, POWER_ITERATIONS, step, start), rank)


def leading(weighted: jax.Array, rank: int, key: jax.Array) -> jax.Array:
    """Leading left singular vectors (m, r) of A S_H (m, n); `key` serves large matrices, and all on a TPU."""
    is_exact = min(weighted.shape) <= MAX_EXACT and not is_for_tpu()
    return leading_exact(weighted, rank) if is_exact else leading_randomised(weighted, rank, key)


def low_rank(a: jax.Array, root: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Best rank-r factors of A in the metric of H = S S^T, S (n, n) its `root`: L (m, r) orthonormal, R (r, n)."""
    left = leading(matmul(a, root), rank, key)
    return left, matmul(left.T, a)


def _solve(gram: jax.Array, target: jax.Array) -> jax.Array:
    """gram^-1 target for a positive semidefinite gram (r, r); directions at rounding level are left out."""
    if is_for_tpu():
        return loop_linalg.solve_definite(gram, target)
    values, vectors = jnp.linalg.eigh(gram)
    inverse = jnp.where(values > 1e-6 * values[-1], 1 / jnp.maximum(values, 1e-30), 0)
    return matmul(vectors * inverse, matmul(vectors.T, target))


def solve_left(a: jax.Array, h: jax.Array, right: jax.Array) -> jax.Array:
    """argmin over L of |A - L R|_H: A H R^T (R H R^T)^{-1}."""
    weighted = matmul(right, h)  # (r, n)
    return _solve(matmul(weighted, right.T), matmul(weighted, a.T)).T


def solve_right(a: jax.Array, left: jax.Array) -> jax.Array:
    """argmin over R of |A - L R|_H, the same for every H: (L^T L)^{-1} L^T A."""
    return _solve(matmul(left.T, left), matmul(left.T, a))


# --- Quantised factors ------------------------------------------------------------------------------------------------


class QuantizedFactors(NamedTuple):
    """L (m, r) and R (r, n) on the lattice, values and units, with the error tr((A - L R) H (A - L R)^T) they leave."""

    left: jax.Array
    right: jax.Array
    left_scale: jax.Array
    right_scale: jax.Array
    error: jax.Array


def round_in_metric(
    x: jax.Array, factors: ldlq.Factors, codebook: LatticeCodebook, num_sweeps: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rows of X rounded against a metric: (values, scale). No row is worse than rounded to nearest points."""
    scale = ldlq.block_scale(x, codebook, 0)
    fed_back = ldlq.quantize(x, factors, scale, codebook, num_sweeps)
    plain = codebook.nearest(x.reshape(x.shape[0], -1, BLOCK) / scale).reshape(x.shape) * scale
    is_worse = ldlq.row_errors(x - fed_back, factors.h) > ldlq.row_errors(x - plain, factors.h)
    return jnp.where(is_worse[:, None], plain, fed_back), scale


def _round_plain(x: jax.Array, codebook: LatticeCodebook) -> tuple[jax.Array, jax.Array]:
    """Nearest points in units of the root mean square, without opt_scale."""
    scale = jnp.maximum(jnp.sqrt(jnp.mean(x * x)), ldlq.MIN_SCALE)
    return codebook.nearest(x.reshape(x.shape[0], -1, BLOCK) / scale).reshape(x.shape) * scale, scale


def quantized_low_rank(
    a: jax.Array,
    factors: ldlq.Factors,
    root: jax.Array,
    start: QuantizedFactors,
    codebook: LatticeCodebook,
    inner_iters: int,
    key: jax.Array,
    plain_rounding: bool = False,
) -> QuantizedFactors:
    """LPLR: rank-r factors of A (m, n) on the lattice.

    Args:
      a: (m, n).
      factors: of the damped H (n, n).
      root: (n, n), its Cholesky factor.
      start: the pair to beat; its `error` is that on this A (infinite: any pair will do). Its shapes give the rank.
      codebook: lattice of both factors.
      inner_iters: rounds of L, then R.
      key: for the rotation of the rank, and the randomised start of large matrices.
      plain_rounding: as published: nearest points, blocks of L down its columns.

    Returns:
      The best pair seen, `start` included.
    """
    h, rank = factors.h, start.right.shape[0]
    solver_key, rotation_key = jax.random.split(key)
    _, right = low_rank(a, root, rank, solver_key)
    if not plain_rounding:
        rotation = _orthonormal(jax.random.normal(rotation_key, (rank, rank), a.dtype))
        right = matmul(rotation.T, right)  # (r, n)

    def better(best, left, right, left_scale, right_scale):
        error = ldlq.weighted_error(a - matmul(left, right), h)
        new = QuantizedFactors(left, right, left_scale, right_scale, error)
        return jax.tree.map(lambda x, y: jnp.where(error < best.error, x, y), new, best)

    def inner_step(_, carry):
        right, best = carry
        left = solve_left(a, h, right)  # (m, r)
        if plain_rounding:
            left, left_scale = (x.T for x in _round_plain(left.T, codebook))
            right, right_scale = _round_plain(solve_right(a, left), codebook)
        else:
            metric = ldlq.factorise(ldlq.damp(matmul(matmul(right, h), right.T), 1e-4))  # (r, r)
            left, left_scale = round_in_metric(left, metric, codebook, NUM_SWEEPS)
            right, right_scale = round_in_metric(solve_right(a, left), factors, codebook, NUM_SWEEPS)
        return right, better(best, left, right, left_scale, right_scale)

    return jax.lax.fori_loop(0, inner_iters, inner_step, (right, start))[1]
