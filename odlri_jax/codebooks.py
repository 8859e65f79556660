"""Codebooks and their exact nearest points: the E8P lattice books (2, 3, 4 bits), uniform and NormalFloat levels.

E8P12 (QuIP#, arXiv 2402.04396, section 4.2) holds 2^16 points of dimension 8, two bits a weight:

    point = signs * pattern + shift,   shift = +-1/4,   pattern in (Z + 1/2)^8 of |pattern|^2 <= 10, or one of 29 of 12

where the signed pattern has an even coordinate sum. The residual books add a second point of the rounding error:

    v = q1(x) + q2((x - q1(x)) * s) / s,   q2 = E8P12 (4 bits) or 256 points of the E8 lattice (3 bits)

Nearest points are found from the structure, for all points at once, by elementwise arithmetic on eight coordinates: for
a given norm the best pattern puts its large entries where |x| is large, the parity of the coordinate sum is mended by
flipping the cheapest sign, and only the 29 irregular patterns are tried one by one. A point is carried as one 32-bit
code (magnitudes, signs, shift); the published 16-bit index is looked up from it when weights are packed.
"""

import dataclasses
import functools
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from odlri_jax.matmul import matmul

BLOCK = 8  # dimension of the lattice points; every codebook rounds blocks of so many columns

# The patterns of norm 12: 3/2 where the bit is set (bit i = coordinate i), 1/2 elsewhere (QuIP#, appendix C).
_NORM_12 = bytes.fromhex("f1f2f4f8 375767 97a7c7 3b5b6b 9babcb 3d5d6d 9dadce 3e5e6e 9eaeec 73")

# Bit i of the low byte of an index flips coordinates 0 and FLIP_COORDINATE[i]; bit 0 flips nothing and so only chooses
# the shift, by the parity of the byte.
FLIP_COORDINATE = (0, 2, 4, 6, 1, 3, 5, 7)

_SIGN_BIT, _SHIFT_BIT = 16, 24  # a code: two bits of magnitude a coordinate, then eight signs, then the shift


# --- E8P12 ------------------------------------------------------------------------------------------------------------


@functools.cache
def patterns() -> np.ndarray:
    """(256, 8) magnitudes 0, 1, 2 standing for 1/2, 3/2, 5/2, in the order of the index's high byte."""
    ball = [p for p in itertools.product(range(3), repeat=BLOCK) if sum((x + 0.5) ** 2 for x in p) <= 10]
    extra = [[mask >> i & 1 for i in range(BLOCK)] for mask in _NORM_12]
    return np.array(ball + extra, np.int32)  # (256, 8)


def _ranks(a: list[jax.Array]) -> list[jax.Array]:
    """How many coordinates come before each when sorted from large to small; equal ones keep their order."""
    rank = [jnp.zeros(a[0].shape, jnp.int32) for _ in a]
    for i, j in itertools.combinations(range(BLOCK), 2):
        is_first = a[i] >= a[j]
        rank[j] = rank[j] + is_first
        rank[i] = rank[i] + ~is_first
    return rank


