"""Folders in and out: byte-equal round trips, adapters in PEFT's layout, Orbax, and the errors of damaged folders."""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

import a2d_jax
from a2d_jax.export import export
from a2d_jax.folders import FORMATS_GROUP, hf_folder
from a2d_jax.hf_io import split_into_shards
from a2d_jax.models.lora import LoRAConfig, add_lora
from a2d_jax.models.naming import module_names, projections
from a2d_jax.orbax_io import convert_folder
from a2d_jax.peft_io import read_peft_config
from a2d_jax.safetensors_io import SafetensorsFolder, write_safetensors

FIXTURES = Path(__file__).parent / "fixtures"
ATOL = 1e-4
QWEN2 = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


def same_files(ours: Path, theirs: Path) -> None:
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for path in theirs.iterdir():
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture
def llada(tmp_path):
    """A copy of the LLaDA fixture that a test may damage."""
    shutil.copytree(FIXTURES / "llada_tiny", tmp_path / "llada")
    for recorded in (tmp_path / "llada").glob("*.npz"):
        recorded.unlink()
    return tmp_path / "llada"


@pytest.mark.parametrize(
    ("folder", "line_end"),
    [("llada_tiny", b"\n"), ("llada_tiny_sharded", b"\n"), ("dream_tiny", b"\n"), ("dream_tiny", b"\r\n")],
)
def test_a_folder_comes_back_byte_for_byte(folder, line_end, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / folder, source, ignore=shutil.ignore_patterns("*.npz", "generation_config.json"))
    config = source / "config.json"
    config.write_bytes(config.read_bytes().replace(b"\n", line_end))
    a2d_jax.save_pretrained(a2d_jax.load_pretrained(source), tmp_path / "back")
    same_files(tmp_path / "back", source)


@pytest.mark.parametrize(
    ("dtype", "named", "is_converted"),
    [
        ("bfloat16", {"torch_dtype": "bfloat16"}, False),
        ("bfloat16", {}, False),
        ("float16", {"dtype": None}, False),
        ("bfloat16", {}, True),
    ],
)
def test_16_bit_weights_come_back_byte_for_byte_through_float32(llada, tmp_path, dtype, named, is_converted):
    """Also where config.json names no format."""
    tensors = safetensors.numpy.load_file(llada / "model.safetensors")
    tensors = {name: tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, llada / "model.safetensors", {"format": "pt"})
    config = json.loads((llada / "config.json").read_text()) | named
    (llada / "config.json").write_text(json.dumps(config))
    if is_converted:
        list(convert_folder(llada, tmp_path / "orbax"))
    model = a2d_jax.load_pretrained(tmp_path / "orbax" if is_converted else llada, dtype=jnp.float32)
    a2d_jax.save_pretrained(model, tmp_path / "back")
    same_files(tmp_path / "back", llada)


@pytest.mark.parametrize("is_converted", [False, True])
def test_all_that_an_index_says_comes_back(tmp_path, is_converted):
    """transformers 5 counts the parameters there, beside the bytes."""
    source = shutil.copytree(FIXTURES / "llada_tiny_sharded", tmp_path / "source")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    size = index["metadata"]
    path.write_text(json.dumps(index | {"metadata": {"total_parameters": 129344} | size}, indent=2) + "\n")
    if is_converted:
        list(convert_folder(source, tmp_path / "orbax"))
    model = a2d_jax.load_pretrained(tmp_path / "orbax" if is_converted else source)
    a2d_jax.save_pretrained(model, tmp_path / "back")
    same_files(tmp_path / "back", source)
    a2d_jax.save_pretrained(model, tmp_path / "split", max_shard_bytes=100_000)
    assert json.loads((tmp_path / "split" / path.name).read_text())["metadata"] == size


def test_orbax_keeps_every_byte_and_stands_alone(tmp_path):
    source = FIXTURES / "llada_tiny_sharded"
    names = [name.hf_name for name in convert_folder(source, tmp_path / "orbax")]
    assert len(names) == len(set(names)) == 21
    assert hf_folder(tmp_path / "orbax") == tmp_path / "orbax" / "hf"
    a2d_jax.save_pretrained(a2d_jax.load_pretrained(tmp_path / "orbax"), tmp_path / "back")
    same_files(tmp_path / "back", source)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        list(convert_folder(source, tmp_path / "orbax"))


