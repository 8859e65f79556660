"""Approximate decoding: caches and parallel reveal against the recorded outputs of Fast-dLLM, and laws of batches."""

import json
from pathlib import Path

import numpy as np
import pytest

import a2d_jax
from a2d_jax.sampling import SamplerConfig, generate

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in (FIXTURES / "sampling").glob("fastdllm_*.npz"))
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [200, 3, 100, 42]]


@pytest.fixture(scope="module")
def models():
    return {family: a2d_jax.load_pretrained(FIXTURES / f"{family}_tiny") for family in ("llada", "dream")}


def config_of(family: str, args: dict, cache: str | None) -> SamplerConfig:
    kwargs = args["kwargs"]
    return SamplerConfig(
        gen_length=kwargs.get("gen_length", kwargs.get("max_new_tokens")), steps=kwargs["steps"],
        block_length=kwargs.get("block_length"), threshold=kwargs.get("threshold"), cache=cache,
        order="entropy" if kwargs.get("alg") == "entropy" else "confidence",
    )  # fmt: skip


def num_idle_passes(recorded, mask_id: int, block_length: int) -> int:
    """Passes of the recording over a block without masks: they reveal nothing, and we do not take them."""
    segments = [row[row >= 0] for row in recorded["model_inputs"][:, 0]]
    whole = max(len(segment) for segment in segments)
    return sum(len(segment) < whole and not (segment[:block_length] == mask_id).any() for segment in segments)


@pytest.mark.parametrize("name", NAMES)
def test_fast_dllms_samplers_token_for_token(models, name):
    _, family, kind, *_ = name.split("_")
    recorded = np.load(FIXTURES / "sampling" / f"{name}.npz")
    model, prompt = models[family], recorded["input_ids"]
    config = config_of(family, json.loads(str(recorded["args_json"])), None if kind == "nocache" else kind)
    result = generate(model, prompt, config)
    np.testing.assert_array_equal(result.tokens, recorded["output_ids"])
    idle = num_idle_passes(recorded, model.config.mask_id, config.gen_length // config.num_blocks(family))
    assert int(result.num_forward[0]) + idle == int(recorded["nfe"])
    assert idle == 0 or config.threshold == 0.15  # where the first pass fills the block
