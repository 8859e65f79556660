"""Program: compiles a step for a TPU slice without a TPU, and says whether it fits and how fast it can be.

    python -m launch.compile --config configs/llada_8b_a2d_full.py --topology v5e:4x4
    python -m launch.compile --config configs/llada_8b_a2d_full.py --topology v5e:4x4 --config.mesh.tensor=4
    python -m launch.compile --config configs/llama_2_70b_odlri.py --topology v5p:2x2x4 --step calibrate
    python -m launch.compile --config configs/llama_2_70b_odlri.py --topology v5p:2x2x4 --shape 8192,28672 --effort -1
    python -m launch.compile --config configs/llada_8b_a2d_full.py --topology v5e:4x4 --search

Needs libtpu, the TPU compiler (`make env-tpu`; Linux x86-64). Only shapes exist here: a model of 70 B parameters takes
no memory. The checkpoint that a config names need not be there if configs/models/ holds its architecture.

It prints a table and writes JSON, all numbers of one chip: argument_bytes + temp_bytes against hbm_bytes; hlo_flops of
the compiled program (loops counted as often as they run) against model_flops that the method needs, so that their
ratio is what recomputation costs; bytes that the chip sends in collectives, by mesh axes and kind, and whether they run
beside other work; roofline_seconds, the largest of the times that arithmetic, memory and interconnect need at their
published rates, and the share of the peak that model_flops are at that speed (roofline_mfu): no run can be faster.

--effort is the compiler's, -1 to 1. It spends most of its time on the tiling of products, for one in full float32 ten
seconds and more of a core: a decomposition, which has thirty of them, compiles in a minute at -1 and not in ten at 0.

--search tries meshes, rematerialisation and micro-batches of a training config: see `launch/search.py`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from a2d_jax.files import write_json
from launch.chips import GB, parse_topology, topology_devices
from launch.compiled import compile_step
from launch.search import search
from launch.settings import STEPS
from launch.steps import BUILDERS


def describe(title: str, result: Mapping[str, Any], chip_peak: float) -> str:
    """The result for people."""
    size = lambda n: f"{n / GB:.2f} GB"
    lines = [
        f"step         {title}",
        f"slice        {result['topology']}, {result['num_chips']} chips, mesh {result['mesh']}",
        f"memory       {size(result['needed_bytes'])} of {size(result['hbm_bytes'])} a chip: "
        f"{'FITS' if result['fits'] else 'DOES NOT FIT'}",
    ]
    if result["hlo_flops"] is None:
        return "\n".join([*lines, f"compiled     refused after {result['compile_seconds']:.0f} s"])
    lines[-1] += f" (arguments {size(result['argument_bytes'])}, temporaries {size(result['temp_bytes'])})"
    flops = f"FLOPs        {result['hlo_flops']:.3e} compiled"
    if result["model_flops"]:
        flops += f", {result['model_flops']:.3e} needed, ratio {result['flops_ratio']:.3f}"
    lines.append(flops)
    for name, sent in result["collective_bytes"].items():
        alone = result["collective_bytes_alone"].get(name, 0.0)
        lines.append(f"sends        {size(sent):>10} {name}, {1 - alone / sent:.0%} beside other work")
    if result["num_unknown_loops"]:
        lines.append(f"loops        {result['num_unknown_loops']} depend on data: counted once")
    times = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in result["roofline"].items())
    lines.append(f"roofline     {result['roofline_seconds'] * 1e3:.1f} ms a step ({times})")
    if result["roofline_mfu"] is not None:
        lines.append(f"MFU          at most {result['roofline_mfu']:.1%} of {chip_peak / 1e12:.0f} TFLOP/s")
    return "\n".join([*lines, f"compiled     in {result['compile_seconds']:.0f} s"])


def name_of(config_path: str) -> str:
    """Name of a config file, whose path may end in an argument: that of configs/NAME.py:ARGUMENT is NAME."""
    return Path(config_path.partition(":")[0]).stem


def default_out(config_name: str, topology: str, step: str) -> Path:
    return Path("compile_out") / f"{config_name}-{step}-{topology.replace(':', '-')}.json"


def matrix_shape(values: Sequence[str]) -> tuple[int, int]:
    """--shape 4096,12288."""
    if len(values) != 2 or not all(v.isdigit() and int(v) > 0 for v in values):
        raise ValueError(f"--shape={','.join(values)}: give outputs and inputs of a matrix, such as 4096,12288.")
    return int(values[0]), int(values[1])


def main(_) -> None:
    values = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # what is compiled for a chip elsewhere cannot be read back
    config_name = name_of(config_flags.get_config_filename(values["config"]))
    config = values.config.to_dict()
    kind = values.step or config.pop("step", "train")
    config.pop("step", None)
    topology = parse_topology(values.topology)
    out = Path(values.out) if values.out else default_out(config_name, topology.name, kind)
    devices = topology_devices(topology)
    if values.search:
        if kind != "train":
            raise ValueError(f"--search varies training steps; {config_name} describes a {kind} step.")
        out = Path(values.out) if values.out else default_out(config_name, topology.name, "search")
        out.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else None
        say = functools.partial(print, flush=True)
        keep = functools.partial(write_json, out)
        result = search(config, topology, devices, values.search_limit, config_name, say, values.effort, earlier, keep)
    else:
        if values.shape and kind != "decompose":
            raise ValueError(f"--shape names the matrix of a decompose step; {config_name} describes a {kind} step.")
        shape = {"shape": matrix_shape(values.shape)} if values.shape else {}
        step = BUILDERS[kind](config, devices, **shape)
        result = (
            {"config": config_name, "step": kind}
            | shape
            | compile_step(step, topology, Path(values.hlo) if values.hlo else None, values.effort)
        )
        print(describe(step.title, result, topology.chip.peak_flops))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(f"written      {out}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "what to compile: a file of configs/")
    flags.DEFINE_string("topology", None, 'the slice, such as "v5e:4x4"', required=True)
    flags.DEFINE_enum("step", None, STEPS, "which step; by default what the config describes")
    flags.DEFINE_string("out", None, "JSON file; by default compile_out/CONFIG-STEP-SLICE.json")
    flags.DEFINE_string("hlo", None, "file for the compiled program's text")
    flags.DEFINE_list("shape", [], "decompose: the matrix, outputs,inputs; by default the one that costs most")
    flags.DEFINE_float("effort", 0.0, "of the compiler, -1 to 1, for a fast program", -1.0, 1.0)
    flags.DEFINE_bool("search", False, "try meshes, remat and micro-batches; rank those that fit")
    flags.DEFINE_integer("search_limit", 6, "how many candidates --search compiles", lower_bound=1)
    flags.mark_flag_as_required("config")
    app.run(main)
