"""A step compiled for a slice, and what the compiled program tells: memory, FLOPs, collectives, roofline.

`compile_step` gives the numbers of one chip under the names that the docstring of `launch/compile.py` explains.
"""

import collections
import re
import time
from pathlib import Path
from typing import Any

import jax

from launch.chips import Topology
from launch.steps import Step
from launch.tally import Tally, count

_EFFORT = "exec_time_optimization_effort"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}


def used_bytes(message: str) -> float | None:
    """Bytes of HBM that the compiler would have needed, from either form of its refusal."""
    found = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm", message)
    found = found or re.search(r"HLO temporaries \(([\d.]+)([KMG]?)\) exceeds", message)
    return float(found[1]) * _UNITS[found[2]] if found else None


def compile_step(step: Step, topology: Topology, hlo_path: Path | None = None, effort: float = 0.0) -> dict[str, Any]:
    """Compiles and measures; the numbers of one chip, under the names that `launch/compile.py` explains.

    Args:
      hlo_path: where to write the compiled program, for those who want to read it.
      effort: of the compiler, -1 to 1, for a fast program.
    """
    if hlo_path is not None:
        hlo_path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    lowered = step.lower()
    hbm = topology.chip.hbm_bytes
    head = {"topology": topology.name, "num_chips": topology.num_chips, "mesh": dict(step.mesh.shape)}
    model_flops = None if step.model_flops is None else step.model_flops / topology.num_chips
    try:
        compiled = lowered.compile(compiler_options={_EFFORT: effort} if effort else None)
    except jax.errors.JaxRuntimeError as error:
        needed = used_bytes(str(error))
        if needed is None:
            raise
        empty = dict.fromkeys(("argument_bytes", "temp_bytes", "hlo_flops", "roofline_seconds", "roofline_mfu"))
        return head | empty | {
            "fits": False, "needed_bytes": needed, "hbm_bytes": hbm, "model_flops": model_flops,
            "collective_bytes": {}, "compile_seconds": time.monotonic() - started,
        }  # fmt: skip
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    new_outputs = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new_outputs
    text = compiled.as_text()
    if hlo_path is not None:
        hlo_path.write_text(text, encoding="utf-8")
    tally = count(text, step.mesh.shape)
    times = roofline(tally, topology)
    slowest = max(times.values())
    return head | {
        "fits": needed <= hbm,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "needed_bytes": needed,
        "hbm_bytes": hbm,
        "hlo_flops": tally.flops,
        "model_flops": model_flops,
        "flops_ratio": model_flops and tally.flops / model_flops,
        "memory_traffic_bytes": tally.memory_bytes,
        "collective_bytes": by_kind(tally),
        "collective_bytes_alone": by_kind(tally, is_async=False),
        "num_unknown_loops": tally.num_unknown_loops,
        "roofline": times,
        "roofline_seconds": slowest,
        "roofline_mfu": model_flops and model_flops / (slowest * topology.chip.peak_flops),
        "compile_seconds": seconds,
    }


def roofline(tally: Tally, topology: Topology) -> dict[str, float]:
    """Seconds that each resource of a chip needs by itself, everything else being free and perfectly overlapped."""
    chip = topology.chip
    sent = sum(collective.num_bytes for collective in tally.collectives)
    return {
        "arithmetic": tally.mxu_flops / chip.peak_flops,
        "memory": tally.memory_bytes / chip.hbm_bandwidth,
        "interconnect": sent / topology.ici_bandwidth if sent else 0.0,
    }


def by_kind(tally: Tally, is_async: bool | None = None) -> dict[str, float]:
    """Bytes sent, by "axes/kind"; of those beside other work (True), alone (False), or all (None)."""
    total = collections.Counter()
    for collective in tally.collectives:
        if is_async is None or collective.is_async == is_async:
            total[f"{collective.axes}/{collective.kind}"] += collective.num_bytes
    return dict(total.most_common())
