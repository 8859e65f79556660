"""Figures of programs: pyplot without a display, and pictures that appear whole or not at all."""

import os

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from a2d_jax.files import write_beside

matplotlib.use("Agg")  # draws into files alone: machines that run programs have no display

__all__ = ["plt", "save_figure"]


def save_figure(path: str | os.PathLike, figure: Figure, dpi: int = 120) -> None:
    """Lays the figure out, writes it as PNG and closes it."""
    figure.tight_layout()
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
    plt.close(figure)
