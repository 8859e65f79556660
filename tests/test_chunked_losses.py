"""The loss in chunks of scored positions is the loss of all logits, value and gradients, in fewer multiplications."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2d_jax import chunked_losses
from a2d_jax.chunked_losses import Head, scored_losses, scored_sum
from a2d_jax.losses import align_logits, align_targets, cross_entropy
from a2d_jax.sharding import make_mesh
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
    seen = lambda _, __, hidden, key: jnp.broadcast_to(jax.random.normal(key, (V,)), (*hidden.shape[:2], V))  # noqa: E731
    head = Head(seen, None, None, V)
    value = scored_losses(head, hidden, jnp.zeros_like(targets), jnp.ones_like(weights), jax.random.key(0))
    assert len(np.unique(np.asarray(value).round(5))) == B * T // 128
