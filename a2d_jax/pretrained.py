"""`load_pretrained`: one call for every kind of checkpoint folder.

    a Hugging Face folder                     config.json + safetensors
    an Orbax folder of `a2d_jax.convert`      hf/ + params/
    a training folder of `a2d_jax.train`      hf/ + train_config.json + checkpoints/
    formats of other packages                 entry points in the group "a2d_jax.checkpoint_formats"

An entry point names an object with `matches(path) -> bool`, `load(path, mesh, dtypes, remat) -> Transformer` and
`abstract(path, dtypes, remat) -> Transformer`, the model as shapes alone, for which the files that are not weights
suffice; so packed checkpoints of `odlri_jax` load and train here although this package never imports it.
"""

import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from a2d_jax.checkpoint import abstract_arrays, read_train_config, restore_params
from a2d_jax.config import load_config
from a2d_jax.distributed import whole
from a2d_jax.folders import HF_FOLDER, hf_folder, is_orbax_folder, is_training_folder, other_format
from a2d_jax.hf_io import abstract_model, load_hf_folder, shardings_of, with_index
from a2d_jax.models.lora import add_lora, merge_adapter
from a2d_jax.models.transformer import DTypes, Transformer
from a2d_jax.orbax_io import load_orbax_folder
from a2d_jax.peft_io import load_adapter
from a2d_jax.settings import RunConfig
from a2d_jax.sharding import with_auto_axes
from a2d_jax.training import pure, split_model


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
      mesh: each tensor goes straight onto its shards; None: the first device. Explicit axis types become Auto.
      dtype: of activations and matmuls, and of the stored weights unless `param_dtype` says otherwise.
      adapter: a PEFT folder, attached unmerged (`merge_adapter(model)` merges it).
      remat: what the backward pass recomputes: "none", "dots" or "full".

    Raises:
      ValueError: a folder of no known kind, an unknown architecture, tensors that do not fit it (all of them listed),
        or a mesh without the axes of `make_mesh`.
    """
    path, dtypes = Path(path), DTypes(param=param_dtype or dtype, compute=dtype)
    if not path.is_dir():
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} is no folder; give a Hugging Face, converted or training folder."
        )
    mesh = None if mesh is None else with_auto_axes(mesh)
    if is_training_folder(path):
        model = load_trained(path, mesh, dtypes, remat=remat)
    elif is_orbax_folder(path):
        model = load_orbax_folder(path, mesh, dtypes, remat)
    elif (other := other_format(path)) is not None:
        model = other.load(path, mesh, dtypes, remat)
    else:
        model = load_hf_folder(path, mesh, dtypes, remat)
    return model if adapter is None else load_adapter(model, adapter)


def load_trained(
    workdir: str | os.PathLike, mesh: Mesh | None, dtypes: DTypes, step: int | None = None, remat: str = "none"
) -> Transformer:
    """The model of a training folder at a step (None: the newest); an adapter is left unmerged on its base.

    Where weights were frozen, in a run of an adapter or of a compressed base, the base is read along.

    Raises:
      ValueError: no such step, or an adapter whose base folder is gone.
    """
    run = RunConfig.from_dict(read_train_config(workdir))
    hf = Path(workdir) / HF_FOLDER
    if run.lora is None and other_format(hf) is None:
        model = abstract_model(with_index(load_config(hf), hf), dtypes, remat)
    else:
        model = load_base(run.model.checkpoint, mesh, dtypes, remat)
        if run.lora is not None:
            add_lora(model, run.lora, nnx.Rngs(0))
    if (refusal_token_id := load_config(hf).refusal_token_id) is not None:
        model.config = model.config.with_refusal_token(refusal_token_id)
    graphdef, trained, frozen = split_model(model)
    params = restore_params(workdir, step, abstract_arrays(pure(trained), pure(shardings_of(trained, mesh))))
    return nnx.merge(graphdef, params, pure(frozen))


def load_base(folder: str | os.PathLike, mesh: Mesh | None, dtypes: DTypes, remat: str = "none") -> Transformer:
    """The weights that training starts from, an adapter of an earlier run merged into them."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"no folder {os.fspath(folder)!r} with the base model; put it back, or correct "
            "model.checkpoint in the run's train_config.json."
        )
    return merge_adapter(load_pretrained(folder, mesh, dtypes.compute, param_dtype=dtypes.param, remat=remat))


def abstract_base(folder: str | os.PathLike, dtypes: DTypes, remat: str = "none") -> Transformer:
    """What `load_base` gives, as shapes alone; no weights are read."""
    files = hf_folder(folder)
    other = other_format(files)
    return abstract_model(load_config(files), dtypes, remat) if other is None else other.abstract(files, dtypes, remat)


def weights_fingerprint(model: nnx.Module) -> str:
    """Hash of a few numbers of every parameter: another checkpoint, or a later step of the same, has another."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(model)):
        leaf = jnp.atleast_1d(leaf)  # the scales of a compressed head are scalars
        digest.update(whole(leaf[(0,) * (leaf.ndim - 1)][:64]).tobytes())
    return digest.hexdigest()[:16]
