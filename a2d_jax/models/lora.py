"""Low-rank adapters (LoRA): y = x W + (alpha / r) dropout(x) A B, held by our own `Linear`, frozen W.

`add_lora` gives the chosen projections their A and B; `merge_adapter` adds them into W and drops them. Target names
are the ones users know from the checkpoint's own code, so `ff_out` on LLaDA means the down projection of each block
*and* the untied head, as PEFT's suffix match does; our own names work for every family.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from a2d_jax.config import CAUSAL_FAMILIES, ModelConfig
from a2d_jax.models.naming import adapter_modules, projections
from a2d_jax.sharding import logical_axes, partition_spec

# The A2D paper adapts everything but the attention's output projection; the names follow each family's code.
_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS = {
    "llada": ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj", "ff_out"),
    **dict.fromkeys(("dream", *CAUSAL_FAMILIES), _LLAMA_TARGETS),
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapter settings; the defaults are the A2D paper's. Empty `targets`: the family's default.

    `targets` may be given as any sequence of names, or as one name.
    """

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()

    def __post_init__(self):
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets or ())
        object.__setattr__(self, "targets", targets)  # a list does not hash, and programs are compiled for it

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def with_targets(self, config: ModelConfig) -> "LoRAConfig":
        """The same settings with the family's default targets filled in."""
        return dataclasses.replace(self, targets=self.targets or DEFAULT_TARGETS[config.family])


def attach(linear: nnx.Module, lora: LoRAConfig, a: jax.Array, b: jax.Array) -> None:
    """Gives one projection its A (..., in, R) and B (..., R, out), float32, split over the mesh as its kernel is."""
    in_axis, out_axis = linear.kernel.logical_axes
    a, b = nnx.LoRAParam(a, logical_axes=(in_axis, "rank")), nnx.LoRAParam(b, logical_axes=("rank", out_axis))
    sharding = getattr(linear.kernel[...], "sharding", None)  # a model of shapes alone lies nowhere
    if isinstance(sharding, NamedSharding):
        for variable in (a, b):
            spec = partition_spec(logical_axes(variable), variable.shape, sharding.mesh)
            variable[...] = jax.device_put(variable[...], NamedSharding(sharding.mesh, spec))
    linear.lora_a, linear.lora_b = a, b
    linear.lora_scale, linear.lora_dropout = lora.scale, lora.dropout


def adaptable(model: nnx.Module, path: str) -> nnx.Module:
    """The projection at `path`; ValueError where it has no dense weights for an adapter to change."""
    linear = model.projection(path)
    if not hasattr(linear, "kernel"):
        raise ValueError(
            f"{path} is compressed and takes no adapter: its own low-rank factors are trained in its place "
            "(config.lora=None). Export the checkpoint as dense weights to adapt those."
        )
    return linear


def adapted(model: nnx.Module) -> list[str]:
    """Paths of the projections that carry an adapter."""
    return [path for path in projections(model.config) if model.projection(path).lora_a is not None]


def add_lora(model: nnx.Module, lora: LoRAConfig, rngs: nnx.Rngs) -> None:
    """Gives each target projection a random A (uniform, as PEFT) and a zero B, in place: outputs stay as they were.

    Raises:
      ValueError: a target that names no projection of this model, an adapter already present, or a rank below 1.
    """
    if lora.rank < 1:
        raise ValueError(f"LoRA rank={lora.rank}; it must be at least 1.")
    if model.lora is not None:
        raise ValueError("the model already carries an adapter; call merge_adapter(model) first.")
    lora = lora.with_targets(model.config)
    for path in adapter_modules(model.config, lora.targets):
        linear = adaptable(model, path)
        *stack, fan_in, fan_out = linear.kernel.shape
        bound = 1 / math.sqrt(fan_in)  # Kaiming uniform with a = sqrt(5), the initialiser of torch.nn.Linear
        a = jax.random.uniform(rngs.params(), (*stack, fan_in, lora.rank), jnp.float32, -bound, bound)
        attach(linear, lora, a, jnp.zeros((*stack, lora.rank, fan_out), jnp.float32))
    model.lora = lora


def merge_adapter(model: nnx.Module) -> nnx.Module:
    """W <- W + scale A B in every adapted projection, in float32, in place; returns the model, now without adapter."""
    for path in adapted(model):
        linear = model.projection(path)
        kernel = linear.kernel[...]
        update = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision=jax.lax.Precision.HIGHEST)
        linear.kernel[...] = (kernel.astype(jnp.float32) + linear.lora_scale * update).astype(kernel.dtype)
        linear.lora_a = linear.lora_b = None
        linear.lora_scale = linear.lora_dropout = 0.0
    model.lora = None
    return model
