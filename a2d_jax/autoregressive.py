"""Decoding of the causal families (LLaMA, Mistral, Qwen2): one token after the other.

One jitted loop. Every pass walks the whole row again, for there is no cache: this is for trying a causal checkpoint
out, such as a compressed one, and for short verdicts, not for serving.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from a2d_jax.sharding import mesh_of


@functools.partial(jax.jit, static_argnames=("graphdef", "gen_length", "temperature", "eos_id"))
def _extend(graphdef, state, tokens, attention_mask, key, *, gen_length: int, temperature: float, eos_id: int):
    """Writes into the last `gen_length` columns of tokens (B, T). -> tokens, passes (B,), P([EOS]) (B, gen_length)."""
    model = nnx.merge(graphdef, state)
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
        chosen = jnp.argmax(logits, axis=-1)
        if temperature > 0:
            chosen = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)
        chosen = jnp.where(has_ended, eos_id, chosen).astype(tokens.dtype)
        prob = jnp.where(has_ended, jnp.nan, jax.nn.softmax(logits)[:, eos_id])
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
    gen_length: int,
    temperature: float,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Continues each row until [EOS]; what follows that is [EOS] too.

    Args:
      prompt: (B, P) int32, padded on the left.
      prompt_mask: (B, P) bool, False on that padding; None: there is none.
      temperature: 0 takes the most likely token; above, `key` is needed.

    Returns:
      tokens (B, P + gen_length), forward passes (B,), and P([EOS]) (B, gen_length), NaN after the end.
    """
    eos_id = model.config.eos_id
    if eos_id is None:
        raise ValueError(f"config.json of this {model.config.family} model names no eos_token_id; add it.")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random; pass key=jax.random.key(seed).")
    tokens = np.pad(np.asarray(prompt, np.int32), ((0, 0), (0, gen_length)), constant_values=eos_id)
    if prompt_mask is not None:
        prompt_mask = np.pad(np.asarray(prompt_mask, bool), ((0, 0), (0, gen_length)), constant_values=True)
    run = functools.partial(_extend, gen_length=gen_length, temperature=temperature, eos_id=eos_id)
    arguments = (*nnx.split(model), tokens, prompt_mask, jax.random.key(0) if key is None else key)
    mesh = mesh_of(model)
    if mesh is None:
        return run(*arguments)
    with jax.set_mesh(mesh):
        return run(*arguments)
