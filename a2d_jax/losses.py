"""The A2D objective: cross entropy at masked positions, weighted by 1 / p, with [EOS] as the target of harmful rows.

    LLaDA   sum over masked of CE / p / answer_length, divided by the batch size
    Dream   mean over masked of CE / p, logits at position i - 1 scored against token i
    causal  mean over the response of CE, logits at position i - 1 scored against token i; nothing is masked (C.5)

All are sums of CE over positions with fixed weights. `position_weights` computes the weights of a *whole* batch, so
that any split of it, into micro-batches or over devices, adds up to the same number. answer_length counts every
response position of the row, [EOS] padding up to the batch's longest row included.
"""

import jax
import jax.numpy as jnp

from a2d_jax.config import DIFFUSION_FAMILIES
from a2d_jax.masking import NoisedBatch

OBJECTIVES = ("llada", "dream", "causal")


def objective_of(family: str) -> str:
    """The objective whose logits a model family produces; the causal families shift by one as Dream does."""
    return family if family in DIFFUSION_FAMILIES else "causal"


def position_weights(batch: NoisedBatch, objective: str) -> jax.Array:
    """Weight of each position's cross entropy, (B, T) float32; zero where nothing is scored.

    Position 0 of Dream and of causal models has no logits before it and is never scored. A batch without masks has
    weights, and so a loss, of 0.
    """
    is_scored, is_response = jnp.asarray(batch.is_masked, bool), jnp.asarray(batch.is_response, bool)
    mask_prob = jnp.asarray(batch.mask_prob)
    if is_scored.ndim != 2 or is_response.shape != is_scored.shape:
        raise ValueError(
            f"is_masked has shape {is_scored.shape}, is_response {is_response.shape}; give (B, T) for both."
        )
    if mask_prob.ndim == 1:
        mask_prob = mask_prob[:, None]
    if objective == "llada":
        answer_length = jnp.sum(is_response, axis=1, keepdims=True)  # (B, 1)
        scale = 1.0 / (jnp.maximum(answer_length, 1) * len(is_scored))
    elif objective in ("dream", "causal"):
        is_scored = is_scored.at[:, 0].set(False)
        scale = 1.0 / jnp.maximum(jnp.sum(is_scored), 1)
    else:
        raise ValueError(f"objective={objective!r}; choose one of {OBJECTIVES}.")
    return jnp.where(is_scored, scale / mask_prob, 0.0)


def align_logits(logits: jax.Array, objective: str) -> jax.Array:
    """Logits (B, T, V) such that position i scores token i."""
    if objective == "llada":
        return logits
    return jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in float32: (B, T, V), (B, T) -> (B, T)."""
    logits = logits.astype(jnp.float32)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]  # compared, not gathered: V may be split over chips
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def weighted_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, objective: str) -> jax.Array:
    """Sum of weight x CE over all positions; `weights` from `position_weights` of the whole batch."""
    # Logits that are not scored may hold -inf, and neither 0 x inf nor its gradient is a number.
    logits = jnp.where(weights[..., None] > 0, align_logits(logits, objective), 0.0)
    return jnp.sum(weights * cross_entropy(logits, targets))


def align_targets(targets: jax.Array, weights: jax.Array, objective: str) -> tuple[jax.Array, jax.Array]:
    """Targets and weights (B, T) of raw logits: what `align_logits` does, from the other side."""
    if objective == "llada":
        return targets, weights
    shift = lambda x: jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)
    return shift(targets), shift(weights)


def a2d_loss(logits: jax.Array, batch: NoisedBatch, objective: str = "llada") -> jax.Array:
    """The A2D loss of one batch, scalar float32.

    Args:
      logits: (B, T, V) of `batch.noisy_tokens`, raw (Dream's unshifted).
      batch: from `corrupt`, or for a causal model from `next_tokens`; its `tokens` are the targets.
      objective: "llada", "dream" or "causal".
    """
    targets, weights = jnp.asarray(batch.tokens), position_weights(batch, objective)
    if not targets.shape == weights.shape == logits.shape[:-1]:
        raise ValueError(
            f"logits have shape {logits.shape}, batch.tokens {targets.shape}, batch.is_masked {weights.shape}; give "
            "(B, T, V), (B, T) and (B, T)."
        )
    return weighted_loss(logits, targets, weights, objective)
