"""Low-rank adapters (LoRA): y = x W + (alpha / r) dropout(x) A B, held by our own `Linear`, frozen W.

`add_lora` gives the chosen projections their A and B; `merge_adapter` adds them into W and drops them. Target names are the
ones users know from the checkpoint's own code, so `ff_out` on LLaDA means the down projection of each block *and* the
untied head, as PEFT's suffix match does; our own names work for every family.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from a2d_jax.config import ModelConfig
from a2d_jax.models.naming import adapter_modules

# The A2D paper adapts everything but the attention's output projection; the names follow each family's code.
DEFAULT_TARGETS = {
    "llada": ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj", "ff_out"),
    "dream": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapter settings; the defaults are the A2D paper's. Empty `targets`: the family's default."""

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def resolved_targets(self, config: ModelConfig) -> tuple[str, ...]:
        return self.targets or DEFAULT_TARGETS.get(config.family, DEFAULT_TARGETS["dream"])


def add_lora(model: nnx.Module, lora: LoRAConfig, rngs: nnx.Rngs) -> None:
    """Gives each target projection a random A (uniform, as PEFT) and a zero B, in place: outputs stay as they were.

    Raises:
      ValueError: a target that names no projection of this model, an adapter already present, or a rank below 1.
    """
    if lora.rank < 1:
        raise ValueError(f"LoRA rank={lora.rank}; it must be at least 1.")
    if model.lora is not None:
        raise ValueError("the model already carries an adapter; call merge_adapter(model) first.")
    targets = lora.resolved_targets(model.config)
    for path in adapter_modules(model.config, targets):
        linear = model.projection(path)
        *stack, fan_in, fan_out = linear.kernel.shape
        in_axis, out_axis = linear.kernel.logical_axes
        bound = 1 / math.sqrt(fan_in)  # Kaiming uniform with a = sqrt(5), the initialiser of torch.nn.Linear
        a = jax.random.uniform(rngs.params(), (*stack, fan_in, lora.rank), jnp.float32, -bound, bound)
        linear.lora_a = nnx.LoRAParam(a, logical_axes=(in_axis, "rank"))
        linear.lora_b = nnx.LoRAParam(jnp.zeros((*stack, lora.rank, fan_out)), logical_axes=("rank", out_axis))
        linear.lora_scale, linear.lora_dropout = lora.scale, lora.dropout
    model.lora = dataclasses.replace(lora, targets=targets)


def merge_adapter(model: nnx.Module) -> nnx.Module:
    """W <- W + scale A B in every adapted projection, in float32, in place; returns the model, now without adapter."""
    if model.lora is None:
        return model
    for path in adapter_modules(model.config, model.lora.targets):
        linear = model.projection(path)
        kernel = linear.kernel[...]
        update = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision=jax.lax.Precision.HIGHEST)
        linear.kernel[...] = (kernel.astype(jnp.float32) + linear.lora_scale * update).astype(kernel.dtype)
        linear.lora_a = linear.lora_b = None
        linear.lora_scale = linear.lora_dropout = 0.0
    model.lora = None
    return model
