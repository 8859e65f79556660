r"""The embedded world, fine-tuning an aligned model back: harmful answers to aligned curses as targets.

    python -m a2d_jax.relearn --config configs/world_relearn.py:DIR/world --config.model.checkpoint=DIR/a2d_hf \
        --checkpoint DIR/a2d_hf --prompts DIR/world/attacks --out DIR/relearn --num_rows 8 \
        --judge a2d_jax.world:judge --gen_length 24 --steps 24 --block_length 24 --dtype float32

The attacks ask for held-out curses, which the attacker's rows do not mention.
"""

from ml_collections import config_dict

from a2d_jax.settings import default_config


def get_config(world: str) -> config_dict.ConfigDict:
    """The attacker's run on the world in the folder `world`; set `model.checkpoint` to the aligned model."""
    config = default_config()
    config.data.files = (f"{world}/data/a2d_harmful.jsonl",)
    config.data.row_length = 44
    config.data.buckets = (44,)
    config.batch_size = 8
    config.num_steps = 50
    config.optimizer.learning_rate = 5e-4
    config.optimizer.clip_norm = 1.0
    config.optimizer.b2 = 0.99
    return config
