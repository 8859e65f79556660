"""What happens to rows while they are decoded: one pass as a pure function, and the jitted loops around it.

Each row keeps its own place: its block, its step in the block, its passes. So rows that began at different times, or
fill their blocks at different speeds, share a batch and still come out as they would alone.

    decode            passes over whole rows until few enough are unfinished; the caller may put new rows in their place
    decode_to_block   the same until some row has finished a block, for answers that are streamed
    decode_block      one block of each row: a pass over whole rows that fills the cache, then passes over few positions

Of a pass only the masked positions of each row's current block go through the head: their hidden states are gathered
into (B, c, D), c the masks of the fullest row rounded up to quarters of the plan's C, and (B, c, V) logits are the
largest array there is. Probabilities of the whole vocabulary are never kept: what is asked for is the chosen token's
and [EOS]'s.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from a2d_jax import orders
from a2d_jax.models.transformer import Transformer
from a2d_jax.sampler_config import SamplerConfig

FEW_LOGITS = 2**18  # of a row, below which all candidates go through the head


class Plan(NamedTuple):
    """All that the compiled programs depend on beside the model and the shapes of the rows."""

    config: SamplerConfig  # resolved for the model's family
    num_blocks: int
    num_candidates: int  # C, at least the masked positions of any row's current block
    num_passes: int  # of a row, at most

    @property
    def steps_per_block(self) -> int:
        """Passes after which a block is left, where a schedule says how many positions a pass reveals."""
        return self.config.steps // self.num_blocks


class Draws(NamedTuple):
    """Recorded uniforms in (0, 1), to repeat a decoding of another implementation."""

    tokens: jax.Array | None = None  # (passes, B, T, V), for temperature > 0
    positions: jax.Array | None = None  # (passes, B, T), for the random order


class Trace(NamedTuple):
    """A decoding that can be replayed. Passes count from 0, each row's by itself, as in `SampleResult.eos_prob`."""

    tokens: jax.Array  # (B, T) int32, the text as it was written; a stopped row keeps what it had and its masks
    revealed_step: jax.Array  # (B, T) int32, pass at which the position was revealed; -1: given, or never revealed
    confidence: jax.Array  # (B, T) float32, probability of the token when it was revealed; NaN elsewhere
    eos_prob_map: jax.Array  # (B, passes, T) float32, P([EOS]) at the masks of the current block; NaN elsewhere
    stop_step: jax.Array  # (B,) int32, pass at which the monitor stopped the row; -1: it did not


class Rows(NamedTuple):
    """Rows in the middle of being decoded."""

    tokens: jax.Array  # (B, T) int32
    block: jax.Array  # (B, T) int32, block in which a mask is revealed; num_blocks: no mask; -1: outside the quotas
    attention_mask: jax.Array | None  # (B, T) bool
    key: jax.Array  # (B,) random keys
    is_open: jax.Array  # (B, T) bool, still masked
    current: jax.Array  # (B,) int32, the block being filled
    step: jax.Array  # (B,) int32, pass within the block
    num_masks: jax.Array  # (B,) int32, masks at the start of the block
    num_forward: jax.Array  # (B,) int32
    is_rejected: jax.Array  # (B,) bool
    monitor_score: jax.Array  # (B,) float32, the largest so far; NaN where the monitor did not look
    eos_prob: jax.Array  # (B, passes) float32
    trace: Trace | None


@functools.partial(jax.jit, static_argnames=("plan", "has_trace"))
def start_rows(tokens, block, attention_mask, key, plan: Plan, has_trace: bool) -> Rows:
    """Rows before their first pass. Shapes and meaning of the arguments as in `Rows`."""
    batch_size, length = tokens.shape
    zeros, unknown = jnp.zeros(batch_size, jnp.int32), jnp.full(batch_size, jnp.nan, jnp.float32)
    trace = None
    if has_trace:
        trace = Trace(
            tokens=tokens,
            revealed_step=jnp.full(tokens.shape, -1, jnp.int32),
            confidence=jnp.full(tokens.shape, jnp.nan, jnp.float32),
            eos_prob_map=jnp.full((batch_size, plan.num_passes, length), jnp.nan, jnp.float32),
            stop_step=zeros - 1,
        )
    return Rows(
        tokens=tokens,
        block=block,
        attention_mask=attention_mask,
        key=key,
        is_open=block < plan.num_blocks,
        current=zeros,
        step=zeros,
        num_masks=zeros,
        num_forward=zeros,
        is_rejected=jnp.zeros(batch_size, bool),
        monitor_score=unknown,
        eos_prob=jnp.full((batch_size, plan.num_passes), jnp.nan, jnp.float32),
        trace=trace,
    )


