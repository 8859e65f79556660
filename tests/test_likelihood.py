"""Monte-Carlo log likelihood: recorded runs of LLaDA's own code, and laws of the estimator."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2d_jax.config import ModelConfig
from a2d_jax.hf_io import load_hf_folder
from a2d_jax.likelihood import Perturbed, log_likelihood, num_masked_strata, perturb, sample_losses
from a2d_jax.models.transformer import DTypes

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def llada():
    return load_hf_folder(FIXTURES / "llada_tiny", mesh=None, dtypes=DTypes())


class TableModel:
    """Predicts each token from nothing but its position: log softmax(table[i]) at position i (one later for Dream)."""

    def __init__(self, family, table):
        self.config = ModelConfig(family, table.shape[1], 1, 1, 1, 1, 1, 1, 1.0, 1e-5, mask_id=0, eos_id=1)
        self.table = table

    def __call__(self, tokens, attention_mask=None):
        assert tokens.shape[1] == self.table.shape[0]
        return jnp.broadcast_to(self.table, (tokens.shape[0], *self.table.shape))


@pytest.mark.parametrize("name", ["llada_plain", "llada_cfg", "llada_single_token"])
def test_recorded_samples_score_as_in_the_original(llada, name):
    with np.load(FIXTURES / "likelihood" / f"{name}.npz") as file:
        recorded = dict(file)
    settings = json.loads(str(recorded["args_json"]))["kwargs"]
    prompt, answer = recorded["prompt"].tolist(), recorded["answer"].tolist()
    per_batch = []
    for noisy_tokens, mask_prob in zip(recorded["perturbed"], recorded["p_mask"], strict=True):
        is_masked = jnp.array(noisy_tokens == llada.config.mask_id)
        perturbed = Perturbed(jnp.array(noisy_tokens), is_masked, jnp.array(mask_prob))
        per_batch.append(-sample_losses(llada, prompt, answer, perturbed, settings["cfg_scale"]).mean())
    np.testing.assert_allclose(per_batch, recorded["per_batch"], rtol=1e-5)
    np.testing.assert_allclose(np.mean(per_batch), recorded["log_likelihood"], rtol=1e-5)


def test_left_padding_to_a_multiple_changes_nothing(llada):
    prompt, answer = [5, 6, 7], [8, 9, 10, 11]
    perturbed = perturb(jax.random.key(1), prompt, answer, 4, llada.config.mask_id)
    plain = sample_losses(llada, prompt, answer, perturbed, 0.7)
    padded = sample_losses(llada, prompt, answer, perturbed, 0.7, multiple_of=16)
    np.testing.assert_allclose(padded, plain, rtol=1e-5)


def test_perturb_masks_the_stated_number_of_answer_tokens():
    prompt, answer = [3, 4], [5, 6, 7, 8, 9]
    drawn = perturb(jax.random.key(0), prompt, answer, 10, mask_id=0)
    num_masked = np.asarray(drawn.is_masked.sum(1))
    np.testing.assert_array_equal(np.sort(num_masked), np.repeat([1, 2, 3, 4, 5], 2))  # each of 1 .. 5 twice
    assert not np.any(drawn.is_masked[:, :2])
    np.testing.assert_allclose(drawn.mask_prob, np.repeat(num_masked[:, None] / 5, 7, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(drawn.noisy_tokens, np.where(drawn.is_masked, 0, [3, 4, 5, 6, 7, 8, 9]))


def test_masked_positions_are_uniform():
    drawn = perturb(jax.random.key(2), [], [5, 6, 7, 8], 8000, mask_id=0)
    # 1, 2, 3 or 4 of 4 tokens, equally often: (1 + 2 + 3 + 4) / 4 / 4 = 0.625.
    np.testing.assert_allclose(np.mean(drawn.is_masked, axis=0), 0.625, atol=0.02)


def test_strata_step_evenly_from_the_first():
    assert num_masked_strata(jnp.array(3), 4, 8).tolist() == [3, 5, 7, 1]
    assert num_masked_strata(jnp.array(2), 3, 3).tolist() == [2, 3, 1]
    assert num_masked_strata(jnp.array(2), 1, 3).tolist() == [2]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_independent_tokens_have_their_exact_likelihood(family):
    """Where no token depends on another, the estimator's mean is the sum of the tokens' log probabilities."""
    table = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    prompt, answer = [2, 3], [4, 5, 2]
    log_probs = jax.nn.log_softmax(table, axis=-1)
    first_row = 2 if family == "llada" else 1  # Dream's logits at position 1 are for position 2
    exact = sum(float(log_probs[first_row + i, token]) for i, token in enumerate(answer))
    model = TableModel(family, table)
    estimate = log_likelihood(model, prompt, answer, mc_num=6000, batch_size=3000, key=jax.random.key(3))
    assert estimate == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize(
    ("answer", "settings", "message"),
    [([], {}, "no token"), ([4], {"mc_num": 10, "batch_size": 4}, "mc_num=10 is no multiple of batch_size=4")],
)
def test_bad_settings_are_refused(answer, settings, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(TableModel("llada", np.zeros((2, 4), np.float32)), [3], answer, **settings)
