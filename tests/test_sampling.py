"""Decoding against the recorded outputs of the original samplers, and the laws they break."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import a2d_jax
from a2d_jax import orders
from a2d_jax.decoding import Draws, propose
from a2d_jax.sampler_config import DREAM_ORDERS, SamplerConfig
from a2d_jax.sampling import generate, infill

FIXTURES = Path(__file__).parent / "fixtures"
A2D_ORDERS = {
    "forward": "left_to_right",
    "backward": "right_to_left",
    "low_confidence": "confidence",
    "random": "random",
}
EOT_ID = 254


def recordings(prefix):
    return sorted(path.stem for path in (FIXTURES / "sampling").glob(f"{prefix}*.npz"))


def read(name):
    recorded = np.load(FIXTURES / "sampling" / f"{name}.npz")
    args = json.loads(str(recorded["args_json"]))
    mask = recorded["attention_mask"].astype(bool) if "attention_mask" in recorded else None
    draws = None
    if "random_stream" in recorded:
        stream = jnp.asarray(recorded["random_stream"])
        draws = Draws(tokens=stream) if stream.ndim == 4 else Draws(positions=stream)
    return recorded, args, mask, draws


@pytest.fixture(scope="module")
def llada():
    return a2d_jax.load_pretrained(FIXTURES / "llada_tiny")


@pytest.fixture(scope="module")
def dream():
    return a2d_jax.load_pretrained(FIXTURES / "dream_tiny")


@pytest.mark.parametrize("name", recordings("llada_"))
def test_lladas_sampler_token_for_token(llada, name):
    recorded, args, mask, draws = read(name)
    kwargs = args["kwargs"]
    config = SamplerConfig(
        gen_length=kwargs["gen_length"], steps=kwargs["steps"], block_length=kwargs["block_length"],
        order=A2D_ORDERS[kwargs["remasking"]], temperature=kwargs["temperature"], cfg_scale=kwargs["cfg_scale"],
        logits_eos_inf=kwargs.get("logits_eos_inf", False), eot_id=EOT_ID,
        confidence_eos_eot_inf=kwargs.get("confidence_eos_eot_inf", False),
        count_prompt_masks="mask_ids_in_prompt" not in name,
    )  # fmt: skip
    result = generate(llada, recorded["input_ids"], config, prompt_mask=mask, draws=draws)
    np.testing.assert_array_equal(result.tokens, recorded["output_ids"])
    assert (np.asarray(result.num_forward) == recorded["n_forward"]).all()


@pytest.mark.parametrize("name", [name for name in recordings("dream_") if "quirk" not in name])
def test_dreams_sampler_token_for_token(dream, name):
    recorded, args, mask, _ = read(name)
    kwargs = args["kwargs"]
    config = SamplerConfig(
        gen_length=kwargs["max_new_tokens"], steps=kwargs["steps"], order=DREAM_ORDERS[kwargs["alg"]],
        temperature=kwargs["temperature"], top_p=kwargs["top_p"], top_k=kwargs["top_k"], eps=kwargs["eps"],
    )  # fmt: skip
    result = generate(dream, recorded["input_ids"], config, prompt_mask=mask)
    np.testing.assert_array_equal(result.tokens, recorded["output_ids"])
    assert (np.asarray(result.num_forward) == recorded["n_forward"]).all()


@pytest.mark.parametrize("name", recordings("a2d_llada_"))
def test_a2ds_infilling_of_llada_token_for_token(llada, name):
    recorded, args, mask, draws = read(name)
    kwargs = args["kwargs"]
    config = SamplerConfig(
        order=A2D_ORDERS[kwargs["remasking"]], temperature=kwargs["temperature"], ban_eos=args["eos_suppression_line"]
    )
    result = infill(llada, recorded["input_ids"], config, attention_mask=mask, draws=draws)
    np.testing.assert_array_equal(result.tokens, recorded["output_ids"])
    num_masks = (recorded["input_ids"] == llada.config.mask_id).sum(axis=1)
    np.testing.assert_array_equal(result.num_forward, num_masks)  # a row is charged for its own masks alone


@pytest.mark.parametrize("name", recordings("a2d_dream_"))
def test_a2ds_infilling_of_dream_token_for_token(dream, name):
    recorded, args, _, _ = read(name)
    appended = np.full((len(recorded["input_ids"]), args["kwargs"]["max_new_tokens"]), dream.config.mask_id)
    tokens = np.concatenate([recorded["input_ids"], appended], axis=1)
    result = infill(dream, tokens, SamplerConfig(order=A2D_ORDERS[args["kwargs"]["decoding"]]))
    np.testing.assert_array_equal(result.tokens, recorded["output_ids"])


# -- where the originals go wrong -------------------------------------------------------------------------------------


def test_rows_with_unequal_mask_counts_keep_their_text_and_end_without_masks(dream):
    recorded, args, _, _ = read("dream_quirk_unequal_mask_counts")
    tokens = np.pad(recorded["input_ids"], ((0, 0), (0, 1)), constant_values=dream.config.mask_id)
    assert (recorded["output_ids"] == dream.config.mask_id).any()  # the original's defect
    result = np.asarray(infill(dream, tokens, SamplerConfig(steps=args["kwargs"]["steps"])).tokens)
    was_text = tokens != dream.config.mask_id
    np.testing.assert_array_equal(result[was_text], tokens[was_text])
    assert not (result == dream.config.mask_id).any()


def test_masks_in_the_prompt_are_filled(llada):
    recorded, args, _, _ = read("llada_mask_ids_in_prompt")
    config = SamplerConfig(gen_length=16, steps=16, block_length=8)
    assert (recorded["output_ids"] == llada.config.mask_id).any()  # the original's defect
    result = generate(llada, recorded["input_ids"], config)
    assert not (np.asarray(result.tokens) == llada.config.mask_id).any()


@pytest.mark.parametrize("order", orders.ORDERS)
def test_a_row_decodes_the_same_alone_and_in_a_padded_batch(llada, order):
    draws = Draws(positions=jax.random.uniform(jax.random.key(0), (8, 2, 14)))
    config = SamplerConfig(gen_length=8, steps=8, block_length=4, order=order)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    batch = generate(llada, rows, config, draws=draws)
    alone = generate(llada, rows[1:], config, draws=Draws(positions=draws.positions[:, 1:, 3:]))
    np.testing.assert_array_equal(np.asarray(batch.tokens)[1, 3:], np.asarray(alone.tokens)[0])


def test_the_mask_is_never_chosen(llada):
    """A head whose favourite is [MASK] still ends with none."""
    model = nnx.clone(llada)
    model.lm_head.kernel[...] = jnp.zeros_like(model.lm_head.kernel[...])
    bias = jnp.zeros(llada.config.vocab_size).at[llada.config.mask_id].set(50.0).at[7].set(10.0)
    model.lm_head.bias = nnx.data(nnx.Param(bias, logical_axes=("vocab",)))
    result = infill(model, np.full((1, 5), llada.config.mask_id), SamplerConfig())
    np.testing.assert_array_equal(result.tokens, [[7] * 5])


@pytest.mark.parametrize("favourite", [1, 2, 3])  # [MASK], [EOS], the refusal token
@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 1}])
def test_where_truncation_leaves_nothing_that_may_be_written_the_next_is(favourite, settings):
    logits = jnp.zeros((1, 1, 8)).at[0, 0, favourite].set(50.0).at[0, 0, 5].set(10.0)
    config = SamplerConfig(method="dream", ban_eos=True, **settings)
    tokens, confidence, _ = propose(logits, jnp.zeros((1, 1), jnp.int32), config, 1, 2, 3, None, None)
    assert int(tokens[0, 0]) == 5
    assert (float(confidence[0, 0]) > 0.99) == (favourite != 1)  # [MASK] counts in the confidence, what is banned not


def test_what_is_banned_is_no_part_of_the_nucleus():
    probs = [0.3, 1e-9, 0.5, 1e-9, 0.15, 0.05]  # a text, [MASK], [EOS], the refusal token, two texts
    config = SamplerConfig(method="dream", ban_eos=True, top_p=0.7)  # of 0.6, 0.3, 0.1 without [EOS]: the first two
    logits, positions = jnp.log(jnp.array([[probs]])), jnp.zeros((1, 1), jnp.int32)
    tokens, confidence, _ = propose(logits, positions, config, 1, 2, 3, None, None)
    assert int(tokens[0, 0]) == 0
    np.testing.assert_allclose(confidence, [[2 / 3]], rtol=1e-5)


def test_a_masked_first_token_of_dream_does_not_see_the_padding_in_front(dream):
    mask_id, pad_id = dream.config.mask_id, dream.config.pad_id
    config = SamplerConfig(steps=2, order="left_to_right")
    alone = infill(dream, [[mask_id, 6, 7, mask_id]], config)
    padded = [[pad_id, pad_id, mask_id, 6, 7, mask_id]]
    is_real = np.array([[False, False, True, True, True, True]])
    beside = infill(dream, padded, config, attention_mask=is_real)
    np.testing.assert_array_equal(np.asarray(beside.tokens)[0, 2:], np.asarray(alone.tokens)[0])
    np.testing.assert_allclose(beside.eos_prob, alone.eos_prob, rtol=1e-3)


# -- rules worked by hand ---------------------------------------------------------------------------------------------


def test_even_quota_puts_the_remainder_first():
    quotas = [int(orders.even_quota(jnp.array([7]), step, 3)[0]) for step in range(3)]
    assert quotas == [3, 2, 2]


def test_dreams_grid_by_hand():
    rate = orders.dream_reveal_rate(2, 0.0)  # grid 1, 0.5, 0
    np.testing.assert_allclose(rate, [0.5, 1.0])


def test_highest_takes_the_left_one_on_ties_and_only_candidates():
    scores = jnp.array([[0.5, 0.9, 0.5, 0.5]])
    is_candidate = jnp.array([[True, False, True, True]])
    np.testing.assert_array_equal(orders.highest(scores, is_candidate, jnp.array([2])), [[True, False, True, False]])
    np.testing.assert_array_equal(orders.highest(scores, is_candidate, jnp.array([9])), is_candidate)


def test_order_scores_by_hand():
    probs = np.array([[[0.5, 0.3, 0.2], [0.8, 0.1, 0.1]]], np.float32)
    logits, positions = jnp.log(probs) + 3.0, jnp.array([[4, 9]])
    confidence = orders.token_probability(logits, jnp.array([[0, 1]]))
    np.testing.assert_allclose(confidence, [[0.5, 0.1]], rtol=1e-5)

    def score(order):
        return orders.order_scores(order, logits, confidence, positions, None)

    np.testing.assert_array_equal(score("confidence"), confidence)
    np.testing.assert_allclose(score("margin"), [[0.2, 0.7]], rtol=1e-5)
    entropy = [-(p * np.log(p)).sum() for p in probs[0]]
    np.testing.assert_allclose(score("entropy"), [[-e for e in entropy]], rtol=1e-5)
    np.testing.assert_array_equal(score("left_to_right"), [[-4, -9]])


def test_truncation_by_hand():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    kept = lambda **kw: np.isfinite(np.asarray(orders.truncate(logits, **kw))).tolist()
    assert kept(top_p=0.6, top_k=None) == [True, True, False, False]  # 0.3 crosses the mass and stays
    assert kept(top_p=None, top_k=3) == [True, True, True, False]
    assert kept(top_p=0.01, top_k=None) == [True, False, False, False]


@pytest.mark.parametrize("size", [1, 7, 96, 1000])
def test_argmax_is_numpys_without_what_is_never_written(size):
    rng = np.random.default_rng(size)
    logits = rng.integers(0, 4, (50, size)).astype(np.float32)  # ties everywhere: the lowest index counts
    np.testing.assert_array_equal(orders.argmax(logits), logits.argmax(axis=1))
    never = sorted({0, size // 2, size - 1})
    if size > len(never):
        kept = logits.copy()
        kept[:, never] = -np.inf
        np.testing.assert_array_equal(orders.argmax(logits, never), kept.argmax(axis=1))
    largest_is_out = np.where(np.arange(size) == size - 1, 9, logits)
    np.testing.assert_array_equal(orders.argmax(largest_is_out), size - 1)


def test_the_normaliser_is_that_of_the_whole_vocabulary():
    logits = np.random.default_rng(0).normal(size=(20, 96)).astype(np.float32) * 30
    logits[:, :40] = -np.inf  # a chunk that holds nothing, as truncation leaves them
    exact = np.log(np.sum(np.exp(logits.astype(np.float64)), axis=1))
    np.testing.assert_allclose(orders.log_normaliser(logits), exact, rtol=1e-6)


def test_gumbel_noise_does_not_overflow_and_draws_the_softmax():
    logits = jnp.array([200.0, 200.0 + np.log(3.0), -100.0])
    uniforms = jax.random.uniform(jax.random.key(0), (20_000, 3), minval=1e-30)
    drawn = np.asarray(orders.gumbel_argmax(jnp.broadcast_to(logits, (20_000, 3)), uniforms, 1.0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20_000, [0.25, 0.75, 0], atol=0.015)


@pytest.mark.parametrize("order", ["left_to_right", "right_to_left"])
def test_fixed_orders_reveal_in_that_order(llada, order):
    """With fewer steps than masks, the first tokens to appear are those at the order's own end."""
    tokens = np.full((1, 6), llada.config.mask_id)
    one_step = dataclasses.replace(SamplerConfig(order=order, steps=6))
    full = np.asarray(infill(llada, tokens, one_step).tokens)[0]
    by_hand = tokens[0].copy()
    for position in range(6) if order == "left_to_right" else reversed(range(6)):
        logits = np.asarray(llada(by_hand[None]))[0, position].copy()
        logits[llada.config.mask_id] = -np.inf
        by_hand[position] = logits.argmax()
    np.testing.assert_array_equal(full, by_hand)


