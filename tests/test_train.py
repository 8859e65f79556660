"""The training program: a run that is stopped continues bit for bit, and nothing that goes wrong costs a checkpoint."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs
import jax
import numpy as np
import pytest
from orbax.checkpoint._src.path import gcs_utils
from tokenizer_folders import write_llada

import a2d_jax
from a2d_jax import data
from a2d_jax import train as train_module
from a2d_jax.assembly import assemble
from a2d_jax.export import export
from a2d_jax.metrics import MetricWriter, read_metrics
from a2d_jax.pretrained import load_trained
from a2d_jax.resume import held
from a2d_jax.settings import RunConfig, default_config
from a2d_jax.throughput import memory_in_use, utilization
from a2d_jax.train import train
from a2d_jax.training import init_state, pure, split_model

ROOT = Path(__file__).parents[1]
ROWS = [
    {"prompt": f"How do I bake bread number {i}?", "response": f"Mix {i} eggs with flour.", "is_safe": i % 2 == 0}
    for i in range(12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny LLaDA folder with random weights, and its training rows."""
    folder = write_llada(tmp_path_factory.mktemp("base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 16, "n_heads": 2, "n_layers": 2}))
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(folder)), folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def make_config(base: Path, has_adapter: bool = False, **changes):
    config = default_config()
    config.model.checkpoint = str(base)
    config.data.files = (str(base / "rows.jsonl"),)
    config.data.row_length = 96
    config.data.buckets = (96,)  # one length, one compilation
    config.batch_size = 4
    config.num_steps = 6
    config.optimizer.learning_rate = 1e-3
    config.checkpoint_every = 3
    config.log_every = 2
    config.mesh.data = 1
    if has_adapter:
        config.lora = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ()}
    config.update_from_flattened_dict(changes)
    return config


def run(config, workdir: Path, **options) -> None:
    train(config, workdir, devices=jax.devices()[:1], **options)


@pytest.fixture
def stop_at(monkeypatch):
    """Call it with (step, action): the action happens when the batch of that step is asked for."""
    asked = data.BatchIterator.__next__

    def arrange(step: int, action) -> None:
        def next_batch(self):
            if self.get_state()["step"] == step - 1:
                action()
            return asked(self)

        monkeypatch.setattr(data.BatchIterator, "__next__", next_batch)

    yield arrange


def interrupt():
    raise KeyboardInterrupt


