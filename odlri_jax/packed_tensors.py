"""The arrays of one packed matrix: names, shapes, dtypes, and so its size in bits (`docs/packed_format.md`).

`tensor_specs` is the one table of them: packing, the checks on what is read, the size of a packed matrix and the
variables of `linear.CompressedLinear` all follow it.
"""

import dataclasses
import math

import numpy as np

from odlri_jax.codebooks import BLOCK, Codebook, LatticeCodebook
from odlri_jax.decompose_config import DecomposeConfig

RESIDUAL_DTYPES = {"e8": np.uint8, "e8p": np.uint16}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One packed array: shape, dtype, and what its axes stand for ("out", "in", "rank", None)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]


def _index_specs(prefix: str, codebook: Codebook, shape: tuple[int, int], axes: tuple[str, str]) -> dict:
    rows, columns = shape
    if isinstance(codebook, LatticeCodebook):
        specs = {"index": ((rows, columns // BLOCK), np.uint16)}
        if codebook.residual is not None:
            specs["residual"] = ((rows, columns // BLOCK), RESIDUAL_DTYPES[codebook.residual])
    else:
        specs = {"index": ((rows, columns * codebook.bits // 8), np.uint8)}
    return {f"{prefix}_{name}": TensorSpec(size, np.dtype(dtype), axes) for name, (size, dtype) in specs.items()}


def tensor_specs(shape: tuple[int, int], config: DecomposeConfig) -> dict[str, TensorSpec]:
    """Suffix -> what the packed form of an (m, n) matrix holds under that name."""
    (m, n), rank = shape, config.rank
    scalar = TensorSpec((), np.dtype(np.float32), ())
    specs = _index_specs("q", config.codebook, (m, n), ("out", "in"))
    if isinstance(config.codebook, LatticeCodebook):
        specs["q_scale"] = scalar
    else:
        specs["q_scale"] = TensorSpec((m, n // config.group), np.dtype(np.float32), ("out", None))
    if config.factor_codebook is None:
        specs["left"] = TensorSpec((m, rank), np.dtype(np.float16), ("out", "rank"))
        specs["right"] = TensorSpec((rank, n), np.dtype(np.float16), ("rank", "in"))
    else:
        left = ((rank, m), ("rank", "out")) if config.published else ((m, rank), ("out", "rank"))
        specs |= _index_specs("left", config.factor_codebook, *left)
        specs |= _index_specs("right", config.factor_codebook, (rank, n), ("rank", "in"))
        specs |= {"left_scale": scalar, "right_scale": scalar}
    specs["weight_scale"] = scalar
    if config.rotates_factors:
        specs["signs_out"] = TensorSpec((-(-m // 8),), np.dtype(np.uint8), (None,))
        specs["signs_in"] = TensorSpec((-(-n // 8),), np.dtype(np.uint8), (None,))
    return specs


def matrix_bits(shape: tuple[int, int], config: DecomposeConfig) -> float:
    """Bits per weight of a packed (m, n) matrix, scales and signs included."""
    num_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in tensor_specs(shape, config).values())
    return 8 * num_bytes / math.prod(shape)
