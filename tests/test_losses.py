"""Loss, gradients and AdamW steps against the recorded PyTorch runs; laws of padding and accumulation; schedules."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import a2d_jax
from a2d_jax.losses import position_weights
from a2d_jax.masking import NoisedBatch
from a2d_jax.models.naming import tensor_names
from a2d_jax.objective import Objective
from a2d_jax.training import (
    OptimizerConfig,
    learning_rate,
    loss_and_grads,
    make_optimizer,
    pure,
    split_model,
)

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.stem for path in (FIXTURES / "a2d_loss").glob("*.npz"))
FULL_CASES = [case for case in CASES if "lora" not in case]
BUCKET = 20  # longer than every recorded batch


@functools.cache
def load(case: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "a2d_loss" / f"{case}.npz") as file:
        return dict(file)


@functools.cache
def load_model(family: str, has_adapter: bool = False):
    adapter = FIXTURES / f"{family}_lora" if has_adapter else None
    return a2d_jax.load_pretrained(FIXTURES / f"{family}_tiny", adapter=adapter)


def noised_batch(recorded, length: int | None = None) -> tuple[NoisedBatch, jax.Array]:
    """The recorded batch and its attention mask, padded to `length` with columns that are nothing."""
    num_rows, real = recorded["input_ids"].shape
    pad = ((0, 0), (0, (length or real) - real))
    prompts = np.minimum(recorded["prompt_lengths"], real)[:, None]
    batch = NoisedBatch(
        tokens=np.pad(recorded["target_ids"], pad),
        noisy_tokens=np.pad(recorded["noisy_batch"], pad),
        is_masked=np.pad(recorded["masked_indices"], pad),
        mask_prob=np.pad(recorded["p_mask"], pad, constant_values=1),
        is_response=np.pad(np.arange(real) >= prompts, pad),
        is_safe=recorded["is_safe"],
    )
    attention_mask = np.pad(np.ones((num_rows, real), bool), pad)
    return jax.tree.map(jnp.asarray, batch), jnp.asarray(attention_mask)


@functools.cache
def grad_function(family: str, has_adapter: bool = False, grad_accum_steps: int = 1):
    """Jitted (params, batch, mask) -> (loss, grads) of a fixture's model, and those params."""
    graphdef, trained, frozen = split_model(load_model(family, has_adapter))
    objective = Objective(family, mask_id=0, refusal_id=0, grad_accum_steps=grad_accum_steps)

    def compute(params, frozen, noised, mask):
        row_loss, grads = loss_and_grads(graphdef, objective, params, frozen, noised, mask, None)
        return jnp.sum(row_loss), grads

    compiled = jax.jit(compute)
    return (lambda params, *batch: compiled(params, pure(frozen), *batch)), pure(trained)


def under_their_names(config, params) -> dict[str, np.ndarray]:
    named = {}
    for name in tensor_names(config):
        value = functools.reduce(lambda tree, key: tree[key], name.path, params)
        value = np.asarray(value if name.layer is None else value[name.layer])
        named[name.hf_name] = value.T if name.is_transposed else value
    return named


def adapter_under_their_names(config, params) -> dict[str, np.ndarray]:
    """The same for an adapter, as PEFT called its tensors; lora_A is (r, in) there and (in, r) here."""
    prefix = {"llada": "base_model.model.", "dream": "base_model.model.model."}[config.family]
    named = {}
    for name in tensor_names(config):
        if name.path[-1] != "kernel":
            continue
        module = functools.reduce(lambda tree, key: tree.get(key, {}), name.path[:-1], params)
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            if ours in module:
                value = np.asarray(module[ours] if name.layer is None else module[ours][name.layer])
                hf_module = name.hf_name.removesuffix(".weight")
                named[f"{prefix}{hf_module}.{theirs}.default.weight"] = value.T
    return named


def assert_grads_match(recorded, named) -> None:
    expected = {key.removeprefix("grad/"): value for key, value in recorded.items() if key.startswith("grad/")}
    assert expected
    for name, value in expected.items():
        assert np.abs(named[name] - value).max() <= 1e-4 * np.abs(value).max(), name


