"""Program: train a masked-diffusion or causal model, A2D alignment or plain, all weights or an adapter.

    python -m a2d_jax.train --config configs/llada_8b_a2d.py --workdir DIR [--dry_run] [--profile] [--distributed]
    python -m a2d_jax.train --config configs/llada_8b_a2d.py --workdir DIR --config.optimizer.learning_rate=1e-5

Run again with the same folder and it continues; at SIGTERM it saves first and ends with code 0. On several hosts each
runs the same command with a folder that all of them share (`a2d_jax/distributed.py`). A config file sets what differs
from `settings.default_config()`:

    model.checkpoint          base model: a Hugging Face, converted or training folder
    model.from_scratch        take only config.json and the tokenizer from there, and draw the weights from the seed
    objective                 "llada" | "dream" | "causal"; None: by the model's family
    preference                None, or {beta, num_samples, is_antithetic, sft_weight}: rows are pairs of a chosen and a
                              rejected response, and the loss is that of a2d_jax/preference.py (VRPO)
    residual                  None, or {weight, target, text}: what stands behind the refusal token, residual.py
    lora                      None = train every weight (of a compressed checkpoint its 16-bit factors, the rest
                              frozen), or {rank, alpha, dropout, targets}
    dtypes.{param,compute}    "float32" | "bfloat16": stored weights (frozen ones under lora); activations and matmuls
    remat                     "none" | "dots" | "full": what the backward pass recomputes
    data.files                .jsonl, .parquet or a2d_jax.safety_rows folders
    data.*                    row_length, buckets, weights (of each file), harmful_share, ...: see data.DataConfig
    batch_size                rows of one update over all devices, computed in grad_accum_steps parts
    num_epochs, num_steps     how long; num_steps takes precedence
    mask_eps, time_range      the smallest masking probability; where the share of masked tokens is drawn from
    refusal_token             text of the token that harmful rows become; None: the base's own, [EOS]
    optimizer.*               learning_rate, weight_decay, b1, b2, eps, schedule, warmup_steps, clip_norm
    mesh.{data,fsdp,tensor}   devices along each axis, one may be -1
    seed, log_every, checkpoint_every (None: at the end), keep

The folder: see `a2d_jax/checkpoint.py`; besides, metrics.jsonl (one object a step), tensorboard/ and, with --profile,
profile/: a trace of three steady steps, for xprof and ui.perfetto.dev. training.lock keeps a second process out of a
local folder while one trains there.
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

from a2d_jax import refusal_token
from a2d_jax.assembly import assemble, check_mesh, compares_with_base, has_reference, with_adapter
from a2d_jax.checkpoint import Checkpoints, abstract_arrays, read_train_config
from a2d_jax.config import load_config
from a2d_jax.data import Batch, make_loader
from a2d_jax.distributed import (
    Preemption,
    define_flags,
    from_main,
    initialize_from_flags,
    is_main,
    own_rows,
    place_rows,
    say,
)
from a2d_jax.files import as_path, is_remote, write_json
from a2d_jax.folders import HF_FOLDER, TRAIN_CONFIG_NAME, hf_folder
from a2d_jax.metrics import MetricWriter, local_folder
from a2d_jax.models.transformer import Transformer
from a2d_jax.orbax_io import copy_companions
from a2d_jax.pretrained import abstract_base, load_base
from a2d_jax.progress import clock
from a2d_jax.reference import with_reference
from a2d_jax.residual_targets import make_residual
from a2d_jax.resume import held
from a2d_jax.settings import RunConfig, check_resumable
from a2d_jax.sharding import batch_sharding, make_mesh
from a2d_jax.throughput import StepTrace, memory_in_use, train_flops, utilization
from a2d_jax.tokenizer import load_tokenizer
from a2d_jax.training import (
    init_state,
    pure,
    split_model,
)

PROFILE_FOLDER = "profile"
# Steps that --profile traces: a few after the first, which compile.
_PROFILED_STEPS = 3, 5  # the first and the last, counted from the first of this start


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def train(
    config: Mapping, workdir: str | Path, is_dry_run: bool = False, devices: Sequence[jax.Device] | None = None,
    is_profiled: bool = False,
) -> bool:  # fmt: skip
    """Trains as the config says, or continues what `workdir` holds. `devices`: all of them by default.

    Returns:
      Whether the run is complete; not after a SIGTERM or a dry run.
    """
    with contextlib.ExitStack() as resources:
        return _train(config, workdir, is_dry_run, devices, is_profiled, resources)


def _train(config, workdir, is_dry_run, devices, is_profiled, resources: contextlib.ExitStack) -> bool:
    """`train`; what is to be freed at its end goes to `resources`."""
    # ------------------------------------------------------------------------------------------------------------------
    # The run: its config, and whether the folder holds an earlier part of it
    # ------------------------------------------------------------------------------------------------------------------
    run = RunConfig.from_dict(config)
    base = hf_folder(run.model.checkpoint)
    if Path(workdir).resolve() in (Path(run.model.checkpoint).resolve(), base.resolve()):
        raise ValueError(f"--workdir is the folder of the base model itself ({workdir}); choose another folder.")
    workdir = as_path(workdir)
    is_continued = (workdir / TRAIN_CONFIG_NAME).is_file()
    settings = run.to_json()
    settings["model"]["checkpoint"] = str(Path(run.model.checkpoint).absolute())
    if is_continued:
        check_resumable(read_train_config(workdir), settings, run.optimizer.schedule)

    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, devices)

    # ------------------------------------------------------------------------------------------------------------------
    # Data, and the model as shapes
    # ------------------------------------------------------------------------------------------------------------------
    model_config = load_config(base)
    tokenizer = load_tokenizer(base)
    refusal_id = refusal_token.choose(run.refusal_token, tokenizer, model_config)
    check_mesh(run, model_config, mesh)
    dtypes = run.dtypes.resolve()
    rows = own_rows(batch_sharding(mesh, (run.batch_size,)), run.batch_size)
    loader = make_loader(run.files, tokenizer, run.data, run.batch_size, run.seed, rows)
    if loader.is_paired != (run.preference is not None):
        found, needed = ("pairs", "set config.preference") if loader.is_paired else ("single responses", "give pairs")
        raise ValueError(
            f"config.preference={run.preference}, but the rows of {list(run.files)} are {found}; {needed}."
        )
    num_steps = run.num_steps or math.ceil(run.num_epochs * loader.summary.num_rows / run.batch_size)

    shapes = abstract_base(run.model.checkpoint, dtypes, run.remat)
    residual = None
    if run.residual is not None and run.residual.weight > 0:
        residual = make_residual(run.residual, tokenizer, loader.encoded, model_config.vocab_size, refusal_id)
    assembly = assemble(run, shapes, mesh, num_steps, tokenizer.mask_id, refusal_id, residual)
    trained_shapes, frozen_shapes, shardings = assembly.trained, assembly.frozen, assembly.shardings
    if run.model.from_scratch and frozen_shapes:
        raise ValueError("config.model.from_scratch draws dense weights; name a checkpoint that is not compressed.")

    # ------------------------------------------------------------------------------------------------------------------
    # The plan
    # ------------------------------------------------------------------------------------------------------------------
    origin = "from scratch after" if run.model.from_scratch else "from"
    what = "the factors of its compressed projections" if frozen_shapes else "every weight"
    if run.lora is not None:
        what = f"LoRA r={run.lora.rank} alpha={run.lora.alpha:g} on {', '.join(assembly.model.lora.targets)}"
    num_params, num_trained = count(trained_shapes) + count(frozen_shapes), count(trained_shapes)
    objective, optimization, device = assembly.objective, run.optimizer, mesh.devices.flat[0]
    refusal_text = run.refusal_token or tokenizer.hf.convert_ids_to_tokens(refusal_id)
    lesson = f"harmful rows become {refusal_id} ({refusal_text!r}), t in {run.time_range}, eps {run.mask_eps:g}"
    if residual is not None:
        lesson += f", residual term {run.residual.weight:g} x {run.residual.target}"
    if run.preference is not None:
        lesson = f"chosen before rejected responses, {run.preference}"
    say(
        f"model      {model_config.family}, {model_config.num_layers} layers of width {model_config.width}, vocabulary "
        f"{model_config.vocab_size}, {num_params:,} parameters; {origin} {run.model.checkpoint}\n"
        f"training   {what}: {num_trained:,} parameters in float32; compute {run.dtypes.compute}, remat {run.remat}\n"
        f"objective  {objective.name}, [MASK] {objective.mask_id}, [EOS] {tokenizer.eos_id}; {lesson}\n"
        f"optimizer  AdamW, {optimization.schedule} rate {optimization.learning_rate:g} after "
        f"{optimization.warmup_steps} warm-up steps, weight decay {optimization.weight_decay:g}, clip "
        f"{optimization.clip_norm}\n"
        f"devices    {mesh.size} {device.device_kind} on {jax.process_count()} hosts, mesh {dict(mesh.shape)}\n"
        f"data       {str(loader.summary).replace(chr(10), chr(10) + ' ' * 11)}\n"
        f"batches    {run.batch_size} rows in {run.grad_accum_steps} parts, lengths {list(loader.buckets)}; "
        f"{loader.steps_per_epoch} a pass over the data\n"
        f"steps      {num_steps}, checkpoint every {run.checkpoint_every or num_steps}, the newest {run.keep} kept\n"
        f"writes     {workdir}"
    )
    if is_dry_run:
        return False

    # ------------------------------------------------------------------------------------------------------------------
    # The folder: complete in itself before the first step
    # ------------------------------------------------------------------------------------------------------------------
    if is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        if not (is_remote(workdir) or resources.enter_context(held(Path(workdir) / "training", waits=False))):
            raise ValueError(f"another process trains in {workdir}; wait for its end, or choose another --workdir.")
        if not is_continued:
            copy_companions(base, workdir / HF_FOLDER)
            if run.refusal_token is not None:
                refusal_token.record(workdir / HF_FOLDER, run.refusal_token, refusal_id, tokenizer)
        write_json(workdir / TRAIN_CONFIG_NAME, settings)

    # ------------------------------------------------------------------------------------------------------------------
    # Weights. Order of precedence: the folder's newest checkpoint, then the base's weights or random ones.
    # ------------------------------------------------------------------------------------------------------------------
    checkpoints = Checkpoints(workdir, run.keep)
    first_step = int(from_main(np.int32(max(checkpoints.steps(), default=0))))
    if first_step >= num_steps:
        say(f"already trained for {first_step} steps, nothing to do: {workdir}")
        checkpoints.close()
        return True
    params, frozen = None, {}
    if frozen_shapes or has_reference(run) or not (first_step or run.model.from_scratch):
        _, trained, frozen = split_model(with_adapter(load_base(run.model.checkpoint, mesh, dtypes, run.remat), run))
        params = jax.device_put(pure(trained), shardings.state.params)
        frozen = pure(frozen)
        if has_reference(run):
            frozen = with_reference(frozen, params, dtypes.compute)
        frozen = jax.device_put(frozen, shardings.frozen)
        del trained
    elif not first_step:
        random = lambda: pure(nnx.state(Transformer(model_config, dtypes, rngs=nnx.Rngs(run.seed))))
        params = jax.jit(random, out_shardings=shardings.state.params)()

    start = partial(init_state, optimizer=assembly.optimizer)
    batches = iter(loader)
    if first_step:
        abstract = abstract_arrays(jax.eval_shape(start, pure(trained_shapes)), shardings.state)
        state, data_state = checkpoints.restore(first_step, abstract)
        batches.set_state(data_state)
        say(f"continuing after step {first_step}")
    else:
        state = jax.jit(start, donate_argnums=0, out_shardings=shardings.state)(params)
    del params

    # ------------------------------------------------------------------------------------------------------------------
    # The loop. The host queues steps and reads their numbers only when it logs or saves, so devices never wait for it.
    # ------------------------------------------------------------------------------------------------------------------
    writer = MetricWriter(workdir, first_step, is_silent=not is_main())
    place = partial(place_rows, shardings.batch, rows, run.batch_size)
    queued, seen_lengths = [], set()
    traced = (None, None)
    if is_profiled and is_main():
        traced = tuple(min(first_step + 1 + step, num_steps) for step in _PROFILED_STEPS)
    started = window_start = time.monotonic()

    def report() -> None:
        """Reads the queued steps, writes them and prints one line; stops the run at a loss that is not a number."""
        nonlocal window_start
        steps, lengths, metrics = zip(*queued, strict=True)
        metrics = jax.device_get(metrics)  # waits for the last of them
        seconds, window_start = time.monotonic() - window_start, time.monotonic()
        step, rate, tokens_per_second = steps[-1], len(steps) / seconds, run.batch_size * sum(lengths) / seconds
        speed = {"step_seconds": 1 / rate, "tokens_per_second": tokens_per_second, **memory_in_use(mesh.local_devices)}
        flops = [train_flops(model_config, run.lora, num_trained, run.batch_size * n, n) for n in lengths]
        mfu = utilization(sum(flops), seconds, mesh.devices.flat)
        if compares_with_base(run):
            mfu = None  # the passes of a reference are not counted
        if mfu is not None:
            speed["mfu"] = mfu
        num_good = sum(bool(numbers["is_finite"]) for numbers in metrics)  # all after the first bad one are marked bad
        lines = [
            {"step": step} | {name: float(numbers[name]) for name in objective.metrics} | speed
            for step, numbers in zip(steps, metrics, strict=True)
        ]
        queued.clear()
        writer.write(lines[:num_good])
        if num_good < len(lines):
            bad = lines[num_good]
            checkpoints.wait()
            raise FloatingPointError(
                f"step {bad['step']}: loss {bad['loss']}, gradient norm {bad['grad_norm']}; the update was not applied "
                f"and the run stopped. {checkpoints.folder} keeps the steps {checkpoints.steps()}. Start in a new "
                "--workdir with a lower config.optimizer.learning_rate, or set config.optimizer.clip_norm."
            )
        mean_loss = np.mean([line["loss"] for line in lines])
        say(
            f"step {step}/{num_steps}  loss {mean_loss:.4f}  {rate:.2f} steps/s  {tokens_per_second:.0f} tokens/s  "
            + (f"MFU {mfu:.1%}  " if mfu is not None else "")
            + f"ETA {clock((num_steps - step) / rate)}"
        )
        checkpoints.check()

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        local_folder(workdir / PROFILE_FOLDER) as (trace_folder, _),
        StepTrace(trace_folder, *traced) as trace,
        jax.set_mesh(mesh),
        Preemption() as preemption,
    ):
        for step in range(first_step + 1, num_steps + 1):
            batch = next(batches)
            if batch.tokens.shape[1] not in seen_lengths:
                seen_lengths.add(batch.tokens.shape[1])
                say(f"step {step}: the first batch of length {batch.tokens.shape[1]}, compiling")
            trace.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = assembly.update(state, frozen, Batch(*map(place, batch)))
            if trace.after(step, state):
                say(f"steps {traced[0]} to {step} traced: {workdir / PROFILE_FOLDER}")
            queued.append((step, np.sum(batch.attention_mask, axis=1).mean(), metrics))
            is_stopped = preemption.is_due(step)
            is_saved = step == num_steps or is_stopped
            is_saved |= run.checkpoint_every is not None and step % run.checkpoint_every == 0
            if is_saved or step % run.log_every == 0:
                report()  # before a checkpoint, which must hold nothing broken
            if is_saved:
                checkpoints.save(step, state, batches.get_state())
            if is_stopped:
                break
        checkpoints.wait()
    what = f"trained {step - first_step} steps in {clock(time.monotonic() - started)}: {checkpoints.folder / str(step)}"
    if step < num_steps:
        what += f" (stopped by SIGTERM, {num_steps - step} steps are left; run the same command again)"
    say(what)
    return step == num_steps


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    initialize_from_flags()
    train(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.dry_run, is_profiled=flags.FLAGS.profile)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "the run: a file of configs/", lock_config=True)
    flags.DEFINE_string("workdir", None, "folder to write, and to continue from", required=True)
    flags.DEFINE_bool("dry_run", False, "print the plan and stop")
    flags.DEFINE_bool("profile", False, "trace three steady steps into the workdir, for xprof and ui.perfetto.dev")
    define_flags()
    flags.mark_flag_as_required("config")
    app.run(main)
