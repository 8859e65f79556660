"""Random packed matrices, and folders of them, for the tests: no alternation is run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import packed_reader

import a2d_jax
from a2d_jax.models.naming import tensor_names
from a2d_jax.safetensors_io import SafetensorsFolder, write_safetensors
from odlri_jax import DecomposeConfig
from odlri_jax.packed_io import Manifest, write_manifest
from odlri_jax.packed_tensors import tensor_specs

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "float32",
}  # fmt: skip


def random_arrays(shape, config: DecomposeConfig, seed: int = 0, size: float = 0.1) -> dict[str, np.ndarray]:
    """Random packed arrays of a matrix whose entries are about `size`."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, spec in tensor_specs(shape, config).items():
        if spec.dtype.kind == "u":
            arrays[name] = rng.integers(0, np.iinfo(spec.dtype).max, spec.shape, spec.dtype, endpoint=True)
        elif name.endswith("_scale"):
            arrays[name] = rng.uniform(0.3, 0.9, spec.shape).astype(np.float32)
        else:
            arrays[name] = (rng.standard_normal(spec.shape) / 2).astype(np.float16)
    arrays["weight_scale"] = np.float32(size) * np.ones((), np.float32)
    if config.rotates_factors:
        for name, length in zip(("signs_out", "signs_in"), shape, strict=True):
            arrays[name] = np.packbits(rng.integers(0, 2, length), bitorder="little")
    return arrays


def write_packed(
    source: Path, folder: Path, config: DecomposeConfig, paths=("blocks.q_proj", "blocks.down_proj", "lm_head")
) -> tuple[Path, dict[str, np.ndarray]]:
    """A packed copy of a dense folder, two files and an index; -> it, and all its tensors as dense ones."""
    folder.mkdir()
    files, dense, source_tensors = {"layers.safetensors": {}, "dense.safetensors": {}}, {}, SafetensorsFolder(source)
    for seed, name in enumerate(tensor_names(a2d_jax.load_config(source))):
        if ".".join(name.path[:-1]) in paths and name.path[-1] == "kernel":
            arrays, module = random_arrays(name.shape, config, seed), name.hf_name.removesuffix("weight")
            files["layers.safetensors"] |= {module + suffix: array for suffix, array in arrays.items()}
            dense[name.hf_name] = packed_reader.dense(arrays, dataclasses.asdict(config)).astype(np.float32)
        else:
            dense[name.hf_name] = files["dense.safetensors"][name.hf_name] = source_tensors.read(name.hf_name)
    for file, tensors in files.items():
        shapes = {name: (array.shape, array.dtype) for name, array in tensors.items()}
        write_safetensors(folder / file, shapes, tensors.__getitem__, {"format": "pt"})
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_manifest(folder, Manifest(config, tuple(paths)))
    return folder, dense
