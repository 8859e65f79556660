"""Runs requests through the sampler, and keeps what the model wrote as JSON lines.

A completion depends on its request and its number alone: a run that was stopped and goes on writes what it would have
written at once.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from a2d_jax.attacks import AttackInput
from a2d_jax.batching import DEFAULT_BUCKETS, sample_many
from a2d_jax.json_lines import append_lines, read_lines
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import SampleResult
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
      "eos_prob_first" and "eos_prob" (P([EOS]) at each step taken); where a monitor looked, its
      "monitor_score".
    """
    batches = sample_many(
        model, inputs, config, jax.random.key(seed), batch_size=batch_size, buckets=buckets, done=done
    )
    for finished in batches:
        yield [_completion(tokenizer, index, inputs[index], result) for index, result in finished]


def _completion(tokenizer: Tokenizer, index: int, given: AttackInput, result: SampleResult) -> Completion:
    eos_prob = result.eos_prob[~np.isnan(result.eos_prob)]
    completion = {
        "index": index,
        "completion": blank_text(tokenizer, result.tokens, given.is_blank),
        "num_blanks": given.num_blanks,
        "num_forward": int(result.num_forward),
        "is_rejected": bool(result.is_rejected),
        "eos_prob_first": float(eos_prob[0]),
        "eos_prob": [float(str(prob)) for prob in eos_prob],  # the shortest decimals that mean these float32
    }
    score = float(result.monitor_score)
    return completion if np.isnan(score) else completion | {"monitor_score": score}


def blank_text(tokenizer: Tokenizer, tokens: np.ndarray, is_blank: np.ndarray) -> str:
    """The text in the blanks, one space between runs, without special tokens. Text behind an [EOS] counts too.

    A model that refuses by an ordinary word writes it again and again; a word on its own amid others is text.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_blank, [False]]).astype(int)))
    special = (tokenizer.eos_id, tokenizer.pad_id, tokenizer.eot_id)
    texts = []
    for start, end in edges.reshape(-1, 2):
        ids = [token for token in tokens[start:end].tolist() if token not in special]
        ids = [ids[i] for i in range(len(ids)) if not _is_refusing(ids, i, tokenizer.refusal_id)]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return " ".join(text for text in texts if text)


def _is_refusing(ids: Sequence[int], index: int, refusal_id: int | None) -> bool:
    """Whether the token at `index` is the refusal token and stands next to another one, or alone in its blank."""
    if refusal_id is None or ids[index] != refusal_id:
        return False
    neighbours = [*ids[max(index - 1, 0) : index], *ids[index + 1 : index + 2]]
    return not neighbours or refusal_id in neighbours


# -- the file ---------------------------------------------------------------------------------------------------------


def append_completions(path: Path, completions: Sequence[Mapping[str, Any]]) -> None:
    """Adds one line each and waits until they are on the disk."""
    append_lines(path, completions)


def read_completions(path: Path) -> dict[int, Completion]:
    """Completions by index. A last line that a stopped run left unfinished is taken out of the file."""
    return read_lines(path, "index", "completion")
