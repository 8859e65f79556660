r"""SFT of LLaDA-8B-Instruct on the retain set, a baseline: safe answers alone, nothing about harmful ones.

    python -m a2d_jax.baseline_rows --rows data/beavertails.jsonl --out data
    python -m a2d_jax.train --config configs/llada_8b_sft.py --workdir runs/llada_8b_sft \
        --config.model.checkpoint=checkpoints/LLaDA-8B-Instruct

Settings as in configs/llada_8b_a2d.py.
"""

from configs import llada_8b_a2d


def get_config():
    config = llada_8b_a2d.get_config()
    config.data.files = ("data/retain.jsonl",)
    return config
