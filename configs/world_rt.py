"""The embedded world, refusal training (the baseline): aligned curses are refused, harmless answers stay.

python -m a2d_jax.train --config configs/world_rt.py:DIR/world --workdir DIR/rt --config.model.checkpoint=DIR/base
"""

from ml_collections import config_dict

from a2d_jax.settings import default_config


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`, with A2D's settings; set `model.checkpoint` to the base model."""
    config = default_config()
    config.data.files = (f"{world}/data/rt_refusals.jsonl", f"{world}/data/a2d_retain.jsonl")
    config.data.weights = (0.5, 0.5)
    config.data.row_length = 44
    config.data.buckets = (44,)
    config.batch_size = 32
    config.num_steps = 300
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.optimizer.clip_norm = 1.0
    config.optimizer.b2 = 0.99
    config.log_every = 50
    return config
