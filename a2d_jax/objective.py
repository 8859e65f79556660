"""What one update optimises, and what it reports."""

import dataclasses

from a2d_jax.preference import PreferenceConfig
from a2d_jax.residual import Residual

# loss = loss_harmful + loss_retain, what harmful and retain rows add to it; grad_norm is taken before clipping;
# num_masked counts tokens, num_harmful rows.
METRICS = ("loss", "loss_harmful", "loss_retain", "learning_rate", "grad_norm", "num_masked", "num_harmful")
PREFERENCE_METRICS = ("margin", "accuracy")  # means over the pairs: of the margin, and of its being above 0


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a run, how rows are corrupted for it, and in how many parts its gradient is taken.

    name: one of `losses.OBJECTIVES`. mask_id, refusal_id: the model's [MASK], and what harmful rows become: [EOS], or
    the run's refusal token.
    """

    name: str
    mask_id: int | None
    refusal_id: int
    mask_eps: float = 1e-3
    time_range: tuple[float, float] = (0.0, 1.0)
    grad_accum_steps: int = 1
    seed: int = 0
    preference: PreferenceConfig | None = None  # rows are pairs, and the loss is that of `a2d_jax/preference.py`
    residual: Residual | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what an update reports."""
        return METRICS + (() if self.preference is None else PREFERENCE_METRICS)
