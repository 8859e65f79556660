"""Packed checkpoint folders: the manifest, reading onto shards, writing; the format `a2d_jax` finds by entry point.

    DIR/config.json, tokenizer, ...    as in the dense checkpoint
    DIR/odlri.json                     the manifest: version, settings, which projections are packed
    DIR/*.safetensors                  packed arrays "<module>.<suffix>", and the other tensors under their own names
    DIR/model.safetensors.index.json   which file holds what (absent where one file, model.safetensors, holds all)

The index and the manifest are written last: a folder without them is not finished. `docs/packed_format.md` has every
array. Reading goes tensor by tensor from the files onto the shards, as for dense checkpoints.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from a2d_jax.config import ModelConfig, load_config
from a2d_jax.files import write_json
from a2d_jax.hf_io import (
    abstract_model,
    check_tensors,
    fill_model,
    place_tensor,
    read_tensor,
    stored_dtype,
    with_index,
    with_stored_dtype,
    write_checkpoint,
)
from a2d_jax.models.naming import TensorName, module_names, projections, tensor_names
from a2d_jax.models.transformer import DTypes, Transformer
from a2d_jax.safetensors_io import SafetensorsFolder
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.linear import CompressedLinear
from odlri_jax.packed_tensors import TensorSpec, tensor_specs
from odlri_jax.packing import value_problem

MANIFEST_NAME = "odlri.json"
FORMAT, VERSION = "odlri", 1


# -- manifest ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `odlri.json` says: how matrices were decomposed, and of which projections ("blocks.q_proj", ...)."""

    settings: DecomposeConfig
    projections: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.settings)
        return {"format": FORMAT, "version": VERSION, "settings": settings, "projections": list(self.projections)}


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Writes `odlri.json`, which makes the folder complete: call it last."""
    write_json(Path(folder) / MANIFEST_NAME, manifest.to_json())


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Reads `odlri.json`; ValueError where it is damaged, newer than this code, or names what does not exist."""
    path = Path(folder) / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, version, settings, paths = (content[key] for key in ("format", "version", "settings", "projections"))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as the manifest of a packed checkpoint ({error!r}).") from error
    if kind != FORMAT:
        raise ValueError(f"{path} has format={kind!r}, needed {FORMAT!r}.")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{path} is of version {version}; this code reads up to {VERSION}. Update it.")
    known = {field.name for field in dataclasses.fields(DecomposeConfig)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{path} has the settings {unknown}, which this code does not know; known: {sorted(known)}.")
    existing = list(projections(load_config(folder)))
    if unknown := sorted(set(paths) - set(existing)):
        raise ValueError(f"{path} names the projections {unknown}; the model has {existing}.")
    return Manifest(DecomposeConfig(**settings), tuple(paths))


# -- names and shapes -------------------------------------------------------------------------------------------------


def _is_packed(name: TensorName, manifest: Manifest) -> bool:
    return name.path[-1] == "kernel" and ".".join(name.path[:-1]) in manifest.projections


def packed_names(config: ModelConfig, manifest: Manifest) -> Iterator[tuple[TensorName, TensorSpec | None]]:
    """Every tensor of a packed checkpoint in the order of its layers; None for those that are not packed."""
    for name in tensor_names(config):
        if not _is_packed(name, manifest):
            yield name, None
            continue
        module = name.hf_name.removesuffix(".weight")
        for suffix, spec in tensor_specs(name.shape, manifest.settings).items():
            path = (*name.path[:-1], suffix)
            yield TensorName(f"{module}.{suffix}", path, name.layer, False, spec.shape), spec


def abstract_packed(folder: str | os.PathLike, dtypes: DTypes, remat: str = "none") -> Transformer:
    """The model as shapes alone, from config.json and the manifest."""
    config, manifest = load_config(folder), read_manifest(folder)
    return pack_shapes(abstract_model(config, dtypes, remat), manifest.projections, manifest.settings, dtypes)


def pack_shapes(
    model: Transformer, projections: Iterable[str], settings: DecomposeConfig, dtypes: DTypes
) -> Transformer:
    """An abstract model with the named projections ("blocks.q_proj") in packed form; changes it."""
    for path in projections:
        dense = model.projection(path)
        *stack, fan_in, fan_out = dense.kernel.shape

        def build(dense=dense, stack=stack, shape=(fan_out, fan_in)):
            axes, has_bias = dense.kernel.logical_axes, dense.bias is not None
            return CompressedLinear(shape, settings, axes=axes, dtypes=dtypes, has_bias=has_bias, stack=tuple(stack))

        *parents, last = path.split(".")
        setattr(model.projection(".".join(parents)) if parents else model, last, nnx.eval_shape(build))
    return model


# -- reading ----------------------------------------------------------------------------------------------------------


def load_packed(folder: str | os.PathLike, mesh: Mesh | None, dtypes: DTypes, remat: str = "none") -> Transformer:
    """The model of a packed folder, on one device or split over the mesh.

    Raises:
      ValueError: a manifest that does not fit, a damaged file, tensors that are missing, extra or misshapen (all of
        them listed), or values that no packed tensor has.
    """
    config, manifest = load_config(folder), read_manifest(folder)
    source, names = SafetensorsFolder(folder), dict(packed_names(config, manifest))
    check_tensors(config, source.shapes, folder, names)
    specs = {name.hf_name: spec for name, spec in names.items() if spec is not None}

    def read(hf_name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        array = source.read(hf_name, index)
        spec = specs.get(hf_name)
        if spec is not None and (problem := value_problem(hf_name, array, spec)):
            raise ValueError(f"{source.file_of[hf_name]}: {problem}; copy the checkpoint again, or compress it again.")
        return array

    model = abstract_packed(folder, dtypes, remat)
    dense = (source.dtypes[name.hf_name] for name, spec in names.items() if spec is None)
    model.config = with_index(with_stored_dtype(config, dense), folder)
    return fill_model(model, mesh, names, lambda name, *where: place_tensor(name, read, *where))


class PackedFormat:
    """The object of the entry point "odlri" in the group "a2d_jax.checkpoint_formats"."""

    @staticmethod
    def matches(path: str | os.PathLike) -> bool:
        return (Path(path) / MANIFEST_NAME).is_file()

    load = staticmethod(load_packed)
    abstract = staticmethod(abstract_packed)


# -- writing ----------------------------------------------------------------------------------------------------------


def compressed_projections(model: Transformer) -> dict[str, CompressedLinear]:
    """Our projections that are packed, by path."""
    linears = {path: model.projection(path) for path in projections(model.config)}
    return {path: linear for path, linear in linears.items() if isinstance(linear, CompressedLinear)}


def layers_of(model: Transformer, path: str) -> Iterator[tuple[str, int | None]]:
    """(checkpoint name of the module, layer) of each matrix of a projection; layer None where it is not stacked."""
    for layer, module in enumerate(module_names(model.config, path)):
        yield module, None if path == "lm_head" else layer


def save_packed(model: Transformer, path: str | os.PathLike, max_shard_bytes: int | None = None) -> None:
    """Writes config.json, the manifest and all tensors of a packed model; its factors, trained or not, as float16.

    Tensors go into the files they came in, unless `max_shard_bytes` gives a new split.

    Raises:
      ValueError: nothing in the model is packed, or a factor has grown beyond float16.
    """
    packed = compressed_projections(model)
    if not packed:
        raise ValueError("no projection of the model is packed; a2d_jax.save_pretrained writes dense ones.")
    manifest = Manifest(next(iter(packed.values())).config, tuple(packed))
    names = dict(packed_names(model.config, manifest))
    table = {name.hf_name: name for name in names}
    dense_dtype, state = stored_dtype(model.config), nnx.state(model)
    shapes = {name.hf_name: (name.shape, spec.dtype if spec else dense_dtype) for name, spec in names.items()}

    def read(hf_name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            array = read_tensor(state, table[hf_name], shapes[hf_name][1])
        if names[table[hf_name]] is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{hf_name} holds values that float16 does not; train with a lower learning rate.")
        return array

    write_checkpoint(model.config, shapes, read, path, max_shard_bytes, {MANIFEST_NAME: manifest.to_json()})
