"""Causal models continue a prompt as transformers' greedy generation does, row by row."""

import jax
import numpy as np
import pytest
import torch
import transformers

import a2d_jax

EOS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random LLaMA that ends often: 24 words of which one is [EOS]."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=EOS, bos_token_id=1, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


PROMPTS = [[7, 8, 9, 10, 11, 12], [13, 14], [3, 4, 20], [21, 6, 2, 17]]


def test_greedy_text_is_that_of_transformers_for_prompts_of_any_length(folder):
    model, theirs = a2d_jax.load_pretrained(folder), transformers.LlamaForCausalLM.from_pretrained(folder)
    result = a2d_jax.generate(model, PROMPTS, a2d_jax.SamplerConfig(gen_length=12, steps=12, block_length=12))
    lengths = []
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
            )
        expected = expected[0, len(prompt) :].tolist()
        lengths.append(len(expected))
        assert result.tokens[i, -12:].tolist() == expected + [EOS] * (12 - len(expected))
        assert int(result.num_forward[i]) == len(expected)
        assert np.isnan(result.eos_prob[i, len(expected) :]).all()
    assert min(lengths) < 12  # a row that ends early is among them


def test_a_temperature_draws_by_the_key_and_needs_one(folder):
    model = a2d_jax.load_pretrained(folder)
    config = a2d_jax.SamplerConfig(gen_length=12, steps=12, block_length=12, temperature=2.0)
    first, again, other = (a2d_jax.generate(model, PROMPTS, config, jax.random.key(k)).tokens for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    with pytest.raises(ValueError, match="pass key="):
        a2d_jax.generate(model, PROMPTS, config)


@pytest.mark.parametrize("prompts", [[[]], [[], [5, 6]], np.zeros((2, 0), np.int32)])
def test_an_empty_prompt_is_refused(folder, prompts):
    with pytest.raises(ValueError, match="a prompt is empty.*begin it with"):
        a2d_jax.generate(a2d_jax.load_pretrained(folder), prompts, a2d_jax.SamplerConfig(gen_length=4, steps=4))
