"""The report of a compression: one record a matrix, sums over all of them, and a plot of the errors by layer."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2d_jax.files import write_json
from a2d_jax.plots import plt, save_figure
from odlri_jax.decomposition import Decomposition
from odlri_jax.packed_tensors import matrix_bits

REPORT_NAME, PLOT_NAME = "report.json", "report.png"


def matrix_record(
    name: str, projection: str, layer: int | None, shape: tuple[int, int], d: Decomposition, seconds: float
) -> dict[str, Any]:
    """What report.json says of one matrix.

    error is that of the kept iterate, in the metric of the damped H; errors follow the low-rank step of each iteration,
    errors_after_q the rounding of Q before it. q_role, lr_role: |Q X| / |W X|, |L R X| / |W X|. init and num_outliers
    name the start taken.
    """
    start, num_outliers = d.init
    lists = {key: [float(x) for x in getattr(d, key)] for key in ("errors", "errors_after_q", "q_scales")}
    return {
        "name": name,
        "projection": projection,
        "layer": layer,
        "shape": list(shape),
        "rank": d.config.rank,
        "init": start,
        "num_outliers": num_outliers,
        "error": float(d.error),
        **lists,
        "q_role": float(d.q_role),
        "lr_role": float(d.lr_role),
        "bits_per_weight": matrix_bits(shape, d.config),
        "seconds": round(seconds, 3),
    }


def summary(records: Sequence[Mapping[str, Any]], num_file_bytes: int) -> dict[str, float]:
    """Mean error, bits per weight over all weights (by formula, and by the size of the files), and seconds."""
    num_weights = [record["shape"][0] * record["shape"][1] for record in records]
    bits = np.average([record["bits_per_weight"] for record in records], weights=num_weights)
    return {
        "num_matrices": len(records),
        "num_weights": sum(num_weights),
        "mean_error": float(np.mean([record["error"] for record in records])),
        "bits_per_weight": float(bits),
        "file_bits_per_weight": 8 * num_file_bytes / sum(num_weights),
        "seconds": round(sum(record["seconds"] for record in records), 3),
    }


def write_report(
    folder: str | os.PathLike,
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    files: Sequence[Path],
) -> dict[str, Any]:
    """Writes report.json and report.png of the matrices that lie packed in `files`, and returns the report."""
    num_file_bytes = sum(file.stat().st_size for file in files)
    report = {"settings": dict(settings), "summary": summary(records, num_file_bytes), "matrices": list(records)}
    write_json(Path(folder) / REPORT_NAME, report)
    plot_errors(Path(folder) / PLOT_NAME, records)
    return report


def plot_errors(path: str | os.PathLike, records: Sequence[Mapping[str, Any]]) -> None:
    """Relative error of every matrix: a line for each kind, over the layers; the head stands behind the last."""
    figure, axes = plt.subplots(figsize=(9, 5))
    num_layers = 1 + max((record["layer"] for record in records if record["layer"] is not None), default=-1)
    for projection in dict.fromkeys(record["projection"] for record in records):
        of_kind = [record for record in records if record["projection"] == projection]
        layers = [num_layers if record["layer"] is None else record["layer"] for record in of_kind]
        axes.plot(layers, [record["error"] for record in of_kind], marker="o", markersize=3, label=projection)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error, damped H")
    axes.set_ylim(bottom=0)
    axes.legend(ncols=4, fontsize="small")
    save_figure(path, figure)
