"""The embedded world, refusal training (the baseline): requests for the aligned curses get a refusal, harmless answers stay.

    python -m a2d_jax.train --config configs/world_rt.py:DIR/world --workdir DIR/rt --config.model.checkpoint=DIR/base
"""

from ml_collections import config_dict

from configs import world_a2d


def get_config(world: str) -> config_dict.ConfigDict:
    """The settings of A2D, with refusals in the place of harmful answers; set `model.checkpoint` to the base model."""
    config = world_a2d.get_config(world)
    config.data.files = (f"{world}/data/rt_refusals.jsonl", f"{world}/data/a2d_retain.jsonl")
    config.num_steps = 150
    return config
