"""Hugging Face folders in and out: safetensors (`safetensors_io.py`) plus `config.json`.

Reading is by table (`models/naming.py`): all missing, extra and misshapen names are reported in one error before a
byte of weights is read. Then one tensor at a time goes from the file straight onto its shards, so the host never
holds more than the largest tensor. Writing streams too.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from a2d_jax.config import ModelConfig, load_config
from a2d_jax.files import local_path, write_beside, write_json
from a2d_jax.folders import check_target
from a2d_jax.models.naming import FAMILIES, TensorName, projections, tensor_names
from a2d_jax.models.transformer import DTypes, Transformer
from a2d_jax.safetensors_io import INDEX_NAME, WEIGHTS_NAME, SafetensorsFolder, read_index, write_safetensors
from a2d_jax.sharding import param_shardings

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000  # as transformers 4 splits checkpoints
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # a buffer that old LLaMA files carry; computed here


# -- checking names ---------------------------------------------------------------------------------------------------


def check_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: object, names=None) -> None:
    """One error that lists every tensor which is missing, extra or of another shape than the config gives.

    `names`: the `TensorName`s to find, where they are not those of the whole family.
    """
    expected = {name.hf_name: name.shape for name in names or tensor_names(config)}
    given = {name: shape for name, shape in shapes.items() if not _IGNORED.search(name)}
    if names is None and config.tie_embeddings:
        given.pop(f"{FAMILIES[config.family].lm_head}.weight", None)  # the embedding a second time: `check_tied_head`
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in given]
    problems += [f"extra: {name} {shape}" for name, shape in given.items() if name not in expected]
    problems += [
        f"misshapen: {name} is {given[name]}, needed {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if problems:
        raise ValueError(
            f"{where} does not fit its config.json ({config.family}, {len(problems)} tensors differ); "
            "correct the config or the weights:\n  " + "\n  ".join(problems)
        )


def check_tied_head(config: ModelConfig, source: SafetensorsFolder) -> None:
    """ValueError where a head is tied by the config, and stored all the same with other values than the embedding's."""
    family = FAMILIES[config.family]
    head, embed = f"{family.lm_head}.weight", f"{family.embed}.weight"
    if not config.tie_embeddings or head not in source.shapes:
        return
    num_rows, block = config.vocab_size, 4096  # a part at a time: each tensor may be the largest of the folder
    parts = [(slice(row, min(row + block, num_rows)), slice(None)) for row in range(0, num_rows, block)]
    is_equal = source.shapes[head] == source.shapes[embed] and all(
        np.array_equal(source.read(head, part), source.read(embed, part)) for part in parts
    )
    if not is_equal:
        raise ValueError(
            f"{source.folder}: {head} differs from {embed}, although config.json ties them; correct config.json, or "
            f"remove {head}."
        )


# -- files to parameters ----------------------------------------------------------------------------------------------


def with_index(config: ModelConfig, folder: str | os.PathLike) -> ModelConfig:
    """The config with what the index of the folder's weights says, if there is one."""
    weight_map, metadata = read_index(Path(folder))
    return dataclasses.replace(config, weight_files=tuple(weight_map.items()), index_metadata=json.dumps(metadata))


def with_stored_dtype(config: ModelConfig, dtypes: Iterable[np.dtype | None]) -> ModelConfig:
    """The config with the number format of the stored tensors, where config.json names none and all have the same."""
    kinds = set(dtypes)
    if config.names_dtype or len(kinds) != 1 or None in kinds:
        return config
    return dataclasses.replace(config, dtype=kinds.pop().name)


def variable_at(state: Mapping, path: tuple[str, ...]) -> nnx.Variable:
    for part in path:
        state = state[part]
    return state


