"""The one backbone: RMSNorm, rotary attention (grouped queries), SwiGLU, for LLaDA, Dream, LLaMA, Mistral and Qwen2.

Axis letters, used in the whole package (a file that needs others says them):
  B batch, T query positions, S key positions, D width, N query heads, K key/value heads, G = N / K, H head dim,
  F mlp width, V vocabulary rows, R adapter rank, L layers.

Layers are stacked on a leading L axis and walked by one `jax.lax.scan`, so that the compiled program holds one layer
whatever the depth; `remat` chooses what that layer keeps for the backward pass. Every parameter carries the logical
names of its axes (`logical_axes`); `a2d_jax/sharding.py` lays them onto the mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from a2d_jax.config import Llama3Rope, ModelConfig
from a2d_jax.models.attention import KeyValues, attend, attend_parts, heads_first
from a2d_jax.models.lora import LoRAConfig
from a2d_jax.models.matmul import matmul
from a2d_jax.sharding import constrain, is_for_tpu

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep projections, recompute attention and norms
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the residual stream alone
}
APART = 2**24, 2**31  # bytes of layers that `Transformer.layers_apart` copies, at least and at most


@dataclasses.dataclass(frozen=True)
class DTypes:
    """Number formats: `param` as stored, `compute` of activations and matmuls. Norms, softmax, logits are float32."""

    param: jnp.dtype = jnp.float32
    compute: jnp.dtype = jnp.float32

    @property
    def precision(self) -> jax.lax.Precision:
        # A TPU would otherwise multiply float32 in bfloat16 passes.
        is_float32 = jnp.dtype(self.compute) == jnp.float32
        return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT


class Linear(nnx.Module):
    """y = x W (+ b) (+ the low-rank path, where `add_lora` gave one). W is (in, out)."""

    def __init__(
        self, fan_in, fan_out, *, axes, dtypes: DTypes, has_bias: bool = False, gain: float = 1.0, rngs: nnx.Rngs
    ):
        init = jax.random.normal(rngs.params(), (fan_in, fan_out), dtypes.param) * (gain / math.sqrt(fan_in))
        self.kernel = nnx.Param(init, logical_axes=axes)
        bias = nnx.Param(jnp.zeros((fan_out,), dtypes.param), logical_axes=axes[1:]) if has_bias else None
        self.bias = nnx.data(bias)
        self.lora_a = self.lora_b = nnx.data(None)
        self.lora_scale = self.lora_dropout = 0.0
        self.dtypes = dtypes

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None, out_dtype=None) -> jax.Array:
        """x (..., in) -> (..., out) in `out_dtype` (default: compute). The key switches the adapter's dropout on."""
        compute = self.dtypes.compute
        times = lambda x, w: matmul(x, w[...].astype(compute), self.dtypes.precision, out_dtype)
        y = times(x, self.kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if self.lora_a is not None:
            if dropout_key is not None and self.lora_dropout > 0:
                keep = jax.random.bernoulli(dropout_key, 1 - self.lora_dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.lora_dropout), 0)
            low_rank = times(x, self.lora_a).astype(compute)  # (..., R)
            y = y + self.lora_scale * times(low_rank, self.lora_b)
        return y


class RMSNorm(nnx.Module):
    """x / rms(x), the statistic in float32, cast back, then times the learned scale (the order of LLaMA's code)."""

    def __init__(self, width: int, eps: float, dtypes: DTypes):
        self.scale = nnx.Param(jnp.ones((width,), dtypes.param), logical_axes=("norm",))
        self.eps = eps
        self.dtypes = dtypes

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(self.dtypes.compute)


