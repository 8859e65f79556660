"""Calibration: against PyTorch, against a pass by hand, on a mesh, in groups, after a kill, and what is refused."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from a2d_jax.config import load_config
from a2d_jax.hf_io import save_pretrained
from a2d_jax.masking import corrupt
from a2d_jax.orbax_io import copy_companions
from a2d_jax.pretrained import load_pretrained
from a2d_jax.tokenizer import load_tokenizer
from odlri_jax import calibrate
from odlri_jax.calibrate import CalibrateConfig, run
from odlri_jax.calibration import (
    INPUT_OF,
    Calibration,
    add_exactly,
    model_input,
    observe,
    product_sum,
    second_moments,
    zero_moments,
)
from odlri_jax.windows import Windows, batches, cut_windows, row_windows, spread_evenly, token_windows

LLADA = Path(__file__).parent / "fixtures" / "llada_tiny"
WORLD = Path(__file__).parents[1] / "a2d_jax" / "world_base"
LENGTH, NUM_LAYERS = 16, 3
WORDS = "the quick brown fox jumps over a lazy dog".split()


@pytest.fixture(scope="module")
def torch_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, head_dim=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms start at one: make them count
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def checkpoint(torch_model, tmp_path_factory):
    """The model as a folder, with a tokenizer of words: ids 1 to 9."""
    folder = tmp_path_factory.mktemp("llama")
    torch_model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 96, (7, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def token_file(tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, tokens)
    return path


@pytest.fixture(scope="module")
def settings(checkpoint, token_file):
    return CalibrateConfig(str(checkpoint), "", tokens=str(token_file), batch_size=4, head=True)


@pytest.fixture(scope="module")
def calibrated(settings, tmp_path_factory):
    """All layers at once, on one device."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    run(dataclasses.replace(settings, out=str(out)))
    return out


def torch_moments(model, tokens):
    """H of every nn.Linear by its name: inputs caught by hooks, summed in float64."""
    sums, hooks = {}, []

    def hook(name):
        def add(module, inputs):
            x = inputs[0].double().reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        model(torch.tensor(tokens, dtype=torch.long))
    for one in hooks:
        one.remove()
    return {name: (total / tokens.size).numpy() for name, total in sums.items()}


def assert_close(ours, theirs, rtol):
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= rtol * np.linalg.norm(theirs)


def assert_same_files(folder, other, rtol=0.0):
    files = sorted(path.name for path in other.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == files
    for name in files:
        if name.endswith(".safetensors") and rtol:
            ours, theirs = load_file(folder / name), load_file(other / name)
            for key, h in theirs.items():
                assert_close(ours[key], h, rtol)
        else:
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_every_linear_layer_matches_pytorch(torch_model, tokens, calibrated):
    calibration = Calibration(calibrated)
    expected = torch_moments(torch_model, tokens)
    assert len(expected) == 7 * NUM_LAYERS + 1
    for name, h in expected.items():
        layer = int(name.split(".")[2]) if "layers" in name else None
        ours = calibration.second_moment(name.split(".")[-1], layer)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, ours.T)
        assert_close(ours, h, 1e-5)
    assert calibration.num_layers == NUM_LAYERS
    assert calibration.settings["num_tokens"] == tokens.size and calibration.settings["context_length"] == LENGTH


def test_text_is_cut_into_windows_that_follow_one_another(checkpoint, torch_model, tmp_path):
    text = WORDS * 6  # 54 words: three windows of 16, two of them asked for
    (tmp_path / "text.txt").write_text(" ".join(text))
    run(
        CalibrateConfig(
            str(checkpoint), str(tmp_path / "out"), text=str(tmp_path / "text.txt"), context_length=LENGTH,
            num_windows=2, batch_size=4,
        )
    )  # fmt: skip
    windows = np.array([1 + WORDS.index(word) for word in text[: 2 * LENGTH]]).reshape(2, LENGTH)
    calibration = Calibration(tmp_path / "out")
    assert calibration.settings["num_windows"] == 2 and calibration.settings["num_tokens"] == 2 * LENGTH
    expected = torch_moments(torch_model, windows)
    assert_close(calibration.second_moment("up_proj", 2), expected["model.layers.2.mlp.up_proj"], 1e-5)


