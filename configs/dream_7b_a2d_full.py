r"""A2D alignment of Dream-v0-Instruct-7B, every weight: the setting of LLaDA-8B.

    python -m a2d_jax.train --config configs/dream_7b_a2d_full.py --workdir runs/dream_7b_a2d_full \
        --config.model.checkpoint=checkpoints/Dream-v0-Instruct-7B --config.data.files="('data/beavertails.jsonl',)"

By the TPU compiler (docs/tpu.md), memory of a chip and the most of its peak that a step can reach:

    v5e:8x8    8192 rows   --config.batch_size=8192    13.28 of 17.2 GB   82 %
    v5p:2x2x4  14336 rows  --config.batch_size=14336    93.2 of 102 GB    82 %
"""

from configs import llada_8b_a2d_full


def get_config():
    config = llada_8b_a2d_full.get_config()
    config.model.checkpoint = "checkpoints/Dream-v0-Instruct-7B"
    return config
