"""Files of JSON lines that grow while a program runs, and survive its being killed."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from a2d_jax.files import write_beside


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds one line each and waits until they are on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, key: str, what: str) -> dict[Any, dict[str, Any]]:
    """Records by what they hold under `key`. A last line that a stopped run left unfinished is taken out of the file.

    Args:
      what: name of a record, for the message of the ValueError about a line that is none.
    """
    if not path.is_file():
        return {}
    *lines, rest = path.read_bytes().split(b"\n")
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record[key]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no {what} ({error!r}); remove the file or folder") from error
    if rest:
        write_beside(path, lambda file: file.writelines(line + b"\n" for line in lines))
    return records
