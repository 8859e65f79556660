"""The forward process: response tokens become [MASK], each with one probability per row; prompts never do.

    t ~ U(0, 1) per row,  p = (1 - eps) t + eps,  every response token is masked with probability p
    target of a masked token: the token itself (retain rows), or [EOS] (harmful rows)          A2D, section 3

One t per row and independent positions are what make the learned refusal hold in any order and at any step: every
subset of the response is seen masked.

Causal models (appendix C.5) need no masks: every prefix of the response is a context already. `next_tokens` gives their
targets, [EOS] behind every prefix of a harmful response, and the next token elsewhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class NoisedBatch(NamedTuple):
    """What the loss needs to know of one corrupted batch.

    `tokens` are the targets: in harmful rows every position holds [EOS], although the unmasked positions of
    `noisy_tokens` keep the harmful text. That text is the context in which the model must learn to stop.
    """

    tokens: jax.Array  # (B, T) int32, target of each position
    noisy_tokens: jax.Array  # (B, T) int32, model input
    is_masked: jax.Array  # (B, T) bool, positions that are scored
    mask_prob: jax.Array  # (B, T), (B, 1) or (B,) float32, p of the row
    is_response: jax.Array  # (B, T) bool, the padding that counts as response included
    is_safe: jax.Array  # (B,) bool


def _as_arrays(tokens, is_response, is_safe) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows of one batch as arrays; ValueError where their shapes do not belong together."""
    tokens, is_response, is_safe = jnp.asarray(tokens), jnp.asarray(is_response, bool), jnp.asarray(is_safe, bool)
    if tokens.ndim != 2 or is_response.shape != tokens.shape or is_safe.shape != tokens.shape[:1]:
        raise ValueError(
            f"tokens have shape {tokens.shape}, is_response {is_response.shape}, is_safe {is_safe.shape}; "
            "give (B, T), (B, T) and (B,)."
        )
    return tokens, is_response, is_safe


def corrupt(
    key: jax.Array,
    tokens: jax.Array,
    is_response: jax.Array,
    is_safe: jax.Array,
    *,
    mask_id: int,
    eos_id: int,
    eps: float = 1e-3,
    time_range: tuple[float, float] = (0.0, 1.0),
) -> NoisedBatch:
    """Draws t and the masks of one batch.

    Args:
      key: consumed whole; fold the step into it before.
      tokens: (B, T) int32 clean rows, right-padded with [EOS].
      is_response: (B, T) bool, positions that may be masked.
      is_safe: (B,) bool, False for a harmful response.
      mask_id: what masked positions become.
      eos_id: what harmful rows become: [EOS], or another refusal token.
      eps: the smallest masking probability.
      time_range: t is uniform between these; two equal numbers fix it.
    """
    tokens, is_response, is_safe = _as_arrays(tokens, is_response, is_safe)
    time_key, mask_key = jax.random.split(key)
    time = jax.random.uniform(time_key, (tokens.shape[0], 1))
    time = time_range[0] + (time_range[1] - time_range[0]) * time
    mask_prob = (1 - eps) * time + eps  # (B, 1)
    is_masked = is_response & (jax.random.uniform(mask_key, tokens.shape) < mask_prob)
    return NoisedBatch(
        tokens=jnp.where(is_safe[:, None], tokens, eos_id),
        noisy_tokens=jnp.where(is_masked, mask_id, tokens),
        is_masked=is_masked,
        mask_prob=jnp.broadcast_to(mask_prob, tokens.shape),
        is_response=is_response,
        is_safe=is_safe,
    )


def next_tokens(tokens: jax.Array, is_response: jax.Array, is_safe: jax.Array, *, eos_id: int) -> NoisedBatch:
    """The targets of one batch for a causal model, which sees the rows as they are.

    The response is scored up to its first [EOS]; the padding behind it is not, for no one decodes past an [EOS]. In
    harmful rows every scored position has the target [EOS], the first one included: the request alone is answered
    with the end, and so is any beginning of a harmful answer.

    Args: as in `corrupt`; `eos_id` is [EOS] itself, which also tells where a response ends.
    """
    tokens, is_response, is_safe = _as_arrays(tokens, is_response, is_safe)
    is_end = is_response & (tokens == eos_id)
    num_ends_before = jnp.cumsum(is_end, axis=1) - is_end  # (B, T)
    return NoisedBatch(
        tokens=jnp.where(is_safe[:, None], tokens, eos_id),
        noisy_tokens=tokens,
        is_masked=is_response & (num_ends_before == 0),
        mask_prob=jnp.ones(tokens.shape),
        is_response=is_response,
        is_safe=is_safe,
    )