def _best_pattern(y: list[jax.Array]) -> jax.Array:
    """Nearest signed pattern p of even sum for eight arrays y (largest <y, p> - |p|^2 / 2): code without shift."""
    a = [jnp.abs(v) for v in y]
    is_negative = [v < 0 for v in y]
    is_odd = functools.reduce(jnp.logical_xor, is_negative)
    rank = _ranks(a)
    total = functools.reduce(jnp.add, a)
    smallest = functools.reduce(jnp.minimum, a)

    # Magnitudes 1/2 with 3/2 on the k largest, or 5/2 on the largest (and 3/2 on the next). The sum is even when the
    # number of negative entries has the parity of the number of 3/2; otherwise the smallest coordinate changes sign.
    top = [jnp.zeros_like(total)]
    for k in range(4):
        top.append(top[-1] + functools.reduce(jnp.add, [jnp.where(r == k, v, 0) for r, v in zip(rank, a, strict=True)]))
    flip_cost = (jnp.where(is_odd, smallest, 0), jnp.where(is_odd, 0, smallest))  # for an even, an odd number of 3/2
    best = total / 2 - 1 - flip_cost[0]
    num_raised, has_five = jnp.zeros_like(rank[0]), jnp.zeros_like(rank[0])
    candidates = [(total / 2 + top[k] - (1 + k) - flip_cost[k % 2], k, 0) for k in range(1, 5)]
    candidates += [(total / 2 + 2 * top[1] - 4 - flip_cost[0], 1, 1)]
    candidates += [(total / 2 + top[1] + top[2] - 5 - flip_cost[1], 2, 1)]
    for score, raised, five in candidates:
        is_better = score > best
        best = jnp.where(is_better, score, best)
        num_raised = jnp.where(is_better, raised, num_raised)
        has_five = jnp.where(is_better, five, has_five)
    needs_flip = is_odd ^ ((num_raised - has_five) % 2 == 1)
    magnitudes = [(r < num_raised).astype(jnp.int32) + jnp.where(r == 0, has_five, 0) for r in rank]
    levels = functools.reduce(jnp.bitwise_or, [v << 2 * i for i, v in enumerate(magnitudes)])

    # The 29 of norm 12: five 3/2, three 1/2 (the set `low`). Where a sign must change, it costs the smallest of `low`,
    # or three times the smallest of all.
    flip_limit = jnp.where(is_odd, 0, 3 * smallest)
    cost = 1.5 * total - 6 - best  # a pattern that costs less than this is better
    for mask in _NORM_12:
        low = [a[i] for i in range(BLOCK) if not mask >> i & 1]
        low_cost = low[0] + low[1] + low[2] + jnp.minimum(functools.reduce(jnp.minimum, low), flip_limit)
        levels = jnp.where(low_cost < cost, sum(1 << 2 * i for i in range(BLOCK) if mask >> i & 1), levels)
        cost = jnp.minimum(low_cost, cost)
    is_norm_12 = jax.lax.population_count(levels & 0x5555) == 5
    needs_flip = jnp.where(is_norm_12, ~is_odd, needs_flip)

    # The sign to change is the cheapest, magnitude times |y|; of equal ones the last in the sorted order, which for the
    # patterns of the ball is the smallest coordinate.
    is_low = [(levels >> 2 * i) & 3 == 0 for i in range(BLOCK)]
    last_low = functools.reduce(jnp.maximum, [jnp.where(low, r, -1) for low, r in zip(is_low, rank, strict=True)])
    low_smallest = functools.reduce(jnp.minimum, [jnp.where(low, v, jnp.inf) for low, v in zip(is_low, a, strict=True)])
    flipped = jnp.where(needs_flip, jnp.where(low_smallest <= 3 * smallest, last_low, BLOCK - 1), -1)  # its rank
    signs = [(n ^ (r == flipped)).astype(jnp.int32) for n, r in zip(is_negative, rank, strict=True)]
    return functools.reduce(jnp.bitwise_or, [s << _SIGN_BIT + i for i, s in enumerate(signs)], levels)


def _e8p_code(x: jax.Array) -> jax.Array:
    """Code of the nearest E8P12 point to x (..., 8) -> (...) int32. A tie between the shifts goes to +1/4."""
    columns = [x[..., i].reshape(-1) for i in range(BLOCK)]

    # A loop over the two shifts: the search is compiled once, and its readers cannot repeat it by fusion.
    def best_of_shift(is_minus):
        return _best_pattern([v - 0.25 + 0.5 * is_minus for v in columns]) | is_minus << _SHIFT_BIT

    plus, minus = jax.lax.map(best_of_shift, jnp.arange(2)).reshape(2, *x.shape[:-1])
    distance = [jnp.sum((x - _e8p_values(code)) ** 2, axis=-1) for code in (plus, minus)]
    return jnp.where(distance[1] < distance[0], minus, plus)


def _e8p_values(code: jax.Array) -> jax.Array:
    """Point of a code (...) -> (..., 8)."""
    coordinate = jnp.arange(BLOCK)
    magnitude = ((code[..., None] >> 2 * coordinate) & 3) + 0.5
    sign = 1 - 2 * ((code[..., None] >> _SIGN_BIT + coordinate) & 1)
    shift = 0.25 - 0.5 * ((code >> _SHIFT_BIT) & 1)
    return (sign * magnitude + shift[..., None]).astype(jnp.float32)


@functools.cache
def _index_tables() -> tuple[np.ndarray, np.ndarray]:
    """Code without shift of each index; high byte of the index of each set of magnitudes (-1 where none has it)."""
    pattern = patterns()
    levels = (pattern << 2 * np.arange(BLOCK)).sum(axis=1)  # (256,)
    signs = np.zeros((256, BLOCK), np.int32)
    for bit in range(1, BLOCK):
        is_set = np.arange(256) >> bit & 1
        signs[:, 0] ^= is_set
        signs[:, FLIP_COORDINATE[bit]] ^= is_set
    is_odd = pattern.sum(axis=1) % 2  # (256,) an odd sum of magnitudes: the last entry is negative by default
    all_signs = np.broadcast_to(signs, (256, 256, BLOCK)).copy()
    all_signs[:, :, -1] ^= is_odd[:, None]
    codes = levels[:, None] | (all_signs << _SIGN_BIT + np.arange(BLOCK)).sum(axis=-1)  # (pattern, low byte)
    high_byte = np.full(1 << 2 * BLOCK, -1, np.int32)
    high_byte[levels] = np.arange(256)
    return codes.reshape(-1).astype(np.int32), high_byte


