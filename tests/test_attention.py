"""Plain attention against JAX's own, whole and in parts; the TPU kernel, interpreted here, against plain attention; and
which of the two is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2d_jax.models import attention
from a2d_jax.models.attention import attend, attend_parts, heads_first, splash, takes_splash

B, T, N, K, H = 2, 128, 4, 2, 128


def heads(seed: int, num_heads: int, length: int = T, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, num_heads, H)), dtype)


@pytest.fixture(scope="module")
def inputs():
    is_real = np.arange(T) < np.array([[T], [100]])  # the second row ends in padding
    return heads(0, N), heads(1, K), heads(2, K), jnp.asarray(is_real)[:, None, None]


@pytest.mark.parametrize("hides", ["nothing", "padding", "the future"])
def test_plain_attention_is_that_of_jax(inputs, hides):
    q, k, v, is_real = (x.astype(jnp.float32) for x in inputs)
    masks = {"nothing": None, "padding": is_real > 0, "the future": jnp.tril(jnp.ones((T, T), bool))[None, None]}
    mask = masks[hides]

    def by_jax(q, k, v):
        with jax.default_matmul_precision("highest"):
            return jax.nn.dot_product_attention(q, k, v, mask=mask)

    expected, pull_back = jax.vjp(by_jax, q, k, v)
    ours, pull_ours_back = jax.vjp(lambda *qkv: attend(*qkv, mask, jax.lax.Precision.HIGHEST), q, k, v)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    for grad, other in zip(pull_ours_back(expected), pull_back(expected), strict=True):
        np.testing.assert_allclose(grad, other, atol=1e-5 * float(jnp.abs(other).max()))


def test_parts_are_attended_to_as_one(inputs):
    q, k, v, mask = inputs
    whole = attend(q, k, v, mask, jax.lax.Precision.HIGHEST)
    cut = 40
    parts = [(heads_first(k[:, at], v[:, at]), mask[..., at]) for at in (slice(cut), slice(cut, None))]
    in_parts = attend_parts(q, parts, jax.lax.Precision.HIGHEST)
    assert in_parts.dtype == whole.dtype == jnp.bfloat16
    np.testing.assert_allclose(in_parts.astype(np.float32), whole.astype(np.float32), atol=0.01)


def test_the_kernel_is_plain_attention_on_real_positions(inputs):
    q, k, v, mask = inputs

    def loss(attend_by):
        def total(q, k, v):
            attended = attend_by(q, k, v).astype(jnp.float32)
            return jnp.sum(jnp.where(mask[:, 0, 0, :, None, None], attended, 0) ** 2)

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    value, grads = loss(lambda *qkv: splash(*qkv, mask, is_interpreted=True))
    expected, expected_grads = loss(lambda *qkv: attend(*qkv, mask, jax.lax.Precision.HIGHEST))
    assert float(value) == pytest.approx(float(expected), rel=2e-3)
    for grad, other in zip(grads, expected_grads, strict=True):
        largest = float(jnp.abs(other).max())
        np.testing.assert_allclose(grad.astype(np.float32), other.astype(np.float32), atol=0.02 * largest)


def test_padded_keys_are_not_seen_by_the_kernel(inputs):
    q, k, v, mask = inputs
    changed = jnp.where(mask[:, 0, 0, :, None, None], v, 100)
    first, second = (splash(q, k, values, mask, is_interpreted=True) for values in (v, changed))
    np.testing.assert_array_equal(first[1, :100].astype(np.float32), second[1, :100].astype(np.float32))


def test_the_plain_path_is_taken_away_from_tpus(inputs, monkeypatch):
    def fail(*_):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(attention, "splash", fail)
    assert attend(*inputs, jax.lax.Precision.HIGHEST).shape == (B, T, N, H)
    monkeypatch.setattr(attention, "is_for_tpu", lambda: True)
    with pytest.raises(AssertionError, match="kernel was called"):
        attend(*inputs, jax.lax.Precision.HIGHEST)


def test_what_the_kernel_does_not_compute_takes_the_plain_path(inputs):
    q, k, v, mask = inputs
    causal = jnp.tril(jnp.ones((T, T), bool))[None, None]
    assert takes_splash(q, k, mask) and takes_splash(q, k, None)
    assert not takes_splash(q, k, causal)
    assert not takes_splash(heads(0, N, dtype=jnp.float32), k, mask)  # whose softmax must be exact
    assert not takes_splash(q[:, :64], k[:, :64], None)  # does not fill the lanes
    assert not takes_splash(q[:, :1], k, None)  # a few positions against a cache
