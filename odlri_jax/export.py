"""Program: a packed checkpoint, or one whose factors were trained, to the form another program reads.

    python -m odlri_jax.export --checkpoint DIR --target HF_DIR [--layout dense|packed|adapter] [--dtype bfloat16]
    python -m odlri_jax.export --checkpoint DIR --target DIR --layout packed --lr_bits 16

dense    a Hugging Face folder of W ~ Q + L R, which transformers loads
packed   the packed format again, trained factors in it as float16; with --lr_bits 16 quantised factors become 16-bit
         ones, which can be trained
adapter  a Hugging Face folder of Q alone, and (L, R) as a PEFT adapter of scale one in HF_DIR/adapter: transformers
         loads the first, peft the second on top of it

Matrices are written one at a time.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from a2d_jax.export import base_model_of
from a2d_jax.files import local_path
from a2d_jax.folders import check_target, hf_folder
from a2d_jax.hf_io import read_tensor, save_dense
from a2d_jax.models.lora import LoRAConfig
from a2d_jax.models.naming import TensorName, adapter_targets, module_names
from a2d_jax.models.transformer import Transformer
from a2d_jax.orbax_io import copy_companions
from a2d_jax.peft_io import NAME_PREFIX, write_adapter
from a2d_jax.pretrained import load_pretrained
from a2d_jax.safetensors_io import INDEX_NAME
from odlri_jax import hadamard
from odlri_jax.decomposition import Decomposition
from odlri_jax.packed_io import MANIFEST_NAME, compressed_projections, layers_of, save_packed
from odlri_jax.report import PLOT_NAME, REPORT_NAME

LAYOUTS = ("dense", "packed", "adapter")
ADAPTER_FOLDER = "adapter"


def plain_factors(d: Decomposition) -> tuple[jax.Array, jax.Array]:
    """L (m, r), R (r, n) with their product in the basis of W, in units of weight_scale."""
    if not d.config.rotates_factors:
        return d.left, d.right
    left = (hadamard.rotate(d.left.T, inverse=True) * d.signs_out).T  # S_V U_m^T L
    return left, hadamard.rotate(d.right, inverse=True) * d.signs_in  # R U_n S_U


def save_dense_checkpoint(model: Transformer, path: str | Path, part: str = "dense") -> None:
    """Writes the model as a Hugging Face folder: packed matrices as Q + L R, or with `part` "dense_q" as Q alone."""
    packed, state = compressed_projections(model), nnx.state(model)

    def read(name: TensorName, dtype: np.dtype) -> np.ndarray:
        linear = packed.get(".".join(name.path[:-1]))
        if linear is None or name.path[-1] != "kernel":
            return read_tensor(state, name, dtype)
        return np.asarray(getattr(linear.decomposition(name.layer), part)()).astype(dtype)

    save_dense(model.config, read, path)


def save_factors_as_adapter(model: Transformer, path: str | Path, base: str) -> None:
    """Writes (L, R) of every packed matrix as a PEFT adapter with alpha = r; `base` is where Q lies."""
    packed = compressed_projections(model)
    rank = next(iter(packed.values())).config.rank
    shapes, sources = {}, {}
    for our_path, linear in packed.items():
        m, n = linear.shape
        for module, layer in layers_of(model, our_path):
            for half, shape in (("A", (rank, n)), ("B", (m, rank))):
                name = f"{NAME_PREFIX}{module}.lora_{half}.weight"
                shapes[name], sources[name] = (shape, np.dtype(np.float32)), (linear, layer, half)

    def read(name: str) -> np.ndarray:
        linear, layer, half = sources[name]
        d = linear.decomposition(layer)
        left, right = plain_factors(d)
        return np.asarray(right if half == "A" else left * d.weight_scale)

    lora = LoRAConfig(rank, float(rank), 0.0, adapter_targets(model.config, list(packed)))
    write_adapter(path, model.config, lora, shapes, read, base)


def with_16_bit_factors(model: Transformer) -> Transformer:
    """The model with its factors decoded and rounded to float16, to be trained. Changes it in place; returns it."""
    for path, linear in compressed_projections(model).items():
        if linear.config.lr_bits == 16:
            continue
        config = dataclasses.replace(linear.config, lr_bits=16, published=False)
        matrices = [linear.decomposition(layer) for _, layer in layers_of(model, path)]
        # Factors of 16 bits live in the basis of Q.
        factors = [(d.left, d.right) if d.config.hadamard else plain_factors(d) for d in matrices]
        linear.replace_factors(config, *(jnp.stack(halves) for halves in zip(*factors, strict=True)))
    return model


def export(checkpoint: str, target: str | Path, layout: str, dtype: str | None = None, lr_bits: int | None = None):
    """Writes `target` in one of `LAYOUTS`; -> the model as it was written.

    Raises:
      ValueError: nothing packed in the checkpoint, a target that is the checkpoint, the base that its factors were
        trained on, or a packed folder to be replaced by dense files, or settings that do not go together.
    """
    target, files = local_path(target), hf_folder(checkpoint)
    if layout != "packed" and lr_bits is not None:
        raise ValueError(f"--lr_bits has no meaning for --layout {layout}; leave it out.")
    if layout == "packed" and dtype is not None:
        raise ValueError("--dtype is for dense tensors that change; --layout packed keeps every one as it is.")
    own = [Path(folder).resolve() for folder in (checkpoint, files, base_model_of(checkpoint)) if folder]
    if target.exists() and target.resolve() in own:
        raise ValueError(f"--target is the checkpoint itself or its base ({target}); choose another folder.")
    check_target(target, is_other_format=layout == "packed")
    model = load_pretrained(checkpoint, dtype=jnp.float32)
    packed = compressed_projections(model)
    if not packed:
        raise ValueError(f"{checkpoint} holds no packed projection; python -m a2d_jax.export writes dense checkpoints.")
    if dtype is not None:
        model.config = model.config.with_dtype(dtype)

    # config.json and the manifest come last: where they are, the folder is complete. The report of a compression is of
    # the factors that it found, which may have been trained or rounded since.
    copy_companions(files, target, ("config.json", INDEX_NAME, MANIFEST_NAME, REPORT_NAME, PLOT_NAME))
    if layout == "packed":
        save_packed(model if lr_bits is None else with_16_bit_factors(model), target)
    elif layout == "dense":
        save_dense_checkpoint(model, target)
    else:
        save_factors_as_adapter(model, target / ADAPTER_FOLDER, str(target.absolute()))
        save_dense_checkpoint(model, target, "dense_q")
    return model


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    checkpoint, target, layout = flags.FLAGS.checkpoint, flags.FLAGS.target, flags.FLAGS.layout
    print(f"{checkpoint} -> {target}, {layout}", flush=True)
    lr_bits = flags.FLAGS.lr_bits and int(flags.FLAGS.lr_bits)
    model = export(checkpoint, target, layout, flags.FLAGS.dtype, lr_bits)
    packed = compressed_projections(model)
    num_matrices = sum(len(module_names(model.config, path)) for path in packed)
    rank = next(iter(packed.values())).config.rank
    also = f"; its adapter (r={rank}, alpha={rank}) to {Path(target) / ADAPTER_FOLDER}" if layout == "adapter" else ""
    print(f"wrote {model.config.family} with {num_matrices} decomposed matrices ({layout}) to {target}{also}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "packed folder, or a training folder that started from one", required=True)
    flags.DEFINE_string("target", None, "folder to write", required=True)
    flags.DEFINE_enum("layout", "dense", LAYOUTS, "what to write")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of dense tensors; default: config.json's")
    flags.DEFINE_enum("lr_bits", None, ["16"], "packed: turn quantised factors into 16-bit ones")
    app.run(main)
