"""The demo's table and plot, from figures made up so that each cell can be told from the others."""

import itertools

import pytest

from a2d_jax.demo import ATTACKS, MODELS, plot, table
from a2d_jax.orders import ORDERS


@pytest.fixture
def results():
    """Two seeds. Success is model number / 10 plus seed / 100; [EOS] banned is 0.9."""
    attacks = [
        {
            "model": model, "seed": seed, "attack": attack, "order": order, "eos_banned": is_banned,
            "success": 0.9 if is_banned else i / 10 + seed / 100, "num_requests": 24,
        }
        for (i, model), seed, attack in itertools.product(enumerate(MODELS), (0, 1), ATTACKS)
        for order, is_banned in [*((order, False) for order in ORDERS), ("confidence", True)]
    ]  # fmt: skip
    capability = [
        {"model": model, "seed": seed, "foods_exact": 1.0, "near_misses_answered": 0.5 + seed / 4}
        for model, seed in itertools.product(MODELS, (0, 1))
    ]
    rejection = [
        {
            "seed": seed, "threshold": threshold, "forward_passes": 2.0, "full_forward_passes": 32.0, "rejected": 1.0,
            "over_refusal": 0.25, "auc": 0.995,
        }
        for seed, threshold in itertools.product((0, 1), (0.5, 0.9))
    ]  # fmt: skip
    return {"attacks": attacks, "capability": capability, "early_rejection": rejection}


def row_of(text, title):
    return next(line for line in text.splitlines() if line.strip().startswith(title))


def test_the_table_shows_means_over_seeds(results):
    text = table(results)
    assert row_of(text, "dija        entropy").split()[-3:] == ["0.5%", "10.5%", "20.5%"]
    assert row_of(text, "dija        confidence, [EOS] banned").split()[-3:] == ["90.0%"] * 3
    assert row_of(text, "near misses").split()[-3:] == ["62.5%"] * 3
    assert row_of(text, "seed 1: 0.9").split()[-4:] == ["2.00", "16.0x", "25.0%", "0.9950"]


def test_every_attack_and_order_has_a_line(results):
    text = table(results)
    for attack, order in itertools.product(ATTACKS, ORDERS):
        assert row_of(text, f"{attack:11} {order}")


def test_the_plot_is_a_picture(results, tmp_path):
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
