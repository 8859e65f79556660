"""Which masked positions a step reveals, with which tokens, and how many: the rules of decoding as pure functions.

Two families of rules. "llada": the masks of a block are spread evenly over its steps, temperature is Gumbel noise on
the logits, and confidence comes from the plain softmax. "dream": the number revealed follows a time grid from 1 down
to eps, temperature and truncation reshape the probabilities, and those are also the confidence.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

ORDERS = ("confidence", "margin", "entropy", "left_to_right", "right_to_left", "random")
METHODS = ("llada", "dream")
CHUNK = 32  # of the vocabulary; of LLaDA's it divides the shares of 2, 4, 8 or 16 chips


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


# -- guidance ---------------------------------------------------------------------------------------------------------


def guide(cond: jax.Array, uncond: jax.Array, cfg_scale: float) -> jax.Array:
    """Logits under classifier-free guidance; `uncond` are those with the prompt masked."""
    return uncond + (cfg_scale + 1) * (cond - uncond)


# -- which tokens -----------------------------------------------------------------------------------------------------


def _chunks(logits: jax.Array) -> jax.Array:
    """(..., V) -> (..., V / c, c). What is reduced over c first is read once, and nothing of its size is written."""
    return logits.reshape(*logits.shape[:-1], -1, math.gcd(logits.shape[-1], CHUNK))


def argmax(logits: jax.Array, never: Sequence[int] = ()) -> jax.Array:
    """The lowest index of the largest value, (...) int32; the indices in `never` do not count.

    The largest value of each chunk, then its place within the best chunk. A copy of the logits without `never` would
    take longer than that, and so do XLA's argmax on a CPU, and a comparison of all with the largest.
    """

    def counted(values, index):  # `never` is applied to a few chunks, not to all of the logits
        return functools.reduce(lambda x, out: jnp.where(index == out, -jnp.inf, x), never, values)

    chunks = _chunks(logits)  # (..., V / c, c)
    size = chunks.shape[-1]
    within = jnp.arange(size)
    largest = jnp.max(chunks, axis=-1)  # (..., V / c)
    for number in sorted({index // size for index in never}):
        of_chunk = counted(chunks[..., number, :], number * size + within)
        largest = largest.at[..., number].set(jnp.max(of_chunk, axis=-1))
    best = jnp.argmax(largest, axis=-1, keepdims=True)  # (..., 1)
    values = jnp.take_along_axis(chunks, best[..., None], axis=-2)[..., 0, :]  # (..., c)
    values = counted(values, best * size + within)
    return (best[..., 0] * size + jnp.argmax(values, axis=-1)).astype(jnp.int32)


def log_normaliser(logits: jax.Array) -> jax.Array:
    """log sum exp over the vocabulary, (...), chunk by chunk and then over the chunks."""
    return jax.nn.logsumexp(jax.nn.logsumexp(_chunks(logits), axis=-1), axis=-1)


def gumbel_argmax(
    logits: jax.Array, uniforms: jax.Array | None, temperature: float, never: Sequence[int] = ()
) -> jax.Array:
    """Token of each position: argmax of logits - T log(-log u), which is LLaDA's exp(logits) / (-log u)^T."""
    if temperature > 0:
        logits = logits - temperature * jnp.log(-jnp.log(uniforms))
    return argmax(logits, never)  # (B, C)


def _lowest_cutoff(logits: jax.Array, weights: jax.Array, limit: float) -> jax.Array:
    """The smallest value of each row such that the weights of larger logits add up to `limit` at most, (..., 1).

    Bisection over the bits of a float32, which order as integers: 32 sums over the vocabulary instead of a sort.
    """

    def flip(bits):  # between the bits of a float32 and integers in the same order
        return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow, rounded down
        cutoff = jax.lax.bitcast_convert_type(flip(middle), jnp.float32)
        is_enough = jnp.sum(jnp.where(logits > cutoff, weights, 0), axis=-1, keepdims=True) <= limit
        return jnp.where(is_enough, low, middle + 1), jnp.where(is_enough, middle, high)

    keys = flip(jax.lax.bitcast_convert_type(logits, jnp.int32))
    bounds = jnp.min(keys, axis=-1, keepdims=True), jnp.max(keys, axis=-1, keepdims=True)
    _, high = jax.lax.fori_loop(0, 32, halve, bounds)
    return jax.lax.bitcast_convert_type(flip(high), jnp.float32)


