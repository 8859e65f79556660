"""Laws of the forward process: who is masked, how often, and what the targets are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2d_jax.masking import corrupt, next_tokens

MASK, EOS, EPS = 99, 98, 1e-3


def draw(num_rows: int, length: int = 16, prompt: int = 5, seed: int = 0, eps: float = EPS):
    tokens = np.arange(num_rows * length).reshape(num_rows, length) % 90
    is_response = np.broadcast_to(np.arange(length) >= prompt, tokens.shape)
    is_safe = np.arange(num_rows) % 2 == 0
    batch = corrupt(
        jax.random.key(seed), jnp.array(tokens), jnp.array(is_response), jnp.array(is_safe),
        mask_id=MASK, eos_id=EOS, eps=eps,
    )  # fmt: skip
    return tokens, jax.tree.map(np.asarray, batch)


def test_prompts_are_never_masked_and_unmasked_tokens_stay():
    tokens, batch = draw(512)
    assert not batch.is_masked[:, :5].any()
    np.testing.assert_array_equal(batch.noisy_tokens, np.where(batch.is_masked, MASK, tokens))


def test_targets_are_the_token_in_retain_rows_and_eos_everywhere_in_harmful_rows():
    tokens, batch = draw(8)
    np.testing.assert_array_equal(batch.tokens[batch.is_safe], tokens[batch.is_safe])
    assert (batch.tokens[~batch.is_safe] == EOS).all()
    harmful_input = batch.noisy_tokens[~batch.is_safe]
    assert not np.isin(EOS, harmful_input)  # the harmful text itself stays visible


def test_one_probability_a_row_between_eps_and_one():
    _, batch = draw(4096, eps=0.25)
    assert (batch.mask_prob == batch.mask_prob[:, :1]).all()
    prob = batch.mask_prob[:, 0]
    assert prob.min() >= 0.25 and prob.max() <= 1
    assert abs(prob.mean() - 0.625) < 0.01  # uniform over [0.25, 1]


def test_the_masked_share_of_a_row_is_its_probability():
    _, batch = draw(2048, length=133)
    share, prob = batch.is_masked[:, 5:].mean(axis=1), batch.mask_prob[:, 0]
    z = (share - prob) / np.sqrt(np.maximum(prob * (1 - prob), 1e-4) / 128)
    assert abs(z.mean()) < 0.1 and 0.9 < z.std() < 1.1  # binomial: standard scores


def test_positions_are_masked_independently():
    _, batch = draw(8192, length=7, eps=0.999)  # p is 0.999 .. 1: hardly anything but the prompt is left
    assert batch.is_masked[:, 5:].mean() > 0.998
    _, batch = draw(16384, length=7)
    a, b, prob = batch.is_masked[:, 5], batch.is_masked[:, 6], batch.mask_prob[:, 0]
    assert abs((a & b).mean() - (prob**2).mean()) < 0.01  # given the row's p, one says nothing about the other


def test_another_key_draws_other_masks_and_the_same_key_the_same():
    _, first = draw(64)
    _, again = draw(64)
    _, other = draw(64, seed=1)
    np.testing.assert_array_equal(first.is_masked, again.is_masked)
    assert (first.is_masked != other.is_masked).any()


def test_lists_and_integer_flags_are_arrays_of_bools():
    tokens, is_response, is_safe = [[1, 2, 3, 4], [5, 6, 7, 8]], [[0, 1, 1, 1], [0, 0, 1, 1]], [1, 0]
    given = corrupt(jax.random.key(0), tokens, is_response, is_safe, mask_id=MASK, eos_id=EOS)
    arrays = jnp.array(tokens), jnp.array(is_response, bool), jnp.array(is_safe, bool)
    for field, expected in zip(given, corrupt(jax.random.key(0), *arrays, mask_id=MASK, eos_id=EOS), strict=True):
        assert field.dtype == expected.dtype
        np.testing.assert_array_equal(field, expected)


@pytest.mark.parametrize(
    ("tokens", "is_response", "is_safe"), [((2, 4), (2, 4), (2, 1)), ((2, 4), (2, 1), (2,)), ((4,), (4,), (4,))]
)
def test_shapes_that_do_not_belong_together_are_refused(tokens, is_response, is_safe):
    rows = np.ones(tokens, np.int32), np.ones(is_response, bool), np.ones(is_safe, bool)
    with pytest.raises(ValueError, match=r"is_safe \(.*give \(B, T\), \(B, T\) and \(B,\)"):
        corrupt(jax.random.key(0), *rows, mask_id=MASK, eos_id=EOS)
    with pytest.raises(ValueError, match=r"is_safe \(.*give \(B, T\), \(B, T\) and \(B,\)"):
        next_tokens(*rows, eos_id=EOS)