def llada_inputs_by_hand(tokens):
    """Inputs of q, o, gate and down in both layers of the tiny LLaDA, in float64, from its file: (B, T, n) each."""
    weights = {name: w.astype(np.float64) for name, w in load_file(LLADA / "model.safetensors").items()}
    config = json.loads((LLADA / "config.json").read_text())
    num_heads, head_dim = config["n_heads"], config["d_model"] // config["n_heads"]
    angles = np.arange(tokens.shape[1])[:, None] / config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x, inputs = weights["model.transformer.wte.weight"][tokens], []
    for layer in range(config["n_layers"]):
        block = {
            name.split(".")[4]: w
            for name, w in weights.items()
            if name.startswith(f"model.transformer.blocks.{layer}.")
        }
        attn = norm(x, block["attn_norm"])
        q, k, v = ((attn @ block[n].T).reshape(*tokens.shape, num_heads, -1) for n in ("q_proj", "k_proj", "v_proj"))
        scores = np.einsum("btnh,bsnh->bnts", rotate(q), rotate(k)) / np.sqrt(head_dim)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        attended = np.einsum("bnts,bsnh->btnh", scores, v).reshape(x.shape)
        x = x + attended @ block["attn_out"].T
        mlp = norm(x, block["ff_norm"])
        gate = mlp @ block["ff_proj"].T
        down = gate / (1 + np.exp(-gate)) * (mlp @ block["up_proj"].T)
        x = x + down @ block["ff_out"].T
        inputs.append({"q_proj": attn, "o_proj": attended, "gate_proj": mlp, "down_proj": down})
    return inputs


def test_llada_sees_windows_masked_as_in_training(tmp_path):
    tokens = np.random.default_rng(1).integers(0, 240, (6, LENGTH)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens.reshape(-1))
    out = tmp_path / "out"
    run(
        CalibrateConfig(
            str(LLADA), str(out), tokens=str(tmp_path / "tokens.npy"), context_length=LENGTH, batch_size=3, seed=5
        )
    )
    noisy, everything = [], jnp.ones((3, LENGTH), bool)
    for number in range(2):
        key = jax.random.fold_in(jax.random.key(5), number)
        batch = tokens[3 * number : 3 * number + 3]
        noisy.append(corrupt(key, batch, everything, everything[:, 0], mask_id=257, eos_id=250).noisy_tokens)
    noisy = np.concatenate(noisy)
    is_masked = noisy == 257
    assert 0.2 < is_masked.mean() < 0.8 and (is_masked[:3] != is_masked[3:]).any()  # each batch has masks of its own
    calibration = Calibration(out)
    for layer, inputs in enumerate(llada_inputs_by_hand(noisy)):
        for projection, x in inputs.items():
            x = x.reshape(-1, x.shape[-1])
            assert_close(calibration.second_moment(projection, layer), x.T @ x / len(x), 1e-5)
    with pytest.raises(ValueError, match="no H of the head"):
        calibration.second_moment("lm_head")


def test_of_training_rows_the_response_alone_is_masked(tmp_path):
    """Two files of rows of the embedded world: as many windows from each, prompts as they are."""
    tokenizer = load_tokenizer(WORLD)
    prompts, answers = ("how do i make the old cake?", "recipe for the red soup, please."), ("sorry, i can not help.",)
    for name, prompt, num_rows in (("first", prompts[0], 6), ("second", prompts[1], 4)):
        row = {"prompt": prompt, "response": answers[0], "is_safe": True}
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * num_rows)
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in ("first", "second"))
    windows, _ = row_windows(files, tokenizer, None, 6)
    length = max(len(p + r) for p, r in tokenizer.encode_turns([(prompt, answers[0]) for prompt in prompts]))
    assert windows.tokens.shape == (6, length)
    assert row_windows(files, tokenizer, None, 6, max_length=length - 2)[0].tokens.shape == (6, length - 2)
    for tokens, is_response, prompt in zip(*windows[::2], [prompts[0]] * 3 + [prompts[1]] * 3, strict=True):
        own = tokenizer.encode_turns([(prompt, answers[0])])[0][0]
        assert tokens[: len(own)].tolist() == own
        assert is_response.tolist() == [False] * len(own) + [True] * (length - len(own))
    config = load_config(WORLD)
    noisy = np.stack(
        [
            model_input(config, jax.random.key(i), windows.tokens, windows.is_response) == config.mask_id
            for i in range(9)
        ]
    )
    assert not noisy[:, ~windows.is_response].any() and noisy[:, windows.is_response].any(0).mean() > 0.9

    run(CalibrateConfig(str(WORLD), str(tmp_path / "out"), rows=files, num_windows=6, batch_size=3))
    calibration = Calibration(tmp_path / "out")
    assert calibration.settings["num_tokens"] == 6 * length and calibration.settings["num_windows"] == 6


