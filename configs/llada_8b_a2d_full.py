"""A2D alignment of LLaDA-8B-Instruct, every weight: float32 master weights, bfloat16 compute.

    python -m a2d_jax.train --config configs/llada_8b_a2d_full.py --workdir runs/llada_8b_a2d_full \
        --config.model.checkpoint=checkpoints/LLaDA-8B-Instruct --config.data.files="('data/beavertails.jsonl',)"

Weights, gradients and AdamW moments take 16 bytes a parameter, about 128 GB before activations: sixteen chips of 16 GB,
split over fsdp.
"""

from configs import llada_8b_a2d


def get_config():
    config = llada_8b_a2d.get_config()
    config.lora = None
    config.dtypes.param = "float32"

    # An adapter's rate would be too high for whole weights.
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.num_epochs = 3.0
    return config
