"""safetensors files: the tensors of a folder, read lazily, and a file written tensor by tensor.

A folder holds one file, or shards with an index. Writing streams: the header is computed from the shapes, and tensors
follow one by one into a file beside the target, which is renamed when it is complete. Equal tensors give equal bytes.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from a2d_jax.files import write_beside

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_), "I8": np.dtype(np.int8), "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16), "U32": np.dtype(np.uint32),
}  # fmt: skip
_DTYPE_CODES = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
# The library lays tensors out by falling alignment, then name; equal files need its order.
_LAYOUT_ORDER = ("I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")


def read_index(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(tensor name -> file name, metadata) of a sharded checkpoint's index; both empty where the folder has none.

    Raises:
      ValueError: a damaged index, or a file name that leads out of the folder: files are written under these names too.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return {}, {}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map, metadata = dict(content["weight_map"]), dict(content.get("metadata") or {})
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is not a safetensors index with a weight_map ({error!r}).") from error
    for file in weight_map.values():
        # By name alone: in the Hugging Face cache every file is itself a link out of the folder.
        if not isinstance(file, str) or os.path.isabs(file) or os.path.normpath(file).split(os.sep)[0] == "..":
            raise ValueError(f"{folder} refers to {file!r}, a path outside the folder; correct the index file.")
    return weight_map, metadata


class SafetensorsFolder:
    """Names, shapes, number formats and lazily read data of all tensors in a folder's safetensors files."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype | None] = {}  # None: a format that is not known here
        self.file_of: dict[str, Path] = {}
        self.weight_map, _ = read_index(self.folder)
        for path, wanted in self._files().items():
            try:
                with safe_open(path, framework="np") as file:
                    here = list(file.keys())
                    for name in here:
                        tensor = file.get_slice(name)
                        self.shapes[name] = tuple(tensor.get_shape())
                        self.dtypes[name] = _SAFETENSORS_DTYPES.get(tensor.get_dtype())
                        self.file_of[name] = path
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} cannot be read as safetensors ({error}); the file is "
                    "truncated, damaged or absent: copy it again."
                ) from error
            lost = sorted(set(wanted) - set(here))
            if lost:
                raise ValueError(f"{self.folder / INDEX_NAME} places {lost} in {path.name}, which does not hold them.")

    def _files(self) -> dict[Path, list[str]]:
        """Files of the checkpoint, each with the tensors its index expects there."""
        if self.weight_map:
            files: dict[Path, list[str]] = {}
            for name, file in self.weight_map.items():
                files.setdefault(self.folder / file, []).append(name)
            return files
        if (self.folder / WEIGHTS_NAME).is_file():
            return {self.folder / WEIGHTS_NAME: []}
        raise ValueError(
            f"{self.folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; give a folder with safetensors weights "
            "(pickled .bin files are never read: convert them with their own library first)."
        )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it that `index` selects. The file is mapped only for the call."""
        with safe_open(self.file_of[name], framework="np") as file:
            return file.get_slice(name)[index] if index else file.get_tensor(name)


def write_safetensors(
    path: str | os.PathLike,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file tensor by tensor; the same bytes as the library's `save_file`.

    Args:
      shapes: name -> (shape, dtype) of each tensor.
      read: called once per name, in file order; only its last result is held.
      metadata: strings for the header; {"format": "pt"} is what transformers and PEFT write.
    """
    names = sorted(shapes, key=lambda name: (_LAYOUT_ORDER.index(_DTYPE_CODES[np.dtype(shapes[name][1])]), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        shape, dtype = shapes[name]
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _DTYPE_CODES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(file) -> None:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            tensor, (shape, dtype) = np.asarray(read(name), order="C"), shapes[name]
            assert tensor.shape == tuple(shape) and tensor.dtype == dtype, (name, tensor.shape, tensor.dtype)
            file.write(tensor.reshape(-1).view(np.uint8).data)

    write_beside(path, write)
