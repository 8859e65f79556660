"""The architecture of a checkpoint, read from its Hugging Face `config.json`.

One `ModelConfig` describes every family the transformer knows: LLaDA and Dream (bidirectional, masked diffusion), and
the causal LLaMA (1 to 3, SmolLM2), Mistral and Qwen2 / 2.5. Sizes, special ids and the logit shift come from the
file, never from constants. What the transformer cannot compute is refused here with the setting's name, not silently
ignored.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

DIFFUSION_FAMILIES = ("llada", "dream")
CAUSAL_FAMILIES = ("llama", "mistral", "qwen2")
_FAMILY_OF_MODEL_TYPE = {"llada": "llada", "Dream": "dream"} | {name: name for name in CAUSAL_FAMILIES}


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of LLaMA 3.1+: long wavelengths are divided by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one transformer; letters as in `a2d_jax/models/transformer.py`."""

    family: str
    vocab_size: int  # V: rows of the embedding, padding rows of the checkpoint included
    num_layers: int
    width: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    mlp_dim: int  # F
    rope_theta: float
    norm_eps: float
    rope_scaling: Llama3Rope | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    sliding_windows: tuple[int | None, ...] | None = None  # one entry a layer; None: every layer sees everything
    mask_id: int | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    refusal_token_id: int | None = None  # what alignment taught harmful rows to become; None: [EOS]
    dtype: str = "float32"  # of the tensors in the folder
    # The file as it was read, which weight file held each tensor, and what their index says besides (JSON): saving
    # writes the same folder back. All take part in comparison, because equal configs are interchangeable to the
    # compilation cache.
    hf_text: str = dataclasses.field(default="{}", repr=False)
    weight_files: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)
    index_metadata: str = dataclasses.field(default="{}", repr=False)

    @property
    def hf_config(self) -> dict[str, Any]:
        return json.loads(self.hf_text)

    @property
    def max_length(self) -> int | None:
        """The longest row that config.json says the model takes; None where it does not say."""
        hf_config = self.hf_config
        return hf_config.get("max_sequence_length") or hf_config.get("max_position_embeddings")

    @property
    def names_dtype(self) -> bool:
        """Whether config.json names the number format of the tensors."""
        return _named_dtype(self.hf_config) is not None

    @property
    def is_causal(self) -> bool:
        return self.family in CAUSAL_FAMILIES

    @property
    def shift_logits(self) -> bool:
        """True where the logits at position i predict token i + 1 (Dream and the causal families)."""
        return self.family != "llada"

    @property
    def padding_id(self) -> int:
        """What stands in front of the shorter rows of a batch, unseen: [PAD], else [EOS], else 0."""
        return next((token for token in (self.pad_id, self.eos_id) if token is not None), 0)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends what a causal model writes: LLaMA 3 lists several, the text's own [EOS] first."""
        listed = self.hf_config.get("eos_token_id")
        return tuple(listed) if isinstance(listed, list) else (self.eos_id,)

    @property
    def refusal_id(self) -> int | None:
        """The token by which the model refuses: what monitors watch and attackers ban. [EOS] in the paper."""
        return self.eos_id if self.refusal_token_id is None else self.refusal_token_id

    def with_refusal_token(self, token_id: int) -> "ModelConfig":
        """The same model that refuses by another token than [EOS]; config.json names it as refusal_token_id."""
        hf_config = self.hf_config | {"refusal_token_id": token_id}
        return dataclasses.replace(
            self, refusal_token_id=token_id, hf_text=json.dumps(hf_config, indent=2, ensure_ascii=False) + "\n"
        )

    def with_dtype(self, dtype: str) -> "ModelConfig":
        """The same model to be stored in another number format; config.json names it under the key it used."""
        hf_config = self.hf_config
        hf_config["dtype" if "dtype" in hf_config else "torch_dtype"] = dtype
        return dataclasses.replace(self, dtype=dtype, hf_text=json.dumps(hf_config, indent=2) + "\n")

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any], hf_text: str | None = None) -> "ModelConfig":
        """The configuration that `config.json` describes; ValueError for an unknown architecture or setting.

        Args:
          hf_config: the parsed file.
          hf_text: the file itself, to be written back as it was; by default made from `hf_config`.
        """
        model_type = hf_config.get("model_type")
        family = _FAMILY_OF_MODEL_TYPE.get(model_type)
        if family is None:
            raise ValueError(
                f"config.json names the architecture model_type={model_type!r}; known are "
                f"{sorted(_FAMILY_OF_MODEL_TYPE)}. Convert the checkpoint to one of these or correct model_type."
            )
        try:
            config = _from_llada(hf_config) if family == "llada" else _from_llama_like(family, hf_config)
        except KeyError as error:
            raise ValueError(f"config.json of a {model_type} model lacks the key {error}; add it.") from error
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"config.json has {config.num_heads} attention heads and {config.num_kv_heads} key/value heads, which "
                "must divide the former; correct either number."
            )
        return dataclasses.replace(config, hf_text=hf_text or json.dumps(dict(hf_config), indent=2) + "\n")