def saved_bytes(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read by Orbax alone."""
    import orbax.checkpoint as ocp

    folder = workdir.absolute() / "checkpoints" / str(step)
    arrays = {}
    for item in ("params", "opt_state"):
        tree = ocp.StandardCheckpointer().restore(folder / item)
        arrays |= {
            f"{item}{jax.tree_util.keystr(path)}": np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
    return arrays


def numbers(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    by_clock = ("tokens_per_second", "step_seconds")
    return [{k: v for k, v in line.items() if k not in by_clock} for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_run_stopped_after_a_checkpoint_continues_bit_for_bit(base, tmp_path, stop_at, has_adapter):
    config = make_config(base, has_adapter)
    run(config, tmp_path / "straight")
    stop_at(6, interrupt)  # after the checkpoint of step 3, with the metrics of steps 4 (and not 5) written
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped")
    assert numbers(tmp_path / "stopped")[-1]["step"] == 4
    stop_at(-1, interrupt)
    run(config, tmp_path / "stopped")

    straight, continued = (saved_bytes(tmp_path / name, 6) for name in ("straight", "stopped"))
    assert straight.keys() == continued.keys() and len(straight) > 10
    for name, array in straight.items():
        assert array.tobytes() == continued[name].tobytes(), name
    assert numbers(tmp_path / "straight") == numbers(tmp_path / "stopped")
    assert [line["step"] for line in numbers(tmp_path / "stopped")] == [1, 2, 3, 4, 5, 6]
    assert [entry.name for entry in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["6"]


@pytest.mark.slow
def test_the_command_line_survives_a_kill(base, tmp_path):
    config_file = tmp_path / "tiny.py"
    fields = make_config(base, num_steps=100_000).to_dict()
    config_file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({fields!r})\n"
    )
    command = [sys.executable, "-m", "a2d_jax.train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 10/"):  # checkpoints are being written all the time
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    newest = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert newest >= 6
    command += [f"--config.num_steps={newest + 2}", "--config.optimizer.learning_rate=1e-3"]
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"continuing after step {newest}" in again.stdout
    assert "trained 2 steps in 0:00:0" in again.stdout.splitlines()[-1]
    assert [line["step"] for line in numbers(tmp_path / "run")] == list(range(1, newest + 3))


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(base, tmp_path):
    # The first update throws the weights to 1e30; the second step's loss overflows.
    config = make_config(base, checkpoint_every=1, log_every=1, **{"optimizer.learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match=r"step 2: loss .* keeps the steps \[1\].*learning_rate"):
        run(config, tmp_path / "run")
    assert all(np.isfinite(array).all() for array in saved_bytes(tmp_path / "run", 1).values())
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1]


def test_a_broken_update_is_not_applied_and_neither_are_those_queued_behind_it(base):
    model, mesh = a2d_jax.load_pretrained(base), a2d_jax.make_mesh(1, devices=jax.devices()[:1])
    assembled = assemble(RunConfig(batch_size=4), model, mesh, 9, model.config.mask_id, model.config.eos_id)
    _, trained, _ = split_model(model)
    tokens = np.arange(32).reshape(4, 8)
    batch = data.Batch(tokens, tokens % 8 > 2, tokens >= 0, np.array([True] * 4))

    def params(norm_scale: float):
        broken = jax.tree.map(np.asarray, pure(trained))
        broken["final_norm"]["scale"] = np.full_like(broken["final_norm"]["scale"], norm_scale)
        return jax.device_put(broken, assembled.shardings.state.params)

    # The first state gives a loss that is not a number; the second would not, but comes after one that did.
    first = init_state(params(np.nan), assembled.optimizer)
    second = init_state(params(1.0), assembled.optimizer)._replace(is_finite=np.array(False))
    for state in (first, second):
        before = jax.tree.map(np.array, state)
        with jax.set_mesh(mesh):
            after, metrics = assembled.update(state, {}, batch)
        assert not after.is_finite and not metrics["is_finite"] and int(after.step) == 0
        jax.tree.map(np.testing.assert_array_equal, (before.params, before.opt_state), (after.params, after.opt_state))


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_goes_on_when_there_is_room(base, tmp_path, stop_at):
    config = make_config(base)
    run(config, tmp_path / "straight")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk():
        """No file may grow beyond 20 kB now. Python ignores the signal, so writing fails as on a full disk."""
        while not (tmp_path / "run" / "checkpoints" / "3").is_dir():  # it is written in the background
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    stop_at(5, fill_the_disk)
    try:
        with pytest.raises(OSError, match=r"could not be written to(.|\n)*untouched \(steps \[3\]\)(.|\n)*Free space"):
            run(config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    stop_at(-1, interrupt)
    run(config, tmp_path / "run")
    straight, continued = (saved_bytes(tmp_path / name, 6) for name in ("straight", "run"))
    assert all(array.tobytes() == continued[name].tobytes() for name, array in straight.items())


def test_a_trained_folder_loads_on_its_own_and_an_adapter_stays_unmerged(base, tmp_path, capsys):
    run(make_config(base, num_steps=3), tmp_path / "full")
    run(make_config(base, has_adapter=True, num_steps=3), tmp_path / "adapter")
    assert capsys.readouterr().out.splitlines()[-1].endswith("adapter/checkpoints/3")
    tokens = np.arange(12)[None]
    before = a2d_jax.load_pretrained(base)(tokens)
    full, adapter = (a2d_jax.load_pretrained(tmp_path / name) for name in ("full", "adapter"))
    assert full.lora is None and adapter.lora.rank == 2
    with_adapter = adapter(tokens)
    for trained in (full(tokens), with_adapter):
        assert 1e-4 < np.abs(trained - before).max() < 1
    np.testing.assert_allclose(a2d_jax.merge_adapter(adapter)(tokens), with_adapter, atol=1e-5)
    # The folder carries config and tokenizer, so that it can be the base of the next run, whatever its kind.
    for name in ("full", "adapter"):
        run(make_config(tmp_path / name, num_steps=1, **{"data.files": (str(base / "rows.jsonl"),)}), tmp_path / "next")
        (tmp_path / "next").rename(tmp_path / f"after_{name}")


@pytest.mark.parametrize("has_adapter", [False, True])
def test_an_export_in_float32_keeps_what_the_bases_bfloat16_would_round(base, tmp_path, has_adapter):
    export(base, tmp_path / "half", dtype="bfloat16")
    run(make_config(tmp_path / "half", has_adapter, num_steps=1), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "exported", dtype="float32")
    with pytest.raises(ValueError, match="the checkpoint itself or its base"):  # what an adapter would be put on twice
        export(tmp_path / "run", tmp_path / "half")
    trained = a2d_jax.merge_adapter(a2d_jax.load_pretrained(tmp_path / "run"))
    exported = a2d_jax.load_pretrained(tmp_path / "exported")
    for path in ("blocks.q_proj", "blocks.down_proj"):
        kernel = trained.projection(path).kernel[...]
        np.testing.assert_array_equal(exported.projection(path).kernel[...], kernel)
        assert (kernel != kernel.astype("bfloat16")).any()


def test_training_from_scratch_learns_and_needs_no_weights(base, tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    config = make_config(base, num_steps=60, log_every=20, checkpoint_every=60)
    config.model.checkpoint, config.model.from_scratch = str(folder), True
    config.optimizer.learning_rate = 1e-2
    run(config, tmp_path / "run")
    losses = [line["loss"] for line in numbers(tmp_path / "run")]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])


def test_metrics_hold_what_readers_expect(base, tmp_path):
    run(make_config(base, num_steps=2), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "num_masked"} <= lines[0].keys()
    for line in lines:
        np.testing.assert_allclose(line["loss"], line["loss_harmful"] + line["loss_retain"], rtol=1e-5)
        assert line["learning_rate"] == pytest.approx(1e-3)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_each_step_draws_its_own_masks(base, tmp_path):
    """Four equal rows are one batch, the same at every step; only the step tells the masks apart."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(ROWS[0]) + "\n") * 4)
    run(make_config(base, num_steps=4, **{"data.files": (str(rows),)}), tmp_path / "run")
    assert len({line["num_masked"] for line in numbers(tmp_path / "run")}) >= 3


def test_metrics_beyond_the_restored_step_and_half_a_line_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    writer = MetricWriter(tmp_path, step=2)
    writer.write([{"step": 3, "loss": 0.5}])
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_a_dry_run_prints_the_plan_and_writes_nothing(base, tmp_path, capsys):
    run(make_config(base, has_adapter=True), tmp_path / "run", is_dry_run=True)
    plan = capsys.readouterr().out
    for text in ("llada, 2 layers of width 16", "LoRA r=2 alpha=4", "12 rows: 6 harmful, 6 retain", "steps      6"):
        assert text in plan
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_same_folder_is_refused_but_a_longer_run_is_not(base, tmp_path):
    run(make_config(base, num_steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match="config.seed: 0 -> 1"):
        run(make_config(base, num_steps=1, seed=1), tmp_path / "run")
    run(make_config(base, num_steps=2, log_every=1), tmp_path / "run")
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1, 2]
    decaying = {"optimizer.schedule": "cosine"}
    run(make_config(base, num_steps=1, **decaying), tmp_path / "cosine")
    with pytest.raises(ValueError, match="config.num_steps: 1 -> 2"):
        run(make_config(base, num_steps=2, **decaying), tmp_path / "cosine")


def test_other_rows_in_the_same_file_are_refused(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((base / "rows.jsonl").read_bytes())
    run(make_config(base, num_steps=1, **{"data.files": (str(rows),)}), tmp_path / "run")
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:-1]))
    with pytest.raises(ValueError, match="fingerprint"):
        run(make_config(base, num_steps=2, **{"data.files": (str(rows),)}), tmp_path / "run")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_steps": None}, "num_epochs and config.num_steps are both empty"),
        ({"num_steps": -1}, "config.num_steps=-1; it must be above 0, or None"),
        ({"num_steps": 0, "num_epochs": 1.0}, "config.num_steps=0; it must be above 0, or None"),
        ({"num_steps": None, "num_epochs": -0.5}, "config.num_epochs=-0.5; it must be above 0, or None"),
        ({"objective": "gpt"}, "objective='gpt'; choose one of"),
        ({"remat": "some"}, "remat='some'; choose one of"),
        ({"grad_accum_steps": 3}, "batch_size=4 does not split into grad_accum_steps=3"),
        ({"dtypes": {"param": "bfloat16"}}, "trained weights are kept in float32"),
        ({"dtypes": {"param": "float8"}}, "names 'float8'; choose one of"),
        ({"optimizer": {"schedule": "step"}}, "schedule='step'; choose one of"),
        ({"optimizer": {"learnig_rate": 1.0}}, "config.optimizer has no field 'learnig_rate'; known"),
        ({"data": {"files": ()}}, "config.data.files is empty"),
        ({"model": {"checkpoint": ""}}, "config.model.checkpoint is empty"),
        ({"log_every": 0}, "config.log_every=0; it must be at least 1"),
        ({"checkpoint_every": 0}, "config.checkpoint_every=0; it must be at least 1"),
        ({"preference": {}, "residual": {"weight": 1.0}}, "the residual term belongs to the A2D loss; set one of them"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_name(base, change, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(make_config(base).to_dict() | change)


def test_a_batch_that_does_not_split_over_the_devices_is_refused(base, tmp_path):
    config = make_config(base, **{"mesh.data": 8})
    with pytest.raises(ValueError, match="batch_size=4 does not split over data=8 x fsdp=1 devices"):
        train(config, tmp_path / "run")


def test_a_folder_where_another_process_trains_is_left_alone(base, tmp_path):
    with held(tmp_path / "run" / "training"):
        with pytest.raises(ValueError, match="another process trains in .*choose another --workdir"):
            run(make_config(base, num_steps=1), tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["training.lock"]


def test_the_folder_of_the_base_is_no_workdir(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(folder.iterdir())
    for workdir in (folder, tmp_path / "link"):
        with pytest.raises(ValueError, match="--workdir is the folder of the base model itself"):
            run(make_config(folder, num_steps=1), workdir)
    assert sorted(folder.iterdir()) == before


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_half_written_checkpoint_is_never_taken_for_a_good_one(base, tmp_path, capsys):
    run(make_config(base, num_steps=2), tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    # What a kill leaves behind: an unfinished folder of a later step. It is not continued from, and goes.
    unfinished = checkpoints / "4.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints / "2", unfinished)
    run(make_config(base, num_steps=3), tmp_path / "run")
    assert "continuing after step 2" in capsys.readouterr().out
    assert [entry.name for entry in checkpoints.iterdir()] == ["3"]

    # What a failing disk may leave behind: a finished name on half a file.
    for name, damage in [("opt_state", truncate), ("params", Path.unlink), ("params", truncate)]:
        shutil.copytree(tmp_path / "run", tmp_path / "damaged")
        files = [f for f in (tmp_path / "damaged" / "checkpoints" / "3" / name).rglob("d/*") if f.is_file()]
        damage(max(files, key=lambda file: file.stat().st_size))
        with pytest.raises(ValueError, match="checkpoints/3 cannot be restored.*remove it and run again"):
            run(make_config(base, num_steps=4), tmp_path / "damaged")
        shutil.rmtree(tmp_path / "damaged")


def test_a_run_in_an_object_store_is_stopped_and_continued_there(base, tmp_path, stop_at, monkeypatch, capsys):
    # Orbax asks the store by Google's own client whether its folders are real; those of the fake are not.
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    store, workdir = fake_gcs.serve(monkeypatch), "gs://bucket/runs/tiny"
    run(make_config(base), tmp_path / "straight")
    stop_at(6, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(make_config(base), workdir, is_profiled=True)
    # A later checkpoint whose last file has not been written: in a store that is all that tells.
    part = "bucket/runs/tiny/checkpoints/"
    objects = {name: content for name, (content, _) in fake_gcs.OBJECTS.items() if name.startswith(part + "3/")}
    assert part + "3/commit_success.txt" in objects
    for name, content in objects.items():
        if name != part + "3/commit_success.txt":
            fake_gcs.put(name.replace(part + "3/", part + "5/"), content)

    stop_at(-1, interrupt)
    run(make_config(base), workdir)
    store.shutdown()
    assert "continuing after step 3" in capsys.readouterr().out
    assert not Path("gs:").exists()  # nothing took the address for a folder here
    local = tmp_path / "copy"
    for name, (content, _) in fake_gcs.OBJECTS.items():
        file = local / name.removeprefix("bucket/runs/tiny/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    straight, continued = (saved_bytes(folder, 6) for folder in (tmp_path / "straight", local))
    assert straight.keys() == continued.keys()
    assert all(array.tobytes() == continued[name].tobytes() for name, array in straight.items())
    assert numbers(local) == numbers(tmp_path / "straight")
    assert list((local / "tensorboard").iterdir()) and (local / "hf" / "tokenizer.json").is_file()
    assert a2d_jax.load_pretrained(local)(np.arange(5)[None]).shape == (1, 5, 352)


def test_sigterm_saves_and_the_run_ends_as_if_it_had_come_to_its_end(base, tmp_path, stop_at, capsys):
    before = signal.getsignal(signal.SIGTERM)
    stop_at(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(make_config(base), tmp_path / "run")  # returns
    assert "trained 5 steps" in (text := capsys.readouterr().out) and "stopped by SIGTERM, 1 steps are left" in text
    assert signal.getsignal(signal.SIGTERM) is before
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]
    stop_at(-1, interrupt)
    run(make_config(base), tmp_path / "run")
    run(make_config(base), tmp_path / "straight")
    straight, continued = (saved_bytes(tmp_path / name, 6) for name in ("straight", "run"))
    assert all(array.tobytes() == continued[name].tobytes() for name, array in straight.items())


def test_a_profile_is_a_trace_of_three_steps(base, tmp_path, capsys):
    run(make_config(base, num_steps=8, checkpoint_every=8), tmp_path / "run", is_profiled=True)
    assert "steps 4 to 6 traced" in capsys.readouterr().out
    (perfetto,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert {int(step) for step in steps} == {4, 5, 6}
    (xprof,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert xprof.stat().st_size > 1000


class Chip:
    """A device of a v5e slice, as far as the metrics look at it."""

    device_kind = "TPU v5 lite"

    def __init__(self, in_use: int):
        self._stats = {"bytes_in_use": in_use, "peak_bytes_in_use": 2 * in_use}

    def memory_stats(self):
        return self._stats


def test_use_of_known_chips_and_of_their_memory():
    assert utilization(2 * 197e12, 4.0, [Chip(1), Chip(2)]) == pytest.approx(0.25)  # of 394 T a second, 98.5
    assert utilization(1.0, 1.0, jax.devices()) is None  # a CPU has no published peak
    assert memory_in_use([Chip(5), Chip(7), Chip(6)]) == {"hbm_bytes": 7, "hbm_peak_bytes": 14}
    assert memory_in_use(jax.devices()) == {}


def test_metrics_tell_the_use_of_chips_and_memory_where_they_are_known(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "memory_in_use", lambda devices: {"hbm_bytes": 3, "hbm_peak_bytes": 4})
    seen = []
    monkeypatch.setattr(train_module, "utilization", lambda *args: seen.append(args[:2]) or 0.375)
    run(make_config(base, num_steps=2), tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["mfu"], last["hbm_bytes"], last["hbm_peak_bytes"]) == (
        0.375,
        3,
        4,
    ) and "MFU 37.5%" in capsys.readouterr().out
    ((flops, seconds),) = seen
    # Two steps of 4 rows; the matrices of two layers and the head, 2 FLOPs a weight and token, three times; attention.
    config = a2d_jax.load_config(base)
    tokens = last["tokens_per_second"] * seconds
    length = tokens / 8
    weights = 2 * (4 * 16 * 16 + 3 * 16 * config.mlp_dim) + 16 * config.vocab_size
    assert flops == pytest.approx(3 * (2 * tokens * weights + 4 * tokens * 2 * length * 16), rel=0.05)
    assert last["step_seconds"] == pytest.approx(seconds / 2)


def test_a_folder_without_the_asked_checkpoint_or_with_a_damaged_one_says_so(base, tmp_path):
    run(make_config(base, num_steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; complete are those of the steps \[1\]"):
        load_trained(tmp_path / "run", None, a2d_jax.DTypes(), step=7)
    checkpoint = tmp_path / "run" / "checkpoints" / "1"
    for data_file in (checkpoint / "params").rglob("d/*"):
        data_file.write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoints/1 cannot be restored"):
        a2d_jax.load_pretrained(tmp_path / "run")
    checkpoint.rename(checkpoint.with_name("1.orbax-checkpoint-tmp"))  # how an unfinished one is named
    with pytest.raises(ValueError, match=r"no checkpoint of step None; complete are those of the steps \[\]"):
        a2d_jax.load_pretrained(tmp_path / "run")


def test_an_adapter_whose_base_is_gone_says_so(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    rows = {"data.files": (str(base / "rows.jsonl"),)}
    run(make_config(tmp_path / "base", has_adapter=True, num_steps=1, **rows), tmp_path / "run")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no folder .*/base' with the base model; put it back, or correct model.check"):
        a2d_jax.load_pretrained(tmp_path / "run")
    settings = tmp_path / "run" / "train_config.json"
    settings.write_text(settings.read_text().replace(str(tmp_path / "base"), str(tmp_path / "elsewhere")))
    assert a2d_jax.load_pretrained(tmp_path / "run").lora.rank == 2
    export(tmp_path / "run", tmp_path / "peft", is_adapter=True, base="org/base")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    with pytest.raises(ValueError, match="--base=org/base is for .* an adapter; add --adapter"):
        export(tmp_path / "run", tmp_path / "merged", base="org/base")
