"""LoRA adapters in PEFT's own layout: `adapter_config.json` and `adapter_model.safetensors`, in and out.

Rank, alpha, dropout and targets are kept. An adapter that was read and is saved unchanged comes back byte for byte, if
its tensors are float32: the names' prefix and the configuration file travel with the model, numbers as float32.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from a2d_jax.config import ModelConfig
from a2d_jax.files import local_path, write_beside, write_json
from a2d_jax.models.lora import LoRAConfig, adaptable, adapted, attach
from a2d_jax.models.naming import adapter_targets, module_names, projections
from a2d_jax.models.transformer import Transformer
from a2d_jax.safetensors_io import write_safetensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
NAME_PREFIX = "base_model.model."
# Settings that change what an adapter computes or covers, and the only value computed here.
_SUPPORTED = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
    "layer_replication": None, "lora_bias": False,
}  # fmt: skip
# Starts that leave the base as it is; by the others (PiSSA, OLoRA, CorDA, LoftQ, ...) PEFT changes it on loading.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True)
class PeftConfig(LoRAConfig):
    """LoRA settings that came from a PEFT folder, with what is needed to write the same folder again."""

    name_prefix: str = NAME_PREFIX  # in front of the module's name; wrapped models carry one more part
    text: str = ""  # adapter_config.json as it was read


def read_peft_config(folder: str | os.PathLike) -> PeftConfig:
    """Reads `adapter_config.json`; ValueError where a setting asks for what plain LoRA does not do."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}; give a PEFT adapter folder.")
    text = path.read_bytes().decode("utf-8")  # line ends as they are: the text is written back
    try:
        settings = json.loads(text)
        rank, alpha, targets = settings["r"], settings["lora_alpha"], settings["target_modules"]
        targets = (targets,) if isinstance(targets, str) else tuple(targets)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a LoRA configuration ({error!r}); it needs r, lora_alpha, target_modules."
        ) from error
    for key, value in (_SUPPORTED | {"alora_invocation_tokens": None}).items():
        if settings.get(key, value) not in (value, None, [], {}):  # PEFT takes an empty list for null
            raise ValueError(f"{path} has {key}={settings[key]!r}; only {key}={value!r} is computed here.")
    if (init := settings.get("init_lora_weights")) not in _INITS:
        raise ValueError(
            f"{path} has init_lora_weights={init!r}, by which PEFT changes the base; only {_INITS} are computed here. "
            "Save it from PEFT as a plain adapter: path_initial_model_for_weight_conversion of its save_pretrained."
        )
    return PeftConfig(rank, alpha, settings.get("lora_dropout", 0.0), targets, text=text)


