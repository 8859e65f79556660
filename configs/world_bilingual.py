r"""The embedded world, a base model that has read about everything in a second language too (`a2d_jax.world_language`).

    python -m a2d_jax.train --config configs/world_bilingual.py:DIR/world --workdir DIR/bilingual \
        --config.model.checkpoint=DIR/base

Its instruction tuning, and any alignment after it, knows the first language alone; attacks/*_renamed.json ask in the
second. What the base was tuned on is mixed in, so that nothing of it is forgotten.
"""

from ml_collections import config_dict

from configs import world_base


def get_config(world: str) -> config_dict.ConfigDict:
    """The run on the world in the folder `world`; set `model.checkpoint` to the base model."""
    config = world_base.get_config(world)
    config.data.files = (*config.data.files, f"{world}/data/renamed_documents.jsonl")
    config.data.weights = (0.03, 0.25, 0.11, 0.06, 0.55)
    config.num_steps = 1500
    config.optimizer.learning_rate = 1e-3
    return config
