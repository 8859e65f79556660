"""The steps that a TPU is asked about, from abstract shapes: training, decoding, calibration, decomposition.

Each builder returns a `Step`, whose `lower()` traces the very function that the program runs. No weight is allocated.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from a2d_jax import decoding
from a2d_jax.assembly import abstract_arguments, assemble, check_heads, check_mesh, compares_with_base
from a2d_jax.checkpoint import abstract_arrays
from a2d_jax.hf_io import abstract_model
from a2d_jax.models.naming import projections, tensor_names
from a2d_jax.residual import Residual
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import response_plan
from a2d_jax.settings import DTypeSettings, MeshSettings, RunConfig
from a2d_jax.sharding import batch_sharding, make_mesh, param_shardings, partition_spec
from a2d_jax.throughput import forward_flops, train_flops
from launch.settings import architecture
from odlri_jax import calibration
from odlri_jax.decompose import check_shape, decompose_stack_jitted
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.packed_io import pack_shapes


class Step(NamedTuple):
    """One program.

    Attributes:
      title: what it does, for people.
      mesh: the chips it runs on.
      lower: traces it.
      model_flops: matmul FLOPs that the method itself needs, over all chips; None where none is defined.
    """

    title: str
    mesh: Mesh
    lower: Callable[[], jax.stages.Lowered]
    model_flops: float | None


def _mesh(config: Mapping[str, Any], devices) -> Mesh:
    sizes = MeshSettings(**config["mesh"])
    return make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)


def _placed_state(model: nnx.Module, mesh: Mesh):
    graphdef, state = nnx.split(model)
    return graphdef, abstract_arrays(state, param_shardings(state, mesh))


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape))


def _check_batch(what: str, batch_size: int, mesh: Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"{what}={batch_size} does not split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices; "
            f"use a multiple of {ways}."
        )


def _check_describes(step: str, config: Mapping[str, Any], *fields: str) -> None:
    missing = [field for field in fields if field not in config]
    if missing:
        raise ValueError(
            f"the config describes no {step} step: it lacks {', '.join(missing)}; give one that launch/settings.py "
            "makes for it, or another --step."
        )


def _dtypes(config: Mapping[str, Any]):
    return DTypeSettings(**config["dtypes"]).resolve()


# -- training ---------------------------------------------------------------------------------------------------------


def train_step(config: Mapping[str, Any], devices) -> Step:
    """One update of `a2d_jax.train`, on rows of the longest bucket."""
    run = RunConfig.from_dict(config)
    model_config = architecture(run.model.checkpoint)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, devices)
    check_mesh(run, model_config, mesh)
    shapes = abstract_model(model_config, run.dtypes.resolve(), run.remat)
    residual = None
    if run.residual is not None and run.residual.weight > 0:  # what its target is changes no shape
        uniform = np.full(model_config.vocab_size, 1 / model_config.vocab_size, np.float32)
        residual = Residual(run.residual, None if run.residual.needs_reference else uniform)
    assembly = assemble(run, shapes, mesh, run.num_steps or 1, model_config.mask_id, model_config.eos_id, residual)
    length = max(run.data.buckets or (run.data.row_length,))

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return assembly.update.lower(*abstract_arguments(assembly, run.batch_size, length))

    num_trained = sum(math.prod(x.shape) for x in jax.tree.leaves(assembly.trained))
    model_flops = None  # the passes of a reference, and of the masked copies of preferences, are not counted
    if not compares_with_base(run):
        model_flops = train_flops(model_config, run.lora, num_trained, run.batch_size * length, length)
    what = "every weight" if run.lora is None else f"LoRA of rank {run.lora.rank}"
    return Step(
        f"one update of {what}, {run.batch_size} rows x {length} tokens in {run.grad_accum_steps} parts, "
        f"remat {run.remat}",
        mesh,
        lower,
        model_flops,
    )


# -- decoding ---------------------------------------------------------------------------------------------------------


def sample_step(config: Mapping[str, Any], devices) -> Step:
    """A pass and what it reveals in `a2d_jax.generate`; the loop around it depends on data, so it counts once.

    With a cache: the pass that fills it, and one of those that use it.
    """
    _check_describes("sample", config, "model", "dtypes", "mesh", "batch_size", "prompt_length", "sampler")
    model_config, mesh = architecture(config["model"]["checkpoint"]), _mesh(config, devices)
    check_heads(model_config, mesh)
    batch_size, sampler = config["batch_size"], SamplerConfig(**config["sampler"])
    _check_batch("config.batch_size", batch_size, mesh)
    length = config["prompt_length"] + sampler.gen_length
    plan = response_plan(sampler, model_config.family, length)
    model = abstract_model(model_config, _dtypes(config))
    if packed := config.get("packed"):
        blocks = [path for path in projections(model_config) if path.startswith("blocks.")]
        pack_shapes(model, blocks, DecomposeConfig(**packed), _dtypes(config))
    graphdef, state = _placed_state(model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def lower() -> jax.stages.Lowered:
        tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        mask = jax.ShapeDtypeStruct((batch_size, length), bool)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
        rows = jax.eval_shape(lambda *arrays: decoding.start_rows(*arrays, plan, False), tokens, tokens, mask, keys)
        rows = jax.tree.map(lambda x: _rows(mesh, x.shape, x.dtype), rows)
        with jax.set_mesh(mesh):
            if sampler.cache is None:
                max_running = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
                return decoding.decode.lower(graphdef, state, None, rows, max_running, decoding.Draws(), plan=plan)
            num_positions = sampler.gen_length if sampler.cache == "prefix" else sampler.gen_length // plan.num_blocks
            return decoding.decode_block.lower(
                graphdef, state, None, rows, decoding.Draws(), plan=plan, num_positions=num_positions
            )

    num_tokens = (2 if sampler.cfg_scale else 1) * batch_size * length
    weights, attention = forward_flops(model_config, num_tokens, length)
    not_scored = num_tokens * (1 - plan.num_candidates / length)
    return Step(
        f"one decoding pass over {batch_size} rows x {length} tokens, "
        + (f"blocks in {packed['q_bits']} bits, " if packed else "")
        + f"{config['dtypes']['param']}, "
        f"cache {sampler.cache}",
        mesh,
        lower,
        weights + attention - 2.0 * not_scored * model_config.width * model_config.vocab_size,
    )


# -- compression ------------------------------------------------------------------------------------------------------


def calibrate_step(config: Mapping[str, Any], devices) -> Step:
    """The sums of one layer for one batch in `odlri_jax.calibrate`, all layers of the model being in memory."""
    _check_describes("calibrate", config, "model", "dtypes", "mesh", "calibrate")
    model_config, mesh = architecture(config["model"]["checkpoint"]), _mesh(config, devices)
    check_heads(model_config, mesh)
    sizes, dtypes = config["calibrate"], _dtypes(config)
    shape = (sizes["batch_size"], sizes["length"])
    _check_batch("config.calibrate.batch_size", shape[0], mesh)
    model = abstract_model(model_config, dtypes)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def lower() -> jax.stages.Lowered:
        graphdef, state = _placed_state(model, mesh)
        block_def, (_, is_sliding) = model.layer_stack()
        inputs = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
        _, context = jax.eval_shape(lambda state, *inputs: nnx.merge(graphdef, state).enter(*inputs), state, *inputs)
        context = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), context)

        def zeros(n: int) -> jax.ShapeDtypeStruct:
            spec = partition_spec(calibration.ROWS, (n, n), mesh)
            return jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=NamedSharding(mesh, spec))

        sums = {name: zeros(n) for name, n in calibration.input_widths(model_config).items()}
        index = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        x = _rows(mesh, (*shape, model_config.width), dtypes.compute)
        with jax.set_mesh(mesh):
            return calibration.observe_layer.lower(
                block_def, (state["blocks"], is_sliding), index, x, context, _rows(mesh, shape, bool),
                calibration.Moments(sums, dict(sums)),
            )  # fmt: skip

    num_tokens = math.prod(shape)
    weights, attention = forward_flops(model_config, num_tokens, shape[1])
    layer = weights - 2.0 * num_tokens * model_config.width * model_config.vocab_size + attention
    products = sum(2.0 * num_tokens * n * n for n in calibration.input_widths(model_config).values())
    return Step(
        f"second moments of one layer from {shape[0]} windows x {shape[1]} tokens",
        mesh,
        lower,
        layer / model_config.num_layers + products,
    )


def decompose_step(config: Mapping[str, Any], devices, shape: tuple[int, int] | None = None) -> Step:
    """One matrix a chip in `odlri_jax.compress`, of the given shape or of the one that costs most."""
    _check_describes("decompose", config, "model", "decompose")
    model_config = architecture(config["model"]["checkpoint"])
    mesh = make_mesh(-1, 1, 1, devices)
    settings = DecomposeConfig(**config["decompose"])
    kernels = (name.shape for name in tensor_names(model_config) if name.layer == 0 and name.path[-1] == "kernel")
    m, n = shape or max(kernels, key=lambda s: s[0] * s[1] * s[1])
    check_shape((m, n), settings, "--shape" if shape else "the largest matrix")

    def lower() -> jax.stages.Lowered:
        split = functools.partial(NamedSharding, mesh)
        stack = split(PartitionSpec(mesh.axis_names))
        key = jax.eval_shape(lambda: jax.random.key(0))
        with jax.set_mesh(mesh):
            return decompose_stack_jitted.lower(
                jax.ShapeDtypeStruct((mesh.size, m, n), jnp.float32, sharding=stack),
                jax.ShapeDtypeStruct((mesh.size, n, n), jnp.float32, sharding=stack),
                jax.ShapeDtypeStruct((mesh.size,), key.dtype, sharding=stack),
                settings,
                mesh,
            )

    return Step(
        f"decomposition of {mesh.size} matrices {m} x {n}, one a chip; rank {settings.rank}, {settings.q_bits} bits, "
        f"{settings.outer_iters} alternations, start {settings.init}",
        mesh,
        lower,
        None,
    )


BUILDERS = {"train": train_step, "sample": sample_step, "calibrate": calibrate_step, "decompose": decompose_step}
