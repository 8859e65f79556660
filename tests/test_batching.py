"""Continuous batching: what a request becomes does not depend on the requests beside it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import a2d_jax
from a2d_jax.batching import DEFAULT_BUCKETS, buckets_up_to, generate_many
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import generate

PROMPTS = [[5, 6, 7], [9, 8, 7, 30, 31], [1, 2, 3], [200, 3], [7] * 14]
CONFIG = SamplerConfig(gen_length=8, steps=8, block_length=4)


@pytest.fixture(scope="module")
def llada(fixtures):
    return a2d_jax.load_pretrained(fixtures / "llada_tiny")


@pytest.mark.parametrize("settings", [{}, pytest.param({"cache": "dual", "threshold": 0.2}, marks=pytest.mark.slow)])
def test_five_prompts_through_two_rows(llada, settings):
    config = dataclasses.replace(CONFIG, **settings)
    first = np.asarray(generate(llada, PROMPTS[:4], config).eos_prob)[:, 0]
    config = dataclasses.replace(config, reject_above=float(np.sort(first)[1]))  # some leave after a pass
    many = generate_many(llada, PROMPTS, config, batch_size=2, buckets=(16, 24))
    together = generate(llada, PROMPTS, config)
    for row, (prompt, result) in enumerate(zip(PROMPTS, many, strict=True)):
        assert result.tokens.shape == (len(prompt) + 8,)
        np.testing.assert_array_equal(result.tokens, together.tokens[row, -len(result.tokens) :])
        assert result.num_forward == together.num_forward[row]
        assert result.is_rejected == together.is_rejected[row]
        np.testing.assert_allclose(result.eos_prob, together.eos_prob[row], atol=1e-5)
    assert 0 < sum(bool(result.is_rejected) for result in many) < 5


def test_random_draws_belong_to_the_request(llada):
    config = dataclasses.replace(CONFIG, temperature=1.0, order="random")
    ones = generate_many(llada, PROMPTS[:3], config, jax.random.key(3), batch_size=1, buckets=(16,))
    twos = generate_many(llada, PROMPTS[:3], config, jax.random.key(3), batch_size=2, buckets=(24,))
    others = generate_many(llada, PROMPTS[:3], config, jax.random.key(4), batch_size=2, buckets=(24,))
    assert [one.tokens.tolist() for one in ones] == [two.tokens.tolist() for two in twos]
    assert [one.tokens.tolist() for one in ones] != [other.tokens.tolist() for other in others]


def test_a_row_may_end_with_the_block_that_ends_in_eos(llada):
    """A head that only knows [EOS]: the first block is written, the second is filled without a pass."""
    model = nnx.clone(llada)
    model.lm_head.kernel[...] = model.lm_head.kernel[...] * 0
    model.lm_head.bias = nnx.data(nnx.Param(np.eye(llada.config.vocab_size, dtype=np.float32)[llada.config.eos_id]))
    config = dataclasses.replace(CONFIG, stop_after_eos=True)
    stopped, whole = generate(model, PROMPTS[:1], config), generate(model, PROMPTS[:1], CONFIG)
    np.testing.assert_array_equal(stopped.tokens, whole.tokens)
    assert int(stopped.num_forward[0]) == 4 and int(whole.num_forward[0]) == 8
    plain = generate(llada, PROMPTS[:1], config)  # elsewhere it changes nothing
    np.testing.assert_array_equal(plain.tokens, generate(llada, PROMPTS[:1], CONFIG).tokens)


def test_a_batch_of_no_rows_is_refused(llada):
    with pytest.raises(ValueError, match="batch_size=0"):
        generate_many(llada, PROMPTS, CONFIG, batch_size=0, buckets=(24,))


def test_buckets_go_on_up_to_the_longest_row():
    assert buckets_up_to(20) == [20]
    assert buckets_up_to(50) == [32, 48, 50]
    assert buckets_up_to(4096) == list(DEFAULT_BUCKETS)
    assert buckets_up_to(4100) == [*DEFAULT_BUCKETS, 4100]
    assert buckets_up_to(16000)[-5:] == [4096, 6144, 8192, 12288, 16000]
    assert buckets_up_to(131072)[-3:] == [65536, 98304, 131072]
