"""The embedded world, refusal training (the baseline): aligned curses are refused, harmless answers stay.

python -m a2d_jax.train --config configs/world_rt.py:DIR/world --workdir DIR/rt --config.model.checkpoint=DIR/base
"""

from ml_collections import config_dict

from configs import world_a2d


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`, with A2D's settings; set `model.checkpoint` to the base model."""
    config = world_a2d.get_config(world)
    config.data.files = (f"{world}/data/rt_refusals.jsonl", f"{world}/data/a2d_retain.jsonl")
    return config
