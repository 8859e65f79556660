"""Many requests through few rows: a row that is done makes room for the next request (continuous batching).

Requests are padded on the left to a bucket length, and those of one bucket share a batch, so that XLA compiles one
program a bucket. What a request becomes does not depend on its company: its random key comes from its number, and rows
do not see each other.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from a2d_jax.config import CAUSAL_FAMILIES
from a2d_jax.decoding import Plan, replace_rows
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import (
    Decoder,
    SampleResult,
    continue_rows,
    infill_plan,
    pad_left,
    response_plan,
    response_rows,
    row_keys,
    special_ids,
)

DEFAULT_BUCKETS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


def buckets_up_to(max_length: int) -> list[int]:
    """Row lengths to pad to: those of DEFAULT_BUCKETS, the same series on, and `max_length` as the last."""
    buckets = list(DEFAULT_BUCKETS)
    while buckets[-1] < max_length:
        buckets.append(2 * buckets[-2])
    return [bucket for bucket in buckets if bucket < max_length] + [max_length]


class Request(NamedTuple):
    """Tokens with masks to fill. (Anything with these two attributes will do.)"""

    tokens: np.ndarray  # (n,) int32
    is_response: bool  # whether the last gen_length tokens are a response, to be written block by block


class Group(NamedTuple):
    """Requests that share a compiled program."""

    indices: tuple[int, ...]
    length: int
    is_response: bool
    plan: Plan


def plan_groups(
    requests: Sequence[Request], config: SamplerConfig, buckets: Sequence[int], family: str, mask_id: int | None
) -> list[Group]:
    """Requests of equal bucket and kind, in their order; ValueError for what cannot be decoded."""
    members: dict[tuple[int, bool], list[int]] = {}
    for index, request in enumerate(requests):
        length = min((bucket for bucket in buckets if bucket >= len(request.tokens)), default=None)
        if length is None:
            raise ValueError(
                f"prompt {index} has {len(request.tokens)} tokens, masks included; add a bucket above {max(buckets)}"
            )
        members.setdefault((length, request.is_response), []).append(index)
    groups = []
    for (length, is_response), indices in sorted(members.items()):
        if not is_response and family in CAUSAL_FAMILIES:
            raise ValueError(
                f"prompt {indices[0]} is a template to fill, and a {family} model continues texts; use attacks that "
                "ask for a response (zero_shot, prefilling), or a masked-diffusion model"
            )
        num_masks = max(int(np.sum(requests[index].tokens == mask_id)) for index in indices)
        if is_response:
            plan = response_plan(config, family, length, max(num_masks - config.gen_length, 0))
        else:
            plan = infill_plan(config, family, length, num_masks)
        groups.append(Group(tuple(indices), length, is_response, plan))
    return groups


def sample_many(
    model,
    requests: Sequence[Request],
    config: SamplerConfig,
    key: jax.Array | None = None,
    *,
    batch_size: int = 16,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    done: Container[int] = (),
) -> Iterator[list[tuple[int, SampleResult]]]:
    """Fills the masks of all requests.

    Args:
      config: `gen_length` must be that of the responses.
      key: for temperature or a random order; a request's own is folded in by its index.
      batch_size: rows that are decoded together.
      buckets: row lengths to pad to.
      done: indices of requests to leave out.
    Yields:
      (index, result) of the requests that were finished together; results hold numpy arrays of one row without the
      batch axis and the padding.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; give 1 or more")
    if model.config.is_causal:
        yield from _continue_many(model, requests, config, key, batch_size, buckets, done)
        return
    mask_id, _ = special_ids(model)
    for group in plan_groups(requests, config, buckets, model.config.family, mask_id):
        left = [index for index in group.indices if index not in done]
        if not left:
            continue
        # The first request has the bucket's length; padding it is given without changes the others' lengths alone.
        longest = np.zeros(group.length, np.int32)
        tokens, is_real = pad_left([longest, *(requests[i].tokens for i in left)], model.config.padding_id)
        tokens, is_real = tokens[1:], is_real[1:]
        if group.is_response:
            prompt = slice(0, group.length - config.gen_length)
            tokens, block, is_real = response_rows(
                tokens[:, prompt], is_real[:, prompt], config, group.plan.num_blocks, mask_id
            )
        else:
            block = np.where((tokens == mask_id) & is_real, 0, 1)
        needs_mask = any(len(requests[i].tokens) < group.length for i in group.indices)
        decoder = Decoder(model, group.plan)
        queue = decode_queue(
            decoder,
            tokens,
            block,
            is_real if needs_mask else None,
            row_keys(config, key, left),
            min(batch_size, len(group.indices)),
        )
        for finished in queue:
            yield [(left[number], _unpad(result, len(requests[left[number]].tokens))) for number, result in finished]