def test_a_conversion_that_was_cut_off_is_no_checkpoint_and_can_be_run_again(llada, tmp_path):
    target = tmp_path / "orbax"
    steps = convert_folder(llada, target)
    for _ in range(5):
        next(steps)
    steps.close()
    with pytest.raises(ValueError, match="config.json"):
        a2d_jax.load_pretrained(target)
    assert len(list(convert_folder(llada, target))) == 21
    a2d_jax.load_pretrained(target)


def test_weights_in_a_subfolder_are_read_and_written_there(llada, tmp_path):
    (llada / "sub").mkdir()
    weights = (llada / "model.safetensors").rename(llada / "sub" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(safetensors.numpy.load_file(weights), "sub/a.safetensors")}
    (llada / "model.safetensors.index.json").write_text(json.dumps(index))
    a2d_jax.save_pretrained(a2d_jax.load_pretrained(llada), tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "a.safetensors").read_bytes() == weights.read_bytes()
    assert len(SafetensorsFolder(tmp_path / "back").shapes) == 21


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**QWEN2, tie_word_embeddings=True)
    source, tokens = tmp_path / "tied", np.arange(10)[None]
    transformers.Qwen2ForCausalLM(config).save_pretrained(source)
    expected = a2d_jax.load_pretrained(source)(tokens)

    def store_head(shift: float) -> int:
        tensors = safetensors.numpy.load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(shift)
        safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
        return len(tensors)

    num_tensors = store_head(shift=0)
    np.testing.assert_array_equal(a2d_jax.load_pretrained(source)(tokens), expected)
    assert len(list(convert_folder(source, tmp_path / "orbax"))) == num_tensors - 1
    store_head(shift=1)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        a2d_jax.load_pretrained(source)


def test_an_object_store_is_no_place_for_what_we_write_but_training_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = "gs://bucket/out"
    model = a2d_jax.load_pretrained(FIXTURES / "llada_tiny", adapter=FIXTURES / "llada_lora")
    for write in (
        lambda: list(convert_folder(FIXTURES / "llada_tiny", target)),
        lambda: export(FIXTURES / "llada_tiny", target),
        lambda: a2d_jax.save_adapter(model, target),
        lambda: a2d_jax.save_pretrained(a2d_jax.merge_adapter(model), target),
        lambda: a2d_jax.save_pretrained(model, Path(target)),  # which is gs:/bucket/out
    ):
        with pytest.raises(ValueError, match="gs:/+bucket/out lies in an object store.*write to a local folder"):
            write()
    assert not list(tmp_path.iterdir())


def test_our_writer_makes_the_librarys_bytes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "b.bias": rng.normal(size=3).astype(np.float32), "a": rng.normal(size=(2, 5)).astype(ml_dtypes.bfloat16),
        "é": rng.integers(0, 9, (4,), np.int64), "z": rng.normal(size=(1, 2)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32), "flags": np.array([True, False]), "u": np.arange(5, dtype=np.uint8),
        "words": np.arange(5, dtype=np.uint16), "long": np.arange(5, dtype=np.uint32), "one": np.array(2, np.float32),
    }  # fmt: skip
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "ours", shapes, tensors.__getitem__, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_are_cut_before_they_grow_too_large():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 5}
    assert list(split_into_shards(sizes, 6)) == [["a", "b"], ["c"], ["d", "e"]]