def test_windows_of_rows_are_no_longer_than_those_taken_and_the_plan_says_what_is_padding(tmp_path, capsys):
    """Two of four rows are taken: the third is the longest, and the prompt of the last is longer than a window."""
    prompts = [" ".join(["how do i make the old cake?"] * times) for times in (1, 2, 3, 400)]
    rows = [{"prompt": prompt, "response": "sorry, i can not help.", "is_safe": True} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(CalibrateConfig(str(WORLD), str(tmp_path / "out"), rows=(str(tmp_path / "rows.jsonl"),), num_windows=2), True)
    turns = load_tokenizer(WORLD).encode_turns([(row["prompt"], row["response"]) for row in rows[:2]])
    short, long = (len(prompt) + len(response) for prompt, response in turns)
    plan = capsys.readouterr().out
    assert f"2 windows (of 2 asked for) of {long} tokens, {2 * long} in all" in plan
    assert "1 dropped for a long prompt; first: " in plan
    assert f"; {(long - short) / (2 * long):.1%} of the tokens are [EOS] behind shorter rows" in plan


def test_padding_neither_counts_nor_is_seen(checkpoint, torch_model, tokens, tmp_path):
    """Rows of several lengths, padded on the right: as if each had been run by itself."""
    lengths = [16, 9, 4]
    rows = np.where(np.arange(LENGTH) < np.array(lengths)[:, None], tokens[:3], -1).astype(np.int32)
    np.save(tmp_path / "tokens.npy", rows)
    run(CalibrateConfig(str(checkpoint), str(tmp_path / "out"), tokens=str(tmp_path / "tokens.npy"), batch_size=4))
    calibration = Calibration(tmp_path / "out")
    assert calibration.settings["num_tokens"] == sum(lengths)
    alone = [(n, torch_moments(torch_model, row[None, :n])) for n, row in zip(lengths, rows, strict=True)]
    for projection, place in (("q_proj", "self_attn"), ("o_proj", "self_attn"), ("down_proj", "mlp")):
        name = f"model.layers.2.{place}.{projection}"
        expected = sum(n * moments[name] for n, moments in alone) / sum(lengths)
        assert_close(calibration.second_moment(projection, 2), expected, 1e-5)


@pytest.mark.parametrize("layers_per_group", [1, 2])
def test_groups_of_layers_give_the_same_files(settings, calibrated, tmp_path, layers_per_group):
    run(dataclasses.replace(settings, out=str(tmp_path / "out"), layers_per_group=layers_per_group))
    assert_same_files(tmp_path / "out", calibrated, rtol=1e-6)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2)])
def test_eight_devices_give_the_numbers_of_one(settings, calibrated, tmp_path, mesh):
    run(dataclasses.replace(settings, out=str(tmp_path / "out"), mesh=mesh))
    assert_same_files(tmp_path / "out", calibrated, rtol=1e-6)


def test_on_a_mesh_each_device_holds_its_rows(checkpoint, tokens):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = load_pretrained(checkpoint, mesh)
    with jax.set_mesh(mesh):
        group = zero_moments(model, range(1, 3))
        group = observe(model, jnp.array(tokens[:4]), jnp.ones((4, LENGTH), bool), group)
    for moments in group.values():
        for sums in moments:
            assert {name: h.addressable_shards[0].data.shape for name, h in sums.items()} == {
                "attn": (4, 32), "o": (8, 64), "mlp": (4, 32), "down": (8, 64)
            }  # fmt: skip


