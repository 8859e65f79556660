"""Decoding of the causal families (LLaMA, Mistral, Qwen2): one token after the other.

What a row becomes depends on the row and its key alone.

One jitted loop. Every pass walks the whole row again, for there is no cache: this is for trying a causal checkpoint
out, such as a compressed one, and for short verdicts, not for serving.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from a2d_jax import orders
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sharding import mesh_of, under


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "eos_id"))
def _extend(graphdef, state, tokens, attention_mask, keys, *, config: SamplerConfig, eos_id: int):
    """Writes into the last `gen_length` columns of tokens (B, T); returns what `extend` does."""
    model, gen_length = nnx.merge(graphdef, state), config.gen_length
    refusal_id = model.config.refusal_id  # [EOS], unless the model was taught to refuse by another token
    is_eos_banned = config.ban_eos or config.logits_eos_inf
    banned = sorted({eos_id, refusal_id}) * is_eos_banned + [config.eot_id] * config.ban_eot
    monitor, ends = config.monitor, jnp.array(model.config.eos_ids)
    first = tokens.shape[1] - gen_length

    def is_running(carry):
        step, _, has_ended, *_ = carry
        return (step < gen_length) & ~jnp.all(has_ended)

    def write_token(carry):
        step, tokens, has_ended, num_forward, eos_prob, is_rejected, monitor_score = carry
        # What stands in the columns to come is not seen: the model is causal.
        hidden = model.hidden_states(tokens, attention_mask)
        last = jax.lax.dynamic_slice_in_dim(hidden, first + step - 1, 1, axis=1)  # (B, 1, D)
        logits = model.logits(last)[:, 0]  # (B, V)
        choosable = logits.at[:, banned].set(-jnp.inf) if banned else logits
        chosen = jnp.argmax(choosable, axis=-1)
        if config.temperature > 0:
            choosable = orders.truncate(choosable / config.temperature, config.top_p, config.top_k)
            chosen = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, step), choosable)
        prob = jnp.where(has_ended, jnp.nan, jax.nn.softmax(logits)[:, refusal_id])
        # The monitor sees the pass before its token is written.
        if monitor is not None:
            score = jnp.where(has_ended, jnp.nan, monitor.score(num_forward, tokens, prob[:, None]))
            is_rejected |= score > monitor.threshold
            monitor_score = jnp.fmax(monitor_score, score)
        has_stopped = has_ended | is_rejected
        chosen = jnp.where(has_stopped, eos_id, chosen).astype(tokens.dtype)
        return (
            step + 1,
            jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], first + step, axis=1),
            has_stopped | jnp.isin(chosen, ends),
            num_forward + ~has_ended,
            eos_prob.at[:, step].set(prob),
            is_rejected,
            monitor_score,
        )

    batch_size = len(tokens)
    start = (
        jnp.zeros((), jnp.int32),
        tokens,
        jnp.zeros((batch_size,), bool),
        jnp.zeros((batch_size,), jnp.int32),
        jnp.full((batch_size, gen_length), jnp.nan),
        jnp.zeros((batch_size,), bool),
        jnp.full((batch_size,), jnp.nan),
    )
    _, tokens, _, num_forward, *looks = jax.lax.while_loop(is_running, write_token, start)
    eos_prob, is_rejected, monitor_score = looks
    is_withdrawn = is_rejected[:, None] & (jnp.arange(tokens.shape[1]) >= first)
    return jnp.where(is_withdrawn, eos_id, tokens), num_forward, is_rejected, eos_prob, monitor_score


def extend(
    model,
    prompt: np.ndarray,
    prompt_mask: np.ndarray | None,
    config: SamplerConfig,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Continues each row until [EOS], or another token that config.json calls one; what follows that is [EOS].

    A monitor looks at P([EOS]) where the next token will stand, before every token; a row that it stops becomes [EOS].

    Args:
      prompt: (B, P) int32, padded on the left; at least one token a row.
      prompt_mask: (B, P) bool, False on that padding; None: there is none.
      config: gen_length, temperature, top_p, top_k, ban_eos, logits_eos_inf (the same here), ban_eot, reject_above and
        monitor count.
      keys: (B,) random keys, one a row, needed for a temperature above 0.

    Returns:
      tokens (B, P + gen_length); forward passes (B,); which rows the monitor stopped (B,) bool; P([EOS]) (B,
      gen_length), NaN after the end; the monitor's largest score (B,), NaN where it did not look. P([EOS]) is that of
      the refusal token, where the model has another.
    """
    eos_id, gen_length = model.config.eos_id, config.gen_length
    if eos_id is None:
        raise ValueError(f"config.json of this {model.config.family} model names no eos_token_id; add it.")
    if config.temperature > 0 and keys is None:
        raise ValueError(f"temperature={config.temperature} draws at random; pass key=jax.random.key(seed).")
    prompt = np.asarray(prompt, np.int32)
    is_real = np.ones(prompt.shape, bool) if prompt_mask is None else np.asarray(prompt_mask, bool)
    if not is_real.any(axis=1).all():
        raise ValueError(
            "a prompt is empty, and a causal model continues what is there; begin it with [BOS] or another token."
        )
    tokens = np.pad(prompt, ((0, 0), (0, gen_length)), constant_values=eos_id)
    if prompt_mask is not None:
        prompt_mask = np.pad(is_real, ((0, 0), (0, gen_length)), constant_values=True)
    run = functools.partial(_extend, config=config.resolve(model.config.family), eos_id=eos_id)
    arguments = (*nnx.split(model), tokens, prompt_mask, keys)
    with under(mesh_of(model)):
        return run(*arguments)
