"""Whole-model compression: files and report, resumption after kills, independence of grouping and devices, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import a2d_jax
from a2d_jax.config import ModelConfig
from a2d_jax.models.transformer import Transformer
from a2d_jax.orbax_io import convert_folder
from a2d_jax.safetensors_io import SafetensorsFolder
from odlri_jax import compress
from odlri_jax.compress import CompressConfig
from odlri_jax.decompose import decompose_stack
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.matrices import Matrix, default_rank, list_matrices
from odlri_jax.packed_tensors import matrix_bits
from odlri_jax.packing import unpack

ROOT = Path(__file__).parents[1]
NUM_LAYERS, D, F, V = 3, 32, 32, 32  # all of one shape, and uniform levels: quick to compile
SETTINGS = DecomposeConfig(
    rank=8, num_outliers=4, init="odlri", q_codebook="uniform", group=16, outer_iters=2, inner_iters=1, tune_iters=1
)
SHAPES = {
    "self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D), "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    hf = {
        "model_type": "llama", "hidden_size": D, "num_attention_heads": 4, "vocab_size": V,
        "num_hidden_layers": NUM_LAYERS, "intermediate_size": F, "eos_token_id": 0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    model = Transformer(ModelConfig.from_hf(hf), rngs=nnx.Rngs(0))
    a2d_jax.save_pretrained(model, folder, max_shard_bytes=20_000)  # several files and an index
    (folder / "tokenizer.json").write_text('{"stand": "in"}')
    return folder


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    """Second moments of random inputs with a few strong channels, in the format of odlri_jax.calibrate."""
    folder, rng = tmp_path_factory.mktemp("calibration"), np.random.default_rng(0)

    def moment(n: int) -> np.ndarray:
        x = rng.standard_normal((n, 200)) * np.where(np.arange(n) % 11 == 3, 6, 1)[:, None]
        return (x @ x.T / 200).astype(np.float32)

    for layer in range(NUM_LAYERS):
        save_file({name: moment(n) for name, n in zip(("attn", "o", "mlp", "down"), (D, D, D, F), strict=True)},
                  folder / f"layer_{layer:03d}.safetensors")  # fmt: skip
    save_file({"head": moment(D)}, folder / "head.safetensors")
    record = {"format": "odlri-calibration", "version": 1, "num_tokens": 200, "context_length": 20, "num_layers": 3}
    (folder / "calibration.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def config(checkpoint, calibration, tmp_path) -> CompressConfig:
    """Two devices, one layer a file: three files, and the same programs in every test."""
    return CompressConfig(
        str(checkpoint), str(calibration), str(tmp_path / "out"), SETTINGS, layers_per_group=1, num_devices=2
    )


@pytest.fixture(scope="module")
def finished(checkpoint, calibration, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    compress.run(
        CompressConfig(str(checkpoint), str(calibration), str(out), SETTINGS, layers_per_group=1, num_devices=2)
    )
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the folder; of the report, all but the times."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(files["report.json"])
    for part in (report["summary"], *report["matrices"]):
        del part["seconds"]
    return files | {"report.json": json.dumps(report).encode()}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def test_files(finished, checkpoint):
    groups = [f"layers-{i:03d}-{i:03d}.safetensors" for i in range(NUM_LAYERS)]
    others = ["config.json", "dense.safetensors", "model.safetensors.index.json", "odlri.json", "report.json"]
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        groups + others + ["report.png", "tokenizer.json"]
    )
    source, dense = SafetensorsFolder(checkpoint), load_file(finished / "dense.safetensors")
    kept = [name for name in source.shapes if "_proj" not in name]
    assert sorted(dense) == sorted(kept)
    for name in kept:
        stored = source.read(name)
        assert dense[name].dtype == stored.dtype and dense[name].tobytes() == stored.tobytes()
    index = json.loads((finished / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in finished.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors(finished).values())


@pytest.mark.default_compiler
def test_matrix_is_what_decompose_gives(finished, checkpoint, calibration):
    """The folder holds, bit for bit, the decomposition of the matrix taken by itself on one device."""
    name = "model.layers.1.mlp.down_proj"
    w = SafetensorsFolder(checkpoint).read(f"{name}.weight").astype(np.float32)
    h = load_file(calibration / "layer_001.safetensors")["down"]
    matrix = Matrix(name, "down_proj", 1, (D, F))
    stack = decompose_stack(w[None], h[None], SETTINGS, matrix.key(0)[None])
    expected = jax.tree.map(lambda x: x[0], stack)
    arrays = load_file(finished / "layers-001-001.safetensors")
    packed = {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(name)}
    stored = unpack(packed, SETTINGS, (D, F)).dense()
    difference = np.asarray(w - stored)
    error = np.sqrt(np.sum(difference @ h * difference) / np.sum(w @ h * w))
    record = next(r for r in json.loads((finished / "report.json").read_text())["matrices"] if r["name"] == name)
    assert record["error"] == float(expected.error)
    assert error == pytest.approx(record["error"], rel=0.05)  # the report's H is damped
    assert np.array_equal(stored, expected.dense())


def test_report(finished):
    report = json.loads((finished / "report.json").read_text())
    assert [record["name"] for record in report["matrices"]] == [
        f"model.layers.{layer}.{name}" for layer in range(NUM_LAYERS) for name in SHAPES
    ]
    for record in report["matrices"]:
        shape = SHAPES[record["name"].split(".", 3)[3]]
        assert record["shape"] == list(shape) and record["rank"] == 8
        assert (record["init"], record["num_outliers"]) == ("odlri", 4)
        assert len(record["errors"]) == len(record["q_scales"]) == len(record["errors_after_q"]) == 2
        assert record["error"] == pytest.approx(min(record["errors"] + record["errors_after_q"][1:]), rel=1e-5)
        assert 0 < record["q_role"] < 1.5 and 0 < record["lr_role"] < 1.5 and record["seconds"] > 0
        assert record["bits_per_weight"] == matrix_bits(shape, SETTINGS)
    assert report["settings"]["rank"] == 8 and report["settings"]["seed"] == 0
    packed = [array for file in finished.glob("layers-*") for array in load_file(file).values()]
    num_weights = sum(m * n for m, n in SHAPES.values()) * NUM_LAYERS
    bits = 8 * sum(array.nbytes for array in packed) / num_weights
    assert report["summary"]["bits_per_weight"] == pytest.approx(bits)
    num_file_bits = 8 * sum(file.stat().st_size for file in finished.glob("layers-*"))
    assert report["summary"]["file_bits_per_weight"] * num_weights == pytest.approx(num_file_bits)
    assert num_file_bits > bits * num_weights  # the names of the tensors are counted too
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.default_compiler
def test_grouping_and_devices_change_nothing(finished, config):
    other = CompressConfig(config.checkpoint, config.calibration, config.out, SETTINGS, layers_per_group=2)
    compress.run(other)
    assert sorted(path.name for path in Path(config.out).glob("layers-*")) == [
        "layers-000-001.safetensors", "layers-002-002.safetensors"
    ]  # fmt: skip
    before, now = tensors(finished), tensors(Path(config.out))
    assert before.keys() == now.keys()
    for name in before:
        assert before[name].tobytes() == now[name].tobytes(), name


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["matrix_record", "write_json", "write_arrays", "write_dense", "write_manifest"])
def test_stopped_at_a_step_it_resumes_to_the_same_files(finished, config, monkeypatch, step):
    """The run stops in the second call of a step (the first, where there is one only), then goes on."""
    original, calls = getattr(compress, step), []

    def stop(*args, **keys):
        calls.append(step)
        if len(calls) == (1 if step in ("write_dense", "write_manifest") else 2):
            raise Killed
        return original(*args, **keys)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compress, step, stop)
        compress.run(config)
    assert not (Path(config.out) / "odlri.json").exists()
    compress.run(config)
    assert contents(Path(config.out)) == contents(finished)


def test_finished_groups_are_kept(config, monkeypatch):
    compress.run(config)
    monkeypatch.setattr(compress, "decompose_matrices", None)  # nothing is decomposed again
    report = compress.run(config)
    assert report["summary"]["num_matrices"] == 21


def test_a_converted_folder_is_exported_once(finished, config, checkpoint, tmp_path, monkeypatch):
    """A run stopped within the export, one after it, and one to the end; the files are those of the folder itself."""
    list(convert_folder(checkpoint, tmp_path / "converted"))
    config, copy = replaced(config, checkpoint=str(tmp_path / "converted")), Path(config.out) / "unfinished" / "dense"

    def export_some(_, target):
        target.mkdir(parents=True)
        (target / "model.safetensors").write_bytes(b"half")
        raise Killed

    def stop(*_):
        raise Killed

    for name, function in (("export_dense", export_some), ("compress_group", stop), ("export_dense", None)):
        with monkeypatch.context() as patch:
            patch.setattr(compress, name, function)
            if function is None:
                compress.run(config)
                continue
            with pytest.raises(Killed):
                compress.run(config)
        assert (copy / "config.json").is_file() == (function is stop)
    ours, theirs = contents(Path(config.out)), contents(finished)
    settings = json.loads(ours.pop("report.json"))["settings"]
    assert settings["checkpoint"] == config.checkpoint
    assert settings["stored_weights"] == json.loads(theirs.pop("report.json"))["settings"]["stored_weights"]
    assert ours == theirs


def test_a_checkpoint_that_changed_meanwhile_is_refused(config, checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    config = replaced(config, checkpoint=str(folder))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compress, "compress_group", lambda *_: (_ for _ in ()).throw(Killed))
        compress.run(config)
    name = "model.layers.1.mlp.up_proj.weight"
    file = SafetensorsFolder(folder).file_of[name]
    save_file(load_file(file) | {name: 2 * load_file(file)[name]}, file)
    with pytest.raises(ValueError, match="begun with other settings .stored_weights: "):
        compress.run(config)


def command(config: CompressConfig) -> list[str]:
    flags = [f"--{name}={value}" for name, value in vars(SETTINGS).items() if not isinstance(value, bool)]
    flags += [f"--{name}={getattr(config, name)}" for name in ("checkpoint", "calibration", "out", "num_devices")]
    return [sys.executable, "-m", "odlri_jax.compress", *flags, "--layers_per_group=1"]


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_files(finished, config):
    """SIGKILL once the first file is there, and once the second is; the third start ends it."""
    out = Path(config.out)
    for num_files in (1, 2):
        process = subprocess.Popen(command(config), cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ.copy())
        while len(list(out.glob("layers-*.safetensors"))) < num_files and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "odlri.json").exists()
    done = subprocess.run(command(config), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("compressed 21 matrices to ")
    assert contents(out) == contents(finished)


def test_head(config):
    report = compress.run(CompressConfig(**{**vars(config), "head": True}))
    assert report["matrices"][-1]["name"] == "lm_head" and report["matrices"][-1]["shape"] == [V, D]
    out = Path(config.out)
    assert "lm_head.q_index" in load_file(out / "head.safetensors")
    assert "lm_head.weight" not in load_file(out / "dense.safetensors")
    assert json.loads((out / "odlri.json").read_text())["projections"][-1] == "lm_head"


def replaced(config: CompressConfig, decompose_settings: dict | None = None, **changes) -> CompressConfig:
    settings = DecomposeConfig(**{**vars(SETTINGS), **(decompose_settings or {})})
    return CompressConfig(**{**vars(config), "decompose": settings, **changes})


def test_a_head_that_was_not_calibrated_is_refused_before_anything_is_written(config, calibration, tmp_path):
    headless = tmp_path / "headless"
    shutil.copytree(calibration, headless, ignore=shutil.ignore_patterns("head.safetensors"))
    with pytest.raises(ValueError, match="headless holds no H of the head; calibrate with --head"):
        compress.run(replaced(config, head=True, calibration=str(headless)))
    assert not Path(config.out).exists()


def test_other_settings_are_refused(finished, config, monkeypatch):
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 then, 1 now; rank: 8 then, 16 now\)"):
        compress.run(replaced(config, {"rank": 16}, seed=1, out=str(finished)))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compress, "write_dense", lambda *_: (_ for _ in ()).throw(Killed))
        compress.run(config)
    with pytest.raises(ValueError, match=r"other settings \(tune_iters: 1 then, 3 now\)"):
        compress.run(replaced(config, {"tune_iters": 3}))


def test_rank_above_a_matrix_names_it(config):
    with pytest.raises(ValueError, match=r"rank=40 .* = 32 of model.layers.0.self_attn.q_proj \(32, 32\)"):
        compress.run(replaced(config, {"rank": 40}))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("shapes", "rank"), [([(64, 128)], 64), ([(128, 128), (48, 128)], 24), ([(128, 56)], 24), ([(8, 8)], 1)]
)
def test_without_a_rank_the_smallest_matrix_allows_it(shapes, rank):
    matrices = [Matrix(f"{i}", "q_proj", i, shape) for i, shape in enumerate(shapes)]
    assert default_rank(matrices) == rank


def test_broken_moment_names_its_matrix(config, calibration, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in calibration.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    moments = load_file(broken / "layer_000.safetensors")
    moments["o"] = -moments["o"]
    save_file(moments, broken / "layer_000.safetensors")
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.o_proj: H \(32, 32\) is indefinite"):
        compress.run(replaced(config, calibration=str(broken)))


def test_wrong_folders_are_refused(config, checkpoint, finished, tmp_path):
    with pytest.raises(ValueError, match="packed already"):
        compress.run(replaced(config, checkpoint=str(finished)))
    with pytest.raises(ValueError, match="--out is the checkpoint itself"):
        compress.run(replaced(config, out=str(checkpoint)))
    with pytest.raises(ValueError, match="no calibration folder"):
        compress.run(replaced(config, calibration=str(tmp_path / "nowhere")))
    shutil.copytree(finished, tmp_path / "trained" / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="packed already"):
        compress.run(replaced(config, checkpoint=str(tmp_path / "trained")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="files of unknown origin"):
        compress.run(replaced(config, out=str(tmp_path)))


def test_tied_head_is_refused():
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "hidden_size": D,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "vocab_size": V,
            "intermediate_size": F,
            "tie_word_embeddings": True,
        }  # fmt: skip
    )
    with pytest.raises(ValueError, match="head is its embedding"):
        list_matrices(config, has_head=True)


def test_more_devices_than_there_are(config):
    with pytest.raises(ValueError, match=f"there are {len(jax.local_devices())}"):
        compress.run(replaced(config, num_devices=1000))