def _parity(bits: jax.Array) -> jax.Array:
    return jax.lax.population_count(bits) & 1


def _e8p_index(code: jax.Array) -> jax.Array:
    """Published 16-bit index of a code: pattern in the high byte, signs and, by their parity, shift in the low byte."""
    high = jnp.asarray(_index_tables()[1])[code & 0xFFFF]
    is_odd = _parity(code & 0x5555)  # the low bit of each magnitude: an odd number of 3/2
    signs = (code >> _SIGN_BIT & 0xFF) ^ is_odd << BLOCK - 1
    low = functools.reduce(
        jnp.bitwise_or, [(signs >> FLIP_COORDINATE[bit] & 1) << bit for bit in range(1, BLOCK)], jnp.zeros_like(code)
    )
    return high << 8 | low | (_parity(low) ^ (code >> _SHIFT_BIT & 1))


def _e8p_code_of_index(index: jax.Array) -> jax.Array:
    return jnp.asarray(_index_tables()[0])[index] | _parity(index & 0xFF) << _SHIFT_BIT


# --- The 256-point E8 book of the 3-bit residual ----------------------------------------------------------------------


@functools.cache
def e8_points() -> np.ndarray:
    """(256, 8) 0 and the 240 roots of E8 (whole, then half coordinates, each sorted), 2 e_i, -2 e_i but the last."""
    whole = [p for p in itertools.product((-1, 0, 1), repeat=BLOCK) if sum(map(abs, p)) in (0, 2)]
    half = [p for p in itertools.product((-0.5, 0.5), repeat=BLOCK) if sum(p) % 2 == 0]
    long = np.concatenate([2 * np.eye(BLOCK), -2 * np.eye(BLOCK)])[:-1]
    return np.concatenate([whole, half, long]).astype(np.float32)


def _e8_nearest(x: jax.Array) -> jax.Array:
    """Index of the nearest of the 256 E8 points to x (..., 8): one small matrix product."""
    points = jnp.asarray(e8_points())
    score = matmul(x, points.T) - (points**2).sum(axis=1) / 2  # (..., 256)
    return jnp.argmax(score, axis=-1).astype(jnp.int32)


