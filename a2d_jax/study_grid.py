"""The grids of a study's report: values by model, measure and seed, as a table and as a map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from a2d_jax.plots import plt, save_figure


class Grid(NamedTuple):
    """Values of a part, the longer side down: (rows, columns, seeds)."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray

    @classmethod
    def of(cls, part: Any, records: Sequence[Mapping[str, Any]]) -> "Grid":
        """The values of `records` at the models and measures of a part (`study_config.Part`)."""
        cell = {(r["model"], r["measure"], r["seed"]): r["value"] for r in records}
        seeds = sorted({r["seed"] for r in records})
        values = np.array(
            [[[cell[model, name, seed] for seed in seeds] for name in part.measures] for model in part.models]
        )
        if len(part.models) >= len(part.measures):
            return cls(part.models, part.measures, values)
        return cls(part.measures, part.models, values.swapaxes(0, 1))


def grid_markdown(grid: Grid) -> str:
    """In each cell the mean over the seeds in per cent, and its range where seeds differ."""
    lines = ["| | " + " | ".join(grid.columns) + " |", "|---" * (len(grid.columns) + 1) + "|"]
    for name, row in zip(grid.rows, 100 * grid.values, strict=True):
        cells = [
            f"{cell.mean():.1f}" + (f" ({cell.min():.0f}-{cell.max():.0f})" if np.ptp(cell) else "") for cell in row
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_grid(path: Path, title: str, grid: Grid) -> None:
    """The means as a map."""
    mean = 100 * grid.values.mean(-1)  # (rows, columns)
    figure, axes = plt.subplots(figsize=(3.2 + 0.62 * len(grid.columns), 1.8 + 0.3 * len(grid.rows)))
    axes.imshow(mean, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(mean):
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "black", fontsize=8)
    axes.set_xticks(range(len(grid.columns)), grid.columns, rotation=50, ha="right", fontsize=8)
    axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=8)
    axes.set_title(f"{title}, %", fontsize=10)
    save_figure(path, figure, dpi=130)