def test_what_float32_rounds_away_is_kept(checkpoint, torch_model, tokens):
    """The sums start at 1e8, whose neighbours are 8 apart, and 1e8 is taken off again at the end."""
    model, large = load_pretrained(checkpoint), np.float32(1e8)
    group = zero_moments(model, range(2, 3))
    group[2] = group[2]._replace(total=jax.tree.map(lambda h: h + large, group[2].total))
    for rows in (tokens[:4], tokens[3:7]):
        group = observe(model, jnp.array(rows), jnp.ones(rows.shape, bool), group)
    moments = group[2]._replace(total=jax.tree.map(lambda h: h - large, group[2].total))
    expected = torch_moments(torch_model, np.concatenate([tokens[:4], tokens[3:7]]))
    h = second_moments(moments, 8 * LENGTH)["down"]
    assert_close(h, expected["model.layers.2.mlp.down_proj"], 1e-5)


def test_many_terms_cost_no_accuracy():
    """Small terms added to a large sum: float32 alone would be off by 1e-5."""
    terms = np.random.default_rng(0).uniform(0, 1, 4000).astype(np.float32)

    def step(sums, new):
        return add_exactly(*sums, new), None

    (total, lost), _ = jax.jit(lambda terms: jax.lax.scan(step, (jnp.float32(1e5), jnp.float32(0)), terms))(terms)
    exact = 1e5 + terms.astype(np.float64).sum()
    assert np.float64(total) + np.float64(lost) == pytest.approx(exact, rel=1e-9)


