"""What each tensor is called in Hugging Face checkpoints: one table a family, read by all loading and saving code.

Our paths: `embed`, `blocks.<projection or norm>`, `final_norm`, `lm_head`. A stacked path stands for one tensor a
layer.
"""

import dataclasses
from collections.abc import Sequence

from a2d_jax.config import ModelConfig

NORMS = ("attn_norm", "mlp_norm")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Family:
    """Module names of one checkpoint family; `{layer}` stands for the layer's number."""

    embed: str
    block: str
    members: dict[str, str]  # our member of a block -> theirs, relative to the block
    final_norm: str
    lm_head: str


_LLADA = Family(
    embed="model.transformer.wte",
    block="model.transformer.blocks.{layer}",
    members={
        "attn_norm": "attn_norm", "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "attn_out",
        "mlp_norm": "ff_norm", "gate_proj": "ff_proj", "up_proj": "up_proj", "down_proj": "ff_out",
    },
    final_norm="model.transformer.ln_f",
    lm_head="model.transformer.ff_out",
)  # fmt: skip
_LLAMA = Family(
    embed="model.embed_tokens",
    block="model.layers.{layer}",
    members={
        "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
        "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
    },
    final_norm="model.norm",
    lm_head="lm_head",
)  # fmt: skip
FAMILIES = {"llada": _LLADA} | {name: _LLAMA for name in ("dream", "llama", "mistral", "qwen2")}


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor of a checkpoint: its name there, and where it lies here."""

    hf_name: str
    path: tuple[str, ...]  # of our parameter, e.g. ("blocks", "q_proj", "kernel")
    layer: int | None  # index into the stacked axis; None for a parameter that is not stacked
    is_transposed: bool  # linear weights are (out, in) there and (in, out) here
    shape: tuple[int, ...]  # as stored there


def tensor_names(config: ModelConfig) -> list[TensorName]:
    """Every tensor of a checkpoint of this architecture, in the order of its layers."""
    family, d = FAMILIES[config.family], config.width
    q_out, kv_out = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = {
        "q_proj": (q_out, d), "k_proj": (kv_out, d), "v_proj": (kv_out, d), "o_proj": (d, q_out),
        "gate_proj": (config.mlp_dim, d), "up_proj": (config.mlp_dim, d), "down_proj": (d, config.mlp_dim),
    }  # fmt: skip
    has_bias = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.qkv_bias)
    has_bias |= {"o_proj": config.out_bias} | dict.fromkeys(MLP, config.mlp_bias)

    names = [TensorName(f"{family.embed}.weight", ("embed", "embedding"), None, False, (config.vocab_size, d))]
    for layer in range(config.num_layers):
        block = family.block.format(layer=layer)
        for member, theirs in family.members.items():
            prefix, path = f"{block}.{theirs}", ("blocks", member)
            if member in NORMS:
                names.append(TensorName(f"{prefix}.weight", (*path, "scale"), layer, False, (d,)))
                continue
            names.append(TensorName(f"{prefix}.weight", (*path, "kernel"), layer, True, weights[member]))
            if has_bias[member]:
                names.append(TensorName(f"{prefix}.bias", (*path, "bias"), layer, False, weights[member][:1]))
    names.append(TensorName(f"{family.final_norm}.weight", ("final_norm", "scale"), None, False, (d,)))
    if not config.tie_embeddings:
        names.append(TensorName(f"{family.lm_head}.weight", ("lm_head", "kernel"), None, True, (config.vocab_size, d)))
    return names


def projections(config: ModelConfig) -> dict[str, str]:
    """Our linear layers ("blocks.q_proj", ..., "lm_head") and the last part of their name in the checkpoint."""
    family = FAMILIES[config.family]
    names = {f"blocks.{ours}": family.members[ours].split(".")[-1] for ours in ATTENTION + MLP}
    return names if config.tie_embeddings else names | {"lm_head": family.lm_head.split(".")[-1]}


def adapter_modules(config: ModelConfig, targets: Sequence[str]) -> list[str]:
    """Our projections that the target names select.

    A target selects every linear layer whose name in the checkpoint ends in it (PEFT's rule), or that bears it here.

    Raises:
      ValueError: a target that selects nothing, with the names that exist.
    """
    names = projections(config)
    known = set(names.values()) | {path.split(".")[-1] for path in names}
    unknown = sorted(set(targets) - known)
    if unknown:
        raise ValueError(
            f"LoRA targets {unknown} name no projection of a {config.family} model; known: {sorted(known)}."
        )
    return [path for path, name in names.items() if name in targets or path.split(".")[-1] in targets]


def module_names(config: ModelConfig, path: str) -> list[str]:
    """Checkpoint names of one of our projections: one a layer for a stacked one, else a single name."""
    family = FAMILIES[config.family]
    if path == "lm_head":
        return [family.lm_head]
    member = family.members[path.removeprefix("blocks.")]
    return [f"{family.block.format(layer=layer)}.{member}" for layer in range(config.num_layers)]


def adapter_targets(config: ModelConfig, paths: Sequence[str]) -> tuple[str, ...]:
    """Names by which PEFT's rule selects just these projections: short ones where that can be, else every module's."""
    names = projections(config)
    short = tuple(dict.fromkeys(names[path] for path in paths))
    if set(adapter_modules(config, short)) == set(paths):
        return short
    return tuple(module for path in paths for module in module_names(config, path))