def load_config(folder: str | os.PathLike) -> ModelConfig:
    """Reads `config.json` in a Hugging Face folder."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"{os.fspath(folder)!r} has no config.json; give a Hugging Face folder with one.")
    with open(path, encoding="utf-8", newline="") as file:  # line ends as they are: the text is written back
        text = file.read()
    try:
        hf_config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); write the file again from its source.") from error
    if not isinstance(hf_config, dict):
        raise ValueError(f"{path}: holds a {type(hf_config).__name__}, not an object; write it again from its source.")
    return ModelConfig.from_hf(hf_config, text)


def _require(hf_config: Mapping[str, Any], **supported: Any) -> None:
    """Refuses a setting whose value the transformer does not compute; an absent key has the supported value."""
    for key, value in supported.items():
        given = hf_config.get(key, value)
        if given != value:
            raise ValueError(f"config.json has {key}={given!r}; only {key}={value!r} is computed here.")


def _special_ids(hf_config: Mapping[str, Any]) -> dict[str, int | None]:
    def first(name: str) -> int | None:
        value = hf_config.get(name)
        if isinstance(value, list):  # LLaMA 3 lists several [EOS] ids, the text's own first
            value = value[0] if value else None
        return None if isinstance(value, int) and value < 0 else value  # LLaMA 1 wrote -1 for none

    names = {"mask_id": "mask_token_id", "eos_id": "eos_token_id", "bos_id": "bos_token_id", "pad_id": "pad_token_id"}
    names["refusal_token_id"] = "refusal_token_id"  # our own key
    return {ours: first(theirs) for ours, theirs in names.items()}


def _named_dtype(hf_config: Mapping[str, Any]) -> str | None:
    # transformers 5 renamed torch_dtype to dtype.
    name = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return str(name).removeprefix("torch.") if name else None


def _dtype(hf_config: Mapping[str, Any]) -> str:
    return _named_dtype(hf_config) or "float32"


def _from_llada(hf: Mapping[str, Any]) -> ModelConfig:
    """LLaDA keeps OLMo's names: d_model, n_heads, mlp_hidden_size, ..."""
    _require(
        hf, activation_type="silu", alibi=False, attention_layer_norm=False, block_type="llama", input_emb_norm=False,
        layer_norm_type="rms", layer_norm_with_affine=True, rope=True, scale_logits=False, block_group_size=1,
    )  # fmt: skip
    num_kv_heads = hf.get("n_kv_heads") or (1 if hf.get("multi_query_attention") else hf["n_heads"])
    has_bias, is_tied = bool(hf.get("include_bias", False)), bool(hf.get("weight_tying", True))
    if has_bias or hf.get("bias_for_layer_norm") is not None:  # null stands for the value of include_bias
        _require(hf, bias_for_layer_norm=False)
    if has_bias and not is_tied:
        raise ValueError(
            "config.json has include_bias=True with weight_tying=False, which gives the head a bias; beside "
            "include_bias=True only weight_tying=True is computed here."
        )
    return ModelConfig(
        family="llada",
        vocab_size=hf.get("embedding_size") or hf["vocab_size"],
        num_layers=hf["n_layers"],
        width=hf["d_model"],
        num_heads=hf["n_heads"],
        num_kv_heads=num_kv_heads,
        head_dim=hf["d_model"] // hf["n_heads"],
        mlp_dim=hf.get("mlp_hidden_size") or hf["mlp_ratio"] * hf["d_model"],
        rope_theta=float(hf.get("rope_theta", 10000.0)),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=is_tied,
        qkv_bias=has_bias or bool(hf.get("include_qkv_bias", False)),
        out_bias=has_bias,
        mlp_bias=has_bias,
        dtype=_dtype(hf),
        **_special_ids(hf),
    )


def _from_llama_like(family: str, hf: Mapping[str, Any]) -> ModelConfig:
    _require(hf, hidden_act="silu")
    # transformers 5 moved rope_theta and rope_scaling into one dict, rope_parameters.
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    has_attention_bias = bool(hf.get("attention_bias", False))
    has_qkv_bias = family in ("qwen2", "dream")  # Qwen2's blocks always carry it and have no switch
    return ModelConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        mlp_dim=hf["intermediate_size"],
        rope_theta=float(hf.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_scaling=_rope_scaling(rope),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=has_qkv_bias or has_attention_bias,
        out_bias=has_attention_bias and family == "llama",
        mlp_bias=bool(hf.get("mlp_bias", False)),
        sliding_windows=_sliding_windows(family, hf),
        dtype=_dtype(hf),
        **_special_ids(hf),
    )


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "llama3":
        return Llama3Rope(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_position=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"config.json asks for RoPE scaling {kind!r}; known are 'default' and 'llama3'.")


def _sliding_windows(family: str, hf: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    """Window of each layer: Mistral v0.1 slides everywhere, Qwen2 (where switched on) from `max_window_layers` on."""
    window, num_layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    if not window or family == "llama":
        return None
    if family != "mistral" and not hf.get("use_sliding_window", False):
        return None
    if family == "dream":
        raise ValueError("config.json of a Dream model has use_sliding_window=true; its attention is bidirectional.")
    if hf.get("layer_types"):
        windows = tuple(window if kind == "sliding_attention" else None for kind in hf["layer_types"])
    else:
        first = 0 if family == "mistral" else hf.get("max_window_layers", num_layers)
        windows = tuple(window if layer >= first else None for layer in range(num_layers))
    return windows if any(windows) else None
