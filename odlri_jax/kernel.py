"""Pallas TPU kernel of a packed layer: y = q_scale x Q^T + (x R^T) L^T, Q decoded from its indices on the chip.

Memory then moves two bits a weight (three, four for the residual books) where a dense layer moves sixteen; a decoded
matrix never exists. Grid (tokens, outputs, inputs): a step loads the indices of 256 outputs x 512 blocks of eight,
decodes them, and multiplies; the inputs of a tile of tokens stay in fast memory while all indices pass.

* A block of eight weights is one index, but eight neighbouring lanes would have to be filled from one. So the inputs
  are laid out as eight planes, coordinate c of every block in plane c, and y = sum_c x_c Q_c^T, where all lanes of Q_c
  decode the same coordinate of different blocks.
* The 256 patterns are a table of one 32-bit word each, looked up by the chip's gather along lanes, in two halves of
  128. A one-hot product with the table would cost 256 comparisons an index, the gather two.
* Signs and shift are arithmetic on the low byte (`codebooks.py`). Points of two bits are exact in bfloat16; sums of two
  points are rounded to it, as on the plain path.
* Indices past the edge of the matrix hold anything, which decodes to some point: their inputs are zeros.

The rotations and the small product x R^T stay outside, with the compiler. Gradients take the plain path.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from odlri_jax import codebooks
from odlri_jax.codebooks import BLOCK, LatticeCodebook

LANES = 128
TILE_OUT, TILE_IN = 256, 512  # outputs, and blocks of eight inputs, of a step
MAX_TILE_TOKENS = 512
MAX_INPUT_BYTES = 8 << 20  # of the inputs that stay in fast memory, which holds them twice
FAST_MEMORY_BYTES = 48 << 20
TOKENS_ALIGNMENT = 16  # rows of a tile of bfloat16

_ODD_BIT = 16  # of a word of the table: two bits of magnitude a coordinate, then the parity of their sum
# Bit of an index's low byte that flips coordinate c; those of 0 and 7 depend on more.
_SIGN_BIT = {c: bit for bit, c in enumerate(codebooks.FLIP_COORDINATE) if bit}


@functools.cache
def _table(kind: str) -> np.ndarray:
    """(2, 128) int32: the words of 256 E8P patterns, or of 256 E8 points, four bits a coordinate: 2 v + 4."""
    if kind == "e8p":
        pattern = codebooks.patterns()
        words = (pattern << 2 * np.arange(BLOCK)).sum(axis=1) | (pattern.sum(axis=1) % 2) << _ODD_BIT
    else:
        nibbles = (2 * codebooks.e8_points() + 4).astype(np.int64)
        words = (nibbles << 4 * np.arange(BLOCK)).sum(axis=1)
    return words.astype(np.uint32).view(np.int32).reshape(2, LANES)


def _lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    """Words of indices 0 to 255, (rows, 128)."""
    halves = [
        jnp.take_along_axis(jnp.broadcast_to(table[k : k + 1], index.shape), index & LANES - 1, axis=1) for k in (0, 1)
    ]
    return jnp.where(index < LANES, *halves)


def _e8p_coordinates(table: jax.Array, index: jax.Array) -> list[jax.Array]:
    """Eight planes (rows, 128) float32 of E8P12 points, from 16-bit indices."""
    word, low = _lookup(table, index >> 8), index & 0xFF
    parity = low ^ low >> 4
    parity = parity ^ parity >> 2
    parity = (parity ^ parity >> 1) & 1
    shift = (1 - 2 * parity).astype(jnp.float32) * 0.25
    planes = []
    for c in range(BLOCK):
        if c == 0:
            is_negative = parity ^ low & 1
        elif c == BLOCK - 1:
            is_negative = (low >> _SIGN_BIT[c] ^ word >> _ODD_BIT) & 1
        else:
            is_negative = low >> _SIGN_BIT[c] & 1
        magnitude = (word >> 2 * c & 3).astype(jnp.float32) + 0.5
        planes.append(jnp.where(is_negative == 1, -magnitude, magnitude) + shift)
    return planes


def _e8_coordinates(table: jax.Array, index: jax.Array) -> list[jax.Array]:
    """Eight planes (rows, 128) float32 of the 256 E8 points."""
    word = _lookup(table, index)
    return [(word >> 4 * c & 15).astype(jnp.float32) * 0.5 - 2 for c in range(BLOCK)]


def _times_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """x (t, k) y (m, k)^T, float32."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _step(*refs, codebook: LatticeCodebook, num_steps: int, has_factors: bool):
    """One step of the grid; see `packed_product` for the arrays."""
    refs, out = list(refs[:-1]), refs[-1]
    scale, table, x, index = (refs.pop(0) for _ in range(4))
    residual_table, residual = (refs.pop(0) for _ in range(2)) if codebook.residual else (None, None)
    step = pl.program_id(2)
    total = jnp.zeros(out.shape, jnp.float32)
    for start in range(0, index.shape[1], LANES):
        lanes = slice(start, start + LANES)
        planes = _e8p_coordinates(table[...], index[:, lanes].astype(jnp.int32))
        if codebook.residual:
            coordinates = _e8p_coordinates if codebook.residual == "e8p" else _e8_coordinates
            second = coordinates(residual_table[...], residual[:, lanes].astype(jnp.int32))
            planes = [p + s / codebook.residual_scale for p, s in zip(planes, second, strict=True)]
        at = pl.multiple_of(step * index.shape[1] + start, LANES)
        for c, plane in enumerate(planes):
            total += _times_transposed(x[c, :, pl.ds(at, LANES)], plane.astype(x.dtype))

    @pl.when(step == 0)
    def _():
        out[...] = total

    @pl.when(step > 0)
    def _():
        out[...] += total

    @pl.when(step == num_steps - 1)
    def _():
        y = out[...] * scale[0, 0]
        out[...] = y + _times_transposed(refs[0][...], refs[1][...]) if has_factors else y


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def packed_product(
    x: jax.Array,
    arrays: Mapping[str, jax.Array],
    codebook: LatticeCodebook,
    factors: tuple[jax.Array, jax.Array] | None = None,
    is_interpreted: bool = False,
) -> jax.Array:
    """q_scale x Q^T + low L^T by the kernel, on one device.

    Args:
      x: (T, n), bfloat16.
      arrays: "q_index" (m, n / 8) uint16, "q_residual" where the codebook has one, "q_scale" ().
      codebook: of Q.
      factors: x R^T (T, r) and L (m, r), both bfloat16; None leaves L R out.
      is_interpreted: run it without a TPU.
    Returns:
      (T, m) float32.
    """
    (num_tokens, n), (m, num_blocks) = x.shape, arrays["q_index"].shape
    tile_in = min(TILE_IN, _round_up(num_blocks, LANES))
    num_steps = -(-num_blocks // tile_in)
    width = num_steps * tile_in  # of a plane
    most = min(MAX_TILE_TOKENS, max(MAX_INPUT_BYTES // (BLOCK * width * x.dtype.itemsize), TOKENS_ALIGNMENT))
    num_tiles = -(-num_tokens // most)
    tile_tokens = _round_up(-(-num_tokens // num_tiles), TOKENS_ALIGNMENT)
    padded = num_tiles * tile_tokens
    planes = x.reshape(num_tokens, num_blocks, BLOCK).transpose(2, 0, 1)  # (8, T, n / 8)
    planes = jnp.pad(planes, ((0, 0), (0, padded - num_tokens), (0, width - num_blocks)))

    everything = pl.BlockSpec((2, LANES), lambda t, i, j: (0, 0))
    indices = pl.BlockSpec((TILE_OUT, tile_in), lambda t, i, j: (i, j))
    inputs = [
        (arrays["q_scale"].astype(jnp.float32).reshape(1, 1), pl.BlockSpec(memory_space=pltpu.SMEM)),
        (jnp.asarray(_table("e8p")), everything),
        (planes, pl.BlockSpec((BLOCK, tile_tokens, width), lambda t, i, j: (0, t, 0))),
        (arrays["q_index"], indices),
    ]
    if codebook.residual:
        inputs += [(jnp.asarray(_table(codebook.residual)), everything), (arrays["q_residual"], indices)]
    if factors is not None:
        low, left = factors
        rank = left.shape[1]
        low = jnp.pad(low, ((0, padded - num_tokens), (0, 0)))
        inputs += [
            (low, pl.BlockSpec((tile_tokens, rank), lambda t, i, j: (t, 0))),
            (left, pl.BlockSpec((TILE_OUT, rank), lambda t, i, j: (i, 0))),
        ]
    operands, specs = zip(*inputs, strict=True)
    weight_bytes = sum(v.size * v.dtype.itemsize for v in operands) - planes.size * planes.dtype.itemsize
    y = pl.pallas_call(
        functools.partial(_step, codebook=codebook, num_steps=num_steps, has_factors=factors is not None),
        grid=(num_tiles, -(-m // TILE_OUT), num_steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((tile_tokens, TILE_OUT), lambda t, i, j: (t, i)),
        out_shape=jax.ShapeDtypeStruct((padded, m), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=FAST_MEMORY_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * padded * m * (n + (0 if factors is None else factors[1].shape[1])),
            bytes_accessed=num_tiles * weight_bytes + planes.size * planes.dtype.itemsize + 4 * padded * m,
            transcendentals=0,
        ),
        interpret=is_interpreted,
        name="packed_product",
    )(*operands)
    return y[:num_tokens]