def _put_layer(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def layer_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Sharding of one layer of a stacked parameter."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def place_tensor(name: TensorName, read: Callable[..., np.ndarray], dtype, sharding) -> jax.Array:
    """One checkpoint tensor in our orientation, each shard read by itself and put where it belongs.

    Args:
      read: (hf_name, index) -> that part of the tensor, as stored.
      dtype: of the result; None keeps the stored one.
      sharding: of the tensor here (of one layer, where it is stacked).
    """
    shape = name.shape[::-1] if name.is_transposed else name.shape

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        stored = read(name.hf_name, index[::-1] if name.is_transposed else index)
        stored = np.asarray(stored.T if name.is_transposed else stored, order="C")
        return stored.astype(dtype or stored.dtype, copy=False)

    return jax.make_array_from_callback(shape, sharding, shard)


def fill_state(
    state: nnx.State, shardings: nnx.State, names: Iterable[TensorName], place: Callable[..., jax.Array]
) -> nnx.State:
    """The abstract `state` with every parameter read from a checkpoint, tensor by tensor.

    Args:
      place: (name, dtype, sharding) -> the tensor on its devices, of one layer where it is stacked.
    """
    put_layer = jax.jit(_put_layer, donate_argnums=0)
    values: dict[tuple[str, ...], jax.Array] = {}
    for name in names:
        variable, sharding = variable_at(state, name.path), variable_at(shardings, name.path).get_value()
        if name.layer is None:
            values[name.path] = place(name, variable.dtype, sharding)
            continue
        layer = place(name, variable.dtype, layer_sharding(sharding))
        if name.path not in values:
            values[name.path] = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(
                variable.shape, variable.dtype
            )
        values[name.path] = put_layer(values[name.path], layer, name.layer)
    flat = [(path, variable_at(state, path).replace(value)) for path, value in values.items()]
    return nnx.from_flat_state(flat)


def abstract_model(config: ModelConfig, dtypes: DTypes, remat: str = "none") -> Transformer:
    """The model as shapes alone; no memory is taken."""
    return nnx.eval_shape(lambda: Transformer(config, dtypes, remat=remat))


def shardings_of(state: nnx.State, mesh: Mesh | None) -> nnx.State:
    """Where each parameter belongs: split by the rules table, or whole on the first device."""
    if mesh is not None:
        return param_shardings(state, mesh)
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda v: v.replace(here), state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def load_model(config: ModelConfig, mesh: Mesh | None, dtypes: DTypes, remat: str, place: Callable) -> Transformer:
    """A model whose parameters `place` reads, on one device or split over the mesh."""
    return fill_model(abstract_model(config, dtypes, remat), mesh, tensor_names(config), place)


def fill_model(model: Transformer, mesh: Mesh | None, names: Iterable[TensorName], place: Callable) -> Transformer:
    """A model of shapes alone with the tensors that `place` reads, on one device or split over the mesh."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, fill_state(state, shardings_of(state, mesh), names, place))


def load_hf_folder(folder, mesh: Mesh | None, dtypes: DTypes, remat: str = "none") -> Transformer:
    """The model of a Hugging Face folder, on one device or split over the mesh."""
    config = load_config(folder)
    source = SafetensorsFolder(folder)
    check_tensors(config, source.shapes, folder)
    check_tied_head(config, source)
    config = with_stored_dtype(config, (source.dtypes[name.hf_name] for name in tensor_names(config)))
    config = with_index(config, folder)
    return load_model(config, mesh, dtypes, remat, lambda name, *where: place_tensor(name, source.read, *where))


# -- parameters to files ----------------------------------------------------------------------------------------------


def read_tensor(state: Mapping, name: TensorName, dtype: np.dtype) -> np.ndarray:
    """One parameter (of one layer) as the checkpoint stores it, on the host."""
    value = variable_at(state, name.path)[...]
    value = np.asarray(value if name.layer is None else value[name.layer])
    return (value.T if name.is_transposed else value).astype(dtype, copy=False)


def split_into_shards(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut before a file would exceed `max_bytes`; a larger tensor gets a file of its own."""
    shard, shard_bytes = [], 0
    for name, size in sizes.items():
        if shard and shard_bytes + size > max_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append(name)
        shard_bytes += size
    if shard:
        yield shard


def plan_files(config: ModelConfig, sizes: Mapping[str, int], max_shard_bytes: int | None) -> dict[str, list[str]]:
    """File name -> its tensors: the files the checkpoint came in, or a new split by size."""
    if max_shard_bytes is None and dict(config.weight_files).keys() == sizes.keys():
        files: dict[str, list[str]] = {}
        for name, file in config.weight_files:
            files.setdefault(file, []).append(name)
        return files
    shards = list(split_into_shards(sizes, max_shard_bytes or DEFAULT_MAX_SHARD_BYTES))
    if len(shards) == 1:
        return {WEIGHTS_NAME: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def check_dense(model: Transformer) -> None:
    """ValueError where projections of the model are compressed."""
    if compressed := [name for name in projections(model.config) if not hasattr(model.projection(name), "kernel")]:
        raise ValueError(f"{', '.join(compressed)} are compressed; write them with `python -m odlri_jax.export`.")


def save_pretrained(model: Transformer, path: str | os.PathLike, max_shard_bytes: int | None = None) -> None:
    """Writes `config.json` and safetensors under the family's Hugging Face names, in the dtype the config names.

    A config that names none stands for the one dtype in which the tensors were loaded, or for float32.

    Tensors go into the files they were loaded from; with `max_shard_bytes`, or for a model of another origin, into
    files of at most that size (default 5 GB). So a folder that is loaded and saved unchanged comes back byte for byte,
    if it holds just these tensors, and all of them in that dtype.

    Nothing of an earlier checkpoint in the folder is touched before the new one is complete.

    Raises:
      ValueError: the model carries an unmerged adapter (call `merge_adapter`, or `save_adapter` for the adapter alone),
        or compressed projections; its config was not read from a config.json; or the folder holds a checkpoint of
        another kind, which would be loaded instead.
    """
    if model.lora is not None:
        raise ValueError(
            "the model carries an unmerged adapter; merge_adapter(model) first, or save_adapter(model, path)."
        )
    check_dense(model)
    state = nnx.state(model)
    save_dense(model.config, lambda name, dtype: read_tensor(state, name, dtype), path, max_shard_bytes)


def save_dense(
    config: ModelConfig,
    read: Callable[[TensorName, np.dtype], np.ndarray],
    path: str | os.PathLike,
    max_shard_bytes: int | None = None,
) -> None:
    """`save_pretrained` of tensors that come one by one: `read` gives each as the checkpoint stores it."""
    dtype = stored_dtype(config)
    table = {name.hf_name: name for name in tensor_names(config)}
    shapes = {hf_name: (name.shape, dtype) for hf_name, name in table.items()}
    write_checkpoint(config, shapes, lambda hf_name: read(table[hf_name], dtype), path, max_shard_bytes)


def stored_dtype(config: ModelConfig) -> np.dtype:
    """Of the tensors in the checkpoint's files."""
    return np.dtype(getattr(ml_dtypes, config.dtype, None) or config.dtype)


def write_checkpoint(
    config: ModelConfig,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    path: str | os.PathLike,
    max_shard_bytes: int | None = None,
    more_json: Mapping[str, object] | None = None,
) -> None:
    """Writes a folder of safetensors, their index (unless it is all in model.safetensors), `config.json`, `more_json`.

    Everything is written into a folder inside and moved when it is complete, `more_json` last.

    Args:
      shapes: name -> (shape, dtype) of each tensor.
      read: called once per name.
      max_shard_bytes: see `save_pretrained`.
      more_json: file name -> content, of what another package's format has besides.
    """
    if "model_type" not in config.hf_config:
        raise ValueError(
            f"the config of this {config.family} model has no model_type for config.json, without which the folder "
            "cannot be loaded; make the config by ModelConfig.from_hf or load_config."
        )
    folder = local_path(path)
    check_target(folder, is_other_format=bool(more_json))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    files = plan_files(config, sizes, max_shard_bytes)

    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        for file, names in files.items():
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(staging / file, {name: shapes[name] for name in names}, read, {"format": "pt"})
        written = list(files)
        if list(files) != [WEIGHTS_NAME]:
            weight_map = {name: file for file, names in files.items() for name in names}
            metadata = json.loads(config.index_metadata) if weight_map == dict(config.weight_files) else {}
            metadata["total_size"] = sum(sizes.values())
            write_json(staging / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
            written.append(INDEX_NAME)
        write_beside(staging / "config.json", lambda file: file.write(config.hf_text.encode()))
        written.append("config.json")
        for name, content in (more_json or {}).items():
            write_json(staging / name, content)
            written.append(name)
        stale = [*folder.glob("model*.safetensors"), folder / INDEX_NAME]
        for name in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, folder / name)
        for file in stale:  # weights of an earlier checkpoint would be read instead of, or along with, the new ones
            if file.name not in written:
                file.unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
