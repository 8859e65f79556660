"""Jobs of two and four processes on loopback: the numbers of one process, kills, preemption, no coordinator.

Two processes with a device each and one process with two devices run the same partitioned program; a sum over two
devices has two addends, whose order does not matter. So results are compared bit for bit; over more devices the order
of addition is the backend's own, and results agree to rounding.
"""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file
from tokenizer_folders import write_llada

import a2d_jax
from a2d_jax.distributed import initialize, own_rows, place_rows
from a2d_jax.metrics import read_metrics
from a2d_jax.settings import default_config
from a2d_jax.train import train
from bench.hosts import Job, free_port
from bench.soak_train import final_arrays, kill_at_step, last_step
from odlri_jax.calibrate import CalibrateConfig, run

LLADA = Path(__file__).parent / "fixtures" / "llada_tiny"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An adapter on a tiny LLaDA, its weights split over two devices."""
    base = write_llada(tmp_path_factory.mktemp("base"))
    hf = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(hf | {"d_model": 16, "n_heads": 2, "n_layers": 2}))
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(base)), base)
    rows = [{"prompt": f"Bread number {i}?", "response": f"Mix {i} eggs.", "is_safe": i % 2 == 0} for i in range(12)]
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = default_config()
    config.model.checkpoint = str(base)
    config.data.files = (str(base / "rows.jsonl"),)
    config.data.row_length = 64
    config.data.buckets = (64,)
    config.lora = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ()}
    config.batch_size = 4
    config.num_steps = 1000  # more than any job here gets through
    config.optimizer.learning_rate = 1e-3
    config.checkpoint_every = 2
    config.log_every = 1
    config.mesh.data, config.mesh.fsdp = 1, 2
    return config


@pytest.fixture(scope="module")
def arguments(config, tmp_path_factory):
    """Flags of the training program for a work folder."""
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    return lambda workdir: [f"--config={file}", f"--workdir={workdir}"]


@pytest.mark.slow
def test_a_job_that_is_killed_three_times_and_preempted_ends_with_the_bits_of_an_undisturbed_run(
    config, arguments, tmp_path
):
    """Begun by one process, killed on two (one of them, both, the other one), preempted, finished by one."""
    one_process, workdir, logs = {"devices": jax.devices()[:2]}, tmp_path / "run", tmp_path / "logs"

    def with_steps(num_steps: int):
        return config.to_dict() | {"num_steps": num_steps}

    train(with_steps(2), workdir, **one_process)
    rng = np.random.default_rng()
    for killed in ([0], [0, 1], [1]):
        with Job("a2d_jax.train", arguments(workdir), logs, num_processes=2) as job:
            assert kill_at_step(job, workdir, last_step(workdir) + rng.integers(1, 3), killed), job.output()
    with Job("a2d_jax.train", arguments(workdir), logs, num_processes=2) as job:
        kill_at_step(job, workdir, last_step(workdir) + 1, [])
        job.processes[1].terminate()  # one hears of it, both stop after the same step
        assert job.wait(120) == [0, 0], job.output()
    first, second = job.output()
    assert first.count("continuing after step") == 4 and "stopped by SIGTERM" in first
    assert not re.search("^(model|step|trained) ", second, re.MULTILINE)  # process 0 alone speaks
    (saved,) = [int(folder.name) for folder in (workdir / "checkpoints").iterdir()]
    assert saved == last_step(workdir)

    train(with_steps(saved + 2), workdir, **one_process)
    train(with_steps(saved + 2), tmp_path / "straight", **one_process)
    ours, expected = final_arrays(workdir, saved + 2), final_arrays(tmp_path / "straight", saved + 2)
    assert len(expected) > 10 and ours == expected
    ours, expected = (read_metrics(folder / "metrics.jsonl") for folder in (workdir, tmp_path / "straight"))
    assert [line["step"] for line in ours] == list(range(1, saved + 3))
    assert [line["loss"] for line in ours] == [line["loss"] for line in expected]


@pytest.mark.slow
def test_four_processes_train_as_one_does_and_two_on_other_devices_continue(config, arguments, tmp_path):
    """Begun on four hosts of one device, all killed, continued on two hosts of one device: the run of one device."""
    workdir, logs = tmp_path / "run", tmp_path / "logs"
    with Job("a2d_jax.train", [*arguments(workdir), "--config.mesh.fsdp=4"], logs, num_processes=4) as job:
        assert kill_at_step(job, workdir, 5, range(4)), job.output()
    flags = [*arguments(workdir), "--config.mesh.fsdp=2", "--config.num_steps=8"]
    with Job("a2d_jax.train", flags, logs, num_processes=2) as job:
        assert job.wait(120) == [0, 0], job.output()
    assert re.search("continuing after step [46]", job.output()[0])

    straight = tmp_path / "straight"
    alone = config.to_dict() | {"num_steps": 8, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}}
    train(alone, straight, devices=jax.devices()[:1])
    ours, expected = (read_metrics(folder / "metrics.jsonl") for folder in (workdir, straight))
    assert [line["step"] for line in ours] == list(range(1, 9))
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in expected], rtol=1e-4)
    ours, expected = final_arrays(workdir, 8), final_arrays(straight, 8)
    assert ours.keys() == expected.keys()
    for name, content in expected.items():
        if name.startswith("params"):
            weights, alone = np.frombuffer(ours[name], np.float32), np.frombuffer(content, np.float32)
            np.testing.assert_allclose(weights, alone, atol=1e-4)


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_calibration_on_several_processes_gives_the_numbers_of_one(tmp_path, num_processes):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 240, (7, 16)).astype(np.int32))
    settings = {"checkpoint": str(LLADA), "tokens": str(tmp_path / "tokens.npy"), "head": True, "layers_per_group": 1}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += [f"--out={tmp_path / 'several'}", f"--mesh=1,{num_processes},1"]
    with Job("odlri_jax.calibrate", flags, tmp_path / "logs", num_processes) as job:
        run(CalibrateConfig(out=str(tmp_path / "one"), **settings))
        assert job.wait(120) == [0] * num_processes, job.output()
    assert "calibrated 2 layers and the head" in job.output()[0] and "calibrated" not in job.output()[1]
    one, several = (tmp_path / folder for folder in ("one", "several"))
    assert (one / "calibration.json").read_bytes() == (several / "calibration.json").read_bytes()
    for layer in ("layer_000", "layer_001", "head"):
        ours, expected = (load_file(folder / f"{layer}.safetensors") for folder in (several, one))
        assert ours.keys() == expected.keys()
        for name, h in expected.items():  # products of a part of the windows each: rounded at another place
            assert np.linalg.norm(ours[name] - h) <= 1e-6 * np.linalg.norm(h)


def test_a_job_that_does_not_meet_says_where_and_how_long_it_waited(arguments, tmp_path):
    flags = [*arguments(tmp_path / "run"), "--num_processes=2", "--connect_seconds=2"]
    for process_id, message in ((0, "not all processes came"), (1, "no coordinator answered")):
        address = f"127.0.0.1:{free_port()}"
        identity = [f"--coordinator={address}", f"--process_id={process_id}"]
        with Job("a2d_jax.train", flags + identity, tmp_path / f"logs{process_id}") as job:
            assert job.wait(60) == [1]
        assert f"{message} to {address} within 2 s (this is process {process_id} of 2)" in job.output()[0]
        assert "Check failure" not in job.output()[0]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (("10.0.0.2:8476", 2, 2), "process_id=2 of --num_processes=2; ids go from 0"),
        (("10.0.0.2", 2, 0), "'10.0.0.2' has no port; give HOST:PORT"),
    ],
)
def test_an_identity_that_cannot_be_is_refused(identity, message):
    with pytest.raises(ValueError, match=message):
        initialize(*identity)


class Split:
    """A sharding as one process of several sees it: rows 2, 3 and 8, 9 of 10, the second part on two devices."""

    def addressable_devices_indices_map(self, shape):
        assert shape == (10,)
        return {"a": (slice(8, 10),), "b": (slice(2, 4),), "c": (slice(8, 10),)}


def test_a_host_builds_the_rows_that_its_devices_hold_in_whatever_order_these_are():
    np.testing.assert_array_equal(own_rows(Split(), 10), [2, 3, 8, 9])
    mesh = a2d_jax.make_mesh(data=2, fsdp=2, tensor=2)
    everything = np.arange(24).reshape(8, 3)
    for axes in (("data", "fsdp"), None):  # None: every device holds every row
        sharding = NamedSharding(mesh, PartitionSpec(axes))
        rows = own_rows(sharding, 8)
        placed = place_rows(sharding, rows, 8, everything[rows])
        np.testing.assert_array_equal(placed, everything)
        assert placed.sharding == sharding
