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
    """Writes into the last `gen_length` columns of tokens (B, T). -> tokens, passes (B,), P([EOS]) (B, gen_length)."""
    model, gen_length = nnx.merge(graphdef, state), config.gen_length
    refusal_id = model.config.refusal_id  # [EOS], unless the model was taught to refuse by another token
    banned = sorted({eos_id, refusal_id}) * config.ban_eos + [config.eot_id] * config.ban_eot
    first = tokens.shape[1] - gen_length

    def is_running(carry):
        step, _, has_ended, _, _ = carry
        return (step < gen_length) & ~jnp.all(has_ended)

    def write_token(carry):
        step, tokens, has_ended, num_forward, eos_prob = carry
        # What stands in the columns to come is not seen: the model is causal.
        hidden = model.hidden_states(tokens, attention_mask)
        last = jax.lax.dynamic_slice_in_dim(hidden, first + step - 1, 1, axis=1)  # (B, 1, D)
        logits = model.logits(last)[:, 0]  # (B, V)
        choosable = logits.at[:, banned].set(-jnp.inf) if banned else logits
        chosen = jnp.argmax(choosable, axis=-1)
        if config.temperature > 0:
            choosable = orders.truncate(choosable / config.temperature, config.top_p, config.top_k)
            chosen = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, step), choosable)
        chosen = jnp.where(has_ended, eos_id, chosen).astype(tokens.dtype)
        prob = jnp.where(has_ended, jnp.nan, jax.nn.softmax(logits)[:, refusal_id])
        return (
            step + 1,
            jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], first + step, axis=1),
            has_ended | (chosen == eos_id),
            num_forward + ~has_ended,
            eos_prob.at[:, step].set(prob),
        )

    batch_size = len(tokens)
    start = (
        jnp.zeros((), jnp.int32),
        tokens,
        jnp.zeros((batch_size,), bool),
        jnp.zeros((batch_size,), jnp.int32),
        jnp.full((batch_size, gen_length), jnp.nan),
    )
    _, tokens, _, num_forward, eos_prob = jax.lax.while_loop(is_running, write_token, start)
    return tokens, num_forward, eos_prob


def extend(
    model,
    prompt: np.ndarray,
    prompt_mask: np.ndarray | None,
    config: SamplerConfig,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Continues each row until [EOS]; what follows that is [EOS] too.

    Args:
      prompt: (B, P) int32, padded on the left.
      prompt_mask: (B, P) bool, False on that padding; None: there is none.
      config: gen_length, temperature, top_p, top_k, ban_eos and ban_eot count.
      keys: (B,) random keys, one a row, needed for a temperature above 0.

    Returns:
      tokens (B, P + gen_length), forward passes (B,), and P([EOS]) (B, gen_length), NaN after the end; the refusal
      token's, where the model has another than [EOS].
    """
    eos_id, gen_length = model.config.eos_id, config.gen_length
    if eos_id is None:
        raise ValueError(f"config.json of this {model.config.family} model names no eos_token_id; add it.")
    if config.temperature > 0 and keys is None:
        raise ValueError(f"temperature={config.temperature} draws at random; pass key=jax.random.key(seed).")
    tokens = np.pad(np.asarray(prompt, np.int32), ((0, 0), (0, gen_length)), constant_values=eos_id)
    if prompt_mask is not None:
        prompt_mask = np.pad(np.asarray(prompt_mask, bool), ((0, 0), (0, gen_length)), constant_values=True)
    run = functools.partial(_extend, config=config, eos_id=eos_id)
    arguments = (*nnx.split(model), tokens, prompt_mask, keys)
    with under(mesh_of(model)):
        return run(*arguments)
