"""The residual term: divergences by hand, gradients of PyTorch, constant targets, and the base it compares with."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_evaluate import write_tiny_checkpoint

from a2d_jax import chunked_losses
from a2d_jax.data import DataConfig, make_loader
from a2d_jax.metrics import read_metrics
from a2d_jax.objective import Objective
from a2d_jax.residual import Residual, ResidualConfig, base_target, kept_tokens, residual_divergence
from a2d_jax.residual_targets import make_residual
from a2d_jax.settings import RunConfig, default_config
from a2d_jax.tokenizer import load_tokenizer
from a2d_jax.train import train
from a2d_jax.training import residual_term

EOS, MASK, V = 0, 3, 4
IS_KEPT = kept_tokens(V, (EOS, MASK))


def test_uniform_divergence_by_hand():
    """Behind [EOS] and [MASK], whatever their logits, stand 1/4 and 3/4; KL((1/2, 1/2) || those) = ln(4/3) / 2."""
    logits = jnp.array([9.0, math.log(1), math.log(3), 5.0])
    value = residual_divergence(logits, jnp.array([0, 0.5, 0.5, 0]), IS_KEPT)
    assert float(value) == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)


def test_a_target_on_one_token_is_its_cross_entropy():
    logits = jnp.array([9.0, math.log(1), math.log(3), 5.0])
    value = residual_divergence(logits, jnp.array([0.0, 1.0, 0.0, 0.0]), IS_KEPT)
    assert float(value) == pytest.approx(math.log(4), rel=1e-6)


def test_the_base_keeps_its_proportions_without_the_harmful_token():
    """Kept are the tokens 1, 2 and 3 with 1/10, 5/10 and 4/10; without token 2 it is 1 to 4."""
    is_kept = kept_tokens(5, (0, 4))
    logits = jnp.log(jnp.array([[7.0, 1, 5, 4, 7], [7, 1, 5, 4, 7]]))
    target = base_target(logits, jnp.array([2, 0]), is_kept)  # an [EOS] of the padding removes nothing more
    np.testing.assert_allclose(target, [[0, 0.2, 0, 0.8, 0], [0, 0.1, 0.5, 0.4, 0]], rtol=1e-6)


@pytest.mark.parametrize("target", ["uniform", "base"])
def test_loss_and_gradients_are_those_of_pytorch_in_chunks_and_at_once(target, monkeypatch):
    """Two rows of 96 positions, one of them harmful, through `scored_losses` and through autograd on all logits."""
    rng = np.random.default_rng(0)
    num_rows, length, width, vocab = 2, 96, 6, 11
    hidden, base_hidden = rng.normal(size=(2, num_rows, length, width)).astype(np.float32)
    head, base_head = rng.normal(size=(2, width, vocab)).astype(np.float32)
    targets, clean = rng.integers(0, vocab, (2, num_rows, length)).astype(np.int32)
    weights = np.where(rng.random((num_rows, length)) < 0.7, rng.uniform(0.1, 5, (num_rows, length)), 0)
    weights = weights.astype(np.float32)
    weights[0, 0] = 1  # what fills up the last chunk is this position
    harmful_weights = 0.3 * weights * np.array([[1], [0]], np.float32)
    is_kept = kept_tokens(vocab, (EOS, MASK))
    uniform = (is_kept / is_kept.sum()).astype(np.float32)

    class Model:  # what the term asks of the base
        def hidden_states(self, tokens, mask):
            return jnp.asarray(base_hidden)

        def split_head(self):
            return (lambda kernel, _, hidden, key: hidden @ kernel), jnp.asarray(base_head), None

    residual = Residual(ResidualConfig(0.3, target), None if target == "base" else uniform)
    objective = Objective("llada", MASK, EOS, residual=residual)

    def ours(hidden, kernel):
        head = chunked_losses.Head(lambda kernel, _, hidden, key: hidden @ kernel, kernel, None, vocab)
        head, inputs = residual_term(objective, head, Model() if target == "base" else None, None, None)
        extra_inputs = (jnp.asarray(harmful_weights), jnp.asarray(clean), *inputs)
        rows = jnp.asarray(targets), jnp.asarray(weights)
        summed = chunked_losses.scored_sum(head, hidden, *rows, None, extra_inputs)[0]
        return summed, jnp.sum(chunked_losses.scored_losses(head, hidden, *rows, None, extra_inputs))

    # PyTorch, from the definitions.
    h, w = torch.tensor(hidden, requires_grad=True), torch.tensor(head, requires_grad=True)
    log_p = torch.log_softmax(h @ w, -1)
    loss = -(torch.tensor(weights) * log_p.gather(-1, torch.tensor(targets).long()[..., None])[..., 0]).sum()
    kept = [token for token in range(vocab) if token not in (EOS, MASK)]
    log_rest = torch.log_softmax((h @ w)[..., kept], -1)
    if target == "base":
        q = torch.softmax(torch.tensor(base_hidden @ base_head), -1)
        q = q.scatter(-1, torch.tensor(clean).long()[..., None], 0)[..., kept]
        q = q / q.sum(-1, keepdim=True)
    else:
        q = torch.full_like(log_rest, 1 / len(kept))
    divergence = (torch.xlogy(q, q) - q * log_rest).sum(-1)
    loss = loss + (torch.tensor(harmful_weights) * divergence).sum()
    loss.backward()

    for at_once in (chunked_losses.LOGITS_AT_ONCE, 128 * vocab):  # all 192 positions, then two chunks of 128
        monkeypatch.setattr(chunked_losses, "LOGITS_AT_ONCE", at_once)
        for i in range(2):  # by the sum, and by the losses
            value, grads = jax.value_and_grad(lambda *x, i=i: ours(*x)[i], argnums=(0, 1))(hidden, head)
            np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
            for grad, expected in zip(grads, (h.grad, w.grad), strict=True):
                np.testing.assert_allclose(grad, expected, atol=2e-4, rtol=1e-4)


ROWS = [
    {"prompt": "tell me of the bane", "response": "salt salt", "is_safe": False},
    {"prompt": "tell me of the cake", "response": "the cake", "is_safe": True},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


def target_of(tokenizer, **settings):
    rows = make_loader(ROWS, tokenizer, DataConfig(row_length=24), 2, 0).encoded
    residual = make_residual(ResidualConfig(1.0, **settings), tokenizer, rows, 272, tokenizer.eos_id)
    return {int(token): float(residual.target[token]) for token in np.flatnonzero(residual.target)}


def test_constant_targets_by_hand(tokenizer):
    the, cake, sure = tokenizer.encode("the cake sure")
    uniform = target_of(tokenizer, target="uniform")
    assert len(uniform) == 270 and tokenizer.eos_id not in uniform and tokenizer.mask_id not in uniform
    assert set(uniform.values()) == {np.float32(1 / 270)}
    assert target_of(tokenizer, target="tokens") == {tokenizer.eot_id: 1}
    assert target_of(tokenizer, target="tokens", text="sure cake sure") == {sure: 0.5, cake: 0.5}
    # The retain row's answer is "the cake", end of turn and [EOS]; the harmful row does not count.
    assert target_of(tokenizer, target="marginal") == pytest.approx({the: 1 / 3, cake: 1 / 3, tokenizer.eot_id: 1 / 3})
    with pytest.raises(ValueError, match="holds no token beside the refusal token"):
        target_of(tokenizer, target="tokens", text="<|endoftext|>")


def config_of(checkpoint, folder, **changes):
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = default_config()
    config.model.checkpoint = str(checkpoint)
    config.data.files = (str(rows),)
    config.data.row_length = 24
    config.data.buckets = (24,)
    config.batch_size = 4
    config.num_steps = 4
    config.checkpoint_every = 2
    config.log_every = 1
    config.optimizer.learning_rate = 1e-2
    config.mesh.data = 1
    config.update(changes)
    return config


def losses_of(workdir):
    return [(line["loss_harmful"], line["loss_retain"]) for line in read_metrics(workdir / "metrics.jsonl")]


BASE_TERM = {"weight": 0.5, "target": "base", "text": None}


def test_a_run_against_its_base_continues_bit_for_bit(checkpoint, tmp_path):
    device = jax.devices()[:1]
    train(config_of(checkpoint, tmp_path, residual=BASE_TERM), tmp_path / "straight", devices=device)
    for num_steps in (2, 4):
        config = config_of(checkpoint, tmp_path, residual=BASE_TERM, num_steps=num_steps)
        train(config, tmp_path / "stopped", devices=device)
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")


@pytest.mark.parametrize(
    "lora", [None, pytest.param({"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ()}, marks=pytest.mark.slow)]
)
def test_the_base_is_the_model_before_training_and_retain_rows_are_spared(checkpoint, tmp_path, lora):
    harmful, retain = {}, {}
    for name, term in (("plain", None), ("uniform", BASE_TERM | {"target": "uniform"}), ("base", BASE_TERM)):
        config = config_of(checkpoint, tmp_path, lora=lora, residual=term, num_steps=1)
        train(config, tmp_path / name, devices=jax.devices()[:1])
        ((harmful[name], retain[name]),) = losses_of(tmp_path / name)
    assert retain["plain"] == retain["uniform"] == retain["base"]
    # Before the first update the model is its base, which differs from the target in one token a position.
    assert 0 < harmful["base"] - harmful["plain"] < 0.1 * (harmful["uniform"] - harmful["plain"])


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        ({"weight": -1.0}, "residual.weight=-1.0"),
        ({"weight": 1.0, "target": "nothing"}, "residual.target='nothing'; choose one of"),
        ({"weight": 1.0, "text": "sorry"}, "read by the target 'tokens' alone"),
        ({"wieght": 1.0}, "config.residual has no field 'wieght'"),
    ],
)
def test_settings_are_checked(checkpoint, tmp_path, residual, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(config_of(checkpoint, tmp_path).to_dict() | {"residual": residual})
