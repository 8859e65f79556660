"""weight x cross entropy of every position, without the logits of all positions, and its gradient.

    logits = head(hidden)        dlogits = weight (softmax(logits) - [target])        dhidden, dhead from dlogits

Positions are taken in chunks, those that are scored first; a chunk without any is skipped, and the logits of one chunk
exist at a time. Each part of the batch that lies on other chips is sorted by itself.

The gradient of a sum of all positions needs nothing that comes later, so `scored_sum` finds it in the same pass as the
sum, from the same logits. `scored_losses` leaves open what its caller makes of the positions; its backward pass
computes the logits again.

    Z parts, P positions of a part, C positions of a chunk, J chunks
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a2d_jax.losses import cross_entropy
from a2d_jax.sharding import constrain, num_shards

LOGITS_AT_ONCE = 2**25  # float32 logits that training holds on a device: 128 MB


class Head(NamedTuple):
    """What stands behind the last hidden states.

    Attributes:
      logits_of: (trained, frozen, hidden (Z, C, D), key) -> logits (Z, C, V).
      trained: the head's arrays that a gradient is wanted of.
      frozen: the others, and those of `extra`; no gradient goes to them.
      vocab_size: V.
      extra: a further term of the loss, (frozen, logits (Z, C, V), each of `extra_inputs` there) -> (Z, C). It is
        asked only where chunks hold a weight, and must not close over traced arrays.
    """

    logits_of: Callable[..., jax.Array]
    trained: Any
    frozen: Any
    vocab_size: int
    extra: Callable[..., jax.Array] | None = None


class _Operands(NamedTuple):
    trained: Any
    frozen: Any
    hidden: jax.Array  # (Z, P, D)
    targets: jax.Array  # (Z, P)
    weights: jax.Array  # (Z, P)
    key: jax.Array | None
    extra_inputs: tuple[jax.Array, ...]  # (Z, P, ...) each


def scored_losses(
    head: Head,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    key: jax.Array | None = None,
    extra_inputs: tuple[jax.Array, ...] = (),
) -> jax.Array:
    """weight x CE (+ extra) of every position, (B, T).

    Args:
      head: the head, and the term beside the cross entropy.
      hidden: (B, T, D).
      targets, weights: (B, T), of the raw logits; weight 0: not scored.
      key: for the head's dropout.
      extra_inputs: (B, T) or (B, T, ...) each.
    """
    functions, operands, at_once = _prepare(head, hidden, targets, weights, key, extra_inputs)
    if operands.weights.shape[1] <= at_once:
        return _chunk_losses(functions, operands, operands.trained, operands.hidden).reshape(targets.shape)
    return _losses(functions, at_once, *operands).reshape(targets.shape)


def scored_sum(
    head: Head,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    key: jax.Array | None = None,
    extra_inputs: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The sum of `scored_losses`, to be differentiated, and the losses themselves (B, T), which carry no gradient."""
    functions, operands, at_once = _prepare(head, hidden, targets, weights, key, extra_inputs)
    if operands.weights.shape[1] <= at_once:
        losses = _chunk_losses(functions, operands, operands.trained, operands.hidden)
        total = jnp.sum(losses)
    else:
        total, losses = _sum(functions, at_once, *operands)
    return total, jax.lax.stop_gradient(losses.reshape(targets.shape))