class Embed(nnx.Module):
    """Token vectors; also the head where the checkpoint ties them.

    The vector of `padding_id` is not trained as an input (torch's `padding_idx`, which transformers' models set).
    """

    def __init__(
        self, vocab_size: int, width: int, *, padding_id: int | None, scale: float, dtypes: DTypes, rngs: nnx.Rngs
    ):
        init = jax.random.normal(rngs.params(), (vocab_size, width), dtypes.param) * scale
        self.embedding = nnx.Param(init, logical_axes=("vocab", "embed"))
        self.padding_id = padding_id
        self.dtypes = dtypes

    def __call__(self, tokens: jax.Array) -> jax.Array:
        vectors = self.embedding[...][tokens].astype(self.dtypes.compute)  # (B, T, D)
        if self.padding_id is None:
            return vectors
        return jnp.where((tokens == self.padding_id)[..., None], jax.lax.stop_gradient(vectors), vectors)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits of the tied head: (B, T, D) -> (B, T, V) float32."""
        embedding = self.embedding[...].astype(self.dtypes.compute)
        return jnp.einsum(
            "btd,vd->btv", x, embedding, precision=self.dtypes.precision, preferred_element_type=jnp.float32
        )


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Rope | None) -> jax.Array:
    """Radians per position of each of the H / 2 rotated pairs, float32."""
    freqs = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # (H / 2,)
    if scaling is None:
        return freqs
    turns = scaling.original_max_position * freqs / (2 * jnp.pi)  # full turns within the original context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(ramp, 0, 1)
    return keep * freqs + (1 - keep) * freqs / scaling.factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + H/2) of x (B, T, heads, H) by the angles (B, T, 1, H/2), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention_masks(config: ModelConfig, attention_mask: jax.Array | None, num_positions: int):
    """Which keys each query may see: (for layers that see everything, for layers with a sliding window).

    Args:
      attention_mask: (B, S) bool, False where a key is padding; or None.
    Returns:
      Two (B or 1, 1, T, S) bool arrays, None where nothing is hidden. The second is None without sliding windows.
    """
    keys = None if attention_mask is None else attention_mask[:, None, None, :]  # (B, 1, 1, S)
    if not config.is_causal:
        return keys, None
    distance = jnp.arange(num_positions)[:, None] - jnp.arange(num_positions)[None, :]  # query - key, (T, S)
    full = (distance >= 0)[None, None]
    full = full if keys is None else full & keys
    if config.sliding_windows is None:
        return full, None
    window = max(window for window in config.sliding_windows if window is not None)
    return full, full & (distance < window)[None, None]


class LayerContext(NamedTuple):
    """What every layer is given beside the residual stream."""

    full_mask: jax.Array | None  # (B or 1, 1, T, S) bool, for layers that see everything; None: nothing is hidden
    sliding_mask: jax.Array | None  # the same for layers with a sliding window; None: the model has no such layer
    cos: jax.Array  # (B or 1, T, 1, H / 2)
    sin: jax.Array  # (B or 1, T, 1, H / 2)

    def mask(self, is_sliding: jax.Array | None) -> jax.Array | None:
        """The mask of one layer; `is_sliding` () bool is None where the model has no sliding layer."""
        return self.full_mask if is_sliding is None else jnp.where(is_sliding, self.sliding_mask, self.full_mask)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, dtypes: DTypes, rngs: nnx.Rngs):
        d, heads, kv_heads = config.width, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = functools.partial(Linear, dtypes=dtypes, rngs=rngs)
        gain_out = 1 / math.sqrt(2 * config.num_layers)  # the residual stream keeps its size through all layers
        self.attn_norm = RMSNorm(d, config.norm_eps, dtypes)
        self.q_proj = linear(d, heads, axes=("embed", "heads"), has_bias=config.qkv_bias)
        self.k_proj = linear(d, kv_heads, axes=("embed", "kv_heads"), has_bias=config.qkv_bias)
        self.v_proj = linear(d, kv_heads, axes=("embed", "kv_heads"), has_bias=config.qkv_bias)
        self.o_proj = linear(heads, d, axes=("heads", "embed"), has_bias=config.out_bias, gain=gain_out)
        self.mlp_norm = RMSNorm(d, config.norm_eps, dtypes)
        self.gate_proj = linear(d, config.mlp_dim, axes=("embed", "mlp"), has_bias=config.mlp_bias)
        self.up_proj = linear(d, config.mlp_dim, axes=("embed", "mlp"), has_bias=config.mlp_bias)
        self.down_proj = linear(config.mlp_dim, d, axes=("mlp", "embed"), has_bias=config.mlp_bias, gain=gain_out)
        self.head_dim = config.head_dim
        self.precision = dtypes.precision

    def __call__(self, x: jax.Array, mask: jax.Array | None, cos: jax.Array, sin: jax.Array, dropout_key=None):
        return self.attend(x, mask, cos, sin, dropout_key)[0]

    def attend(self, x, mask, cos, sin, dropout_key=None, cached=None) -> tuple[jax.Array, KeyValues]:
        """The block's output, (B, T, D), and the keys and values of its positions.

        Args:
          cached: KeyValues of other positions that are attended to as well, and which of them are seen (B, 1, 1, S).
        """
        split = [None] * 7 if dropout_key is None else jax.random.split(dropout_key, 7)
        keys = dict(zip("qkvogud", split, strict=True))
        split_heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)

        normed = self.attn_norm(x)  # (B, T, D)
        q = apply_rope(split_heads(self.q_proj(normed, keys["q"])), cos, sin)  # (B, T, N, H)
        k = apply_rope(split_heads(self.k_proj(normed, keys["k"])), cos, sin)  # (B, T, K, H)
        v = split_heads(self.v_proj(normed, keys["v"]))  # (B, T, K, H)
        here = heads_first(k, v)
        if cached is None:
            attended = attend(q, k, v, mask, self.precision)  # (B, T, N, H)
        else:
            attended = attend_parts(q, [cached, (here, mask)], self.precision)
        attended = attended.reshape(*x.shape[:2], -1)  # (B, T, N H)
        x = constrain(x + self.o_proj(attended, keys["o"]), "batch", "length", None)

        normed = self.mlp_norm(x)
        hidden = jax.nn.silu(self.gate_proj(normed, keys["g"])) * self.up_proj(normed, keys["u"])  # (B, T, F)
        return constrain(x + self.down_proj(hidden, keys["d"]), "batch", "length", None), here  # (B, T, D)


class Transformer(nnx.Module):
    """Tokens to logits. `config` says which family; the same weights layout serves all of them."""

    def __init__(
        self, config: ModelConfig, dtypes: DTypes | None = None, *, remat: str = "none", rngs: nnx.Rngs | None = None
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat={remat!r}; choose one of {sorted(REMAT_POLICIES)}.")
        dtypes, rngs = dtypes or DTypes(), rngs or nnx.Rngs(0)
        self.config = config
        self.dtypes = dtypes
        self.remat = remat
        self.lora: LoRAConfig | None = nnx.static(None)
        padding_id = None if config.family == "llada" else config.pad_id  # LLaDA's own code has no padding_idx
        # Random weights: activations of size one everywhere, and a quiet head, so that training starts near uniform.
        scale = 1 / math.sqrt(config.width) if config.tie_embeddings else 1.0
        self.embed = Embed(
            config.vocab_size, config.width, padding_id=padding_id, scale=scale, dtypes=dtypes, rngs=rngs
        )
        layer_keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = nnx.vmap(lambda key: Block(config, dtypes, nnx.Rngs(key)))(layer_keys)
        self.final_norm = RMSNorm(config.width, config.norm_eps, dtypes)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = Linear(
                config.width, config.vocab_size, axes=("head_width", "head_vocab"), gain=0.3, dtypes=dtypes, rngs=rngs
            )

    def projection(self, path: str) -> Linear:
        """The linear layer at "blocks.<name>" or "lm_head"."""
        return functools.reduce(getattr, path.split("."), self)

    def enter(self, tokens, attention_mask=None, positions=None) -> tuple[jax.Array, LayerContext]:
        """The residual stream before the first layer, (B, T, D), and what the layers need beside it."""
        config, num_positions = self.config, tokens.shape[1]
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask has shape {attention_mask.shape}, tokens {tokens.shape}: give equal ones."
            )
        if positions is None:
            positions = jnp.arange(num_positions)[None]  # RoPE is relative: left padding needs no other count
        freqs = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = positions[..., None, None].astype(jnp.float32) * freqs  # (B or 1, T, 1, H / 2)
        attention_mask = None if attention_mask is None else attention_mask.astype(bool)
        masks = attention_masks(config, attention_mask, num_positions)
        x = constrain(self.embed(tokens), "batch", "length", None)  # (B, T, D)
        return x, LayerContext(*masks, jnp.cos(angles), jnp.sin(angles))

    def layer_stack(self) -> tuple[nnx.GraphDef, tuple[nnx.State, jax.Array | None]]:
        """The structure of one block, and (state, is_sliding) of all of them, stacked on L, for a scan to walk."""
        graphdef, state = nnx.split(self.blocks)
        is_sliding, config = None, self.config
        if config.is_causal and config.sliding_windows is not None:
            is_sliding = jnp.array([window is not None for window in config.sliding_windows])  # (L,)
        return graphdef, (state, is_sliding)

    def layers_apart(self) -> list | None:
        """The layers of `layer_stack` as arrays of their own, for a loop of many passes; None where they stay stacked.

        On a CPU a scan copies every layer out of the stack in every pass, which takes as long as a product with few
        positions; here they are copied once, where they are neither so few that it does not matter nor too much for a
        second copy. On a TPU a product reads them where they are.
        """
        _, layers = self.layer_stack()
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
        if is_for_tpu() or not APART[0] <= size <= APART[1]:
            return None
        return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(self.config.num_layers)]

    def hidden_states(
        self, tokens, attention_mask=None, *, positions=None, dropout_key=None, layers: list | None = None
    ) -> jax.Array:
        """Output of the final norm, (B, T, D) in the compute dtype; arguments as in `__call__`.

        `layers`: what `layers_apart` returned.
        """
        x, context = self.enter(tokens, attention_mask, positions)
        graphdef, stack = self.layer_stack()

        def apply_block(x, layer):
            (state, is_sliding), key = layer
            return nnx.merge(graphdef, state)(x, context.mask(is_sliding), context.cos, context.sin, key), None

        if self.remat != "none":
            apply_block = jax.checkpoint(apply_block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)
        x, _ = _walk(apply_block, x, layers or stack, keys)
        return self.final_norm(x)

    def cached_hidden_states(
        self,
        tokens,
        attention_mask=None,
        *,
        positions=None,
        cache: KeyValues | list[KeyValues] | None = None,
        layers: list | None = None,
    ):
        """Hidden states of all positions, and a cache of them; or, given that, of some positions among the cached rest.

        Args:
          tokens: (B, T) int32, of every position, or of `positions`.
          attention_mask: (B, S) bool, of every position.
          positions: (B, T) int32 in [0, S), or beyond: those stand for nothing.
          cache: keys and values as an earlier call returned them, with an L axis, or a list of those of each layer.
          layers: what `layers_apart` returned.
        Returns:
          Output of the final norm (B, T, D), and the cache; None where one was given.
        """
        if self.config.is_causal:
            raise ValueError(f"a {self.config.family} model is causal; caches of denoising are for models that are not")
        x, context = self.enter(tokens, attention_mask if cache is None else None, positions)
        if cache is not None:
            num_cached = (cache[0] if isinstance(cache, list) else cache).keys.shape[-1]  # S
            is_seen = jnp.ones((len(tokens), num_cached), bool)
            if attention_mask is not None:
                is_seen = attention_mask.astype(bool)
            is_replaced = jnp.any(positions[:, None, :] == jnp.arange(num_cached)[:, None], axis=2)  # (B, S)
            is_real = jnp.take_along_axis(is_seen, positions, axis=1, mode="fill", fill_value=False)  # (B, T)
            context = context._replace(full_mask=is_real[:, None, None])
            still_seen = (is_seen & ~is_replaced)[:, None, None]  # (B, 1, 1, S)
        graphdef, stack = self.layer_stack()

        def apply_block(x, layer):
            (state, _), past = layer
            cached = None if past is None else (past, still_seen)
            block = nnx.merge(graphdef, state)
            x, here = block.attend(x, context.full_mask, context.cos, context.sin, cached=cached)
            return x, here if past is None else None

        x, kept = _walk(apply_block, x, layers or stack, cache)
        return self.final_norm(x), kept

    def logits(self, hidden: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """hidden (B, T, D) -> (B, T, V) float32."""
        return _head_logits(self._head, hidden, dropout_key)

    @property
    def _head(self) -> nnx.Module:
        return self.embed if self.lm_head is None else self.lm_head

    def split_head(self) -> tuple[Callable[..., jax.Array], nnx.State, nnx.State]:
        """`logits` as a function of arrays: (logits_of, trained, frozen), logits_of(trained, frozen, hidden, key).

        What is trained of the head: low-rank factors where the model carries any, else every weight.
        """
        kind = nnx.LoRAParam if nnx.state(self, nnx.LoRAParam) else nnx.Param
        graphdef, trained, frozen = nnx.split(self._head, kind, ...)

        def logits_of(trained, frozen, hidden, dropout_key):
            return _head_logits(nnx.merge(graphdef, trained, frozen), hidden, dropout_key)

        return logits_of, trained, frozen

    def __call__(self, tokens, attention_mask=None, *, positions=None, dropout_key=None) -> jax.Array:
        """Logits of every position.

        Args:
          tokens: (B, T) int32, an array or a list of equally long lists.
          attention_mask: (B, T) bool, False = padding, seen by no other position; None: every token is real.
          positions: (B, T) int32 rotary positions; default 0 .. T - 1.
          dropout_key: switches the adapter's dropout on (training only).
        Returns:
          (B, T, V) float32. Those of Dream and the causal families at position i are for token i + 1.
        """
        if isinstance(tokens, (list, tuple)):
            tokens = jnp.asarray(tokens)
        if isinstance(attention_mask, (list, tuple)):
            attention_mask = jnp.asarray(attention_mask)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; give (B, T) token ids, for a single row "
                "[tokens]."
            )
        graphdef, state = nnx.split(self)
        return _forward(graphdef, state, tokens, attention_mask, positions, dropout_key)


def _head_logits(head: nnx.Module, hidden: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    if isinstance(head, Embed):
        return head.attend(hidden)
    return head(hidden, dropout_key, out_dtype=jnp.float32)


def _walk(apply_block, x: jax.Array, layers, beside):
    """x through all layers, stacked or a list, as `beside` is, which has something for each layer, or is None; and what
    the layers return beside x, in the same form."""
    if not isinstance(layers, list):
        return jax.lax.scan(apply_block, x, (layers, beside))
    kept = []
    for number, layer in enumerate(layers):
        x, of_layer = apply_block(x, (layer, None if beside is None else beside[number]))
        kept.append(of_layer)
    return x, kept


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, tokens, attention_mask, positions, dropout_key) -> jax.Array:
    # Compiled once per shape, so that a plain `model(tokens)` does not trace the scan at every call.
    model = nnx.merge(graphdef, state)
    body_key, head_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    hidden = model.hidden_states(tokens, attention_mask, positions=positions, dropout_key=body_key)
    return model.logits(hidden, head_key)
