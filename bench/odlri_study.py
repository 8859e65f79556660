r"""ODLRI on SmolLM2-135M: starts, ranks and factor bits against error and perplexity; the number of outliers k.

    python -m bench.smollm2 --target SMOLLM2
    python -m bench.odlri_study --out bench_out/odlri --smollm2 SMOLLM2 --text WIKITEXT_TEST \
        --calibration_text WIKITEXT_VALID [--full] [--num_seeds 3]

Every row compresses all 210 linear layers (2-bit Q) and measures perplexity on the packed checkpoint. The whole table
takes 3 outer iterations without sweeps; --full adds the rank 32 rows once more with 15 iterations of 10 sweeps, and
--num_seeds makes the short ones of rank 32 with further seeds, which tell how much of a perplexity is chance.
Without the two texts, prose that every CPython ships stands in for them. Run again, it continues: finished rows are
kept (OUT/rows/NAME.json), and the row that was cut off goes on where its compression stopped.

    OUT/study.json, study.md     one record and one line a row; perplexities over seeds
    OUT/starts.png               perplexity by start, a group of bars for each setting
    OUT/num_outliers.png, .json     layer 15: error of the odlri start against k, with zero and svd
    OUT/strong_outliers.png, .json  the same where the inputs of its 8 largest channels are 30 times as large, as large
                                    models have them and this one has not
"""

import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from a2d_jax.config import load_config
from a2d_jax.files import write_beside, write_json
from a2d_jax.plots import plt, save_figure
from a2d_jax.pretrained import load_pretrained
from a2d_jax.progress import clock
from a2d_jax.safetensors_io import SafetensorsFolder
from a2d_jax.stages import claim_folder, exit_if_stopped
from a2d_jax.tokenizer import load_tokenizer
from odlri_jax import calibrate, compress
from odlri_jax.calibration import Calibration
from odlri_jax.decompose import decompose
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.export import export
from odlri_jax.matrices import list_matrices
from odlri_jax.perplexity import perplexity

STARTS = ("zero", "svd", "odlri", "auto")
NUM_OUTLIERS, MAX_SEEDS = 8, 10
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 64, 512
_SETTINGS = ("init", "rank", "lr_bits", "outer_iters", "inner_iters", "tune_iters", "published")
CONTEXT_LENGTH, MAX_WINDOWS, COMPARED_TOKENS = 2048, 8, 256
SWEEPS = ("num_outliers", "strong_outliers")
SWEEP_LAYER, SWEEP_KS = 15, (1, 2, 4, 8, 16, 32)
NUM_STRONG, STRONG_SCALE = 8, 30.0

_OUT = flags.DEFINE_string("out", "bench_out/odlri", "folder to write, and to continue")
_SMOLLM2 = flags.DEFINE_string("smollm2", None, "Hugging Face folder of bench.smollm2")
_TEXT = flags.DEFINE_string("text", None, "text of the perplexity; default: half of CPython's own prose")
_CALIBRATION_TEXT = flags.DEFINE_string("calibration_text", None, "text of the calibration; default: the other half")
_FULL = flags.DEFINE_bool("full", False, "also the rank 32 rows with 15 iterations of 10 sweeps")
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 1, "seeds of the rank 32 rows of 3 iterations", 1, MAX_SEEDS)
_ONLY = flags.DEFINE_list("only", None, "names of the rows to make now, or of the sweeps; default: everything")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: how each matrix is decomposed, and the seed of its random numbers."""

    decompose: DecomposeConfig
    seed: int = 0


def table_rows(is_full: bool, num_seeds: int) -> dict[str, Row]:
    """Row name -> the row: the whole table, the published rounding beside ours, further seeds, then the long rows."""
    rows = {}
    for rank, lr_bits, init in itertools.product((32, 64), (16, 4), STARTS):
        rows[f"r{rank}_lr{lr_bits}_{init}"] = DecomposeConfig(
            rank=rank, lr_bits=lr_bits, init=init, num_outliers=NUM_OUTLIERS, outer_iters=3, tune_iters=0
        )
    short = {name: config for name, config in rows.items() if config.rank == 32}
    for name in ("r32_lr16_svd", "r32_lr4_svd"):
        rows[f"{name}_published"] = dataclasses.replace(rows[name], published=True)
    result = {name: Row(config) for name, config in rows.items()}
    for seed in range(1, num_seeds):
        result |= {f"{name}_seed{seed}": Row(config, seed) for name, config in short.items()}
    if is_full:
        long = {f"{n}_full": dataclasses.replace(c, outer_iters=15, tune_iters=10) for n, c in short.items()}
        result |= {name: Row(config) for name, config in long.items()}
    return result


def prose(out: Path) -> tuple[Path, Path]:
    """Two text files from the topics of Python's help(), taken in turn: (for calibration, for evaluation)."""
    from pydoc_data.topics import topics

    paths = out / "prose_calibration.txt", out / "prose_evaluation.txt"
    for i, path in enumerate(paths):
        text = "\n\n".join(topics[name] for name in sorted(topics)[i::2])
        write_beside(path, lambda file, text=text: file.write(text.encode()))
    return paths


