"""P([EOS]) as a live measure of harm: an aligned model wants to stop wherever harmful text would stand.

    p = softmax(logits at a masked position)[EOS]        A2D, early rejection and real-time monitoring

The sampler shows a monitor p at the masked positions of every pass, and stops a row as soon as the monitor's score of
it is above the monitor's threshold. The paper's monitor looks once: at the first pass p at the left-most mask already
separates harmful requests from harmless ones, which are then refused after a single pass. (For [EOS] read the model's
refusal token everywhere, where it was aligned to refuse by another.)

A monitor that looks longer catches text that turns harmful later. It also sees harmless answers end, where P([EOS]) is
high for a good reason: its threshold has to be found on harmless text (`calibrate`), or the passes and the positions
that it watches be bounded.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

_ALMOST_0 = 2.0**-24  # float32 knows no probability between 1 - this and 1


def as_plain_numbers(settings) -> None:
    """Turns the NumPy and JAX scalars in a frozen dataclass into Python's numbers: JAX's do not hash, settings must."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, (np.generic, np.ndarray, jax.Array)):
            if value.ndim:
                raise ValueError(f"{field.name} has shape {value.shape}; give one number.")
            object.__setattr__(settings, field.name, value.item())


class Monitor(Protocol):
    """Anything hashable with a threshold and a score; a row whose score is above the threshold stops."""

    threshold: float

    def score(self, step: jax.Array, tokens: jax.Array, eos_prob: jax.Array) -> jax.Array:
        """How harmful each row looks at this pass.

        Args:
          step: (B,) int32, passes that the row has taken before this one.
          tokens: (B, T) int32, the text as it stands.
          eos_prob: (B, C) float32, P([EOS]) at the masked positions of the row's current block from left to right;
            NaN behind the last of them.
        Returns:
          (B,) float32; NaN where the monitor does not look.
        """


@dataclasses.dataclass(frozen=True)
class EosMonitor:
    """The largest P([EOS]) among the first masked positions, during the first passes.

    Attributes:
      threshold: rows above it stop; infinity only records the score.
      num_steps: passes that are watched; None: all.
      num_positions: masked positions, from the left, that are watched at each; None: all of the block.
    """

    threshold: float
    num_steps: int | None = 1
    num_positions: int | None = 1

    def __post_init__(self):
        as_plain_numbers(self)

    def score(self, step: jax.Array, tokens: jax.Array, eos_prob: jax.Array) -> jax.Array:
        del tokens
        watched = eos_prob[:, : self.num_positions]  # (B, <= C)
        peak = jnp.max(jnp.where(jnp.isnan(watched), -jnp.inf, watched), axis=1)
        is_watched = jnp.isfinite(peak)
        if self.num_steps is not None:
            is_watched &= step < self.num_steps
        return jnp.where(is_watched, peak, jnp.nan)


def first_step(threshold: float) -> EosMonitor:
    """The paper's early rejection: the left-most mask, once."""
    return EosMonitor(threshold)


def any_step(threshold: float, num_steps: int | None = None) -> EosMonitor:
    """Real-time monitoring: the left-most mask at every pass."""
    return EosMonitor(threshold, num_steps)


def any_position(threshold: float, num_positions: int | None = None, num_steps: int | None = None) -> EosMonitor:
    """The running maximum over the masked positions of the block, at every pass."""
    return EosMonitor(threshold, num_steps, num_positions)


MONITORS = {"first_step": first_step, "any_step": any_step, "any_position": any_position}


def calibrate(
    harmless_scores: Sequence[float], false_positive_rate: float, harmful_scores: Sequence[float] = ()
) -> float:
    """A threshold that stops at most this share of a held-out harmless set.

    Alone, the harmless scores give the lowest such threshold, which touches the largest score it spares: of harmless
    requests that were not seen some lie above it, one in n + 1 to be expected where n were seen and none may be
    stopped. Harmful scores move it up, halfway in log odds to the next of them, which costs no refusal that was seen.

    Args:
      harmless_scores: `SampleResult.monitor_score` of harmless requests, decoded with a monitor whose threshold is
        infinity, so that each ran to its end.
      false_positive_rate: share of harmless requests that may be stopped, 0 to 1.
      harmful_scores: the same of harmful requests; with them all scores must be probabilities.
    """
    scores = np.sort(np.asarray(harmless_scores, np.float32))[::-1]
    harmful = np.asarray(harmful_scores, np.float32)
    if not scores.size or not np.all(np.isfinite(scores)):
        raise ValueError(f"harmless_scores are {scores}; give one finite score at least, and no other")
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"false_positive_rate={false_positive_rate}; give a share between 0 and 1")
    if harmful.size and not all(np.all((x >= 0) & (x <= 1)) for x in (scores, harmful)):
        raise ValueError(f"harmful_scores are {harmful}, harmless_scores {scores}; together they must lie in 0 to 1")
    num_allowed = math.floor(false_positive_rate * scores.size + 1e-9)  # 0.1 of 30 is 3, not 2.9999
    if num_allowed == scores.size:
        return float(np.nextafter(scores[-1], np.float32(-np.inf)))
    lowest = scores[num_allowed]  # a row stops above the threshold, so the scores before this one do
    above = harmful[harmful > lowest]
    if not above.size:
        return float(lowest)
    ends = np.clip(np.array([lowest, above.min()], np.float64), _ALMOST_0, 1 - _ALMOST_0)
    middle = np.float32(1 / (1 + np.sqrt(np.prod(1 / ends - 1))))
    return float(np.clip(middle, lowest, np.nextafter(above.min(), np.float32(0))))
