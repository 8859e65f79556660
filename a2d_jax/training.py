"""The training step: corrupt, score, accumulate, clip, update; arrays in, arrays out.

One update is one jitted function of (state, frozen weights, clean batch). Its randomness comes from the seed and the
step number alone, so a run that is stopped and restored repeats itself exactly. The weights of the loss are taken over
the whole batch before it is cut into micro-batches: the number of parts changes memory, not the result.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from a2d_jax.chunked_losses import Head, scored_sum
from a2d_jax.gradients import Params, grads_in_parts
from a2d_jax.losses import align_targets, position_weights
from a2d_jax.masking import corrupt, next_tokens
from a2d_jax.models.transformer import Transformer
from a2d_jax.objective import Objective
from a2d_jax.preference_training import preference_grads
from a2d_jax.reference import REFERENCE, split_reference
from a2d_jax.residual import base_target, kept_tokens, residual_divergence
from a2d_jax.sharding import RULES, param_shardings

# Share of the run behind us (0 .. 1, warm-up excluded) -> share of the learning rate.
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}
# Norm scales and biases are not decayed, and neither are the factors ("left", "right") of a compressed checkpoint: they
# hold a part of the weights, and the other part, Q, could not follow.
_DECAYED = ("kernel", "embedding", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the defaults are the A2D paper's.

    weight_decay: decoupled; of matrices, the embedding and an adapter's factors, not of norms, biases or the factors of
    a compressed checkpoint. clip_norm: of the global gradient; None: off.
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = None


class TrainState(NamedTuple):
    """What training changes. `step` counts the updates applied; `is_finite` turns False for good at the first loss or
    gradient that is not a number, and from then on nothing changes any more."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array  # () int32
    is_finite: jax.Array  # () bool