def test_order_noise_still_fills_everything(dream):
    config = SamplerConfig(gen_length=8, steps=4, order="entropy", temperature=0.7, top_p=0.9, order_temperature=0.5)
    first = generate(dream, [[1, 2, 3]], config, jax.random.key(1))
    again = generate(dream, [[1, 2, 3]], config, jax.random.key(1))
    other = generate(dream, [[1, 2, 3]], config, jax.random.key(2))
    assert not (np.asarray(first.tokens) == dream.config.mask_id).any()
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)


# -- the monitor ------------------------------------------------------------------------------------------------------


def test_eos_prob_of_every_step_matches_the_plain_model(llada):
    config = SamplerConfig(gen_length=4, steps=4, order="left_to_right")
    result = generate(llada, [[3, 4, 5]], config)
    tokens = np.asarray(result.tokens)[0]
    for step in range(4):
        canvas = tokens.copy()
        canvas[3 + step :] = llada.config.mask_id
        probs = jax.nn.softmax(llada(canvas[None]))[0, 3 + step]
        np.testing.assert_allclose(result.eos_prob[0, step], probs[llada.config.eos_id], rtol=1e-4)


def test_rejected_rows_cost_one_pass_and_the_others_go_on(llada):
    rows = [[5, 6, 7], [9, 8, 7], [1, 2, 3]]
    plain = generate(llada, rows, SamplerConfig(gen_length=8, steps=8))
    first = np.asarray(plain.eos_prob)[:, 0]
    threshold = float(np.sort(first)[1])  # one row is above it
    guarded = generate(llada, rows, SamplerConfig(gen_length=8, steps=8, reject_above=threshold))
    rejected = np.asarray(guarded.is_rejected)
    np.testing.assert_array_equal(rejected, first > threshold)
    assert rejected.sum() == 1
    np.testing.assert_array_equal(guarded.num_forward, np.where(rejected, 1, 8))
    assert (np.asarray(guarded.tokens)[rejected, 3:] == llada.config.eos_id).all()
    np.testing.assert_array_equal(np.asarray(guarded.tokens)[~rejected], np.asarray(plain.tokens)[~rejected])
    assert np.isnan(np.asarray(guarded.eos_prob)[rejected, 1:]).all()


