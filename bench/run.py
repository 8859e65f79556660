"""Program: every benchmark, one after the other (`make bench`). They take hours: three worlds are trained from scratch.

python -m bench.run --out bench_out [--only checkpoint_memory,worlds]
"""

import subprocess
import sys
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).parents[1]
_OUT = flags.DEFINE_string("out", "bench_out", "folder for the tables")
COMMANDS = {
    "serve_load": ("bench.serve_load",),
    "checkpoint_memory": ("bench.checkpoint_memory",),
    "decoding": ("bench.decoding",),
    "worlds": ("a2d_jax.demo", "--from_scratch", "--seeds=0,1,2"),
}
_ONLY = flags.DEFINE_list("only", list(COMMANDS), "benchmarks to run")


def main(_) -> None:
    for name in _ONLY.value:
        if name not in COMMANDS:
            raise ValueError(f"--only={name}: unknown benchmark; choose from {sorted(COMMANDS)}.")
        module, *arguments = COMMANDS[name]
        out = Path(_OUT.value) / "worlds" if name == "worlds" else Path(_OUT.value)
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", module, *arguments, f"--out={out}"], check=True, cwd=ROOT)
    print(f"tables in {_OUT.value}")


if __name__ == "__main__":
    app.run(main)
