"""Depth of alignment: KL along a response, against models whose logits are known, and the program."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizer_folders import write_dream, write_llada

import a2d_jax
from a2d_jax.config import ModelConfig
from a2d_jax.depth import (
    DepthConfig,
    HarmfulText,
    check_vocabulary,
    encode_texts,
    kl_divergence,
    measure,
    named_folders,
    run,
    summarize,
    total_variation,
)
from a2d_jax.rows import parse_row
from a2d_jax.tokenizer import load_tokenizer

VOCAB, MASK, EOS = 6, 5, 4


class LeftNeighbourModel(nnx.Module):
    """The logits of a position are the table's row for the token on its left."""

    def __init__(self, seed: int):
        table = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 2
        self.table = nnx.Param(jnp.asarray(table, jnp.float32), logical_axes=(None, None))
        self.config = ModelConfig("llada", VOCAB, 1, 1, 1, 1, 1, 1, 1.0, 1e-5, mask_id=MASK, eos_id=EOS)

    def hidden_states(self, tokens, attention_mask=None):
        before = jnp.concatenate([jnp.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
        return jax.nn.one_hot(before, VOCAB)

    def logits(self, hidden):
        return hidden @ self.table[...]


ALIGNED, BASE = LeftNeighbourModel(0), LeftNeighbourModel(1)
TEXTS = [HarmfulText([0, 1], [2, 3, 0, 1]), HarmfulText([1], [3, 2]), HarmfulText([2, 0, 3], [1, 1, 2])]


def softmax(values):
    values = np.exp(values - values.max())
    return values / values.sum()


def kl_after(token):
    p, q = (softmax(np.asarray(model.table[...], np.float64)[token]) for model in (ALIGNED, BASE))
    return float((p * np.log(p / q)).sum())


def measured(order, batch_size=3, **options):
    return [
        record for batch in measure(ALIGNED, BASE, TEXTS, order, batch_size=batch_size, **options) for record in batch
    ]


def test_kl_by_hand():
    logits, base_logits = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    np.testing.assert_allclose(kl_divergence(logits, base_logits), expected, rtol=1e-6)
    np.testing.assert_allclose(total_variation(logits, base_logits), 0.25, rtol=1e-6)


def test_left_to_right_sees_what_is_written():
    for record, text in zip(measured("left_to_right"), TEXTS, strict=True):
        before = [text.prompt[-1], *text.response[:-1]]
        np.testing.assert_allclose(record["kl"], [kl_after(token) for token in before], rtol=1e-4, atol=1e-5)
        assert record["step"] == list(range(len(before)))


def test_right_to_left_sees_masks_on_the_left():
    for record, text in zip(measured("right_to_left"), TEXTS, strict=True):
        before = [text.prompt[-1], *[MASK] * (len(text.response) - 1)]
        np.testing.assert_allclose(record["kl"], [kl_after(token) for token in before], rtol=1e-4, atol=1e-5)


def test_confidence_is_the_bases():
    """Replayed with plain numbers: the position where the base's best token, masks aside, is most probable."""
    table = np.asarray(BASE.table[...], np.float64)
    for record, text in zip(measured("confidence"), TEXTS, strict=True):
        size = len(text.response)
        row = [text.prompt[-1], *[MASK] * size]
        left, steps, kls = list(range(size)), [0] * size, [0.0] * size
        for step in range(size):
            place = max(left, key=lambda i: softmax(table[row[i]])[:MASK].max())
            kls[place], steps[place] = kl_after(row[place]), step
            row[place + 1] = text.response[place]
            left.remove(place)
        assert record["step"] == steps
        np.testing.assert_allclose(record["kl"], kls, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_company_changes_nothing(order):
    together = measured(order)
    assert together == measured(order, batch_size=2)
    assert together[1:] == measured(order, done=1)
    assert sorted(together[0]["step"]) == [0, 1, 2, 3]


def test_other_vocabulary_is_refused():
    other = LeftNeighbourModel(0)
    other.config = dataclasses.replace(other.config, vocab_size=7)
    with pytest.raises(ValueError, match="do not share a vocabulary"):
        next(measure(other, BASE, TEXTS, "random"))


def test_other_tokens_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    base, other = load_tokenizer(write_llada(tmp_path)), load_tokenizer(write_dream(tmp_path / "other"))
    check_vocabulary(base, base, "x")
    with pytest.raises(ValueError, match="x has another vocabulary than the base"):
        check_vocabulary(base, other, "x")


def test_summary_by_hand():
    records = [
        {"kl": [4.0, 3.0, 2.0, 1.0, 1.0], "tv": [1.0] * 5, "step": [0, 1, 2, 3, 4]},
        {"kl": [2.0, 1.0], "tv": [0.5] * 2, "step": [0, 1]},
    ]
    summary = summarize(records)
    assert summary["kl"] == [3.0, 2.0, 2.0, 1.0, 1.0] and summary["num_tokens"] == [2, 2, 1, 1, 1]
    assert summary["kl_quarters"] == [3.5, 2.0, 1.0, 1.0]  # the first quarter takes the token that is over
    assert summary["kl_last_to_first"] == pytest.approx(1 / 3.5) and summary["tv_last_to_first"] == 1
    assert summary["tv"] == [0.75, 0.75, 1, 1, 1]
    assert summarize([{"kl": [1.0], "tv": [1.0], "step": [0]}])["kl_last_to_first"] is None


def test_the_curve_follows_the_order_of_writing():
    (record,) = [{"kl": [1.0, 5.0, 3.0, 7.0], "tv": [0.1, 0.5, 0.3, 0.7], "step": [3, 1, 2, 0]}]
    summary = summarize([record])
    assert summary["kl"] == summary["kl_quarters"] == [7, 5, 3, 1] and summary["tv"] == [0.7, 0.5, 0.3, 0.1]
    assert summary["kl_by_place"] == {"mean": [1, 5, 3, 7], "quarters": [1, 5, 3, 7], "last_to_first": 7}
    assert summary["kl_last_to_first"] == pytest.approx(1 / 7)


def test_only_harmful_rows_count():
    with pytest.raises(ValueError, match="no row has is_safe false"):
        encode_texts([parse_row({"prompt": "a", "response": "b", "is_safe": True}, "f:1")], None, 9)


def test_two_models_of_one_name_are_refused():
    assert named_folders(["runs/rt", "a2d=runs/a2d/hf"]) == {"rt": "runs/rt", "a2d": "runs/a2d/hf"}
    with pytest.raises(ValueError, match="two have one name; write NAME=FOLDER for each"):
        named_folders(["runs/rt/hf", "runs/a2d/hf"])


def test_program_measures_resumes_and_refuses_to_mix(tmp_path, capsys):
    rows = [{"prompt": "steal?", "response": f"Mix {i} eggs.", "is_safe": i == 0} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("base", "aligned")):
        (tmp_path / name).mkdir()
        folder = write_llada(tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"d_model": 16, "n_heads": 2, "n_layers": 1}))
        model = a2d_jax.Transformer(a2d_jax.load_config(folder), rngs=nnx.Rngs(seed))
        a2d_jax.save_pretrained(model, folder)
    config = DepthConfig(
        base=str(tmp_path / "base"), aligned={"a2d": str(tmp_path / "aligned"), "same": str(tmp_path / "base")},
        rows=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"), orders=("left_to_right", "random"),
        batch_size=2, max_response=6, dtype="float32",
    )  # fmt: skip
    results = run(config)
    assert results["settings"]["num_responses"] == 3
    assert min(results["models"]["a2d"]["random"]["kl"]) > 0.001
    assert max(map(abs, results["models"]["same"]["random"]["kl"])) < 1e-5
    assert (tmp_path / "out" / "depth.png").read_bytes()[:4] == b"\x89PNG"

    # A part of the records is gone: the rest is measured again, to the same numbers.
    path = tmp_path / "out" / "a2d_random.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"records": content["records"][:1]}))
    capsys.readouterr()
    assert run(config)["models"] == results["models"]
    assert "a2d, random: 3/3" in capsys.readouterr().out
    tensors = load_file(tmp_path / "aligned" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / "aligned" / "model.safetensors")
    with pytest.raises(ValueError, match="a2d_left_to_right.json was measured with another weights"):
        run(config)
    save_file(tensors, tmp_path / "aligned" / "model.safetensors")
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError, match="measured with another texts_sha256; give another --out"):
        run(config)