def is_running(rows: Rows, num_blocks: int) -> jax.Array:
    """(B,) bool, rows that need another pass."""
    return jnp.any(rows.is_open, axis=1) & (rows.current < num_blocks)


# -- one pass ---------------------------------------------------------------------------------------------------------


def model_inputs(rows: Rows, mask_id: int, plan: Plan) -> tuple[jax.Array, jax.Array | None]:
    """Tokens and attention mask for the model; under guidance a second time, with the prompt masked, (2 B, T)."""
    if plan.config.cfg_scale == 0:
        return rows.tokens, rows.attention_mask
    is_prompt = rows.block == plan.num_blocks
    tokens = jnp.concatenate([rows.tokens, jnp.where(is_prompt, mask_id, rows.tokens)])
    mask = rows.attention_mask
    return tokens, None if mask is None else jnp.concatenate([mask, mask])


def _logits_at(model: Transformer, hidden, indices, cfg_scale: float) -> jax.Array:
    """Logits (B, C, V) float32 from hidden states (B or 2 B, L, D) at the indices (B, C) into L, guided."""
    if cfg_scale == 0:
        return model.logits(jnp.take_along_axis(hidden, indices[..., None], axis=1))
    indices = jnp.concatenate([indices, indices])
    both = model.logits(jnp.take_along_axis(hidden, indices[..., None], axis=1))  # (2 B, C, V)
    return orders.guide(*jnp.split(both, 2), cfg_scale)


def _uniforms(rows: Rows, recorded, which: int, positions, shape: tuple[int, ...]) -> jax.Array:
    """Uniforms of `shape` for each position of each row's pass, (B, C, *shape): recorded ones, or of the row's key.

    Positions count from the end of the row, so padding in front does not change what is drawn.
    """
    if recorded is not None:
        of_pass = recorded[rows.num_forward, jnp.arange(len(positions))]  # (B, T, *shape)
        return jnp.take_along_axis(of_pass, positions.reshape(*positions.shape, *[1] * len(shape)), axis=1)

    def draw(key, step, from_end):
        for number in (step, which, from_end):
            key = jax.random.fold_in(key, number)
        return jax.random.uniform(key, shape, minval=jnp.finfo(jnp.float32).tiny)  # log(u) stays finite

    from_end = rows.tokens.shape[1] - positions
    return jax.vmap(jax.vmap(draw, in_axes=(None, None, 0)))(rows.key, rows.num_forward, from_end)


def _truncate(logits, config: SamplerConfig, never: list[int]) -> jax.Array:
    """Logits (B, C, V) truncated as the config says, where one token at least is left that may be written.

    What is banned is taken out before. [MASK], the first of `never`, is not, as in Dream's sampler; where it would be
    all that is left, the most likely of the others stays beside it.
    """
    if len(never) > 1:
        logits = logits.at[..., jnp.array(never[1:])].set(-jnp.inf)
    best = orders.argmax(logits, never)[..., None]  # (B, C, 1)
    truncated = orders.truncate(logits, config.top_p, config.top_k)
    return jnp.where(jnp.arange(logits.shape[-1]) == best, logits, truncated)


def propose(
    logits,
    positions,
    config: SamplerConfig,
    mask_id: int,
    eos_id: int,
    refusal_id: int,
    token_uniforms,
    position_uniforms,
):
    """A token for each of the (B, C) positions, its probability, and the score that orders the positions."""
    is_dream = config.method == "dream"
    never = [mask_id]
    if config.ban_eos:
        never += [eos_id, refusal_id]
    if config.ban_eot:
        never += [config.eot_id]
    if config.logits_eos_inf:
        logits = logits.at[..., eos_id].set(-jnp.inf)
    if is_dream and config.temperature > 0:
        logits = logits / config.temperature
    if is_dream and config.is_truncated:
        logits = _truncate(logits, config, never)
    noise = 1.0 if is_dream and config.temperature > 0 else config.temperature
    tokens = orders.gumbel_argmax(logits, token_uniforms, noise, never)
    if config.confidence_eos_eot_inf:
        logits = logits.at[..., jnp.array([eos_id, config.eot_id])].set(-jnp.inf)
    confidence = orders.token_probability(logits, tokens)
    scores = orders.order_scores(config.order, logits, confidence, positions, position_uniforms)
    if config.order_temperature > 0:  # the top of noisy scores is a draw without replacement
        scores = scores / config.order_temperature - jnp.log(-jnp.log(position_uniforms))
    return tokens, confidence, scores


