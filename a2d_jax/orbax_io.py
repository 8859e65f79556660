"""Converted checkpoints: a Hugging Face folder as an Orbax checkpoint, written and read tensor by tensor.

    DIR/hf/      config.json, tokenizer and every other file that is not weights, so that the folder stands alone
    DIR/params/  Orbax: {"embed", "final_norm", "lm_head", "blocks": {"0": {"q_proj": {"kernel": (in, out)}, ...}, ...}}

Layers are leaves of their own: tensors go to disk in small groups as they are read (Orbax's partial save), and the
checkpoint appears under its name only when it is complete.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint.experimental import v1 as ocp

from a2d_jax.config import load_config
from a2d_jax.files import as_path, local_path
from a2d_jax.folders import HF_FOLDER, PARAMS_FOLDER
from a2d_jax.hf_io import (
    abstract_model,
    check_tensors,
    check_tied_head,
    layer_sharding,
    load_model,
    place_tensor,
    shardings_of,
    variable_at,
    with_index,
    with_stored_dtype,
)
from a2d_jax.models.naming import TensorName, tensor_names
from a2d_jax.models.transformer import DTypes, Transformer
from a2d_jax.safetensors_io import SafetensorsFolder

_GROUP_BYTES = 256_000_000  # written at once: larger groups cost memory, smaller ones a commit each
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def companion_files(folder: str | os.PathLike) -> list[Path]:
    """Files of a Hugging Face folder that are not weights: configuration, tokenizer, licence, the model's own code."""
    return [file for file in sorted(Path(folder).iterdir()) if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES]


def copy_companions(source: str | os.PathLike, target: str | os.PathLike, except_for: tuple[str, ...] = ()) -> None:
    """Copies the files that are not weights; code among them is copied, never run."""
    target = as_path(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in companion_files(source):
        if file.name not in except_for:
            (target / file.name).write_bytes(file.read_bytes())


def _insert(tree: dict, name: TensorName, leaf: object) -> dict:
    """Puts a leaf into the nested tree of the checkpoint; returns the tree."""
    *branches, last = name.path if name.layer is None else (name.path[0], str(name.layer), *name.path[1:])
    node = tree
    for branch in branches:
        node = node.setdefault(branch, {})
    node[last] = leaf
    return tree


def convert_folder(
    source: str | os.PathLike, target: str | os.PathLike, mesh: Mesh | None = None
) -> Iterator[TensorName]:
    """Writes the Orbax checkpoint of a Hugging Face folder, yielding each tensor's name once it is on disk.

    Tensors keep their stored dtype. On a mesh each is split over the devices.

    Raises:
      ValueError: tensors that do not fit config.json, a target that already holds a checkpoint, or one of an object
        store.
    """
    source, target = Path(source), local_path(target)
    if (target / PARAMS_FOLDER).exists():
        raise ValueError(
            f"{target} already holds a checkpoint; choose another --target or remove {target / PARAMS_FOLDER}."
        )
    config = load_config(source)
    folder = SafetensorsFolder(source)
    check_tensors(config, folder.shapes, source)
    check_tied_head(config, folder)
    target.mkdir(parents=True, exist_ok=True)
    for leftover in target.glob(f"{PARAMS_FOLDER}.*"):  # of a conversion that was cut off
        shutil.rmtree(leftover)
    copy_companions(source, target / HF_FOLDER)

    shardings = shardings_of(nnx.state(abstract_model(config, DTypes())), mesh)
    params = (target / PARAMS_FOLDER).absolute()
    group: dict = {}
    names, group_bytes = [], 0
    for name in tensor_names(config):
        sharding = variable_at(shardings, name.path).get_value()
        sharding = sharding if name.layer is None else layer_sharding(sharding)
        tensor = place_tensor(name, folder.read, None, sharding)
        if names and group_bytes + tensor.nbytes > _GROUP_BYTES:
            ocp.partial.save(params, group)
            yield from names
            group, names, group_bytes = {}, [], 0
        _insert(group, name, tensor)
        names.append(name)
        group_bytes += tensor.nbytes
    ocp.partial.save(params, group)
    yield from names
    ocp.partial.finalize(params)


def load_orbax_folder(folder: str | os.PathLike, mesh: Mesh | None, dtypes: DTypes, remat: str = "none") -> Transformer:
    """The model of a converted folder, each tensor restored straight onto its shards."""
    folder = Path(folder)
    config = with_index(load_config(folder / HF_FOLDER), folder / HF_FOLDER)
    params = (folder / PARAMS_FOLDER).absolute()
    if not config.names_dtype:
        leaves = jax.tree.leaves(ocp.metadata(params).metadata)
        config = with_stored_dtype(config, [np.dtype(leaf.dtype) for leaf in leaves])
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # one leaf at a time

    def place(name: TensorName, dtype, sharding) -> jax.Array:
        shape = name.shape[::-1] if name.is_transposed else name.shape
        leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        with context:
            return jax.tree.leaves(ocp.load(params, _insert({}, name, leaf)))[0]

    return load_model(config, mesh, dtypes, remat, place)
