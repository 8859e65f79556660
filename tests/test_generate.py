"""The program `a2d_jax.generate`: chat and infilling, on the tiny LLaDA with a tokenizer of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluate import write_tiny_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def run(*arguments, num_devices=1):
    command = [sys.executable, "-m", "a2d_jax.generate", *map(str, arguments)]
    flag = f"--xla_force_host_platform_device_count={num_devices}"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_two_prompts_are_answered_in_one_batch(checkpoint):
    done = run(
        f"--checkpoint={checkpoint}", "--prompt=tell me of the cake", "--prompt=cake", "--gen_length=4", "--steps=4",
        "--json", "--dtype=float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["prompt"], second["prompt"]) == ("tell me of the cake", "cake")
    assert first["num_forward"] == 4 and not first["is_rejected"] and 0 <= first["eos_prob_first"] <= 1


@pytest.mark.slow
def test_a_text_with_masks_is_filled_in_place_by_a_model_on_two_devices(checkpoint):
    done = run(
        f"--checkpoint={checkpoint}", "--prompt=tell me <mask:2> the cake", "--order=right_to_left", "--json",
        "--dtype=float32", "--mesh=1,1,2", num_devices=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    words = answer["text"].split()
    assert words[:2] == ["tell", "me"] and words[-2:] == ["the", "cake"] and answer["num_forward"] == 2


def test_a_refused_prompt_says_so(checkpoint):
    done = run(
        f"--checkpoint={checkpoint}", "--prompt=cake", "--gen_length=4", "--steps=4", "--reject_above=-1",
        "--dtype=float32", "--ban_eot",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[refused]" in done.stdout and "1 forward passes" in done.stdout


def test_templates_and_requests_do_not_mix(checkpoint):
    done = run(f"--checkpoint={checkpoint}", "--prompt=cake", "--prompt=<mask:2> cake")
    assert done.returncode != 0 and "some do not" in done.stderr
