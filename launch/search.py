"""The search of `launch.compile --search`: mesh x rematerialisation x micro-batches of a training config.

Every candidate is first estimated by hand: what must be in memory (weights, moments, gradients, saved activations) and
what arithmetic, interconnect and the reading of weights need at least. Those that cannot fit are dropped, the rest
compiled from the fastest estimate on, until none is left whose estimate beats the best that was compiled; those that
fit are ranked by the roofline of the compiled program. A search that was stopped continues from what it wrote.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from a2d_jax.config import ModelConfig
from a2d_jax.settings import RunConfig
from a2d_jax.throughput import forward_flops, train_flops
from launch.chips import GB, Topology
from launch.compiled import compile_step
from launch.settings import architecture
from launch.steps import train_step

# What the backward pass finds in memory of a token and layer: widths D, and widths and mlp widths F split by `tensor`.
_SAVED = {"full": (1, 0, 0), "dots": (3, 3, 2), "none": (8, 6, 5)}
_RECOMPUTED = {"full": 4 / 3, "dots": 1.02, "none": 1.0}


class Candidate(NamedTuple):
    data: int
    fsdp: int
    tensor: int
    remat: str
    grad_accum_steps: int

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with these settings."""
        config = copy.deepcopy(dict(config))
        config["mesh"] = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        config["remat"], config["grad_accum_steps"] = self.remat, self.grad_accum_steps
        return config


