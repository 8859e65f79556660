"""Packed checkpoints as models: the function of the dense weights wherever they are read, trained and exported."""

import dataclasses
import json
import shutil
import tomllib
from configparser import ConfigParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import packed_reader
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from packed_folders import LLAMA, random_arrays, write_packed
from tokenizer_folders import write_llada

import a2d_jax
from a2d_jax.export import export as export_dense
from a2d_jax.folders import FORMATS_GROUP
from a2d_jax.metrics import read_metrics
from a2d_jax.pretrained import weights_fingerprint
from a2d_jax.settings import default_config
from a2d_jax.train import train
from odlri_jax import DecomposeConfig
from odlri_jax.export import export
from odlri_jax.linear import CompressedLinear
from odlri_jax.packed_io import save_packed

ROOT = Path(__file__).parents[1]
CONFIG = DecomposeConfig(rank=8, group=16)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A random LLaMA made and written by transformers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source") / "llama"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Its packed form with 16-bit factors, and the tensors that stands for."""
    return write_packed(source, tmp_path_factory.mktemp("packed") / "packed", CONFIG)


@pytest.fixture(scope="module")
def expected(source, packed) -> np.ndarray:
    """Logits of the dense reconstruction under transformers."""
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in packed[1].items()})
    return torch_logits(model)


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def torch_model(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hadamard": False},
        {"lr_bits": 4, "hadamard": False},  # factors rotated, Q not
        {"lr_bits": 3, "q_bits": 4, "published": True},
        {"q_codebook": "normal_float", "q_bits": 3, "lr_bits": 2},
    ],
    ids=str,
)
def test_the_layer_is_the_dense_product_in_every_basis(settings):
    config, (m, n) = dataclasses.replace(CONFIG, **settings), (24, 48)
    arrays = random_arrays((m, n), config)
    w = packed_reader.dense(arrays, dataclasses.asdict(config)).astype(np.float32)
    linear = CompressedLinear((m, n), config, axes=("embed", "heads"), dtypes=a2d_jax.DTypes(), has_bias=True)
    for suffix, array in arrays.items():
        variable = getattr(linear, suffix)
        variable[...] = jnp.asarray(array, variable.dtype)
    linear.bias[...] = jnp.arange(m, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    x, g = jnp.asarray(rng.standard_normal((5, n)), jnp.float32), jnp.asarray(rng.standard_normal((5, m)), jnp.float32)
    y, pull = jax.vjp(jax.jit(linear), x)
    np.testing.assert_allclose(y, x @ w.T + np.arange(m), atol=2e-5)
    np.testing.assert_allclose(pull(g)[0], g @ w, atol=2e-5)


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_packed_folder_gives_the_logits_of_its_dense_reconstruction(packed, expected):
    model = a2d_jax.load_pretrained(packed[0])
    assert isinstance(model.blocks.q_proj, CompressedLinear) and not hasattr(model.blocks.q_proj, "kernel")
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
    assert np.abs(expected).max() > 1
    half = a2d_jax.load_pretrained(packed[0], dtype=jnp.bfloat16)
    assert half.blocks.q_proj.q_index.dtype == jnp.uint16 and half.blocks.q_proj.q_scale.dtype == jnp.float32
    np.testing.assert_allclose(half(TOKENS), expected, atol=0.1)


def test_on_eight_devices_rows_are_split_as_their_output_is(packed, expected):
    model = a2d_jax.load_pretrained(packed[0], mesh=a2d_jax.make_mesh(data=1, fsdp=4, tensor=2))
    q_proj, down_proj = model.blocks.q_proj, model.blocks.down_proj
    shards = lambda variable: variable[...].sharding.shard_shape(variable.shape)
    assert shards(q_proj.q_index) == (2, 16, 1)  # layers, heads / tensor, (D / 8) / fsdp
    assert shards(q_proj.left) == (2, 16, 8)
    assert shards(q_proj.right) == (2, 8, 8)
    assert shards(down_proj.q_index) == (2, 8, 3)  # layers, D / fsdp, (F / 8) / tensor
    assert shards(model.lm_head.q_index) == (8, 4)  # V / (tensor fsdp), D / 8
    np.testing.assert_allclose(np.asarray(model(TOKENS)), expected, atol=1e-4)


def test_saving_an_unchanged_model_gives_the_same_files(packed, tmp_path):
    for _ in range(2):  # the second time over a packed folder
        save_packed(a2d_jax.load_pretrained(packed[0]), tmp_path)
    for file in ("layers.safetensors", "dense.safetensors", "odlri.json", "config.json"):
        assert (tmp_path / file).read_bytes() == (packed[0] / file).read_bytes(), file
    a2d_jax.load_pretrained(tmp_path)


def test_entry_points_are_found_without_an_installation():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = ConfigParser()
    found.read(ROOT / "a2d_odlri_jax.dist-info" / "entry_points.txt")
    assert dict(found[FORMATS_GROUP]) == declared["entry-points"][FORMATS_GROUP]
    metadata = (ROOT / "a2d_odlri_jax.dist-info" / "METADATA").read_text()
    assert f"Name: {declared['name']}\nVersion: {declared['version']}\n" in metadata


# -- exports ----------------------------------------------------------------------------------------------------------


def test_the_dense_export_is_what_transformers_computes_with(packed, expected, tmp_path):
    export(str(packed[0]), tmp_path / "dense", "dense")
    np.testing.assert_allclose(torch_logits(torch_model(tmp_path / "dense")), expected, atol=1e-5)
    written = safetensors.numpy.load_file(tmp_path / "dense" / "model.safetensors")
    described = packed_reader.read_folder(packed[0])  # by a reader made from the format's description
    assert written.keys() == described.keys()
    for name, tensor in described.items():
        np.testing.assert_allclose(written[name], tensor, atol=1e-6, err_msg=name)
    assert not (tmp_path / "dense" / "odlri.json").exists()
    export(str(packed[0]), tmp_path / "half", "dense", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    np.testing.assert_allclose(torch_logits(torch_model(tmp_path / "half")), expected, atol=0.1)


def test_the_adapter_export_is_what_peft_computes_with(packed, expected, tmp_path):
    export(str(packed[0]), tmp_path, "adapter")
    base = torch_model(tmp_path)
    assert np.abs(torch_logits(base) - expected).max() > 0.1  # Q alone
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(model), expected, atol=1e-4)
    ours = a2d_jax.load_pretrained(tmp_path, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(ours(TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_the_report_of_a_compression_stays_behind(copy, tmp_path, layout):
    """The factors that it describes are those of before training and rounding."""
    for name in ("report.json", "report.png", "tokenizer.json"):
        (copy / name).write_text("{}")
    export(str(copy), tmp_path / "target", layout)
    written = {path.name for path in (tmp_path / "target").iterdir()}
    assert "tokenizer.json" in written and not written & {"report.json", "report.png"}


def test_where_config_json_is_the_adapter_and_the_tokenizer_are(copy, tmp_path, monkeypatch):
    (copy / "tokenizer.json").write_text("{}")

    def stop(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr("odlri_jax.export.save_dense", stop)  # which writes config.json
    with pytest.raises(RuntimeError, match="killed"):
        export(str(copy), tmp_path / "target", "adapter")
    written = {path.name for path in (tmp_path / "target").rglob("*.json")}
    assert {"adapter_config.json", "tokenizer.json"} <= written and "config.json" not in written


def test_quantised_factors_become_trainable_ones(source, tmp_path):
    config = dataclasses.replace(CONFIG, lr_bits=4, hadamard=False)
    folder, _ = write_packed(source, tmp_path / "packed", config, ("blocks.down_proj",))
    export(str(folder), tmp_path / "float", "packed", lr_bits=16)
    before, after = a2d_jax.load_pretrained(folder), a2d_jax.load_pretrained(tmp_path / "float")
    assert not nnx.state(before, nnx.LoRAParam) and nnx.state(after, nnx.LoRAParam)
    np.testing.assert_allclose(after(TOKENS), before(TOKENS), atol=5e-3)  # the factors are rounded to float16


def test_what_a_packed_model_cannot_do_is_said(packed, source, tmp_path):
    model = a2d_jax.load_pretrained(packed[0])
    with pytest.raises(ValueError, match="blocks.q_proj, blocks.down_proj, lm_head are compressed.*odlri_jax.export"):
        a2d_jax.save_pretrained(model, tmp_path / "dense")
    with pytest.raises(ValueError, match="blocks.q_proj is compressed and takes no adapter"):
        a2d_jax.add_lora(model, a2d_jax.LoRAConfig(), nnx.Rngs(0))
    with pytest.raises(ValueError, match="holds no packed projection"):
        export(str(source), tmp_path / "x", "dense")
    with pytest.raises(ValueError, match="--target is the checkpoint itself"):
        export(str(packed[0]), packed[0], "packed")
    run = tmp_path / "run"
    run.mkdir()
    (run / "train_config.json").write_text(json.dumps({"model": {"checkpoint": str(packed[0])}}))
    with pytest.raises(ValueError, match="--target is the checkpoint itself or its base"):
        export(str(run), packed[0], "packed")


def test_the_export_of_dense_models_leaves_nothing_in_the_way_of_the_right_one(packed, tmp_path):
    with pytest.raises(ValueError, match="are compressed.*odlri_jax.export"):
        export_dense(packed[0], tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    export(str(packed[0]), tmp_path / "dense", "dense")


def test_evaluations_know_a_compressed_head_from_another(packed):
    """Its scales are scalars, and every evaluation and calibration begins with the fingerprint of the weights."""
    model = a2d_jax.load_pretrained(packed[0])
    before = weights_fingerprint(model)
    model.lm_head.q_scale[...] = 2 * model.lm_head.q_scale[...]
    assert before == weights_fingerprint(a2d_jax.load_pretrained(packed[0])) != weights_fingerprint(model)


# -- damaged folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return shutil.copytree(packed[0], tmp_path / "copy")


def change_manifest(folder: Path, **changes) -> None:
    content = json.loads((folder / "odlri.json").read_text())
    (folder / "odlri.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "is of version 2; this code reads up to 1"),
        ({"format": "other"}, "has format='other'"),
        ({"settings": {"rank": 8, "new_thing": 1}}, r"settings \['new_thing'\]"),
        ({"settings": {"rank": 8, "q_bits": 7}}, "codebook e8p has 2, 3 or 4 bits"),
        ({"projections": ["blocks.z_proj"]}, r"projections \['blocks.z_proj'\]; the model has"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, changes, message):
    change_manifest(copy, **changes)
    with pytest.raises(ValueError, match=message):
        a2d_jax.load_pretrained(copy)


def test_a_truncated_file_is_named(copy):
    content = (copy / "layers.safetensors").read_bytes()
    (copy / "layers.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="layers.safetensors cannot be read.*truncated"):
        a2d_jax.load_pretrained(copy)


def rewrite(folder: Path, change) -> None:
    """Changes the packed tensors of a folder; the index goes, one file holds all."""
    tensors = {}
    for file in ("layers.safetensors", "dense.safetensors"):
        tensors |= safetensors.numpy.load_file(folder / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


def test_tensors_that_do_not_fit_are_listed_together(copy):
    module = "model.layers.1.self_attn.q_proj"

    def damage(tensors):
        del tensors[f"{module}.signs_in"]
        tensors[f"{module}.weight"] = np.zeros((32, 32), np.float32)
        tensors[f"{module}.left"] = np.zeros((32, 4), np.float16)

    rewrite(copy, damage)
    with pytest.raises(ValueError) as error:
        a2d_jax.load_pretrained(copy)
    for problem in ("missing: {}.signs_in (4,)", "extra: {}.weight (32, 32)", "misshapen: {}.left is (32, 4)"):
        assert problem.format(module) in str(error.value)


def test_an_index_out_of_the_codebook_is_named(copy):
    name = "model.layers.1.self_attn.q_proj.q_index"

    def damage(tensors):
        tensors[name] = tensors[name].astype(np.int32)
        tensors[name][3, 1] = 1 << 16

    rewrite(copy, damage)
    with pytest.raises(ValueError, match=f"{name} holds the index 65536, out of the codebook's 0 to 65535"):
        a2d_jax.load_pretrained(copy)


# -- training ---------------------------------------------------------------------------------------------------------


ROWS = [{"prompt": f"Is {i} even?", "response": "Yes." if i % 2 == 0 else "No.", "is_safe": True} for i in range(16)]


@pytest.fixture(scope="module")
def llada(tmp_path_factory) -> Path:
    """A tiny LLaDA folder with a tokenizer, random weights, and rows to train on."""
    folder = write_llada(tmp_path_factory.mktemp("llada"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"d_model": 16, "n_heads": 2, "n_layers": 2, "weight_tying": False})
    )
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(folder)), folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def packed_llada(llada, tmp_path_factory) -> Path:
    return write_packed(llada, tmp_path_factory.mktemp("packed") / "llada", CONFIG)[0]


def train_config(base: Path, num_steps: int):
    config = default_config()
    config.model.checkpoint = str(base)
    config.data.files = (str(base / "rows.jsonl"),)
    config.data.row_length = 64
    config.data.buckets = (64,)
    config.batch_size = 16
    config.num_steps = num_steps
    config.optimizer.learning_rate = 3e-2
    config.checkpoint_every = 8
    config.log_every = 8
    config.mesh.data = 1
    return config


def arrays_of(model) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}


def test_training_changes_the_factors_alone_and_resumes(packed_llada, tmp_path):
    shutil.copyfile(packed_llada / "rows.jsonl", tmp_path / "rows.jsonl")
    for workdir, lengths in (("straight", (16,)), ("stopped", (8, 16))):
        for num_steps in lengths:
            train(train_config(packed_llada, num_steps), tmp_path / workdir, devices=jax.devices()[:1])
    losses = [line["loss"] for line in read_metrics(tmp_path / "straight" / "metrics.jsonl")]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2

    base = arrays_of(a2d_jax.load_pretrained(packed_llada))
    straight, resumed = (a2d_jax.load_pretrained(tmp_path / name) for name in ("straight", "stopped"))
    trained = arrays_of(straight)
    changed = {name for name in base if not np.array_equal(base[name], trained[name])}
    assert {name.split("'")[-2] for name in changed} == {"left", "right"} and len(changed) == 6
    assert all(trained[name].dtype == np.float32 for name in changed)
    again = arrays_of(resumed)
    assert all(np.array_equal(trained[name], again[name]) for name in trained)

    tokens = TOKENS[:, :8]
    export(str(tmp_path / "straight"), tmp_path / "packed", "packed")
    exported = a2d_jax.load_pretrained(tmp_path / "packed")
    np.testing.assert_allclose(exported(tokens), straight(tokens), atol=2e-2)  # the factors are float16 again
    assert (tmp_path / "packed" / "tokenizer.json").exists()
    export(str(tmp_path / "straight"), tmp_path / "dense", "dense")
    np.testing.assert_allclose(a2d_jax.load_pretrained(tmp_path / "dense")(tokens), straight(tokens), atol=1e-4)

    sampler = a2d_jax.SamplerConfig(gen_length=8, steps=4, block_length=8)
    result = a2d_jax.generate(exported, [np.arange(5)], sampler)
    assert result.tokens.shape == (1, 13)


def test_quantised_factors_are_not_trained_in_place(llada, tmp_path):
    config = dataclasses.replace(CONFIG, lr_bits=4)
    folder, _ = write_packed(llada, tmp_path / "packed", config, ("blocks.up_proj",))
    with pytest.raises(ValueError, match="factors are quantised.*--lr_bits 16"):
        train(train_config(folder, 1), tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()
