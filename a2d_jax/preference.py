"""Preference optimisation of masked-diffusion models with low variance: VRPO, the method behind LLaDA 1.5.

    loss = -log sigmoid(beta [(B(y_w) - B_ref(y_w)) - (B(y_l) - B_ref(y_l))])       y_w chosen, y_l rejected
    B(y) = E over l ~ U{1..L} and l masked tokens of  (L / l) sum over masked of log p(y_i | prompt, the rest)

B bounds log p(y | prompt) from below, and is known by samples only. What they scatter goes through the sigmoid and
becomes bias and variance of the gradient, so all samples are spent where they help (VRPO, section 3):

  * several masks of each response, each with an l of its own (never several masks at one l);
  * the same masks for policy and reference: what both find hard cancels, and equal models have margin 0 exactly.

Two more here: the l of one response are spread evenly over 1..L, and masks come in antithetic pairs, l tokens and the
other L - l with one of the l, which has L + 1 - l masked; so both of a pair have the right distribution, and together
they score every token of the response, one of them twice.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from a2d_jax.likelihood import num_masked_strata


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Settings of the preference loss.

    beta: how far the policy may move from the reference; smaller is further.
    num_samples: masks of each response.
    is_antithetic: whether they come in pairs; then `num_samples` is even.
    sft_weight: of the ordinary loss of the chosen response, added to the preference loss.
    """

    beta: float = 0.2
    num_samples: int = 8
    is_antithetic: bool = True
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.num_samples < 1 or self.sft_weight < 0:
            raise ValueError(
                f"preference.beta={self.beta}, num_samples={self.num_samples}, sft_weight={self.sft_weight}; give "
                "beta > 0, num_samples >= 1, sft_weight >= 0."
            )
        if self.is_antithetic and self.num_samples % 2:
            raise ValueError(
                f"preference.num_samples={self.num_samples} with antithetic pairs; give an even number, or set "
                "is_antithetic=False."
            )


class ElboSamples(NamedTuple):
    """Masked copies of each response, M of them; the same ones for policy and reference."""

    is_masked: jax.Array  # (B, M, T) bool
    weights: jax.Array  # (B, M, T) float32: L / (l M) where masked, else 0


def draw_samples(key: jax.Array, is_response: jax.Array, config: PreferenceConfig) -> ElboSamples:
    """Masks over the response tokens (B, T) of each row, which has one at least."""
    num_drawn = config.num_samples // 2 if config.is_antithetic else config.num_samples
    length = jnp.sum(is_response, axis=1, keepdims=True)  # (B, 1)
    first_key, order_key = jax.random.split(key)
    first = jax.random.randint(first_key, length.shape, 1, length + 1)
    num_masked = num_masked_strata(first, num_drawn, length)[..., None]  # (B, drawn, 1)
    uniforms = jax.random.uniform(order_key, (is_response.shape[0], num_drawn, is_response.shape[1]))
    is_response = is_response[:, None]  # (B, 1, T)
    # Ranks of random numbers are a random permutation of each response; what is none of it comes last.
    ranks = jnp.argsort(jnp.argsort(jnp.where(is_response, uniforms, jnp.inf), axis=2), axis=2)  # (B, drawn, T)
    is_masked = ranks < num_masked
    length = length[..., None]
    if config.is_antithetic:
        is_masked = jnp.concatenate([is_masked, (ranks >= num_masked - 1) & is_response], axis=1)  # (B, M, T)
        num_masked = jnp.concatenate([num_masked, length + 1 - num_masked], axis=1)
    return ElboSamples(is_masked, jnp.where(is_masked, length / (num_masked * config.num_samples), 0.0))


def preference_losses(nll: jax.Array, reference_nll: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Loss and margin of each pair.

    Args:
      nll, reference_nll: (P, 2) float32, estimates of -B of the chosen and the rejected response, from the same masks.
    Returns:
      losses (P,) and margins (P,): beta times how much more the policy has moved towards the chosen one.
    """
    gains = reference_nll - nll  # (P, 2)
    margins = beta * (gains[:, 0] - gains[:, 1])
    return jax.nn.softplus(-margins), margins