class Estimate(NamedTuple):
    """Of one chip, by hand; seconds: the largest of the times of arithmetic, interconnect and memory; their sum."""

    memory_bytes: float
    seconds: float
    total_seconds: float


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def meshes(num_chips: int, num_heads: int, num_kv_heads: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) sizes that use all chips and cut no head."""
    for tensor in divisors(math.gcd(num_heads, num_kv_heads)):
        if num_chips % tensor == 0:
            for fsdp in divisors(num_chips // tensor):
                yield num_chips // tensor // fsdp, fsdp, tensor


def candidates(run: RunConfig, model: ModelConfig, num_chips: int) -> Iterator[Candidate]:
    for data, fsdp, tensor in meshes(num_chips, model.num_heads, model.num_kv_heads):
        for parts in divisors(run.batch_size):
            if run.batch_size % (data * fsdp * parts) == 0:
                for remat in _SAVED:
                    yield Candidate(data, fsdp, tensor, remat, parts)


def estimate(candidate: Candidate, run: RunConfig, model: ModelConfig, topology: Topology) -> Estimate:
    """Lower bounds: what no compiler can avoid."""
    length = max(run.data.buckets or (run.data.row_length,))
    rows = candidate.data * candidate.fsdp  # chips that share the batch
    shards = candidate.fsdp * candidate.tensor  # chips that share the weights
    num_params = forward_flops(model, 1, 1)[0] / 2 + model.vocab_size * model.width
    item = 2 if run.dtypes.compute == "bfloat16" else 4

    # Trained weights: float32, two moments, and a gradient. Frozen ones: as stored.
    stored = 16.0 if run.lora is None else (2.0 if run.dtypes.param == "bfloat16" else 4.0)
    tokens = run.batch_size * length / rows / candidate.grad_accum_steps
    whole, split, mlps = _SAVED[candidate.remat]
    numbers = whole * model.width + (split * model.width + mlps * model.mlp_dim) / candidate.tensor
    saved = tokens * item * model.num_layers * numbers
    memory = num_params * stored / shards + saved

    flops = train_flops(model, run.lora, 0, run.batch_size * length, length) / topology.num_chips
    arithmetic = flops * _RECOMPUTED[candidate.remat] / topology.chip.peak_flops

    # Weights are gathered for each direction, gradients reduced once. Activations are summed over `tensor` twice a
    # direction, and once more where the backward pass computes them again.
    parts = candidate.grad_accum_steps
    gathered = 2 * parts * item * num_params / candidate.tensor * (1 - 1 / candidate.fsdp)
    if run.lora is None:
        gathered += parts * item * num_params / candidate.tensor * (1 - 1 / rows)
    num_sums = (5 if candidate.remat == "full" else 4) * parts * model.num_layers
    summed = num_sums * 2 * tokens * item * model.width * (1 - 1 / candidate.tensor)
    interconnect = (gathered + summed) / topology.ici_bandwidth if topology.num_chips > 1 else 0.0

    # A pass reads its chip's weights, gathered; a part adds its gradients to the sum; AdamW reads four, writes three.
    touched = (3 if candidate.remat == "full" else 2) * parts * item * num_params / candidate.tensor
    if run.lora is None:
        touched += (28 + 8 * (parts - 1)) * num_params / shards
    times = arithmetic, interconnect, touched / topology.chip.hbm_bandwidth
    return Estimate(memory, max(times), sum(times))


def search(
    config: Mapping[str, Any], topology: Topology, devices, limit: int, name: str, say: Callable[[str], None],
    effort: float = 0.0, earlier: Mapping[str, Any] | None = None, keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The best compiled candidate, with the table of all that were compiled under "candidates".

    Args:
      limit: how many candidates to compile.
      effort: of the compiler.
      earlier: what a search returned or kept; what it compiled of the same config at the same effort is not repeated.
      keep: is given the state of the search after each candidate.
    """
    run = RunConfig.from_dict(config)
    model = architecture(run.model.checkpoint)
    estimates = {c: estimate(c, run, model, topology) for c in candidates(run, model, topology.num_chips)}
    fitting = {c: e for c, e in estimates.items() if e.memory_bytes < topology.chip.hbm_bytes}
    if not fitting:
        raise ValueError(f"nothing fits {topology.name}: the weights alone take more; use a larger slice or LoRA.")
    chosen = sorted(fitting, key=lambda c: (fitting[c].seconds, fitting[c].total_seconds))[:limit]
    say(f"search       {len(estimates)} candidates, {len(fitting)} may fit; compiling {len(chosen)} at most")

    asked = {"topology": topology.name, "effort": effort, "settings": json.loads(json.dumps(config))}
    known = {}
    if earlier is not None and earlier.get("asked") == asked:
        known = {Candidate(**result["candidate"]): result for result in earlier["candidates"]}
    results, best, seconds = [], math.inf, []
    for number, candidate in enumerate(chosen):
        if fitting[candidate].seconds >= best:
            say(f"  the other {len(chosen) - number} need {fitting[candidate].seconds * 1e3:.0f} ms at least")
            break
        result = known.get(candidate)
        if result is None:
            result = compile_step(train_step(candidate.apply(config), devices), topology, effort=effort)
            result |= {"candidate": candidate._asdict(), "estimated_seconds": fitting[candidate].seconds}
            seconds.append(result["compile_seconds"])
        results.append(result)
        speed = "DOES NOT FIT"
        if result["fits"]:
            best = min(best, result["roofline_seconds"])
            speed = f"FITS  {result['roofline_seconds'] * 1e3:.0f} ms"
            if result["roofline_mfu"] is not None:
                speed += f", MFU at most {result['roofline_mfu']:.1%}"
        remaining = sum(seconds) / max(len(seconds), 1) * (len(chosen) - number - 1)
        say(
            f"  {candidate.data} x {candidate.fsdp} x {candidate.tensor}  remat {candidate.remat:4}  parts "
            f"{candidate.grad_accum_steps}  {result['needed_bytes'] / GB:.2f} GB  {speed}; "
            f"estimate {fitting[candidate].seconds * 1e3:.0f} ms  ETA {remaining:.0f} s"
        )
        ranked = sorted(results, key=lambda r: (not r["fits"], r["roofline_seconds"] or math.inf))
        found = {"config": name, "step": "train", "asked": asked} | ranked[0] | {"candidates": ranked}
        if keep is not None:
            keep(found)
    return found