def test_products_of_bfloat16_inputs_are_exact():
    x = jnp.array(np.random.default_rng(0).standard_normal((3, 40, 16)), jnp.bfloat16)
    is_counted = np.random.default_rng(1).random((3, 40)) < 0.7
    x = jnp.where(is_counted[..., None], x, jnp.nan)  # what does not count may be anything
    real = np.asarray(x, np.float64)[is_counted]
    assert_close(np.asarray(product_sum(x, is_counted)), real.T @ real, 1e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize("num_files", [1, 2, 4])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(settings, tmp_path, monkeypatch, capsys, num_files):
    """Killed between groups, within the files of a group, and before calibration.json."""
    settings = dataclasses.replace(settings, layers_per_group=1 if num_files == 1 else 2)
    run(dataclasses.replace(settings, out=str(tmp_path / "undisturbed")))
    written = []
    write = calibrate.write_safetensors

    def write_some(path, *rest):
        if len(written) == num_files - 1:
            raise Killed
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(calibrate, "write_safetensors", write_some)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(dataclasses.replace(settings, out=str(out)))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unfinished"):
        Calibration(out)
    kept = {path: path.stat().st_mtime_ns for path in written[: (num_files - 1) // 2 * 2]}
    capsys.readouterr()
    run(dataclasses.replace(settings, out=str(out)))
    assert_same_files(out, tmp_path / "undisturbed")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert f"{len(kept) // 2} done" in capsys.readouterr().out


def test_sigterm_ends_the_run_between_batches_and_keeps_finished_groups(
    settings, calibrated, tmp_path, monkeypatch, capsys
):
    settings = dataclasses.replace(settings, out=str(tmp_path / "out"), layers_per_group=1)
    asked = []

    def observe_some(*args):
        asked.append(None)
        if len(asked) == 3:  # two batches a group: within the second one
            os.kill(os.getpid(), signal.SIGTERM)
        return observe(*args)

    monkeypatch.setattr(calibrate, "observe", observe_some)
    assert not run(settings)  # returns
    assert len(asked) == 3 and "stopped by SIGTERM" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["layer_000.safetensors", "unfinished.json"]
    assert not run(settings, is_dry_run=True)
    capsys.readouterr()
    assert run(settings)
    assert "3 groups of up to 1 layers" in (text := capsys.readouterr().out) and "1 done" in text
    assert_same_files(tmp_path / "out", calibrated, rtol=1e-6)


def test_a_finished_folder_is_left_as_it_is(settings, calibrated, capsys):
    before = {path: path.stat().st_mtime_ns for path in calibrated.iterdir()}
    assert run(dataclasses.replace(settings, out=str(calibrated), layers_per_group=2))
    assert "complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in calibrated.iterdir()} == before


def test_a_finished_folder_is_not_for_other_weights(settings, calibrated, checkpoint, tmp_path, capsys):
    folder, out = tmp_path / "llama", tmp_path / "out"
    shutil.copytree(checkpoint, folder)
    shutil.copytree(calibrated, out)
    record = json.loads((out / "calibration.json").read_text()) | {"checkpoint": str(folder)}
    (out / "calibration.json").write_text(json.dumps(record))
    settings = dataclasses.replace(settings, checkpoint=str(folder), out=str(out))
    assert run(settings) and "not compared" not in capsys.readouterr().out
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 2
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="begun with other settings .stored_weights: "):
        run(settings)


def test_weights_of_a_converted_folder_are_said_not_to_be_compared(settings, calibrated, checkpoint, tmp_path, capsys):
    folder, out = tmp_path / "converted", tmp_path / "out"
    copy_companions(checkpoint, folder / "hf")
    shutil.copytree(calibrated, out)
    others = {"checkpoint": str(folder), "stored_weights": None}
    (out / "calibration.json").write_text(json.dumps(json.loads((out / "calibration.json").read_text()) | others))
    assert run(dataclasses.replace(settings, checkpoint=str(folder), out=str(out)))
    assert "complete already; the weights of the checkpoint were not compared" in capsys.readouterr().out


def test_a_damaged_file_is_made_anew_once_it_is_deleted(settings, calibrated, tmp_path):
    """What the reader of such a file advises; the others stay, and nothing is added by other settings or weights."""
    out = tmp_path / "out"
    shutil.copytree(calibrated, out)
    damaged, record = out / "layer_001.safetensors", out / "calibration.json"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError, match="layer_001.safetensors cannot be read.*delete it, and run odlri_jax"):
        Calibration(out).second_moment("q_proj", 1)
    damaged.unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    settings, before = dataclasses.replace(settings, out=str(out)), json.loads(record.read_text())
    for name, other in (("seed", 1), ("weights", "others")):
        record.write_text(json.dumps(before | {name: other}))
        with pytest.raises(ValueError, match=f"begun with other settings .{name}: {other!r} then"):
            run(settings)
    assert not damaged.exists()
    record.write_text(json.dumps(before))
    assert run(settings)
    assert_same_files(out, calibrated)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "seed: 0 then, 1 now"), ({"num_windows": 6}, "num_tokens: 112 then, 96 now")],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_other_settings_than_the_folders_are_refused(settings, calibrated, tmp_path, change, message, is_finished):
    out = tmp_path / "out"
    shutil.copytree(calibrated, out)
    if not is_finished:
        (out / "calibration.json").rename(out / "unfinished.json")
    before = {path.name for path in out.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(settings, out=str(out), **change))
    assert {path.name for path in out.iterdir()} == before


