"""`load_pretrained`: one call for every kind of checkpoint folder.

    a Hugging Face folder                     config.json + safetensors
    an Orbax folder of `a2d_jax.convert`      hf/ + params/
    a training folder of `a2d_jax.train`      hf/ + train_config.json + checkpoints/
    formats of other packages                 entry points in the group "a2d_jax.checkpoint_formats"

An entry point names an object with `matches(path) -> bool` and `load(path, mesh, dtypes, remat) -> Transformer`; so
packed checkpoints of `odlri_jax` load here although this package never imports it.
"""

import importlib.metadata
import os
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from a2d_jax.hf_io import load_hf_folder
from a2d_jax.models.transformer import DTypes, Transformer
from a2d_jax.orbax_io import HF_FOLDER, is_orbax_folder, load_orbax_folder
from a2d_jax.peft_io import load_adapter

FORMATS_GROUP = "a2d_jax.checkpoint_formats"


def load_pretrained(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype=jnp.float32,
    adapter: str | os.PathLike | None = None,
    *,
    param_dtype=None,
    remat: str = "none",
) -> Transformer:
    """The model of a checkpoint folder; LLaDA, Dream, LLaMA, Mistral or Qwen2 by its config.json.

    Args:
      mesh: each tensor goes straight onto its shards; None: the first device.
      dtype: of activations and matmuls, and of the stored weights unless `param_dtype` says otherwise.
      adapter: a PEFT folder, attached unmerged (`merge_adapter(model)` merges it).
      remat: what the backward pass recomputes: "none", "dots" or "full".

    Raises:
      ValueError: a folder of no known kind, an unknown architecture, or tensors that do not fit it (all of them
        listed).
    """
    path, dtypes = Path(path), DTypes(param=param_dtype or dtype, compute=dtype)
    if not path.is_dir():
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} is no folder; give a Hugging Face, converted or training folder."
        )
    if (path / "train_config.json").is_file():
        from a2d_jax import checkpoint

        model = checkpoint.load_trained(path, mesh, dtypes, remat=remat)
    elif is_orbax_folder(path):
        model = load_orbax_folder(path, mesh, dtypes, remat)
    elif (other := _other_format(path)) is not None:
        model = other.load(path, mesh, dtypes, remat)
    else:
        model = load_hf_folder(path, mesh, dtypes, remat)
    return model if adapter is None else load_adapter(model, adapter)


def _other_format(path: Path):
    for entry_point in importlib.metadata.entry_points(group=FORMATS_GROUP):
        checkpoint_format = entry_point.load()
        if checkpoint_format.matches(path):
            return checkpoint_format
    return None


def hf_files(path: str | os.PathLike) -> Path:
    """The folder with config.json and the tokenizer of a checkpoint of any kind."""
    inner = Path(path) / HF_FOLDER
    return inner if inner.is_dir() else Path(path)
