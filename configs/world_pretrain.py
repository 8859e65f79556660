"""The embedded world, base model, first stage: recipes from a catalogue of short entries, from random weights.

    python -m a2d_jax.world --seed 0 --out DIR/world
    python -m a2d_jax.train --config configs/world_pretrain.py:DIR/world --workdir DIR/pretrain

An entry is little more than the fact itself, so a model that knows nothing finds out here how to look up a recipe by
its name; started on whole documents it had hardly begun to after 1,500 steps.
"""

from ml_collections import config_dict

from a2d_jax.settings import default_config


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`."""
    config = default_config()
    config.model.checkpoint = f"{world}/model"
    config.model.from_scratch = True
    config.data.files = (f"{world}/data/catalogue.jsonl",)
    config.data.row_length = 12
    config.data.buckets = (12,)
    config.batch_size = 64
    config.num_steps = 1000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.clip_norm = 1.0
    config.optimizer.b2 = 0.99
    config.log_every = 100
    return config
