"""Host memory while a 4 GB checkpoint is converted, loaded, exported: the largest tensor plus a constant, or all of it?

    python -m bench.checkpoint_memory --out bench_out [--gigabytes 4]

A random LLaDA of the wanted size is written to disk in shards, bfloat16. Each program then runs as a process of its
own, whose peak of anonymous memory (pages it allocated; mapped files can be dropped by the system at any time and are
counted apart) is read from /proc while it runs. Compared with a process that only imports the package.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags

from a2d_jax.config import ModelConfig
from a2d_jax.files import write_json
from a2d_jax.hf_io import split_into_shards
from a2d_jax.models.naming import tensor_names
from a2d_jax.safetensors_io import INDEX_NAME, write_safetensors

_OUT = flags.DEFINE_string("out", "bench_out", "folder for the table")
_GIGABYTES = flags.DEFINE_float("gigabytes", 4.0, "size of the generated checkpoint")
ROOT = Path(__file__).parents[1]


def write_checkpoint(folder: Path, num_bytes: float) -> dict[str, int]:
    """A random LLaDA folder of about `num_bytes`; returns the size of each tensor."""
    hf_config = {
        "model_type": "llada", "d_model": 2048, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": 6144,
        "embedding_size": 32768, "vocab_size": 32768, "weight_tying": False, "mask_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    per_layer = 2 * (4 * 2048**2 + 3 * 2048 * 6144)
    hf_config["n_layers"] = round((num_bytes - 2 * 2 * 32768 * 2048) / per_layer)
    names = tensor_names(ModelConfig.from_hf(hf_config))
    dtype = np.dtype(ml_dtypes.bfloat16)
    shapes = {name.hf_name: (name.shape, dtype) for name in names}
    sizes = {name: int(np.prod(shape)) * 2 for name, (shape, _) in shapes.items()}
    shards = list(split_into_shards(sizes, 1_000_000_000))
    rng, weight_map = np.random.default_rng(0), {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        draw = lambda name: (0.02 * rng.standard_normal(shapes[name][0], np.float32)).astype(dtype)
        write_safetensors(folder / file, {name: shapes[name] for name in part}, draw, {"format": "pt"})
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    write_json(folder / "config.json", hf_config)
    return sizes


def peak_memory(*command: str) -> dict[str, float]:
    """Peak MB of anonymous and of file-backed memory of a program, and its seconds."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = {"RssAnon": 0, "RssFile": 0}

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except (OSError, ValueError):
                break
            for key in peak:
                peak[key] = max(peak[key], int(lines.get(key, "0 kB").split()[0]))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise RuntimeError(f"{command} ended with code {code}")
    return {
        "peak_anonymous_mb": peak["RssAnon"] / 1e3, "peak_mapped_mb": peak["RssFile"] / 1e3,
        "seconds": time.monotonic() - start,
    }  # fmt: skip


def main(_) -> None:
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        source, orbax = Path(scratch) / "source", Path(scratch) / "orbax"
        source.mkdir()
        sizes = write_checkpoint(source, _GIGABYTES.value * 1e9)
        idle = peak_memory("-c", "import a2d_jax, jax; jax.devices()")
        rows = [{"program": "import alone"} | idle]
        rows.append(
            {"program": "convert"} | peak_memory("-m", "a2d_jax.convert", f"--source={source}", f"--target={orbax}")
        )
        load = f"import a2d_jax, jax.numpy as jnp; a2d_jax.load_pretrained({str(source)!r}, dtype=jnp.bfloat16)"
        rows.append({"program": "load_pretrained (the model itself stays in memory)"} | peak_memory("-c", load))
        shutil.rmtree(source)
        back = Path(scratch) / "back"
        rows.append(
            {"program": "export (the model itself stays in memory)"}
            | peak_memory("-m", "a2d_jax.export", f"--checkpoint={orbax}", f"--target={back}")
        )
    checkpoint, largest = sum(sizes.values()) / 1e6, max(sizes.values()) / 1e6
    for row in rows:
        row["above_import_mb"] = row["peak_anonymous_mb"] - idle["peak_anonymous_mb"]
    table = {"checkpoint_mb": checkpoint, "largest_tensor_mb": largest, "programs": rows}
    write_json(out / "checkpoint_memory.json", table)
    print(json.dumps(table, indent=1))
    print(f"checkpoint {checkpoint:.0f} MB, largest tensor {largest:.0f} MB -> {out / 'checkpoint_memory.json'}")


if __name__ == "__main__":
    app.run(main)
