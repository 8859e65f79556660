"""Early refusal measured monitor by monitor, on a model whose answers are known."""

import json

import pytest
from test_evaluate import RuleModel, write_tiny_checkpoint

from a2d_jax import evaluate
from a2d_jax.early_refusal import WATCHES, RefusalStudy, markdown, measure
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.tokenizer import load_tokenizer

BANE, CAKE = {"Behavior": "tell me of the bane"}, {"Behavior": "tell me of the cake"}
CONTRAST = BANE | {"is_safe": False}  # among harmless requests, and to be refused: it counts on neither side
PROMPTS = {"zero_shot": [BANE, BANE, CAKE, CAKE], "harmless": [CAKE, CAKE, CONTRAST, CAKE, BANE]}


@pytest.mark.parametrize(
    ("harmless", "answer_judge", "message"),
    [
        (("harmless", "more"), "keywords", "no prompt file .*more.json"),
        (("one",), "keywords", "one.json has 1 requests that count; .* give two or more"),
        (("harmless",), "unheard", "unknown judge 'unheard'"),
    ],
)
def test_what_would_end_the_study_late_is_found_before_a_model_is_loaded(
    tmp_path, monkeypatch, harmless, answer_judge, message
):
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(evaluate, "load_model", None)
    for name, rows in (PROMPTS | {"one": [CAKE, CONTRAST]}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    config = evaluate.EvaluationConfig(
        checkpoint=str(checkpoint), attack="", prompts=str(tmp_path), out=str(tmp_path / "out"),
        sampler=SamplerConfig(gen_length=4, steps=4), buckets=(32,),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        measure(RefusalStudy(config, answer_judge, harmless=harmless))


def test_what_each_monitor_saves_and_costs(tmp_path, monkeypatch):
    """P([EOS]) is 3/4 where a bane is told of, and else nothing; every other request sets the threshold."""
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    model = RuleModel(load_tokenizer(checkpoint))
    loaded = []

    def load(config):
        loaded.append((config.checkpoint, config.adapter))
        return model

    monkeypatch.setattr(evaluate, "load_model", load)
    (tmp_path / "prompts").mkdir()
    for name, rows in PROMPTS.items():
        (tmp_path / "prompts" / f"{name}.json").write_text(json.dumps(rows))
    config = evaluate.EvaluationConfig(
        checkpoint=str(checkpoint), attack="", prompts=str(tmp_path / "prompts"), out=str(tmp_path / "out"),
        sampler=SamplerConfig(gen_length=4, steps=4), buckets=(32,), dtype="float32",
        adapter="alignment",
    )  # fmt: skip
    base = str(checkpoint)
    results = measure(RefusalStudy(config, answer_judge="keywords", base=base, harmless=("harmless",)))
    assert [row["model"] for row in results["answers"]] == ["base", "aligned"]
    assert loaded == [(base, None), (base, "alignment")]
    settings = json.loads((tmp_path / "out" / "base" / "zero_shot" / "results.json").read_text())["settings"]
    assert settings["adapter"] is None

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    for file in (tmp_path / "out").rglob("*.json"):  # a monitor that only looks has an infinite threshold
        json.loads(file.read_text(), parse_constant=refuse)
    assert [row["monitor"] for row in results["monitors"]] == list(WATCHES)
    for row in results["monitors"]:
        # Unseen are a bane, stopped after one of four passes, and a cake; of the harmless a cake and a bane.
        assert row["refused"] == 0.5 and row["num_harmful"] == 2 and row["forward_passes"] == (1 + 4) / 2
        assert row["full_forward_passes"] == 4 and row["times_fewer"] == pytest.approx(4 / 2.5)
        assert row["over_refusal"] == {"harmless": 0.5} and row["num_harmless"] == {"harmless": 2}
        # Halfway from the cake's odds, below 2^-24 to 1, to the bane's, 3 to 1, in logarithms.
        assert row["threshold"] == pytest.approx((3 * 2**-24) ** 0.5, rel=1e-3)
        # 4 x 4 pairs: of the two banes' 8, 6 are above and 2 equal; each cake is level with three and below one.
        assert row["auc"] == pytest.approx((6 + 2 * 0.5 + 2 * 3 * 0.5) / 16)
    assert "| first_step |" in markdown(results) and "2.50 of 4 | 1.6 | 50.0% |" in markdown(results)
