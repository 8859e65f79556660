"""Program: perplexity of a checkpoint on a text.

    python -m odlri_jax.evaluate --checkpoint DIR --text FILE [--context_length 2048 --max_windows N --out FILE]

Takes every folder that `a2d_jax.load_pretrained` takes, packed ones included. Causal models give the perplexity by the
usual protocol, LLaDA and Dream the Monte Carlo bound (--num_samples masked copies of each window, --seed): see
`odlri_jax/perplexity.py`. Needs no more than minutes on a small model, so it is not resumed: the numbers come at the
end, in one line and, with --out, as JSON.
"""

import math
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


def _json_number(value: float) -> float | str:
    """The number; "inf" or "nan" for what JSON does not know."""
    return value if math.isfinite(value) else str(value)


def main(_) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    out = local_path(given.out) if given.out else None
    files, text = hf_folder(given.checkpoint), Path(given.text)
    if not text.is_file():
        raise ValueError(f"--text={text} is no file; give a UTF-8 text.")
    config = load_config(files)
    is_bound = config.family in DIFFUSION_FAMILIES
    tokens = load_tokenizer(files).encode(text.read_text(encoding="utf-8"))
    context_length = given.context_length or default_context_length(config.max_length, len(tokens))
    num_windows = min(len(tokens) // context_length, given.max_windows or len(tokens))
    print(f"model {given.checkpoint} ({config.family}, {given.dtype}), adapter {given.adapter}")
    print(f"text {text}: {len(tokens)} tokens, {num_windows} windows of {context_length}", flush=True)
    if is_bound:
        print(f"Monte Carlo bound, {given.num_samples} masked copies of each window, seed {given.seed}", flush=True)

    mesh = make_mesh(*given.mesh) if given.mesh else None
    model = load_pretrained(given.checkpoint, mesh, jnp.dtype(given.dtype), given.adapter)
    start = time.monotonic()

    def report(state: Perplexity) -> None:
        rate = state.num_windows / (time.monotonic() - start)
        eta = clock((num_windows - state.num_windows) / rate)
        print(
            f"{state.num_windows}/{num_windows} windows, perplexity {state.perplexity:.4f}, {rate:.2f}/s, ETA {eta}",
            flush=True,
        )

    settings = {"context_length": context_length, "max_windows": given.max_windows}
    of_bound = {"num_samples": given.num_samples, "seed": given.seed}
    result = perplexity(model, tokens, batch_size=given.batch_size, report=report, **settings, **of_bound)
    if out is not None:
        record = {
            "checkpoint": given.checkpoint,
            "adapter": given.adapter,
            "text": str(text),
            **settings,
            **(of_bound if is_bound else {}),
            "dtype": given.dtype,
            "is_bound": is_bound,
            "perplexity": _json_number(result.perplexity),
            "nll": _json_number(result.nll),
            "num_tokens": result.num_tokens,
            "num_windows": result.num_windows,
            "seconds": time.monotonic() - start,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, record)
    bound = " (bound)" if is_bound else ""
    wrote = f" -> {out}" if out else ""
    print(f"perplexity {result.perplexity:.4f}{bound} over {result.num_tokens} tokens{wrote}")


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "folder of any kind that loads", required=True)
    flags.DEFINE_string("text", None, "UTF-8 text file", required=True)
    flags.DEFINE_string("adapter", None, "PEFT folder to attach")
    flags.DEFINE_integer(
        "context_length",
        None,
        f"tokens of a window; default: {DEFAULT_CONTEXT_LENGTH}, at most what the model takes and the text has",
        lower_bound=2,
    )
    flags.DEFINE_integer("max_windows", None, "only the first so many windows", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "windows, or masked copies of one, read together", lower_bound=1)
    flags.DEFINE_integer("num_samples", 32, "masked copies of a window (LLaDA, Dream)", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the masks (LLaDA, Dream)")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations")
    define_mesh_flag()
    flags.DEFINE_string("out", None, "JSON file to write")


if __name__ == "__main__":
    define_flags()
    app.run(main)
