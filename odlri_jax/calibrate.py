"""Program: second moments H of the input of every linear layer, from text, tokens or training rows.

    python -m odlri_jax.calibrate --checkpoint DIR --text FILE --out DIR
    python -m odlri_jax.calibrate --checkpoint DIR --tokens FILE.npy --out DIR --layers_per_group 4 --mesh 2,4,1
    python -m odlri_jax.calibrate --checkpoint DIR --rows harmless.jsonl,harmful.jsonl --out DIR --num_windows 512

Causal models see the windows as they are, LLaDA and Dream with tokens masked at random as in training: of rows, the
response alone. Each group of layers takes one pass over the windows; --layers_per_group bounds how many layers' H are
in memory at once. Run again with the same folder, it keeps the files that are there and takes a group that lacks one,
cut off or deleted, from its start; at SIGTERM it ends so, with code 0. On several hosts (`a2d_jax/distributed.py`) each
runs the same command with --mesh, walks the windows of its own devices, and process 0 writes.

    DIR/layer_000.safetensors ..., DIR/head.safetensors (--head), DIR/calibration.json: see `odlri_jax/calibration.py`
    DIR/unfinished.json   the settings, until calibration.json takes its place
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh

from a2d_jax.config import DIFFUSION_FAMILIES, ModelConfig, load_config
from a2d_jax.distributed import (
    Preemption,
    from_main,
    initialize_from_flags,
    is_main,
    own_rows,
    place_rows,
    say,
)
from a2d_jax.distributed import define_flags as define_host_flags
from a2d_jax.files import local_path, write_json
from a2d_jax.fingerprint import stored_weights
from a2d_jax.folders import hf_folder
from a2d_jax.mesh_flag import define_mesh_flag
from a2d_jax.models.transformer import Transformer
from a2d_jax.pretrained import load_pretrained, weights_fingerprint
from a2d_jax.progress import clock
from a2d_jax.resume import differences
from a2d_jax.safetensors_io import write_safetensors
from a2d_jax.sharding import batch_sharding, make_mesh, under
from a2d_jax.tokenizer import load_tokenizer
from odlri_jax.calibration import (
    CALIBRATION_NAME,
    FORMAT,
    VERSION,
    Group,
    input_widths,
    layer_file,
    model_input,
    observe,
    read_calibration_json,
    second_moments,
    zero_moments,
)
from odlri_jax.windows import DEFAULT_CONTEXT_LENGTH, Windows, batches, row_windows, text_windows, token_windows

UNFINISHED_NAME = "unfinished.json"
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
    """One calibration; the flags of the program describe the fields. One of `text`, `tokens` and `rows` is given."""

    checkpoint: str
    out: str
    text: str | None = None
    tokens: str | None = None
    rows: tuple[str, ...] | None = None
    context_length: int | None = None
    num_windows: int = 256
    batch_size: int = 4
    layers_per_group: int | None = None
    dtype: str = "float32"
    seed: int = 0
    head: bool = False
    mesh: tuple[int, ...] | None = None


def read_windows(config: CalibrateConfig, model: ModelConfig) -> tuple[Windows, str]:
    """The calibration windows, and for rows what was cut and padded; ValueError where there is not a single one."""
    given = [name for name in ("text", "tokens", "rows") if getattr(config, name)]
    if len(given) != 1:
        raise ValueError(f"--text, --tokens and --rows: give one of them, not {' and '.join(given) or 'none'}.")
    path = config.text or config.tokens
    if path and not Path(path).is_file():
        raise ValueError(f"no file {path!r} to calibrate on; give a text (--text) or a .npy of ids (--tokens).")
    if config.tokens:
        return token_windows(path, model.vocab_size, config.context_length, config.num_windows, model.max_length), ""
    tokenizer = load_tokenizer(hf_folder(config.checkpoint))
    if config.rows:
        return row_windows(config.rows, tokenizer, config.context_length, config.num_windows, model.max_length)
    return text_windows(path, tokenizer, config.context_length, config.num_windows, model.max_length), ""


def settings_of(config: CalibrateConfig, model: ModelConfig, windows: Windows) -> dict[str, Any]:
    """What H depends on, as calibration.json holds it; not the mesh nor the grouping, which change nothing in it."""
    digest = hashlib.sha256(windows.tokens.tobytes() + windows.attention_mask.tobytes())
    return {
        "format": FORMAT,
        "version": VERSION,
        "checkpoint": str(Path(config.checkpoint).absolute()),
        "source": ", ".join(str(Path(path).absolute()) for path in config.rows or (config.text or config.tokens,)),
        "tokens_sha256": digest.hexdigest(),
        "stored_weights": stored_weights(config.checkpoint),
        "family": model.family,
        "num_layers": model.num_layers,
        "num_tokens": int(windows.attention_mask.sum()),
        "num_windows": len(windows.tokens),
        "context_length": windows.tokens.shape[1],
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "seed": config.seed,
        "head": config.head,
    }


def check_folder(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `out` was completed; ValueError where it was begun with other settings, or nobody knows with which.

    Compared is what it noted: `weights` are known once the model is loaded, `stored_weights` are not in older folders.
    A folder without layers, such as a run leaves that was out of memory, holds nothing that depends on its settings.
    """
    is_complete = (out / CALIBRATION_NAME).is_file()
    path = out / (CALIBRATION_NAME if is_complete else UNFINISHED_NAME)
    if not is_complete and not any(out.glob("layer_*.safetensors")) and not (out / layer_file(None)).is_file():
        return False
    if not path.is_file():
        raise ValueError(f"{out} holds layers without {UNFINISHED_NAME}, of unknown settings; give another --out.")
    before = read_calibration_json(path)
    if changes := differences(before, settings, [name for name in settings if name in before]):
        raise ValueError(f"{out} was begun with other settings ({changes}); repeat those or give another --out.")
    return is_complete


