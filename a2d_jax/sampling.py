"""Decoding by unmasking: `generate` writes a response after a prompt, `infill` fills masks anywhere, in any order.

One jitted `lax.while_loop` holds the whole decoding; nothing returns to the host between steps. A step is: forward
pass, P([EOS]) monitor, choice of tokens, choice of positions, reveal. The rules themselves are in
`a2d_jax/orders.py`.

Differences from the published samplers, each a defect there:
  * rows are independent: a row's quota, its confidence order and its end depend on that row alone (Dream shares one
    quota
    among the rows of a batch and can overwrite text of the shorter row; A2D's Dream sampler reveals one token per
    batch);
  * [MASK] is never chosen as a token, so decoding ends and the answer holds no mask;
  * masks inside the prompt belong to the first block and get a share of its steps (LLaDA gives them none, and masks
    stay
    in the answer); `count_prompt_masks=False` replays the original;
  * Gumbel noise is added to logits, not multiplied into their exponentials, which overflow in float32.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from a2d_jax import orders
from a2d_jax.losses import align_logits, objective_of
from a2d_jax.models.transformer import Transformer
from a2d_jax.monitor import eos_probability, rejects
from a2d_jax.sharding import batch_sharding, mesh_of

DREAM_ORDERS = {"origin": "random", "maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to decode.

    Attributes:
      gen_length: masks that `generate` appends to the prompt.
      steps: forward passes at most; for `infill` as many as there are masks suffice (one token a step).
      block_length: `generate` finishes one block of the response before the next; None: blocks of 32 for LLaDA, one
        block
        for Dream. A block longer than the response is the whole response.
      order: "confidence" (LLaDA's low_confidence, Dream's maskgit_plus), "margin" (topk_margin), "entropy",
        "left_to_right", "right_to_left", "random" (Dream's origin).
      temperature: 0 takes the most likely token.
      cfg_scale: classifier-free guidance, logits = uncond + (cfg_scale + 1)(cond - uncond); uncond sees no prompt.
      reject_above: a row whose P([EOS]) at the first step is above this is refused: its masks become [EOS].
      top_p, top_k, order_temperature (Dream's alg_temp): of the "dream" method.
      eps: last point of Dream's time grid.
      method: "llada" or "dream" rules, see `a2d_jax/orders.py`; None: those of the model's family, where A2D's orders
        left_to_right and right_to_left have LLaDA's even schedule on every model.
      ban_eos: [EOS] is never chosen, as in the released attack evaluation; it still counts in the confidence.
      logits_eos_inf: [EOS] is removed from choice and confidence (LLaDA's flag).
      confidence_eos_eot_inf: [EOS] and end of turn are revealed last (LLaDA's flag); needs `eot_id`.
      count_prompt_masks: False replays LLaDA's quota, which leaves masks in the answer when the prompt holds masks.
    """

    gen_length: int = 128
    steps: int = 128
    block_length: int | None = None
    order: str = "confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    reject_above: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    order_temperature: float = 0.0
    eps: float = 1e-3
    method: str | None = None
    ban_eos: bool = False
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    eot_id: int | None = None
    count_prompt_masks: bool = True

    def __post_init__(self):
        if self.order not in orders.ORDERS:
            raise ValueError(f"order={self.order!r}; choose one of {orders.ORDERS} (Dream's names: {DREAM_ORDERS}).")
        if self.method not in (None, *orders.METHODS):
            raise ValueError(f"method={self.method!r}; choose one of {orders.METHODS} or None.")
        if self.steps < 1 or self.gen_length < 1:
            raise ValueError(f"steps={self.steps}, gen_length={self.gen_length}; both must be at least 1.")
        if self.temperature < 0 or self.order_temperature < 0:
            raise ValueError(f"temperature={self.temperature}, order_temperature={self.order_temperature}; give >= 0.")
        if self.confidence_eos_eot_inf and self.eot_id is None:
            raise ValueError("confidence_eos_eot_inf needs eot_id, the tokenizer's end-of-turn id.")

    def resolve(self, family: str) -> "SamplerConfig":
        """The same settings with what depends on the model's family filled in."""
        has_dream_order = self.order in DREAM_ORDERS.values()
        method = self.method or ("dream" if family != "llada" and has_dream_order else "llada")
        return dataclasses.replace(self, method=method)

    def num_blocks(self, family: str) -> int:
        """Blocks of the response; ValueError where lengths or steps do not divide."""
        block = self.block_length or (32 if family == "llada" else self.gen_length)
        block = min(block, self.gen_length)
        if self.gen_length % block:
            whole = max(self.gen_length // block, 1) * block
            raise ValueError(
                f"gen_length={self.gen_length} is not a multiple of block_length={block}; "
                f"use gen_length={whole} or a block_length that divides {self.gen_length}."
            )
        blocks = self.gen_length // block
        if self.steps % blocks:
            raise ValueError(
                f"steps={self.steps} cannot be shared by {blocks} blocks (gen_length={self.gen_length} / "
                f"block_length={block}); use a multiple of {blocks}, such as {-(-self.steps // blocks) * blocks}."
            )
        return blocks


class SampleResult(NamedTuple):
    """What decoding made. T is the prompt's length plus gen_length, or the length of the infilled rows."""

    tokens: jax.Array  # (B, T) int32, prompt included; refused rows hold [EOS] where they were masked
    num_forward: jax.Array  # (B,) int32, forward passes that the row took part in
    is_rejected: jax.Array  # (B,) bool
    eos_prob: jax.Array  # (B, steps) float32, P([EOS]) at the left-most mask; NaN at steps the row did not take


class Draws(NamedTuple):
    """Recorded uniforms in (0, 1), to repeat a decoding of another implementation."""

    tokens: jax.Array | None = None  # (steps, B, T, V), for temperature > 0
    positions: jax.Array | None = None  # (steps, B, T), for the random order


class _State(NamedTuple):
    step: jax.Array  # ()
    tokens: jax.Array  # (B, T)
    is_open: jax.Array  # (B, T) bool, still masked
    num_masks: jax.Array  # (B,) masks at the start of the current block
    num_forward: jax.Array  # (B,)
    is_rejected: jax.Array  # (B,) bool
    eos_prob: jax.Array  # (B, steps)


def guided_logits(model: Transformer, tokens, attention_mask, is_prompt, mask_id: int, cfg_scale: float) -> jax.Array:
    """(B, T, V) float32 logits, position i scoring token i, under classifier-free guidance where the scale is not 0."""
    objective = objective_of(model.config.family)
    if cfg_scale == 0:
        return align_logits(model(tokens, attention_mask), objective)
    both = jnp.concatenate([tokens, jnp.where(is_prompt, mask_id, tokens)])
    mask = None if attention_mask is None else jnp.concatenate([attention_mask, attention_mask])
    cond, uncond = jnp.split(align_logits(model(both, mask), objective), 2)
    return uncond + (cfg_scale + 1) * (cond - uncond)


def propose(logits: jax.Array, config: SamplerConfig, mask_id: int, eos_id: int, token_uniforms, position_uniforms):
    """A token for every position and the score that orders the positions: two (B, T) arrays."""
    if config.logits_eos_inf:
        logits = logits.at[..., eos_id].set(-jnp.inf)
    if config.method == "dream" and config.temperature > 0:
        logits = logits / config.temperature
    if config.method == "dream":
        logits = orders.truncate(logits, config.top_p, config.top_k)
    choosable = logits.at[..., mask_id].set(-jnp.inf)
    if config.ban_eos:
        choosable = choosable.at[..., eos_id].set(-jnp.inf)
    noise = 1.0 if config.method == "dream" and config.temperature > 0 else config.temperature
    tokens = orders.gumbel_argmax(choosable, token_uniforms, noise)
    if config.confidence_eos_eot_inf:
        logits = logits.at[..., jnp.array([eos_id, config.eot_id])].set(-jnp.inf)
    scores = orders.order_scores(config.order, jax.nn.softmax(logits, axis=-1), tokens, position_uniforms)
    return tokens, scores


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "num_blocks"))
def _denoise(graphdef, state, tokens, block, attention_mask, key, draws: Draws, *, config: SamplerConfig, num_blocks):
    """The decoding loop.

    Args:
      block: (B, T) int32, the block in which a masked position is revealed; `num_blocks` where nothing is masked, -1
        for
        masks of the prompt that get no share of the quota.
    """
    model = nnx.merge(graphdef, state)
    mask_id, eos_id = model.config.mask_id, model.config.eos_id
    steps_per_block = config.steps // num_blocks
    is_prompt = block == num_blocks
    rates = jnp.asarray(orders.dream_reveal_rate(steps_per_block, config.eps))
    is_dream = config.method == "dream"

    def uniforms(recorded, step, index, shape):
        if recorded is not None:
            return recorded[step]
        step_key = jax.random.fold_in(jax.random.fold_in(key, step), index)
        return jax.random.uniform(step_key, shape, minval=jnp.finfo(jnp.float32).tiny)  # log(u) stays finite

    def is_running(state: _State):
        return (state.step < config.steps) & jnp.any(state.is_open)

    def take_step(state: _State) -> _State:
        current, step = state.step // steps_per_block, state.step % steps_per_block
        logits = guided_logits(model, state.tokens, attention_mask, is_prompt, mask_id, config.cfg_scale)  # (B, T, V)

        has_masks = jnp.any(state.is_open, axis=1)  # (B,) rows that take part
        eos_prob = eos_probability(logits, state.is_open, eos_id)
        is_rejected = state.is_rejected | (has_masks & rejects(eos_prob, state.step, config.reject_above))
        is_candidate = state.is_open & (block <= current) & ~is_rejected[:, None]  # (B, T)

        token_uniforms = position_uniforms = None
        if config.temperature > 0:
            token_uniforms = uniforms(draws.tokens, state.step, 0, logits.shape)
        if config.order == "random" or config.order_temperature > 0:
            position_uniforms = uniforms(draws.positions, state.step, 1, state.tokens.shape)
        proposed, scores = propose(logits, config, mask_id, eos_id, token_uniforms, position_uniforms)
        if config.order_temperature > 0:  # the top of noisy scores is a draw without replacement
            scores = scores / config.order_temperature - jnp.log(-jnp.log(position_uniforms))

        in_quota = state.is_open & (block <= current if config.count_prompt_masks else block == current)
        num_open = jnp.sum(in_quota, axis=1)
        num_masks = jnp.where(step == 0, num_open, state.num_masks)
        if (
            is_dream and config.order == "random"
        ):  # Dream's origin: each position by itself, all that are left at the end
            is_revealed = is_candidate & (position_uniforms < rates[step])
        else:
            even = orders.even_quota(num_masks, step, steps_per_block)
            quota = jnp.floor(num_open * rates[step]).astype(jnp.int32) if is_dream else even
            is_revealed = orders.highest(scores, is_candidate, quota)

        is_open = state.is_open & ~is_revealed & ~is_rejected[:, None]
        is_block_done = ~jnp.any(is_open & (block <= current))
        return _State(
            step=jnp.where(is_block_done, (current + 1) * steps_per_block, state.step + 1),
            tokens=jnp.where(is_revealed, proposed, state.tokens),
            is_open=is_open,
            num_masks=num_masks,
            num_forward=state.num_forward + has_masks,
            is_rejected=is_rejected,
            eos_prob=state.eos_prob.at[:, state.step].set(jnp.where(has_masks, eos_prob, jnp.nan)),
        )

    batch_size = tokens.shape[0]
    start = _State(
        step=jnp.zeros((), jnp.int32),
        tokens=tokens,
        is_open=block < num_blocks,
        num_masks=jnp.zeros((batch_size,), jnp.int32),
        num_forward=jnp.zeros((batch_size,), jnp.int32),
        is_rejected=jnp.zeros((batch_size,), bool),
        eos_prob=jnp.full((batch_size, config.steps), jnp.nan, jnp.float32),
    )
    end = jax.lax.while_loop(is_running, take_step, start)
    tokens = jnp.where(end.is_rejected[:, None] & ~is_prompt, eos_id, end.tokens)
    return SampleResult(tokens, end.num_forward, end.is_rejected, end.eos_prob)


