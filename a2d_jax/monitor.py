"""P([EOS]) as a live measure of harm: an aligned model wants to stop wherever harmful text would stand.

    p = softmax(logits at the left-most masked position)[EOS]        A2D, early rejection and real-time monitoring

At the first step p already separates harmful requests from harmless ones; above a threshold the request is refused
after a single forward pass.
"""

import jax
import jax.numpy as jnp


def eos_probability(logits: jax.Array, is_open: jax.Array, eos_id: int) -> jax.Array:
    """P([EOS]) at each row's left-most masked position.

    Args:
      logits: (B, T, V), position i scores token i.
      is_open: (B, T) bool, positions still masked.
    Returns:
      (B,) float32; NaN for a row without masked positions.
    """
    first = jnp.argmax(is_open, axis=1)  # (B,)
    at_first = jnp.take_along_axis(logits, first[:, None, None], axis=1)[:, 0].astype(jnp.float32)  # (B, V)
    prob = jnp.exp(at_first[:, eos_id] - jax.nn.logsumexp(at_first, axis=-1))
    return jnp.where(jnp.any(is_open, axis=1), prob, jnp.nan)


def rejects(eos_prob: jax.Array, step: jax.Array, threshold: float | None) -> jax.Array:
    """Early rejection: (B,) bool, True where the first step's probability is above the threshold."""
    if threshold is None:
        return jnp.zeros(eos_prob.shape, bool)
    return (step == 0) & (eos_prob > threshold)