def test_saving_over_a_sharded_folder_leaves_no_stale_weights(tmp_path):
    model = a2d_jax.load_pretrained(FIXTURES / "llada_tiny_sharded")
    a2d_jax.save_pretrained(model, tmp_path)
    a2d_jax.save_pretrained(model, tmp_path, max_shard_bytes=10**9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert len(SafetensorsFolder(tmp_path).shapes) == 21


@pytest.mark.parametrize("name", ["train_config.json", "params", "odlri.json"])
def test_a_folder_that_loads_as_another_checkpoint_is_no_target(name, tmp_path):
    (tmp_path / name).mkdir() if name == "params" else (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="would be loaded instead of what is written; choose another folder"):
        a2d_jax.save_pretrained(a2d_jax.load_pretrained(FIXTURES / "llada_tiny"), tmp_path)
    with pytest.raises(ValueError, match="would be loaded instead of what is written; choose another folder"):
        export(FIXTURES / "dream_tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_config_made_by_hand_is_not_written(tmp_path):
    """It has no config.json to write, and without one nothing can be loaded."""
    model = a2d_jax.load_pretrained(FIXTURES / "llada_tiny")
    model.config = dataclasses.replace(model.config, hf_text="{}")
    with pytest.raises(ValueError, match="no model_type for config.json.*ModelConfig.from_hf"):
        a2d_jax.save_pretrained(model, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_as_it_was(llada, tmp_path):
    a2d_jax.save_pretrained(a2d_jax.load_pretrained(llada), tmp_path / "target")
    limit = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import signal, a2d_jax
model = a2d_jax.load_pretrained({str(llada)!r})
model.final_norm.scale[...] = model.final_norm.scale[...] * 2
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
a2d_jax.save_pretrained(model, {str(tmp_path / "target")!r})
"""
    run = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True)
    assert run.returncode != 0 and "OSError" in run.stderr
    same_files(tmp_path / "target", llada)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_adapter_logits_merge_and_bytes(family, tmp_path):
    recorded = np.load(FIXTURES / f"{family}_lora" / "logits.npz")
    tokens = recorded["input_ids"]
    model = a2d_jax.load_pretrained(FIXTURES / f"{family}_tiny", adapter=FIXTURES / f"{family}_lora")
    np.testing.assert_allclose(model(tokens), recorded["logits_adapter"], atol=ATOL)
    a2d_jax.save_adapter(model, tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (FIXTURES / f"{family}_lora" / name).read_bytes()
    a2d_jax.merge_adapter(model)
    assert model.lora is None
    np.testing.assert_allclose(model(tokens), recorded["logits_merged"], atol=ATOL)


def test_peft_reads_the_adapter_we_write(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**QWEN2)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    model = a2d_jax.load_pretrained(tmp_path / "base")
    tokens = np.arange(10)[None]
    before = np.asarray(model(tokens))
    add_lora(model, LoRAConfig(rank=3, alpha=6), nnx.Rngs(0))
    np.testing.assert_array_equal(model(tokens), before)  # B starts at zero
    for path in ("blocks.q_proj", "blocks.down_proj"):
        b = model.projection(path).lora_b
        b[...] = jax.random.normal(jax.random.key(1), b.shape)
    a2d_jax.save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(tokens), expected, atol=ATOL)
    assert np.abs(expected - before).max() > 0.1
    settings = theirs.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (3, 6, 0.05)


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        ((), ["ff_out", "ff_proj", "k_proj", "q_proj", "up_proj", "v_proj"]),
        (("gate_proj", "down_proj", "lm_head"), ["ff_out", "ff_proj"]),
        # "ff_out" would be the head too.
        (
            ("q_proj", "down_proj"),
            [f"model.transformer.blocks.{i}.{name}" for i in (0, 1) for name in ("ff_out", "q_proj")],
        ),
    ],
)
def test_peft_finds_just_the_modules_that_are_adapted(targets, written, tmp_path):
    model = a2d_jax.load_pretrained(FIXTURES / "llada_tiny")
    add_lora(model, LoRAConfig(rank=2, targets=targets), nnx.Rngs(0))
    a2d_jax.save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == written
    linears = [module for path in projections(model.config) for module in module_names(model.config, path)]
    found = {name for name in linears if any(name == target or name.endswith(f".{target}") for target in written)}
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert found == {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}


def test_peft_opens_an_adapter_of_dream_on_a_class_without_generation(tmp_path):
    """As Dream's own class is since transformers 4.50."""
    model = a2d_jax.load_pretrained(FIXTURES / "dream_tiny")
    add_lora(model, LoRAConfig(rank=2, targets=("q_proj",)), nnx.Rngs(0))
    a2d_jax.save_adapter(model, tmp_path)
    theirs = torch.nn.Module()
    for name in module_names(model.config, "blocks.q_proj"):
        *parents, last = name.split(".")
        parent = theirs
        for part in parents:
            if part not in dict(parent.named_children()):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.Linear(*model.projection("blocks.q_proj").kernel.shape[1:]))
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    for name, parameter in opened.named_parameters():
        if "lora_A" in name:
            np.testing.assert_array_equal(parameter.detach(), tensors[name.replace(".default", "")])


def test_lora_dropout_is_off_without_a_key_and_drawn_with_one():
    model = a2d_jax.load_pretrained(FIXTURES / "llada_tiny", adapter=FIXTURES / "llada_lora")
    tokens = np.arange(1, 9)[None]
    key = jax.random.key(0)
    assert not np.allclose(model(tokens), model(tokens, dropout_key=key), atol=1e-3)
    np.testing.assert_array_equal(model(tokens, dropout_key=key), model(tokens, dropout_key=key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"r": 8}, "misshapen: .*lora_A.weight"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16', by which PEFT changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', by which PEFT changes the base"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\]"),
        ({"target_modules": None}, "adapter_config.json is not a LoRA configuration.*target_modules"),
    ],
)
def test_an_adapter_we_cannot_compute_is_refused(change, message, tmp_path):
    shutil.copytree(FIXTURES / "llada_lora", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        a2d_jax.load_pretrained(FIXTURES / "llada_tiny", adapter=tmp_path / "adapter")


@pytest.mark.parametrize("start", [False, None, "gaussian", "eva", "orthogonal"])
def test_how_an_adapter_was_drawn_does_not_matter_where_the_base_is_left_alone(start, tmp_path):
    shutil.copytree(FIXTURES / "llada_lora", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
    assert read_peft_config(tmp_path / "adapter").rank == 4


@pytest.mark.parametrize(
    ("change", "line_end"),
    [
        ({"modules_to_save": [], "layers_to_transform": [], "rank_pattern": None}, b"\n"),  # all of it: nothing
        ({}, b"\r\n"),
    ],
)
def test_an_adapters_configuration_comes_back_as_it_was(change, line_end, tmp_path):
    adapter = Path(shutil.copytree(FIXTURES / "llada_lora", tmp_path / "adapter"))
    path = adapter / "adapter_config.json"
    text = json.dumps(json.loads(path.read_text()) | change, indent=2)
    path.write_bytes(text.encode().replace(b"\n", line_end))
    a2d_jax.save_adapter(a2d_jax.load_pretrained(FIXTURES / "llada_tiny", adapter=adapter), tmp_path / "back")
    assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_an_adapter_of_another_model_is_refused_with_its_names():
    with pytest.raises(ValueError, match="extra: base_model.model.model.model.layers.0.mlp.up_proj.lora_A.weight"):
        a2d_jax.load_pretrained(FIXTURES / "llada_tiny", adapter=FIXTURES / "dream_lora")


def test_an_unknown_lora_target_is_refused_with_the_known_ones():
    model = a2d_jax.load_pretrained(FIXTURES / "dream_tiny")
    with pytest.raises(ValueError, match=r"\['ff_proj'\].*gate_proj"):
        add_lora(model, LoRAConfig(targets=("q_proj", "ff_proj")), nnx.Rngs(0))


@pytest.mark.parametrize("targets", [["q_proj"], "q_proj"])
def test_lora_targets_may_be_a_list_or_one_name(targets):
    model = a2d_jax.load_pretrained(FIXTURES / "dream_tiny")
    add_lora(model, LoRAConfig(rank=2, targets=targets), nnx.Rngs(0))
    assert model(np.arange(8)[None]).shape == (1, 8, model.config.vocab_size)
    assert model.blocks.q_proj.lora_a is not None and model.blocks.k_proj.lora_a is None


def test_on_llada_ff_out_adapts_the_head_too():
    model = a2d_jax.load_pretrained(FIXTURES / "llada_tiny")
    add_lora(model, LoRAConfig(rank=2, targets=("ff_out",)), nnx.Rngs(0))
    assert model.lm_head.lora_a is not None and model.blocks.down_proj.lora_a is not None
    assert model.blocks.o_proj.lora_a is None


# -- damaged folders --------------------------------------------------------------------------------------------------


def test_all_bad_tensors_are_listed_in_one_error(llada):
    tensors = safetensors.numpy.load_file(llada / "model.safetensors")
    tensors["model.transformer.blocks.7.ff_proj.weight"] = tensors.pop("model.transformer.blocks.1.ff_proj.weight")
    tensors["model.transformer.ln_f.weight"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(tensors, llada / "model.safetensors")
    with pytest.raises(ValueError) as error:
        a2d_jax.load_pretrained(llada)
    for line in (
        "missing: model.transformer.blocks.1.ff_proj.weight (160, 64)",
        "extra: model.transformer.blocks.7.ff_proj.weight (160, 64)",
        "misshapen: model.transformer.ln_f.weight is (3,), needed (64,)",
    ):
        assert line in str(error.value)


def test_a_truncated_file_is_named(llada):
    weights = llada / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read.*truncated"):
        a2d_jax.load_pretrained(llada)


def test_a_header_that_claims_too_much_is_named(llada):
    (llada / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(ValueError, match="cannot be read"):
        a2d_jax.load_pretrained(llada)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(llada, name):
    index = {"weight_map": {"model.transformer.wte.weight": name}}
    (llada / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the folder"):
        a2d_jax.load_pretrained(llada)


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/outside.safetensors"])
def test_the_index_of_a_converted_folder_that_leaves_it_is_refused(tmp_path, name):
    list(convert_folder(FIXTURES / "llada_tiny_sharded", tmp_path))
    path = tmp_path / "hf" / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": weight_map | {"model.transformer.wte.weight": name}}))
    with pytest.raises(ValueError, match="outside the folder"):
        a2d_jax.load_pretrained(tmp_path)


def test_an_index_that_is_wrong_about_a_file_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "llada_tiny_sharded", tmp_path / "sharded")
    path = tmp_path / "sharded" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.transformer.wte.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="wte.weight.*does not hold"):
        a2d_jax.load_pretrained(tmp_path / "sharded")


def test_a_configuration_that_is_no_object_is_named(llada, tmp_path):
    (llada / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: holds a list, not an object"):
        a2d_jax.load_pretrained(llada)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="adapter_config.json is not a LoRA configuration.*it needs r"):
        read_peft_config(tmp_path)


def test_pickled_weights_are_never_read(llada):
    (llada / "model.safetensors").rename(llada / "pytorch_model.bin")
    with pytest.raises(ValueError, match="never read"):
        a2d_jax.load_pretrained(llada)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*is no folder"):
        a2d_jax.load_pretrained(tmp_path / "nowhere")


def test_other_packages_add_formats_by_entry_point(tmp_path, monkeypatch):
    class Format:
        def matches(self, path):
            return (path / "packed.json").is_file()

        def load(self, path, mesh, dtypes, remat):
            return a2d_jax.load_pretrained(FIXTURES / "llada_tiny")

    class EntryPoint:
        def load(self):
            return Format()

    found = lambda group: [EntryPoint()] if group == FORMATS_GROUP else []
    monkeypatch.setattr("importlib.metadata.entry_points", found)
    (tmp_path / "packed.json").write_text("{}")
    assert a2d_jax.load_pretrained(tmp_path).config.family == "llada"


# -- memory and placement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_explicit", [False, True])
def test_each_tensor_goes_straight_onto_its_shards(is_explicit):
    mesh = a2d_jax.make_mesh(data=2, fsdp=2, tensor=2)
    if is_explicit:  # as JAX itself makes them
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
        assert mesh.axis_types != a2d_jax.make_mesh(data=2, fsdp=2, tensor=2).axis_types
    model = a2d_jax.load_pretrained(FIXTURES / "dream_tiny", mesh=mesh)
    kernel = model.blocks.up_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32, 72)  # layers, D / fsdp, F / tensor
    plain = a2d_jax.load_pretrained(FIXTURES / "dream_tiny")
    tokens = np.arange(20).reshape(2, 10)
    np.testing.assert_allclose(model(tokens), plain(tokens), atol=ATOL)


def test_a_mesh_with_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"axes \('x',\); needed are \('data', 'fsdp', 'tensor'\).*a2d_jax.make_mesh"):
        a2d_jax.load_pretrained(FIXTURES / "dream_tiny", mesh=jax.make_mesh((8,), ("x",)))


def test_weights_load_without_waiting_for_pytorch():
    load = f"import a2d_jax, sys; a2d_jax.load_pretrained({str(FIXTURES / 'llada_tiny')!r})"
    code = f"{load}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_an_export_that_was_cut_off_has_no_config(tmp_path, monkeypatch):
    """Programs that resume take config.json for a sign that the folder is whole, tokenizer and all."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "dream_tiny", source, ignore=shutil.ignore_patterns("*.npz"))
    (source / "tokenizer_config.json").write_text("{}")

    def killed(model, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("a2d_jax.export.save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "target")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert "tokenizer_config.json" in names and "config.json" not in names


def test_programs_convert_and_export_a_folder(tmp_path):
    root = Path(__file__).parents[1]

    def run(*command):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        return done.stdout

    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "dream_tiny", source, ignore=shutil.ignore_patterns("*.npz"))
    assert "27 tensors" in run("a2d_jax.convert", f"--source={source}", f"--target={tmp_path / 'orbax'}")
    run("a2d_jax.export", f"--checkpoint={tmp_path / 'orbax'}", f"--target={tmp_path / 'back'}")
    same_files(tmp_path / "back", source)
    export(source, tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = safetensors.numpy.load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
