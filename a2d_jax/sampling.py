"""Decoding by unmasking: `generate` writes a response after a prompt, `infill` fills masks anywhere, in any order.

A step is: forward pass, P([EOS]) monitor, choice of tokens, choice of positions, reveal; `a2d_jax/decoding.py` holds
it and the jitted loops, `a2d_jax/orders.py` the rules, `a2d_jax/batching.py` decodes many prompts.

Differences from the published samplers, each a defect there:
  * rows are independent: a row's quota, its confidence order and its end depend on that row alone (Dream shares one
    quota among the rows of a batch and can overwrite text of the shorter row; A2D's Dream sampler reveals one token per
    batch; Fast-dLLM's caches serve one row);
  * [MASK] is never chosen as a token, so decoding ends and the answer holds no mask;
  * a masked first token of a Dream model is predicted from its own output, also where padding stands in front of it (in
    Dream from the padding's);
  * masks inside the prompt belong to the first block and get a share of its steps (LLaDA gives them none, and masks
    stay in the answer); `count_prompt_masks=False` replays the original;
  * Gumbel noise is added to logits, not multiplied into their exponentials, which overflow in float32;
  * a block that its first pass filled takes no second (Fast-dLLM's cached samplers run one that reveals nothing).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from a2d_jax import autoregressive
from a2d_jax.decoding import Draws, Plan, Rows, Trace, decode, decode_block, decode_to_block, is_running, start_rows
from a2d_jax.models.transformer import Transformer
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sharding import batch_sharding, mesh_of, under


class SampleResult(NamedTuple):
    """What decoding made. T is the prompt's length plus gen_length, or the length of the infilled rows.

    Passes count from 0, each row's by itself. There are at most `steps` of them; with `threshold` or `factor`, as many
    as there are masks.
    """

    tokens: jax.Array  # (B, T) int32, prompt included; refused rows hold [EOS] where they were masked
    num_forward: jax.Array  # (B,) int32, forward passes that the row took part in
    is_rejected: jax.Array  # (B,) bool, stopped by the monitor
    eos_prob: jax.Array  # (B, passes) float32, P([EOS]) at the left-most mask; NaN for passes the row did not take
    monitor_score: jax.Array  # (B,) float32, the largest score that the monitor gave; NaN without a monitor
    trace: Trace | None = None  # where it was asked for


class Decoder:
    """A model and a plan, ready to run rows; all that is compiled depends on these and the shape of the rows.

    `layers`: what `model.layers_apart()` returned, for decoders that share it.
    """

    def __init__(self, model: Transformer, plan: Plan, draws: Draws | None = None, layers: list | None = None):
        self._graphdef, self._state = nnx.split(model)
        self._mesh = mesh_of(model)
        self.layers = layers or model.layers_apart()
        self._draws = draws or Draws()
        self._eos_id = model.config.eos_id
        self.plan = plan

    def start(self, tokens, block, attention_mask, keys, has_trace: bool = False) -> Rows:
        """Rows before their first pass, on the model's devices."""
        tokens, block = np.asarray(tokens, np.int32), np.asarray(block, np.int32)
        if attention_mask is not None:
            attention_mask = np.asarray(attention_mask, bool)
        rows = start_rows(tokens, block, attention_mask, keys, self.plan, has_trace)
        if self._mesh is None:
            return rows
        return jax.tree.map(lambda a: jax.device_put(a, batch_sharding(self._mesh, a.shape)), rows)

    def is_running(self, rows: Rows) -> np.ndarray:
        return np.asarray(is_running(rows, self.plan.num_blocks))

    def advance(self, rows: Rows, max_running: int = 0) -> Rows:
        """Decodes on until `max_running` rows are unfinished; with a cache, to the end of each row's block."""
        with under(self._mesh):
            if self.plan.config.cache is None:
                return decode(self._graphdef, self._state, self.layers, rows, max_running, self._draws, plan=self.plan)
            block_length = self.plan.config.gen_length // self.plan.num_blocks
            num_positions = block_length
            if self.plan.config.cache == "prefix":  # up to the end, from the earliest block on
                first = int(np.min(np.asarray(rows.current)[self.is_running(rows)]))
                num_positions = (self.plan.num_blocks - first) * block_length
            return decode_block(
                self._graphdef, self._state, self.layers, rows, self._draws, plan=self.plan, num_positions=num_positions
            )

    def advance_to_block(self, rows: Rows, max_passes: int) -> Rows:
        """Decodes on until some row has finished a block, or for `max_passes`; with a cache, as `advance`."""
        if self.plan.config.cache is not None:
            return self.advance(rows)
        with under(self._mesh):
            return decode_to_block(
                self._graphdef, self._state, self.layers, rows, max_passes, self._draws, plan=self.plan
            )

    def run(self, rows: Rows) -> Rows:
        """Decodes all rows to their end."""
        if self.plan.config.cache is None:
            return self.advance(rows)
        while self.is_running(rows).any():
            rows = self.advance(rows)
        return rows

    def result(self, rows: Rows) -> SampleResult:
        """What rows have come to. The text of a row that the monitor stopped is withdrawn."""
        was_masked = rows.block < self.plan.num_blocks
        tokens = jnp.where(rows.is_rejected[:, None] & was_masked, self._eos_id, rows.tokens)
        return SampleResult(tokens, rows.num_forward, rows.is_rejected, rows.eos_prob, rows.monitor_score, rows.trace)


