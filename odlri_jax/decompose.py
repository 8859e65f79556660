"""Decomposition of one weight matrix: W ~ Q + L R, alternating rounding and low-rank steps from a chosen start.

    L_0 R_0 <- start;   Q_t <- Quantize(W - L_{t-1} R_{t-1});   L_t, R_t <- LowRank(W - Q_t),   t = 1..T

(CALDERA, arXiv 2405.18886; start of ODLRI, arXiv 2506.02077.) The error is sqrt(tr(E H E^T) / tr(W H W^T)), E = W - Q
- L R, with the damped H. The best iterate is kept. No step raises the error it works on: sweeps of Q are accepted row
by row, the closed form of the factors is optimal, and quantised factors start from the pair before. Q itself is rounded
afresh in every iteration: carried over wherever it was better, it held the alternation in its first local minimum.

W is divided by its root mean square, and with `hadamard` rotated with H (`hadamard.py`); Q lives in that basis.
Quantised factors always live in the rotated basis, which their rounding needs. `published` replays the published code
instead: sweeps accepted always, factors rounded to nearest points in the basis of Q, no error kept from rising.

Everything is float32 with products at the highest precision, and one jitted program for each shape and config. The
16-bit factors that are kept end as float16 numbers, so that packing loses nothing.
"""

import dataclasses
import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from threadpoolctl import threadpool_limits

from odlri_jax import hadamard, initialize, ldlq, lowrank
from odlri_jax.cholesky import cholesky
from odlri_jax.codebooks import BLOCK
from odlri_jax.decompose_config import DecomposeConfig, starts
from odlri_jax.decomposition import Decomposition
from odlri_jax.lowrank import QuantizedFactors
from odlri_jax.matmul import matmul

# How far "auto" follows each start. With 4-bit factors and 15 iterations the svd start leads early and zero ends lower;
# after eight iterations the leader was the winner in 203 of the 210 matrices of SmolLM2.
SCOUT_ITERS, SCOUT_TUNE_ITERS, SCOUT_INNER_ITERS = 8, 2, 2


def _best(is_better: jax.Array, new, old):
    return jax.tree.map(lambda x, y: jnp.where(is_better, x, y), new, old)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _alternate(w, factors, signs, low_rank_start, key, config: DecomposeConfig, mesh: Mesh | None):
    """The alternation from one start: (best state, errors after Q, errors, scales of Q).

    Args:
      w: (m, n) in the basis of Q.
      factors: (of the damped H in that basis, in the basis of L and R).
      signs: of the rotation.
      low_rank_start: L_0 R_0 (m, n) in the basis of Q.
      config: without the choice of start, so that all starts share one program.
    """
    q_factors, lr_factors = factors
    to_factors = from_factors = lambda x, *_: x
    if config.rotates_factors and not config.hadamard:
        to_factors, from_factors = hadamard.incoherent_weight, hadamard.coherent_weight
    (m, n), codebook = w.shape, config.codebook
    whole = ldlq.weighted_error(w, q_factors.h)
    root = cholesky(lr_factors.h)
    one = jnp.ones((), w.dtype)

    def relative(error_squared):
        return jnp.sqrt(jnp.maximum(error_squared, 0) / whole)

    def replicated(x):
        # Sums over all rows (scales, errors, the low-rank step) then have the same bits on any number of devices.
        return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))

    def quantize(target):
        target = replicated(target)
        scale = ldlq.block_scale(target, codebook, config.group)
        q = ldlq.quantize(target, q_factors, scale, codebook, config.tune_iters, config.published, mesh)
        return replicated(q), scale

    def fit_low_rank(residual, pair, pair_error, key):
        a = to_factors(residual, *signs)
        if config.factor_codebook is None:
            left, right = lowrank.low_rank(a, root, config.rank, key)
            return QuantizedFactors(left, right, one, one, pair_error)
        old = pair._replace(error=jnp.inf * one if config.published else pair_error)
        return lowrank.quantized_low_rank(
            a, lr_factors, root, old, config.factor_codebook, config.inner_iters, key, plain_rounding=config.published
        )

    def outer_step(carry, step_key):
        low_rank, pair, has_pair, best = carry
        q, scale = quantize(w - low_rank)
        after_q = ldlq.weighted_error(w - q - low_rank, q_factors.h)
        # The published code also compares the error between the steps, once both parts have been fitted.
        middle = (q, scale, pair, relative(jnp.where(has_pair, after_q, jnp.inf)))
        best = _best(middle[-1] < best[-1], middle, best)
        pair = fit_low_rank(w - q, pair, jnp.where(has_pair, after_q, jnp.inf), step_key)
        low_rank = from_factors(matmul(pair.left, pair.right), *signs)
        error = relative(ldlq.weighted_error(w - q - low_rank, q_factors.h))
        end = (q, scale, pair, error)
        best = _best(error < best[-1], end, best)
        carry = (low_rank, pair, jnp.ones((), bool), best)
        return carry, (relative(after_q), error, jnp.mean(scale))

    rank = config.rank
    pair = QuantizedFactors(jnp.zeros((m, rank), w.dtype), jnp.zeros((rank, n), w.dtype), one, one, jnp.inf * one)
    nothing = jnp.zeros_like(w)
    scale = jnp.ones_like(ldlq.block_scale(w, codebook, config.group))
    carry = (low_rank_start, pair, jnp.zeros((), bool), (nothing, scale, pair, jnp.inf * one))
    carry, lists = jax.lax.scan(outer_step, carry, jax.random.split(key, config.outer_iters))
    return carry[-1], lists