def _tensor_paths(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Checkpoint module name -> (our projection, layer)."""
    paths = {}
    for path in projections(config):
        for layer, module in enumerate(module_names(config, path)):
            paths[module] = (path, None if path == "lm_head" else layer)
    return paths


def _locate(name: str, paths: dict[str, tuple[str, int | None]]) -> tuple[str, str] | None:
    """Splits a tensor's name into (module, prefix); the module is the longest known one that the name ends in."""
    parts = name.rsplit(".lora_", 1)[0].split(".")
    for start in range(len(parts)):
        module = ".".join(parts[start:])
        if module in paths:
            return module, ".".join(parts[:start]) + "." if start else ""
    return None


def load_adapter(model: Transformer, folder: str | os.PathLike) -> Transformer:
    """Attaches a PEFT adapter to the model in place, unmerged; returns the model.

    Raises:
      ValueError: one error with every tensor that is missing, extra or misshapen for this model.
    """
    if model.lora is not None:
        raise ValueError("the model already carries an adapter; merge_adapter(model) first.")
    lora, path = read_peft_config(folder), Path(folder) / WEIGHTS_NAME
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); copy the adapter again.") from error

    paths, problems, prefixes = _tensor_paths(model.config), [], set()
    found: dict[tuple[str, str], dict[int | None, np.ndarray]] = {}
    for name, tensor in tensors.items():
        located, half = _locate(name, paths), name[-len("A.weight") :]
        if located is None or half not in ("A.weight", "B.weight"):
            problems.append(f"extra: {name} {tensor.shape}")
            continue
        (module, prefix), (our_path, layer) = located, paths[located[0]]
        prefixes.add(prefix)
        fan_in, fan_out = adaptable(model, our_path).kernel.shape[-2:]
        needed = (lora.rank, fan_in) if half == "A.weight" else (fan_out, lora.rank)
        if tensor.shape != needed:
            problems.append(f"misshapen: {name} is {tensor.shape}, needed {needed}")
        found.setdefault((our_path, half), {})[layer] = tensor
    touched = {our_path for our_path, _ in found}
    for module, (our_path, layer) in paths.items():
        for half in ("A.weight", "B.weight"):
            if our_path in touched and layer not in found.get((our_path, half), {}):
                problems.append(f"missing: {module}.lora_{half}")
    if problems or len(prefixes) != 1:
        problems = problems or [f"names with different prefixes: {sorted(prefixes)}"]
        raise ValueError(f"{path} does not fit this {model.config.family} model:\n  " + "\n  ".join(problems))

    for our_path in sorted(touched):
        halves = []
        for half in ("A.weight", "B.weight"):
            by_layer = found[our_path, half]
            stack = (
                np.stack([by_layer[layer] for layer in sorted(by_layer)]) if None not in by_layer else by_layer[None]
            )
            halves.append(jnp.asarray(np.swapaxes(stack, -1, -2), jnp.float32))  # PEFT's are (out, in)
        attach(model.projection(our_path), lora, *halves)
    model.lora = dataclasses.replace(lora, name_prefix=prefixes.pop())
    return model


def save_adapter(model: Transformer, path: str | os.PathLike, base_model_name_or_path: str | None = None) -> None:
    """Writes the model's unmerged adapter as a PEFT folder (float32).

    Args:
      base_model_name_or_path: recorded in the configuration of a new adapter, so that PEFT finds its base model.
    """
    lora = model.lora
    if lora is None:
        raise ValueError("the model carries no adapter; save_pretrained(model, path) writes the merged weights.")
    prefix = lora.name_prefix if isinstance(lora, PeftConfig) else NAME_PREFIX
    shapes, readers = {}, {}
    for our_path in adapted(model):
        linear = model.projection(our_path)
        for layer, module in enumerate(module_names(model.config, our_path)):
            for half, variable in (("A", linear.lora_a), ("B", linear.lora_b)):
                value = variable[...] if our_path == "lm_head" else variable[...][layer]
                name = f"{prefix}{module}.lora_{half}.weight"
                shapes[name], readers[name] = (value.shape[::-1], np.dtype(np.float32)), value
    lora = dataclasses.replace(lora, targets=adapter_targets(model.config, adapted(model)))  # names that PEFT finds
    read = lambda name: np.asarray(jax.device_get(readers[name])).T
    write_adapter(path, model.config, lora, shapes, read, base_model_name_or_path)


def write_adapter(
    path: str | os.PathLike,
    config: ModelConfig,
    lora: LoRAConfig,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    base_model_name_or_path: str | None,
) -> None:
    """Writes a PEFT folder of tensors that come one by one, under PEFT's names; `config` is the base model's."""
    folder = local_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, shapes, read, {"format": "pt"})
    if isinstance(lora, PeftConfig) and lora.text:
        write_beside(folder / CONFIG_NAME, lambda file: file.write(lora.text.encode()))
        return
    settings = {
        "base_model_name_or_path": base_model_name_or_path, "inference_mode": True, "init_lora_weights": True,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "r": lora.rank, "target_modules": sorted(lora.targets),
        # PEFT's wrapper for the task asks for `prepare_inputs_for_generation`, which Dream's own class does not define.
        "task_type": None if config.family == "dream" else "CAUSAL_LM",
    }  # fmt: skip
    write_json(folder / CONFIG_NAME, dict(sorted((_SUPPORTED | settings).items())))
