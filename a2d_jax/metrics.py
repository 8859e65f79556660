"""Numbers of a training run: `metrics.jsonl` (one object a step) and TensorBoard files, both continued on resume."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

from a2d_jax.hf_io import write_beside

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics file; a last line that was cut off by a kill is left out."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricWriter:
    """Appends to a run's numbers. What lies beyond `step` is dropped first, so each step appears once.

    One host writes; `is_silent` is for the others.
    """

    def __init__(self, workdir: str | os.PathLike, step: int, is_silent: bool = False):
        self._is_silent = is_silent
        if is_silent:
            return
        path = Path(workdir) / METRICS_NAME
        if path.exists():
            kept = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step)
            write_beside(path, lambda file: file.write(kept.encode()))
        self._file = open(path, "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(Path(workdir) / TENSORBOARD_FOLDER), purge_step=step + 1)

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

    def close(self) -> None:
        if self._is_silent:
            return
        self._file.close()
        self._tensorboard.close()
