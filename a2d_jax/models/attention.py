"""Attention, by the kernel that suits the chip: on a TPU JAX's splash attention, elsewhere matmuls and softmax.

The plain path puts the heads in front, so that each product is a batch of plain matrix products, and divides what comes
out of the softmax, (T, H) a head, not what goes in, (T, S). With a cache the positions of a pass stand beside it: the
places they replace are hidden, and nothing is copied into it.

The splash kernel never writes the (T, S) scores to memory. It is taken for what denoising models ask: every position
sees every real one, in bfloat16, at lengths and head sizes that fill its 128 lanes. Padding is told to it as segments:
a real query sees the real keys; a padded one sees padding, and nobody looks at it. All else takes the plain path.

The choice follows the devices the program is traced for (the mesh in force, or the default backend), so a program
compiled for a TPU elsewhere is the one that a TPU runs.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from a2d_jax.sharding import is_for_tpu, mesh_in_force, partition_spec

LANES = 128
HIDDEN = -1e30  # score of a key that is not seen
_BLOCKS = (512, 256, LANES)  # positions that the kernel takes at once, the most that divides the length


class KeyValues(NamedTuple):
    """What queries attend to, as the products take it, of one layer, or of all of them with an L axis in front."""

    keys: jax.Array  # (B, K, H, S), rotated
    values: jax.Array  # (B, K, S, H)


def heads_first(k: jax.Array, v: jax.Array) -> KeyValues:
    """From (B, S, K, H) each."""
    return KeyValues(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))


def takes_splash(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> bool:
    """Whether the kernel computes this attention: arguments as of `attend`."""
    length, head_dim = q.shape[1], q.shape[3]
    hides_keys_alone = mask is None or mask.shape[1:3] == (1, 1)
    is_full = k.shape[1] == length and length % LANES == 0 and head_dim % LANES == 0
    return hides_keys_alone and is_full and q.dtype == jnp.bfloat16


def splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, is_interpreted: bool = False) -> jax.Array:
    """`attend` by the kernel, on one device."""
    num_rows, length, num_heads, head_dim = q.shape
    block = next(size for size in _BLOCKS if length % size == 0)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    everything = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, length))] * num_heads)
    kernel = splash_attention_kernel.make_splash_mha(
        everything, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=is_interpreted
    )
    swapped = lambda x: x.swapaxes(1, 2)  # (B, T, N, H) -> (B, N, T, H)
    is_real = jnp.ones((num_rows, length), jnp.int32)
    if mask is not None:
        is_real = jnp.broadcast_to(mask[:, 0, 0], is_real.shape).astype(jnp.int32)  # (B, S)
    segments = splash_attention_kernel.SegmentIds(is_real, is_real)
    scaled = q * jnp.asarray(1 / math.sqrt(head_dim), q.dtype)
    attended = jax.vmap(kernel)(swapped(scaled), swapped(k), swapped(v), segments)  # (B, N, T, H)
    return attended.swapaxes(1, 2).astype(q.dtype)


def attend_parts(
    q: jax.Array, parts: Sequence[tuple[KeyValues, jax.Array | None]], precision: jax.lax.Precision
) -> jax.Array:
    """Attention to the keys of all parts as if they were one, by plain matmuls: softmax(q [k ..]^T / sqrt(H)) [v ..].

    Args:
      q: (B, T, N, H).
      parts: KeyValues of S keys each, and which of them are seen, (B or 1, 1, T or 1, S) bool, or None: all are. A
        query that sees nothing gets the mean of the values.
      precision: of the matmuls; what they sum up is float32.
    Returns:
      (B, T, N, H).
    """
    num_rows, length, num_heads, head_dim = q.shape
    num_kv_heads = parts[0][0].keys.shape[1]
    product = functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)
    by_group = (num_rows, num_kv_heads, num_heads // num_kv_heads, length, -1)  # (B, K, G, T, ...)
    by_head = (num_rows, num_kv_heads, num_heads // num_kv_heads * length, -1)  # (B, K, G T, ...)

    queries = q.reshape(num_rows, length, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4).reshape(by_head)
    scores = []
    for part, mask in parts:
        of_part = product(queries, part.keys).reshape(by_group) / math.sqrt(head_dim)  # (B, K, G, T, S)
        scores.append(of_part if mask is None else jnp.where(mask[:, :, None], of_part, HIDDEN))
    largest = functools.reduce(jnp.maximum, [jnp.max(of_part, axis=-1, keepdims=True) for of_part in scores])
    weights = [jnp.exp(of_part - jax.lax.stop_gradient(largest)) for of_part in scores]
    total = sum(jnp.sum(of_part, axis=-1, keepdims=True) for of_part in weights)  # (B, K, G, T, 1)
    attended = sum(
        product(of_part.reshape(by_head).astype(part.values.dtype), part.values)
        for of_part, (part, _) in zip(weights, parts, strict=True)
    ).reshape(by_group)  # (B, K, G, T, H)
    return (attended / total).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, precision: jax.lax.Precision) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, the softmax in float32; N / K query heads share a key head.

    Args:
      q: (B, T, N, H).
      k, v: (B, S, K, H).
      mask: (B or 1, 1, T or 1, S) bool, False = not seen; None: everything is.
      precision: of the matmuls, where they are not the kernel's.
    Returns:
      (B, T, N, H).
    """
    if not (is_for_tpu() and takes_splash(q, k, mask)):
        return attend_parts(q, [(heads_first(k, v), mask)], precision)
    if (mesh := mesh_in_force()) is None:
        return splash(q, k, v, mask)
    # The compiler cannot split a kernel: each chip is given its rows and heads.
    queries = partition_spec(("batch", None, "heads", None), q.shape, mesh)
    keys = partition_spec(("batch", None, "kv_heads", None), k.shape, mesh)
    if mask is None:
        mask = jnp.ones((q.shape[0], 1, 1, k.shape[1]), bool)
    mask = jnp.broadcast_to(mask, (q.shape[0], 1, 1, k.shape[1]))
    rows = partition_spec(("batch", None, None, None), mask.shape, mesh)
    split = jax.shard_map(splash, mesh=mesh, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False)
    return split(q, k, v, mask)