def _special_ids(model: Transformer) -> tuple[int, int]:
    mask_id, eos_id = model.config.mask_id, model.config.eos_id
    if mask_id is None or eos_id is None:
        raise ValueError(
            f"config.json of this {model.config.family} model has mask_token_id={mask_id}, eos_token_id={eos_id}; "
            "unmasking needs both: add them, or use a masked-diffusion checkpoint."
        )
    return mask_id, eos_id


def _run(model, tokens, block, num_blocks, attention_mask, config, key, draws) -> SampleResult:
    config = config.resolve(model.config.family)
    needs_key = config.temperature > 0 or config.order == "random" or config.order_temperature > 0
    if key is None and draws is None and needs_key:
        raise ValueError(
            f"order={config.order!r}, temperature={config.temperature} draw at random; pass key=jax.random.key(seed)."
        )
    key = jax.random.key(0) if key is None else key  # drawn from only where a key was needed
    arrays = (jnp.asarray(tokens, jnp.int32), jnp.asarray(block, jnp.int32), attention_mask)
    mesh = mesh_of(model)
    graphdef, state = nnx.split(model)
    run = functools.partial(
        _denoise, graphdef, state, key=key, draws=draws or Draws(), config=config, num_blocks=num_blocks
    )
    if mesh is None:
        return run(*arrays)
    with jax.set_mesh(mesh):
        return run(*(None if a is None else jax.device_put(a, batch_sharding(mesh, a.shape)) for a in arrays))


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different length as (B, P) tokens and a (B, P) mask that is False on the padding in front."""
    length = max(len(row) for row in rows)
    tokens = np.array([[pad_id] * (length - len(row)) + list(row) for row in rows], np.int32)
    return tokens, np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])


def generate(model, prompt, config=None, key=None, *, prompt_mask=None, draws=None) -> SampleResult:
    """Appends `gen_length` masks to each prompt and fills them, block by block.

    Args:
      model: a masked-diffusion `Transformer`.
      prompt: (B, P) int array, or a list of token lists of any lengths (padded on the left here).
      config: SamplerConfig.
      key: for temperature or a random order.
      prompt_mask: (B, P) bool, False on left padding, where `prompt` is a padded array.
      draws: recorded uniforms instead of the key.
    """
    config = config or SamplerConfig()
    mask_id, eos_id = _special_ids(model)
    if isinstance(prompt, (list, tuple)):
        prompt, prompt_mask = pad_left(prompt, eos_id if model.config.pad_id is None else model.config.pad_id)
    num_blocks = config.num_blocks(model.config.family)
    prompt = jnp.asarray(prompt, jnp.int32)
    response = jnp.full((prompt.shape[0], config.gen_length), mask_id, jnp.int32)
    response_block = jnp.arange(config.gen_length) // (config.gen_length // num_blocks)
    is_blank = prompt == mask_id
    if prompt_mask is not None:
        is_blank &= jnp.asarray(prompt_mask, bool)
    prompt_block = jnp.where(is_blank, 0 if config.count_prompt_masks else -1, num_blocks)
    block = jnp.concatenate([prompt_block, jnp.broadcast_to(response_block, response.shape)], axis=1)
    attention_mask = None
    if prompt_mask is not None and not np.all(prompt_mask):
        attention_mask = jnp.concatenate([jnp.asarray(prompt_mask, bool), jnp.ones(response.shape, bool)], axis=1)
    tokens = jnp.concatenate([prompt, response], axis=1)  # (B, P + gen_length)
    return _run(model, tokens, block, num_blocks, attention_mask, config, key, draws)


def infill(model, tokens, config=None, key=None, *, attention_mask=None, draws=None) -> SampleResult:
    """Fills every mask id in place, in the order the config names; gen_length and block_length play no part.

    Args:
      tokens: (B, T) int array that holds mask ids.
      attention_mask: (B, T) bool, False on padding.
    """
    config = config or SamplerConfig()
    mask_id, _ = _special_ids(model)
    tokens = jnp.asarray(tokens, jnp.int32)
    is_blank = tokens == mask_id
    if not np.any(is_blank):
        raise ValueError(
            f"the text holds no mask id ({mask_id}), so nothing is to fill; write <mask:N> where it should."
        )
    if attention_mask is not None:
        is_blank &= jnp.asarray(attention_mask, bool)
        attention_mask = None if np.all(attention_mask) else jnp.asarray(attention_mask, bool)
    return _run(model, tokens, jnp.where(is_blank, 0, 1), 1, attention_mask, config, key, draws)
