"""Cholesky factors for the chip the program is traced for: LAPACK's on a CPU, a loop over panels on a TPU.

The TPU compiler writes `jnp.linalg.cholesky` out panel by panel: at n = 12288 that is 96 pieces of program, which took
more than a quarter of an hour to compile without an end. The loop is one piece whatever n is. Each panel is computed
from the panels before it (left-looking), on arrays of full height so that all trips are alike: n^3 multiply-adds
where n^3 / 6 would do, which is little beside the sweeps that follow a factorisation.
"""

import jax
import jax.numpy as jnp

from a2d_jax.sharding import is_for_tpu
from odlri_jax.matmul import matmul

MAX_PANEL = 128


def by_panels(h: jax.Array) -> jax.Array:
    """The lower factor of H (n, n) float32; NaN where H is not definite."""
    n = len(h)
    width = next(width for width in range(min(MAX_PANEL, n), 0, -1) if n % width == 0)
    identity = jnp.eye(width, dtype=h.dtype)

    def add_panel(index: jax.Array, lower: jax.Array) -> jax.Array:
        start = index * width
        rows = jax.lax.dynamic_slice_in_dim(lower, start, width)  # (width, n), of the panels before
        panel = jax.lax.dynamic_slice_in_dim(h, start, width, axis=1)  # (n, width)
        panel = panel - matmul(lower, rows.T)
        root = jnp.linalg.cholesky(jax.lax.dynamic_slice_in_dim(panel, start, width))
        inverse = jax.scipy.linalg.solve_triangular(root, identity, lower=True)
        below = matmul(panel, inverse.T)  # (n, width)
        panel = jnp.where(jnp.arange(n)[:, None] >= start + width, below, 0)
        panel = jax.lax.dynamic_update_slice_in_dim(panel, root, start, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(lower, panel, start, axis=1)

    return jax.lax.fori_loop(0, n // width, add_panel, jnp.zeros_like(h))


def cholesky(h: jax.Array) -> jax.Array:
    """The lower Cholesky factor of H (n, n); NaN where H is not definite."""
    return by_panels(h) if is_for_tpu() and len(h) > MAX_PANEL else jnp.linalg.cholesky(h)
