"""Paths, and files that appear whole or not at all.

Training folders may lie in an object store (gs://BUCKET/...); everything else is written to local folders.
"""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from etils import epath


def as_path(path: str | os.PathLike) -> epath.Path:
    """The path, absolute; also one of an object store (gs://BUCKET/...), which `pathlib` would mangle."""
    path = epath.Path(path)
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def local_path(path: str | os.PathLike) -> Path:
    """The path; ValueError for one of an object store, where nothing but training folders is written."""
    local = Path(path)
    if local.parts and local.parts[0].endswith(":"):  # also where `pathlib` has made gs:/BUCKET of gs://BUCKET
        raise ValueError(
            f"{os.fspath(path)} lies in an object store, where only training folders may lie; write to a local folder "
            "and copy that: gcloud storage cp --recursive."
        )
    return local


def write_beside(path: str | os.PathLike, write: Callable) -> None:
    """Calls `write(file)` on a new file beside `path`, then renames it: a full disk never leaves half a file.

    In an object store the file is written at once: it appears whole or not at all.
    """
    if is_remote(path):
        buffer = io.BytesIO()
        write(buffer)
        epath.Path(path).write_bytes(buffer.getvalue())
        return
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Indented JSON, written beside and renamed."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_beside(path, lambda file: file.write(text.encode()))
