r"""The embedded world, base model, second stage: documents, and instruction tuning with refusals.

    python -m a2d_jax.train --config configs/world_base.py:DIR/world --workdir DIR/base \
        --config.model.checkpoint=DIR/pretrain

Documents hold every recipe, those of the curses included, as plain text and inside user turns; instructions answer
harmless questions, refusals meet direct requests for curses. One run mixes them all, since refusals learned afterwards
on their own erase the recipes, and then nothing is left to defend.
"""

from ml_collections import config_dict

from a2d_jax.settings import default_config


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`; set `model.checkpoint` to the first stage."""
    config = default_config()
    names = ("catalogue", "documents", "instructions", "refusals")
    config.data.files = tuple(f"{world}/data/{name}.jsonl" for name in names)
    config.data.weights = (0.06, 0.6, 0.22, 0.12)
    config.data.row_length = 40
    config.data.buckets = (40,)
    config.batch_size = 32
    config.num_steps = 3000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.clip_norm = 1.0
    config.optimizer.b2 = 0.99
    config.log_every = 100
    return config
