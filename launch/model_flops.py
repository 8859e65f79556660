"""FLOPs that a method needs, whatever the program: matrix products alone, two a multiply-add."""

from a2d_jax.config import ModelConfig
from a2d_jax.models.lora import LoRAConfig


def forward_flops(config: ModelConfig, num_tokens: int, length: int) -> tuple[float, float]:
    """Matmul FLOPs of one forward pass: (by weights, by attention between positions)."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.width * (2 * heads + 2 * kv_heads + 3 * config.mlp_dim)
    weights = 2.0 * num_tokens * (config.num_layers * layer + config.width * config.vocab_size)
    return weights, 4.0 * num_tokens * config.num_layers * length * heads


def train_flops(config: ModelConfig, lora: LoRAConfig | None, adapter_size: int, num_tokens: int, length: int) -> float:
    """Matmul FLOPs that one update needs: forward, gradient of activations, and gradient of what is trained.

    Args:
      adapter_size: parameters of the adapter, where one is trained.
    """
    weights, attention = forward_flops(config, num_tokens, length)
    if lora is None:
        return 3 * (weights + attention)
    return 2 * weights + 3 * attention + 6.0 * num_tokens * adapter_size
