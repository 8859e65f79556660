"""Growth of a time with sizes: one row of timings for each size, a power law fitted to each, and their picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2d_jax.plots import plt, save_figure


def measure_growth(
    seconds_of: Callable[..., float], sizes: Mapping[str, Sequence[int]], fixed: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Seconds over each row of sizes, the others at their fixed value, and c x^p by least squares of logarithms."""
    rows = {}
    for name, row in sizes.items():
        seconds = []
        for size in row:
            seconds.append(seconds_of(**{**fixed, name: size}))
            print(f"{name} = {size}: {seconds[-1]:.4f} s", flush=True)
        p, log_c = np.polyfit(np.log(row), np.log(seconds), 1)
        rows[name] = {"sizes": list(row), "seconds": seconds, "c": float(np.exp(log_c)), "p": float(p)}
    return rows


def plot_growth(path: Path, rows: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, int], what: str) -> None:
    """A panel a row: timings and fit; `what` is the unit of time."""
    figure, panels = plt.subplots(1, len(rows), figsize=(4 * len(rows), 3.5), sharey=True)
    for axes, (name, row) in zip(panels, rows.items(), strict=True):
        sizes = np.array(row["sizes"], np.float64)
        axes.loglog(sizes, row["seconds"], "o")
        axes.loglog(sizes, row["c"] * sizes ** row["p"], linewidth=1, label=f"{name}^{row['p']:.2f}")
        axes.set_xticks(sizes, [str(size) for size in row["sizes"]], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(name + "; " + ", ".join(f"{key} = {value}" for key, value in fixed.items() if key != name))
        axes.legend()
    panels[0].set_ylabel(what)
    save_figure(path, figure)
