"""Perplexity: against transformers, against cases worked by hand, and the Monte Carlo bound of masked models."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

import a2d_jax
from a2d_jax.config import ModelConfig
from a2d_jax.likelihood import perturb, sample_losses
from a2d_jax.models.transformer import Transformer
from odlri_jax import perplexity as module
from odlri_jax.perplexity import Perplexity, perplexity
from tests.tokenizer_folders import write_llama2

V = 24


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, 75).astype(np.int32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LlamaForCausalLM, Transformer]:
    """The same random model in PyTorch and here."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, a2d_jax.load_pretrained(folder)


def torch_nll(model: LlamaForCausalLM, text: np.ndarray, context_length: int) -> float:
    """Mean of transformers' own loss over contiguous windows."""
    windows = text[: len(text) // context_length * context_length].reshape(-1, context_length)
    tokens = torch.tensor(windows, dtype=torch.long)
    with torch.no_grad():
        return float(np.mean([model(row[None], labels=row[None]).loss.item() for row in tokens]))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_transformers(llama, text, batch_size):
    theirs, ours = llama
    result = perplexity(ours, text, context_length=10, batch_size=batch_size)  # 7 windows, 5 tokens left over
    assert result.nll == pytest.approx(torch_nll(theirs, text, 10), abs=1e-5)
    assert (result.num_windows, result.num_tokens) == (7, 63)
    assert result.perplexity == pytest.approx(math.exp(result.nll))


def test_head_in_pieces_gives_the_same(llama, text, monkeypatch):
    whole = perplexity(llama[1], text, 10, batch_size=2).nll
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2 * V * 3)  # 3 positions at once: 10 is no multiple
    assert perplexity(llama[1], text, 10, batch_size=2).nll == pytest.approx(whole, abs=1e-6)


def test_max_windows_reads_the_first(llama, text):
    assert perplexity(llama[1], text, 10, max_windows=2).nll == perplexity(llama[1], text[:20], 10).nll


def test_reports_after_every_batch(llama, text):
    seen = []
    perplexity(llama[1], text, 10, batch_size=4, report=lambda state: seen.append(state.num_windows))
    assert seen == [4, 7]


def tiny(model_type: str, **keys) -> Transformer:
    if model_type == "llada":
        hf = {
            "model_type": "llada", "d_model": V, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 8,
            "embedding_size": V, "weight_tying": False, "mask_token_id": V - 1, "eos_token_id": 0,
        }  # fmt: skip
    else:
        hf = {
            "model_type": model_type, "hidden_size": V, "num_attention_heads": 2, "num_hidden_layers": 1,
            "intermediate_size": 8, "vocab_size": V, "mask_token_id": V - 1, "eos_token_id": 0,
        }  # fmt: skip
    return Transformer(ModelConfig.from_hf(hf | keys), rngs=nnx.Rngs(1))


def test_bigram_model_by_hand():
    """Token vectors are unit vectors and the layers add nothing, so that the head's rows are a table of log p."""
    model = tiny("llama", rms_norm_eps=1e-12)
    table = np.full((V, V), 0.5 / (V - 2))
    table[:, 3], table[:, 5] = 0.25, 0.25
    table[3, :], table[3, 7] = 0.5 / (V - 1), 0.5
    model.embed.embedding.set_value(jnp.eye(V))
    for name in ("o_proj", "down_proj"):
        projection = getattr(model.blocks, name)
        projection.kernel.set_value(jnp.zeros_like(projection.kernel[...]))
    # The norm stretches a unit vector to sqrt(V).
    model.lm_head.kernel.set_value(jnp.asarray(np.log(table) / math.sqrt(V), jnp.float32))
    result = perplexity(model, np.array([0, 3, 7, 5, 9, 3, 5, 3]), context_length=4)
    # First window: 0 -> 3 (1/4), 3 -> 7 (1/2), 7 -> 5 (1/4). Second: 9 -> 3 (1/4), 3 -> 5 (1/46), 5 -> 3 (1/4).
    expected = -math.log(0.25 * 0.5 * 0.25 * 0.25 * (0.5 / 23) * 0.25)
    assert result.total_nll == pytest.approx(expected, rel=1e-5)
    assert result.num_tokens == 6


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_bound_of_an_ignorant_model_is_the_vocabulary(family, text):
    """p = 1 / V everywhere. The weights T / l of l masks add up to T in every sample, so the bound is exact."""
    model = tiny(family)
    model.lm_head.kernel.set_value(jnp.zeros((V, V)))
    result = perplexity(model, text, 15, batch_size=3, num_samples=6)
    assert result.perplexity == pytest.approx(V, rel=1e-5)
    assert result.num_tokens == 5 * 14


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_bound_equals_the_likelihood_of_the_same_masks(family, text):
    model = tiny(family)
    window = text[:12]
    draws = perturb(jax.random.fold_in(jax.random.key(7), 0), window[:1], window[1:], 8, model.config.mask_id)
    expected = sample_losses(model, window[:1], window[1:], draws).mean()
    result = perplexity(model, text, 12, batch_size=3, max_windows=1, num_samples=8, seed=7)
    assert result.total_nll == pytest.approx(expected, rel=1e-5)


