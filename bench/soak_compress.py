"""Kills a compression at random moments, starts it again each time, and compares the files with an undisturbed run.

    python -m bench.soak_compress --out bench_out/soak_compress [--kills 10 --seed 0]

A small random LLaMA and random second moments are made first. Each run is killed (SIGKILL) a random time after a random
number of new files: before the first, between any two, or while the folder is completed. A run that ends before its
moment counts as no kill; a folder that is complete is compared and begun anew. Every file must come back with the same
bytes, of report.json all but the seconds.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from flax import nnx
from safetensors.numpy import save_file

import a2d_jax
from a2d_jax.config import ModelConfig
from a2d_jax.files import write_json
from a2d_jax.models.transformer import Transformer
from odlri_jax.calibration import CALIBRATION_NAME, FORMAT, VERSION, input_widths, layer_file
from odlri_jax.compress import UNFINISHED
from odlri_jax.packed_io import MANIFEST_NAME
from odlri_jax.report import REPORT_NAME

_OUT = flags.DEFINE_string("out", "bench_out/soak_compress", "folder for the models and the verdict")
_KILLS = flags.DEFINE_integer("kills", 10, "how often to kill", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the moments")
ROOT = Path(__file__).parents[1]
SETTINGS = ["--rank=16", "--init=odlri", "--lr_bits=4", "--outer_iters=3", "--inner_iters=2", "--tune_iters=2"]


def write_inputs(checkpoint: Path, calibration: Path) -> None:
    """A random model of six layers, and second moments of random inputs with a few strong channels."""
    hf = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64, "num_hidden_layers": 6,
        "intermediate_size": 64, "eos_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip
    config = ModelConfig.from_hf(hf)
    a2d_jax.save_pretrained(Transformer(config, rngs=nnx.Rngs(0)), checkpoint)
    calibration.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for layer in range(config.num_layers):
        moments = {}
        for name, n in input_widths(config).items():
            x = rng.standard_normal((n, 4 * n)) * np.where(np.arange(n) % 11 == 3, 6, 1)[:, None]
            moments[name] = (x @ x.T / (4 * n)).astype(np.float32)
        save_file(moments, calibration / layer_file(layer))
    record = {"format": FORMAT, "version": VERSION, "num_layers": config.num_layers, "num_tokens": 256}
    write_json(calibration / CALIBRATION_NAME, record)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished folder; of the report, all but the times."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(files[REPORT_NAME])
    for part in (report["summary"], *report["matrices"]):
        del part["seconds"]
    return files | {REPORT_NAME: json.dumps(report).encode()}


def start(checkpoint: Path, calibration: Path, target: Path) -> subprocess.Popen:
    places = [f"--checkpoint={checkpoint}", f"--calibration={calibration}", f"--out={target}"]
    command = [sys.executable, "-m", "odlri_jax.compress", *places, *SETTINGS, "--layers_per_group=1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"the compression ended with code {process.returncode}")


def num_files(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def wait_for_files(process: subprocess.Popen, folder: Path, wanted: int) -> float:
    """Seconds until the folder holds `wanted` files, or the process has ended; the clock starts with the folder."""
    while not (folder / UNFINISHED).is_dir() and process.poll() is None:
        time.sleep(0.002)
    begin = time.monotonic()
    while num_files(folder) < wanted and process.poll() is None:
        time.sleep(0.002)
    return time.monotonic() - begin


def main(_) -> None:
    out = Path(_OUT.value).absolute()
    shutil.rmtree(out, ignore_errors=True)
    checkpoint, calibration, undisturbed, target = (out / name for name in ("model", "moments", "whole", "killed"))
    write_inputs(checkpoint, calibration)
    finish(start(checkpoint, calibration, undisturbed))
    expected = contents(undisturbed)

    # A second undisturbed run, with compiled programs at hand, tells the time before the first file and after it.
    process = start(checkpoint, calibration, target)
    before_first = wait_for_files(process, target, 1)
    begin = time.monotonic()
    finish(process)
    each = (time.monotonic() - begin) / num_files(target)
    assert contents(target) == expected, "two undisturbed runs differ"
    total = num_files(target)
    shutil.rmtree(target)
    print(f"{total} weight files; {before_first:.2f} s to the first, {each:.2f} s for each further one", flush=True)

    rng, kills, num_complete = random.Random(_SEED.value), [], 0
    while len(kills) < _KILLS.value:
        already = num_files(target)
        wanted = rng.randint(already, total)
        delay = rng.uniform(0, before_first if wanted == already else each)
        process = start(checkpoint, calibration, target)
        wait_for_files(process, target, wanted)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append({"files_before": already, "files_after": num_files(target), "delay": round(delay, 4)})
            print(f"kill {len(kills)}: {already} weight files at its start, {num_files(target)} at its end", flush=True)
        if (target / MANIFEST_NAME).is_file():  # complete, killed or not
            finish(start(checkpoint, calibration, target))
            assert contents(target) == expected, f"the files differ after {len(kills)} kills"
            num_complete += 1
            shutil.rmtree(target)
    finish(start(checkpoint, calibration, target))
    assert contents(target) == expected, f"the files differ after {len(kills)} kills"
    write_json(out / "soak_compress.json", {"identical": True, "kills": kills, "folders": num_complete + 1})
    print(f"{len(kills)} kills over {num_complete + 1} folders, every file the same -> {out / 'soak_compress.json'}")


if __name__ == "__main__":
    app.run(main)