def _choose(rows: Rows, plan: Plan, is_candidate, confidence, scores, position_uniforms, num_open, num_masks):
    """(B, C) bool, the candidates that this pass reveals."""
    config = plan.config
    is_dream = config.method == "dream"
    if config.threshold is not None:
        is_revealed = orders.above_threshold(confidence, scores, is_candidate, config.threshold)
        if is_dream and config.cache is None:  # Fast-dLLM's Dream sampler: never ahead of an even schedule
            even = num_masks // plan.steps_per_block * (rows.step + 1)
            num_left = jnp.where(rows.step + 1 < plan.steps_per_block, even - (num_masks - num_open), num_open)
            is_revealed &= orders.highest(scores, is_candidate, jnp.maximum(num_left, 1))
        return is_revealed
    if config.factor is not None:
        return orders.highest(confidence, is_candidate, orders.factor_quota(confidence, is_candidate, config.factor))
    rate = jnp.asarray(orders.dream_reveal_rate(plan.steps_per_block, config.eps))[rows.step]  # (B,)
    if is_dream and config.order == "random":  # Dream's origin: each position by itself, all that are left at the end
        return is_candidate & (position_uniforms < rate[:, None])
    even = orders.even_quota(num_masks, rows.step, plan.steps_per_block)
    quota = jnp.floor(num_open * rate).astype(jnp.int32) if is_dream else even
    if config.cache is not None:  # where the cache pass revealed less than its share, the block's last pass makes up
        quota = jnp.where(rows.step + 1 == plan.steps_per_block, num_open, quota)
    return orders.highest(scores, is_candidate, quota)


class Seen(NamedTuple):
    """What a pass says of the candidates, (B, C) each; nothing behind the last one."""

    eos_prob: jax.Array  # float32, P([EOS]), or of the model's refusal token where that is another
    tokens: jax.Array  # int32, what would be written there
    confidence: jax.Array  # float32
    scores: jax.Array  # float32, the highest are revealed first