def test_masks_depend_on_the_seed_alone(text):
    model = tiny("llada")
    measure = lambda seed, batch_size: perplexity(model, text, 12, batch_size, num_samples=8, seed=seed).nll
    assert measure(0, 8) == pytest.approx(measure(0, 5), rel=1e-6)
    assert measure(0, 8) != pytest.approx(measure(1, 8), rel=1e-4)


def test_a_broken_model_is_infinitely_perplexed():
    assert Perplexity(total_nll=1500.0, num_tokens=2).perplexity == math.inf  # exp(750) is no float64


def test_mesh_gives_the_same(llama, text, tmp_path):
    theirs, ours = llama
    theirs.save_pretrained(tmp_path)
    mesh = a2d_jax.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    split = a2d_jax.load_pretrained(tmp_path, mesh)
    assert perplexity(split, text, 10, 2).nll == pytest.approx(perplexity(ours, text, 10, 2).nll, abs=1e-5)


def test_errors(llama, text):
    with pytest.raises(ValueError, match="75 tokens, fewer than one window of 76"):
        perplexity(llama[1], text, 76)
    with pytest.raises(ValueError, match="ids from 0 to 24"):
        perplexity(llama[1], np.arange(25), 5)
    with pytest.raises(ValueError, match="give 2 or more"):
        perplexity(llama[1], text, 1)


def test_program(tmp_path):
    """The program's numbers are those of transformers on its own tokens."""
    folder = write_llama2(tmp_path)
    torch.manual_seed(1)
    config = json.loads((folder / "config.json").read_text())
    theirs = LlamaForCausalLM(LlamaConfig(**config)).eval()
    theirs.save_pretrained(folder)
    text = "the quick brown fox jumps over the lazy dog. " * 5
    (tmp_path / "text.txt").write_text(text)
    command = [sys.executable, "-m", "odlri_jax.evaluate", f"--checkpoint={folder}", f"--text={tmp_path / 'text.txt'}"]
    command += ["--context_length=16", "--max_windows=3", f"--out={tmp_path / 'out' / 'p.json'}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "p.json").read_text())
    tokens = np.array(a2d_jax.load_tokenizer(folder).encode(text))
    assert record["nll"] == pytest.approx(torch_nll(theirs, tokens[:48], 16), abs=1e-5)
    assert not record["is_bound"] and record["num_tokens"] == 45
    assert done.stdout.splitlines()[-1].startswith(f"perplexity {record['perplexity']:.4f} over 45 tokens")


@pytest.fixture
def program():
    """The program's module; the flags that it defines go again, because other programs have some of these names."""
    module = importlib.import_module("odlri_jax.evaluate")
    module.define_flags()
    flags.FLAGS.mark_as_parsed()
    yield module
    flags.FLAGS.remove_flag_values([flag.name for flag in flags.FLAGS.flags_by_module_dict()[module.__name__]])
    del sys.modules[module.__name__]


@pytest.mark.parametrize(
    ("max_length", "given", "windows"),
    [(16, None, "5 windows of 16"), (4096, None, "1 windows of 81"), (16, "20", "4 windows of 20")],
)
def test_windows_fit_the_model_and_the_text(program, tmp_path, capsys, max_length, given, windows):
    """The plan says how long they are; there are no weights to go on with."""
    folder, text = write_llama2(tmp_path), tmp_path / "text.txt"
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": max_length}
    (folder / "config.json").write_text(json.dumps(config))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 5)
    values = {"checkpoint": str(folder), "text": str(text)} | ({"context_length": given} if given else {})
    with flagsaver.as_parsed(**values), pytest.raises(ValueError, match="has neither model.safetensors"):
        program.main(None)
    assert windows in capsys.readouterr().out


def test_an_infinite_perplexity_is_written_as_json_knows_it(program, tmp_path, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "p.json"
    text.write_text("the quick brown fox")
    monkeypatch.setattr(program, "load_pretrained", lambda *_: None)
    monkeypatch.setattr(program, "perplexity", lambda *_, **__: Perplexity(1500.0, num_tokens=2, num_windows=1))
    with flagsaver.as_parsed(checkpoint=str(write_llama2(tmp_path)), text=str(text), out=str(out)):
        program.main(None)
    record = json.loads(out.read_text(), parse_constant=pytest.fail)  # which hears Infinity and NaN
    assert record["perplexity"] == "inf" and record["nll"] == 750


def test_an_object_store_is_refused_before_anything_is_done(program):
    with flagsaver.as_parsed(checkpoint="absent", text="absent", out="gs://bucket/p.json"):
        with pytest.raises(ValueError, match="gs://bucket/p.json lies in an object store"):
            program.main(None)