@pytest.mark.parametrize("number", [float, jnp.float32])
def test_the_loop_ends_when_every_row_is_rejected(llada, number):
    """A threshold may come out of an array, as P([EOS]) of another decoding does."""
    result = generate(llada, [[5, 6, 7]] * 2, SamplerConfig(gen_length=8, steps=8, reject_above=number(-1.0)))
    assert np.asarray(result.is_rejected).all() and (np.asarray(result.num_forward) == 1).all()


def test_more_steps_than_masks_cost_nothing(llada):
    result = infill(llada, np.array([[5, llada.config.mask_id, 7]]), SamplerConfig(steps=100))
    assert int(result.num_forward[0]) == 1


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 100, "block_length": 32}, "gen_length=100 is not a multiple of block_length=32"),
        ({"gen_length": 64, "block_length": 16, "steps": 3}, "steps=3 cannot be shared by 4 blocks"),
        ({"gen_length": 64, "block_length": 16, "steps": 6}, "use a multiple of 4, such as 8"),
    ],
)
def test_lengths_that_do_not_divide(llada, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(llada, [[1, 2]], SamplerConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "best"}, "order='best'"),
        ({"temperature": -1.0}, "give >= 0"),
        ({"steps": 0}, "at least 1"),
        ({"confidence_eos_eot_inf": True}, "needs eot_id"),
        ({"block_length": 0}, "block_length=0; give 1 or more"),
        ({"block_length": -4}, "block_length=-4; give 1 or more"),
        ({"top_k": 0}, "top_k=0; give 1 or more"),
        ({"reject_above": np.ones(2)}, r"reject_above has shape \(2,\); give one number"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llada", {"top_p": 0.9}),
        ("llada", {"top_k": 2, "method": "llada"}),
        ("dream", {"top_p": 0.9, "order": "left_to_right"}),
    ],
)
def test_a_truncation_that_the_method_does_not_know_is_refused(request, family, settings):
    model, config = request.getfixturevalue(family), SamplerConfig(gen_length=4, steps=4, **settings)
    with pytest.raises(ValueError, match=f"do nothing on a {family} model .*use method='dream'"):
        generate(model, [[1, 2]], config)
    assert dataclasses.replace(config, method="dream").resolve(family).is_truncated
    assert config.resolve("llama").is_truncated  # a causal model truncates whatever the order is called


