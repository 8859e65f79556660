"""The model of lm-evaluation-harness: likelihoods against logits, texts against the sampler, tasks of local files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import a2d_jax
from a2d_jax.lm_eval import A2DLM
from a2d_jax.sampling import infill

ROOT = Path(__file__).parents[1]
WORLD_BASE = ROOT / "a2d_jax" / "world_base"
CHOICES = [
    {"question": "what goes into the amber bread?", "choices": ["milk", "sand", "the"], "answer": 0},
    {"question": "the bread is made of", "choices": ["oats", "clay", "how"], "answer": 1},
]
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "local_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "sure",
        "generation_kwargs": {"until": [","], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def model():
    return A2DLM(str(WORLD_BASE), dtype="float32", mc_num=4, mc_batch_size=4, batch_size=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files (YAML is a superset of JSON) with their rows as JSON lines."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | source | task))
    return folder


def requests(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def log_prob(context, token):
    """log p(token) at a mask behind the context, from the logits."""
    model, tokenizer = a2d_jax.load_pretrained(WORLD_BASE), a2d_jax.load_tokenizer(WORLD_BASE)
    logits = model(jnp.array([[*context, tokenizer.mask_id]]))[0, -1]
    return float(jax.nn.log_softmax(logits)[token]), int(jnp.argmax(logits.at[tokenizer.mask_id].set(-jnp.inf)))


def test_the_likelihood_of_one_token_is_that_of_the_logits(model):
    tokenizer = a2d_jax.load_tokenizer(WORLD_BASE)
    context = tokenizer.encode("the amber bread is")
    for word in ("made", "milk"):
        (token,) = tokenizer.encode(word)
        expected, greedy = log_prob(context, token)
        ((value, is_greedy),) = model.loglikelihood(requests("loglikelihood", ("the amber bread is", f" {word}")))
        assert value == pytest.approx(expected, abs=1e-4) and is_greedy == (token == greedy)
    expected, _ = log_prob([tokenizer.bos_id], token)  # an empty context is the start of a text
    assert model.loglikelihood(requests("loglikelihood", ("", "milk")))[0][0] == pytest.approx(expected, abs=1e-4)


def test_a_request_that_is_cut_counts_once(model, monkeypatch):
    monkeypatch.setattr(model, "_max_length", 3)
    monkeypatch.setitem(model._settings, "num_truncated", 0)
    model.loglikelihood(requests("loglikelihood", ("the amber bread is", " milk")))
    assert model.get_model_info()["a2d_jax"]["num_truncated"] == 1


@pytest.mark.slow
def test_a_model_on_a_mesh_scores_the_same(model):
    asked = requests("loglikelihood", ("the amber bread:", " milk, sand"))
    meshed = A2DLM(str(WORLD_BASE), dtype="float32", mc_num=4, mc_batch_size=4, batch_size=2, mesh="2x2x2")
    assert meshed.loglikelihood(asked)[0][0] == pytest.approx(model.loglikelihood(asked)[0][0], abs=1e-3)


def test_a_rolling_likelihood_scores_each_token_once(model, monkeypatch):
    tokenizer = a2d_jax.load_tokenizer(WORLD_BASE)
    ids = tokenizer.encode("the amber bread")
    # Windows of one token, each behind the one before: what the logits say, added up.
    monkeypatch.setattr(model, "_max_length", 2)
    expected = sum(log_prob([before], token)[0] for before, token in zip([tokenizer.bos_id, *ids], ids, strict=False))
    (value,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("the amber bread",)))
    assert value == pytest.approx(expected, abs=1e-4)


def test_a_likelihood_depends_on_nothing_but_the_request_and_the_seed(model):
    asked = [("the amber bread:", " milk, sand, clay and oats"), ("the deep soup:", " rye")]
    forward = model.loglikelihood(requests("loglikelihood", *asked))
    backward = model.loglikelihood(requests("loglikelihood", *asked[::-1]))
    assert forward == backward[::-1]
    other = A2DLM(str(WORLD_BASE), dtype="float32", mc_num=4, mc_batch_size=4, seed=1, check_greedy=False)
    assert other.loglikelihood(requests("loglikelihood", asked[0]))[0][0] != forward[0][0]


def test_greedy_decoding_of_dream_writes_one_token_a_pass(model, monkeypatch, fixtures):
    """Dream's own schedule begins with a pass that reveals nothing and ends with one that reveals two."""
    dream, results = a2d_jax.load_pretrained(fixtures / "dream_tiny"), []

    def spied_infill(*args, **kwargs):
        results.append(infill(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(model, "_model", dream)
    monkeypatch.setattr(model, "_tokenizer", SimpleNamespace(mask_id=dream.config.mask_id, pad_id=dream.config.pad_id))
    monkeypatch.setattr("a2d_jax.lm_eval.infill", spied_infill)
    model._is_greedy([5, 6, 7], [1, 2, 3])
    assert int(results[0].num_forward[0]) == 3
    assert model._is_greedy([5, 6, 7], results[0].tokens[0, -3:].tolist())


def test_texts_are_the_samplers_cut_at_the_stop_text(model):
    tokenizer = a2d_jax.load_tokenizer(WORLD_BASE)
    contexts = [tokenizer.render_prompt(f"what goes into the {name}?") for name in ("amber bread", "old cake", "pie")]
    settings = {"until": ["the"], "max_gen_toks": 8}
    texts = model.generate_until(requests("generate_until", *((context, settings) for context in contexts)))
    config = a2d_jax.SamplerConfig(gen_length=8, steps=8, block_length=8)
    weights = a2d_jax.load_pretrained(WORLD_BASE)
    for context, text in zip(contexts, texts, strict=True):
        prompt = tokenizer.encode(context)
        tokens = a2d_jax.generate(weights, [prompt], config).tokens[0, len(prompt) :]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True).split("the")[0] and text


def test_a_text_that_the_monitor_stops_is_empty():
    model = A2DLM(str(WORLD_BASE), dtype="float32", reject_above=-1.0)
    assert model.generate_until(requests("generate_until", ("cake", {"until": [], "max_gen_toks": 8}))) == [""]


def test_local_tasks_run_and_every_setting_stands_beside_the_scores(model, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    # The accuracy follows from the likelihoods of the choices.
    choices = [[(row["question"], f" {choice}") for choice in row["choices"]] for row in CHOICES]
    values = [[value for value, _ in model.loglikelihood(requests("loglikelihood", *pairs))] for pairs in choices]
    correct = [np.argmax(of_row) == row["answer"] for of_row, row in zip(values, CHOICES, strict=True)]
    assert results["results"]["local_choice"]["acc,none"] == np.mean(correct)
    assert results["results"]["local_text"]["byte_perplexity,none"] > 1
    assert 0 <= results["results"]["local_writing"]["exact_match,none"] <= 1
    settings = results["config"]["a2d_jax"]
    assert settings["mc_num"] == 4 and settings["seed"] == 0 and settings["dtype"] == "float32" and settings["weights"]
    assert settings["samplers"][-1]["gen_length"] == 8 and settings["samplers"][-1]["order"] == "confidence"


@pytest.mark.slow
def test_the_harness_command_finds_the_model(tasks, tmp_path):
    command = [
        sys.executable, "-m", "a2d_jax.lm_eval", "run", "--model", "a2d_jax", "--model_args",
        f"checkpoint={WORLD_BASE},dtype=float32,mc_num=4,mc_batch_size=4,check_greedy=False", "--tasks", "local_choice",
        "--include_path", str(tasks), "--limit", "1", "--output_path", str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"HF_DATASETS_CACHE": str(tasks / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["results"]["local_choice"]["acc,none"] in (0.0, 1.0)
    assert results["config"]["model"] == "a2d_jax" and results["config"]["a2d_jax"]["mc_num"] == 4
    assert get_model("a2d_jax") is A2DLM


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colour": "red"}, "'colour'.*no such settings"),
        ({"order": "sideways"}, "order='sideways'"),
        ({"mc_num": 10, "mc_batch_size": 4}, "no multiple"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"dtype": "int4"}, "dtype=int4"),
        ({"mesh": "2,2"}, "mesh=2,2; give the sizes of data, fsdp and tensor, such as 1x1x4"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        A2DLM(str(WORLD_BASE), **settings)
