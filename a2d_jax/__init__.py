"""A2D in JAX: token-level safety alignment of masked-diffusion language models.

The names below are the library; the programs are run with `python -m a2d_jax.NAME`, and the README lists them.
`a2d_jax.generate` is the function; the program of that name is only ever run with `-m`.
"""

from a2d_jax.config import ModelConfig, load_config
from a2d_jax.hf_io import save_pretrained
from a2d_jax.losses import a2d_loss
from a2d_jax.masking import NoisedBatch, corrupt
from a2d_jax.models.lora import LoRAConfig, add_lora, merge_adapter
from a2d_jax.models.transformer import DTypes, Transformer
from a2d_jax.peft_io import load_adapter, save_adapter
from a2d_jax.pretrained import load_pretrained
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import SampleResult, generate, infill
from a2d_jax.sharding import make_mesh
from a2d_jax.tokenizer import load_tokenizer

__all__ = [
    "DTypes",
    "LoRAConfig",
    "ModelConfig",
    "NoisedBatch",
    "SampleResult",
    "SamplerConfig",
    "Transformer",
    "a2d_loss",
    "add_lora",
    "corrupt",
    "generate",
    "infill",
    "load_adapter",
    "load_config",
    "load_pretrained",
    "load_tokenizer",
    "make_mesh",
    "merge_adapter",
    "save_adapter",
    "save_pretrained",
]
