"""Randomised Hadamard transform: spreads a matrix and its Hessian evenly over all coordinates before rounding.

    W~ = U_m diag(s_V) W diag(s_U) U_n^T,   H~ = U_n diag(s_U) H diag(s_U) U_n^T,   U_n = kron(K, S) / sqrt(n)

S is the Sylvester matrix of a power of two, applied as a fast Walsh-Hadamard transform whose stages are small matrix
products; K is a Hadamard matrix of the odd factor of n (times four or so): Paley's two constructions over finite
fields, Williamson's for 172, or a product of such. A width with none of these gets a block-diagonal U_n, still
orthogonal, and a warning.
"""

import functools
import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np

MAX_STAGE = 64  # side of the products that make up a Walsh-Hadamard transform
MAX_ODD_ORDER = 4096  # beyond it a dense K costs more than it mixes

# Williamson's four symmetric circulants of order 43: the sequences are constant on the cosets of {+-1, +-6, +-7} in the
# multiplicative group; bit k is set where the k-th coset (by its smallest member) holds -1. Entry 0 is +1.
_WILLIAMSON = {43: ((1, 6, 7), (7, 46, 52, 98))}


# --- Matrices ---------------------------------------------------------------------------------------------------------


def sylvester(n: int) -> np.ndarray:
    """(n, n) of +-1, n a power of two: kron of [[1, 1], [1, -1]]."""
    index = np.arange(n)
    return 1 - 2 * (np.bitwise_count(index[:, None] & index) % 2).astype(np.int8)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, e at most 3; None where q is no such power."""
    for e in (1, 2, 3):
        p = round(q ** (1 / e))
        if p > 1 and p**e == q and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, e
    return None


def _field_squares(p: int, e: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements of GF(p^e) as coefficient rows (q, e), lowest first, and which of them are nonzero squares (q,)."""
    elements = np.array(list(itertools.product(range(p), repeat=e)))[:, ::-1]  # (q, e), element number = base-p digits
    # x^e = -(tail), for a monic polynomial without roots: irreducible, as e <= 3.
    tail = next(
        c for c in elements if e == 1 or all((x**e + sum(int(a) * x**i for i, a in enumerate(c))) % p for x in range(p))
    )
    square = np.zeros((len(elements), 2 * e - 1), np.int64)
    for i, j in itertools.product(range(e), repeat=2):
        square[:, i + j] += elements[:, i] * elements[:, j]
    for degree in range(2 * e - 2, e - 1, -1):  # x^degree = -tail * x^(degree - e)
        square[:, degree - e : degree] -= square[:, degree : degree + 1] * tail
    numbers = (square[:, :e] % p) @ p ** np.arange(e)
    is_square = np.zeros(len(elements), bool)
    is_square[numbers[1:]] = True
    return elements, is_square


def _jacobsthal(p: int, e: int) -> np.ndarray:
    """(q, q): entry i, j is the quadratic character of element j minus element i."""
    elements, is_square = _field_squares(p, e)
    difference = (elements[None] - elements[:, None]) % p @ p ** np.arange(e)  # (q, q)
    return np.where(difference == 0, 0, np.where(is_square[difference], 1, -1)).astype(np.int8)


def _bordered(corner: int, row: int, column: int, core: np.ndarray) -> np.ndarray:
    """[[corner, row], [column, core]], the border constant."""
    matrix = np.pad(core, ((1, 0), (1, 0)))
    matrix[0, 0], matrix[0, 1:], matrix[1:, 0] = corner, row, column
    return matrix


def _paley_one(p: int, e: int) -> np.ndarray:
    """Order q + 1, q = 3 mod 4: [[1, 1], [-1, I + Q]]."""
    core = _jacobsthal(p, e) + np.eye(p**e, dtype=np.int8)
    return _bordered(1, 1, -1, core)


def _paley_two(p: int, e: int) -> np.ndarray:
    """Order 2 (q + 1), q = 1 mod 4, from the symmetric conference matrix [[0, 1], [1, Q]]."""
    core = _jacobsthal(p, e)
    conference = _bordered(0, 1, 1, core)
    eye = np.eye(len(conference), dtype=np.int8)
    return np.kron(conference, sylvester(2)) + np.kron(eye, np.array([[1, -1], [-1, -1]], np.int8))


