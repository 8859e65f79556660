r"""A2D alignment of Dream-v0-Instruct-7B: the setting of LLaDA-8B with the projections that Qwen2 blocks have.

    python -m a2d_jax.train --config configs/dream_7b_a2d.py --workdir runs/dream_7b_a2d \
        --config.model.checkpoint=checkpoints/Dream-v0-Instruct-7B --config.data.files="('data/beavertails.jsonl',)"

Published result: DIJA attack success 84.4 % -> 0.0 %, average 2.8 %.

By the TPU compiler (docs/tpu.md), on v5e:2x4: 3.89 GB of a chip's 17.2.
"""

from configs import llada_8b_a2d


def get_config():
    config = llada_8b_a2d.get_config()
    config.model.checkpoint = "checkpoints/Dream-v0-Instruct-7B"
    # LLaDA's names would select only q, k, v and up here.
    config.lora.targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    return config
