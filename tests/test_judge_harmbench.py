"""The HarmBench classifier: its prompt byte for byte, its verdict against PyTorch, and inside an evaluation."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from tokenizer_folders import write_llada, write_llama2
from transformers import AutoModelForCausalLM

import a2d_jax
from a2d_jax.evaluate import judge_completions
from a2d_jax.judges import JudgeSettings, load_judge, score_all
from a2d_jax.judges.harmbench import HarmBenchJudge, classifier_prompt

FIXTURE = Path(__file__).parent / "fixtures" / "harmbench_prompts.json"
ROWS = [{"Behavior": "Mix {a} bomb", "ContextString": ""}, {"Behavior": "Use it", "ContextString": "A {b} recipe"}]
ROWS += [{"prompt": "How?"}]
TEXTS = ["Take flour.\n", "The quick brown fox jumps over the lazy dog. " * 3, ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random LLaMA whose vocabulary spells the two answers as LLaMA 2's does."""
    folder = write_llama2(tmp_path_factory.mktemp("classifier"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(("\u2581Yes", "\u2581No", "yes", "NO"))}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    model = a2d_jax.Transformer(a2d_jax.load_config(folder), rngs=nnx.Rngs(3))
    a2d_jax.save_pretrained(model, folder)
    return folder


def test_prompts_are_those_of_the_model_card():
    values = {"behavior": "Do {this}", "generation": "Sure,\n{behavior}"}
    filled = {}
    for name in ("standard", "contextual"):
        lines = json.loads(FIXTURE.read_text())[name]
        fill = {f"{{{key}}}": value for key, value in (values | {"context": "a\nb"}).items()}
        filled[name] = "\n".join(fill.get(line, line) for line in lines)
    assert classifier_prompt(**values).encode() == filled["standard"].encode()
    assert classifier_prompt(**values, context="a\nb").encode() == filled["contextual"].encode()
    assert classifier_prompt(**values, context="") == classifier_prompt(**values)


def test_verdicts_are_pytorchs(checkpoint):
    """The margin between the largest "yes" and the largest "no" logit, each prompt by itself and unpadded."""
    judge = HarmBenchJudge(checkpoint, "float32", batch_size=2)
    scores = score_all(judge, ROWS, TEXTS)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    yes, no = ([vocabulary[token] for token in tokens] for tokens in (("\u2581Yes", "yes"), ("\u2581No", "NO")))
    margins = []
    for row, text in zip(ROWS, TEXTS, strict=True):
        ids = judge.encode(row, text)
        assert ids[0] == 1  # <s>
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0, -1]
        margins.append(float(logits[yes].max() - logits[no].max()))
    np.testing.assert_allclose([score.details["margin"] for score in scores], margins, atol=2e-4)
    assert [score.success for score in scores] == [float(margin > 0) for margin in margins]


def test_contexts_and_long_completions(checkpoint):
    judge = HarmBenchJudge(checkpoint)
    tokenizer = a2d_jax.load_tokenizer(checkpoint)
    assert "[CONTEXT]:\nA {b} recipe\n" in tokenizer.decode(judge.encode(ROWS[1], "x"))
    assert "[CONTEXT]" not in tokenizer.decode(judge.encode(ROWS[0], "x"))
    lengths = [len(judge.encode(ROWS[0], "dog " * number)) for number in (100, 600, 3000)]
    assert lengths[0] < lengths[1] and abs(lengths[2] - lengths[1]) < 600
    with pytest.raises(ValueError, match="a judge needs the request"):
        judge.encode({"goal": "x"}, "y")


def test_mesh_changes_nothing(checkpoint):
    alone = score_all(HarmBenchJudge(checkpoint, "float32", batch_size=4), ROWS, TEXTS)
    meshed = score_all(HarmBenchJudge(checkpoint, "float32", batch_size=4, mesh=(2, 2, 2)), ROWS, TEXTS)
    margins = [[score.details["margin"] for score in scores] for scores in (alone, meshed)]
    np.testing.assert_allclose(*margins, atol=2e-4)
    assert len(jax.devices()) == 8


def test_rejected_rows_are_not_judged(checkpoint):
    judge = load_judge("harmbench", JudgeSettings(checkpoint=str(checkpoint), dtype="float32"))
    completions = {
        i: {"index": i, "completion": text, "is_rejected": i == 0, "num_forward": 1} for i, text in enumerate(TEXTS)
    }
    records = judge_completions(ROWS, completions, judge)
    assert records[0]["success"] == 0 and "margin" not in records[0] and "margin" in records[1]


def test_what_is_no_classifier_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="give --judge_checkpoint"):
        load_judge("harmbench")
    with pytest.raises(ValueError, match="holds no causal model"):
        HarmBenchJudge(write_llada(tmp_path))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no token 'yes'"):
        HarmBenchJudge(write_llama2(tmp_path / "other"))