def _prepare(head: Head, hidden, targets, weights, key, extra_inputs):
    """(functions, operands by parts of the batch, positions of a chunk)."""
    num_rows, length = targets.shape
    num_groups = num_shards("batch", num_rows)  # Z
    at_once = LOGITS_AT_ONCE * num_shards("head_vocab", head.vocab_size) // (head.vocab_size * num_groups)
    at_once = max(at_once // 128 * 128, 128)  # C, a multiple of the matrix unit's side

    def grouped(x: jax.Array) -> jax.Array:
        x = x.reshape(num_groups, num_rows * length // num_groups, *x.shape[2:])
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    by_position = jax.tree.map(grouped, (hidden, targets, weights))
    extra_inputs = jax.tree.map(grouped, extra_inputs)
    return (head.logits_of, head.extra), _Operands(head.trained, head.frozen, *by_position, key, extra_inputs), at_once


def _chunk_losses(functions, x: _Operands, trained, hidden: jax.Array) -> jax.Array:
    """Losses of the positions that are given, all of them: (Z, C)."""
    logits_of, extra = functions
    logits = constrain(logits_of(trained, x.frozen, hidden, x.key), None, None, "head_vocab")  # (Z, C, V)
    losses = x.weights * cross_entropy(logits, x.targets)
    return losses if extra is None else losses + extra(x.frozen, logits, *x.extra_inputs)


def _over_chunks(functions, at_once: int, x: _Operands, cotangent: jax.Array | None = None):
    """Losses (Z, P); with their cotangent (Z, P) also the gradients (of `trained`, of `hidden`)."""
    num_groups, num_positions = x.weights.shape
    num_chunks = -(-num_positions // at_once)
    order = jnp.argsort(x.weights == 0, axis=1, stable=True)  # (Z, P)
    filled = jnp.pad(order, ((0, 0), (0, num_chunks * at_once - num_positions)))
    is_real = jnp.arange(num_chunks * at_once) < num_positions
    weights = jnp.take_along_axis(x.weights, filled, axis=1) * is_real  # (Z, J C)
    chunks = lambda x: x.reshape(num_groups, num_chunks, at_once).swapaxes(0, 1)  # (J, Z, C)

    def score(grads, chunk):
        positions, weights, is_real, index = chunk

        def there(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, positions.reshape(*positions.shape, *[1] * (x.ndim - 2)), axis=1)

        part = x._replace(
            targets=there(x.targets),
            weights=weights,
            key=None if x.key is None else jax.random.fold_in(x.key, index),
            extra_inputs=tuple(map(there, x.extra_inputs)),
        )
        losses_of = functools.partial(_chunk_losses, functions, part)
        if cotangent is None:
            return grads, losses_of(x.trained, there(x.hidden))
        losses, pull = jax.vjp(losses_of, x.trained, there(x.hidden))
        of_trained, of_hidden = pull(there(cotangent) * is_real)  # the last chunk is filled up with position 0
        to_trained, to_hidden = grads
        return (jax.tree.map(jnp.add, to_trained, of_trained), _add_at(to_hidden, positions, of_hidden)), losses

    def step(grads, chunk):
        weights = chunk[1]
        return jax.lax.cond(
            jnp.any(weights > 0), score, lambda grads, _: (grads, jnp.zeros_like(weights)), grads, chunk
        )

    grads = None if cotangent is None else jax.tree.map(jnp.zeros_like, (x.trained, x.hidden))
    is_real = jnp.broadcast_to(is_real, filled.shape)
    grads, losses = jax.lax.scan(step, grads, (*map(chunks, (filled, weights, is_real)), jnp.arange(num_chunks)))
    losses = losses.swapaxes(0, 1).reshape(num_groups, -1)
    return jnp.take_along_axis(losses, jnp.argsort(order, axis=1), axis=1), grads


_add_at = jax.vmap(lambda total, positions, new: total.at[positions].add(new))  # (Z, P, D), (Z, C), (Z, C, D)


def _as_operands(grads) -> tuple:
    """Gradients in the order of `_Operands`."""
    of_trained, of_hidden = grads
    return tuple(_Operands(of_trained, None, of_hidden, None, None, None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(functions, at_once, *operands):
    return _over_chunks(functions, at_once, _Operands(*operands))[0]


def _losses_forward(functions, at_once, *operands):
    return _losses(functions, at_once, *operands), operands


def _losses_backward(functions, at_once, operands, cotangent):
    return _as_operands(_over_chunks(functions, at_once, _Operands(*operands), cotangent)[1])


_losses.defvjp(_losses_forward, _losses_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(functions, at_once, *operands):
    losses = _over_chunks(functions, at_once, _Operands(*operands))[0]
    return jnp.sum(losses), losses


def _sum_forward(functions, at_once, *operands):
    operands = _Operands(*operands)
    losses, grads = _over_chunks(functions, at_once, operands, jnp.ones_like(operands.weights))
    return (jnp.sum(losses), losses), grads


def _sum_backward(functions, at_once, grads, cotangents):
    return _as_operands(jax.tree.map(lambda grad: (cotangents[0] * grad).astype(grad.dtype), grads))


_sum.defvjp(_sum_forward, _sum_backward)