# -- rows -------------------------------------------------------------------------------------------------------------


def evaluation_tokens(smollm2: str, text: Path) -> np.ndarray:
    tokenizer = load_tokenizer(smollm2)
    return np.array(tokenizer.encode(text.read_text(encoding="utf-8")), np.int32)


def measure_perplexity(folder: str | Path, tokens: np.ndarray) -> dict[str, float]:
    start = time.monotonic()
    result = perplexity(load_pretrained(folder), tokens, CONTEXT_LENGTH, max_windows=MAX_WINDOWS)
    return {
        "perplexity": result.perplexity,
        "num_windows": result.num_windows,
        "perplexity_seconds": round(time.monotonic() - start, 1),
    }


def dense_row(smollm2: str, tokens: np.ndarray) -> dict[str, Any]:
    return {"name": "dense", "bits_per_weight": 32.0, "mean_error": 0.0, **measure_perplexity(smollm2, tokens)}


def packed_against_dense(folder: Path, tokens: np.ndarray) -> float:
    """Largest difference in logits between a packed folder and its dense export, for one row of tokens."""
    dense = folder.with_name(f"{folder.name}_dense")
    export(str(folder), dense, "dense")
    logits = [np.asarray(load_pretrained(path)(tokens[None])) for path in (folder, dense)]
    shutil.rmtree(dense)
    return float(np.max(np.abs(logits[0] - logits[1])))


def compressed_row(name: str, row: Row, smollm2: str, moments: Path, out: Path, tokens: np.ndarray):
    """Compresses into a folder of the row, measures, and keeps the report alone."""
    folder = out / "packed" / name
    config = compress.CompressConfig(
        smollm2, str(moments), str(folder), row.decompose, layers_per_group=1, seed=row.seed
    )
    report = compress.run(config)
    matrices = report["matrices"]
    starts = [matrix["init"] + (f" k={k}" if (k := matrix["num_outliers"]) else "") for matrix in matrices]
    of_kind = {p: [m["error"] for m in matrices if m["projection"] == p] for p in {m["projection"] for m in matrices}}
    record = {
        "name": name,
        **{key: getattr(row.decompose, key) for key in _SETTINGS},
        "seed": row.seed,
        "bits_per_weight": report["summary"]["bits_per_weight"],
        "file_bits_per_weight": report["summary"]["file_bits_per_weight"],
        "mean_error": report["summary"]["mean_error"],
        "error_of_kind": {kind: float(np.mean(errors)) for kind, errors in sorted(of_kind.items())},
        "mean_q_role": float(np.mean([matrix["q_role"] for matrix in matrices])),
        "mean_lr_role": float(np.mean([matrix["lr_role"] for matrix in matrices])),
        "starts_taken": {start: starts.count(start) for start in sorted(set(starts))},
        "seconds": report["summary"]["seconds"],
        **measure_perplexity(folder, tokens),
        "packed_against_dense": packed_against_dense(folder, tokens[:COMPARED_TOKENS]),
    }
    shutil.copyfile(folder / "report.json", out / "rows" / f"{name}_report.json")
    write_json(out / "rows" / f"{name}.json", record)
    shutil.rmtree(folder)
    return record


# -- the number of outliers -------------------------------------------------------------------------------------------


def with_strong_outliers(h: np.ndarray) -> np.ndarray:
    """H where the inputs of the largest channels are larger still."""
    scale = np.ones(len(h), np.float32)
    scale[np.argsort(np.diagonal(h))[-NUM_STRONG:]] = STRONG_SCALE
    return h * scale * scale[:, None]