# --- Codebooks --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LatticeCodebook:
    """E8P12 (residual None), E8P12RVQ3B ("e8") or E8P12RVQ4B ("e8p"), one point for eight weights.

    Attributes:
      opt_scale: multiple of the root mean square at which Gaussian input is rounded with the least error.
      residual_scale: the factor s of the second point.
    """

    name: str
    bits: int
    opt_scale: float
    residual: str | None = None
    residual_scale: float = 1.0

    def nearest(self, x: jax.Array) -> jax.Array:
        """Nearest values to x (..., 8), the second point that of the remainder of the first."""
        if self.residual is None:
            return _e8p_values(_e8p_code(x))
        if self.residual == "e8":
            first = _e8p_values(_e8p_code(x))
            second = jnp.asarray(e8_points())[_e8_nearest((x - first) * self.residual_scale)]
            return self._sum(first, second)

        def add_point(stage, total):  # both points from one compiled search
            factor = jnp.where(stage == 0, 1, jnp.float32(self.residual_scale))
            point = _e8p_values(_e8p_code((x - total) * factor))
            return jnp.where(stage == 0, point, self._sum(total, point))

        return jax.lax.fori_loop(0, 2, add_point, jnp.zeros_like(x))

    def _sum(self, first: jax.Array, second: jax.Array) -> jax.Array:
        # A true division: for a scalar the compiler multiplies with its rounded inverse, an ulp off the published sum.
        return first + second / jax.lax.optimization_barrier(jnp.full_like(second, self.residual_scale))

    def encode(self, x: jax.Array) -> jax.Array:
        """Index of the nearest point, (..., 8) -> (...) int32 for two bits, uint32 (first << 16) + second otherwise.

        The first index of the 3-bit book is 16 bits, the second 8: 24 bits for eight weights.
        """
        code = _e8p_code(x)
        first = _e8p_index(code)
        if self.residual is None:
            return first
        remainder = (x - _e8p_values(code)) * self.residual_scale
        second = _e8p_index(_e8p_code(remainder)) if self.residual == "e8p" else _e8_nearest(remainder)
        return first.astype(jnp.uint32) << 16 | second.astype(jnp.uint32)

    def encode_points(self, points: jax.Array) -> jax.Array:
        """Index of values (..., 8) that `nearest` gave, rounding errors aside.

        `encode` finds a point near its argument, which for a sum of two points need not be the pair that made it. But
        every coordinate of a sum comes from one pair of coordinates only: a table of the pairs tells both points.
        """
        if self.residual is None:
            return self.encode(points)
        first = np.arange(-11, 12, 2) / 4  # the coordinates of E8P12
        second = first if self.residual == "e8p" else np.array([-2, -1, -0.5, 0, 0.5, 1, 2])
        sums = (first[:, None] + second / self.residual_scale).ravel()
        order = np.argsort(sums)
        middle = ((sums[order][1:] + sums[order][:-1]) / 2).astype(np.float32)
        pair = jnp.asarray(order)[jnp.searchsorted(jnp.asarray(middle), points)]  # (..., 8)
        first_index = E8P12.encode(jnp.asarray(first, jnp.float32)[pair // len(second)])
        remainder = jnp.asarray(second, jnp.float32)[pair % len(second)]
        second_index = E8P12.encode(remainder) if self.residual == "e8p" else _e8_nearest(remainder)
        return first_index.astype(jnp.uint32) << 16 | second_index.astype(jnp.uint32)

    def decode(self, index: jax.Array) -> jax.Array:
        """Values of indices: (...) -> (..., 8)."""
        if self.residual is None:
            return _e8p_values(_e8p_code_of_index(index))
        first = _e8p_values(_e8p_code_of_index((index >> 16).astype(jnp.int32)))
        low = (index & 0xFFFF).astype(jnp.int32)
        second = _e8p_values(_e8p_code_of_index(low)) if self.residual == "e8p" else jnp.asarray(e8_points())[low]
        return self._sum(first, second)


@dataclasses.dataclass(frozen=True)
class ScalarCodebook:
    """Levels in [-1, 1] for single weights; the scale is the largest magnitude of each group of weights in a row."""

    name: str
    bits: int
    levels: tuple[float, ...]

    def encode(self, x: jax.Array) -> jax.Array:
        """Number of the nearest level, (...) -> (...) int32; halfway goes up."""
        levels = np.array(self.levels, np.float32)
        return jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), x, side="right").astype(jnp.int32)

    def decode(self, index: jax.Array) -> jax.Array:
        return jnp.asarray(np.array(self.levels, np.float32))[index]

    def nearest(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x))


Codebook = LatticeCodebook | ScalarCodebook

# opt_scale and residual_scale: arXiv 2402.04396, table of E8P and its residual books.
E8P12 = LatticeCodebook("E8P12", 2, 1.03)
E8P12RVQ3B = LatticeCodebook("E8P12RVQ3B", 3, 0.98, "e8", 2.04)
E8P12RVQ4B = LatticeCodebook("E8P12RVQ4B", 4, 1.03, "e8p", 3.45)


def uniform(bits: int) -> ScalarCodebook:
    """2^bits evenly spaced levels from -1 to 1."""
    return ScalarCodebook("uniform", bits, tuple(np.linspace(-1, 1, 2**bits).tolist()))


def normal_float(bits: int) -> ScalarCodebook:
    """NormalFloat (QLoRA, arXiv 2305.14314): quantiles of a Gaussian scaled to [-1, 1], with an exact zero.

    One half of the levels below zero, the other above; the outermost quantile leaves out the same tail on both sides.
    """
    half = 2 ** (bits - 1)
    offset = (1 - 1 / (2 * (2**bits - 1)) + 1 - 1 / 2 ** (bits + 1)) / 2
    inverse = statistics.NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    levels = sorted(negative + [0.0] + positive)
    return ScalarCodebook("normal_float", bits, tuple(v / max(levels) for v in levels))


def get_codebook(name: str, bits: int) -> Codebook:
    """Codebook by kind ("e8p", "uniform", "normal_float") and bits a weight."""
    if name == "e8p":
        lattice = {2: E8P12, 3: E8P12RVQ3B, 4: E8P12RVQ4B}
        if bits not in lattice:
            raise ValueError(f"codebook e8p has 2, 3 or 4 bits a weight, not {bits}; for others use uniform.")
        return lattice[bits]
    if name not in ("uniform", "normal_float"):
        raise ValueError(f"codebook {name!r} is unknown; it is one of e8p, uniform, normal_float.")
    if not 2 <= bits <= 8:
        raise ValueError(f"codebook {name} has 2 to 8 bits a weight, not {bits}.")
    return uniform(bits) if name == "uniform" else normal_float(bits)
