"""Runs requests through the sampler, and keeps what the model wrote as JSON lines.

A completion depends on its request and its number alone: a run that was stopped and goes on writes what it would have
written at once.
"""

import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from a2d_jax.attacks import AttackInput
from a2d_jax.batching import DEFAULT_BUCKETS, sample_many
from a2d_jax.hf_io import write_beside
from a2d_jax.sampling import SamplerConfig, SampleResult
from a2d_jax.tokenizer import Tokenizer

Completion = dict[str, Any]


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
    """Fills the blanks of all inputs; yields the completions that were finished together.

    Args:
      config: `gen_length` must be that of the inputs.
      done: indices of inputs to leave out.
    Yields:
      Dicts with "index", "completion" (the text in the blanks), "num_blanks", "num_forward", "is_rejected",
      "eos_prob_first" and "eos_prob" (P([EOS]) at each step taken, six digits).
    """
    batches = sample_many(
        model, inputs, config, jax.random.key(seed), batch_size=batch_size, buckets=buckets, done=done
    )
    for finished in batches:
        yield [_completion(tokenizer, index, inputs[index], result) for index, result in finished]


def _completion(tokenizer: Tokenizer, index: int, given: AttackInput, result: SampleResult) -> Completion:
    eos_prob = result.eos_prob[~np.isnan(result.eos_prob)]
    return {
        "index": index,
        "completion": blank_text(tokenizer, result.tokens, given.is_blank),
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