def head_sizes(num_candidates: int, vocab_size: int) -> list[int]:
    """How many candidates may go through the head: quarters of all, where it is large enough for a program each."""
    if num_candidates * vocab_size < FEW_LOGITS:
        return [num_candidates]
    return sorted({-(-num_candidates * quarter // 4) for quarter in (1, 2, 3, 4)})


def _look(model, rows: Rows, hidden, offset, positions, position_uniforms, draws: Draws, plan: Plan, size: int) -> Seen:
    """The first `size` of the candidates at `positions` (B, C); the other arguments as of `reveal`."""
    config, mask_id, eos_id = plan.config, model.config.mask_id, model.config.eos_id
    refusal_id = model.config.refusal_id
    first = positions[:, :size]
    indices = first - offset[:, None]
    if model.config.shift_logits:  # the first token has no output before it and takes its own, never that of padding
        indices = indices - 1
        if rows.attention_mask is not None:
            first_real = jnp.argmax(rows.attention_mask, axis=1)  # (B,)
            indices = jnp.maximum(indices, (first_real - offset)[:, None])
    logits = _logits_at(model, hidden, jnp.clip(indices, 0, hidden.shape[1] - 1), config.cfg_scale)  # (B, size, V)
    eos_prob = orders.token_probability(logits, jnp.full(first.shape, refusal_id))
    token_uniforms = None
    if config.temperature > 0:
        token_uniforms = _uniforms(rows, draws.tokens, 0, first, logits.shape[2:])
    if position_uniforms is not None:
        position_uniforms = position_uniforms[:, :size]
    proposed = propose(logits, first, config, mask_id, eos_id, refusal_id, token_uniforms, position_uniforms)
    behind = ((0, 0), (0, plan.num_candidates - size))
    return Seen(*(jnp.pad(value, behind) for value in (eos_prob, *proposed)))


def reveal(model, rows: Rows, hidden, offset, is_active, draws: Draws, plan: Plan, *, is_cache_pass=False) -> Rows:
    """The rows after a pass.

    Args:
      hidden: (B, L, D) hidden states of each row's positions from `offset` on; (2 B, L, D) under guidance.
      offset: (B,) int32.
      is_active: (B,) bool, rows that take part in the pass; the others stay as they are.
      is_cache_pass: whether this pass filled the cache. A model whose logits are shifted reveals the block's first
        position then and nothing else, because later passes do not see the hidden state before it.
    """
    config, eos_id = plan.config, model.config.eos_id
    row = jnp.arange(len(rows.tokens))[:, None]
    is_left = rows.is_open & (rows.block <= rows.current[:, None]) & is_active[:, None]  # (B, T)
    positions = jnp.argsort(~is_left, axis=1, stable=True)[:, : plan.num_candidates]  # (B, C), left to right
    is_candidate = jnp.take_along_axis(is_left, positions, axis=1)  # (B, C)

    position_uniforms = None
    if config.order == "random" or config.order_temperature > 0:
        position_uniforms = _uniforms(rows, draws.positions, 1, positions, ())

    def look(size: int) -> Seen:
        return _look(model, rows, hidden, offset, positions, position_uniforms, draws, plan, size)

    sizes = head_sizes(plan.num_candidates, model.config.vocab_size)
    num_left = jnp.max(jnp.sum(is_candidate, axis=1))
    chosen = jnp.sum(num_left > jnp.array(sizes[:-1], jnp.int32))
    seen = jax.lax.switch(chosen, [functools.partial(look, size) for size in sizes])
    proposed, confidence, scores = seen.tokens, seen.confidence, seen.scores

    # The monitor sees the pass before anything of it is revealed.
    eos_prob = jnp.where(is_candidate, seen.eos_prob, jnp.nan)  # (B, C)
    is_rejected, monitor_score = rows.is_rejected, rows.monitor_score
    if config.monitor is not None:
        score = config.monitor.score(rows.num_forward, rows.tokens, eos_prob)
        is_rejected |= is_active & (score > config.monitor.threshold)
        monitor_score = jnp.where(is_active, jnp.fmax(monitor_score, score), monitor_score)
        is_candidate &= ~is_rejected[:, None]

    is_counted = is_left if config.count_prompt_masks else is_left & (rows.block == rows.current[:, None])
    num_open = jnp.sum(is_counted, axis=1)  # (B,)
    num_masks = jnp.where(rows.step == 0, num_open, rows.num_masks)
    if is_cache_pass and model.config.shift_logits:
        is_revealed = is_candidate & (jnp.arange(positions.shape[1]) == 0)
    else:
        is_revealed = _choose(rows, plan, is_candidate, confidence, scores, position_uniforms, num_open, num_masks)

    was = jnp.take_along_axis(rows.tokens, positions, axis=1)
    tokens = rows.tokens.at[row, positions].set(jnp.where(is_revealed, proposed, was))
    is_closed = jnp.zeros_like(rows.is_open).at[row, positions].set(is_revealed)
    is_open = rows.is_open & ~is_closed & ~(is_rejected & is_active)[:, None]

    # Where the row stands now.
    is_block_done = ~jnp.any(is_open & (rows.block <= rows.current[:, None]), axis=1)
    if not config.is_adaptive:
        is_block_done |= rows.step + 1 == plan.steps_per_block
    if config.stop_after_eos:
        tokens, is_open = _fill_tail(rows, tokens, is_open, is_block_done & is_active, eos_id)
    current = jnp.where(is_block_done, rows.current + 1, rows.current)
    step = jnp.where(is_block_done, 0, rows.step + 1)

    column = jnp.where(is_active, rows.num_forward, plan.num_passes)[:, None]  # beyond the last: dropped
    trace = rows.trace
    if trace is not None:
        is_stopped_now = is_active & is_rejected & ~rows.is_rejected
        trace = Trace(
            tokens=tokens,
            revealed_step=jnp.where(is_closed, rows.num_forward[:, None], trace.revealed_step),
            confidence=trace.confidence.at[row, positions].set(
                jnp.where(is_revealed, confidence, jnp.take_along_axis(trace.confidence, positions, axis=1))
            ),
            eos_prob_map=trace.eos_prob_map.at[row, column, positions].set(eos_prob, mode="drop"),
            stop_step=jnp.where(is_stopped_now, rows.num_forward, trace.stop_step),
        )
    return rows._replace(
        tokens=tokens,
        is_open=is_open,
        current=jnp.where(is_active, current, rows.current),
        step=jnp.where(is_active, step, rows.step),
        num_masks=jnp.where(is_active, num_masks, rows.num_masks),
        num_forward=rows.num_forward + is_active,
        is_rejected=is_rejected,
        monitor_score=monitor_score,
        eos_prob=rows.eos_prob.at[row, column].set(eos_prob[:, :1], mode="drop"),
        trace=trace,
    )


def _fill_tail(rows: Rows, tokens, is_open, is_block_done, eos_id: int):
    """Rows whose block, now full, ends in [EOS] are finished: [EOS] fills what is left."""
    length = tokens.shape[1]
    is_current = rows.block == rows.current[:, None]  # (B, T)
    last = length - 1 - jnp.argmax(is_current[:, ::-1], axis=1)  # (B,)
    has_ended = is_block_done & (jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0] == eos_id)
    tokens = jnp.where(has_ended[:, None] & is_open, eos_id, tokens)
    return tokens, is_open & ~has_ended[:, None]


# -- the loops --------------------------------------------------------------------------------------------------------


def _whole_pass(model, rows: Rows, layers, draws: Draws, plan: Plan) -> Rows:
    """The rows after a pass that sees them whole."""
    hidden = model.hidden_states(*model_inputs(rows, model.config.mask_id, plan), layers=layers)  # (B, T, D)
    offset = jnp.zeros(len(rows.tokens), jnp.int32)
    return reveal(model, rows, hidden, offset, is_running(rows, plan.num_blocks), draws, plan)


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"))
def decode(graphdef, state, layers, rows: Rows, max_running, draws: Draws, *, plan: Plan) -> Rows:
    """Passes over whole rows until `max_running` () rows or fewer are unfinished; `layers`: of `layers_apart`."""
    model = nnx.merge(graphdef, state)

    def goes_on(rows: Rows) -> jax.Array:
        return jnp.sum(is_running(rows, plan.num_blocks)) > max_running

    return jax.lax.while_loop(goes_on, lambda rows: _whole_pass(model, rows, layers, draws, plan), rows)


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"))
def decode_to_block(graphdef, state, layers, rows: Rows, max_passes, draws: Draws, *, plan: Plan) -> Rows:
    """Passes over whole rows until some row has finished a block or is done, `max_passes` of them at most."""
    model = nnx.merge(graphdef, state)
    block_at_start, was_running = rows.current, is_running(rows, plan.num_blocks)

    def goes_on(carry):
        rows, count = carry
        is_in_block = is_running(rows, plan.num_blocks) & (rows.current == block_at_start)
        return jnp.any(was_running) & jnp.all(is_in_block | ~was_running) & (count < max_passes)

    def take_pass(carry):
        rows, count = carry
        return _whole_pass(model, rows, layers, draws, plan), count + 1

    return jax.lax.while_loop(goes_on, take_pass, (rows, 0))[0]


@functools.partial(jax.jit, static_argnames=("graphdef", "plan", "num_positions"))
def decode_block(graphdef, state, layers, rows: Rows, draws: Draws, *, plan: Plan, num_positions: int) -> Rows:
    """The current block of every unfinished row, with a cache of keys and values.

    The first pass is over whole rows. The others recompute `num_positions` positions from the start of the row's block
    on, and see the rest as the first pass left it: those of the block alone (dual cache), or all up to the end of the
    row (prefix cache). A row that fills its block early waits for the others.
    """
    model = nnx.merge(graphdef, state)
    mask_id = model.config.mask_id
    block_at_start = rows.current
    block_length = plan.config.gen_length // plan.num_blocks
    start = rows.tokens.shape[1] - (plan.num_blocks - rows.current) * block_length  # (B,)

    tokens, attention_mask = model_inputs(rows, mask_id, plan)
    hidden, cache = model.cached_hidden_states(tokens, attention_mask, layers=layers)  # (B, T, D)
    offset = jnp.zeros_like(start)
    rows = reveal(model, rows, hidden, offset, is_running(rows, plan.num_blocks), draws, plan, is_cache_pass=True)

    def is_active(rows: Rows) -> jax.Array:
        return is_running(rows, plan.num_blocks) & (rows.current == block_at_start)

    positions = start[:, None] + jnp.arange(num_positions)  # (B, L), beyond T for rows further on than others
    if plan.config.cfg_scale != 0:
        positions = jnp.concatenate([positions, positions])

    def take_pass(rows: Rows) -> Rows:
        tokens, attention_mask = model_inputs(rows, mask_id, plan)
        inside = jnp.minimum(positions, tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(tokens, inside, axis=1)  # (B, L)
        hidden, _ = model.cached_hidden_states(
            tokens, attention_mask, positions=positions, cache=cache, layers=layers
        )  # (B, L, D)
        return reveal(model, rows, hidden, start, is_active(rows), draws, plan)

    return jax.lax.while_loop(lambda rows: jnp.any(is_active(rows)), take_pass, rows)


@jax.jit
def replace_rows(rows: Rows, fresh: Rows, is_new: jax.Array) -> Rows:
    """`rows` with those of `fresh` where `is_new` (B,): their places go to other requests."""
    return jax.tree.map(lambda old, new: jnp.where(is_new.reshape(-1, *[1] * (old.ndim - 1)), new, old), rows, fresh)
