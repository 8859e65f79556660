"""Decoding with LLaDA-8B-Instruct in bfloat16: 8 prompts of 128 tokens, answers of 128 in blocks of 32.

python -m launch.compile --config configs/llada_8b_sample.py --topology v5e:2x2
python -m a2d_jax.generate --checkpoint checkpoints/LLaDA-8B-Instruct --mesh 1,1,4 --prompt TEXT

By the TPU compiler (docs/tpu.md): 4.82 GB of a v5e chip's 17.2, weights 4.01 and the rest 0.81; a pass over the 8 rows
takes at least 37 ms, all of it arithmetic.
"""

from launch.settings import sample_config


def get_config():
    config = sample_config(
        "checkpoints/LLaDA-8B-Instruct", batch_size=8, prompt_length=128, gen_length=128, steps=128, block_length=32
    )
    config.mesh.data, config.mesh.tensor = 1, -1  # four chips share the weights: each pass reads all of them
    return config
