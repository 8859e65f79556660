"""Decoding against PyTorch running the official algorithm on the same weights; parallel reveal in the embedded world.

    python -m bench.decoding --out bench_out [--batches 1,8] [--responses 128,256] [--sides exact,dual_cache]

Speed: a random LLaDA of 135M parameters in its body (576 wide, 30 layers) with the published 126,464-row head, prompt
64, response 128 or 256 in blocks of 32. The PyTorch side is transformers' LlamaModel with a full attention mask and
LLaDA's published sampling loop: head, argmax and softmax at every position, so each of its passes costs the same, and
one a block is timed. Here a block of 32 is decoded in `--block_passes`, exactly and with the dual cache; fewer than 32
take the same pass over more masks, which favours the other side. Both sides take turns; the table holds medians,
tokens/s for a step a token, and the memory that a side's decoding takes at its peak beyond what stood before it. The
tokens of both sides after a pass a block are compared.

Monitor: the same model decodes with a monitor of everything that never stops, and without one, in turns.

Growth: seconds of a pass of a body of 6 layers against batch, length and vocabulary, the others fixed, each row fitted
by c x^p.

World: the base model of the embedded world writes the recipes of foods; forward passes and exact answers with a
threshold against one token a step.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import torch
from absl import app, flags

from a2d_jax.evaluate import evaluate_requests
from a2d_jax.files import write_json
from a2d_jax.folders import hf_folder
from a2d_jax.models.transformer import Transformer
from a2d_jax.monitor import EosMonitor
from a2d_jax.pretrained import load_pretrained
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import Decoder, response_plan, response_rows, row_keys
from a2d_jax.tokenizer import load_tokenizer
from a2d_jax.world import attack_prompts, is_exact, make_world
from bench.growth import measure_growth, plot_growth
from bench.torch_llada import MASK_ID, TorchLlada, random_llada

PROMPT, BLOCK = 64, 32
WATCHED_RESPONSE, WATCHED_PASSES = 128, 4  # of the monitor's overhead
GROWTH = {
    "batch": (1, 2, 4, 8, 16),
    "length": (64, 128, 256, 512, 1024),
    "vocabulary": (8192, 16384, 32768, 65536, 131072),
}
FIXED = {"batch": 2, "length": 128, "vocabulary": 32768}
ROOT = Path(__file__).parents[1]

_OUT = flags.DEFINE_string("out", "bench_out", "folder for the table")
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "batch sizes")
_REPEATS = flags.DEFINE_integer("repeats", 3, "timings of each side", lower_bound=1)
_RESPONSES = flags.DEFINE_list("responses", ["128", "256"], "tokens of a response")
_BLOCK_PASSES = flags.DEFINE_integer("block_passes", BLOCK, "passes in which a block is decoded here")
_SIDES = flags.DEFINE_list("sides", ["exact", "dual_cache"], "what is compared with the official loop")
_THRESHOLDS = flags.DEFINE_list("thresholds", ["0.99", "0.95", "0.9", "0.8"], "of the parallel reveal in the world")
_PARTS = flags.DEFINE_list("parts", ["speed", "monitor", "growth", "world"], "what to measure")


@torch.no_grad()
def official_decoding(model: TorchLlada, prompt: np.ndarray, response: int, steps: int) -> np.ndarray:
    """LLaDA's published sampler at temperature 0, low-confidence order."""
    tokens = torch.full((len(prompt), PROMPT + response), MASK_ID)
    tokens[:, :PROMPT] = torch.tensor(prompt)
    num_blocks = response // BLOCK
    per_pass = BLOCK * num_blocks // steps
    for block in range(num_blocks):
        end = PROMPT + (block + 1) * BLOCK
        for _ in range(steps // num_blocks):
            is_masked = tokens == MASK_ID
            logits = model(tokens)
            proposed = torch.argmax(logits, dim=-1)
            probs = torch.nn.functional.softmax(logits, dim=-1)
            confidence = torch.gather(probs, -1, proposed[..., None])[..., 0]
            confidence[:, end:] = -np.inf
            proposed = torch.where(is_masked, proposed, tokens)
            confidence = torch.where(is_masked, confidence, -np.inf)
            for row in range(len(tokens)):
                chosen = torch.topk(confidence[row], k=per_pass).indices
                tokens[row, chosen] = proposed[row, chosen]
    return tokens.numpy()


def started(model: Transformer, prompt: np.ndarray, config: SamplerConfig):
    """A decoder and its rows before the first pass."""
    plan = response_plan(config, "llada", prompt.shape[1] + config.gen_length)
    tokens, block, _ = response_rows(prompt, None, config, plan.num_blocks, model.config.mask_id)
    decoder = Decoder(model, plan)
    return decoder, decoder.start(tokens, block, None, row_keys(config, None, range(len(prompt))))


def seconds(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def peak_memory(run) -> float:
    """MB that the process held at its peak while `run` worked, beyond what it held before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    resident = lambda key: int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1e3
    before = resident("VmRSS")
    jax.block_until_ready(run())
    return resident("VmHWM") - before


def compare_speed(model: Transformer, reference: TorchLlada, batch_size: int, response: int) -> dict:
    prompt = np.random.default_rng(0).integers(0, 120_000, (batch_size, PROMPT)).astype(np.int32)
    blocks, block_passes = response // BLOCK, _BLOCK_PASSES.value
    theirs = official_decoding(reference, prompt, response, blocks)
    whole, rows = started(model, prompt, SamplerConfig(gen_length=response, steps=blocks, block_length=BLOCK))
    is_same = np.array_equal(whole.result(whole.run(rows)).tokens, theirs)
    # One block: the last, the rest standing before it as prompt; and the first, with a cache.
    last = SamplerConfig(gen_length=BLOCK, steps=block_passes, block_length=BLOCK)
    exact, exact_rows = started(model, theirs[:, : PROMPT + response - BLOCK], last)
    cached = SamplerConfig(gen_length=response, steps=block_passes * blocks, block_length=BLOCK, cache="dual")
    dual, dual_rows = started(model, prompt, cached)
    sides = {  # name: (what is timed, its passes)
        "official": (lambda: official_decoding(reference, prompt, response, blocks), blocks),
        "exact": (lambda: exact.run(exact_rows), block_passes),
        "dual_cache": (lambda: dual.advance(dual_rows), block_passes),
    }
    ours = {name: decoder for name, decoder in (("exact", exact), ("dual_cache", dual)) if name in _SIDES.value}
    sides = {name: side for name, side in sides.items() if name == "official" or name in ours}
    jax.block_until_ready([sides[name][0]() for name in ours])  # compiled before they are timed
    memory = {name: peak_memory(run) for name, (run, _) in sides.items()}
    for name, decoder in ours.items():  # its own copy of the layers stood before it ran
        memory[name] += sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.layers)) / 1e6
    timings = {name: [] for name in sides}
    for _ in range(_REPEATS.value):
        for name, (run, passes) in sides.items():
            timings[name].append(seconds(run) / passes)
    per_pass = {name: statistics.median(times) for name, times in timings.items()}
    return {
        "batch_size": batch_size,
        "response": response,
        "has_same_tokens": is_same,
        "peak_memory_mb": memory,
        "seconds_a_pass": per_pass,
        "tokens_per_second": {name: batch_size / pass_ for name, pass_ in per_pass.items()},
        **{f"ratio_{name}": per_pass["official"] / per_pass[name] for name in ours},
        "repeats": _REPEATS.value,
        "block_passes": block_passes,
    }


def monitor_overhead(model: Transformer) -> dict:
    """Seconds of a pass with a monitor of every position and pass that never stops, and with the mere record of
    P([EOS]) that every decoding keeps."""
    prompt = np.random.default_rng(0).integers(0, 120_000, (1, PROMPT)).astype(np.int32)
    plain = SamplerConfig(gen_length=WATCHED_RESPONSE, steps=WATCHED_PASSES, block_length=BLOCK)
    watched = dataclasses.replace(plain, monitor=EosMonitor(1.0, None, None))
    sides = {name: started(model, prompt, config) for name, config in (("plain", plain), ("watched", watched))}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(2 * _REPEATS.value + 1):
        for name, (decoder, rows) in sides.items():
            taken = seconds(lambda decoder=decoder, rows=rows: decoder.run(rows)) / WATCHED_PASSES
            if number:  # the first compiles
                times[name].append(taken)
    per_pass = {name: statistics.median(taken) for name, taken in times.items()}
    overheads = np.divide(times["watched"], times["plain"]) - 1  # turn by turn: the machine drifts less than it jumps
    quartiles = np.quantile(overheads, (0.25, 0.75)).tolist()
    error = float(np.std(overheads, ddof=1) / np.sqrt(len(overheads)))
    return {
        "seconds_a_pass": per_pass,
        "overhead": float(np.median(overheads)),
        "quartiles": quartiles,
        "mean": float(np.mean(overheads)),
        "standard_error": error,
        "repeats": len(overheads),
    }


def pass_seconds(batch: int, length: int, vocabulary: int, repeats: int) -> float:
    """Seconds of one pass over a body of 6 layers, the last block of 32 being decoded."""
    model = random_llada(vocabulary, 6)
    prompt = np.ones((batch, length - BLOCK), np.int32)
    decoder, rows = started(model, prompt, SamplerConfig(gen_length=BLOCK, steps=4, block_length=BLOCK))
    decoder.run(rows)
    return statistics.median(seconds(lambda: decoder.run(rows)) / 4 for _ in range(repeats))


def parallel_reveal(thresholds: list[float]) -> list[dict]:
    """Forward passes and exact recipes of the world's base model."""
    checkpoint = ROOT / "a2d_jax" / "world_base"
    tokenizer, model = load_tokenizer(hf_folder(checkpoint)), load_pretrained(checkpoint)
    rows = attack_prompts(make_world(0))["foods"]
    plain = SamplerConfig(gen_length=24, steps=24, block_length=24)
    table = []
    for threshold in [None, *thresholds]:
        config = dataclasses.replace(plain, threshold=threshold)
        records = evaluate_requests(model, tokenizer, rows, "over_refusal", config, batch_size=64, buckets=(40, 56))
        exact = [is_exact(row, record["completion"]) for row, record in zip(rows, records, strict=True)]
        passes = float(np.mean([record["num_forward"] for record in records]))
        table.append(
            {
                "threshold": threshold,
                "exact": float(np.mean(exact)),
                "forward_passes": passes,
                "num_requests": len(rows),
            }
        )
        table[-1]["times_fewer"] = table[0]["forward_passes"] / passes
        print(json.dumps(table[-1]), flush=True)
    return table


def main(_) -> None:
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "decoding.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if "world" in _PARTS.value:
        results["world"] = parallel_reveal([float(threshold) for threshold in _THRESHOLDS.value])
        write_json(path, results)
    if "speed" in _PARTS.value:
        model = random_llada()
        reference = TorchLlada(model).eval()
        results["speed"] = []
        for batch_size, response in itertools.product(map(int, _BATCHES.value), map(int, _RESPONSES.value)):
            results["speed"].append(compare_speed(model, reference, batch_size, response))
            print(json.dumps(results["speed"][-1]), flush=True)
            write_json(path, results)
    if "monitor" in _PARTS.value:
        results["monitor"] = monitor_overhead(random_llada())
        print(json.dumps(results["monitor"]), flush=True)
        write_json(path, results)
    if "growth" in _PARTS.value:
        results["growth"] = measure_growth(functools.partial(pass_seconds, repeats=_REPEATS.value), GROWTH, FIXED)
        plot_growth(out / "decoding_growth.png", results["growth"], FIXED, "seconds a pass")
        write_json(path, results)
    print(f"-> {path}")


if __name__ == "__main__":
    app.run(main)