@pytest.mark.parametrize("case", FULL_CASES)
def test_loss_equals_the_recorded_one(case):
    recorded, family = load(case), case.split("_")[0]
    batch, _ = noised_batch(recorded)
    num_rows, length = batch.tokens.shape
    # One compiled forward pass for all cases: rows and columns are added, hidden, and cut off again.
    tokens = jnp.pad(batch.noisy_tokens, ((0, 4 - num_rows), (0, BUCKET - length)))
    logits = load_model(family)(tokens, attention_mask=jnp.broadcast_to(jnp.arange(BUCKET) < length, tokens.shape))
    loss = a2d_jax.a2d_loss(logits[:num_rows, :length], batch, objective=family)
    assert abs(float(loss) - recorded["loss"]) <= 1e-5 * max(1, abs(recorded["loss"]))


@pytest.mark.parametrize("case", FULL_CASES)
def test_loss_and_gradients_in_a_longer_bucket_equal_the_recorded_ones(case):
    recorded, family = load(case), case.split("_")[0]
    compute, params = grad_function(family)
    loss, grads = compute(params, *noised_batch(recorded, BUCKET))
    assert abs(float(loss) - recorded["loss"]) <= 1e-5 * max(1, abs(recorded["loss"]))
    if "no_masked" in case:
        assert float(optax.tree.norm(grads)) == 0
        return
    assert_grads_match(recorded, under_their_names(load_model(family).config, grads))
    np.testing.assert_allclose(optax.tree.norm(grads), recorded["grad_global_norm"], rtol=1e-5)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_adapter_gradients_and_three_adamw_steps_equal_the_recorded_ones(family):
    recorded = load(f"{family}_lora_mixed")
    config = load_model(family, has_adapter=True).config
    compute, params = grad_function(family, has_adapter=True)
    batch = noised_batch(recorded, BUCKET)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, weight_decay=0.1), num_steps=3)
    opt_state, losses = optimizer.init(params), []
    for step in range(4):
        loss, grads = compute(params, *batch)
        losses.append(float(loss))
        if step == 0:
            assert_grads_match(recorded, adapter_under_their_names(config, grads))
            np.testing.assert_allclose(optax.tree.norm(grads), recorded["grad_global_norm"], rtol=1e-5)
        if step < 3:
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(losses, recorded["adamw_losses"], atol=1e-5, rtol=1e-5)
    named = adapter_under_their_names(config, params)
    after = {key.removeprefix("after3/"): value for key, value in recorded.items() if key.startswith("after3/")}
    for name, value in after.items():
        np.testing.assert_allclose(named[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("family, parts", [("llada", 2), ("dream", 4)])
def test_micro_batches_add_up_to_the_whole_batch(family, parts):
    batch = noised_batch(load(f"{family}_mixed"), BUCKET)  # four rows
    whole, params = grad_function(family)
    loss, grads = whole(params, *batch)
    parts_loss, parts_grads = grad_function(family, grad_accum_steps=parts)[0](params, *batch)
    np.testing.assert_allclose(parts_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), parts_grads, grads)


def test_llada_weights_by_hand():
    """Two rows of five; answers of four and two tokens; p = 1/2 and 1/4: weights 1 / (p x answer length x rows)."""
    is_masked = jnp.array([[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]], bool)
    is_response = jnp.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], bool)
    batch = NoisedBatch(is_masked, is_masked, is_masked, jnp.array([[0.5], [0.25]]), is_response, jnp.array([True] * 2))
    expected = [[0, 0.25, 0, 0, 0.25], [0, 0, 0, 1, 0]]
    np.testing.assert_allclose(position_weights(batch, "llada"), expected)


