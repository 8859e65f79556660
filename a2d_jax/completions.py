"""Runs requests through the sampler in batches of few fixed shapes, and keeps what the model wrote as JSON lines.

Rows are padded on the left to a bucket length and batched with rows of the same bucket, so XLA compiles one program a
bucket (two where a batch needs no padding). Batches and their random keys depend on the whole list of requests, not on
what is already done: a run that was stopped and goes on writes what it would have written at once.
"""

import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from a2d_jax.attacks import AttackInput
from a2d_jax.hf_io import write_beside
from a2d_jax.sampling import SamplerConfig, SampleResult, generate, infill
from a2d_jax.tokenizer import Tokenizer

DEFAULT_BUCKETS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)

Completion = dict[str, Any]


class PlannedBatch(NamedTuple):
    """Requests decoded together: their indices, the row length, and whether `generate` may go block by block."""

    indices: tuple[int, ...]
    length: int
    is_response: bool


def plan_batches(inputs: Sequence[AttackInput], batch_size: int, buckets: Sequence[int]) -> list[PlannedBatch]:
    """Requests of equal bucket in their order, `batch_size` at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; give 1 or more")
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, given in enumerate(inputs):
        length = min((bucket for bucket in buckets if bucket >= given.tokens.size), default=None)
        if length is None:
            raise ValueError(
                f"prompt {index} has {given.tokens.size} tokens, masks included; add a bucket above {max(buckets)}"
            )
        groups.setdefault((length, given.is_response), []).append(index)
    return [
        PlannedBatch(tuple(indices[start : start + batch_size]), length, is_response)
        for (length, is_response), indices in sorted(groups.items())
        for start in range(0, len(indices), batch_size)
    ]


def complete(
    model: Any,
    tokenizer: Tokenizer,
    inputs: Sequence[AttackInput],
    config: SamplerConfig,
    *,
    batch_size: int = 16,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    seed: int = 0,
    done: Container[int] = (),
) -> Iterator[list[Completion]]:
    """Fills the blanks of all inputs; yields the completions of one batch at a time.

    Args:
      config: `gen_length` must be that of the inputs.
      done: indices of inputs to leave out.
    Yields:
      Dicts with "index", "completion" (the text in the blanks), "num_blanks", "num_forward", "is_rejected",
      "eos_prob_first" and "eos_prob" (P([EOS]) at each step taken, six digits).
    """
    key = jax.random.key(seed)
    num_in_group = {}  # a group smaller than a batch has its own size, the last batch of a larger one is filled up
    batches = plan_batches(inputs, batch_size, buckets)
    for batch in batches:
        group = (batch.length, batch.is_response)
        num_in_group[group] = max(num_in_group.get(group, 0), len(batch.indices))
    for batch in batches:
        if all(index in done for index in batch.indices):
            continue
        num_rows = num_in_group[batch.length, batch.is_response]
        filled = [*batch.indices, *[batch.indices[-1]] * (num_rows - len(batch.indices))]
        rows = [inputs[index] for index in filled]
        result = sample_batch(model, tokenizer, rows, batch, config, jax.random.fold_in(key, batch.indices[0]))
        result = SampleResult(*(np.asarray(array) for array in result))
        yield [
            _completion(tokenizer, index, inputs[index], SampleResult(*(array[row] for array in result)))
            for row, index in enumerate(batch.indices)
            if index not in done
        ]


def sample_batch(
    model: Any,
    tokenizer: Tokenizer,
    rows: Sequence[AttackInput],
    batch: PlannedBatch,
    config: SamplerConfig,
    key: jax.Array,
) -> SampleResult:
    """Decodes rows padded on the left to `batch.length`: responses by `generate`, masks inside a text by `infill`."""
    tokens = np.full((len(rows), batch.length), tokenizer.pad_id, np.int32)  # (B, T)
    is_real = np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        tokens[index, -row.tokens.size :] = row.tokens
        is_real[index, -row.tokens.size :] = True
    if not batch.is_response:
        return infill(model, tokens, config, key, attention_mask=is_real)
    prompt = slice(0, batch.length - config.gen_length)
    return generate(model, tokens[:, prompt], config, key, prompt_mask=is_real[:, prompt])


def _completion(tokenizer: Tokenizer, index: int, given: AttackInput, result: SampleResult) -> Completion:
    tokens = result.tokens[-given.tokens.size :]  # without the padding in front
    eos_prob = result.eos_prob[~np.isnan(result.eos_prob)]
    return {
        "index": index,
        "completion": blank_text(tokenizer, tokens, given.is_blank),
        "num_blanks": given.num_blanks,
        "num_forward": int(result.num_forward),
        "is_rejected": bool(result.is_rejected),
        "eos_prob_first": float(eos_prob[0]),
        "eos_prob": [round(float(prob), 6) for prob in eos_prob],
    }


def blank_text(tokenizer: Tokenizer, tokens: np.ndarray, is_blank: np.ndarray) -> str:
    """The text in the blanks, one space between runs, without special tokens. Text behind an [EOS] counts too."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_blank, [False]]).astype(int)))
    special = (tokenizer.eos_id, tokenizer.pad_id, tokenizer.eot_id)
    texts = []
    for start, end in edges.reshape(-1, 2):
        ids = [token for token in tokens[start:end].tolist() if token not in special]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return " ".join(text for text in texts if text)


# -- the file ---------------------------------------------------------------------------------------------------------


def append_completions(path: Path, completions: Sequence[Mapping[str, Any]]) -> None:
    """Adds one line each and waits until they are on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(completion, ensure_ascii=False) + "\n" for completion in completions)
        file.flush()
        os.fsync(file.fileno())


def read_completions(path: Path) -> dict[int, Completion]:
    """Completions by index. A last line that a stopped run left unfinished is taken out of the file."""
    if not path.is_file():
        return {}
    *lines, rest = path.read_bytes().split(b"\n")
    completions = {}
    for number, line in enumerate(lines, 1):
        try:
            completion = json.loads(line)
            completions[completion["index"]] = completion
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no completion ({error!r}); remove the folder") from error
    if rest:
        write_beside(path, lambda file: file.writelines(line + b"\n" for line in lines))
    return completions