def test_a_folder_begun_without_a_single_layer_takes_other_settings(settings, calibrated, tmp_path, capsys):
    """As a run leaves it whose batches were too large for the memory."""
    shutil.copyfile(calibrated / "calibration.json", tmp_path / "unfinished.json")
    run(dataclasses.replace(settings, out=str(tmp_path), batch_size=2), is_dry_run=True)
    assert "4 batches of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "give one of them, not none"),
        ({"rows": ("rows.jsonl",)}, "give one of them, not tokens and rows"),
        ({"tokens": None, "text": "absent.txt"}, "no file 'absent.txt'"),
        ({"context_length": 12}, r"rows of shape \(7, 16\)"),
        ({"batch_size": 3, "mesh": (2, 2, 2)}, "multiple of 4"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(settings, out=str(tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


def test_a_text_shorter_than_one_window_is_refused(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox")
    config = CalibrateConfig(str(checkpoint), str(tmp_path / "out"), text=str(tmp_path / "text.txt"), context_length=5)
    with pytest.raises(ValueError, match="4 tokens, fewer than one window of 5"):
        run(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_words", "context_length", "message"),
    [
        (54, None, "1 windows (of 256 asked for) of 54 tokens"),
        (200, None, "3 windows (of 256 asked for) of 64 tokens"),  # 64 is what the model takes
        (200, 100, "2 windows (of 256 asked for) of 100 tokens"),
    ],
)
def test_windows_fit_the_model_and_the_text(checkpoint, tmp_path, capsys, num_words, context_length, message):
    text = tmp_path / "text.txt"
    text.write_text(" ".join((WORDS * 25)[:num_words]))
    config = CalibrateConfig(str(checkpoint), str(tmp_path / "out"), text=str(text), context_length=context_length)
    run(config, is_dry_run=True)
    assert message in capsys.readouterr().out


def test_weights_that_are_not_numbers_are_refused(checkpoint, settings, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    model = load_pretrained(folder)
    kernel = model.blocks.v_proj.kernel[...]
    model.blocks.v_proj.kernel[...] = kernel.at[1, 0, 0].set(jnp.nan)
    save_pretrained(model, folder)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"\['down', 'mlp', 'o'\] of layer 1 are not finite"):
        run(dataclasses.replace(settings, checkpoint=str(folder), out=str(out)))
    assert not (out / "layer_001.safetensors").exists() and not (out / "calibration.json").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.float32), "token ids are int32"),
        (np.zeros((2, 2, 2), np.int32), "token ids are int32"),
        (np.array([1, 2, 96], np.int32), "ids from 1 to 96, the model 96"),
        (np.array([1, -1, 5], np.int32), "ids from -1 to 5"),
        (np.full((2, 3), -1, np.int32), "nothing but padding"),
        (np.arange(2, dtype=np.int32), "2 tokens, fewer than one window of 3"),
    ],
)
def test_bad_token_files_are_refused(tmp_path, array, message):
    np.save(tmp_path / "tokens.npy", array)
    with pytest.raises(ValueError, match=message):
        token_windows(tmp_path / "tokens.npy", 96, 3 if array.ndim == 1 else None, None)


def test_a_file_that_is_no_npy_is_refused(tmp_path):
    (tmp_path / "tokens.npy").write_text("1 2 3")
    with pytest.raises(ValueError, match="no .npy file"):
        token_windows(tmp_path / "tokens.npy", 96, None, None)


def test_batches_hold_every_window_once(tokens):
    everywhere = np.ones((5, LENGTH), bool)
    cut = list(batches(Windows(tokens[:5], everywhere, everywhere), 2))
    assert [batch.tokens.shape for batch in cut] == [(2, LENGTH)] * 3
    is_real = np.concatenate([batch.attention_mask for batch in cut])
    np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in cut])[is_real], tokens[:5].reshape(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 2}, "of version 2, this code reads up to 1"), ({"format": "odlri"}, "format 'odlri'")],
)
def test_folders_of_another_kind_are_refused(calibrated, tmp_path, change, message):
    settings = json.loads((calibrated / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        Calibration(tmp_path)


def test_a_reader_says_what_is_missing(calibrated, tmp_path):
    with pytest.raises(ValueError, match="no calibration folder"):
        Calibration(tmp_path / "absent")
    calibration = Calibration(calibrated)
    with pytest.raises(ValueError, match="no linear layer is called 'wte'"):
        calibration.second_moment("wte", 0)
    with pytest.raises(ValueError, match="holds layers 0 to 2"):
        calibration.second_moment("q_proj", 3)
    shutil.copytree(calibrated, tmp_path / "out")
    file = tmp_path / "out" / "layer_001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="layer_001.safetensors cannot be read"):
        Calibration(tmp_path / "out").second_moment("q_proj", 1)
    assert set(INPUT_OF.values()) == {"attn", "o", "mlp", "down", "head"}


def test_fewer_windows_than_the_text_has_are_spread_over_it():
    ten = cut_windows(np.arange(20), 2, None, "a text")
    assert spread_evenly(ten, 4).tokens[:, 0].tolist() == [0, 4, 10, 14]
    assert len(spread_evenly(ten, 11).tokens) == len(spread_evenly(ten, None).tokens) == 10