def test_dream_weights_by_hand():
    """Position 0 has no logits before it; the other three masked ones share the mean: weights 1 / (p x 3)."""
    is_masked = jnp.array([[1, 1, 0], [0, 1, 1]], bool)
    batch = NoisedBatch(is_masked, is_masked, is_masked, jnp.array([[0.5], [0.25]]), is_masked, jnp.array([True] * 2))
    np.testing.assert_allclose(position_weights(batch, "dream"), [[0, 2 / 3, 0], [0, 4 / 3, 4 / 3]], rtol=1e-6)


@pytest.mark.parametrize("objective", ["llada", "dream", "causal"])
def test_a_batch_of_numpy_arrays_with_one_probability_a_row_has_the_same_loss(objective):
    """As many rows as positions, so that a row's probability could be taken for a position's."""
    rng = np.random.default_rng(0)
    tokens, is_masked = rng.integers(0, 7, (4, 4)), rng.random((4, 4)) < 0.7
    prob, logits = np.float32([0.2, 0.4, 0.6, 0.8]), rng.normal(size=(4, 4, 7)).astype(np.float32)
    batch = NoisedBatch(tokens, tokens, is_masked, prob, is_masked, np.array([True] * 4))
    expected = a2d_jax.a2d_loss(logits, jax.tree.map(jnp.asarray, batch._replace(mask_prob=prob[:, None])), objective)
    np.testing.assert_allclose(a2d_jax.a2d_loss(logits, batch, objective), expected, rtol=1e-6)
    lists = NoisedBatch(*(field.tolist() for field in batch))
    np.testing.assert_allclose(a2d_jax.a2d_loss(logits, lists, objective), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.ones((2, 2, 3), int)}, r"batch.tokens \(2, 2, 3\)"),
        ({"is_response": np.ones((2, 1), bool)}, r"is_response \(2, 1\)"),
    ],
)
def test_a_batch_of_other_shapes_has_no_loss(changes, message):
    whole = np.ones((2, 3), bool)
    batch = NoisedBatch(whole * 1, whole * 1, whole, whole * 0.5, whole, np.ones(2, bool))._replace(**changes)
    with pytest.raises(ValueError, match=message):
        a2d_jax.a2d_loss(np.zeros((2, 3, 4), np.float32), batch)


@pytest.mark.parametrize("objective", ["llada", "dream"])
def test_logits_that_are_not_scored_may_be_minus_infinity(objective):
    is_masked = jnp.array([[False, False, True]])  # scored by the logits of place 2, or, on Dream, of place 1
    batch = NoisedBatch(is_masked * 1, is_masked, is_masked, jnp.ones((1, 3)), is_masked, jnp.array([True]))
    loss_of = jax.jit(jax.value_and_grad(lambda logits: a2d_jax.a2d_loss(logits, batch, objective)))
    for ruled_out in (jnp.array([True, True, True]), jnp.array([True, False, False])):  # all tokens, or the target
        logits = jnp.where(ruled_out, -jnp.inf, jnp.ones((1, 3, 3)))
        logits = logits.at[0, 2 if objective == "llada" else 1].set(1.0)
        loss, grads = loss_of(logits)
        np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)
        assert jnp.isfinite(grads).all() and jnp.abs(grads).sum() > 0.5


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_schedules_rise_over_two_steps_and_fall_over_four(schedule, expected):
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=2), num_steps=6)
    np.testing.assert_allclose([float(rate(step)) for step in range(6)], 2 * np.array(expected), rtol=1e-6)


def test_clipping_scales_the_gradient_to_the_norm():
    params = {"kernel": jnp.array([3.0, 4.0])}
    for clip_norm, first_moment in ((None, [0.3, 0.4]), (1.0, [0.06, 0.08])):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm), num_steps=1)
        _, state = optimizer.update(params, optimizer.init(params), params)
        np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"], first_moment, rtol=1e-5)


def test_norm_scales_and_biases_are_not_decayed():
    params = {"kernel": jnp.ones(2), "scale": jnp.ones(2), "bias": jnp.ones(2)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.5), num_steps=1)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert float(updates["kernel"][0]) == -0.5
    assert float(updates["scale"][0]) == float(updates["bias"][0]) == 0
