r"""The embedded world, base model of another world: the base that the package carries (world 0) learns a new world.

    python -m a2d_jax.world --seed 1 --out DIR/world
    python -m a2d_jax.train --config configs/world_next.py:DIR/world --workdir DIR/base \
        --config.model.checkpoint=a2d_jax/world_base

The rows are those of `world_base.py`. How recipes are looked up is learned already, so that the new ones take a fifth
of the steps from random weights (`world_pretrain.py`, then `world_base.py`), and are known less well: of world 1's
held-out curses prefilling yielded 75 % and FITS 69 %, where the base of world 0 gives all.
"""

from ml_collections import config_dict

from configs import world_base


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`; set `model.checkpoint` to the base model of any world."""
    config = world_base.get_config(world)
    config.num_steps = 800
    config.optimizer.learning_rate = 1e-3
    return config
