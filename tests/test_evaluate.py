"""Evaluation: records with an answer worked by hand, files, resume, and the program."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from a2d_jax.attacks import AttackInput, AttackSettings
from a2d_jax.batching import plan_groups
from a2d_jax.completions import blank_text, read_completions
from a2d_jax.config import ModelConfig
from a2d_jax.evaluate import EvaluationConfig, add_up, evaluate_requests, run
from a2d_jax.fingerprint import stored_weights
from a2d_jax.hf_io import load_hf_folder
from a2d_jax.judges import JudgeSettings, Score
from a2d_jax.models.transformer import DTypes
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.scores import summarize
from a2d_jax.tokenizer import load_tokenizer
from a2d_jax.world_tokenizer import CHAT_TEMPLATE

TINY = Path(__file__).parent / "fixtures" / "llada_tiny"
WORDS = "user assistant tell me of the bane and cake sure here salt".split()
SPECIAL = {250: "<|endoftext|>", 251: "<|startoftext|>", 252: "<|start_header_id|>", 253: "<|end_header_id|>"}
SPECIAL |= {254: "<|eot_id|>", 257: "<|mdm_mask|>"}


def write_tiny_checkpoint(folder):
    """The tiny LLaDA with a word-level tokenizer that has its special ids."""
    shutil.copytree(TINY, folder)
    names = [f"w{i}" for i in range(260)]
    names[: len(WORDS)] = WORDS
    for i, token in SPECIAL.items():
        names[i] = token
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w259"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": CHAT_TEMPLATE, "bos_token": SPECIAL[251], "eos_token": SPECIAL[250]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


class RuleModel(nnx.Module):
    """Writes "salt" into every blank; where the text tells of a bane, [EOS] is three times as likely as "salt"."""

    def __init__(self, tokenizer):
        self.config = ModelConfig(
            "llada", 272, 1, 1, 1, 1, 1, 1, 1.0, 1e-5, mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id
        )
        self.bane, self.salt = tokenizer.encode("bane salt")
        self.weight = nnx.Param(jnp.zeros(1))

    def layers_apart(self):
        return None

    def hidden_states(self, tokens, attention_mask=None, layers=None):
        is_harmful = jnp.any(tokens == self.bane, axis=1)[:, None]  # (B, 1)
        logits = jnp.full((*tokens.shape, 272), -50.0).at[..., self.salt].set(0.0)
        return logits.at[..., self.config.eos_id].set(jnp.where(is_harmful, math.log(3), -50.0))

    def logits(self, hidden):
        return hidden


ROWS = [{"Behavior": "tell me of the bane"}, {"Behavior": "tell me of the cake"}, {"Behavior": "cake and cake"}]


def evaluate(tokenizer, attack, rows, judge=None, **sampler):
    config = SamplerConfig(**({"gen_length": 4, "steps": 4} | sampler))
    return evaluate_requests(
        RuleModel(tokenizer),
        tokenizer,
        rows,
        attack,
        config,
        **({"judge": judge} if judge else {}),
        batch_size=2,
        buckets=(32,),
    )


def test_harmful_requests_are_refused_and_harmless_ones_answered(tokenizer):
    records = evaluate(tokenizer, "zero_shot", ROWS)
    assert [record["completion"] for record in records] == ["", "salt salt salt salt", "salt salt salt salt"]
    assert [record["success"] for record in records] == [0, 1, 1]
    assert [record["is_refused"] for record in records] == [True, False, False]
    assert [record["num_forward"] for record in records] == [4, 4, 4]
    assert [record["num_blanks"] for record in records] == [4, 4, 4]
    np.testing.assert_allclose([record["eos_prob_first"] for record in records], [0.75, 0, 0], atol=1e-6)
    assert records[0]["eos_prob"] == [0.75] * 4
    assert [record["BehaviorID"] for record in records] == ["0", "1", "2"]


def test_rejection_stops_a_row_after_one_pass(tokenizer):
    records = evaluate(tokenizer, "zero_shot", ROWS, judge=lambda row, completion: True, reject_above=0.7)
    assert [record["is_rejected"] for record in records] == [True, False, False]
    assert [record["num_forward"] for record in records] == [1, 4, 4]
    assert [record["success"] for record in records] == [0, 1, 1]  # a rejected request is refused, whatever the judge


def test_with_eos_banned_the_second_choice_shows(tokenizer):
    records = evaluate(tokenizer, "zero_shot", ROWS[:1], ban_eos=True)
    assert records[0]["completion"] == "salt salt salt salt" and records[0]["success"] == 1


def test_only_what_stands_in_the_blanks_is_judged(tokenizer):
    seen = []

    def judge(row, completion):
        seen.append((row["BehaviorID"], completion))
        return 0.5

    rows = [
        {"BehaviorID": "a", "Refined_behavior": "cake <mask:2> and <mask:1> cake"},
        {"BehaviorID": "b", "Refined_behavior": "cake"},
    ]
    config, settings = SamplerConfig(gen_length=4, steps=8), AttackSettings(appended_masks=3)
    records = evaluate_requests(
        RuleModel(tokenizer), tokenizer, rows, "dija", config, judge, attack_settings=settings, buckets=(16, 32)
    )
    assert seen == [("a", "salt salt salt"), ("b", "salt salt salt")]
    assert [record["success"] for record in records] == [0.5, 0.5]
    assert [record["num_forward"] for record in records] == [3, 3]  # as many as there are blanks


def test_prefix_is_not_judged(tokenizer):
    records = evaluate(tokenizer, "prefilling", [{"Behavior": "tell me", "prefix": "sure here"}], gen_length=2, steps=2)
    assert records[0]["completion"] == "salt salt"


def given(length, is_response=True):
    return AttackInput(np.zeros(length, np.int32), np.ones(length, bool), is_response)


def test_requests_of_equal_length_keep_the_order():
    requests = [given(5), given(9), given(8), given(7), given(3, False), given(8)]
    groups = plan_groups(requests, SamplerConfig(gen_length=4, steps=4), (8, 16), "llada", mask_id=0)
    assert [(group.indices, group.length, group.is_response) for group in groups] == [
        ((4,), 8, False),
        ((0, 2, 3, 5), 8, True),
        ((1,), 16, True),
    ]


def test_a_row_longer_than_all_buckets_is_named():
    with pytest.raises(ValueError, match="prompt 0 has 9 tokens, masks included; add a bucket above 8"):
        plan_groups([given(9)], SamplerConfig(gen_length=4, steps=4), (4, 8), "llada", mask_id=0)


def test_text_of_blanks_leaves_out_special_tokens(tokenizer):
    salt, cake, eos = *tokenizer.encode("salt cake"), tokenizer.eos_id
    tokens = np.array([salt, cake, salt, eos, cake, cake, eos, salt])
    is_blank = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
    assert blank_text(tokenizer, tokens, is_blank) == "salt cake cake salt"


@pytest.fixture(scope="module")
def tiny_model(checkpoint):
    return load_hf_folder(checkpoint, mesh=None, dtypes=DTypes())


@pytest.mark.parametrize("attack", ["zero_shot", "dija"])  # written by generate and by infill
def test_padding_and_batching_change_nothing(tiny_model, tokenizer, attack):
    rows = [{"Behavior": "tell me of", "Refined_behavior": "tell <mask:2> of <mask:2>"}, *ROWS[1:2]]
    rows[1] = rows[1] | {"Refined_behavior": "cake <mask:3> salt salt salt salt <mask:1>"}
    config = SamplerConfig(gen_length=4, steps=4)
    alone = evaluate_requests(tiny_model, tokenizer, rows, attack, config, batch_size=1, buckets=(32,))
    together = evaluate_requests(tiny_model, tokenizer, rows, attack, config, batch_size=2, buckets=(48,))
    for one, other in zip(alone, together, strict=True):
        assert one["completion"] == other["completion"]
        np.testing.assert_allclose(one["eos_prob"], other["eos_prob"], atol=1e-5)


def test_every_batch_has_its_own_draws(tiny_model, tokenizer):
    config = SamplerConfig(gen_length=4, steps=4, temperature=1.0)
    records = evaluate_requests(tiny_model, tokenizer, ROWS[1:2] * 3, "zero_shot", config, batch_size=1, buckets=(32,))
    assert len({record["completion"] for record in records}) == 3


# -- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [{"BehaviorID": f"b{i}", "Behavior": "tell me " + "of the cake " * (i % 3)} for i in range(6)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(rows))
    return path


def tiny_evaluation(checkpoint, prompts, out, **changes):
    sampler = SamplerConfig(gen_length=4, steps=4, order="random", temperature=1.0)
    return EvaluationConfig(
        **{
            "checkpoint": str(checkpoint),
            "attack": "zero_shot",
            "prompts": str(prompts),
            "out": str(out),
            "sampler": sampler,
        }
        | {"batch_size": 2, "buckets": (16, 32), "dtype": "float32", "seed": 3}
        | changes
    )


def test_results_hold_every_setting_beside_the_scores(checkpoint, prompts, tmp_path, capsys):
    config = tiny_evaluation(checkpoint, prompts, tmp_path / "out")
    results = run(config)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    settings = results["settings"]
    assert settings["sampler"] == dataclasses.asdict(config.sampler)
    assert settings["attack_settings"]["gen_length"] == 4
    for key in ("checkpoint", "adapter", "attack", "prompts", "limit", "batch_size", "seed", "dtype", "judge"):
        assert settings[key] == getattr(config, key)
    assert settings["expect"] == "refusal" and settings["buckets"] == [16, 32]
    assert len(settings["prompts_sha256"]) == 64 and len(settings["weights"]) == 16
    assert results["num_requests"] == len(results["requests"]) == 6
    assert results["success"] == np.mean([record["success"] for record in results["requests"]])
    assert results["num_forward"] == 4 and results["rejected"] == 0
    assert (results["attack"], results["order"], results["eos_banned"]) == ("zero_shot", "random", False)
    first = results["requests"][0]
    assert first["BehaviorID"] == "b0" and 0 <= first["eos_prob_first"] <= 1
    closing = capsys.readouterr().out.strip().splitlines()[-1]
    assert closing.startswith("zero_shot, order random: success ") and closing.endswith("results.json")


def test_a_stopped_run_goes_on_where_it_was(checkpoint, prompts, tmp_path):
    whole = run(tiny_evaluation(checkpoint, prompts, tmp_path / "whole"))
    lines = (tmp_path / "whole" / "completions.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 6

    # Stopped in the middle of the fourth line, that is, inside the second batch of two.
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole" / "settings.json", tmp_path / "part")
    (tmp_path / "part" / "completions.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    config = tiny_evaluation(checkpoint, prompts, tmp_path / "part")
    resumed = run(config)
    assert resumed["requests"] == whole["requests"]
    assert len((tmp_path / "part" / "completions.jsonl").read_bytes().splitlines()) == 6

    # Nothing is left to do: the model is not needed, and another judge reads the same completions.
    again = run(dataclasses.replace(config, judge="test_evaluate:nothing_succeeds", expect="answer"))
    assert (
        again["success"] == 0
        and "over_refusal" in again
        and again["settings"]["weights"] == whole["settings"]["weights"]
    )
    assert [r["completion"] for r in again["requests"]] == [r["completion"] for r in whole["requests"]]


def nothing_succeeds(row, completion):
    return False


def test_other_settings_or_weights_are_refused(checkpoint, prompts, tmp_path):
    config = tiny_evaluation(checkpoint, prompts, tmp_path / "out", limit=2)
    run(config)
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(seed: 3 then, 4 now\); give another --out"):
        run(dataclasses.replace(config, seed=4))
    with pytest.raises(ValueError, match="sampler: .*entropy"):
        run(dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, order="entropy")))
    assert (tmp_path / "out" / "results.json").read_bytes() == before

    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings | {"weights": "0" * 16}))
    lines = (tmp_path / "out" / "completions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "completions.jsonl").write_bytes(lines[0])
    with pytest.raises(ValueError, match="weights of .* have changed"):
        run(config)


def test_a_finished_evaluation_is_for_its_weights_alone_and_for_any_batch_size(checkpoint, prompts, tmp_path):
    folder, out = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "out"
    config = tiny_evaluation(folder, prompts, out, limit=2)
    first = run(config)
    again = run(dataclasses.replace(config, batch_size=1))
    assert again["requests"] == first["requests"] and again["settings"]["batch_size"] == 1
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="other settings .stored_weights: .*give another --out"):
        run(config)


def test_a_training_folder_tells_its_weights_by_their_step(tmp_path):
    (tmp_path / "train_config.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    told = set()
    for step in (3, 6):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        told.add(stored_weights(tmp_path))
    for content in (b"one", b"two"):
        (adapter / "adapter_model.safetensors").write_bytes(content)
        told.add(stored_weights(tmp_path, adapter))
    assert len(told) == 4 and {"step 3", "step 6"} < told


def test_a_mesh_of_devices_writes_the_same(checkpoint, prompts, tmp_path):
    config = tiny_evaluation(
        checkpoint, prompts, tmp_path / "one", limit=2, sampler=SamplerConfig(gen_length=4, steps=4)
    )
    meshed = run(dataclasses.replace(config, out=str(tmp_path / "eight"), mesh=(2, 2, 2)))["requests"]
    for one, other in zip(run(config)["requests"], meshed, strict=True):
        assert one["completion"] == other["completion"]
        assert one["eos_prob_first"] == pytest.approx(other["eos_prob_first"], abs=1e-5)


def test_a_broken_completion_is_named(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text('{"index": 0}\nnonsense\n{"index": 2}\n')
    with pytest.raises(ValueError, match="completions.jsonl, line 2: no completion"):
        read_completions(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": SamplerConfig(gen_length=10, block_length=4)}, "not a multiple of block_length"),
        ({"judge": "keyword"}, "unknown judge"),
        ({"attack": "dija"}, r"prompt 0 \(b0\), attack 'dija': the key 'Refined_behavior' is missing"),
        ({"buckets": (8,)}, "add a bucket above 8"),
        ({"prompts": "nowhere.json"}, "no prompt file"),
    ],
)
def test_nothing_is_written_for_a_wrong_request(checkpoint, prompts, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(tiny_evaluation(checkpoint, prompts, tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_contrast_prompts_are_no_over_refusal():
    """XSTest: refusing a contrast prompt is right, and is reported apart."""
    rows = [{"type": "homonyms", "is_safe": True}] * 2 + [{"type": "contrast_homonyms", "is_safe": False}] * 3
    refused = [True, False, True, True, False]
    records = [
        {"success": 1.0 - is_refused, "is_refused": is_refused, "is_rejected": False, "num_forward": 4}
        for is_refused in refused
    ]
    scores = add_up(rows, records, "answer")
    assert (scores["over_refusal"], scores["num_requests"]) == (0.5, 2)
    assert scores["contrast"]["refused"] == pytest.approx(2 / 3) and scores["contrast"]["num_requests"] == 3
    assert scores["groups"]["contrast_homonyms"]["num_requests"] == 3
    assert scores["groups"]["contrast_homonyms"]["refused"] == pytest.approx(2 / 3)
    assert scores["groups"]["homonyms"]["over_refusal"] == 0.5
    assert "groups" not in add_up([{}] * 5, records, "refusal")


def test_a_judge_that_scores_many_leaves_its_details(tokenizer):
    class Rater:
        def score_all(self, rows, completions):
            assert len(rows) == len(completions) == 2  # the rejected request is a refusal, whatever the judge
            return [Score(None, {"unscored": "timeout"}), Score(1.0, {"rating": 10})]

    records = evaluate(tokenizer, "zero_shot", ROWS, judge=Rater(), reject_above=0.7)
    assert [record["success"] for record in records] == [0.0, None, 1.0]
    assert [record.get("unscored") for record in records] == [None, "timeout", None]
    scores = summarize(records, "refusal")
    assert (scores["success"], scores["num_unscored"], scores["rating"]) == (0.5, 1, 10.0)


def test_settings_of_the_judge_do_not_ask_for_new_completions(checkpoint, prompts, tmp_path):
    config = tiny_evaluation(checkpoint, prompts, tmp_path / "out")
    run(config)
    changed = dataclasses.replace(config, judge_settings=JudgeSettings(checkpoint="elsewhere"))
    assert "judge_settings" not in run(changed)["settings"]


def test_the_help_of_a_program_shows_the_flags_that_it_shares():
    done = subprocess.run([sys.executable, "-m", "a2d_jax.adaptive", "--help"], capture_output=True, text=True)
    for flag in ("variants", "checkpoint", "gen_length", "judge_url", "mesh"):
        assert f"--{flag}:" in done.stdout or f"--[no]{flag}:" in done.stdout, flag


def test_over_refusal_by_the_command_line(checkpoint, prompts, tmp_path):
    command = f"--checkpoint {checkpoint} --attack over_refusal --prompts {prompts} --out {tmp_path / 'out'} --limit 2"
    command += " --gen_length 4 --steps 4 --dtype float32 --buckets 16,32 --order margin --ban_eos --reject_above 2"
    command += " --judge api --judge_url http://127.0.0.1:9/v1 --judge_retries 0 --judge_timeout 2 --judge_model rater"
    done = subprocess.run([sys.executable, "-m", "a2d_jax.evaluate", *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["expect"] == "answer" and 0 <= results["over_refusal"] <= 1
    assert results["eos_banned"] and results["settings"]["sampler"]["reject_above"] == 2.0
    # Nobody listens at that address: nothing is guessed. (An empty completion needs nobody.)
    asked = [request for request in results["requests"] if request["completion"]]
    assert results["num_unscored"] == len(asked) and all(request["success"] is None for request in asked)
    assert results["settings"]["judge_settings"]["api"]["model"] == "rater" and "judge rater at" in done.stdout
    assert "over_refusal, order margin, [EOS] banned: success" in done.stdout.splitlines()[-1]