def layer_groups(num_layers: int, layers_per_group: int | None) -> list[range]:
    size = layers_per_group or num_layers
    return [range(first, min(first + size, num_layers)) for first in range(0, num_layers, size)]


def group_files(layers: range, num_layers: int, has_head: bool) -> list[str]:
    """Files of a group; the head's belongs to the last one."""
    head = [layer_file(None)] if has_head and layers.stop == num_layers else []
    return [*map(layer_file, layers), *head]


def write_moments(out: Path, group: Group, num_tokens: int) -> None:
    """One file a layer, each written beside and renamed, where there is none; all processes call it, process 0 writes.

    Raises:
      ValueError: numbers that are not finite, before anything of that layer is written.
    """
    for layer, moments in group.items():
        tensors = second_moments(moments, num_tokens)
        broken = [name for name, h in tensors.items() if not np.isfinite(h).all()]
        if broken:
            where = "the head" if layer is None else f"layer {layer}"
            raise ValueError(
                f"the inputs {broken} of {where} are not finite: the weights hold NaN, or the activations "
                "leave the number format; check the checkpoint, or give --dtype float32."
            )
        shapes = {name: (h.shape, h.dtype) for name, h in tensors.items()}
        path = out / layer_file(layer)
        if is_main() and not path.is_file():
            write_safetensors(path, shapes, tensors.__getitem__)


def observe_group(
    model: Transformer,
    windows: Windows,
    layers: range,
    config: CalibrateConfig,
    mesh: Mesh | None,
    on_batch: Callable[[int], bool],
) -> Group | None:
    """The sums of a group of layers over all windows.

    Args:
      on_batch: hears the number of each batch done, from 1; None is returned where it says True, to stop.
    """
    group = zero_moments(model, layers, config.head and layers.stop == model.config.num_layers)
    for number, batch in enumerate(batches(windows, config.batch_size)):
        tokens, attention_mask, is_response = place_windows(batch, mesh)
        tokens = _model_input(model.config, config.seed, number, tokens, is_response)
        group = observe(model, tokens, attention_mask, group)
        jax.block_until_ready(list(group.values()))
        if on_batch(number + 1):
            return None
    return group