@pytest.mark.parametrize("decode", [generate, infill])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([5, 257, 7], "is a list with 5, which is no list of token ids.*for a single one "),
        (["What is lime?"], "is a list with 'What is lime\\?', .*tokenizer.encode_prompt"),
        ([[5.0, 257.0]], r"is a list with \[5.0, 257.0\]"),
        ([], r"has shape \(0,\)"),
        (np.array([5, 257, 7]), r"has shape \(3,\)"),
        (np.zeros((0, 3), np.int32), r"has shape \(0, 3\)"),
        (np.array([[5.0, 257.0]]), "dtype float64"),
        ([[5, 257], [6, 257, 272]], "has the token id 272, but the model's ids are 0 to 271"),
        (np.array([[5, 257, -1]]), "has the token id -1, "),
    ],
)
def test_what_holds_no_rows_of_the_models_tokens_is_refused(llada, decode, given, message):
    with pytest.raises(ValueError, match=message):
        decode(llada, given, SamplerConfig(gen_length=4, steps=4))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True, True, False]], "False behind a token; move the padding to the left"),
        ([[True]], r"prompt_mask has shape \(1, 1\), prompt \(1, 3\)"),
    ],
)
def test_a_prompt_is_padded_on_the_left(llada, mask, message):
    with pytest.raises(ValueError, match=message):
        generate(llada, np.array([[5, 6, 7]]), SamplerConfig(gen_length=4, steps=4), prompt_mask=mask)


