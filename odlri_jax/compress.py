"""Program: every linear layer of a dense checkpoint as Q + L R, in a packed folder.

    python -m odlri_jax.compress --checkpoint DIR --calibration DIR --out DIR --rank 32 [--lr_bits 4] [--head]

Embeddings, norms and biases stay as they are; so does the head, unless --head (and it has weights of its own). Each
flag below --out sets a field of `DecomposeConfig`. Weights of a Hugging Face folder are read matrix by matrix; the
model is never in memory as a whole. A folder of `convert` or `train` is exported once to a Hugging Face folder (an
adapter merged), which takes the memory of the model and, until the end, the disk space. A group of layers is one file:
its matrices of one shape are stacked, and the stack is split over the devices. The random numbers of a matrix follow
from its name and --seed, so that neither grouping nor devices change it.

    DIR/layers-000-003.safetensors ..., head.safetensors, dense.safetensors    see docs/packed_format.md
    DIR/report.json, report.png                                                errors, scales, roles and times
    DIR/unfinished/       settings and the records of finished groups, until odlri.json takes their place
    DIR/unfinished/dense  the export of a folder of `convert` or `train`

Run again with the same folder, it keeps the finished groups and starts with the one that was cut off. A Hugging Face
folder whose weights have changed meanwhile is refused; of the others the export counts that is there already.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh

from a2d_jax.config import ModelConfig, load_config
from a2d_jax.export import export as export_dense
from a2d_jax.files import local_path, write_json
from a2d_jax.fingerprint import fingerprint
from a2d_jax.folders import HF_FOLDER, hf_folder
from a2d_jax.hf_io import check_tensors, check_tied_head
from a2d_jax.models.naming import tensor_names
from a2d_jax.orbax_io import copy_companions
from a2d_jax.progress import clock
from a2d_jax.resume import differences
from a2d_jax.safetensors_io import INDEX_NAME, SafetensorsFolder, write_safetensors
from odlri_jax.calibration import Calibration
from odlri_jax.decompose import check_inputs, check_shape, decompose_stack
from odlri_jax.decompose_config import INITS, DecomposeConfig
from odlri_jax.decomposition import Decomposition
from odlri_jax.matrices import Matrix, default_rank, layer_groups, list_matrices
from odlri_jax.packed_io import MANIFEST_NAME, Manifest, write_manifest
from odlri_jax.packing import pack
from odlri_jax.report import PLOT_NAME, REPORT_NAME, matrix_record, write_report

UNFINISHED = "unfinished"
_SETTINGS_NAME, _COPY_NAME = "settings.json", "dense"
_DENSE_NAME = "dense.safetensors"


@dataclasses.dataclass(frozen=True)
class CompressConfig:
    """One compression.

    Attributes:
      checkpoint: Hugging Face folder, or one of `convert` or `train`.
      layers_per_group: layers of one file, whose matrices of one shape make a stack; None: one for each device.
      num_devices: None: all local ones.
    """

    checkpoint: str
    calibration: str
    out: str
    decompose: DecomposeConfig
    seed: int = 0
    head: bool = False
    layers_per_group: int | None = None
    num_devices: int | None = None


# -- the work ---------------------------------------------------------------------------------------------------------


def stack_mesh(num_matrices: int, devices: Sequence[jax.Device]) -> Mesh | None:
    """Devices for a stack; None where one does it all."""
    used = list(devices)[:num_matrices]
    return Mesh(np.array(used), ("stack",)) if len(used) > 1 else None


def decompose_matrices(
    matrices: Sequence[Matrix],
    source: SafetensorsFolder,
    calibration: Calibration,
    config: DecomposeConfig,
    seed: int,
    devices: Sequence[jax.Device],
) -> Iterator[tuple[list[Matrix], Decomposition, float]]:
    """Stacks of the matrices by shape, each with its decomposition (a leading axis over the stack) and seconds.

    Raises:
      ValueError: a matrix or an H that cannot be decomposed, by name.
    """
    stacks: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        stacks.setdefault(matrix.shape, []).append(matrix)
    for stack in stacks.values():
        start = time.monotonic()
        w = np.stack([source.read(f"{matrix.name}.weight").astype(np.float32) for matrix in stack])  # (B, m, n)
        h = np.stack([calibration.second_moment(matrix.projection, matrix.layer) for matrix in stack])  # (B, n, n)
        keys = jnp.stack([matrix.key(seed) for matrix in stack])
        try:
            result = decompose_stack(w, h, config, keys, stack_mesh(len(stack), devices))
        except ValueError:
            for matrix, *pair in zip(stack, w, h, strict=True):
                check_named(matrix, *pair, config)
            raise
        jax.block_until_ready(result)
        yield stack, result, time.monotonic() - start


def check_named(matrix: Matrix, w: np.ndarray, h: np.ndarray, config: DecomposeConfig) -> None:
    """The checks of `decompose`, with the name of the matrix in what they raise."""
    try:
        check_inputs(jnp.asarray(w), jnp.asarray(h), config)
    except ValueError as error:
        raise ValueError(f"{matrix.name}: {error}") from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(path, shapes, arrays.__getitem__, {"format": "pt"})


def compress_group(
    stem: str, matrices: Sequence[Matrix], out: Path, decompose: Callable, on_stack: Callable[[list[dict]], None]
) -> None:
    """Decomposes the matrices of one file and writes it; `on_stack` hears the records of each finished stack.

    The records go first: a group counts as finished where its file is.
    """
    arrays: dict[str, np.ndarray] = {}
    records: dict[str, dict[str, Any]] = {}
    for stack, result, seconds in decompose(matrices):
        for i, matrix in enumerate(stack):
            one = jax.tree.map(lambda x, i=i: x[i], result)
            arrays |= {f"{matrix.name}.{suffix}": array for suffix, array in pack(one).items()}
            records[matrix.name] = matrix_record(
                matrix.name, matrix.projection, matrix.layer, matrix.shape, one, seconds / len(stack)
            )
        on_stack([records[matrix.name] for matrix in stack])
    write_json(record_file(out, stem), [records[matrix.name] for matrix in matrices])
    write_arrays(out / f"{stem}.safetensors", arrays)


def write_dense(source: SafetensorsFolder, config: ModelConfig, matrices: Sequence[Matrix], out: Path) -> None:
    """All tensors that are not packed, as they were stored."""
    packed = {f"{matrix.name}.weight" for matrix in matrices}
    names = [name.hf_name for name in tensor_names(config) if name.hf_name not in packed]
    shapes = {name: (source.shapes[name], source.read(name).dtype) for name in names}
    write_safetensors(out / _DENSE_NAME, shapes, source.read, {"format": "pt"})


def write_index(out: Path, stems: Sequence[str]) -> None:
    """Which file holds what."""
    weight_map, total_size = {}, 0
    for file in [_DENSE_NAME, *(f"{stem}.safetensors" for stem in stems)]:
        with open(out / file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        weight_map |= dict.fromkeys(tensors, file)
        total_size += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / INDEX_NAME, index)


# -- the folder -------------------------------------------------------------------------------------------------------


def record_file(out: Path, stem: str) -> Path:
    return out / UNFINISHED / f"{stem}.json"


def is_done(out: Path, stem: str) -> bool:
    return (out / f"{stem}.safetensors").is_file() and record_file(out, stem).is_file()


def settings_before(out: Path) -> dict[str, Any] | None:
    """Settings of the compression that `out` holds, finished or not; None for a new folder.

    Raises:
      ValueError: a folder with something else in it.
    """
    if (out / MANIFEST_NAME).is_file() and (out / REPORT_NAME).is_file():
        return json.loads((out / REPORT_NAME).read_text(encoding="utf-8"))["settings"]
    path = out / UNFINISHED / _SETTINGS_NAME
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if out.is_dir() and any(file.suffix in (".safetensors", ".json") for file in out.iterdir()):
        raise ValueError(f"{out} holds files of unknown origin, and no compression to continue; give another --out.")
    return None


def settings_of(config: CompressConfig, calibration: Calibration, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the files of `config` depend on; layers_per_group, where it is not given, as in the folder (`before`)."""
    layers_per_group = config.layers_per_group or (before or {}).get("layers_per_group")
    of_calibration = {key: calibration.settings.get(key) for key in ("tokens_sha256", "weights", "num_tokens")}
    return {
        "checkpoint": str(Path(config.checkpoint).absolute()),
        "calibration": {"folder": str(Path(config.calibration).absolute()), **of_calibration},
        "seed": config.seed,
        "head": config.head,
        "layers_per_group": layers_per_group or len(devices_of(config)),
        **dataclasses.asdict(config.decompose),
    }


