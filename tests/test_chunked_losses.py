"""The loss in chunks of scored positions is the loss of all logits, value and gradients, in fewer multiplications."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import a2d_jax
from a2d_jax import chunked_losses
from a2d_jax.assembly import with_adapter
from a2d_jax.chunked_losses import Head, scored_losses, scored_sum
from a2d_jax.losses import align_logits, align_targets, cross_entropy
from a2d_jax.masking import NoisedBatch
from a2d_jax.models.lora import LoRAConfig
from a2d_jax.objective import Objective
from a2d_jax.residual import Residual, ResidualConfig
from a2d_jax.settings import RunConfig
from a2d_jax.sharding import make_mesh
from a2d_jax.training import loss_and_grads, pure, split_model
from launch import hlo

B, T, D, V = 8, 96, 16, 40


def inputs(share: float):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(np.where(rng.random((B, T)) < share, rng.uniform(0.1, 5, (B, T)), 0), jnp.float32)
    return hidden, head, targets, weights


def product_with(kernel):
    return Head(lambda kernel, _, hidden, key: hidden @ kernel, kernel, None, V)


def by_chunks(hidden, head, targets, weights):
    return scored_losses(product_with(head), hidden, targets, weights)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_losses, "LOGITS_AT_ONCE", 128 * V)  # 128 of the 768 positions


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("objective", ["llada", "dream"])
def test_chunks_give_the_loss_of_each_position_and_its_gradients(small_chunks, share, objective):
    hidden, head, targets, weights = inputs(share)
    scale = jnp.asarray(np.random.default_rng(1).normal(size=(B, 1)), jnp.float32)  # rows count differently
    if objective == "dream":
        weights = weights.at[:, 0].set(0)  # which no logits predict

    def whole(hidden, head):
        logits = align_logits(hidden @ head, objective)
        return jnp.sum(scale * weights * cross_entropy(logits, targets))

    def chunked(hidden, head):
        return jnp.sum(scale * by_chunks(hidden, head, *align_targets(targets, weights, objective)))

    expected, expected_grads = jax.value_and_grad(whole, argnums=(0, 1))(hidden, head)
    value, grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_sum_finds_its_gradients_on_the_way(small_chunks, share):
    hidden, head, targets, weights = inputs(share)

    def whole(hidden, head):
        return 3 * jnp.sum(weights * cross_entropy(hidden @ head, targets))

    def summed(hidden, head):
        total, losses = scored_sum(product_with(head), hidden, targets, weights)
        return 3 * total, losses

    expected, expected_grads = jax.value_and_grad(whole, argnums=(0, 1))(hidden, head)
    (value, losses), grads = jax.jit(jax.value_and_grad(summed, argnums=(0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses, by_chunks(hidden, head, targets, weights), rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-4)


def test_the_logits_of_a_sum_are_computed_once(small_chunks):
    """A chunk takes three products, for logits, dhidden and dhead; a fourth where its losses may be weighed anew."""
    hidden, head, targets, weights = inputs(0.5)

    def num_products(loss) -> int:
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return str(step.lower(hidden, head).as_text()).count("stablehlo.dot_general")

    assert num_products(lambda hidden, head: scored_sum(product_with(head), hidden, targets, weights)[0]) == 3
    assert num_products(lambda hidden, head: jnp.sum(by_chunks(hidden, head, targets, weights))) == 4


def test_no_array_of_all_logits_exists(small_chunks):
    hidden, head, targets, weights = inputs(0.5)
    step = jax.jit(jax.grad(lambda hidden, head: jnp.sum(by_chunks(hidden, head, targets, weights)), argnums=(0, 1)))
    text = step.lower(hidden, head).compile().as_text()
    sizes = [a.shape for c in hlo.parse(text).computations.values() for i in c.instructions.values() for a in i.arrays]
    logits = [shape for shape in sizes if V in shape and D not in shape]
    assert logits and max(int(np.prod(shape)) for shape in logits) == 128 * V


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 4, 2)])
def test_a_mesh_changes_no_number(small_chunks, sizes):
    hidden, head, targets, weights = inputs(0.4)
    expected = by_chunks(hidden, head, targets, weights)
    chunked_losses.LOGITS_AT_ONCE = V  # so that the parts of the batch have chunks too
    with jax.set_mesh(make_mesh(*sizes)):
        value = jax.jit(by_chunks)(hidden, head, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def test_dropout_of_the_head_differs_between_chunks(small_chunks):
    hidden, head, targets, weights = inputs(1.0)
    seen = lambda _, __, hidden, key: jnp.broadcast_to(jax.random.normal(key, (V,)), (*hidden.shape[:2], V))
    head = Head(seen, None, None, V)
    value = scored_losses(head, hidden, jnp.zeros_like(targets), jnp.ones_like(weights), jax.random.key(0))
    assert len(np.unique(np.asarray(value).round(5))) == B * T // 128


def test_a_training_step_in_chunks_and_parts_is_the_step_at_once(monkeypatch):
    """An adapter on the head, gradients in two parts, and the residual term against the base; then dropout."""
    run = RunConfig(lora=LoRAConfig(rank=2, dropout=0.5, targets=("q_proj", "lm_head")))
    model = with_adapter(a2d_jax.load_pretrained(Path(__file__).parent / "fixtures" / "llada_tiny"), run)
    graphdef, trained, frozen = split_model(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), pure(trained))
    tokens = jnp.asarray(rng.integers(1, 200, (16, 20)), jnp.int32)  # 160 positions in each part
    masked = jnp.asarray(rng.random(tokens.shape) < 0.9)
    is_response, is_safe = jnp.ones_like(masked), jnp.arange(16) % 2 == 0
    batch = NoisedBatch(
        tokens=tokens, noisy_tokens=jnp.where(masked, 0, tokens), is_masked=masked,
        mask_prob=jnp.full(masked.shape, 0.9), is_response=is_response, is_safe=is_safe,
    )  # fmt: skip
    residual = Residual(ResidualConfig(0.5, "base"), None)
    objective = Objective("llada", mask_id=0, refusal_id=1, grad_accum_steps=2, residual=residual)

    def step(key):
        compute = lambda *x: loss_and_grads(graphdef, objective, *x, batch, is_response, key, tokens)
        return jax.jit(compute)(params, pure(frozen))

    at_once = step(None)
    monkeypatch.setattr(chunked_losses, "LOGITS_AT_ONCE", 1)  # the least, 128 positions
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), step(None), at_once)
    losses, grads = step(jax.random.key(0))
    assert not np.allclose(losses, at_once[0])
    assert all(np.isfinite(grad).all() and np.any(grad) for grad in jax.tree.leaves(grads))
