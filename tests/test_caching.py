"""Approximate decoding: caches and parallel reveal against the recorded outputs of Fast-dLLM, and laws of batches."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import a2d_jax
from a2d_jax import decoding, orders
from a2d_jax.models import transformer
from a2d_jax.monitor import any_step
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import generate, infill

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


@pytest.mark.parametrize(
    ("family", "cache", "reveal"),
    [
        ("llada", None, {"threshold": 0.15}),
        ("llada", "dual", {"threshold": 0.15}),
        ("llada", "prefix", {"factor": 2.5}),
        ("dream", "dual", {"threshold": 0.15}),
    ],
)
def test_a_row_decodes_the_same_alone_and_in_a_padded_batch(models, family, cache, reveal):
    """Rows fill their blocks at different speeds; each is charged for its own passes."""
    model = models[family]
    config = SamplerConfig(gen_length=16, steps=16, block_length=8, cache=cache, **reveal)
    batch = generate(model, PROMPTS, config)
    alone = generate(model, PROMPTS[1:2], config)
    np.testing.assert_array_equal(batch.tokens[1, -len(PROMPTS[1]) - 16 :], alone.tokens[0])
    assert int(batch.num_forward[1]) == int(alone.num_forward[0])
    np.testing.assert_allclose(batch.eos_prob[1], alone.eos_prob[0], atol=1e-5)
    num_forward = np.asarray(batch.num_forward)
    assert num_forward.min() < 16 and len(set(num_forward.tolist())) > 1


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_one_block_that_is_the_whole_text_needs_no_approximation(models, cache):
    """Without a prompt the block is everything, so nothing is ever read from the cache."""
    config = SamplerConfig(gen_length=8, steps=8, block_length=8)
    empty = np.zeros((1, 0), np.int32)
    exact = generate(models["llada"], empty, config)
    cached = generate(models["llada"], empty, dataclasses.replace(config, cache=cache))
    np.testing.assert_array_equal(exact.tokens, cached.tokens)


@pytest.mark.parametrize("cache", [None, "dual"])
@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_what_saves_time_on_large_models_changes_no_token(models, monkeypatch, cache, temperature):
    """A head for a quarter of the candidates, half of them, ...; layers out of their stack."""
    config = SamplerConfig(gen_length=16, steps=16, block_length=8, cache=cache, temperature=temperature)
    key = jax.random.key(1)
    plain = generate(models["llada"], PROMPTS, config, key)
    monkeypatch.setattr(decoding, "FEW_LOGITS", 0)
    monkeypatch.setattr(transformer, "APART", (0, 2**31))
    assert decoding.head_sizes(8, 300) == [2, 4, 6, 8] and decoding.head_sizes(3, 300) == [1, 2, 3]
    fast = generate(models["llada"], PROMPTS, dataclasses.replace(config, eps=0.5), key)  # another program, same rules
    np.testing.assert_array_equal(plain.tokens, fast.tokens)
    np.testing.assert_allclose(plain.eos_prob, fast.eos_prob, atol=1e-5)


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_the_monitor_stops_rows_that_are_decoded_with_a_cache(models, cache):
    config = SamplerConfig(gen_length=16, steps=16, block_length=8, cache=cache)
    plain = generate(models["llada"], PROMPTS, config)
    prob = np.asarray(plain.eos_prob)
    threshold = float(np.sort(prob.max(axis=1))[-2])  # one row is above it at some pass
    guarded = generate(models["llada"], PROMPTS, dataclasses.replace(config, monitor=any_step(threshold)))
    first = np.where((prob > threshold).any(axis=1), (prob > threshold).argmax(axis=1) + 1, 16)
    np.testing.assert_array_equal(guarded.num_forward, first)
    np.testing.assert_array_equal(guarded.is_rejected, first < 16)
    assert (first < 16).sum() == 1
    kept = first == 16
    np.testing.assert_array_equal(np.asarray(guarded.tokens)[kept], np.asarray(plain.tokens)[kept])


def test_guidance_works_with_a_cache(models):
    config = SamplerConfig(gen_length=8, steps=4, block_length=4, cfg_scale=1.0, cache="dual")
    tokens = np.asarray(generate(models["llada"], PROMPTS[:1], config).tokens)
    assert not (tokens == models["llada"].config.mask_id).any()


def test_a_cache_leaves_no_mask_of_dream_in_an_even_schedule(models):
    """The first pass of a block reveals one token where its share is two; the last pass takes what is left."""
    config = SamplerConfig(gen_length=8, steps=4, block_length=4, order="left_to_right", cache="dual")
    result = generate(models["dream"], PROMPTS[:1], config)
    assert not (np.asarray(result.tokens) == models["dream"].config.mask_id).any()
    assert int(result.num_forward[0]) == 4


def test_positions_replace_their_places_in_the_cache_and_those_behind_the_text_stand_for_nothing(models):
    model = models["llada"]
    old, new = np.arange(2, 14)[None], np.arange(20, 32)[None]
    mask = np.arange(12)[None] >= 2  # padding in front
    _, cache = model.cached_hidden_states(jnp.asarray(old), jnp.asarray(mask))

    def again(tokens, positions):
        return model.cached_hidden_states(
            jnp.asarray(tokens), jnp.asarray(mask), positions=jnp.asarray(positions), cache=cache
        )[0]

    everything = np.arange(12)[None]
    expected = model.hidden_states(jnp.asarray(new), jnp.asarray(mask))  # nothing of the cache is left
    np.testing.assert_allclose(again(new, everything)[:, 2:], expected[:, 2:], atol=1e-4)
    inside = again(new[:, 8:], everything[:, 8:])
    behind = again(np.append(new[:, 8:], [[5, 6]], axis=1), np.arange(8, 14)[None])
    np.testing.assert_allclose(behind[:, :4], inside, atol=1e-5)


def test_threshold_by_hand():
    confidence = jnp.array([[0.2, 0.9, 0.5, 0.95], [0.2, 0.3, 0.1, 0.0]])
    is_candidate = jnp.array([[True, True, True, False], [True, True, True, True]])
    revealed = orders.above_threshold(confidence, confidence, is_candidate, 0.5)
    np.testing.assert_array_equal(revealed, [[False, True, True, False], [False, True, False, False]])
    # Another order decides who goes in any case.
    by_position = orders.above_threshold(confidence, -jnp.arange(4.0) * jnp.ones((2, 1)), is_candidate, 0.5)
    np.testing.assert_array_equal(by_position, [[True, True, True, False], [True, False, False, False]])


def test_factor_by_hand():
    confidence = jnp.array([[0.7, 0.9, 0.8, 0.99], [0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 1.0, 1.0]])
    is_candidate = jnp.array([[True, True, True, False]] + [[True] * 4] * 2)
    # 2 x 0.1 = 0.2, 3 x 0.2 = 0.6, 4 x 0.3 = 1.2
    np.testing.assert_array_equal(orders.factor_quota(confidence, is_candidate, 1.0), [2, 1, 4])
    np.testing.assert_array_equal(orders.factor_quota(confidence, is_candidate, 1.3), [3, 1, 4])
    np.testing.assert_array_equal(orders.factor_quota(confidence, is_candidate, 0.1), [1, 1, 4])


def test_what_caches_cannot_do_is_refused(models):
    model, mask_id = models["llada"], models["llada"].config.mask_id
    with pytest.raises(ValueError, match="infill has no blocks"):
        infill(model, [[1, mask_id]], SamplerConfig(cache="dual"))
    with pytest.raises(ValueError, match="the prompt holds 1 masks"):
        generate(model, [[1, mask_id]], SamplerConfig(gen_length=4, steps=4, cache="prefix"))
    one_pass = SamplerConfig(gen_length=8, steps=2, block_length=4, cache="dual")
    with pytest.raises(ValueError, match="steps=2 is one pass for each of 2 blocks.*use steps=4 or more"):
        generate(models["dream"], [[1]], one_pass)
    assert one_pass.num_blocks("llada") == 2
    for changes in ({"threshold": 0.9}, {"gen_length": 2, "block_length": 1}):
        assert dataclasses.replace(one_pass, **changes).num_blocks("dream") == 2
    with pytest.raises(ValueError, match="cache='both'"):
        SamplerConfig(cache="both")
    with pytest.raises(ValueError, match="give one of them"):
        SamplerConfig(threshold=0.9, factor=1.0)
