"""LDLQ: rounding of W to a codebook with error feedback in the metric of H, block by block, then refinement sweeps.

    minimise tr((W - Q) H (W - Q)^T),   H = L D L^T (blocks of 8),   Q_k = round(W_k + (W - Q)_{later} L_{later, k})

(QuIP#, arXiv 2402.04396, section 4.1.) The columns go from the last block to the first, in panels: one large product
brings the feedback of all finished panels, small ones the feedback within the panel. A sweep then revisits every block
with all others fixed: Q_k <- round(Q_k + (W - Q) H_{:, k} H_kk^{-1}). The nearest point in the plain metric can be a
worse one in that of H; rows are independent, so a row takes its new block only where its own error falls.

W (m, n), H (n, n). Everything is float32, products at the highest precision: the ridge that `damp` adds keeps the
condition number near n / ridge.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from a2d_jax.sharding import is_for_tpu
from odlri_jax import loop_linalg
from odlri_jax.cholesky import cholesky
from odlri_jax.codebooks import BLOCK, Codebook
from odlri_jax.matmul import matmul

MAX_PANEL = 128
MAX_CHUNKS, MIN_CHUNK = 4, 64  # of the rows in a sweep
MIN_SCALE = 1e-30  # the unit where all is zero: it can be divided by, and what it multiplies is as good as zero


class Factors(NamedTuple):
    """What rounding needs of a damped H.

    Attributes:
      h: (n, n) damped H.
      lower: (n, n) L of the block LDL, identity in the diagonal blocks.
      inverse: (n / 8, 8, 8) inverses of the diagonal blocks of H.
    """

    h: jax.Array
    lower: jax.Array
    inverse: jax.Array


def damp(h: jax.Array, ridge: float) -> jax.Array:
    """H / mean(diag H) + ridge I."""
    return h / jnp.mean(jnp.diagonal(h)) + ridge * jnp.eye(h.shape[-1], dtype=h.dtype)


def _diagonal_blocks(matrix: jax.Array) -> jax.Array:
    """(n, n) -> (n / 8, 8, 8)."""
    n = matrix.shape[-1]
    width = panel_width(n)
    index = jnp.arange(width // BLOCK)

    def of_panel(start: jax.Array) -> jax.Array:  # the whole matrix in blocks of 8 would take a TPU 16 times its size
        panel = jax.lax.dynamic_slice(matrix, (start, start), (width, width))
        return panel.reshape(len(index), BLOCK, len(index), BLOCK)[index, :, index]

    return jax.lax.map(of_panel, jnp.arange(0, n, width)).reshape(n // BLOCK, BLOCK, BLOCK)


def block_ldl(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H = L blockdiag(D) L^T: L (n, n) with identity diagonal blocks, D (n / 8, 8, 8). NaN where H is not definite."""
    n = h.shape[-1]
    root = cholesky(h)  # (n, n)
    blocks = _diagonal_blocks(root)
    if is_for_tpu():
        return _times_blocks(root, loop_linalg.block_inverse(blocks)), matmul(blocks, blocks.transpose(0, 2, 1))
    inverse = jax.vmap(lambda c: jax.scipy.linalg.solve_triangular(c, jnp.eye(BLOCK, dtype=c.dtype), lower=True))(
        blocks
    )
    columns = root.reshape(n, n // BLOCK, BLOCK)
    lower = jnp.einsum("nkb,kbc->nkc", columns, inverse, precision=jax.lax.Precision.HIGHEST)
    return lower.reshape(n, n), matmul(blocks, blocks.transpose(0, 2, 1))


def _times_blocks(matrix: jax.Array, blocks: jax.Array) -> jax.Array:
    """Matrix (n, n) times blockdiag(blocks (n / 8, 8, 8)), panel by panel."""
    n = matrix.shape[-1]
    width = panel_width(n)
    panels = blocks.reshape(n // width, width // BLOCK, BLOCK, BLOCK)
    is_diagonal = jnp.eye(width // BLOCK, dtype=matrix.dtype)[:, None, :, None]

    def set_panel(step: jax.Array, product: jax.Array) -> jax.Array:
        factor = (panels[step][:, :, None, :] * is_diagonal).reshape(width, width)
        return _set_columns(product, matmul(_columns(matrix, step * width, width), factor), step * width)

    return jax.lax.fori_loop(0, n // width, set_panel, jnp.zeros_like(matrix))


def factorise(h: jax.Array) -> Factors:
    """Factors of a damped H."""
    inverse = loop_linalg.block_inverse if is_for_tpu() else jnp.linalg.inv
    return Factors(h, block_ldl(h)[0], inverse(_diagonal_blocks(h)))


def row_errors(error: jax.Array, h: jax.Array) -> jax.Array:
    """e H e^T of each row of E (m, n). -> (m,)"""
    return jnp.sum(matmul(error, h) * error, axis=-1)


def weighted_error(error: jax.Array, h: jax.Array) -> jax.Array:
    """tr(E H E^T) for E (m, n)."""
    return jnp.sum(row_errors(error, h))


def panel_width(n: int) -> int:
    """Largest multiple of 8 up to 128 that divides n."""
    return next(width for width in range(MAX_PANEL, 0, -BLOCK) if n % width == 0)


def _round_block(x: jax.Array, scale: jax.Array, codebook: Codebook) -> jax.Array:
    """Nearest codebook values to x (m, 8), in units of scale (m or 1, 1)."""
    return codebook.nearest(x / scale) * scale


def _columns(x: jax.Array, start: jax.Array, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1)


def _set_columns(x: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, update, start, axis=-1)


def feedback_pass(w: jax.Array, lower: jax.Array, scale: jax.Array, codebook: Codebook) -> jax.Array:
    """Rounds W (m, n) from the last block to the first, in units of `scale` (m or 1, n / 8). -> Q (m, n)."""
    n = w.shape[-1]
    width = panel_width(n)

    def panel_step(step, carry):
        q, error = carry  # (m, n) both; the error is zero in the columns still to come
        start = n - (step + 1) * width
        exact = _columns(w, start, width)
        target = exact + matmul(error, _columns(lower, start, width))  # (m, width)
        inner = jax.lax.dynamic_slice(lower, (start, start), (width, width))

        def block_step(j, carry):
            q, error = carry  # (m, width)
            at = width - (j + 1) * BLOCK
            x = _columns(target, at, BLOCK) + matmul(error, _columns(inner, at, BLOCK))  # (m, 8)
            rounded = _round_block(x, _columns(scale, (start + at) // BLOCK, 1), codebook)
            return _set_columns(q, rounded, at), _set_columns(error, _columns(exact, at, BLOCK) - rounded, at)

        panel_q, panel_error = jax.lax.fori_loop(
            0, width // BLOCK, block_step, (jnp.zeros_like(exact), jnp.zeros_like(exact))
        )
        return _set_columns(q, panel_q, start), _set_columns(error, panel_error, start)

    return jax.lax.fori_loop(0, n // width, panel_step, (jnp.zeros_like(w), jnp.zeros_like(w)))[0]


def _sweep(w: jax.Array, q: jax.Array, factors: Factors, scale: jax.Array, codebook: Codebook, accept_always):
    """One sweep over all blocks of Q (m, n), the last first. -> Q"""
    n = w.shape[-1]
    width = panel_width(n)
    h, _, inverse = factors

    def panel_step(step, carry):
        q, error = carry  # (m, n) both
        start = n - (step + 1) * width
        gradient = matmul(error, _columns(h, start, width))  # (m, width)
        inner = jax.lax.dynamic_slice(h, (start, start), (width, width))

        def block_step(j, carry):
            q, gradient = carry  # (m, width) both
            at = width - (j + 1) * BLOCK
            block = (start + at) // BLOCK
            here, slope = _columns(q, at, BLOCK), _columns(gradient, at, BLOCK)  # (m, 8)
            rows = jax.lax.dynamic_slice_in_dim(inner, at, BLOCK, axis=0)  # (8, width)
            rounded = _round_block(here + matmul(slope, inverse[block]), _columns(scale, block, 1), codebook)
            change = rounded - here
            rise = jnp.sum(change * (matmul(change, _columns(rows, at, BLOCK)) - 2 * slope), axis=-1, keepdims=True)
            rounded = jnp.where((rise < 0) | accept_always, rounded, here)
            return _set_columns(q, rounded, at), gradient - matmul(rounded - here, rows)

        panel_q, _ = jax.lax.fori_loop(0, width // BLOCK, block_step, (_columns(q, start, width), gradient))
        return _set_columns(q, panel_q, start), _set_columns(error, _columns(w, start, width) - panel_q, start)

    return jax.lax.fori_loop(0, n // width, panel_step, (q, w - q))[0]


def tune(
    w: jax.Array,
    q: jax.Array,
    factors: Factors,
    scale: jax.Array,
    codebook: Codebook,
    num_sweeps: int | jax.Array,
    accept_always: bool | jax.Array = False,
) -> jax.Array:
    """Refines Q (m, n) block by block against H. -> Q, whose error no row raises.

    A row that a whole sweep has left as it was stays so for ever, and later sweeps leave it out: the rows that still
    move are gathered to the front and swept in chunks, as many as they fill. On Gaussian W half of ten sweeps is saved.

    `accept_always` takes every new block, better or worse, as the published code does.
    """
    m = len(w)
    chunk = min(m, max(MIN_CHUNK, -(-m // MAX_CHUNKS)))
    num_chunks = -(-m // chunk)

    def sweep_moving(_, carry):
        q, is_moving = carry  # (m, n), (m,)
        order = jnp.pad(jnp.argsort(~is_moving), (0, num_chunks * chunk - m), constant_values=m)  # m: no row
        num_moving = jnp.sum(is_moving)

        def sweep_chunk(i, carry):
            q, is_moving = carry
            rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
            w_rows, old = (x.at[rows].get(mode="clip") for x in (w, q))
            units = scale.at[rows].get(mode="clip") if len(scale) == m else scale
            new = _sweep(w_rows, old, factors, units, codebook, accept_always)
            has_moved = jnp.any(new != old, axis=-1)
            return q.at[rows].set(new, mode="drop"), is_moving.at[rows].set(has_moved, mode="drop")

        def sweep_if_any_moves(i, carry):  # in a loop of known length, so that a compiled program tells its cost
            return jax.lax.cond(i * chunk < num_moving, sweep_chunk, lambda _, carry: carry, i, carry)

        return jax.lax.fori_loop(0, num_chunks, sweep_if_any_moves, carry)

    return jax.lax.fori_loop(0, num_sweeps, sweep_moving, (q, jnp.ones(m, bool)))[0]


def quantize(
    w: jax.Array,
    factors: Factors,
    scale: jax.Array,
    codebook: Codebook,
    num_sweeps: int | jax.Array = 0,
    accept_always: bool | jax.Array = False,
    mesh: Mesh | None = None,
) -> jax.Array:
    """LDLQ and its sweeps. -> Q (m, n), values in the units of W.

    Args:
      w: (m, n), float32.
      factors: of the damped H (n, n).
      scale: () or (m, groups), the unit of the codebook; a group is n / groups columns, a multiple of 8.
      codebook: what a block is rounded to.
      num_sweeps: refinement sweeps after the first pass.
      accept_always: sweeps as published, which may raise the error.
      mesh: splits the rows of W over all its devices; the result has the same bits.
    """

    def rows(w, scale, factors, num_sweeps, accept_always):
        q = feedback_pass(w, factors.lower, scale, codebook)
        return tune(w, q, factors, scale, codebook, num_sweeps, accept_always)

    return _over_rows(rows, mesh, (w, block_units(scale, w.shape[1])), (factors, num_sweeps, accept_always))


def block_units(scale: jax.Array, n: int) -> jax.Array:
    """() or (m, groups) -> (1 or m, n / 8), the unit of each block."""
    scale = jnp.reshape(scale, (1, 1)) if jnp.ndim(scale) == 0 else scale
    return jnp.repeat(scale, n // BLOCK // scale.shape[1], axis=1)


def _over_rows(function, mesh: Mesh | None, by_row: tuple, whole: tuple) -> jax.Array:
    """function(*by_row, *whole), the rows of `by_row` split over the devices (an array of one row is kept whole)."""
    if mesh is None:
        return function(*by_row, *whole)
    num_rows = by_row[0].shape[0]
    padding = ((0, -num_rows % mesh.size), (0, 0))
    split = PartitionSpec(mesh.axis_names)
    specs = tuple(split if len(x) == num_rows else PartitionSpec() for x in by_row)
    padded = [jnp.pad(x, padding, constant_values=1) if len(x) == num_rows else x for x in by_row]
    whole = jax.tree.map(jnp.asarray, whole)
    specs += jax.tree.map(lambda _: PartitionSpec(), whole)
    # Rows are independent: nothing is exchanged, so there is nothing for the replication check to prove.
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return sharded(*padded, *whole)[:num_rows]


def block_scale(w: jax.Array, codebook: Codebook, group: int) -> jax.Array:
    """Unit of the codebook for W (m, n), never 0: root mean square / opt_scale, or the largest magnitude of a group."""
    if hasattr(codebook, "opt_scale"):
        return jnp.maximum(jnp.sqrt(jnp.mean(w * w)) / codebook.opt_scale, MIN_SCALE)  # ()
    largest = jnp.max(jnp.abs(w.reshape(w.shape[0], -1, group)), axis=-1)  # (m, groups)
    # A zero row stays zero. A zero group of another row takes up what the rounding of its neighbours leaves.
    room = jnp.where(jnp.any(largest > 0, axis=-1, keepdims=True), 1, MIN_SCALE)  # (m, 1)
    return jnp.where(largest > 0, largest, room)