@functools.partial(jax.jit, static_argnames="config")
def _prepare(w, h, signs, key, config: DecomposeConfig):
    """Scaled W and starts (S, m, n) in the basis of Q, the scale, and the factors of H in both bases."""
    weight_scale = jnp.sqrt(jnp.mean(w * w))
    w = w / weight_scale
    h = ldlq.damp(h, config.ridge)
    low_ranks = jnp.stack([initialize.start(name, w, h, config.rank, k, key) for name, k in starts(config)])
    plain = rotated = ldlq.factorise(h)
    if config.rotates_factors:
        h = hadamard.incoherent_hessian(h, signs[1])
        rotated = ldlq.factorise((h + h.T) / 2)
    if config.hadamard:
        w, low_ranks = (
            hadamard.incoherent_weight(w, *signs),
            jax.vmap(lambda x: hadamard.incoherent_weight(x, *signs))(low_ranks),
        )
    return w, low_ranks, weight_scale, (rotated if config.hadamard else plain, rotated)


def decompose_arrays(
    w: jax.Array,
    h: jax.Array,
    config: DecomposeConfig,
    key: jax.Array,
    signs: tuple[jax.Array, jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> Decomposition:
    """`decompose` without its checks: W (m, n) and H (n, n) float32, for use under jit and vmap.

    It raises nothing: on what `decompose` refuses, the error of the result is not finite, or has no meaning.

    `signs` (s_V (m,), s_U (n,)) replaces the random ones.
    """
    signs_key, start_key, loop_key = jax.random.split(key, 3)
    if signs is None:
        out_key, in_key = jax.random.split(signs_key)
        signs = hadamard.random_signs(out_key, w.shape[0]), hadamard.random_signs(in_key, w.shape[1])
    w, low_ranks, weight_scale, factors = _prepare(w, h, signs, start_key, config)

    inner_iters = config.inner_iters if config.lr_bits < 16 else 1  # 16-bit factors never read it: one program for all
    core = dataclasses.replace(config, init="zero", num_outliers=1, inner_iters=inner_iters)
    scout = dataclasses.replace(
        core,
        outer_iters=min(core.outer_iters, SCOUT_ITERS),
        tune_iters=min(core.tune_iters, SCOUT_TUNE_ITERS),
        inner_iters=min(core.inner_iters, SCOUT_INNER_ITERS),
    )

    def alternate(low_rank_start, config):
        return _alternate(w, factors, signs, low_rank_start, loop_key, config, mesh)

    start = jnp.zeros((), jnp.int32)
    if len(low_ranks) > 1:
        # One after the other, not by lax.map: XLA's program of that took three times as long on a CPU.
        scouted = jax.tree.map(lambda *x: jnp.stack(x), *[alternate(low_rank, scout) for low_rank in low_ranks])
        start = jnp.argmin(scouted[0][-1]).astype(jnp.int32)
    if len(low_ranks) > 1 and scout == core:  # a run so short that the scouts have done all of it
        state, (errors_after_q, errors, q_scales) = jax.tree.map(lambda x: x[start], scouted)
    else:
        state, (errors_after_q, errors, q_scales) = alternate(low_ranks[start], core)
    q, q_scale, pair, error = state

    whole = ldlq.weighted_error(w, factors[0].h)
    if config.factor_codebook is None:
        left, right = (x.astype(jnp.float16).astype(jnp.float32) for x in (pair.left, pair.right))
        pair = pair._replace(left=left, right=right)
        error = jnp.sqrt(ldlq.weighted_error(w - q - matmul(left, right), factors[0].h) / whole)
    # Where no iteration found finite factors, L is what it began with: zero, which no lattice has.
    has_factors = jnp.any(jnp.isfinite(errors)) if config.factor_codebook is None else jnp.any(pair.left)
    error = jnp.where(has_factors, error, jnp.inf)
    q_role = jnp.sqrt(ldlq.weighted_error(q, factors[0].h) / whole)
    lr_role = jnp.sqrt(ldlq.weighted_error(matmul(pair.left, pair.right), factors[1].h) / whole)
    return Decomposition(
        q=q,
        left=pair.left,
        right=pair.right,
        q_scale=q_scale,
        left_scale=pair.left_scale,
        right_scale=pair.right_scale,
        weight_scale=weight_scale,
        signs_out=signs[0],
        signs_in=signs[1],
        error=error,
        errors=errors,
        errors_after_q=errors_after_q,
        q_scales=q_scales,
        q_role=q_role,
        lr_role=lr_role,
        start=start,
        config=config,
    )


def check_shape(shape: tuple[int, int], config: DecomposeConfig, name: str = "W") -> None:
    """ValueError where a matrix of this shape (m, n) does not fit the config; `name` is what the message calls it."""
    (m, n), where = shape, f"{name} {shape}"
    if n % BLOCK:
        raise ValueError(f"{where}: its {n} columns are not a multiple of {BLOCK}, the block of the codebooks.")
    if config.rank > min(m, n):
        raise ValueError(f"rank={config.rank} is above min(m, n) = {min(m, n)} of {where}; give a lower rank.")
    if config.num_outliers > n and config.init in ("odlri", "auto"):
        raise ValueError(
            f"num_outliers={config.num_outliers} is above the {n} columns of {where}; give a lower num_outliers."
        )
    if config.published and config.lr_bits < 16 and m % BLOCK:
        raise ValueError(f"{where}: the published factor rounding needs rows in multiples of {BLOCK}.")
    if config.q_codebook != "e8p" and (n % config.group or config.group % BLOCK):
        raise ValueError(
            f"group={config.group} must divide the {n} columns of {where} and be a multiple of {BLOCK}; give another "
            "group."
        )


def check_inputs(w: jax.Array, h: jax.Array, config: DecomposeConfig) -> jax.Array:
    """Raises ValueError on what cannot be decomposed. -> H, or the identity, with a warning, where H is all zero."""
    if isinstance(w, jax.core.Tracer) or isinstance(h, jax.core.Tracer):
        raise ValueError(
            "W or H is traced by jit or vmap, under which its numbers cannot be checked; call decompose_arrays inside "
            "them, or decompose_stack outside for many matrices."
        )
    if w.ndim != 2 or h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise ValueError(f"W {w.shape} and H {h.shape}: W must be (m, n) and H (n, n).")
    n = w.shape[1]
    if len(h) != n:
        raise ValueError(f"W {w.shape} and H {h.shape}: H must be ({n}, {n}), one row for each column of W.")
    check_shape(w.shape, config)
    for name, x in (("W", w), ("H", h)):
        if not bool(jnp.isfinite(x).all()):
            raise ValueError(f"{name} {x.shape} holds a value that is not finite.")
    if not bool(jnp.any(w)):
        raise ValueError(
            f"W {w.shape} is zero everywhere, and has no scale to be divided by. Unless the checkpoint is damaged, set "
            "one weight to a small number, such as 1e-6."
        )
    if not bool(jnp.any(h)):
        warnings.warn("H is zero everywhere: no input reached this layer; the identity is used instead.", stacklevel=3)
        return jnp.eye(n, dtype=jnp.float32)
    if not bool(jnp.isfinite(jnp.mean(jnp.diagonal(h)))):
        raise ValueError(
            f"H {h.shape}: the sum of its diagonal is beyond float32. Divide H by a number; its scale changes nothing."
        )
    largest = float(jnp.max(jnp.abs(h)))
    if float(jnp.max(jnp.abs(h - h.T))) > 1e-4 * largest:
        raise ValueError(f"H {h.shape} is not symmetric.")
    if float(jnp.trace(h)) <= 0 or not bool(jnp.isfinite(cholesky(ldlq.damp(h, config.ridge))).all()):
        raise ValueError(
            f"H {h.shape} is indefinite beyond its ridge of {config.ridge}; a second moment of inputs never is. "
            "Recompute it, or raise ridge."
        )
    return h


def _with_auto_axes(mesh: Mesh | None) -> Mesh | None:
    """The same devices and names with Auto axis types, which the splitting of rows and stacks is written for."""
    return None if mesh is None else Mesh(mesh.devices, mesh.axis_names)


def _one_blas_thread() -> threadpool_limits:
    """One thread for LAPACK on the host's processor: its threads wait by spinning, and on busy cores an
    eigendecomposition of 576 x 576 took 27 times the processor time with two."""
    return threadpool_limits(limits=1, user_api="blas")


def decompose(
    w: jax.Array,
    h: jax.Array,
    config: DecomposeConfig,
    key: jax.Array,
    signs: tuple[jax.Array, jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> Decomposition:
    """W ~ Q + L R in the metric of H, damped: errors are in that of H + ridge mean(diag H) I.

    Not for jit and vmap, under which its checks see no numbers: `decompose_arrays` is.

    Args:
      w: (m, n), y = W x.
      h: (n, n), mean of x x^T over calibration inputs, undamped.
      config: what to do.
      key: for the signs, the starts and the factors.
      signs: (s_V (m,), s_U (n,)) of +-1 in place of random ones.
      mesh: the rows of W are split over all its devices for the rounding of Q; the result has the same bits. Explicit
        axis types become Auto.

    Returns:
      The best iterate with its errors and scales. ValueError on inputs that cannot be decomposed.
    """
    w, h = jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32)
    h = check_inputs(w, h, config)
    if signs is not None:
        signs = tuple(jnp.asarray(np.asarray(s), jnp.float32) for s in signs)
        if signs[0].shape != w.shape[:1] or signs[1].shape != w.shape[1:]:
            raise ValueError(f"signs {signs[0].shape}, {signs[1].shape} do not fit W {w.shape}: they are (m,), (n,).")
    with _one_blas_thread():
        result = jax.block_until_ready(decompose_arrays(w, h, config, key, signs, _with_auto_axes(mesh)))
    if not math.isfinite(float(result.error)):
        raise ValueError(
            f"the decomposition of W {w.shape} did not stay finite; raise ridge={config.ridge}, or look at the scale "
            "of W and H."
        )
    return result


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def decompose_stack_jitted(w, h, keys, config: DecomposeConfig, mesh: Mesh | None) -> Decomposition:
    """The program of `decompose_stack`: without its checks, for a stack that the devices of `mesh` divide."""

    def one_by_one(w, h, keys):
        return jax.lax.map(lambda matrix: decompose_arrays(*matrix[:2], config, matrix[2]), (w, h, keys))

    if mesh is None:
        return one_by_one(w, h, keys)
    split = PartitionSpec(mesh.axis_names)
    return jax.shard_map(one_by_one, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(w, h, keys)


def decompose_stack(
    w: jax.Array, h: jax.Array, config: DecomposeConfig, keys: jax.Array, mesh: Mesh | None = None
) -> Decomposition:
    """Matrices of one shape in one program: W (B, m, n), H (B, n, n), keys (B,). Fields gain a leading B.

    The stack is split over all devices of `mesh` (Explicit axis types become Auto), each of which takes its matrices
    one after the other: memory holds one at work on a device, and a result has the same bits wherever it was computed,
    as XLA compiles by default (with `--xla_cpu_use_fusion_emitters=false` the last bit of a sum can depend on the size
    of a device's stack).
    """
    w, h = jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32)
    h = jnp.stack([check_inputs(*pair, config) for pair in zip(w, h, strict=True)])
    num_matrices, mesh = len(w), _with_auto_axes(mesh)
    if mesh is not None:  # every device takes equally many; the last matrix fills up
        filled = jnp.minimum(jnp.arange(-(-num_matrices // mesh.size) * mesh.size), num_matrices - 1)
        w, h, keys = w[filled], h[filled], keys[filled]
    with _one_blas_thread():
        result = jax.block_until_ready(decompose_stack_jitted(w, h, keys, config, mesh))
    result = jax.tree.map(lambda x: x[:num_matrices], result)
    if not bool(jnp.isfinite(result.error).all()):
        broken = [int(i) for i in jnp.flatnonzero(~jnp.isfinite(result.error))]
        raise ValueError(
            f"matrices {broken} of the stack {w.shape} did not stay finite; raise ridge={config.ridge}, or look at the "
            "scale of W and H."
        )
    return result
