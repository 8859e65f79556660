"""Which weights a checkpoint holds, told without loading a model: results notice that they have changed."""

import hashlib
import os
from pathlib import Path

from a2d_jax.checkpoint import CHECKPOINTS_FOLDER, complete_steps
from a2d_jax.files import as_path
from a2d_jax.folders import HF_FOLDER, is_training_folder
from a2d_jax.peft_io import WEIGHTS_NAME as ADAPTER_NAME
from a2d_jax.safetensors_io import SafetensorsFolder

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


def of_step(step: int) -> str:
    """`stored_weights` of a training folder whose newest step this is."""
    return f"step {step}"


def stored_weights(folder: str | os.PathLike, adapter: str | os.PathLike | None = None) -> str | None:
    """What tells the weights of a folder, and of a PEFT folder beside it, from later ones in the same place.

    `fingerprint` of a folder of safetensors, the newest step of one of `train`; None for one of `convert`, where no
    number can be read without the rest.
    """
    if is_training_folder(folder):
        steps = complete_steps(as_path(folder) / CHECKPOINTS_FOLDER)
        stored = of_step(max(steps, default=0))
    else:
        stored = None if (Path(folder) / HF_FOLDER).is_dir() else fingerprint(SafetensorsFolder(folder))
    if adapter is None or not (path := Path(adapter) / ADAPTER_NAME).is_file():  # loading says what is missing
        return stored
    with open(path, "rb") as file:
        return f"{stored} with {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
