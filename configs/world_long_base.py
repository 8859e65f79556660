r"""The embedded world, base model, another stage: the same rows padded with [EOS] to responses of 128 tokens and more.

    python -m a2d_jax.train --config configs/world_long_base.py:DIR/world --workdir DIR/long_base \
        --config.model.checkpoint=DIR/base

The base has seen rows of 40 tokens alone; asked for 128, it writes nothing right. Real masked-diffusion models are
tuned on rows that [EOS] fills up to the length they decode at, and so is this one.
"""

from ml_collections import config_dict

from configs import world_base

LENGTH = 152  # the longest prompt of the world, and 128 tokens of response


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`; set `model.checkpoint` to the base model."""
    config = world_base.get_config(world)
    config.data.buckets = (LENGTH,)
    config.data.pad_to = LENGTH
    config.batch_size = 8
    config.num_steps = 400
    config.optimizer.learning_rate = 5e-4
    return config