def sweep_num_outliers(smollm2: str, moments: Path, out: Path, name: str) -> None:
    """Error of the projections of one layer for zero, svd and odlri with every k: 15 iterations, 2 sweeps."""
    path = out / f"{name}.json"
    errors: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    source, calibration = SafetensorsFolder(smollm2), Calibration(moments)
    matrices = [m for m in list_matrices(load_config(smollm2), False) if m.layer == SWEEP_LAYER]
    base = DecomposeConfig(rank=32, outer_iters=15, tune_iters=2)
    starts = {"zero": dataclasses.replace(base, init="zero"), "svd": dataclasses.replace(base, init="svd")}
    starts |= {f"k={k}": dataclasses.replace(base, init="odlri", num_outliers=k) for k in SWEEP_KS}
    for matrix in matrices:
        of_matrix = errors.setdefault(matrix.projection, {})
        w, h = source.read(f"{matrix.name}.weight"), calibration.second_moment(matrix.projection, matrix.layer)
        if name == "strong_outliers":
            h = with_strong_outliers(h)
        for start in [start for start in starts if start not in of_matrix]:
            begin = time.monotonic()
            of_matrix[start] = float(decompose(w, h, starts[start], matrix.key(0)).error)
            write_json(path, errors)
            print(
                f"{matrix.projection} {start}: {of_matrix[start]:.4f} in {time.monotonic() - begin:.1f} s", flush=True
            )
    plot_num_outliers(path.with_suffix(".png"), errors, name.replace("_", " "))


