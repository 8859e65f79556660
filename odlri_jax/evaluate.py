"""Program: perplexity of a checkpoint on a text.

    python -m odlri_jax.evaluate --checkpoint DIR --text FILE [--context_length 2048 --max_windows N --out FILE]

Takes every folder that `a2d_jax.load_pretrained` takes, packed ones included. Causal models give the perplexity by the
usual protocol, LLaDA and Dream the Monte Carlo bound (--num_samples masked copies of each window, --seed): see
`odlri_jax/perplexity.py`. Needs no more than minutes on a small model, so it is not resumed: the numbers come at the
end, in one line and, with --out, as JSON.
"""

import time
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags, logging

from a2d_jax.config import DIFFUSION_FAMILIES, load_config
from a2d_jax.files import local_path, write_json
from a2d_jax.folders import hf_folder
from a2d_jax.mesh_flag import define_mesh_flag
from a2d_jax.pretrained import load_pretrained
from a2d_jax.progress import clock
from a2d_jax.sharding import make_mesh
from a2d_jax.tokenizer import load_tokenizer
from odlri_jax.perplexity import Perplexity, perplexity
from odlri_jax.windows import DEFAULT_CONTEXT_LENGTH, default_context_length

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of any kind that loads")
_TEXT = flags.DEFINE_string("text", None, "UTF-8 text file")
_ADAPTER = flags.DEFINE_string("adapter", None, "PEFT folder to attach")
_CONTEXT_LENGTH = flags.DEFINE_integer(
    "context_length",
    None,
    f"tokens of a window; default: {DEFAULT_CONTEXT_LENGTH}, at most what the model takes and the text has",
    lower_bound=2,
)
_MAX_WINDOWS = flags.DEFINE_integer("max_windows", None, "only the first so many windows", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "windows, or masked copies of one, read together", lower_bound=1)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 32, "masked copies of a window (LLaDA, Dream)", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the masks (LLaDA, Dream)")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations")
_MESH = define_mesh_flag()
_OUT = flags.DEFINE_string("out", None, "JSON file to write")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    out = local_path(_OUT.value) if _OUT.value else None
    files, text = hf_folder(_CHECKPOINT.value), Path(_TEXT.value)
    if not text.is_file():
        raise ValueError(f"--text={text} is no file; give a UTF-8 text.")
    config = load_config(files)
    is_bound = config.family in DIFFUSION_FAMILIES
    tokens = load_tokenizer(files, requires_mask=is_bound).encode(text.read_text(encoding="utf-8"))
    context_length = _CONTEXT_LENGTH.value or default_context_length(config.max_length, len(tokens))
    num_windows = min(len(tokens) // context_length, _MAX_WINDOWS.value or len(tokens))
    print(f"model {_CHECKPOINT.value} ({config.family}, {_DTYPE.value}), adapter {_ADAPTER.value}")
    print(f"text {text}: {len(tokens)} tokens, {num_windows} windows of {context_length}", flush=True)
    if is_bound:
        print(f"Monte Carlo bound, {_NUM_SAMPLES.value} masked copies of each window, seed {_SEED.value}", flush=True)

    mesh = make_mesh(*_MESH.value) if _MESH.value else None
    model = load_pretrained(_CHECKPOINT.value, mesh, jnp.dtype(_DTYPE.value), _ADAPTER.value)
    start = time.monotonic()

    def report(state: Perplexity) -> None:
        rate = state.num_windows / (time.monotonic() - start)
        eta = clock((num_windows - state.num_windows) / rate)
        print(
            f"{state.num_windows}/{num_windows} windows, perplexity {state.perplexity:.4f}, {rate:.2f}/s, ETA {eta}",
            flush=True,
        )

    settings = {"context_length": context_length, "max_windows": _MAX_WINDOWS.value}
    of_bound = {"num_samples": _NUM_SAMPLES.value, "seed": _SEED.value}
    result = perplexity(model, tokens, batch_size=_BATCH_SIZE.value, report=report, **settings, **of_bound)
    if out is not None:
        record = {
            "checkpoint": _CHECKPOINT.value,
            "adapter": _ADAPTER.value,
            "text": str(text),
            **settings,
            **(of_bound if is_bound else {}),
            "dtype": _DTYPE.value,
            "is_bound": is_bound,
            "perplexity": result.perplexity,
            "nll": result.nll,
            "num_tokens": result.num_tokens,
            "num_windows": result.num_windows,
            "seconds": time.monotonic() - start,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, record)
    bound = " (bound)" if is_bound else ""
    wrote = f" -> {out}" if out else ""
    print(f"perplexity {result.perplexity:.4f}{bound} over {result.num_tokens} tokens{wrote}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "text"])
    app.run(main)
