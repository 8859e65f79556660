r"""Program: what compression does to an aligned model: attack success, answers and rejection against bits a weight.

    python -m odlri_jax.safety_study --out DIR --checkpoints base=HF_DIR,a2d=HF_DIR \
        --calibration_rows harmless=retain.jsonl,harmful=harmful.jsonl --bits 4,3,2 --ranks 8,16 \
        --prompts dija=dija.json,fits=fits.json,zero_shot=zero_shot.json --harmless foods=foods.json \
        --judge a2d_jax.world:judge --answer_judge a2d_jax.world:is_exact --gen_length 24 --steps 24 \
        [--align base --align_config configs/world_a2d.py:WORLD]

Every checkpoint is measured as it is (32 bits, and in bfloat16), then calibrated on each source of rows and, where
there are two or more, on a mixture with as many windows from each; then compressed with every number of bits, rank and
start, and measured again. --align does the alternative: it compresses the named checkpoint, which was not aligned, and
trains the factors of the packed model with the A2D loss. Each step is one of the programs of the two packages, in a
folder of its own, and resumes. Compressed models are measured as their dense exports, which compute the same and share
the compiled programs of the others.

    OUT/calibrations, OUT/packed, OUT/aligned, OUT/dense, OUT/evaluations
    OUT/results.json   one record a variant: bits a weight, error, success by attack, share answered, AUC of P([EOS]);
                       requests without a verdict count against the model
    OUT/results.md, results.png
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from a2d_jax import evaluate
from a2d_jax.batching import DEFAULT_BUCKETS
from a2d_jax.config import load_config
from a2d_jax.files import write_beside, write_json
from a2d_jax.folders import hf_folder
from a2d_jax.judges.loading import JudgeSettings, define_judge_flags, judge_settings_from_flags
from a2d_jax.plots import plt, save_figure
from a2d_jax.progress import clock
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampler_flags import define_sampler_flags, sampler_config_from_flags
from a2d_jax.scores import first_step_auc, share
from a2d_jax.stages import claim_folder, exit_if_stopped, train
from odlri_jax import calibrate, compress
from odlri_jax.decompose import check_shape
from odlri_jax.decompose_config import INITS, DecomposeConfig
from odlri_jax.export import export
from odlri_jax.matrices import list_matrices
from odlri_jax.packed_io import MANIFEST_NAME
from odlri_jax.report import REPORT_NAME

MIXTURE = "mixture"
ZERO_SHOT = "zero_shot"  # the attack whose first step tells harmful from harmless requests


@dataclasses.dataclass(frozen=True)
class SafetyStudyConfig:
    """One study; the flags of the program describe the fields."""

    out: Path
    checkpoints: Mapping[str, str]
    calibration_rows: Mapping[str, str]
    prompts: Mapping[str, str]
    harmless: Mapping[str, str]
    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    inits: tuple[str, ...]
    judge: str
    answer_judge: str
    sampler: SamplerConfig
    decompose: DecomposeConfig
    num_windows: int = 256
    batch_size: int = 64
    buckets: tuple[int, ...] = DEFAULT_BUCKETS
    judge_settings: JudgeSettings = JudgeSettings()
    seed: int = 0
    align: str | None = None
    align_config: str | None = None
    align_bits: tuple[int, ...] = ()
    align_calibrations: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model to measure; `calibration` None: not compressed, `bits` being those of its number format."""

    model: str
    bits: int
    calibration: str | None = None
    rank: int = 0
    init: str = ""
    is_aligned_after: bool = False

    @property
    def packed_name(self) -> str:
        return f"{self.model}_{self.calibration}_q{self.bits}_r{self.rank}_{self.init}"

    @property
    def name(self) -> str:
        if self.calibration is None:
            return f"{self.model}_{self.bits}"
        return self.packed_name + ("_aligned" if self.is_aligned_after else "")


def sources(config: SafetyStudyConfig) -> dict[str, tuple[str, ...]]:
    """Calibration -> its files: each alone, and all together."""
    alone = {name: (file,) for name, file in config.calibration_rows.items()}
    return alone | ({MIXTURE: tuple(config.calibration_rows.values())} if len(alone) > 1 else {})


def list_variants(config: SafetyStudyConfig) -> list[Variant]:
    """Everything to measure, in order; the uncompressed models first."""
    plain = [Variant(model, bits) for model in config.checkpoints for bits in (32, 16)]
    settings = list(itertools.product(sources(config), config.bits, config.ranks, config.inits))
    packed = [
        Variant(model, bits, calibration, rank, init)
        for model in config.checkpoints
        for calibration, bits, rank, init in settings
    ]
    aligned = [
        dataclasses.replace(v, is_aligned_after=True)
        for v in packed
        if v.model == config.align
        and v.bits in (config.align_bits or config.bits)
        and v.calibration in (config.align_calibrations or sources(config))
    ]
    return plain + packed + aligned


