"""Rows to training batches: chat template, truncation, mixing, deterministic resumable iteration, bucket padding.

A row becomes tokens once, on the host, when the loader is built; afterwards a batch is index arithmetic and a copy, so any step
can be read at any time: seeking, resuming and splitting over hosts cost nothing.

Padding follows the definition of the loss, whose value depends on the longest row of the batch:
  1. every row is right-padded with [EOS] up to the longest row of the *global* batch; that padding is response;
  2. the batch is then padded up to the next bucket length, so that XLA compiles one program per bucket; those columns are
     nothing: `attention_mask` and `is_response` are False there, and the loss equals the one at the longest row's length.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from a2d_jax.rows import Row, parse_row, read_rows
from a2d_jax.tokenizer import Tokenizer

_MAX_LISTED = 5  # rows named in one error message


class Batch(NamedTuple):
    """One host's rows of a batch, numpy arrays; T is one of the loader's buckets.

    tokens: (B, T) int32. is_response: (B, T) bool, positions that may be masked ([EOS] padding up to the longest row included).
    attention_mask: (B, T) bool, False only in the columns added to reach the bucket. is_safe: (B,) bool, False = harmful row.
    """

    tokens: np.ndarray
    is_response: np.ndarray
    attention_mask: np.ndarray
    is_safe: np.ndarray


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What turns rows into batches.

    row_length: the longest row in tokens, prompt included; longer responses are cut there, and counted.
    buckets: batch lengths that occur; the last one must hold row_length. Empty: four even steps up to row_length.
    min_response: tokens of room that the prompt must leave for the response.
    on_long_prompt: "error", or "drop" = leave such rows out, and count them.
    weights: how often rows of each file are drawn, one weight a file. None: every row once an epoch.
    harmful_share: share of harmful rows among those drawn, 0 < share < 1. None: as they come.
    """

    row_length: int = 128
    buckets: tuple[int, ...] = ()
    min_response: int = 1
    on_long_prompt: str = "error"
    weights: tuple[float, ...] | None = None
    harmful_share: float | None = None


@dataclasses.dataclass(frozen=True)
class TruncationReport:
    """What did not fit. cut rows keep a shorter response; dropped rows are left out (on_long_prompt="drop")."""

    num_cut: int
    num_tokens_cut: int
    num_dropped: int
    examples: tuple[str, ...]  # where the first of them are: "file:line"


@dataclasses.dataclass(frozen=True)
class DataSummary:
    """The data set in numbers, after truncation; `str(summary)` is the paragraph for a training plan."""

    num_rows: int
    num_harmful: int
    num_retain: int
    num_documents: int
    num_tokens: int
    num_response_tokens: int
    longest_row: int
    rows_per_file: dict[str, int]
    truncation: TruncationReport


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """All rows as flat arrays. Row i is tokens[offsets[i]:offsets[i + 1]], its first prompt_lengths[i] tokens are the prompt."""

    tokens: np.ndarray  # (sum of lengths,) int32
    offsets: np.ndarray  # (N + 1,) int64
    prompt_lengths: np.ndarray  # (N,) int32; 0 for a document
    is_safe: np.ndarray  # (N,) bool
    file_index: np.ndarray  # (N,) int32
    summary: DataSummary


def encode_rows(rows_per_file: Mapping[str, Sequence[Row]], tokenizer: Tokenizer, config: DataConfig) -> EncodedRows:
    """Tokenises rows; the response ends with the template's end of turn and [EOS], a document with [EOS]."""


def collate(encoded: EncodedRows, indices: Sequence[int], eos_id: int, buckets: Sequence[int]) -> Batch:
    """The named rows as one batch, padded as the module says."""


class Loader:
    """Endless batches over encoded rows, by step number. Iterating it starts at step 0."""

    buckets: tuple[int, ...]
    summary: DataSummary
    steps_per_epoch: int  # batches until every row was drawn once (rows / batch_size, rounded up)

    def __init__(self, encoded: EncodedRows, config: DataConfig, eos_id: int, batch_size: int, seed: int,
                 process_index: int = 0, process_count: int = 1): ...

    def batch_at(self, step: int) -> Batch:
        """This host's rows of the batch of a step: rows [index * B / count, (index + 1) * B / count) of the global one."""

    def __iter__(self) -> "BatchIterator": ...


class BatchIterator(Iterator[Batch]):
    """Batches from a step on, prefetched in a thread. The state is JSON: {"step": the step of the next batch}."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, int]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...

    def seek(self, step: int) -> None: ...


def make_loader(data: Sequence[str] | Sequence[Mapping[str, Any]], tokenizer: Tokenizer, config: DataConfig, batch_size: int,
                seed: int, process_index: int = 0, process_count: int = 1) -> Loader:
    """Reads, checks and encodes rows, and serves them as batches.

    Args:
      data: file names (.jsonl, .parquet, or a folder written by a2d_jax.safety_rows), or rows as dicts:
        {"prompt", "response", "is_safe", "category" (optional)} or {"text"}.
      tokenizer: of the model.
      config: see DataConfig.
      batch_size: rows of the global batch, over all hosts; a multiple of process_count.
      seed: of the shuffling; each epoch has its own order.
      process_index, process_count: jax.process_index(), jax.process_count().
    """
