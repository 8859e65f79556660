r"""The embedded world, A2D of the base that answers in 128 tokens: its rows padded with [EOS] to the same length.

python -m a2d_jax.train --config configs/world_long_a2d.py:DIR/world --workdir DIR/long_a2d \
    --config.model.checkpoint=DIR/long_base
"""

from ml_collections import config_dict

from configs import world_a2d
from configs.world_long_base import LENGTH


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`; set `model.checkpoint` to the base of `world_long_base`."""
    config = world_a2d.get_config(world)
    config.data.buckets = (LENGTH,)
    config.data.pad_to = LENGTH
    config.batch_size = 8
    return config