# -- making the models ------------------------------------------------------------------------------------------------


def calibrated(config: SafetyStudyConfig, variant: Variant) -> Path:
    """The folder of H for a model and a source of rows."""
    folder = config.out / "calibrations" / f"{variant.model}_{variant.calibration}"
    given = calibrate.CalibrateConfig(
        checkpoint=config.checkpoints[variant.model],
        out=str(folder),
        rows=sources(config)[variant.calibration],
        num_windows=config.num_windows,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    exit_if_stopped(calibrate.run(given))
    return folder


def decomposition(config: SafetyStudyConfig, variant: Variant) -> DecomposeConfig:
    """How the matrices of a variant are decomposed."""
    return dataclasses.replace(config.decompose, q_bits=variant.bits, rank=variant.rank, init=variant.init)


def packed(config: SafetyStudyConfig, variant: Variant) -> tuple[Path, dict[str, float]]:
    """The packed folder of a variant, and the summary of its report."""
    folder = config.out / "packed" / variant.packed_name
    if not (folder / MANIFEST_NAME).is_file():
        settings = decomposition(config, variant)
        moments = calibrated(config, variant)
        compress.run(
            compress.CompressConfig(
                config.checkpoints[variant.model], str(moments), str(folder), settings, seed=config.seed
            )
        )
    return folder, json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))["summary"]


def aligned(config: SafetyStudyConfig, variant: Variant) -> Path:
    """The training folder of a packed model whose factors learned to put [EOS]."""
    folder = config.out / "aligned" / variant.packed_name
    return train(config.align_config, folder, packed(config, variant)[0], config.seed)


def dense(config: SafetyStudyConfig, variant: Variant, checkpoint: Path) -> Path:
    """The matrices Q + L R of a packed model, in float32."""
    folder = config.out / "dense" / variant.name
    if not (folder / "config.json").is_file():
        export(str(checkpoint), folder, "dense", "float32")
    return folder


# -- measuring them ---------------------------------------------------------------------------------------------------


def evaluated(
    config: SafetyStudyConfig, variant: Variant, checkpoint: Path | str, attack: str, prompts: str, name: str
):
    return evaluate.run(
        evaluate.EvaluationConfig(
            checkpoint=str(checkpoint),
            attack=attack,
            prompts=prompts,
            out=str(config.out / "evaluations" / variant.name / name),
            judge=config.answer_judge if attack == "over_refusal" else config.judge,
            judge_settings=config.judge_settings,
            sampler=config.sampler,
            batch_size=config.batch_size,
            buckets=config.buckets,
            seed=config.seed,
            dtype="bfloat16" if variant.bits == 16 else "float32",
        )
    )


def measure(config: SafetyStudyConfig, variant: Variant) -> dict[str, Any]:
    """The record of one variant."""
    bits, error = float(variant.bits), 0.0
    checkpoint: Path | str = config.checkpoints[variant.model]
    if variant.calibration is not None:
        checkpoint, summary = packed(config, variant)
        bits, error = summary["bits_per_weight"], summary["mean_error"]
        if variant.is_aligned_after:
            checkpoint = aligned(config, variant)
        checkpoint = dense(config, variant, checkpoint)
    attacks = {
        name: evaluated(config, variant, checkpoint, name, prompts, name) for name, prompts in config.prompts.items()
    }
    harmless = {
        name: evaluated(config, variant, checkpoint, "over_refusal", prompts, name)
        for name, prompts in config.harmless.items()
    }
    separation = None
    if ZERO_SHOT in attacks:
        answers = [request for scores in harmless.values() for request in scores["requests"]]
        separation = first_step_auc(attacks[ZERO_SHOT]["requests"], answers)
    return {
        **dataclasses.asdict(variant),
        "name": variant.name,
        "bits_per_weight": bits,
        "mean_error": error,
        "success": {name: share(scores, unscored=1.0) for name, scores in attacks.items()},
        "answered": {name: share(scores, unscored=0.0) for name, scores in harmless.items()},
        "auc": separation,
    }


# -- what it shows ----------------------------------------------------------------------------------------------------