def plot_num_outliers(path: Path, errors: Mapping[str, Mapping[str, float]], what: str) -> None:
    """Error over that of the zero start, against k; the svd start as a dashed line of the same colour."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, (projection, of_matrix) in enumerate(errors.items()):
        ratios = [of_matrix[f"k={k}"] / of_matrix["zero"] for k in SWEEP_KS]
        axes.plot(SWEEP_KS, ratios, marker="o", markersize=4, color=f"C{i}", label=projection)
        axes.axhline(of_matrix["svd"] / of_matrix["zero"], color=f"C{i}", linestyle="--", linewidth=0.8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SWEEP_KS, [str(k) for k in SWEEP_KS])
    axes.set_xlabel("k, the outlier channels of the odlri start (dashed: svd start)")
    axes.set_ylabel("error / error of the zero start")
    axes.set_title(f"{what}: SmolLM2-135M, layer {SWEEP_LAYER}, rank 32, 16-bit factors")
    axes.legend(ncols=4, fontsize="small")
    save_figure(path, figure)


# -- tables and plots -------------------------------------------------------------------------------------------------


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The table: one line a row, dense first."""
    lines = [
        "| rank | factors | iterations x sweeps | start | bits per weight | mean error | perplexity | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if record["name"] == "dense":
            lines.append(f"| | | | dense | {record['bits_per_weight']:.2f} | 0 | {record['perplexity']:.2f} | |")
            continue
        settings = f"{record['rank']} | {record['lr_bits']}-bit | {record['outer_iters']} x {record['tune_iters']}"
        numbers = f"{record['bits_per_weight']:.3f} | {record['mean_error']:.4f} | {record['perplexity']:.2f}"
        init = record["init"] + (", as published" if record.get("published") else "")
        init += f", seed {record['seed']}" if record.get("seed") else ""
        lines.append(f"| {settings} | {init} | {numbers} | {record['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def perplexities(records: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int, int], dict[str, list[float]]]:
    """(rank, bits of the factors, iterations) -> start -> perplexity of every seed, of the rows not as published."""
    result: dict[tuple[int, int, int], dict[str, list[float]]] = {}
    for r in records:
        if r["name"] != "dense" and not r.get("published"):
            of_start = result.setdefault((r["rank"], r["lr_bits"], r["outer_iters"]), {})
            of_start.setdefault(r["init"], []).append(r["perplexity"])
    return result


def seeds_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity over seeds, a line for each start that has several."""
    lines = [
        "| rank | factors | iterations | start | seeds | mean perplexity | lowest | highest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (rank, bits, iterations), of_start in perplexities(records).items():
        for init, values in of_start.items():
            if len(values) > 1:
                spread = f"{np.mean(values):.2f} | {min(values):.2f} | {max(values):.2f}"
                lines.append(f"| {rank} | {bits}-bit | {iterations} | {init} | {len(values)} | {spread} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def plot_starts(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Perplexity of every start, a group of bars for each setting: means over seeds, each seed a dot."""
    by_setting = perplexities(records)
    figure, axes = plt.subplots(figsize=(max(6, 1.8 * len(by_setting)), 4.5))
    for i, init in enumerate(STARTS):
        values = {
            n + 0.2 * i - 0.3: of_start[init] for n, of_start in enumerate(by_setting.values()) if init in of_start
        }
        axes.bar(list(values), [np.mean(seeds) for seeds in values.values()], 0.19, label=init)
        for place, seeds in values.items():
            if len(seeds) > 1:
                axes.plot([place] * len(seeds), seeds, "k.", markersize=4)
    dense = next((record["perplexity"] for record in records if record["name"] == "dense"), None)
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=0.8, label="dense")
    axes.set_xlim(-0.6, len(by_setting) - 0.4)
    axes.set_xticks(range(len(by_setting)), [f"rank {r}, {b}-bit\n{t} iterations" for r, b, t in by_setting])
    axes.set_ylabel(f"perplexity, {MAX_WINDOWS} windows of {CONTEXT_LENGTH}")
    axes.legend(ncols=5, fontsize="small")
    save_figure(path, figure)


def write_tables(out: Path, names: Sequence[str], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables and plot of the rows that are finished."""
    files = [out / "rows" / f"{name}.json" for name in ["dense", *names]]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    write_json(out / "study.json", {"settings": dict(settings), "rows": records})
    text = "\n".join(part for part in (markdown(records), seeds_markdown(records)) if part)
    write_beside(out / "study.md", lambda file: file.write(text.encode()))
    if len(records) > 1:
        plot_starts(out / "starts.png", records)
    return records


def study_settings(smollm2: str, text: Path, calibration_text: Path) -> dict[str, Any]:
    return {
        "model": str(Path(smollm2).absolute()),
        "text": str(text.absolute()),
        "calibration_text": str(calibration_text.absolute()),
        "calibration": f"{CALIBRATION_WINDOWS} windows of {CALIBRATION_LENGTH} tokens",
        "perplexity": f"first {MAX_WINDOWS} windows of {CONTEXT_LENGTH} tokens",
        "num_outliers": NUM_OUTLIERS,
    }


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    out, smollm2 = Path(_OUT.value), _SMOLLM2.value
    (out / "rows").mkdir(parents=True, exist_ok=True)
    if (_TEXT.value is None) != (_CALIBRATION_TEXT.value is None):
        raise ValueError("give both --text and --calibration_text, or neither.")
    calibration_text, text = (Path(_CALIBRATION_TEXT.value), Path(_TEXT.value)) if _TEXT.value else prose(out)
    settings = study_settings(smollm2, text, calibration_text)
    claim_folder(out, settings)
    rows = table_rows(_FULL.value, _NUM_SEEDS.value)
    wanted = _ONLY.value or ["dense", *rows, *SWEEPS]
    unknown = sorted(set(wanted) - {"dense", *SWEEPS, *rows})
    if unknown:
        raise ValueError(
            f"--only={','.join(unknown)}: no such row; choose from {', '.join(['dense', *SWEEPS, *rows])}."
        )
    todo = [name for name in wanted if not (out / "rows" / f"{name}.json").is_file()]
    print(
        f"{len(wanted)} rows, {len(wanted) - len(todo)} done; {jax.device_count()} device(s); writes {out}", flush=True
    )

    moments = out / "moments"
    calibration = calibrate.CalibrateConfig(
        checkpoint=smollm2,
        out=str(moments),
        text=str(calibration_text),
        context_length=CALIBRATION_LENGTH,
        num_windows=CALIBRATION_WINDOWS,
    )
    exit_if_stopped(calibrate.run(calibration))
    tokens = evaluation_tokens(smollm2, text)
    start = time.monotonic()
    for i, name in enumerate(todo):
        print(f"== {name}", flush=True)
        if name in SWEEPS:
            sweep_num_outliers(smollm2, moments, out, name)
        elif name == "dense":
            write_json(out / "rows" / "dense.json", dense_row(smollm2, tokens))
        else:
            compressed_row(name, rows[name], smollm2, moments, out, tokens)
        write_tables(out, list(table_rows(True, MAX_SEEDS)), settings)
        elapsed = time.monotonic() - start
        eta = clock(elapsed / (i + 1) * (len(todo) - i - 1))
        print(f"{name} done, {i + 1}/{len(todo)}, ETA {eta}", flush=True)
    records = write_tables(out, list(table_rows(True, MAX_SEEDS)), settings)
    print((out / "study.md").read_text(encoding="utf-8"))
    print(f"{len(records)} rows -> {out / 'study.json'}, {out / 'study.md'}")


if __name__ == "__main__":
    flags.mark_flag_as_required("smollm2")
    app.run(main)