def _continue_many(
    model, requests, config: SamplerConfig, key, batch_size: int, buckets: Sequence[int], done: Container[int]
) -> Iterator[list[tuple[int, SampleResult]]]:
    """`sample_many` of a causal model, batch by batch; what stands in the responses to come is not read."""
    for group in plan_groups(requests, config, buckets, model.config.family, model.config.mask_id):
        left = [index for index in group.indices if index not in done]
        for start in range(0, len(left), batch_size):
            indices = left[start : start + batch_size]
            # A last short batch is filled up with its last request: one compiled program a bucket.
            rows = [*indices, *[indices[-1]] * (min(batch_size, len(group.indices)) - len(indices))]
            prompts = [requests[index].tokens[: -config.gen_length] for index in rows]
            padding = np.zeros(group.length - config.gen_length, np.int32)
            tokens, is_real = pad_left([padding, *prompts], model.config.padding_id)
            result = continue_rows(model, tokens[1:], is_real[1:], config, key, np.asarray(rows))
            result = jax.tree.map(np.asarray, result)
            yield [
                (index, _unpad(jax.tree.map(lambda a, row=row: a[row], result), len(requests[index].tokens)))
                for row, index in enumerate(indices)
            ]


def generate_many(
    model,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig | None = None,
    key: jax.Array | None = None,
    *,
    batch_size: int = 16,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    report: Callable[[int], Any] = lambda num_finished: None,
) -> list[SampleResult]:
    """`generate` for any number of prompts of any lengths: one result a prompt, without batch axis and padding.

    `report` hears how many requests have just been finished.
    """
    config = config or SamplerConfig()
    blank_id = model.config.eos_id if model.config.is_causal else special_ids(model)[0]
    response = np.full(config.gen_length, blank_id, np.int32)
    requests = [Request(np.concatenate([np.asarray(prompt, np.int32), response]), True) for prompt in prompts]
    results: list[SampleResult | None] = [None] * len(prompts)
    for finished in sample_many(model, requests, config, key, batch_size=batch_size, buckets=buckets):
        for index, result in finished:
            results[index] = result
        report(len(finished))
    return results


def decode_queue(
    decoder: Decoder, tokens, block, attention_mask, keys, num_rows: int
) -> Iterator[list[tuple[int, SampleResult]]]:
    """Decodes N requests in `num_rows` rows; yields those that are finished together as (number, result)."""
    seats = np.full(num_rows, -1)  # which request each row holds
    num_started = 0
    rows = None
    while True:
        # Seat those who wait. An empty row has no masks, so it takes part in nothing.
        free = np.flatnonzero(seats < 0)[: len(tokens) - num_started]
        seats[free] = num_started + np.arange(len(free))
        num_started += len(free)
        if np.all(seats < 0):
            return
        if len(free) or rows is None:
            is_new = np.isin(np.arange(num_rows), free)
            chosen = np.maximum(seats, 0)
            fresh = decoder.start(
                tokens[chosen],
                np.where(is_new[:, None], block[chosen], decoder.plan.num_blocks),
                None if attention_mask is None else attention_mask[chosen],
                keys[chosen],
            )
            rows = fresh if rows is None else replace_rows(rows, fresh, is_new)

        num_seated = int(np.sum(seats >= 0))
        rows = decoder.advance(rows, num_seated - 1 if num_started < len(tokens) else 0)
        is_done = (seats >= 0) & ~decoder.is_running(rows)
        if is_done.any():
            result = jax.tree.map(np.asarray, decoder.result(rows))
            yield [
                (int(seats[row]), jax.tree.map(lambda a, row=row: a[row], result)) for row in np.flatnonzero(is_done)
            ]
            seats[is_done] = -1


def _unpad(result: SampleResult, length: int) -> SampleResult:
    return result._replace(tokens=result.tokens[-length:])
