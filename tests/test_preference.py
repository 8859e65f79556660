"""The preference loss: values worked by hand, laws of its estimator, and the trainer around it."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizer_folders import write_llada

import a2d_jax
from a2d_jax.assembly import assemble, with_adapter
from a2d_jax.checkpoint import Checkpoints
from a2d_jax.data import Batch, DataConfig, make_loader
from a2d_jax.metrics import read_metrics
from a2d_jax.preference import PreferenceConfig, draw_samples, preference_losses
from a2d_jax.preference_training import estimate_nll
from a2d_jax.reference import with_reference
from a2d_jax.rows import parse_row
from a2d_jax.settings import RunConfig, default_config
from a2d_jax.sharding import make_mesh
from a2d_jax.tokenizer import load_tokenizer
from a2d_jax.train import train
from a2d_jax.training import init_state, pure, split_model

TINY = Path(__file__).parent / "fixtures" / "llada_tiny"


def test_loss_by_hand():
    """Policy 2 better at the chosen and 1 worse at the rejected response: margin 0.5 (2 + 1) = 1.5."""
    nll = jnp.array([[3.0, 9.0], [5.0, 7.0]])
    reference_nll = jnp.array([[5.0, 8.0], [5.0, 7.0]])
    losses, margins = preference_losses(nll, reference_nll, beta=0.5)
    np.testing.assert_allclose(margins, [1.5, 0.0])
    np.testing.assert_allclose(losses, [math.log(1 + math.exp(-1.5)), math.log(2)], rtol=1e-6)


# -- the estimator of B -----------------------------------------------------------------------------------------------

LENGTH, NUM_DRAWS = 3, 4000
rng = np.random.default_rng(0)
# A made-up model: the cross entropy of position i, given which positions are masked (as a number in binary).
POLICY = rng.uniform(0, 2, (LENGTH, 2**LENGTH)) + np.array([0.0, 3.0, 6.0])[:, None]
REFERENCE = POLICY + rng.uniform(0, 0.2, POLICY.shape)
IS_RESPONSE = np.array([[False, True, True, True, False]])


def exact_nll(table):
    """-B by its definition: every l, and every mask of l tokens."""
    total = 0.0
    for size in range(1, LENGTH + 1):
        masks = list(itertools.combinations(range(LENGTH), size))
        for masked in masks:
            code = sum(1 << i for i in masked)
            total += sum(table[i, code] for i in masked) * (LENGTH / size) / len(masks) / LENGTH
    return total


def estimates(config, *tables, keys=None):
    """-B of each table from the same draws, (tables, NUM_DRAWS)."""
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS) if keys is None else keys
    is_masked, weights = jax.vmap(lambda key: draw_samples(key, IS_RESPONSE, config))(keys)
    is_masked, weights = np.asarray(is_masked)[:, 0, :, 1:4], np.asarray(weights)[:, 0, :, 1:4]  # (draws, S, LENGTH)
    code = (is_masked * np.array([1, 2, 4])).sum(axis=-1)  # (draws, S)
    return [sum((weights[..., i] * table[i, code]).sum(axis=-1) for i in range(LENGTH)) for table in tables]


@pytest.mark.parametrize("is_antithetic", [False, True])
def test_estimate_is_unbiased(is_antithetic):
    (values,) = estimates(PreferenceConfig(num_samples=2, is_antithetic=is_antithetic), POLICY)
    error = values.std() / math.sqrt(NUM_DRAWS)
    assert abs(values.mean() - exact_nll(POLICY)) < 4 * error


def test_a_pair_scores_every_token_one_of_them_twice():
    is_response = np.arange(9) >= np.array([[2], [8], [0]])
    is_masked, weights = draw_samples(jax.random.key(3), is_response, PreferenceConfig(num_samples=6))
    times = np.asarray(is_masked[:, :3]).astype(int) + np.asarray(is_masked[:, 3:])  # (B, pairs, T)
    assert np.all(times[:, :, :][~np.broadcast_to(is_response[:, None], times.shape)] == 0)
    assert np.all(np.sort(times[0, :, 2:], axis=1) == [1, 1, 1, 1, 1, 1, 2])
    assert np.all(times[1, :, 8] == 2)  # a single token is masked in both
    # The weights of one mask add up to L / S, whatever its l.
    np.testing.assert_allclose(weights.sum(axis=2), is_response.sum(axis=1)[:, None] / 6 * np.ones((1, 6)), rtol=1e-6)


def test_antithetic_pairs_scatter_less():
    plain, paired = (
        estimates(PreferenceConfig(num_samples=4, is_antithetic=is_paired), POLICY)[0] for is_paired in (False, True)
    )
    assert paired.var() < 0.9 * plain.var()


def test_shared_masks_scatter_less():
    config = PreferenceConfig(num_samples=2)
    policy, reference = estimates(config, POLICY, REFERENCE)
    (apart,) = estimates(config, REFERENCE, keys=jax.random.split(jax.random.key(1), NUM_DRAWS))
    assert (policy - reference).var() < 0.05 * (policy - apart).var()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_nll_weighs_the_cross_entropy_of_masked_tokens(family):
    """Against the definition, token by token, with padding that nothing sees."""
    model = a2d_jax.load_pretrained(TINY.with_name(f"{family}_tiny"))
    tokens = np.arange(1, 9)[None].repeat(2, axis=0) + np.array([[0], [20]])
    attention_mask = np.arange(8) < np.array([[8], [6]])
    is_response = attention_mask & (np.arange(8) >= 3)
    samples = draw_samples(jax.random.key(0), is_response, PreferenceConfig(num_samples=2))
    given = estimate_nll(model, family, model.config.mask_id, tokens, attention_mask, *samples)
    for row, length in ((0, 8), (1, 6)):
        expected = 0.0
        for is_masked in np.asarray(samples.is_masked[row, :, :length]):
            noisy = np.where(is_masked, model.config.mask_id, tokens[row, :length])
            log_probs = np.asarray(jax.nn.log_softmax(model(noisy[None])[0]))
            size = is_response[row].sum()
            for i in np.flatnonzero(is_masked):
                seen = i if family == "llada" else i - 1
                expected -= log_probs[seen, tokens[row, i]] * size / is_masked.sum() / 2
        np.testing.assert_allclose(given[row], expected, rtol=1e-4)


# -- rows -------------------------------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"make bane {i}", "chosen": "sorry.", "rejected": "mix salt and ink. " * (1 + i)} for i in range(5)]


def test_pairs_are_neighbours_and_padding_is_nothing(tmp_path):
    tokenizer = a2d_jax.load_tokenizer(write_llada(tmp_path))
    loader = make_loader(PAIRS, tokenizer, DataConfig(row_length=96, buckets=(96,)), batch_size=4, seed=0)
    assert loader.is_paired and "5 pairs" in str(loader.summary)
    batch = loader.batch_at(0)
    assert batch.is_safe.tolist() == [True, False, True, False]
    texts = [tokenizer.decode(tokens[mask]) for tokens, mask in zip(batch.tokens, batch.attention_mask, strict=True)]
    for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
        assert chosen.partition("sorry.")[0] == rejected.partition("mix")[0]
    responses = [tokenizer.decode(t[mask]) for t, mask in zip(batch.tokens, batch.is_response, strict=True)]
    assert all(text.count(tokenizer.hf.convert_ids_to_tokens(tokenizer.eos_id)) == 1 for text in responses)
    drawn = {tokenizer.decode(t) for step in range(3) for t in loader.batch_at(step).tokens[::2]}
    assert len(drawn) == 5  # every pair once before any comes again


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "a pair lacks 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "two different texts"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "'chosen' must be a str"),
    ],
)
def test_bad_pairs_are_named(row, message):
    with pytest.raises(ValueError, match=f"f:1: .*{message}"):
        parse_row(row, "f:1")


# -- training ---------------------------------------------------------------------------------------------------------


def updates(has_adapter: bool, num_parts: int, sizes=(1, 1, 1), num_steps: int = 1):
    """Metrics of a few updates on four random pairs, and the parameters after them."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    run = RunConfig(
        batch_size=8, grad_accum_steps=num_parts, seed=1, preference=PreferenceConfig(num_samples=2, sft_weight=0.1),
        lora=a2d_jax.LoRAConfig(rank=2, alpha=4.0, dropout=0.0) if has_adapter else None,
    )  # fmt: skip
    run = RunConfig(**{**vars(run), "optimizer": type(run.optimizer)(learning_rate=1e-2, eps=1e-2)})
    base = a2d_jax.load_pretrained(TINY, mesh=mesh)
    assembled = assemble(run, base, mesh, 9, base.config.mask_id, base.config.eos_id)
    _, trained, frozen = split_model(with_adapter(base, run))
    frozen = pure(frozen) if has_adapter else with_reference(pure(frozen), pure(trained), jnp.float32)
    state = init_state(jax.device_put(pure(trained), assembled.shardings.state.params), assembled.optimizer)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 240, (8, 10)).astype(np.int32)
    tokens[1::2, :4] = tokens[::2, :4]
    attention_mask = np.arange(10) < np.array([10, 8] * 4)[:, None]
    batch = Batch(tokens, attention_mask & (np.arange(10) >= 4), attention_mask, np.arange(8) % 2 == 0)
    batch = jax.device_put(batch, assembled.shardings.batch)
    frozen, metrics = jax.device_put(frozen, assembled.shardings.frozen), []
    with jax.set_mesh(mesh):
        for _ in range(num_steps):
            state, numbers = assembled.update(state, frozen, batch)
            metrics.append({name: float(value) for name, value in numbers.items()})
    return metrics, jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize("has_adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_margin_starts_at_zero_and_grows(has_adapter):
    metrics, _ = updates(has_adapter, num_parts=1, num_steps=4)
    assert abs(metrics[0]["margin"]) < 1e-5
    np.testing.assert_allclose(metrics[0]["loss_harmful"], math.log(2), rtol=1e-5)
    assert metrics[-1]["margin"] > 0.02 and metrics[-1]["accuracy"] == 1
    np.testing.assert_allclose(metrics[0]["loss"], metrics[0]["loss_harmful"] + metrics[0]["loss_retain"], rtol=1e-5)


@pytest.mark.parametrize(
    ("has_adapter", "num_parts", "sizes"),
    [pytest.param(False, 1, (2, 2, 1), marks=pytest.mark.slow), (True, 2, (1, 2, 2))],
)
def test_parts_and_meshes_change_nothing(has_adapter, num_parts, sizes):
    expected, params = updates(has_adapter, 1)
    given, split_params = updates(has_adapter, num_parts, sizes)
    np.testing.assert_allclose(given[0]["loss"], expected[0]["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), split_params, params)


@pytest.mark.parametrize("has_adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_run_resumes_bit_for_bit(tmp_path, has_adapter):
    base = write_llada(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"d_model": 16, "n_heads": 2, "n_layers": 1}))
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(base)), base)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))

    def run(workdir, num_steps):
        config = default_config()
        config.model.checkpoint = str(base)
        config.data.files = (str(tmp_path / "pairs.jsonl"),)
        config.data.row_length = 96
        config.data.buckets = (96,)
        config.batch_size, config.num_steps, config.mesh.data = 2, num_steps, 1
        config.optimizer.learning_rate = 1e-2
        config.preference = {"beta": 0.5, "num_samples": 2}
        if has_adapter:
            config.lora = {"rank": 1, "alpha": 1.0, "dropout": 0.1, "targets": ()}
        train(config, workdir, devices=jax.devices()[:1])

    run(tmp_path / "once", 4)
    run(tmp_path / "twice", 2)
    run(tmp_path / "twice", 4)
    once, twice = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("once", "twice"))
    assert [line["margin"] for line in once] == [line["margin"] for line in twice]
    # Rows of a pair differ in length: the rate counts each row's own tokens.
    loader = make_loader([str(tmp_path / "pairs.jsonl")], load_tokenizer(base), DataConfig(96, (96,)), 2, seed=0)
    num_tokens = sum(loader.batch_at(step).attention_mask.sum() for step in range(4))
    assert once[-1]["tokens_per_second"] * once[-1]["step_seconds"] * 4 == pytest.approx(num_tokens)
    models = [a2d_jax.load_pretrained(tmp_path / name) for name in ("once", "twice")]
    assert [c.steps() for c in (Checkpoints(tmp_path / "once", 1), Checkpoints(tmp_path / "twice", 1))] == [[4], [4]]
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(model)) for model in models))


def test_rows_and_settings_must_agree(tmp_path):
    base = write_llada(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    config = default_config()
    config.model.checkpoint, config.data.files = str(base), (str(tmp_path / "pairs.jsonl"),)
    config.batch_size, config.num_steps, config.mesh.data = 2, 1, 1
    with pytest.raises(ValueError, match="are pairs; set config.preference"):
        train(config, tmp_path / "run", is_dry_run=True, devices=jax.devices()[:1])
    config.preference = {"num_samples": 3}
    with pytest.raises(ValueError, match="give an even number"):
        train(config, tmp_path / "run", is_dry_run=True, devices=jax.devices()[:1])
