"""Which masked positions a step reveals, with which tokens, and how many: the rules of decoding as pure functions.

Two families of rules. "llada": the masks of a block are spread evenly over its steps, temperature is Gumbel noise on
the logits, and confidence comes from the plain softmax. "dream": the number revealed follows a time grid from 1 down
to eps, temperature and truncation reshape the probabilities, and those are also the confidence.
"""

import jax
import jax.numpy as jnp
import numpy as np

ORDERS = ("confidence", "margin", "entropy", "left_to_right", "right_to_left", "random")
METHODS = ("llada", "dream")


# -- how many ---------------------------------------------------------------------------------------------------------


def even_quota(num_masks: jax.Array, step: jax.Array, num_steps: int) -> jax.Array:
    """Tokens to reveal at this step: `num_masks` (B,) spread over `num_steps`, the remainder on the first steps."""
    return num_masks // num_steps + (step < num_masks % num_steps)


def dream_reveal_rate(num_steps: int, eps: float) -> np.ndarray:
    """Share of the remaining masks that each step reveals, (num_steps,): 1 - s / t on a grid 1 -> eps; last, all."""
    grid = np.linspace(1, eps, num_steps + 1, dtype=np.float32)
    rate = 1 - grid[1:] / grid[:-1]
    rate[-1] = 1
    return rate


# -- which tokens -----------------------------------------------------------------------------------------------------


def gumbel_argmax(logits: jax.Array, uniforms: jax.Array | None, temperature: float) -> jax.Array:
    """Token of each position: argmax of logits - T log(-log u), which is LLaDA's exp(logits) / (-log u)^T."""
    if temperature > 0:
        logits = logits - temperature * jnp.log(-jnp.log(uniforms))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (B, T)


def truncate(logits: jax.Array, top_p: float | None, top_k: int | None) -> jax.Array:
    """-inf outside the nucleus of mass `top_p` (the token that crosses it stays) and outside the `top_k` largest."""
    if top_p is not None and top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        mass_before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(descending, axis=-1)
        num_kept = jnp.sum(mass_before <= top_p, axis=-1, keepdims=True)  # the first is always kept
        smallest = jnp.take_along_axis(descending, num_kept - 1, axis=-1)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_k is not None:
        smallest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


# -- which positions --------------------------------------------------------------------------------------------------


def order_scores(order: str, probs: jax.Array, tokens: jax.Array, uniforms: jax.Array | None) -> jax.Array:
    """Score of each position, (B, T) float32; the highest are revealed first.

    Args:
      probs: (B, T, V) float32.
      tokens: (B, T) the token chosen at each position.
      uniforms: (B, T), for the random order.
    """
    if order == "confidence":
        return jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0]
    if order == "margin":
        top, second = jnp.moveaxis(jax.lax.top_k(probs, 2)[0], -1, 0)
        return top - second
    if order == "entropy":  # minus the entropy: the most certain first
        return jnp.sum(probs * jnp.log(probs + 1e-10), axis=-1)
    if order == "random":
        return uniforms
    positions = jnp.broadcast_to(jnp.arange(probs.shape[1], dtype=jnp.float32), probs.shape[:2])
    return positions if order == "right_to_left" else -positions


def highest(scores: jax.Array, is_candidate: jax.Array, quota: jax.Array) -> jax.Array:
    """(B, T) bool: in each row the `quota` (B,) candidates with the highest scores, the left one on ties."""
    ranking = jnp.argsort(jnp.where(is_candidate, -scores, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(ranking, axis=1)  # place of each position in the ranking
    return is_candidate & (rank < quota[:, None])
