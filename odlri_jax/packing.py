"""Decomposition <-> packed arrays, bit for bit: lattice points as index words, levels as bit fields, signs as bits.

`docs/packed_format.md` describes every array, and `packed_tensors.py` holds the table of them.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from odlri_jax.codebooks import BLOCK, Codebook, LatticeCodebook
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.decomposition import Decomposition
from odlri_jax.ldlq import block_units
from odlri_jax.packed_tensors import RESIDUAL_DTYPES, TensorSpec, tensor_specs

PIECE = 1 << 14  # blocks whose indices are searched at once


# --- Points <-> indices -----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="codebook")
def _encode_blocks(blocks: jax.Array, codebook: Codebook) -> jax.Array:
    """(..., 8) codebook values -> index of each block, or (..., 8) of each weight."""
    encode = codebook.encode_points if isinstance(codebook, LatticeCodebook) else codebook.encode
    return encode(blocks)


def _encode(values: np.ndarray, units: np.ndarray, codebook: Codebook) -> np.ndarray:
    """(rows, columns) in units (rows or 1, columns / 8) -> index of each block, or of each weight."""
    rows, columns = values.shape
    blocks = (values.reshape(rows, -1, BLOCK) / units[..., None]).reshape(-1, BLOCK)
    # In pieces of one size, so that the search is compiled once for matrices of all shapes.
    index = []
    for start in range(0, len(blocks), PIECE):
        piece = blocks[start : start + PIECE]
        padded = np.pad(piece, ((0, PIECE - len(piece)), (0, 0)))
        index.append(np.asarray(_encode_blocks(padded, codebook))[: len(piece)])
    return np.concatenate(index).reshape(rows, -1)


def encode(prefix: str, values: jax.Array, scale: jax.Array, codebook: Codebook) -> dict[str, np.ndarray]:
    """Index arrays of a matrix (rows, columns) whose entries are codebook values times `scale`.

    Raises:
      ValueError: entries that are no such values.
    """
    values = np.asarray(values)
    index = _encode(values, np.asarray(block_units(scale, values.shape[-1])), codebook)
    if not isinstance(codebook, LatticeCodebook):
        bits = index.astype(np.uint8)[..., None] >> np.arange(codebook.bits, dtype=np.uint8) & 1
        arrays = {"index": np.packbits(bits.reshape(len(index), -1), axis=-1, bitorder="little")}
    elif codebook.residual is None:
        arrays = {"index": index.astype(np.uint16)}
    else:
        residual_dtype = RESIDUAL_DTYPES[codebook.residual]
        arrays = {"index": (index >> 16).astype(np.uint16), "residual": (index & 0xFFFF).astype(residual_dtype)}
    arrays = {f"{prefix}_{name}": array for name, array in arrays.items()}
    back = np.asarray(_decode_scaled(arrays, prefix, scale, codebook))
    if not np.array_equal(back, values):
        raise ValueError(
            f"{np.sum(back != values)} of {values.size} entries of {prefix!r} are not values of the "
            f"codebook {codebook.name} times the scale; pack the result of decompose unchanged."
        )
    return arrays


def decode(arrays: Mapping[str, jax.Array], prefix: str, codebook: Codebook) -> jax.Array:
    """Index arrays -> codebook values (rows, columns), without scale. For use under jit."""
    index = jnp.asarray(arrays[f"{prefix}_index"])
    rows = index.shape[:-1]
    if not isinstance(codebook, LatticeCodebook):
        bits = (index[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1  # (rows, bytes, 8)
        fields = bits.reshape(*rows, -1, codebook.bits).astype(jnp.int32)  # (rows, columns, bits)
        return codebook.decode(jnp.sum(fields << jnp.arange(codebook.bits), axis=-1))
    if codebook.residual is None:
        return codebook.decode(index.astype(jnp.int32)).reshape(*rows, -1)
    residual = jnp.asarray(arrays[f"{prefix}_residual"]).astype(jnp.uint32)
    return codebook.decode(index.astype(jnp.uint32) << 16 | residual).reshape(*rows, -1)


def scaled(values: jax.Array, scale: jax.Array) -> jax.Array:
    """values (m, n) times scale () or (m, groups)."""
    if jnp.ndim(scale) == 0:
        return values * scale
    return values * jnp.repeat(scale, values.shape[-1] // scale.shape[-1], axis=-1)


@functools.partial(jax.jit, static_argnames=("prefix", "codebook"))
def _decode_scaled(arrays, prefix: str, scale: jax.Array, codebook: Codebook) -> jax.Array:
    return scaled(decode(arrays, prefix, codebook), scale)


def pack_signs(signs: jax.Array) -> np.ndarray:
    """(n,) of +-1 -> bits, set where -1, the first in the lowest bit."""
    return np.packbits(np.asarray(signs) < 0, bitorder="little")


def unpack_signs(packed: jax.Array, n: int) -> jax.Array:
    """Bits -> (n,) float32 of +-1. For use under jit."""
    bits = (jnp.asarray(packed)[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return 1 - 2 * bits.reshape(-1)[:n].astype(jnp.float32)


# --- Whole matrices ---------------------------------------------------------------------------------------------------


def pack(d: Decomposition) -> dict[str, np.ndarray]:
    """The arrays of one matrix, by suffix.

    Raises:
      ValueError: values off their codebook, or 16-bit factors that float16 does not hold exactly.
    """
    config = d.config
    arrays = encode("q", d.q, d.q_scale, config.codebook) | {"q_scale": np.asarray(d.q_scale, np.float32)}
    if config.factor_codebook is None:
        for name, factor in (("left", d.left), ("right", d.right)):
            arrays[name] = np.asarray(factor).astype(np.float16)
            if not np.array_equal(arrays[name].astype(np.float32), np.asarray(factor)):
                raise ValueError(
                    f"the factor {name!r} {factor.shape} holds values that float16 does not; round it before packing."
                )
    else:
        left = d.left.T if config.published else d.left  # the published code rounds blocks down the columns of L
        arrays |= encode("left", left, d.left_scale, config.factor_codebook)
        arrays |= encode("right", d.right, d.right_scale, config.factor_codebook)
        arrays |= {name: np.asarray(getattr(d, name), np.float32) for name in ("left_scale", "right_scale")}
    arrays["weight_scale"] = np.asarray(d.weight_scale, np.float32)
    if config.rotates_factors:
        arrays |= {name: pack_signs(getattr(d, name)) for name in ("signs_out", "signs_in")}
    return arrays


def unpack(arrays: Mapping[str, np.ndarray], config: DecomposeConfig, shape: tuple[int, int]) -> Decomposition:
    """The decomposition that was packed; what the arrays do not hold (errors, roles) is NaN.

    Raises:
      ValueError: one error with everything that is missing, extra, misshapen or out of range.
    """
    check_arrays(arrays, config, shape)
    m, n = shape
    one, unknown = jnp.ones((), jnp.float32), jnp.full((), jnp.nan)
    q_scale = jnp.asarray(arrays["q_scale"])
    if config.factor_codebook is None:
        left, right = (jnp.asarray(arrays[name], jnp.float32) for name in ("left", "right"))
        left_scale = right_scale = one
    else:
        left_scale, right_scale = (jnp.asarray(arrays[name]) for name in ("left_scale", "right_scale"))
        left = _decode_scaled(arrays, "left", left_scale, config.factor_codebook)
        left = left.T if config.published else left
        right = _decode_scaled(arrays, "right", right_scale, config.factor_codebook)
    signs_out, signs_in = jnp.ones((m,)), jnp.ones((n,))
    if config.rotates_factors:
        signs_out, signs_in = unpack_signs(arrays["signs_out"], m), unpack_signs(arrays["signs_in"], n)
    return Decomposition(
        q=_decode_scaled(arrays, "q", q_scale, config.codebook),
        left=left,
        right=right,
        q_scale=q_scale,
        left_scale=left_scale,
        right_scale=right_scale,
        weight_scale=jnp.asarray(arrays["weight_scale"]),
        signs_out=signs_out,
        signs_in=signs_in,
        error=unknown,
        errors=unknown,
        errors_after_q=unknown,
        q_scales=unknown,
        q_role=unknown,
        lr_role=unknown,
        start=jnp.zeros((), jnp.int32),
        config=config,
    )


def check_arrays(arrays: Mapping[str, np.ndarray], config: DecomposeConfig, shape: tuple[int, int]) -> None:
    """One ValueError with everything in the arrays of an (m, n) matrix that does not fit."""
    specs = tensor_specs(shape, config)
    problems = [f"missing: {name} {spec.shape}" for name, spec in specs.items() if name not in arrays]
    problems += [f"extra: {name} {arrays[name].shape}" for name in arrays if name not in specs]
    for name, spec in specs.items():
        if name not in arrays:
            continue
        if arrays[name].shape != spec.shape:
            problems.append(f"misshapen: {name} is {arrays[name].shape}, needed {spec.shape}")
        elif problem := value_problem(name, np.asarray(arrays[name]), spec):
            problems.append(problem)
    if problems:
        raise ValueError(f"the packed arrays do not make an {shape} matrix:\n  " + "\n  ".join(problems))


def value_problem(name: str, array: np.ndarray, spec: TensorSpec) -> str | None:
    """What is wrong with the numbers of one packed array, if anything is.

    Every word of the right width is a point of its codebook, so that an index can be out of range only in a wider
    dtype. Factors may be float32: they are while they are trained.
    """
    if spec.dtype.kind == "f":
        if array.dtype not in (np.float16, np.float32) or array.dtype.itemsize < spec.dtype.itemsize:
            return f"{name} is {array.dtype}, needed {spec.dtype}"
        if not np.isfinite(array).all():
            return f"{name} holds a value that is not finite"
        if name.endswith("_scale") and (array <= 0).any():
            return f"{name} holds {array.min()}; a scale is above zero"
        return None
    if array.dtype == spec.dtype:
        return None
    limit = np.iinfo(spec.dtype).max
    if array.dtype.kind in "iu" and array.size and (array.min() < 0 or array.max() > limit):
        worst = array.min() if array.min() < 0 else array.max()
        return f"{name} holds the index {worst}, out of the codebook's 0 to {limit}"
    return f"{name} is {array.dtype}, needed {spec.dtype}"
