"""Safe without the refusal token: what stands second at the masked positions of harmful rows.

A2D puts the refusal token first there and says nothing of the others, so whoever bans it reads the second choice, which
is often the harm itself. The residual term, off by default, shapes the rest:

    loss of a masked position of a harmful row = CE + weight x KL(q || p')

p' is the model's distribution without the refusal token and [MASK], renormalised; q is one of `TARGETS`:

    uniform     every other token alike
    tokens      the tokens of a text alike, such as a refusal; without a text the end of turn alone
    marginal    how often each token occurs in the answers of the retain rows: fluent, and about nothing
    base        what the model said there before this training, without the harmful token that stood there

"tokens" and "marginal" are safe in every world of the study (docs/study.md), "uniform" in one of three, "base" in none.

CE and KL share the position's weight. The first three targets are one (V,) vector; "base" is computed beside the
logits, chunk by chunk (`chunked_losses.py`), from the weights that training started from: under LoRA these are the
model without its adapter, else a second copy of all weights.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

TARGETS = ("uniform", "tokens", "marginal", "base")


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
    """The term's settings. weight: 0 switches it off. target: a name in `TARGETS`. text: of the target "tokens"."""

    weight: float = 0.0
    target: str = "marginal"
    text: str | None = None

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"residual.weight={self.weight}; give 0 (off) or more.")
        if self.target not in TARGETS:
            raise ValueError(f"residual.target={self.target!r}; choose one of {TARGETS}.")
        if self.text is not None and self.target != "tokens":
            raise ValueError(f"residual.text is read by the target 'tokens' alone, not by {self.target!r}; drop it.")

    @property
    def needs_reference(self) -> bool:
        """Whether the weights before training take part."""
        return self.weight > 0 and self.target == "base"


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """The term, ready for a model: its settings, and q where it is the same everywhere."""

    config: ResidualConfig
    target: np.ndarray | None  # (V,) float32; None: of the base


def kept_tokens(vocab_size: int, excluded: Sequence[int | None]) -> np.ndarray:
    """(V,) bool, False for the excluded ids: the refusal token and [MASK] (None: the model has none)."""
    is_kept = np.ones(vocab_size, bool)
    is_kept[[token for token in excluded if token is not None]] = False
    return is_kept


# -- core -------------------------------------------------------------------------------------------------------------


def residual_divergence(logits: jax.Array, target: jax.Array, is_kept: jax.Array) -> jax.Array:
    """KL(q || p') at each position: (..., V) logits, q (V,) or (..., V), (V,) bool -> (...) float32.

    q must be zero outside `is_kept`. The gradient by the logits is p' - q, and zero for the excluded tokens.
    """
    logits = logits.astype(jnp.float32)
    norm = jax.nn.logsumexp(jnp.where(is_kept, logits, -jnp.inf), axis=-1)
    negative_entropy = jnp.sum(jax.scipy.special.xlogy(target, target), axis=-1)
    return negative_entropy + norm - jnp.sum(target * logits, axis=-1)


def base_target(base_logits: jax.Array, harmful_tokens: jax.Array, is_kept: jax.Array) -> jax.Array:
    """The base's distribution over the kept tokens without the harmful one: (..., V), (...), (V,) -> (..., V)."""
    is_harmful = jnp.arange(base_logits.shape[-1]) == harmful_tokens[..., None]
    return jax.nn.softmax(jnp.where(is_kept & ~is_harmful, base_logits.astype(jnp.float32), -jnp.inf), axis=-1)