def truncate(logits: jax.Array, top_p: float | None, top_k: int | None) -> jax.Array:
    """-inf outside the nucleus of mass `top_p` (the token that crosses it stays) and outside the `top_k` largest;
    (..., V) -> (..., V)."""
    if top_p is not None and top_p < 1:
        cutoff = _lowest_cutoff(logits, jax.nn.softmax(logits, axis=-1), top_p)
        logits = jnp.where(logits < cutoff, -jnp.inf, logits)
    if top_k is not None:
        cutoff = _lowest_cutoff(logits, jnp.ones_like(logits), top_k - 1)
        logits = jnp.where(logits < cutoff, -jnp.inf, logits)
    return logits


# -- which positions --------------------------------------------------------------------------------------------------


def token_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """softmax(logits)[token] at each position, (B, C) float32, without the softmax of the other tokens."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen - log_normaliser(logits))


def order_scores(
    order: str, logits: jax.Array, confidence: jax.Array, positions: jax.Array, uniforms: jax.Array | None
) -> jax.Array:
    """Score of each position, (B, C) float32; the highest are revealed first.

    Args:
      logits: (B, C, V) float32.
      confidence: (B, C) probability of the token chosen at each position.
      positions: (B, C) where they stand in the row.
      uniforms: (B, C), for the random order.
    """
    if order == "confidence":
        return confidence
    if order == "margin":
        index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        is_top = index == argmax(logits)[..., None]
        second = jnp.max(jnp.where(is_top, -jnp.inf, logits), axis=-1)
        norm = log_normaliser(logits)
        return jnp.exp(jnp.max(logits, axis=-1) - norm) - jnp.exp(second - norm)
    if order == "entropy":  # minus the entropy: the most certain first
        probs = jnp.exp(logits - log_normaliser(logits)[..., None])
        return jnp.sum(probs * jnp.log(probs + 1e-10), axis=-1)
    if order == "random":
        return uniforms
    return (positions if order == "right_to_left" else -positions).astype(jnp.float32)


def ranks(scores: jax.Array, is_candidate: jax.Array) -> jax.Array:
    """(B, C) int32: 0 for each row's candidate with the highest score, the left one on ties, and so on."""
    ranking = jnp.argsort(jnp.where(is_candidate, -scores, jnp.inf), axis=1, stable=True)
    return jnp.argsort(ranking, axis=1)  # place of each position in the ranking


def highest(scores: jax.Array, is_candidate: jax.Array, quota: jax.Array) -> jax.Array:
    """(B, C) bool: in each row the `quota` (B,) candidates with the highest scores."""
    return is_candidate & (ranks(scores, is_candidate) < quota[:, None])


def above_threshold(confidence, scores, is_candidate, threshold: float) -> jax.Array:
    """(B, C) bool: the candidates at least so confident, and in any case the one with the highest score."""
    return is_candidate & ((confidence >= threshold) | (ranks(scores, is_candidate) == 0))


def factor_quota(confidence: jax.Array, is_candidate: jax.Array, factor: float) -> jax.Array:
    """(B,) int32: the largest n for which the n-th highest confidence c has (n + 1) (1 - c) < factor; at least 1.

    Fast-dLLM, theorem 1: n tokens at once are then what they would be one after the other.
    """
    descending = -jnp.sort(jnp.where(is_candidate, -confidence, jnp.inf), axis=1)  # (B, C), -inf behind the candidates
    counts = jnp.arange(1, confidence.shape[1] + 1)
    is_safe = (counts + 1) * (1 - descending) < factor  # true up to some n: both factors grow with it
    return jnp.maximum(jnp.sum(is_safe, axis=1), 1)
