"""Starts of the alternation: which part of W the low-rank factors hold before Q is first rounded.

    zero    L R = 0
    svd     argmin over rank r of tr((W - L R) H (W - L R)^T)
    svd_w   the same with the identity for H: the truncated singular value decomposition of W
    odlri   the same with H_o, which keeps only the top-k input channels by diag(H) (ODLRI, arXiv 2506.02077, section 3)

With k <= r the odlri start is exactly W on the k channels and zero elsewhere. With k > r it is the best rank-r
approximation of those columns in the metric of H on them, U_r U_r^T W as in `lowrank.py`. Only the product L R is
needed: the first rounding sees W - L R and the first low-rank step replaces the factors."""

import jax
import jax.numpy as jnp

from odlri_jax import lowrank
from odlri_jax.cholesky import cholesky
from odlri_jax.matmul import matmul


def outlier_channels(h: jax.Array, num_outliers: int) -> jax.Array:
    """The k input channels of largest H_ii, largest first. -> (k,) int32"""
    return jax.lax.top_k(jnp.diagonal(h), num_outliers)[1]


def svd_start(w: jax.Array, h: jax.Array, rank: int, key: jax.Array) -> jax.Array:
    """L R (m, n) of the best rank-r approximation of W in the metric of H."""
    left, right = lowrank.low_rank(w, cholesky(h), rank, key)
    return matmul(left, right)


def odlri_start(w: jax.Array, h: jax.Array, rank: int, num_outliers: int, key: jax.Array) -> jax.Array:
    """L R (m, n) of the published start: the best rank-r approximation where only the top-k channels count."""
    channels = outlier_channels(h, num_outliers)
    columns = w[:, channels]  # (m, k)
    if num_outliers > rank:
        left = lowrank.leading(matmul(columns, cholesky(h[channels][:, channels])), rank, key)  # (m, r)
        columns = matmul(left, matmul(left.T, columns))
    return jnp.zeros_like(w).at[:, channels].set(columns)


def start(name: str, w: jax.Array, h: jax.Array, rank: int, num_outliers: int, key: jax.Array) -> jax.Array:
    """L R (m, n) of the start called "zero", "svd", "svd_w" or "odlri"."""
    if name == "zero":
        return jnp.zeros_like(w)
    if name == "svd":
        return svd_start(w, h, rank, key)
    if name == "svd_w":
        return svd_start(w, jnp.eye(len(h), dtype=h.dtype), rank, key)
    return odlri_start(w, h, rank, num_outliers, key)