def round_up(count: int, whole: int) -> int:
    """Few compiled shapes for counts of masks: multiples of 32, or powers of two below, of `whole` at most."""
    rounded = 1 << (count - 1).bit_length() if count < 32 else -(-count // 32) * 32
    return min(rounded, whole)


def response_plan(config: SamplerConfig, family: str, length: int, num_prompt_masks: int = 0) -> Plan:
    """How `generate` decodes rows of this length with at most so many masks in their prompts."""
    num_blocks = config.num_blocks(family)
    if num_prompt_masks and config.cache is not None:
        raise ValueError(
            f"the prompt holds {num_prompt_masks} masks, and cache={config.cache!r} keeps the prompt as it is; "
            "use cache=None, or infill."
        )
    extra = round_up(num_prompt_masks, length - config.gen_length) if num_prompt_masks else 0
    num_passes = config.gen_length + extra if config.is_adaptive else config.steps
    return Plan(config.resolve(family), num_blocks, config.gen_length // num_blocks + extra, num_passes)


def infill_plan(config: SamplerConfig, family: str, length: int, num_masks: int) -> Plan:
    """How `infill` decodes rows of this length with at most so many masks."""
    if config.cache is not None:
        raise ValueError(f"cache={config.cache!r} works block by block; infill has no blocks, use cache=None.")
    num_candidates = round_up(num_masks, length)
    return Plan(config.resolve(family), 1, num_candidates, num_candidates if config.is_adaptive else config.steps)


def response_rows(prompt, prompt_mask, config: SamplerConfig, num_blocks: int, mask_id: int):
    """Rows (B, P + gen_length) that end in masks: their tokens, the block of each mask, and the attention mask."""
    prompt = np.asarray(prompt, np.int32)
    response = np.full((len(prompt), config.gen_length), mask_id, np.int32)
    is_blank = prompt == mask_id
    if prompt_mask is not None:
        prompt_mask = np.asarray(prompt_mask, bool)
        is_blank &= prompt_mask
        prompt_mask = np.concatenate([prompt_mask, np.ones(response.shape, bool)], axis=1)
    prompt_block = np.where(is_blank, 0 if config.count_prompt_masks else -1, num_blocks)
    response_block = np.arange(config.gen_length) // (config.gen_length // num_blocks)
    block = np.concatenate([prompt_block, np.broadcast_to(response_block, response.shape)], axis=1)
    return np.concatenate([prompt, response], axis=1), block, prompt_mask


def special_ids(model: Transformer) -> tuple[int, int]:
    """The ids of [MASK] and [EOS]; ValueError where the model has none, or no row of its embedding for them."""
    mask_id, eos_id = model.config.mask_id, model.config.eos_id
    if mask_id is None or eos_id is None:
        raise ValueError(
            f"config.json of this {model.config.family} model has mask_token_id={mask_id}, eos_token_id={eos_id}; "
            "unmasking needs both: add them, or use a masked-diffusion checkpoint."
        )
    if max(mask_id, eos_id) >= model.config.vocab_size:
        raise ValueError(
            f"config.json has mask_token_id={mask_id}, eos_token_id={eos_id}, but the model's ids are 0 to "
            f"{model.config.vocab_size - 1}; take config.json and the weights of the same checkpoint."
        )
    return mask_id, eos_id


def row_keys(config: SamplerConfig, key: jax.Array | None, numbers, *, is_replayed: bool = False) -> jax.Array:
    """A key for each row, by its number; ValueError where the config draws at random and no key is given."""
    if key is None and config.needs_key and not is_replayed:
        raise ValueError(
            f"order={config.order!r}, temperature={config.temperature} draw at random; pass key=jax.random.key(seed)."
        )
    key = jax.random.key(0) if key is None else key  # drawn from only where a key was needed
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(numbers, jnp.int32))


def _run(model, tokens, block, attention_mask, plan: Plan, key, draws, has_trace: bool) -> SampleResult:
    keys = row_keys(plan.config, key, np.arange(len(tokens)), is_replayed=draws is not None)
    if attention_mask is not None and np.all(attention_mask):
        attention_mask = None
    decoder = Decoder(model, plan, draws)
    return decoder.result(decoder.run(decoder.start(tokens, block, attention_mask, keys, has_trace)))


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different length as (B, P) tokens and a (B, P) mask that is False on the padding in front."""
    length = max(len(row) for row in rows)
    tokens = np.array([[pad_id] * (length - len(row)) + list(row) for row in rows], np.int32)
    return tokens, np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])


def token_rows(model, name: str, given, mask, mask_name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What a caller gives as tokens (B, P) int32 and a mask of them, None: all are real. Lists are padded on the left.

    Raises:
      ValueError: anything but rows of the model's token ids, or a mask of another shape; `name` and `mask_name` are
        what the caller knows them by.
    """
    needed = (
        f"give (B, T) token ids or a list of token lists, for a single one [{name}]; tokenizer.encode_prompt makes one "
        "of a text."
    )
    if isinstance(given, (list, tuple)):
        rows = [np.asarray(row, None if np.size(row) else np.int32) for row in given]  # of [] NumPy would make floats
        for row in rows:
            if row.ndim != 1 or row.dtype.kind not in "iu":
                raise ValueError(f"{name} is a list with {row.tolist()!r:.60}, which is no list of token ids; {needed}")
        if rows and mask is None:
            given, mask = pad_left(rows, model.config.padding_id)
        elif len({len(row) for row in rows}) > 1:
            raise ValueError(f"{mask_name} with prompts of several lengths: leave it out, and they are padded here.")
        else:
            given = rows
    tokens = np.asarray(given)
    if tokens.ndim != 2 or not len(tokens) or tokens.dtype.kind not in "iu":
        raise ValueError(f"{name} has shape {tokens.shape} and dtype {tokens.dtype}; {needed}")
    is_unknown = (tokens < 0) | (tokens >= model.config.vocab_size)
    if mask is not None:
        mask = np.asarray(mask, bool)
        if mask.shape != tokens.shape:
            raise ValueError(f"{mask_name} has shape {mask.shape}, {name} {tokens.shape}: give equal ones.")
        is_unknown &= mask
    if is_unknown.any():
        raise ValueError(
            f"{name} has the token id {tokens[is_unknown][0]}, but the model's ids are 0 to "
            f"{model.config.vocab_size - 1}; encode the text with the model's own tokenizer."
        )
    return tokens.astype(np.int32), mask


def generate(
    model, prompt, config=None, key=None, *, prompt_mask=None, draws: Draws | None = None, trace: bool = False
) -> SampleResult:
    """Appends `gen_length` masks to each prompt and fills them, block by block.

    A causal model writes one token after the other instead; see `autoregressive.extend` for the settings that count.

    Args:
      model: a `Transformer`.
      prompt: (B, P) int array, or a list of token lists of any lengths (padded on the left here).
      config: SamplerConfig.
      key: for temperature or a random order.
      prompt_mask: (B, P) bool, False on left padding, where `prompt` is padded already; padding elsewhere is refused.
      draws: recorded uniforms instead of the key.
      trace: also record what a replay needs, (B, passes, P + gen_length) numbers.
    """
    config = config or SamplerConfig()
    prompt, prompt_mask = token_rows(model, "prompt", prompt, prompt_mask, "prompt_mask")
    if prompt_mask is not None and np.any(prompt_mask[:, :-1] & ~prompt_mask[:, 1:]):
        raise ValueError(
            "prompt_mask is False behind a token; move the padding to the left, or give a list of token lists alone."
        )
    if model.config.is_causal:
        if trace:
            raise ValueError("a causal model fills no masks, so there is nothing to replay; leave the trace out.")
        return continue_rows(model, prompt, prompt_mask, config, key, np.arange(len(prompt)))
    mask_id, _ = special_ids(model)
    num_blocks = config.num_blocks(model.config.family)
    tokens, block, attention_mask = response_rows(prompt, prompt_mask, config, num_blocks, mask_id)
    num_prompt_masks = int((block[:, : -config.gen_length] < num_blocks).sum(axis=1).max(initial=0))
    plan = response_plan(config, model.config.family, tokens.shape[1], num_prompt_masks)
    return _run(model, tokens, block, attention_mask, plan, key, draws, trace)


def continue_rows(model, prompt, prompt_mask, config: SamplerConfig, key, numbers) -> SampleResult:
    """What a causal model writes behind each prompt; `numbers` (B,) tell the rows' random keys apart."""
    keys = None if key is None else row_keys(config, key, numbers)
    return SampleResult(*autoregressive.extend(model, prompt, prompt_mask, config, keys))


def infill(
    model, tokens, config=None, key=None, *, attention_mask=None, draws: Draws | None = None, trace: bool = False
) -> SampleResult:
    """Fills every mask id in place, in the order the config names; gen_length and block_length play no part.

    Args:
      tokens: (B, T) int array that holds mask ids, or a list of token lists of any lengths (padded on the left here).
      attention_mask: (B, T) bool, False on padding, where `tokens` is padded already.
      draws, trace: as in `generate`.
    """
    config = config or SamplerConfig()
    mask_id, _ = special_ids(model)
    tokens, attention_mask = token_rows(model, "tokens", tokens, attention_mask, "attention_mask")
    is_blank = tokens == mask_id
    if not is_blank.any():
        raise ValueError(
            f"the text holds no mask id ({mask_id}), so nothing is to fill; write <mask:N> where it should."
        )
    if attention_mask is not None:
        is_blank &= attention_mask
    plan = infill_plan(config, model.config.family, tokens.shape[1], int(is_blank.sum(axis=1).max()))
    return _run(model, tokens, np.where(is_blank, 0, 1), attention_mask, plan, key, draws, trace)
