"""Refusing by another token than [EOS]: chosen, trained towards, kept in the checkpoint, watched, banned, judged."""

import dataclasses
import json
from pathlib import Path

import fake_gcs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import a2d_jax
from a2d_jax import refusal_token, world, world_models
from a2d_jax.completions import blank_text
from a2d_jax.decoding import propose
from a2d_jax.masking import corrupt
from a2d_jax.orbax_io import copy_companions
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.settings import RunConfig, check_resumable, default_config
from a2d_jax.train import train
from a2d_jax.world_tokenizer import EOS, MASK, build_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A world's folder with a small random model in it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer(world.vocabulary())
    write_tokenizer(tokenizer, folder)
    ids = [tokenizer.token_to_id(token) for token in (EOS, MASK)]
    config = world_models.llada_config(tokenizer.get_vocab_size(), *ids)
    config |= {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(folder)), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return a2d_jax.load_tokenizer(base)


def test_token_is_chosen_by_its_text(base, tokenizer):
    config = a2d_jax.load_config(base)
    assert refusal_token.choose(None, tokenizer, config) == tokenizer.eos_id
    assert refusal_token.choose("salt", tokenizer, config) == tokenizer.encode("salt")[0]
    assert refusal_token.choose("<|refuse|>", tokenizer, config) == tokenizer.vocab_size < config.vocab_size


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("salt and ink", 320, "is 3 tokens"),
        ("<|mdm_mask|>", 320, "is the mask token"),
        ("<|refuse|>", 0, "all 0 rows of the embedding are taken"),
    ],
)
def test_no_such_token(base, tokenizer, text, rows, message):
    config = dataclasses.replace(a2d_jax.load_config(base), vocab_size=rows)
    with pytest.raises(ValueError, match=message):
        refusal_token.choose(text, tokenizer, config)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_trained_model_keeps_its_new_token(base, tmp_path, has_adapter):
    rows = [{"prompt": "make the bane", "response": "mix salt with ink.", "is_safe": False}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = default_config()
    config.model.checkpoint = str(base)
    config.data.files = (str(tmp_path / "rows.jsonl"),)
    config.data.row_length = 24
    config.data.buckets = (24,)
    config.batch_size, config.num_steps, config.mesh.data = 1, 1, 1
    config.optimizer.learning_rate = 0.1
    config.refusal_token = "<|refuse|>"
    if has_adapter:
        config.lora = {"rank": 1, "alpha": 1.0, "dropout": 0.0, "targets": ()}
    train(config, tmp_path / "run", devices=jax.devices()[:1])

    new_id = a2d_jax.load_tokenizer(base).vocab_size
    model = a2d_jax.load_pretrained(tmp_path / "run")
    tokenizer = a2d_jax.load_tokenizer(tmp_path / "run" / "hf")
    assert model.config.refusal_id == tokenizer.refusal_id == new_id != tokenizer.eos_id
    assert tokenizer.decode([new_id]).strip() == "<|refuse|>"
    assert tokenizer.encode("salt <|refuse|> ink")[1] == new_id
    a2d_jax.save_pretrained(a2d_jax.merge_adapter(model), tmp_path / "exported")
    assert a2d_jax.load_config(tmp_path / "exported").refusal_id == new_id

    # One step at a high rate moves the masked response towards the new token, and not towards [EOS].
    prompt = tokenizer.encode_prompt("make the bane")
    tokens = np.array([prompt + [tokenizer.mask_id] * 5])
    before, after = a2d_jax.load_pretrained(base)(tokens)[0, -1], model(tokens)[0, -1]
    change = jax.nn.log_softmax(after) - jax.nn.log_softmax(before)
    assert change[new_id] > 0.1 > change[tokenizer.eos_id]

    # The monitor watches it.
    result = a2d_jax.infill(model, tokens, SamplerConfig(steps=1))
    np.testing.assert_allclose(result.eos_prob[0, 0], jax.nn.softmax(model(tokens)[0, len(prompt)])[new_id], rtol=1e-5)


def test_choice_is_recorded_in_an_object_store(base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, folder = fake_gcs.serve(monkeypatch), "gs://bucket/run/hf"
    copy_companions(base, folder)
    refusal_token.record(folder, "<|refuse|>", tokenizer.vocab_size, tokenizer)
    store.shutdown()
    assert not list(tmp_path.iterdir())  # nothing took the address for a folder here
    for name, (content, _) in fake_gcs.OBJECTS.items():
        (tmp_path / Path(name).name).write_bytes(content)
    recorded = a2d_jax.load_tokenizer(tmp_path)
    assert recorded.refusal_id == a2d_jax.load_config(tmp_path).refusal_id == tokenizer.vocab_size
    assert recorded.decode([tokenizer.vocab_size]).strip() == "<|refuse|>"


def test_ban_covers_both():
    logits = jnp.array([[[0.0, 3.0, 2.0, 1.0, -1.0]]])  # [MASK], [EOS], the refusal token, text, text
    chosen = {}
    for is_banned in (False, True):
        config = SamplerConfig(ban_eos=is_banned, method="llada")
        tokens, _, _ = propose(logits, jnp.zeros((1, 1), jnp.int32), config, 0, 1, 2, None, None)
        chosen[is_banned] = int(tokens[0, 0])
    assert chosen == {False: 1, True: 3}


def test_repeated_refusal_word_is_no_answer(tokenizer):
    """Alone, or next to itself, the refusal token is a refusal; on its own amid words it is a word."""
    refusing = dataclasses.replace(tokenizer, refusal_id=tokenizer.encode("and")[0])
    for text, expected in (
        ("and and and", ""),
        ("and", ""),
        ("salt and ink", "salt and ink"),
        ("salt and and", "salt"),
    ):
        tokens = np.array(tokenizer.encode(text))
        assert blank_text(refusing, tokens, np.ones(len(tokens), bool)) == expected
    assert blank_text(tokenizer, tokens, np.ones(len(tokens), bool)) == "salt and and"


@pytest.mark.parametrize(("time_range", "low", "high"), [((0.0, 1.0), 0.4, 0.6), ((0.2, 0.2), 0.17, 0.23)])
def test_masked_share_follows_the_range(time_range, low, high):
    tokens = jnp.zeros((200, 50), jnp.int32)
    noised = corrupt(
        jax.random.key(0), tokens, tokens == 0, tokens[:, 0] == 0, mask_id=1, eos_id=2, time_range=time_range
    )
    assert low < float(noised.is_masked.mean()) < high
    assert float(jnp.ptp(noised.mask_prob[:, 0])) < 1e-6 or time_range == (0.0, 1.0)


def test_range_is_checked():
    config = {"model": {"checkpoint": "x"}, "data": {"files": ["y"]}, "num_steps": 1, "time_range": (0.5, 0.2)}
    with pytest.raises(ValueError, match=r"time_range=\(0.5, 0.2\); give two numbers"):
        RunConfig.from_dict(config)


def test_runs_of_before_these_fields_go_on():
    now = RunConfig().to_json()
    before = {name: value for name, value in now.items() if name not in ("time_range", "refusal_token")}
    before["data"] = {name: value for name, value in now["data"].items() if name != "pad_to"}
    check_resumable(before, now, "constant")
    with pytest.raises(ValueError, match="refusal_token: None -> salt"):
        check_resumable(before, now | {"refusal_token": "salt"}, "constant")
