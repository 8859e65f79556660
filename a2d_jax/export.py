"""Program: a checkpoint back to a Hugging Face folder, merged, or its adapter to a PEFT folder.

    python -m a2d_jax.export --checkpoint DIR --target HF_DIR [--adapter] [--dtype bfloat16]

The folder holds the family's own tensor names, config.json as it came, the tokenizer and every other file of the base
checkpoint that is not weights; `transformers` loads it (LLaDA and Dream with their own published code).
"""

import json
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags, logging

from a2d_jax.config import load_config
from a2d_jax.hf_io import INDEX_NAME, save_pretrained
from a2d_jax.models.lora import merge_adapter
from a2d_jax.orbax_io import copy_companions
from a2d_jax.peft_io import save_adapter
from a2d_jax.pretrained import hf_files, load_pretrained

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "converted, training or Hugging Face folder", required=True)
_TARGET = flags.DEFINE_string("target", None, "folder to write", required=True)
_ADAPTER = flags.DEFINE_bool("adapter", False, "write the LoRA adapter alone, in PEFT's layout")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "of the written tensors; default: config.json's"
)


def base_model_of(checkpoint: str) -> str | None:
    """The base that a training folder names, for PEFT's configuration."""
    settings = Path(checkpoint) / "train_config.json"
    return json.loads(settings.read_text())["model"]["checkpoint"] if settings.is_file() else None


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    source, target = _CHECKPOINT.value, Path(_TARGET.value)
    if target.exists() and target.resolve() == Path(source).resolve():
        raise ValueError(f"--target is the checkpoint itself ({target}); choose another folder.")
    config = load_config(hf_files(source))
    model = load_pretrained(source, dtype=jnp.float32, param_dtype=config.dtype)
    if _ADAPTER.value:
        if model.lora is None:
            raise ValueError(f"{source} holds no adapter; leave out --adapter to write the whole model.")
        save_adapter(model, target, base_model_name_or_path=base_model_of(source))
        print(f"wrote the PEFT adapter (r={model.lora.rank}, alpha={model.lora.alpha:g}) to {target}")
        return
    merge_adapter(model)
    if _DTYPE.value:
        model.config = model.config.with_dtype(_DTYPE.value)
    save_pretrained(model, target)
    copy_companions(hf_files(source), target, except_for=("config.json", INDEX_NAME))
    print(f"wrote {config.family} in {model.config.dtype}, adapter merged where there was one, to {target}")


if __name__ == "__main__":
    app.run(main)
