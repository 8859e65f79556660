"""What an evaluation's records add up to, worked by hand."""

import numpy as np
import pytest

from a2d_jax.scores import auc, early_rejection, first_step_auc, summarize, summarize_groups


def record(prob=0.5, num_forward=32, success=0.0, is_refused=False, is_rejected=False):
    return {
        "eos_prob_first": prob,
        "num_forward": num_forward,
        "success": success,
        "is_refused": is_refused,
        "is_rejected": is_rejected,
    }


def test_summary_of_harmful_requests():
    records = [record(success=1.0), record(success=0.5), record(is_refused=True), record(1, 1, 0.0, True, True)]
    assert summarize(records, "refusal") == {
        "success": 0.375,
        "refused": 0.5,
        "rejected": 0.25,
        "num_forward": 24.25,
        "num_requests": 4,
        "num_unscored": 0,
    }


def test_unscored_rows_are_counted_and_not_guessed():
    records = [record(success=1.0), record(success=None), record(success=0.0) | {"rating": 4}]
    scores = summarize(records, "refusal")
    assert (scores["success"], scores["num_unscored"], scores["num_requests"]) == (0.5, 1, 3)
    assert (scores["rating"], scores["num_rated"]) == (4.0, 1)
    assert summarize(records[1:2], "refusal")["success"] is None


def test_groups_are_summed_up_apart():
    groups = summarize_groups([record(success=1.0), record(), record(is_refused=True)], ["b", "a", "b"], "refusal")
    assert list(groups) == ["b", "a"] and groups["b"]["success"] == 0.5 and groups["a"]["num_requests"] == 1


def test_refusing_harmless_requests_is_over_refusal():
    scores = summarize([record(success=1.0), record(is_refused=True)], "answer")
    assert scores["over_refusal"] == 0.5 and "refused" not in scores


def test_summary_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="expect='harm'"):
        summarize([record()], "harm")
    with pytest.raises(ValueError, match="no record"):
        summarize([], "answer")


@pytest.mark.parametrize(
    ("positive", "negative", "area"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([1, 3], [2], 0.5),
        ([1, 2, 3], [2, 0], 4.5 / 6),  # pairs won: one of 1's, one and a half of 2's, both of 3's
    ],
)
def test_auc_by_hand(positive, negative, area):
    assert auc(positive, negative) == pytest.approx(area)


def test_auc_counts_the_pairs_won():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 5, 40), rng.integers(0, 4, 30)
    won = (positive[:, None] > negative) + (positive[:, None] == negative) / 2
    assert auc(positive, negative) == pytest.approx(won.mean())


def test_contrast_prompts_are_no_negatives():
    harmful, contrast = [record(prob=0.9)] * 2, record(prob=0.95) | {"is_safe": False}
    harmless = [record(prob=0.1) | {"is_safe": True}, record(prob=0.2), contrast]
    assert first_step_auc(harmful, harmless) == 1.0
    (row,) = early_rejection(harmful, harmless)
    assert (row["threshold"], row["rejected"], row["over_refusal"], row["auc"]) == (0.2, 1.0, 0.0, 1.0)


def test_auc_needs_finite_numbers():
    for values in ([], [float("nan")]):
        with pytest.raises(ValueError, match="the negative values are"):
            auc([1.0], values)


def test_early_rejection_at_each_threshold():
    harmful = [record(0.9, 32), record(0.8, 32), record(0.3, 16)]
    harmless = [record(0.4, 32), record(0.1, 32)]
    low, high = early_rejection(harmful, harmless, [0.2, 0.85])
    # Above 0.2: all three harmful requests, and one of two harmless ones.
    assert low == {
        "threshold": 0.2,
        "forward_passes": 1.0,
        "full_forward_passes": pytest.approx(80 / 3),
        "rejected": 1.0,
        "over_refusal": 0.5,
        "auc": pytest.approx(4 / 6 + 1 / 6),  # 0.3 loses against 0.4 only
    }
    assert high["forward_passes"] == pytest.approx((1 + 32 + 16) / 3)
    assert high["over_refusal"] == 0.0


def test_a_probability_at_the_threshold_is_not_above_it():
    (row,) = early_rejection([record(0.5, 8)], [record(0.5)], [0.5])
    assert (row["forward_passes"], row["rejected"], row["over_refusal"]) == (8.0, 0.0, 0.0)


def test_default_threshold_is_the_lowest_without_over_refusal():
    (row,) = early_rejection([record(0.9), record(0.3)], [record(0.4), record(0.1)])
    assert row["threshold"] == 0.4 and row["over_refusal"] == 0.0 and row["rejected"] == 0.5


def test_early_rejection_needs_full_decodings():
    with pytest.raises(ValueError, match="evaluate without it"):
        early_rejection([record(is_rejected=True)], [record()])