def place_windows(batch: Windows, mesh: Mesh | None) -> Windows:
    """A batch on the devices; each process gives the rows that its own hold."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = batch_sharding(mesh, batch.tokens.shape)
    rows = own_rows(sharding, len(batch.tokens))
    return Windows(*(place_rows(sharding, rows, len(batch.tokens), array[rows]) for array in batch))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _model_input(config: ModelConfig, seed: int, number, tokens: jax.Array, is_response: jax.Array) -> jax.Array:
    """`model_input` with the masks of batch `number`."""
    return model_input(config, jax.random.fold_in(jax.random.key(seed), number), tokens, is_response)


# -- the program ------------------------------------------------------------------------------------------------------


def run(config: CalibrateConfig, is_dry_run: bool = False) -> bool:
    """Calibrates what is not calibrated yet.

    Returns:
      Whether the folder is complete; not where a SIGTERM or the dry run left something to do.
    """
    out = local_path(config.out)
    model_config = load_config(hf_folder(config.checkpoint))
    mesh = make_mesh(*config.mesh) if config.mesh else None
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"several hosts share one mesh: give --mesh=data,fsdp,tensor, such as --mesh=1,{jax.device_count()},1, and "
            f"a --batch_size that data x fsdp divides."
        )
    num_ways = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    if config.batch_size % num_ways:
        raise ValueError(
            f"--batch_size={config.batch_size} does not split over the {num_ways} batch shards of the mesh; give a "
            f"multiple of {num_ways}."
        )
    windows, note = read_windows(config, model_config)
    settings = settings_of(config, model_config, windows)
    num_layers = model_config.num_layers
    groups = layer_groups(num_layers, config.layers_per_group)
    is_done = [all((out / name).is_file() for name in group_files(g, num_layers, config.head)) for g in groups]
    is_complete = check_folder(out, settings) and all(is_done)
    is_complete, is_done = from_main((np.array(is_complete), np.array(is_done)))
    todo = [group for group, done in zip(groups, is_done, strict=True) if not done]

    # --- Plan ------------------------------------------------------------------------------------------------------
    num_windows, context_length = windows.tokens.shape
    num_batches = -(-num_windows // config.batch_size)
    group_bytes = 8 * len(groups[0]) * sum(n * n for n in input_widths(model_config).values())
    noise = "masked at random" if model_config.family in DIFFUSION_FAMILIES else "as they are"
    say(
        f"model {config.checkpoint}: {model_config.family}, {num_layers} layers of width {model_config.width}, "
        f"{config.dtype}; devices: {dict(mesh.shape) if mesh else 1}"
        f" on {jax.process_count()} hosts\n"
        f"{settings['source']}: {num_windows} windows (of {config.num_windows} asked for) of {context_length} tokens, "
        f"{settings['num_tokens']} in all, {noise}; {num_batches} batches of {config.batch_size}"
        f"{note and f'; {note}'}\n"
        f"{len(groups)} groups of up to {len(groups[0])} layers, a pass over the batches each; sums of a group "
        f"{group_bytes / 2**30:.2f} GiB, over {mesh.size if mesh else 1} device(s); {len(groups) - len(todo)} done\n"
        f"writes {out}"
    )
    if is_complete or is_dry_run:
        unknown = "" if settings["stored_weights"] else "; the weights of the checkpoint were not compared"
        say(f"{out} is complete already{unknown}" if is_complete else "dry run: nothing done")
        return bool(is_complete)

    # --- Passes ----------------------------------------------------------------------------------------------------
    model = load_pretrained(config.checkpoint, mesh, jnp.dtype(config.dtype))
    settings["weights"] = weights_fingerprint(model)
    check_folder(out, settings)
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / UNFINISHED_NAME, settings)
    # An observed layer costs about twice as much as one that is only walked: its products are as large as its weights'.
    cost = {layers: layers.start + 2 * len(layers) for layers in todo}
    work_done, work, num_observed = 0.0, sum(cost.values()), 0
    start = last_print = time.monotonic()

    def report(layers: range, number: int) -> bool:
        nonlocal work_done, last_print, num_observed
        work_done += cost[layers] / num_batches
        now = time.monotonic()
        if now - last_print > 5 or number == num_batches:
            rate = number * config.batch_size * context_length / (now - group_start)
            eta = clock((now - start) * (work / work_done - 1))
            name = f"layers {layers.start}-{layers.stop - 1}"
            say(f"{name}: batch {number}/{num_batches}, {rate:.0f} tokens/s, ETA {eta}")
            last_print = now
        num_observed += 1
        return preemption.is_due(num_observed)

    with under(mesh), Preemption() as preemption:
        for layers in todo:
            group_start = time.monotonic()
            group = observe_group(model, windows, layers, config, mesh, functools.partial(report, layers))
            if group is None:
                say(f"stopped by SIGTERM; finished groups are kept, run the same command again: {out}")
                return False
            write_moments(out, group, settings["num_tokens"])
            del group  # before the next one's sums are made
    if is_main():
        write_json(out / CALIBRATION_NAME, settings)
        (out / UNFINISHED_NAME).unlink()
    what = f"{num_layers} layers" + (" and the head" if config.head else "")
    say(f"calibrated {what} on {settings['num_tokens']} tokens in {time.monotonic() - start:.0f} s -> {out}")
    return True


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "folder of any kind that loads", required=True)
    flags.DEFINE_string("out", None, "folder to write, and to continue", required=True)
    flags.DEFINE_string("text", None, "text file, tokenised with the checkpoint's tokenizer")
    flags.DEFINE_string("tokens", None, ".npy of int32 ids: (N,), or windows (N, T) with ids below 0 as padding")
    flags.DEFINE_list("rows", None, "files of training rows (.jsonl, .parquet); as many windows from each")
    flags.DEFINE_integer(
        "context_length",
        None,
        f"tokens of a window; default: T of --tokens, the longest row taken, or {DEFAULT_CONTEXT_LENGTH}; at most what "
        "the model takes and the text has",
        lower_bound=1,
    )
    flags.DEFINE_integer("num_windows", 256, "windows at most", lower_bound=1)
    flags.DEFINE_integer("batch_size", 4, "windows at once", lower_bound=1)
    flags.DEFINE_integer("layers_per_group", None, "layers whose H are in memory at once; default: all", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "of weights and activations; H is float32")
    flags.DEFINE_integer("seed", 0, "of the masks for LLaDA and Dream")
    flags.DEFINE_bool("head", False, "also the input of the head")
    define_mesh_flag()
    flags.DEFINE_bool("dry_run", False, "print the plan and stop")
    define_host_flags()


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    initialize_from_flags()
    given = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(CalibrateConfig)}
    given["rows"] = tuple(given["rows"]) if given["rows"] else None
    run(CalibrateConfig(**given), flags.FLAGS.dry_run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
