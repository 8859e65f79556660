"""What a folder was begun with, against what is asked for now: each program that resumes words its own refusal."""

from collections.abc import Iterable, Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """'name: this then, that now; ...' for each of `names` that differs, one that is absent being None; '' if none."""
    changed = [name for name in names if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in changed)
