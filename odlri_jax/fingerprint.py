"""Which weights a checkpoint folder holds, told from a few numbers of every tensor, without loading a model."""

import hashlib
import os
from pathlib import Path

from a2d_jax.folders import HF_FOLDER
from a2d_jax.hf_io import SafetensorsFolder

NUM_NUMBERS = 64  # of each tensor


def fingerprint(source: SafetensorsFolder) -> str:
    """Hash of name, shape, dtype and first numbers of every tensor: another checkpoint has another."""
    digest = hashlib.sha256()
    for name, shape in sorted(source.shapes.items()):
        limits = [1] * (len(shape) - 1) + [NUM_NUMBERS]
        first = tuple(slice(0, min(limit, size)) for limit, size in zip(limits, shape, strict=False))  # () of a scalar
        numbers = source.read(name, first)
        digest.update(f"{name} {shape} {numbers.dtype} ".encode() + numbers.tobytes())
    return digest.hexdigest()[:16]


def stored_weights(folder: str | os.PathLike) -> str | None:
    """`fingerprint` of a folder of safetensors; None for one of `convert` or `train`, which holds none."""
    return None if (Path(folder) / HF_FOLDER).is_dir() else fingerprint(SafetensorsFolder(folder))