def test_texts_of_several_lengths_are_padded_for_infilling_too(llada):
    mask_id = llada.config.mask_id
    result = infill(llada, [[5, mask_id, 7], [mask_id, 9]])
    padded, mask = [[5, mask_id, 7], [-1, mask_id, 9]], [[True, True, True], [False, True, True]]  # by hand, unseen
    np.testing.assert_array_equal(result.tokens[:, 1:], infill(llada, padded, attention_mask=mask).tokens[:, 1:])


def test_a_padded_list_keeps_its_mask(llada):
    """Padding that the caller has put in front is not seen, in a list as in an array."""
    config = SamplerConfig(gen_length=8, steps=8)
    prompt, mask = [[1, 1, 5, 6, 7]], np.array([[False, False, True, True, True]])
    tokens = generate(llada, prompt, config, prompt_mask=mask).tokens[:, 5:]
    np.testing.assert_array_equal(tokens, generate(llada, [[5, 6, 7]], config).tokens[:, 3:])
    with pytest.raises(ValueError, match="prompts of several lengths: leave it out"):
        generate(llada, [[1, 5], [6]], config, prompt_mask=mask)


def test_a_text_without_masks_is_refused(llada):
    with pytest.raises(ValueError, match="no mask id"):
        infill(llada, [[1, 2, 3]])


def test_randomness_needs_a_key(llada):
    with pytest.raises(ValueError, match="pass key"):
        generate(llada, [[1, 2]], SamplerConfig(gen_length=4, steps=4, temperature=1.0))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"mask_id": None}, "mask_token_id=None"),
        ({"mask_id": 272}, "mask_token_id=272, .* but the model's ids are 0 to 271"),
        ({"eos_id": 300}, "eos_token_id=300, but the model's ids are 0 to 271"),
    ],
)
def test_a_model_without_a_mask_id_is_refused(llada, ids, message):
    model = nnx.clone(llada)
    model.config = dataclasses.replace(model.config, **ids)
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], SamplerConfig(gen_length=4, steps=4))
