"""Monte-Carlo log likelihood of an answer under a masked-diffusion model, as LLaDA scores multiple choice.

Each sample masks l of the answer's L tokens, chosen uniformly, and scores them given the prompt and the rest:

    log p(answer | prompt)  ~  - mean over samples of  (L / l) sum over masked of CE

The l of one batch are stratified: they start at a random number and step evenly around 1 .. L. They are rounded
down; the published code rounds halves to even, which favours even l where L / batch size ends in a half. Drawing masks
(`perturb`) is apart from scoring (`sample_losses`), so that recorded masks can be scored again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from a2d_jax.losses import align_logits, cross_entropy, objective_of
from a2d_jax.orders import guide


class Perturbed(NamedTuple):
    """Samples of one answer, B of them; T is prompt and answer together."""

    noisy_tokens: jax.Array  # (B, T) int32
    is_masked: jax.Array  # (B, T) bool
    mask_prob: jax.Array  # (B, T) float32: l / L


def num_masked_strata(first: jax.Array, num_samples: int, length: int) -> jax.Array:
    """How many tokens each sample masks, (num_samples,) int32 from 1 to `length`: evenly spread, from `first` on."""
    return (first - 1 + jnp.arange(num_samples) * length // num_samples) % length + 1


def perturb(key: jax.Array, prompt: Sequence[int], answer: Sequence[int], num_samples: int, mask_id: int) -> Perturbed:
    """Draws `num_samples` masked copies of prompt + answer; the prompt is never masked."""
    prompt, answer = jnp.asarray(prompt, jnp.int32), jnp.asarray(answer, jnp.int32)
    length = answer.shape[0]
    first_key, order_key = jax.random.split(key)
    num_masked = num_masked_strata(jax.random.randint(first_key, (), 1, length + 1), num_samples, length)  # (B,)
    # Ranks of random numbers are a random permutation: those below l are a uniformly chosen set of l positions.
    ranks = jnp.argsort(jnp.argsort(jax.random.uniform(order_key, (num_samples, length)), axis=1), axis=1)
    is_masked = jnp.pad(ranks < num_masked[:, None], ((0, 0), (prompt.shape[0], 0)))  # (B, T)
    tokens = jnp.concatenate([prompt, answer])[None]  # (1, T)
    mask_prob = jnp.broadcast_to((num_masked / length)[:, None], is_masked.shape)
    return Perturbed(jnp.where(is_masked, mask_id, tokens), is_masked, mask_prob)


def sample_losses(
    model: Any,
    prompt: Sequence[int],
    answer: Sequence[int],
    perturbed: Perturbed,
    cfg_scale: float = 0.0,
    multiple_of: int = 1,
) -> np.ndarray:
    """(L / l) x the summed cross entropy of the masked tokens, (B,) float64, of each sample.

    Args:
      model: (tokens, attention_mask=None) -> logits, with a `config` that names mask_id and family.
      perturbed: from `perturb`, or recorded.
      cfg_scale: classifier-free guidance; the unconditional half sees the prompt masked.
      multiple_of: the prompt is padded on the left to a row length divisible by this, so that answers of many lengths
        compile few programs. The padding is hidden from the model.
    """
    config, num_rows, num_prompt = model.config, perturbed.noisy_tokens.shape[0], len(prompt)
    num_pad = -(num_prompt + len(answer)) % multiple_of
    pad_left = lambda array, value: jnp.pad(array, ((0, 0), (num_pad, 0)), constant_values=value)
    noisy_tokens = pad_left(perturbed.noisy_tokens, config.eos_id if num_pad else 0)  # (B, T)
    targets = pad_left(jnp.asarray([[*prompt, *answer]], jnp.int32), 0)  # (1, T)
    is_masked, mask_prob = pad_left(perturbed.is_masked, False), pad_left(perturbed.mask_prob, 1.0)
    attention_mask = None
    if num_pad:
        attention_mask = pad_left(jnp.ones(perturbed.noisy_tokens.shape, bool), False)

    logits = model(noisy_tokens, attention_mask=attention_mask)  # (B, T, V)
    if cfg_scale:
        is_prompt = jnp.arange(noisy_tokens.shape[1]) < num_pad + num_prompt
        unconditional = model(jnp.where(is_prompt, config.mask_id, noisy_tokens), attention_mask=attention_mask)
        logits = guide(logits, unconditional, cfg_scale)
    logits = align_logits(logits, objective_of(config.family))
    losses = cross_entropy(logits, jnp.broadcast_to(targets, noisy_tokens.shape)) / mask_prob  # (B, T)
    # Hundreds of terms of very different size: added up in double precision, on the host.
    losses = np.where(np.asarray(is_masked), np.asarray(losses, np.float64), 0.0).sum(axis=1)
    assert losses.shape == (num_rows,)
    return losses


def log_likelihood(
    model: Any,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    key: jax.Array | None = None,
    multiple_of: int = 1,
) -> float:
    """The estimate of log p(answer | prompt) from `mc_num` samples, stratified within each batch; in nats.

    The estimator bounds the log likelihood from below in expectation, as every ELBO does.
    """
    config = model.config
    if len(answer) < 1:
        raise ValueError("the answer has no token; give one at least")
    if config.mask_id is None:
        raise ValueError(f"this {config.family} model has no mask id; use a masked-diffusion model")
    if mc_num < 1 or mc_num % batch_size:
        raise ValueError(f"mc_num={mc_num} is no multiple of batch_size={batch_size}; batches are stratified whole")
    if config.family != "llada" and not len(prompt):
        raise ValueError(f"a {config.family} model predicts a token from the one before: give a prompt")
    key = jax.random.key(0) if key is None else key
    losses = []
    for batch_key in jax.random.split(key, mc_num // batch_size):
        perturbed = perturb(batch_key, prompt, answer, batch_size, config.mask_id)
        losses.append(sample_losses(model, prompt, answer, perturbed, cfg_scale, multiple_of))
    return -float(np.concatenate(losses).mean())
