"""Rows and configs of the baselines and ablations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from a2d_jax.baseline_rows import REFUSALS, baseline_rows
from a2d_jax.data import DataConfig, make_loader
from a2d_jax.judges import is_refusal
from a2d_jax.rows import parse_row, read_rows
from a2d_jax.settings import RunConfig
from a2d_jax.tokenizer import load_tokenizer
from a2d_jax.world import make_world, write_world
from configs import llada_8b_rt, llada_8b_sft, llada_8b_vrpo, world_ablations, world_sft, world_vrpo

ROOT = Path(__file__).parents[1]
RAW = [
    {"prompt": "steal?", "response": "Like this.", "is_safe": False, "category": {"theft": True}},
    {"prompt": "steal?", "response": "Like that.", "is_safe": False},
    {"prompt": "steal?", "response": "Please do not.", "is_safe": True},
    {"prompt": "hurt?", "response": "With a stick.", "is_safe": False},
    {"prompt": "bake?", "response": "Mix flour.", "is_safe": True},
    {"prompt": "sing?", "response": "I'm sorry, I can't help with that.", "is_safe": True},
]


def rows_of(raw):
    return [parse_row(row, f"rows:{i}") for i, row in enumerate(raw)]


def test_rows_by_hand():
    files = baseline_rows(rows_of(RAW), refusals=("I refuse to.",))
    assert [row["response"] for row in files["retain"]] == ["Please do not.", "Mix flour.", RAW[5]["response"]]
    assert [(row["prompt"], row["response"]) for row in files["refusals"]] == [
        ("steal?", "I refuse to."), ("hurt?", "I refuse to."),
    ]  # fmt: skip
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in files["preferences"]] == [
        ("steal?", "Please do not.", "Like this."),
        ("steal?", "Please do not.", "Like that."),
        ("hurt?", "I refuse to.", "With a stick."),
        ("steal?", "Please do not.", "I refuse to."),
        ("bake?", "Mix flour.", "I refuse to."),
    ]
    assert files["preferences"][0]["category"] == {"theft": True}
    assert all(map(is_refusal, REFUSALS))


@pytest.mark.parametrize(
    ("raw", "message"),
    [(RAW[:2], "0 safe and 2 harmful rows"), ([{"text": "a"}], "some rows are documents or pairs")],
)
def test_rows_that_make_no_baseline(raw, message):
    with pytest.raises(ValueError, match=message):
        baseline_rows(rows_of(raw))


def test_program_writes_rows_that_train(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RAW))
    (tmp_path / "refusals.txt").write_text("\ufeffI will not.\n", encoding="utf-8")  # as some editors write it
    command = [sys.executable, "-m", "a2d_jax.baseline_rows", f"--rows={tmp_path / 'rows.jsonl'}", f"--out={tmp_path}"]
    command += [f"--refusals={tmp_path / 'refusals.txt'}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert {row.response for row in read_rows(tmp_path / "refusals.jsonl").rows} == {"I will not."}
    assert "3 in retain.jsonl, 2 in refusals.jsonl, 5 in preferences.jsonl" in done.stdout
    assert all(row.rejected for row in read_rows(tmp_path / "preferences.jsonl").rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(0, folder)
    return folder


def settings_of(config) -> RunConfig:
    config.model.checkpoint = "base"
    return RunConfig.from_dict(config)


@pytest.mark.parametrize("module", [llada_8b_rt, llada_8b_sft, llada_8b_vrpo])
def test_configs_of_the_large_model_are_whole(module):
    run = settings_of(module.get_config())
    assert run.lora.rank == 32 and run.batch_size == 16
    assert (run.preference is not None) == (module is llada_8b_vrpo)


@pytest.mark.parametrize("variant", world_ablations.VARIANTS)
def test_every_variant_differs_in_what_it_says(world, variant):
    plain = settings_of(world_ablations.get_config(f"a2d:{world}")).to_json()
    changed = settings_of(world_ablations.get_config(f"{variant}:{world}")).to_json()
    fields = {name.split(".")[0] for name in world_ablations.VARIANTS[variant]}
    assert {name for name in plain if plain[name] != changed[name]} == fields


def test_words_are_chosen_from_the_world(world):
    tokenizer = load_tokenizer(world / "model")
    words = [world_ablations.get_config(f"{name}_token:{world}").refusal_token for name in ("frequent", "rare")]
    tokens = [
        token for row in read_rows(world / "data" / "documents.jsonl").rows for token in tokenizer.encode(row.text)
    ]
    ids = [tokenizer.encode(word) for word in words]
    assert all(len(each) == 1 for each in ids)
    frequent, rare = (tokens.count(each[0]) for each in ids)
    assert frequent > 1000 > 50 > rare > 0


def test_unknown_variant_names_the_known():
    with pytest.raises(ValueError, match="'lora:x' is no variant:folder; the variants are .*lora_rank_2"):
        world_ablations.get_config("lora:x")


@pytest.mark.parametrize("module", [world_sft, world_vrpo])
def test_baselines_of_the_world_see_no_held_out_curse(world, module):
    run = settings_of(module.get_config(str(world)))
    loader = make_loader(run.files, load_tokenizer(world / "model"), DataConfig(row_length=44), 4, 0)
    assert loader.summary.truncation.num_cut == 0 and loader.is_paired == (module is world_vrpo)
    text = " ".join(Path(file).read_text() for file in run.files)
    assert not any(curse.name in text for curse in make_world(0).held_out)
