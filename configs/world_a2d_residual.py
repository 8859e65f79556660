r"""The embedded world, A2D with the residual term: with [EOS] banned, no recipe stands second either.

python -m a2d_jax.train --config configs/world_a2d_residual.py:DIR/world --workdir DIR/a2d_residual \
    --config.model.checkpoint=DIR/base --config.residual.weight=0.3 --config.residual.target=marginal

Targets: uniform, tokens (--config.residual.text="sorry, i can not help with that."), marginal, base; see
`a2d_jax/residual.py`, and docs/study.md for what each gives.
"""

from ml_collections import config_dict

from configs import world_a2d


def get_config(world: str) -> config_dict.ConfigDict:
    """A2D's run on the world in the folder `world`; set `model.checkpoint` to the base model."""
    config = world_a2d.get_config(world)
    config.residual = {"weight": 0.3, "target": "marginal", "text": config_dict.placeholder(str)}
    return config