def safe_variants(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compressed variants of each model under which no attack succeeds more often than on the model itself."""
    whole = {record["model"]: record["success"] for record in records if record["bits"] == 32}
    return [
        record["name"]
        for record in records
        if record["calibration"] and all(record["success"][n] <= s for n, s in whole[record["model"]].items())
    ]


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    attacks, harmless = list(records[0]["success"]), list(records[0]["answered"])
    columns = ["model", "calibration", "start", "Q bits", "rank", "bits a weight", "error"]
    columns += [f"{name}, success" for name in attacks] + [f"{name}, answered" for name in harmless] + ["AUC"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for record in records:
        model = record["model"] + (", then aligned" if record["is_aligned_after"] else "")
        cells = [model, record["calibration"] or "-", record["init"] or "-", str(record["bits"])]
        cells += [str(record["rank"] or "-"), f"{record['bits_per_weight']:.2f}", f"{record['mean_error']:.3f}"]
        cells += [f"{record['success'][name]:.1%}" for name in attacks]
        cells += [f"{record['answered'][name]:.1%}" for name in harmless]
        lines.append("| " + " | ".join([*cells, "-" if record["auc"] is None else f"{record['auc']:.4f}"]) + " |")
    return "\n".join(lines) + "\n"


def plot(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A column a model: the worst attack and the share of harmless requests answered, against bits a weight."""
    models = list(dict.fromkeys((record["model"], record["is_aligned_after"]) for record in records))
    figure, panels = plt.subplots(
        2, len(models), figsize=(4.5 * len(models), 6), sharex=True, sharey="row", squeeze=False
    )
    colors = {
        name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["calibration"] for r in records if r["calibration"]))
    }
    for column, (model, is_after) in enumerate(models):
        own = [r for r in records if r["model"] == model and r["is_aligned_after"] == is_after]
        for calibration in dict.fromkeys(r["calibration"] for r in own if r["calibration"]):
            points = sorted(
                (r for r in own if r["calibration"] in (calibration, None)), key=lambda r: r["bits_per_weight"]
            )
            bits = [r["bits_per_weight"] for r in points]
            worst = [100 * max(r["success"].values()) for r in points]
            answered = [100 * np.mean(list(r["answered"].values())) for r in points]
            panels[0, column].plot(bits, worst, "o-", color=colors[calibration], markersize=4, label=calibration)
            panels[1, column].plot(bits, answered, "o-", color=colors[calibration], markersize=4, label=calibration)
        panels[0, column].set_title(model + (", aligned after compression" if is_after else ""))
        panels[1, column].set(xlabel="bits a weight", xscale="log")
        panels[1, column].set_xticks([2, 3, 4, 6, 8, 16, 32], ["2", "3", "4", "6", "8", "16", "32"])
        panels[1, column].minorticks_off()
    panels[0, 0].set_ylabel("success of the worst attack, %")
    panels[1, 0].set_ylabel("harmless requests answered, %")
    panels[0, 0].legend(title="calibration", fontsize="small")
    save_figure(path, figure)


# -- the program ------------------------------------------------------------------------------------------------------


def check(config: SafetyStudyConfig) -> None:
    """ValueError for what would fail after hours."""
    if MIXTURE in config.calibration_rows:
        raise ValueError(f"--calibration_rows: {MIXTURE!r} is the name of all of them together; choose another name.")
    files = {**config.calibration_rows, **config.prompts, **config.harmless}
    absent = [f"{name}={file}" for name, file in files.items() if not Path(file).exists()]
    if absent:
        raise ValueError(f"no such file: {', '.join(absent)}.")
    if (config.align is None) != (config.align_config is None):
        raise ValueError("--align and --align_config go together: the checkpoint to align, and the training config.")
    if config.align is not None and config.align not in config.checkpoints:
        raise ValueError(f"--align={config.align} is none of the checkpoints {sorted(config.checkpoints)}.")
    chosen = {*config.align_bits} - {*config.bits} | {*config.align_calibrations} - {*sources(config)}
    if chosen:
        raise ValueError(f"--align_bits, --align_calibrations: {sorted(map(str, chosen))} is not compressed to or on.")
    unknown = sorted(set(config.inits) - set(INITS))
    if unknown:
        raise ValueError(f"--inits={','.join(unknown)}: no such start; choose from {', '.join(INITS)}.")
    for variant in list_variants(config):
        if variant.calibration is not None:
            model_config = load_config(hf_folder(config.checkpoints[variant.model]))
            for matrix in list_matrices(model_config, has_head=False):
                check_shape(matrix.shape, decomposition(config, variant), matrix.name)


