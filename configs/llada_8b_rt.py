r"""Refusal training of LLaDA-8B-Instruct, a baseline: harmful prompts are answered with a refusal, the rest stays.

    python -m a2d_jax.baseline_rows --rows data/beavertails.jsonl --out data
    python -m a2d_jax.train --config configs/llada_8b_rt.py --workdir runs/llada_8b_rt \
        --config.model.checkpoint=checkpoints/LLaDA-8B-Instruct

Settings as in configs/llada_8b_a2d.py. Published (average attack success over five attacks): 60.2 % -> 51.5 %.
"""

from configs import llada_8b_a2d


def get_config():
    config = llada_8b_a2d.get_config()
    config.data.files = ("data/refusals.jsonl", "data/retain.jsonl")
    return config
