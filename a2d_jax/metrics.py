"""Numbers of a training run: `metrics.jsonl` (one object a step) and TensorBoard files, both continued on resume.

Objects of a store (gs://) cannot be appended to: there the files grow in a temporary folder, and are copied whole each
time that numbers are written.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

from a2d_jax.files import as_path, is_remote, write_beside

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics file; a last line that was cut off by a kill is left out."""
    lines = []
    for line in as_path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


@contextlib.contextmanager
def local_folder(folder: str | os.PathLike):
    """(folder to write in, function that brings it to `folder`): itself and nothing to do, or for an object store a
    temporary one, brought there a last time at the end."""
    target = as_path(folder)
    if not is_remote(target):
        yield Path(target), lambda: None
        return
    with tempfile.TemporaryDirectory() as temporary:

        def bring() -> None:
            for file in Path(temporary).rglob("*"):
                if file.is_file():
                    (target / file.relative_to(temporary).as_posix()).write_bytes(file.read_bytes())

        yield Path(temporary), bring
        bring()


class MetricWriter:
    """Appends to a run's numbers. What lies beyond `step` is dropped first, so each step appears once.

    One host writes; `is_silent` is for the others.
    """

    def __init__(self, workdir: str | os.PathLike, step: int, is_silent: bool = False):
        self._is_silent = is_silent
        if is_silent:
            return
        self._folder = contextlib.ExitStack()
        folder, self._bring = self._folder.enter_context(local_folder(workdir))
        before = as_path(workdir) / METRICS_NAME
        if before.exists():
            kept = "".join(json.dumps(line) + "\n" for line in read_metrics(before) if line["step"] <= step)
            write_beside(folder / METRICS_NAME, lambda file: file.write(kept.encode()))
        self._file = open(folder / METRICS_NAME, "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=step + 1)

    def write(self, lines: Sequence[Mapping[str, float]]) -> None:
        """One object a step, flushed; each has the key "step"."""
        if self._is_silent:
            return
        for line in lines:
            self._file.write(json.dumps(dict(line)) + "\n")
            for name, value in line.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, line["step"])
        self._file.flush()
        self._tensorboard.flush()
        self._bring()

    def close(self) -> None:
        if self._is_silent:
            return
        self._file.close()
        self._tensorboard.close()
        self._folder.close()
