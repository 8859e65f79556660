"""Program: a checkpoint back to a Hugging Face folder, merged, or its adapter to a PEFT folder.

    python -m a2d_jax.export --checkpoint DIR --target HF_DIR [--adapter [--base NAME]] [--dtype bfloat16]

The folder holds the family's own tensor names, config.json as it came, the tokenizer and every other file of the base
checkpoint that is not weights; `transformers` loads it (LLaDA and Dream with their own published code).
"""

import json
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags, logging

from a2d_jax.config import load_config
from a2d_jax.files import local_path
from a2d_jax.folders import TRAIN_CONFIG_NAME, check_target, hf_folder
from a2d_jax.hf_io import check_dense, save_pretrained
from a2d_jax.models.lora import merge_adapter
from a2d_jax.orbax_io import copy_companions
from a2d_jax.peft_io import save_adapter
from a2d_jax.pretrained import load_pretrained
from a2d_jax.safetensors_io import INDEX_NAME


def base_model_of(checkpoint: str) -> str | None:
    """The base that a training folder names, for PEFT's configuration."""
    settings = Path(checkpoint) / TRAIN_CONFIG_NAME
    return json.loads(settings.read_text())["model"]["checkpoint"] if settings.is_file() else None


def export(
    checkpoint: str | Path,
    target: str | Path,
    is_adapter: bool = False,
    dtype: str | None = None,
    base: str | None = None,
) -> None:
    """Writes `target`: the whole model in `dtype` (None: config.json's), or with `is_adapter` its adapter alone.

    Args:
      base: what the adapter's configuration names as its base model, such as a name on the Hub; None: the folder that
        it was trained on.

    Raises:
      ValueError: a target that is the checkpoint itself, its base or a checkpoint of another kind, or lies in an object
        store; no adapter where one is asked for, or a base for what is no adapter; compressed projections.
    """
    checkpoint, target = str(checkpoint), local_path(target)
    own = [Path(folder).resolve() for folder in (checkpoint, base_model_of(checkpoint)) if folder]
    if target.exists() and target.resolve() in own:
        raise ValueError(f"--target is the checkpoint itself or its base ({target}); choose another folder.")
    check_target(target, is_other_format=False)
    if base is not None and not is_adapter:
        raise ValueError(f"--base={base} is for the configuration of an adapter; add --adapter, or leave it out.")
    config = load_config(hf_folder(checkpoint))
    # The finer of both formats: a finer --dtype keeps what training knows, a coarser one rounds once, at the end.
    param_dtype = jnp.promote_types(config.dtype, dtype or config.dtype)
    model = load_pretrained(checkpoint, dtype=jnp.float32, param_dtype=param_dtype)
    if is_adapter:
        if model.lora is None:
            raise ValueError(f"{checkpoint} holds no adapter; leave out --adapter to write the whole model.")
        save_adapter(model, target, base_model_name_or_path=base or base_model_of(checkpoint))
        print(f"wrote the PEFT adapter (r={model.lora.rank}, alpha={model.lora.alpha:g}) to {target}")
        return
    check_dense(model)  # before the files of a packed folder, its manifest among them, are copied
    merge_adapter(model)
    if dtype:
        model.config = model.config.with_dtype(dtype)
    # config.json comes last: a folder that has it is whole.
    copy_companions(hf_folder(checkpoint), target, except_for=("config.json", INDEX_NAME))
    save_pretrained(model, target)
    print(f"wrote {config.family} in {model.config.dtype}, adapter merged where there was one, to {target}")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    given = flags.FLAGS
    export(given.checkpoint, given.target, given.adapter, given.dtype, given.base)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "converted, training or Hugging Face folder", required=True)
    flags.DEFINE_string("target", None, "folder to write", required=True)
    flags.DEFINE_bool("adapter", False, "write the LoRA adapter alone, in PEFT's layout")
    flags.DEFINE_string("base", None, "base model that the adapter names; default: the folder it was trained on")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"], "of the written tensors; default: config.json's"
    )
    app.run(main)
