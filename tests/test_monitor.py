"""Monitors: what they score, when they stop a row, how a threshold is found; and the record of a decoding."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import a2d_jax
from a2d_jax.monitor import any_position, any_step, calibrate, first_step
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import generate, infill

FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = [[5, 6, 7], [9, 8, 7, 30, 31], [1, 2, 3]]
CONFIG = SamplerConfig(gen_length=8, steps=8, block_length=4)
NAN = math.nan


@pytest.fixture(scope="module")
def llada():
    return a2d_jax.load_pretrained(FIXTURES / "llada_tiny")


@pytest.fixture(scope="module")
def traced(llada):
    """Decoded to the end, with everything on record."""
    result = generate(llada, PROMPTS, dataclasses.replace(CONFIG, monitor=any_position(math.inf)), trace=True)
    return jax.tree.map(np.asarray, result)


@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        (first_step(0.5), [0.1, NAN, NAN]),
        (any_step(0.5), [0.1, 0.7, NAN]),
        (any_step(0.5, num_steps=3), [0.1, NAN, NAN]),
        (any_position(0.5), [0.6, 0.7, NAN]),
        (any_position(0.5, num_positions=2), [0.3, 0.7, NAN]),
    ],
)
def test_scores_by_hand(monitor, expected):
    eos_prob = jnp.array([[0.1, 0.3, 0.6], [0.7, NAN, NAN], [NAN, NAN, NAN]])
    score = monitor.score(jnp.array([0, 3, 5]), jnp.zeros((3, 8), jnp.int32), eos_prob)
    np.testing.assert_allclose(score, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [any_step, any_position])
def test_a_row_stops_at_the_first_pass_above_the_threshold(llada, traced, kind):
    watched = traced.eos_prob if kind is any_step else np.nanmax(traced.trace.eos_prob_map, axis=2)  # (B, passes)
    threshold = float(np.sort(watched.max(axis=1))[1])  # of three rows one is above it
    result = generate(llada, PROMPTS, dataclasses.replace(CONFIG, monitor=kind(threshold)), trace=True)
    is_above = watched > threshold
    stop_step = np.where(is_above.any(axis=1), is_above.argmax(axis=1), -1)
    np.testing.assert_array_equal(result.trace.stop_step, stop_step)
    np.testing.assert_array_equal(result.is_rejected, stop_step >= 0)
    np.testing.assert_array_equal(result.num_forward, np.where(stop_step >= 0, stop_step + 1, 8))
    stopped = int(np.argmax(stop_step))
    assert (np.asarray(result.tokens)[stopped, -8:] == llada.config.eos_id).all()  # the text is withdrawn,
    written = traced.trace.revealed_step[stopped] < stop_step[stopped]  # but the trace keeps what had been written
    expected = np.where(written, traced.tokens[stopped], llada.config.mask_id)
    np.testing.assert_array_equal(np.asarray(result.trace.tokens)[stopped, -8:], expected[-8:])


def test_the_score_on_record_is_the_largest(traced):
    np.testing.assert_allclose(traced.monitor_score, np.nanmax(traced.trace.eos_prob_map, axis=(1, 2)), rtol=1e-6)


def test_any_object_with_a_score_is_a_monitor(llada):
    @dataclasses.dataclass(frozen=True)
    class ThirdPass:
        threshold: float = 0.0

        def score(self, step, tokens, eos_prob):
            return jnp.where(step == 2, 1.0, jnp.nan)

    result = generate(llada, PROMPTS, dataclasses.replace(CONFIG, monitor=ThirdPass()))
    np.testing.assert_array_equal(result.num_forward, [3, 3, 3])
    assert np.asarray(result.is_rejected).all()


def test_the_calibrated_threshold_keeps_the_rate():
    scores = np.random.default_rng(0).random(200).astype(np.float32)
    for rate in (0, 0.01, 0.05, 0.5):
        threshold = calibrate(scores, rate)
        assert np.mean(scores > np.float32(threshold)) == pytest.approx(rate, abs=1e-9)
    assert (scores > np.float32(calibrate(scores, 1))).all()
    assert calibrate([0.1, 0.9, 0.9, 0.2], 0.25) == pytest.approx(0.9)  # of equal scores one cannot be stopped alone


def test_harmful_scores_move_the_threshold_halfway_in_log_odds():
    harmless = [0.1, 0.05, 0.02]  # odds of the largest: 1 to 9
    assert calibrate(harmless, 0, [0.9, 0.99]) == pytest.approx(0.5)  # 9 to 1
    assert calibrate(harmless, 0, [0.05, 0.9]) == pytest.approx(0.5)  # what lies below is lost in any case
    assert calibrate(harmless, 0, [0.01]) == calibrate(harmless, 0)
    assert calibrate(harmless, 0.34, [0.95]) == pytest.approx(0.5)  # 1 to 19 and 19 to 1: one of three may be stopped
    nearest = float(np.nextafter(np.float32(0.1), np.float32(1)))
    for below, above in ((0.1, nearest), (0.0, 1.0), (1 - 2**-24, 1.0)):  # it parts the two sides, however near
        assert below <= np.float32(calibrate([below], 0, [above])) + 1e-9 < above
    with pytest.raises(ValueError, match="0 to 1"):
        calibrate([0.1], 0, [1.5])


@pytest.mark.parametrize(
    ("scores", "rate", "message"), [([], 0.1, "one finite"), ([0.1, NAN], 0.1, "one finite"), ([0.1], 2, "a share")]
)
def test_calibration_needs_scores_and_a_share(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        calibrate(scores, rate)


def test_a_monitors_numbers_may_be_scalars_of_arrays():
    scores = jnp.array([0.5, 0.75])
    monitor = any_position(scores[0], num_positions=np.int64(2))
    assert monitor == any_position(0.5, num_positions=2) and hash(monitor) == hash(any_position(0.5, num_positions=2))
    with pytest.raises(ValueError, match=r"threshold has shape \(2,\); give one number"):
        any_step(scores)


def test_two_monitors_are_refused():
    with pytest.raises(ValueError, match="is a monitor too"):
        SamplerConfig(reject_above=0.5, monitor=any_step(0.9))


# -- the record -------------------------------------------------------------------------------------------------------


def test_the_trace_replays_the_decoding(llada, traced):
    """Masks put back, each pass can be repeated with the plain model."""
    trace, mask_id, row = traced.trace, llada.config.mask_id, 0
    revealed = trace.revealed_step[row]
    assert (revealed[:-8] == -1).all() and sorted(revealed[-8:]) == list(range(8))
    for step in (0, 3, 5):
        canvas = np.where(revealed >= step, mask_id, traced.tokens[row])[None]
        start = canvas.shape[1] - 8 + (0 if step < 4 else 4)
        mask = np.arange(canvas.shape[1])[None] >= canvas.shape[1] - 8 - len(PROMPTS[row])
        probs = np.asarray(jax.nn.softmax(llada(canvas, mask)))[0]
        is_open = (canvas[0] == mask_id) & (np.arange(canvas.shape[1]) >= start)
        is_open &= np.arange(canvas.shape[1]) < start + 4
        expected = np.where(is_open, probs[:, llada.config.eos_id], np.nan)
        np.testing.assert_allclose(trace.eos_prob_map[row, step], expected, rtol=1e-4)
        position = int(np.argmax(revealed == step))
        token = traced.tokens[row, position]
        np.testing.assert_allclose(trace.confidence[row, position], probs[position, token], rtol=1e-4)
    assert np.isnan(trace.confidence[row, revealed == -1]).all()
    np.testing.assert_array_equal(trace.tokens, traced.tokens)
    np.testing.assert_array_equal(trace.stop_step, [-1, -1, -1])


def test_a_trace_changes_nothing_and_is_kept_only_where_asked_for(llada, traced):
    result = generate(llada, PROMPTS, CONFIG)
    assert result.trace is None and np.isnan(result.monitor_score).all()
    np.testing.assert_array_equal(result.tokens, traced.tokens)


def test_infilling_is_recorded_too(llada):
    mask_id = llada.config.mask_id
    trace = infill(llada, [[5, mask_id, 7, mask_id, mask_id]], SamplerConfig(order="right_to_left"), trace=True).trace
    np.testing.assert_array_equal(trace.revealed_step, [[-1, 2, -1, 1, 0]])
