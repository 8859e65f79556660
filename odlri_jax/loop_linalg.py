"""Dense linear algebra as small loops, for TPUs, whose compiler writes the library's forms out.

There `jnp.linalg.qr` is one reflection after the other, the singular value decomposition iterates as long as the data
asks, and compilation grows with the number of columns (docs/tpu.md). Each function here is one or two loops whose trips
follow from the shapes: compilation is short and running times can be foretold. On other chips LAPACK is faster and to
the last bit more accurate, so the callers choose by `is_for_tpu`.

    orthonormal        Q of a tall matrix: Cholesky-QR with a shift, repeated (arXiv 1809.11085), then Newton-Schulz
    left_singular      U of a square matrix: Hestenes' one-sided Jacobi rotations, all pairs in turn (Golub and Van
                       Loan, section 8.6.3), which keeps small singular values beside large ones
    solve_definite     least squares from a Gram matrix: Cholesky with a ridge, and refinement that takes its bias off
    block_inverse      inverses of many small blocks: Gauss-Jordan, all blocks side by side

Everything is float32 with products at the highest precision. Nothing here can break down: a shift or ridge above the
rounding errors keeps each Cholesky factor real, and directions without data come out as zeros or as any completion.
"""

import jax
import jax.numpy as jnp

from odlri_jax.cholesky import cholesky
from odlri_jax.matmul import matmul

SHIFTED_ROUNDS = 5  # the fifth power of the shift's root is far below the smallest float32 ratio of singular values
POLISHING_ROUNDS = 2  # each squares what the shift left: 1e-4, 1e-8
SWEEPS = 12  # of one-sided Jacobi; 272 columns of graded, clustered and outlying spectra settled in 9
REFINEMENTS = 2

_EPS = float(jnp.finfo(jnp.float32).eps)


def _triangular_inverse(lower: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(lower), dtype=lower.dtype), lower=True)


def orthonormal(y: jax.Array) -> jax.Array:
    """Orthonormal columns (m, k) that span those of Y (m, k), k <= m, of any condition.

    The Gram matrix of columns of unit length gets a shift s = 4 k eps, above its rounding errors. A round maps a
    singular value v to v / sqrt(v^2 + s): large ones to 1, small ones up by 1 / sqrt(s). A column that depends on the
    others ends as some orthogonal direction, as in LAPACK; one of zeros stays zero.
    """
    k = y.shape[1]
    y = y / jnp.maximum(jnp.max(jnp.abs(y)), jnp.finfo(y.dtype).tiny)
    shift = 4 * k * _EPS * jnp.eye(k, dtype=y.dtype)

    def shifted_round(_, y):
        length = jnp.sqrt(jnp.sum(y * y, axis=0))
        y = y / jnp.where(length > 0, length, 1)
        return matmul(y, _triangular_inverse(cholesky(matmul(y.T, y) + shift)).T)

    def polish(_, y):
        return 1.5 * y - 0.5 * matmul(y, matmul(y.T, y))

    y = jax.lax.fori_loop(0, SHIFTED_ROUNDS, shifted_round, y)
    return jax.lax.fori_loop(0, POLISHING_ROUNDS, polish, y)


def left_singular(matrix: jax.Array) -> jax.Array:
    """U (k, k) of a square matrix U S V^T, largest singular value first; a column is zero where S is.

    Rotations of pairs of columns until all are orthogonal: T J = U S. A round turns k / 2 disjoint pairs, k - 1 rounds
    meet every pair once, the partners moving around a table as in a tournament. They start from the triangular T of
    matrix^T = Q T^T, which has the same U and needs half the rounds.
    """
    k = len(matrix)
    matrix = matrix / jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.finfo(matrix.dtype).tiny)
    columns = matmul(orthonormal(matrix.T).T, matrix.T)  # row i is column i of T
    half = max(-(-k // 2), 2)
    columns = jnp.pad(columns, ((0, 2 * half - k), (0, 0)))  # an odd one out meets zeros

    def rotate_pairs(_, pairs):
        top, bottom = pairs  # (half, k) both
        p, q, dot = (jnp.sum(x * y, axis=1, keepdims=True) for x, y in ((top, top), (bottom, bottom), (top, bottom)))
        ratio = (q - p) / jnp.where(dot == 0, 1, 2 * dot)
        tangent = jnp.where(ratio < 0, -1, 1) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio * ratio))
        tangent = jnp.where(dot == 0, 0, tangent)
        cosine = jax.lax.rsqrt(1 + tangent * tangent)
        top, bottom = cosine * (top - tangent * bottom), cosine * (bottom + tangent * top)
        return jnp.concatenate([top[:1], bottom[:1], top[1:-1]]), jnp.concatenate([bottom[1:], top[-1:]])

    num_rounds = SWEEPS * (2 * half - 1)
    top, bottom = jax.lax.fori_loop(0, num_rounds, rotate_pairs, (columns[:half], columns[half:]))
    columns = jnp.concatenate([top, bottom])
    value, order = jax.lax.top_k(jnp.sqrt(jnp.sum(columns * columns, axis=1)), k)
    has_direction = value > _EPS**2 * value[0]  # far below rounding, where squares still are numbers
    columns = columns[order] / jnp.where(value > 0, value, 1)[:, None]
    return jnp.where(has_direction[:, None], columns, 0).T


def solve_definite(gram: jax.Array, target: jax.Array) -> jax.Array:
    """gram^-1 target for a positive semidefinite gram (r, r); directions at rounding level get little.

    The ridge is 4 eps of the trace. Each refinement solves for what the ridge left: the bias of a direction of
    eigenvalue v is (ridge / (v + ridge))^3 after two.
    """
    ridge = 4 * _EPS * jnp.maximum(jnp.trace(gram), jnp.finfo(gram.dtype).tiny / _EPS)
    inverse = _triangular_inverse(cholesky(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype)))

    def refine(_, x):
        return x + matmul(inverse.T, matmul(inverse, target - matmul(gram, x)))

    return jax.lax.fori_loop(0, 1 + REFINEMENTS, refine, jnp.zeros_like(target))


def block_inverse(blocks: jax.Array) -> jax.Array:
    """Inverses of blocks (b, s, s) that need no pivoting: definite, or triangular. NaN or infinite where singular."""
    size = blocks.shape[-1]

    def eliminate(p, x):  # (s, s, b): blocks side by side
        pivot = x[p, p]
        row, column = x[p] / pivot, x[:, p]
        is_row, is_column = jnp.arange(size)[:, None, None] == p, jnp.arange(size)[None, :, None] == p
        x = x - column[:, None] * row[None]
        x = jnp.where(is_row, row[None], jnp.where(is_column, (-column / pivot)[:, None], x))
        return jnp.where(is_row & is_column, 1 / pivot, x)

    return jnp.moveaxis(jax.lax.fori_loop(0, size, eliminate, jnp.moveaxis(blocks, 0, -1)), -1, 0)
