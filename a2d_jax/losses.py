"""The A2D objective: cross entropy at masked positions, weighted by 1 / p, with [EOS] as the target of harmful rows.

    LLaDA   sum over masked of CE / p / answer_length, divided by the batch size
    Dream   mean over masked of CE / p, logits at position i - 1 scored against token i

Both are sums of CE over positions with fixed weights. `position_weights` computes the weights of a *whole* batch, so
that any split of it, into micro-batches or over devices, adds up to the same number. answer_length counts every
response position of the row, [EOS] padding up to the batch's longest row included.
"""

import jax
import jax.numpy as jnp

from a2d_jax.masking import NoisedBatch

OBJECTIVES = ("llada", "dream")


def objective_of(family: str) -> str:
    """The objective whose logits a model family produces; the causal families shift by one as Dream does."""
    return "llada" if family == "llada" else "dream"


def position_weights(batch: NoisedBatch, objective: str) -> jax.Array:
    """Weight of each position's cross entropy, (B, T) float32; zero where nothing is scored.

    Dream's position 0 has no logits before it and is never scored. A batch without masks has weights, and so a loss,
    of 0.
    """
    if objective == "llada":
        answer_length = jnp.sum(batch.is_response, axis=1, keepdims=True)  # (B, 1)
        scale = 1.0 / (jnp.maximum(answer_length, 1) * batch.tokens.shape[0])
        is_scored = batch.is_masked
    elif objective == "dream":
        is_scored = batch.is_masked.at[:, 0].set(False)
        scale = 1.0 / jnp.maximum(jnp.sum(is_scored), 1)
    else:
        raise ValueError(f"objective={objective!r}; choose one of {OBJECTIVES}.")
    return jnp.where(is_scored, scale / batch.mask_prob, 0.0)


def align_logits(logits: jax.Array, objective: str) -> jax.Array:
    """Logits (B, T, V) such that position i scores token i."""
    if objective == "llada":
        return logits
    return jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in float32: (B, T, V), (B, T) -> (B, T)."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def weighted_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, objective: str) -> jax.Array:
    """Sum of weight x CE over all positions; `weights` from `position_weights` of the whole batch."""
    return jnp.sum(weights * cross_entropy(align_logits(logits, objective), targets))


def a2d_loss(logits: jax.Array, batch: NoisedBatch, objective: str = "llada") -> jax.Array:
    """The A2D loss of one batch, scalar float32.

    Args:
      logits: (B, T, V) of `batch.noisy_tokens`, raw (Dream's unshifted).
      batch: from `corrupt`; its `tokens` are the targets.
      objective: "llada" or "dream".
    """
    return weighted_loss(logits, batch.tokens, position_weights(batch, objective), objective)
