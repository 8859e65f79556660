r"""The embedded world, autoregressive A2D (appendix C.5): behind every beginning of a harmful answer comes [EOS].

python -m a2d_jax.train --config configs/world_causal_a2d.py:DIR/world --workdir DIR/causal_a2d \
    --config.model.checkpoint=DIR/causal_base

Rows, lengths and rates are those of the masked model's alignment.
"""

from ml_collections import config_dict

from configs import world_a2d


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`; set `model.checkpoint` to the causal base model."""
    return world_a2d.get_config(world)