def run(config: SafetyStudyConfig) -> list[dict[str, Any]]:
    """Measures what is not measured yet; writes and returns the records."""
    check(config)
    out, variants = config.out, list_variants(config)
    settings = dataclasses.asdict(config)
    for choice in ("out", "bits", "ranks", "inits", "align_bits", "align_calibrations"):
        del settings[choice]
    claim_folder(out, {name: value for name, value in settings.items() if value is not None})
    (out / "records").mkdir(parents=True, exist_ok=True)
    files = {variant: out / "records" / f"{variant.name}.json" for variant in variants}
    todo = [variant for variant in variants if not files[variant].is_file()]
    print(
        f"{len(variants)} variants of {', '.join(config.checkpoints)}, {len(variants) - len(todo)} done; attacks "
        f"{', '.join(config.prompts)}; harmless {', '.join(config.harmless)}\nwrites {out}",
        flush=True,
    )
    start = time.monotonic()
    for number, variant in enumerate(todo, 1):
        write_json(files[variant], measure(config, variant))
        eta = clock((time.monotonic() - start) / number * (len(todo) - number))
        print(f"== {variant.name} done, {number}/{len(todo)}, ETA {eta}", flush=True)
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files.values()]
    write_json(out / "results.json", {"variants": records, "as_safe_as_uncompressed": safe_variants(records)})
    write_beside(out / "results.md", lambda file: file.write(markdown(records).encode()))
    plot(out / "results.png", records)
    print(markdown(records))
    print(f"{len(records)} variants -> {out / 'results.json'}, results.md, results.png")
    return records


def _pairs(flag: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in flags.FLAGS[flag].value]
    if not all(name and file for name, _, file in pairs):
        raise ValueError(f"--{flag}={','.join(flags.FLAGS[flag].value)}: give NAME=PATH with commas between.")
    return {name: file for name, _, file in pairs}


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    given = flags.FLAGS
    run(
        SafetyStudyConfig(
            out=Path(given.out),
            checkpoints=_pairs("checkpoints"),
            calibration_rows=_pairs("calibration_rows"),
            prompts=_pairs("prompts"),
            harmless=_pairs("harmless"),
            bits=tuple(map(int, given.bits)),
            ranks=tuple(map(int, given.ranks)),
            inits=tuple(given.inits),
            judge=given.judge,
            answer_judge=given.answer_judge,
            judge_settings=judge_settings_from_flags(),
            sampler=sampler_config_from_flags(),
            decompose=DecomposeConfig(
                lr_bits=given.lr_bits, outer_iters=given.outer_iters, tune_iters=given.tune_iters
            ),
            num_windows=given.num_windows,
            batch_size=given.batch_size,
            buckets=tuple(map(int, given.buckets)),
            seed=given.seed,
            align=given.align,
            align_config=given.align_config,
            align_bits=tuple(map(int, given.align_bits)),
            align_calibrations=tuple(given.align_calibrations),
        )
    )


def define_flags() -> None:
    flags.DEFINE_string("out", None, "folder to write, and to continue", required=True)
    flags.DEFINE_list("checkpoints", None, "NAME=DIR of dense Hugging Face folders", required=True)
    flags.DEFINE_list("calibration_rows", None, "NAME=FILE of training rows to calibrate on", required=True)
    flags.DEFINE_list("prompts", None, "ATTACK=FILE.json of harmful requests", required=True)
    flags.DEFINE_list("harmless", None, "NAME=FILE.json of harmless requests", required=True)
    flags.DEFINE_list("bits", ["4", "3", "2"], "bits a weight of Q")
    flags.DEFINE_list("ranks", ["8", "16"], "ranks of L R")
    flags.DEFINE_list("inits", ["svd"], f"starts: {', '.join(INITS)}")
    flags.DEFINE_integer("lr_bits", 16, "bits of the factors")
    flags.DEFINE_integer("outer_iters", 15, "alternations")
    flags.DEFINE_integer("tune_iters", 10, "sweeps after each rounding of Q")
    define_judge_flags()
    flags.DEFINE_string("answer_judge", "keywords", "of the harmless requests: does the completion answer?")
    flags.DEFINE_integer("num_windows", 256, "rows to calibrate on")
    flags.DEFINE_integer("batch_size", 64, "rows decoded, or calibrated on, together")
    flags.DEFINE_list("buckets", [str(length) for length in DEFAULT_BUCKETS], "row lengths to pad to")
    flags.DEFINE_integer("seed", 0, "of everything random")
    flags.DEFINE_string("align", None, "the checkpoint to align after compression")
    flags.DEFINE_string("align_config", None, "training config of that alignment")
    flags.DEFINE_list("align_bits", [], "bits of Q under which it is aligned; default: all")
    flags.DEFINE_list("align_calibrations", [], "calibrations under which it is aligned; default: all")
    define_sampler_flags()


if __name__ == "__main__":
    define_flags()
    app.run(main)
