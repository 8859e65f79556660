"""Kills training jobs of several processes at random steps, starts them again, and compares the weights at the end.

    python -m bench.soak_train --out bench_out/soak_train [--kills 20 --num_processes 1,2,4 --seed 0]

A small random LLaDA is trained undisturbed first, once for each number of processes. Then, each time in a new folder,
a job is killed (SIGKILL) at a random moment of a random step, one process of it or all; it is started again and runs
to its end. Weights and optimizer must come out with the same bits, metrics.jsonl with each step once. Where one process
is killed, the others must end by themselves. A job that fails without having been killed is started again, as on a
slice, and counted: the processes of a machine that stands still for minutes take each other for dead.
"""

import functools
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging
from flax import nnx

import a2d_jax
from a2d_jax.files import write_json
from a2d_jax.metrics import METRICS_NAME, read_metrics
from a2d_jax.settings import default_config
from a2d_jax.world import write_world
from bench.hosts import Job

NUM_STEPS, CHECKPOINT_EVERY = 12, 5
NUM_ROWS = 60  # of each kind: more than a run reads


def write_inputs(folder: Path) -> list[str]:
    """World 0 with a tiny model of its tokenizer, and a config that trains every weight; returns the config's flag."""
    write_world(0, folder / "world")
    model = folder / "world" / "model"
    hf = json.loads((model / "config.json").read_text())
    write_json(
        model / "config.json", hf | {"d_model": 32, "mlp_hidden_size": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 1}
    )
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(model), rngs=nnx.Rngs(0)), model)
    config = default_config()
    config.model.checkpoint = str(model)
    config.data.files = tuple(str(folder / f"{kind}.jsonl") for kind in ("harmful", "retain"))
    for file in config.data.files:
        lines = (folder / "world" / "data" / f"a2d_{Path(file).name}").read_text().splitlines(keepends=True)
        Path(file).write_text("".join(lines[:NUM_ROWS]))
    config.data.row_length = 44
    config.data.buckets = (44,)
    config.batch_size = 8
    config.num_steps = NUM_STEPS
    config.optimizer.learning_rate = 1e-3
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.checkpoint_every = CHECKPOINT_EVERY
    config.log_every = 1
    (folder / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    return [f"--config={folder / 'config.py'}"]


def final_arrays(workdir: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint, read by Orbax alone, whatever devices it was written from."""
    arrays = {}
    for item in ("params", "opt_state"):
        folder = workdir.absolute() / "checkpoints" / str(step) / item
        with ocp.PyTreeCheckpointer() as reader:
            shapes = reader.metadata(folder).item_metadata.tree
            to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=to_host))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return arrays


def last_step(workdir: Path) -> int:
    path = workdir / METRICS_NAME
    return max((line["step"] for line in read_metrics(path)), default=0) if path.is_file() else 0


def kill_at_step(job: Job, workdir: Path, step: int, which: Sequence[int], delay: float = 0.0) -> bool:
    """Kills processes of the job `delay` seconds after it wrote the numbers of a step; whether it was still running.

    The processes that are left must end by themselves.
    """
    while last_step(workdir) < step and job.is_running():
        time.sleep(0.005)
    time.sleep(delay)
    was_running = job.is_running()
    job.kill(which)
    if which and None in job.wait(150):
        raise RuntimeError(f"killed {which}, but the others run on:\n" + "\n".join(job.output()))
    return was_running


def finish(start: Callable[[], Job], num_attempts: int = 3) -> int:
    """Starts a job until it ends well; how often it failed."""
    for num_failures in range(num_attempts):
        with start() as job:
            if not any(codes := job.wait(300)):
                return num_failures
    raise RuntimeError(f"the job ended {num_attempts} times, with {codes}:\n" + "\n".join(job.output()))


def main(_) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file
    jax.config.update("jax_platforms", "cpu")
    out = Path(flags.FLAGS.out).absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    arguments = write_inputs(out)

    def start(workdir: Path, num_processes: int, is_fresh: bool = False) -> Job:
        if is_fresh:
            shutil.rmtree(workdir, ignore_errors=True)
        logs = workdir.with_name(workdir.name + "_logs")
        # A process that is killed before they have met is waited for so long, and no longer.
        command = [*arguments, f"--workdir={workdir}", "--connect_seconds=60"]
        return Job("a2d_jax.train", command, logs, num_processes)

    sizes = [int(size) for size in flags.FLAGS.num_processes]
    expected = {}
    for size in sizes:
        finish(functools.partial(start, out / f"whole{size}", size, is_fresh=True))
        expected[size] = final_arrays(out / f"whole{size}", NUM_STEPS)
        print(f"{size} processes, undisturbed: {NUM_STEPS} steps", flush=True)

    rng, kills = random.Random(flags.FLAGS.seed), []
    while len(kills) < flags.FLAGS.kills:
        size, workdir = sizes[len(kills) % len(sizes)], out / "killed"
        which = [rng.randrange(size)] if rng.random() < 0.5 else list(range(size))
        step, delay = rng.randrange(NUM_STEPS), rng.uniform(0, 0.1)
        with start(workdir, size, is_fresh=True) as job:
            if not kill_at_step(job, workdir, step, which, delay):
                continue  # it had ended: no kill
        at = last_step(workdir)
        num_failures = finish(functools.partial(start, workdir, size))
        assert final_arrays(workdir, NUM_STEPS) == expected[size], f"the weights differ after kill {len(kills) + 1}"
        steps = [line["step"] for line in read_metrics(workdir / METRICS_NAME)]
        assert steps == list(range(1, NUM_STEPS + 1)), steps
        kills.append({"num_processes": size, "killed": which, "step": at, "failures": num_failures})
        print(f"kill {len(kills)}: {which} of {size} processes at step {at}, the same ending", flush=True)
    shutil.rmtree(out / "killed")
    write_json(out / "soak_train.json", {"identical": True, "kills": kills})
    print(f"{len(kills)} kills, {len(kills)} identical endings -> {out / 'soak_train.json'}")


if __name__ == "__main__":
    flags.DEFINE_string("out", "bench_out/soak_train", "folder for the runs and the verdict")
    flags.DEFINE_integer("kills", 20, "how often to kill", lower_bound=1)
    flags.DEFINE_list("num_processes", ["1", "2", "4"], "sizes of the jobs, taken in turn")
    flags.DEFINE_integer("seed", 0, "of the kills")
    app.run(main)
