"""Folders that are continued: what one was begun with, against what is asked for now, and who is at work in it.

Each program that resumes words its own refusal.
"""

import contextlib
import fcntl
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """'name: this then, that now; ...' for each of `names` that differs, one that is absent being None; '' if none."""
    changed = [name for name in names if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in changed)


@contextlib.contextmanager
def held(path: Path, waits: bool = True) -> Iterator[bool]:
    """Keeps other processes that ask out of `path` meanwhile (PATH.lock, freed when the process ends, however it does).

    Yields whether it is ours: False where another has it and `waits` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
