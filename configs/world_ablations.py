r"""The embedded world, A2D with one thing changed: the refusal token, the mask ratio, the harmful share, the adapter.

    python -m a2d_jax.train --config configs/world_ablations.py:rare_token:DIR/world --workdir DIR/rare_token \
        --config.model.checkpoint=DIR/base

`VARIANTS` names them all; each is a set of fields of the run's config, which the command line could set as well, but
for the adapters.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from configs import world_a2d

FREQUENT, RARE = "the most frequent word", "the rarest word"  # of the world's documents


def adapter(rank: int, *more_targets: str) -> dict[str, Any]:
    """LoRA on every projection but the attention's output, as in the paper; its rate is higher than for all weights."""
    targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", *more_targets)
    lora = {"rank": rank, "alpha": 2.0 * rank, "dropout": 0.05, "targets": targets}
    return {"lora": lora, "optimizer.learning_rate": 2e-3}


VARIANTS: dict[str, dict[str, Any]] = {
    "a2d": {},
    # What harmful rows become
    "new_token": {"refusal_token": "<|refuse|>"},
    "frequent_token": {"refusal_token": FREQUENT},
    "rare_token": {"refusal_token": RARE},
    # How much of a response is masked; t ~ U(0, 1) otherwise
    "low_mask_ratio": {"time_range": (0.15, 0.15)},
    "high_mask_ratio": {"time_range": (0.9, 0.9)},
    # Harmful and retain rows among those drawn; half and half otherwise
    "harmful_10": {"data.weights": (0.1, 0.9)},
    "harmful_25": {"data.weights": (0.25, 0.75)},
    "harmful_75": {"data.weights": (0.75, 0.25)},
    "harmful_90": {"data.weights": (0.9, 0.1)},
    # An adapter in place of all weights
    "lora_rank_2": adapter(2, "lm_head"),
    "lora_rank_8": adapter(8, "lm_head"),
    "lora_rank_32": adapter(32, "lm_head"),
    "lora_rank_32_no_head": adapter(32),
}


def get_config(variant_and_world: str) -> config_dict.ConfigDict:
    """The variant on the world in a folder, given as "variant:folder"; set `model.checkpoint` to the base model."""
    variant, _, world = variant_and_world.partition(":")
    if variant not in VARIANTS or not world:
        raise ValueError(f"{variant_and_world!r} is no variant:folder; the variants are {list(VARIANTS)}.")
    config = world_a2d.get_config(world)
    for name, value in VARIANTS[variant].items():
        *parts, last = name.split(".")
        section = config
        for part in parts:
            section = section[part]
        section[last] = word_by_count(world, value) if value in (FREQUENT, RARE) else value
    return config


def word_by_count(world: str, which: str) -> str:
    """The most frequent word of the world's documents, or one of the rarest."""
    lines = (Path(world) / "data" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    texts = (re.sub(r"<\|\w+\|>", " ", json.loads(line)["text"]) for line in lines)  # without special tokens
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text))
    return (max if which == FREQUENT else min)(sorted(counts), key=counts.get)