def check_settings(out: str, settings: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    """ValueError where the folder was begun with other settings; None: it is new."""
    # A folder whose export was cut off, or an older one, notes no stored_weights.
    if before is not None and (changes := differences(before, settings, [name for name in settings if name in before])):
        raise ValueError(f"{out} was begun with other settings ({changes}); repeat those or give another --out.")


def devices_of(config: CompressConfig) -> list[jax.Device]:
    devices = jax.local_devices()
    if config.num_devices is not None and config.num_devices > len(devices):
        raise ValueError(f"--num_devices={config.num_devices}: there are {len(devices)}; give at most as many.")
    return devices[: config.num_devices]


def check_checkpoint(config: CompressConfig) -> None:
    """ValueError for a checkpoint that is the target itself, or packed."""
    folder = Path(config.checkpoint)
    if Path(config.out).resolve() == folder.resolve():
        raise ValueError(f"--out is the checkpoint itself ({folder}); choose another folder.")
    if (hf_folder(folder) / MANIFEST_NAME).is_file():
        raise ValueError(f"{folder} is packed already; give the dense checkpoint that it was made from.")


def open_source(folder: Path) -> SafetensorsFolder:
    """Tensors of a dense Hugging Face folder, checked against its configuration."""
    model_config, source = load_config(folder), SafetensorsFolder(folder)
    check_tensors(model_config, source.shapes, folder)
    check_tied_head(model_config, source)
    return source


def open_copy(checkpoint: Path, copy: Path) -> SafetensorsFolder:
    """Tensors of a folder of `convert` or `train`, exported to `copy` unless it is there: config.json comes last."""
    if not (copy / "config.json").is_file():
        export_dense(checkpoint, copy)
    return open_source(copy)


# -- the program ------------------------------------------------------------------------------------------------------


def run(config: CompressConfig, is_dry_run: bool = False) -> dict[str, Any] | None:
    """Decomposes what is not decomposed yet, completes the folder and returns its report."""
    out, begin = local_path(config.out), time.monotonic()
    check_checkpoint(config)
    checkpoint, copy = Path(config.checkpoint), out / UNFINISHED / _COPY_NAME
    model_config = load_config(hf_folder(checkpoint))
    source = None if (checkpoint / HF_FOLDER).is_dir() else open_source(checkpoint)  # None: its export will be opened
    calibration = Calibration(config.calibration)
    if calibration.num_layers != model_config.num_layers:
        raise ValueError(
            f"{config.calibration} was made from {calibration.num_layers} layers, {config.checkpoint} has "
            f"{model_config.num_layers}; calibrate with this checkpoint."
        )
    matrices = list_matrices(model_config, config.head)
    if config.head:
        calibration.check_head()
    for matrix in matrices:  # all of them before any work is done
        check_shape(matrix.shape, config.decompose, matrix.name)
    devices = devices_of(config)
    before = settings_before(out)
    settings = settings_of(config, calibration, before)
    if source is not None:
        settings["stored_weights"] = fingerprint(source)
    check_settings(config.out, settings, before)
    groups = layer_groups(matrices, settings["layers_per_group"])
    is_complete = (out / MANIFEST_NAME).is_file()
    todo = [stem for stem in groups if not (is_complete or is_done(out, stem))]

    # --- Plan ------------------------------------------------------------------------------------------------------
    shapes = dict.fromkeys(f"{m}x{n}" for m, n in (matrix.shape for matrix in matrices))
    print(
        f"model {config.checkpoint}: {model_config.family}, {model_config.num_layers} layers; "
        f"{len(matrices)} matrices of {', '.join(shapes)}{' with the head' if config.head else ''}\n"
        f"H of {calibration.settings.get('num_tokens')} tokens from {config.calibration}; seed {config.seed}\n"
        f"{config.decompose}\n"
        f"{len(devices)} device(s); {len(groups)} files of up to {settings['layers_per_group']} layers, "
        f"{len(groups) - len(todo)} done\n"
        + ("" if source or is_complete else f"exports the checkpoint to {copy} first, unless it is there\n")
        + f"writes {out}",
        flush=True,
    )
    if is_dry_run:
        print("dry run: nothing done")
        return None
    if is_complete:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        print(f"{out} is complete already" + ("" if source else "; the weights of the checkpoint were not compared"))
        return json.loads((out / REPORT_NAME).read_text(encoding="utf-8"))

    # --- Matrices --------------------------------------------------------------------------------------------------
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    write_json(out / UNFINISHED / _SETTINGS_NAME, (before or {}) | settings)
    if source is None:
        source = open_copy(checkpoint, copy)
        settings["stored_weights"] = fingerprint(source)
        check_settings(config.out, settings, before)
        write_json(out / UNFINISHED / _SETTINGS_NAME, settings)
    work = {matrix.name: matrix.work for matrix in matrices}
    remaining = sum(work[matrix.name] for stem in todo for matrix in groups[stem])
    num_done, work_done = sum(len(groups[stem]) for stem in groups if stem not in todo), 0
    start = time.monotonic()

    def report_stack(records: list[dict[str, Any]]) -> None:
        nonlocal num_done, work_done
        num_done += len(records)
        work_done += sum(work[record["name"]] for record in records)
        elapsed = time.monotonic() - start
        eta = clock(elapsed * (remaining / work_done - 1))
        kinds = ", ".join(dict.fromkeys(record["projection"] for record in records))
        errors = ", ".join(f"{record['error']:.4f}" for record in records[:4]) + (" ..." if len(records) > 4 else "")
        first = "head" if records[0]["layer"] is None else f"layer {records[0]['layer']}"
        seconds = sum(record["seconds"] for record in records)
        print(
            f"{num_done}/{len(matrices)} from {first} ({kinds}): error {errors} in {seconds:.1f} s, ETA {eta}",
            flush=True,
        )

    def decompose(group: Sequence[Matrix]):
        return decompose_matrices(group, source, calibration, config.decompose, config.seed, devices)

    for stem in todo:
        compress_group(stem, groups[stem], out, decompose, report_stack)

    # --- The rest of the folder, the manifest last: it makes the folder complete -------------------------------------
    if not (out / _DENSE_NAME).is_file():
        write_dense(source, model_config, matrices, out)
    copy_companions(source.folder, out, except_for=(INDEX_NAME, MANIFEST_NAME, REPORT_NAME, PLOT_NAME))
    records = [record for stem in groups for record in json.loads(record_file(out, stem).read_text(encoding="utf-8"))]
    report = write_report(out, records, settings, [out / f"{stem}.safetensors" for stem in groups])
    write_index(out, list(groups))
    paths = dict.fromkeys(m.projection if m.layer is None else f"blocks.{m.projection}" for m in matrices)
    write_manifest(out, Manifest(config.decompose, tuple(paths)))
    shutil.rmtree(out / UNFINISHED)
    total = report["summary"]
    print(
        f"compressed {total['num_matrices']} matrices to {total['bits_per_weight']:.3f} bits per weight, mean error "
        f"{total['mean_error']:.4f}, in {time.monotonic() - begin:.0f} s -> {out}"
    )
    return report


_HELP = {
    "rank": f"r of L (m, r) and R (r, n); default: {DecomposeConfig.rank}, or less where a matrix is too small",
    "num_outliers": "k of the odlri start",
    "init": "start; auto takes the one whose first iterations end lowest",
    "q_bits": "bits a weight of Q",
    "q_codebook": "e8p (2, 3, 4 bits), uniform or normal_float",
    "group": "columns that share a scale (uniform, normal_float)",
    "lr_bits": "bits of the factors: 16, or 2, 3, 4 on the lattice",
    "outer_iters": "alternations of Q and L R",
    "inner_iters": "rounds over L and R in each, below 16 bits",
    "tune_iters": "sweeps over Q after each rounding",
    "hadamard": "rotate W and H first",
    "ridge": "added to H, as a share of its mean diagonal",
    "published": "the published algorithm step by step",
}
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Hugging Face folder, or one of convert or train", required=True)
    flags.DEFINE_string("calibration", None, "folder of odlri_jax.calibrate", required=True)
    flags.DEFINE_string("out", None, "folder to write, and to continue", required=True)
    for field in dataclasses.fields(DecomposeConfig):
        if field.name == "init":
            flags.DEFINE_enum("init", field.default, INITS, _HELP["init"])
        else:
            default = None if field.name == "rank" else field.default
            _DEFINE[field.type](field.name, default, _HELP[field.name])
    flags.DEFINE_integer("seed", 0, "of signs, starts and factors")
    flags.DEFINE_bool("head", False, "also the head")
    flags.DEFINE_integer(
        "layers_per_group", None, "layers of one file and stack; default: one for each device", lower_bound=1
    )
    flags.DEFINE_integer("num_devices", None, "devices to use; default: all of this machine", lower_bound=1)
    flags.DEFINE_bool("dry_run", False, "print the plan and stop")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    given = {field.name: values[field.name].value for field in dataclasses.fields(DecomposeConfig)}
    if given["rank"] is None:
        given["rank"] = default_rank(list_matrices(load_config(hf_folder(values.checkpoint)), values.head))
    names = ("checkpoint", "calibration", "out", "seed", "head", "layers_per_group", "num_devices")
    others = {name: values[name].value for name in names}
    run(CompressConfig(decompose=DecomposeConfig(**given), **others), values.dry_run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
