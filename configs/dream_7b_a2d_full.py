"""A2D alignment of Dream-v0-Instruct-7B, every weight: the setting of LLaDA-8B.

    python -m a2d_jax.train --config configs/dream_7b_a2d_full.py --workdir runs/dream_7b_a2d_full \
        --config.model.checkpoint=checkpoints/Dream-v0-Instruct-7B --config.data.files="('data/beavertails.jsonl',)"

Not yet compiled for a TPU slice.
"""

from configs import llada_8b_a2d_full


def get_config():
    config = llada_8b_a2d_full.get_config()
    config.model.checkpoint = "checkpoints/Dream-v0-Instruct-7B"
    return config
