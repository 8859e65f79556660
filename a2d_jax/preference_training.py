"""The preference loss in the training step: pairs of rows, a frozen reference, gradients in parts.

A batch holds each pair as two neighbouring rows, the chosen response and then the rejected one. The reference is the
model that the run started from, see `a2d_jax/reference.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from a2d_jax.chunked_losses import Head, scored_losses
from a2d_jax.gradients import Params, grads_in_parts
from a2d_jax.losses import align_targets
from a2d_jax.objective import Objective
from a2d_jax.preference import PreferenceConfig, draw_samples, preference_losses
from a2d_jax.reference import split_reference


def estimate_nll(
    model, objective: str, mask_id: int, tokens, attention_mask, is_masked, weights, dropout_key=None
) -> jax.Array:
    """-B of each row, (B,) float32, from its M masks.

    Args:
      model: a `Transformer`; objective: "llada" or "dream", how its logits lie.
      tokens, attention_mask: (B, T).
      is_masked, weights: (B, M, T), of `draw_samples`.
    """
    num_rows, num_samples, length = is_masked.shape
    flat = lambda array: jnp.broadcast_to(array, is_masked.shape).reshape(-1, length)  # (B M, T)
    noisy_tokens = flat(jnp.where(is_masked, mask_id, tokens[:, None]))
    body_key, head_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    hidden = model.hidden_states(noisy_tokens, flat(attention_mask[:, None]), dropout_key=body_key)  # (B M, T, D)
    targets, weights = align_targets(flat(tokens[:, None]), flat(weights), objective)
    head = Head(*model.split_head(), model.config.vocab_size)
    losses = scored_losses(head, hidden, targets, weights, head_key)  # (B M, T)
    return jnp.sum(losses.reshape(num_rows, -1), axis=1)


def preference_grads(
    graphdef: nnx.GraphDef, objective: Objective, params: Params, frozen: Params, batch, key: jax.Array, dropout_key
) -> tuple[dict[str, jax.Array], Params]:
    """Metrics of a batch of pairs, and the gradient of its loss.

    Args:
      objective: with `preference`.
      batch: `data.Batch`, rows in pairs.
      key: of the masks.
    Returns:
      "loss" = "loss_harmful" (the preference loss, mean over the pairs) + "loss_retain" (sft_weight x the mean cross
      entropy of the chosen responses' tokens), "num_masked", "num_harmful" (rejected rows), `PREFERENCE_METRICS`.
    """
    config: PreferenceConfig = objective.preference
    frozen, reference = split_reference(frozen, params)
    samples = draw_samples(key, batch.is_response, config)
    in_pairs = lambda array: array.reshape(-1, 2, *array.shape[1:])
    pairs = jax.tree.map(in_pairs, (batch.tokens, batch.attention_mask, *samples, jnp.sum(batch.is_response, axis=1)))
    num_pairs = pairs[0].shape[0]

    def loss_of_part(params: Params, part, dropout_key):
        *rows, lengths = part
        rows = [array.reshape(-1, *array.shape[2:]) for array in rows]  # (2 pairs of the part, ...)

        def nll(weights: Params, dropout_key=None) -> jax.Array:
            model = nnx.merge(graphdef, weights, frozen)
            return in_pairs(estimate_nll(model, objective.name, objective.mask_id, *rows, dropout_key))  # (pairs, 2)

        policy_nll = nll(params, dropout_key)
        losses, margins = preference_losses(policy_nll, nll(reference), config.beta)
        sft = config.sft_weight * policy_nll[:, 0] / lengths[:, 0]
        return jnp.sum(losses + sft) / num_pairs, (losses, sft, margins)

    (losses, sft, margins), grads = grads_in_parts(loss_of_part, params, pairs, objective.grad_accum_steps, dropout_key)
    metrics = {
        "loss": jnp.mean(losses + sft),
        "loss_harmful": jnp.mean(losses),
        "loss_retain": jnp.mean(sft),
        "num_masked": jnp.sum(samples.is_masked),
        "num_harmful": jnp.sum(~batch.is_safe),
        "margin": jnp.mean(margins),
        "accuracy": jnp.mean(margins > 0),
    }
    return metrics, grads