class Shardings(NamedTuple):
    """Where state, frozen weights, batch and metrics live on the mesh."""

    state: TrainState
    frozen: Params
    batch: NamedSharding
    metrics: NamedSharding


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of an update by its number, from 0: a linear rise over `warmup_steps`, then the schedule."""

    def rate(step: jax.Array) -> jax.Array:
        rise = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
        return config.learning_rate * rise * SCHEDULES[config.schedule](jnp.clip(progress, 0.0, 1.0))

    return rate


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW."""

    def is_decayed(params: Params) -> Params:
        return jax.tree.map_with_path(lambda path, _: path[-1].key in _DECAYED, params)

    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.adamw(
        learning_rate(config, num_steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
        mask=is_decayed,
    )  # fmt: skip
    return optax.chain(clip, adamw)


def split_model(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(structure, trained, frozen): low-rank factors where the model carries some (an adapter's, or those of a
    compressed checkpoint), else every weight."""
    if nnx.state(model, nnx.LoRAParam):
        return nnx.split(model, nnx.LoRAParam, ...)
    if nnx.state(model, nnx.Not(nnx.Param)):
        raise ValueError(
            "the checkpoint is compressed and its factors are quantised: nothing in it can be trained in place. Turn "
            "the factors into 16-bit ones first: python -m odlri_jax.export --layout packed --lr_bits 16."
        )
    return nnx.split(model, nnx.Param, ...)


def pure(state: nnx.State) -> Params:
    """A module's state as a nested dict of arrays."""
    return nnx.to_pure_dict(state)


def make_shardings(
    trained: nnx.State, frozen: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh, has_reference=False
) -> Shardings:
    """Placement by the rules table; a moment of the optimizer, and the reference's copy of a parameter, lie where that
    parameter does."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = pure(param_shardings(trained, mesh))
    opt_state = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, jax.eval_shape(optimizer.init, pure(trained)), params,
        transform_non_params=lambda _: everywhere,
    )  # fmt: skip
    return Shardings(
        state=TrainState(params, opt_state, everywhere, everywhere),
        frozen=pure(param_shardings(frozen, mesh)) | ({REFERENCE: params} if has_reference else {}),
        batch=NamedSharding(mesh, PartitionSpec(RULES["batch"])),
        metrics=everywhere,
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.bool(True))


def residual_term(objective: Objective, head: Head, base: Transformer | None, noisy_tokens, mask):
    """(the head with the residual term beside it, the term's inputs beside the weights (B, T) and the clean tokens
    (B, T))."""
    is_kept = kept_tokens(head.vocab_size, (objective.refusal_id, objective.mask_id))
    if base is None:

        def against_constant(frozen, logits, weights, clean_tokens):
            del frozen, clean_tokens
            return weights * residual_divergence(logits, objective.residual.target, is_kept)

        return head._replace(extra=against_constant), ()
    base_logits_of, *base_arrays = base.split_head()

    def logits_of(trained, frozen, hidden, key):
        return head.logits_of(trained, frozen[0], hidden, key)

    def against_base(frozen, logits, weights, clean_tokens, base_hidden):
        base_logits = base_logits_of(*frozen[1], base_hidden, None)
        target = base_target(base_logits, clean_tokens, is_kept)  # (G, C, V)
        return weights * residual_divergence(logits, jax.lax.stop_gradient(target), is_kept)

    both = head._replace(logits_of=logits_of, frozen=(head.frozen, base_arrays), extra=against_base)
    return both, (jax.lax.stop_gradient(base.hidden_states(noisy_tokens, mask)),)


def loss_and_grads(
    graphdef: nnx.GraphDef, objective: Objective, params: Params, frozen: Params, noised, attention_mask, dropout_key,
    clean_tokens=None,
) -> tuple[jax.Array, Params]:  # fmt: skip
    """Loss of each row (B,), whose sum is the A2D loss of the batch, and the gradient of that sum, float32.

    The residual term also needs the batch's clean tokens (B, T).
    """
    frozen, reference = split_reference(frozen, params)
    weights = position_weights(noised, objective.name)  # (B, T), of the whole batch
    residual = None
    if objective.residual is not None:
        harmful_weights = jnp.where(noised.is_safe[:, None], 0.0, objective.residual.config.weight * weights)
        residual = align_targets(clean_tokens, harmful_weights, objective.name)

    def loss_of_part(params: Params, part, key) -> tuple[jax.Array, jax.Array]:
        noisy_tokens, targets, part_weights, mask, residual = part  # each (B / parts, T)
        model = nnx.merge(graphdef, params, frozen)
        body_key, head_key = (None, None) if key is None else jax.random.split(key)
        hidden = model.hidden_states(noisy_tokens, mask, dropout_key=body_key)  # (B / parts, T, D)
        targets, part_weights = align_targets(targets, part_weights, objective.name)
        head, extra_inputs = Head(*model.split_head(), model.config.vocab_size), ()
        if residual is not None:
            has_base = objective.residual.config.needs_reference
            base = nnx.merge(graphdef, reference, frozen) if has_base else None
            head, inputs = residual_term(objective, head, base, noisy_tokens, mask)
            harmful_tokens, harmful_weights = residual
            extra_inputs = (harmful_weights, harmful_tokens, *inputs)
        total, token_loss = scored_sum(head, hidden, targets, part_weights, head_key, extra_inputs)
        return total, jnp.sum(token_loss, axis=1)

    parts = (noised.noisy_tokens, noised.tokens, weights, attention_mask, residual)
    return grads_in_parts(loss_of_part, params, parts, objective.grad_accum_steps, dropout_key)


def make_update(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: Shardings,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted update(state, frozen, batch) -> (state, metrics); the state is donated. Call it under `jax.set_mesh`.

    batch is a `data.Batch`; metrics are the float32 scalars of `Objective.metrics`, and is_finite.
    """

    def update(state: TrainState, frozen: Params, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        # Keys depend on the step alone: a restored run repeats itself.
        corrupt_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(objective.seed), state.step))
        rows = batch.tokens, batch.is_response, batch.is_safe
        if objective.preference is not None:
            metrics, grads = preference_grads(
                graphdef, objective, state.params, frozen, batch, corrupt_key, dropout_key
            )
        else:
            if objective.name == "causal":
                noised = next_tokens(*rows, eos_id=objective.refusal_id)
            else:
                noised = corrupt(
                    corrupt_key, *rows, mask_id=objective.mask_id, eos_id=objective.refusal_id, eps=objective.mask_eps,
                    time_range=objective.time_range,
                )  # fmt: skip
            row_loss, grads = loss_and_grads(
                graphdef, objective, state.params, frozen, noised, batch.attention_mask, dropout_key, batch.tokens
            )
            metrics = {
                "loss": jnp.sum(row_loss),
                "loss_harmful": jnp.sum(jnp.where(batch.is_safe, 0.0, row_loss)),
                "loss_retain": jnp.sum(jnp.where(batch.is_safe, row_loss, 0.0)),
                "num_masked": jnp.sum(noised.is_masked),
                "num_harmful": jnp.sum(~batch.is_safe),
            }
        loss, grad_norm = metrics["loss"], optax.tree.norm(grads)
        is_finite = state.is_finite & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, steps), opt_state, state.step + 1, is_finite)
        # A broken update is not applied, and neither is any that was already queued behind it.
        new = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state._replace(is_finite=is_finite))
        metrics |= {"grad_norm": grad_norm, "learning_rate": schedule(state.step), "is_finite": is_finite}
        return new, jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), metrics)

    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(shardings.state, shardings.frozen, shardings.batch),
        out_shardings=(shardings.state, shardings.metrics),
    )
