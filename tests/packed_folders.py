"""Decompositions made of random codebook values, and packed folders of them, for the tests: no alternation is run."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import a2d_jax
from a2d_jax.hf_io import SafetensorsFolder, write_safetensors
from a2d_jax.models.naming import tensor_names
from odlri_jax import DecomposeConfig, Decomposition
from odlri_jax.ldlq import block_units
from odlri_jax.packed_io import Manifest, write_manifest
from odlri_jax.packing import pack

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "float32",
}  # fmt: skip


def on_codebook(rng, codebook, shape, scale) -> jax.Array:
    """Random values of the codebook times the scale, as rounding makes them."""
    x = jnp.asarray(rng.standard_normal(shape) * (1 if hasattr(codebook, "opt_scale") else 0.5), jnp.float32)
    rows, columns = shape
    blocks = jax.jit(codebook.nearest)(x.reshape(rows, columns // 8, 8))
    return (blocks * block_units(scale, columns)[..., None]).reshape(shape)


def random_decomposition(shape, config: DecomposeConfig, seed: int = 0, size: float = 0.1) -> Decomposition:
    """What `decompose` could have found: every part random, the entries of W about `size`."""
    rng, (m, n), rank = np.random.default_rng(seed), shape, config.rank
    scalar = lambda value: jnp.asarray(value, jnp.float32)  # noqa: E731
    q_scale = scalar(rng.uniform(0.5, 1))
    if not hasattr(config.codebook, "opt_scale"):
        q_scale = jnp.asarray(rng.uniform(0.5, 3, (m, n // config.group)), jnp.float32)
    left_scale, right_scale = scalar(1), scalar(1)
    if config.factor_codebook is None:
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2, jnp.float16).astype(jnp.float32)  # noqa: E731
        left, right = draw(m, rank), draw(rank, n)
    else:
        left_scale, right_scale = scalar(rng.uniform(0.1, 0.9)), scalar(rng.uniform(0.1, 0.9))
        left_shape = (rank, m) if config.published else (m, rank)
        left = on_codebook(rng, config.factor_codebook, left_shape, left_scale)
        left = left.T if config.published else left
        right = on_codebook(rng, config.factor_codebook, (rank, n), right_scale)
    signs = [jnp.asarray(rng.choice([-1, 1], size), jnp.float32) for size in shape]
    return Decomposition(
        on_codebook(rng, config.codebook, shape, q_scale), left, right, q_scale, left_scale, right_scale,
        scalar(size), *signs, *[scalar(0)] * 6, jnp.int32(0), config,
    )  # fmt: skip


def write_llama(folder: Path, **changes) -> Path:
    """A tiny LLaMA folder with random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(folder)), folder)
    return folder


def write_packed(
    source: Path, folder: Path, config: DecomposeConfig, paths=("blocks.q_proj", "blocks.down_proj", "lm_head")
) -> tuple[Path, dict[str, np.ndarray]]:
    """A packed copy of a dense folder, two files and an index; -> it, and all its tensors as dense ones."""
    folder.mkdir()
    files, dense, source_tensors = {"layers.safetensors": {}, "dense.safetensors": {}}, {}, SafetensorsFolder(source)
    for seed, name in enumerate(tensor_names(a2d_jax.load_config(source))):
        if ".".join(name.path[:-1]) in paths and name.path[-1] == "kernel":
            d = random_decomposition(name.shape, config, seed)
            dense[name.hf_name] = np.asarray(d.dense())
            module = name.hf_name.removesuffix("weight")
            files["layers.safetensors"] |= {module + suffix: array for suffix, array in pack(d).items()}
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