def _williamson(order: int) -> np.ndarray:
    """Order 4 * order from four symmetric circulants A, B, C, D with A^2 + B^2 + C^2 + D^2 = 4 * order * I."""
    subgroup, masks = _WILLIAMSON[order]
    cosets = {}
    for x in range(1, order):
        members = frozenset(sign * x * g % order for g in subgroup for sign in (1, -1))
        cosets.setdefault(members, len(cosets))
    shift = (np.arange(order)[None] - np.arange(order)[:, None]) % order
    circulants = []
    for mask in masks:
        sequence = np.ones(order, np.int8)
        for members, number in cosets.items():
            sequence[list(members)] = -1 if mask >> number & 1 else 1
        circulants.append(sequence[shift])
    a, b, c, d = circulants
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


@functools.cache
def odd_hadamard(odd: int, max_order: int) -> np.ndarray | None:
    """Smallest Hadamard matrix of order odd * 2^k dividing max_order; None where no construction is known."""
    if odd == 1:
        return np.ones((1, 1), np.int8)
    order = 4 * odd
    while order <= min(max_order, MAX_ODD_ORDER) and max_order % order == 0:
        field = _prime_power(order - 1)
        if field and (order - 1) % 4 == 3:
            return _paley_one(*field)
        field = _prime_power(order // 2 - 1)
        if field and (order // 2 - 1) % 4 == 1:
            return _paley_two(*field)
        if order % 4 == 0 and order // 4 in _WILLIAMSON:
            return _williamson(order // 4)
        order *= 2
    for factor in range(3, math.isqrt(odd) + 1, 2):
        if odd % factor == 0:
            first = odd_hadamard(factor, max_order // (odd // factor))
            if first is None:
                continue
            second = odd_hadamard(odd // factor, max_order // len(first))
            if second is not None and len(first) * len(second) <= MAX_ODD_ORDER:
                return np.kron(first, second)
    return None


@functools.cache
def block_sizes(n: int) -> tuple[int, ...]:
    """Sizes of the diagonal blocks of U_n: n where a Hadamard matrix of that order is known, else powers of two."""
    if odd_hadamard(n // (n & -n), n) is not None:
        return (n,)
    sizes = tuple(1 << bit for bit in reversed(range(n.bit_length())) if n >> bit & 1)
    warnings.warn(
        f"no Hadamard matrix of order {n} is built in; the transform mixes within blocks of {sizes} coordinates only.",
        stacklevel=2,
    )
    return sizes


# --- Transform --------------------------------------------------------------------------------------------------------


def _matmul_axis(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
    """x with `matrix` applied along one axis."""
    product = jnp.tensordot(x, jnp.asarray(matrix, x.dtype), axes=((axis,), (1,)), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(product, -1, axis)


def _rotate_block(x: jax.Array, inverse: bool) -> jax.Array:
    """x (..., n) times U_n^T (or U_n) for one n with a known matrix."""
    n = x.shape[-1]
    kernel = odd_hadamard(n // (n & -n), n)
    power, stages = n // len(kernel), []
    while power > 1:
        stages.append(min(power, MAX_STAGE))
        power //= stages[-1]
    shape = x.shape[:-1] + (len(kernel), *stages)
    y = x.reshape(shape)  # (..., K, stage, stage, ...)
    first = x.ndim - 1
    if len(kernel) > 1:
        y = _matmul_axis(y, kernel.T if inverse else kernel, first)
    for number, size in enumerate(stages):
        y = _matmul_axis(y, sylvester(size), first + 1 + number)
    return y.reshape(x.shape) / math.sqrt(n)


def rotate(x: jax.Array, inverse: bool = False) -> jax.Array:
    """x (..., n) -> x U_n^T, the transform of each row; `inverse` gives x U_n, which undoes it."""
    parts, start = [], 0
    for size in block_sizes(x.shape[-1]):
        parts.append(_rotate_block(x[..., start : start + size], inverse))
        start += size
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def random_signs(key: jax.Array, n: int) -> jax.Array:
    """(n,) float32 of +-1."""
    return jax.random.rademacher(key, (n,), jnp.float32)


def incoherent_weight(w: jax.Array, signs_out: jax.Array, signs_in: jax.Array) -> jax.Array:
    """W (m, n) -> W~ = U_m diag(s_V) W diag(s_U) U_n^T, for s_V (m,), s_U (n,)."""
    return rotate(rotate(w * signs_in).T * signs_out).T  # (m, n)


def coherent_weight(w: jax.Array, signs_out: jax.Array, signs_in: jax.Array) -> jax.Array:
    """W~ (m, n) -> W: undoes `incoherent_weight`."""
    return rotate((rotate(w.T, inverse=True) * signs_out).T, inverse=True) * signs_in  # (m, n)


def incoherent_hessian(h: jax.Array, signs_in: jax.Array) -> jax.Array:
    """H (n, n) -> H~ = U_n diag(s_U) H diag(s_U) U_n^T."""
    return incoherent_weight(h, signs_in, signs_in)
