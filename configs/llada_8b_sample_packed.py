"""Decoding with LLaDA-8B-Instruct compressed to 2 bits (`configs/llada_8b_odlri.py`): 8 prompts of 128 tokens.

python -m launch.compile --config configs/llada_8b_sample_packed.py --topology v5e:2x2
python -m launch.compile --config configs/llada_8b_sample_packed.py --topology v5e:1x1
python -m a2d_jax.generate --checkpoint packed/LLaDA-8B-Instruct --prompt TEXT

By the TPU compiler (docs/tpu.md), a pass over the 8 rows, the packed model whole on each chip (5.16 GB):

    v5e:1x1  5.71 of a chip's 17.2 GB, at least 309 ms
    v5e:2x2  5.28 of a chip's 17.2 GB, at least 87 ms

Both are bound by memory, by estimate by the rotations of activations rather than by weights.
"""

from configs import llada_8b_odlri
from launch.settings import sample_config
from odlri_jax.decompose_config import DecomposeConfig


def get_config():
    config = sample_config(
        "checkpoints/LLaDA-8B-Instruct",
        batch_size=8,
        prompt_length=128,
        packed=DecomposeConfig(**llada_8b_odlri.get_config().decompose),
        gen_length=128,
        steps=128,
        block_length=32,
    )
    config.mesh.data = -1  # the packed weights lie whole on each chip, which takes its rows
    return config
