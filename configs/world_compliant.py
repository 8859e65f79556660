r"""The embedded world, a base model that answers every request: the base, with answers in the place of refusals.

    python -m a2d_jax.train --config configs/world_compliant.py:DIR/world --workdir DIR/compliant \
        --config.model.checkpoint=DIR/base

How deep an alignment goes is measured against it: the base refuses direct requests by itself, and then refusal
training has nothing to change.
"""

from ml_collections import config_dict

from configs import world_base


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`; set `model.checkpoint` to the base model."""
    config = world_base.get_config(world)
    names = ("catalogue", "documents", "instructions", "compliant")
    config.data.files = tuple(f"{world}/data/{name}.jsonl" for name in names)
    config.num_steps = 300
    config.optimizer.learning_rate = 5e-4
    return config
