"""From a run's settings to its update, as shapes alone: what `train` executes and what a compiler can be shown.

Nothing here touches a weight; the mesh may be one of described devices that do not exist.
"""

from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from a2d_jax.config import ModelConfig
from a2d_jax.data import Batch
from a2d_jax.losses import objective_of
from a2d_jax.models.lora import add_lora
from a2d_jax.models.transformer import Transformer
from a2d_jax.objective import Objective
from a2d_jax.reference import REFERENCE
from a2d_jax.residual import Residual
from a2d_jax.settings import RunConfig
from a2d_jax.training import (
    Shardings,
    init_state,
    learning_rate,
    make_optimizer,
    make_shardings,
    make_update,
    pure,
    split_model,
)


class Assembly(NamedTuple):
    """A run, assembled: shapes, and the jitted `update`, which donates its state; lower or call it under
    `jax.set_mesh`."""

    model: Transformer
    trained: nnx.State
    frozen: nnx.State
    objective: Objective
    optimizer: optax.GradientTransformation
    shardings: Shardings
    update: jax.stages.Wrapped


def with_adapter(model: Transformer, run: RunConfig) -> Transformer:
    """The model with the run's adapter, freshly drawn from its seed, where the run has one."""
    if run.lora is not None:
        add_lora(model, run.lora, nnx.Rngs(run.seed))
    return model


def compares_with_base(run: RunConfig) -> bool:
    """Whether the loss also looks at what the weights say that the run started from."""
    return run.preference is not None or (run.residual is not None and run.residual.needs_reference)


def has_reference(run: RunConfig) -> bool:
    """Whether the run keeps a copy of the weights that it started from; under LoRA the frozen base is one."""
    return compares_with_base(run) and run.lora is None


def check_mesh(run: RunConfig, config: ModelConfig, mesh: Mesh) -> None:
    """ValueError where the batch or the heads do not split over the mesh."""
    rows_at_once = mesh.shape["data"] * mesh.shape["fsdp"] * run.grad_accum_steps
    rows_at_once *= 1 if run.preference is None else 2  # a pair stays together
    if run.batch_size % rows_at_once:
        raise ValueError(
            f"config.batch_size={run.batch_size} does not split over data={mesh.shape['data']} x fsdp="
            f"{mesh.shape['fsdp']} devices in grad_accum_steps={run.grad_accum_steps} parts; use a multiple of "
            f"{rows_at_once}."
        )
    check_heads(config, mesh)


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """ValueError where a device would hold part of a head."""
    tensor = mesh.shape["tensor"]
    for what, number in (("heads", config.num_heads), ("key/value heads", config.num_kv_heads)):
        if number % tensor:
            raise ValueError(
                f"mesh tensor={tensor} does not divide the {number} {what} of this {config.family} model; use a "
                f"divisor of {np.gcd(config.num_heads, config.num_kv_heads)} and give the other devices to fsdp."
            )


def assemble(
    run: RunConfig, base: Transformer, mesh: Mesh, num_steps: int, mask_id: int | None, refusal_id: int,
    residual: Residual | None = None,
) -> Assembly:  # fmt: skip
    """The update of a run that `check_mesh` has passed.

    Args:
      base: the model as shapes, without the run's adapter.
      refusal_id: what harmful rows become: the model's [EOS], or the run's refusal token.
      num_steps: of the whole run, for the learning rate.
      residual: the run's residual term, where it has one.
    """
    model = nnx.eval_shape(lambda model: with_adapter(model, run), base)
    graphdef, trained, frozen = split_model(model)
    optimizer = make_optimizer(run.optimizer, num_steps)
    shardings = make_shardings(trained, frozen, optimizer, mesh, has_reference(run))
    name = run.objective or objective_of(base.config.family)
    if (name == "causal") != base.config.is_causal:
        kind = "causal" if base.config.is_causal else "masked-diffusion"
        raise ValueError(f"config.objective={name!r} on a {kind} model ({base.config.family}); leave it None.")
    if name == "causal" and run.refusal_token is not None:
        raise ValueError(
            f"config.refusal_token={run.refusal_token!r} with a causal model ({base.config.family}): a causal response "
            "ends with [EOS] alone; leave it None."
        )
    if name == "causal" and run.preference is not None:
        raise ValueError(
            f"config.preference with a causal model ({base.config.family}): its loss needs masks; leave it None, or "
            "take a masked-diffusion model."
        )
    objective = Objective(
        name,
        mask_id,
        refusal_id,
        run.mask_eps,
        run.time_range,
        grad_accum_steps=run.grad_accum_steps,
        seed=run.seed,
        preference=run.preference,
        residual=residual,
    )
    update = make_update(graphdef, objective, optimizer, learning_rate(run.optimizer, num_steps), shardings)
    return Assembly(model, trained, frozen, objective, optimizer, shardings, update)


def abstract_arguments(assembly: Assembly, batch_size: int, length: int):
    """Shapes of (state, frozen, batch) for `assembly.update.lower`; placement comes from the update itself."""
    state = jax.eval_shape(lambda params: init_state(params, assembly.optimizer), pure(assembly.trained))
    rows = lambda dtype: jax.ShapeDtypeStruct((batch_size, length), dtype)
    batch = Batch(rows(np.int32), rows(bool), rows(bool), jax.ShapeDtypeStruct((batch_size,), bool))
    frozen = pure(assembly.frozen)
    if REFERENCE in assembly.shardings.frozen:
        dtype = assembly.model.dtypes.compute
        frozen[REFERENCE] = jax.tree.map(lambda param: jax.ShapeDtypeStruct(param.shape, dtype), state.params)
    return state, frozen, batch
