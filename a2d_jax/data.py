"""Rows to training batches: chat template, truncation, mixing, deterministic resumable iteration, bucket padding.

A row becomes tokens once, on the host, when the loader is built; afterwards a batch is index arithmetic and a copy, so
any step can be read at any time: seeking, resuming and splitting over hosts cost nothing.

Padding follows the definition of the loss, whose value depends on the longest row of the batch:
  1. every row is right-padded with [EOS] up to the longest row of the *global* batch, or to `pad_to`; that padding is
     response;
  2. the batch is then padded up to the next bucket length, so that XLA compiles one program per bucket; those columns
     are nothing: `attention_mask` and `is_response` are False there, so the loss is that of the padded rows' length.

Rows with a chosen and a rejected response become pairs of neighbouring rows, drawn and batched together. Their padding
is nothing at all: likelihoods of responses are compared, and a response ends at its own [EOS].
"""

import dataclasses
import hashlib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from a2d_jax.draws import DrawOrder
from a2d_jax.rows import Row, RowFile, parse_row, read_rows
from a2d_jax.tokenizer import Tokenizer

_NUM_EXAMPLES = 5  # rows named in a message or report


class Batch(NamedTuple):
    """One host's rows of a batch; T is one of the loader's buckets."""

    tokens: np.ndarray  # (B, T) int32
    is_response: np.ndarray  # (B, T) bool, may be masked; includes the [EOS] padding up to the longest row
    attention_mask: np.ndarray  # (B, T) bool, False only in the columns added to reach the bucket
    is_safe: np.ndarray  # (B,) bool, False for a harmful row, and for the rejected half of a pair


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What turns rows into batches.

    row_length: the longest row in tokens, prompt included; longer responses are cut there, and counted.
    buckets: batch lengths that occur; the last one must hold row_length. Empty: four even steps up to row_length.
    min_response: tokens of room that the prompt must leave for the response.
    on_long_prompt: "error", or "drop" = leave such rows out, and count them.
    weights: how often rows of each file are drawn, one weight a file. None: every row once an epoch.
    harmful_share: share of harmful rows among those drawn, 0 < share < 1. None: as they come.
    pad_to: every row is padded with [EOS] to this length at least, so that the model learns how a response as long as
        those that it will be asked for ends; 0: to the longest of its batch. Pairs are not padded.
    """

    row_length: int = 128
    buckets: tuple[int, ...] = ()
    min_response: int = 1
    on_long_prompt: str = "error"
    weights: tuple[float, ...] | None = None
    harmful_share: float | None = None
    pad_to: int = 0

    def __post_init__(self) -> None:
        if self.row_length < 1 or self.min_response < 1:
            raise ValueError(f"row_length={self.row_length} and min_response={self.min_response} must be 1 or more")
        if not self.buckets:
            steps = {math.ceil(self.row_length * quarter / 4) for quarter in (1, 2, 3, 4)}
            object.__setattr__(self, "buckets", tuple(sorted(steps)))
        if sorted(set(self.buckets)) != list(self.buckets) or self.buckets[0] < 1 or self.buckets[-1] < self.row_length:
            raise ValueError(
                f"buckets={self.buckets} must grow and end at row_length={self.row_length} or above; e.g. "
                f"({math.ceil(self.row_length / 2)}, {self.row_length})"
            )
        if not 0 <= self.pad_to <= self.buckets[-1]:
            raise ValueError(f"pad_to={self.pad_to} must lie between 0 and the last of buckets={self.buckets}")
        if self.on_long_prompt not in ("error", "drop"):
            raise ValueError(f"on_long_prompt={self.on_long_prompt!r} is not known; use 'error' or 'drop'")
        if self.weights is not None and not all(weight > 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights} must be above 0; leave a file out instead of giving it weight 0")
        if self.harmful_share is not None and not 0 < self.harmful_share < 1:
            raise ValueError(
                f"harmful_share={self.harmful_share} must lie between 0 and 1; use None to take rows as they come"
            )


@dataclasses.dataclass(frozen=True)
class TruncationReport:
    """What did not fit into row_length."""

    num_cut: int  # rows that keep a shorter response or text
    num_tokens_cut: int
    num_dropped: int  # rows left out for a long prompt
    examples: tuple[str, ...]  # where the first of them are: "file:line"

    def __str__(self) -> str:
        if not self.num_cut and not self.num_dropped:
            return "no row cut"
        counts = f"{self.num_cut} rows cut ({self.num_tokens_cut} tokens), {self.num_dropped} dropped for a long prompt"
        return f"{counts}; first: {', '.join(self.examples)}"


@dataclasses.dataclass(frozen=True)
class DataSummary:
    """The data set in numbers, after truncation; `str(summary)` is the paragraph for a training plan."""

    num_rows: int
    num_harmful: int
    num_retain: int  # documents included
    num_documents: int
    num_tokens: int
    num_response_tokens: int
    longest_row: int
    rows_per_file: tuple[tuple[str, int], ...]
    truncation: TruncationReport
    num_pairs: int = 0

    def __str__(self) -> str:
        kinds = f"{self.num_harmful} harmful, {self.num_retain} retain, of which {self.num_documents} documents"
        if self.num_pairs:
            kinds = f"{self.num_pairs} pairs of a chosen and a rejected response"
        tokens = f"{self.num_tokens} tokens ({self.num_response_tokens} response), longest row {self.longest_row}"
        files = "".join(f"\n  {name}: {count} rows" for name, count in self.rows_per_file)
        return f"{self.num_rows} rows: {kinds}\n{tokens}; {self.truncation}{files}"


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """All rows as flat arrays: row i is tokens[offsets[i] : offsets[i + 1]], prompt first."""

    tokens: np.ndarray  # (sum of lengths,) int32
    offsets: np.ndarray  # (N + 1,) int64
    prompt_lengths: np.ndarray  # (N,) int32; 0 for a document
    is_safe: np.ndarray  # (N,) bool
    file_index: np.ndarray  # (N,) int32
    summary: DataSummary
    is_paired: bool = False  # rows 2 i and 2 i + 1 are the chosen and the rejected response of one prompt

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def encode_rows(files: Sequence[RowFile], tokenizer: Tokenizer, config: DataConfig) -> EncodedRows:
    """Tokenises rows; a response ends with the template's end of turn and [EOS], a document with [EOS], unless cut."""
    rows_per_file = [[half for row in file.rows for half in row.responses] for file in files]
    rows = [row for rows in rows_per_file for row in rows]
    num_pairs = sum(row.rejected is not None for file in files for row in file.rows)
    if num_pairs and 2 * num_pairs != len(rows):
        raise ValueError(
            f"{num_pairs} pairs and {len(rows) - 2 * num_pairs} single rows in {[file.name for file in files]}; give "
            "files with pairs alone, or with none"
        )
    encoded = _tokenize(rows, tokenizer)
    _check_no_masks(rows, encoded, tokenizer)

    room = [config.row_length - len(prompt) for prompt, _ in encoded]
    too_long = [i for i in range(len(rows)) if room[i] < config.min_response]
    if too_long and config.on_long_prompt == "error":
        needed = max(len(encoded[i][0]) for i in too_long) + config.min_response
        raise ValueError(
            f"{len(too_long)} prompts are longer than the row: they leave fewer than "
            f"min_response={config.min_response} of row_length={config.row_length} tokens; first: "
            f"{_places(rows, too_long)}. Use row_length={needed}, or on_long_prompt='drop' to leave these rows out"
        )
    dropped = set(too_long)
    kept = [i for i in range(len(rows)) if i not in dropped]
    if not kept:
        raise ValueError(f"none of {len(rows)} rows fits into row_length={config.row_length}; give a longer row_length")
    cut = [i for i in kept if len(encoded[i][1]) > room[i]]

    responses = [encoded[i][1][: room[i]] for i in kept]
    prompts = [encoded[i][0] for i in kept]
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], np.int64)
    is_safe = np.array([rows[i].is_safe for i in kept], bool)
    file_index = np.repeat(np.arange(len(files), dtype=np.int32), [len(rows) for rows in rows_per_file])[kept]
    kept_per_file = np.bincount(file_index, minlength=len(files)).tolist()
    summary = DataSummary(
        num_rows=len(kept),
        num_harmful=int((~is_safe).sum()),
        num_retain=int(is_safe.sum()),
        num_documents=sum(rows[i].is_document for i in kept),
        num_tokens=int(lengths.sum()),
        num_response_tokens=sum(map(len, responses)),
        longest_row=int(lengths.max()),
        rows_per_file=tuple((file.name, count) for file, count in zip(files, kept_per_file, strict=True)),
        truncation=TruncationReport(
            num_cut=len(cut),
            num_tokens_cut=sum(len(encoded[i][1]) - room[i] for i in cut),
            num_dropped=len(dropped),
            examples=tuple(rows[i].where for i in sorted([*cut, *dropped])[:_NUM_EXAMPLES]),
        ),
        num_pairs=len(kept) // 2 if num_pairs else 0,  # both halves have the same prompt: they are dropped together
    )
    return EncodedRows(
        tokens=np.concatenate([np.array(p + r, np.int32) for p, r in zip(prompts, responses, strict=True)]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        is_safe=is_safe,
        file_index=file_index,
        summary=summary,
        is_paired=num_pairs > 0,
    )


def _tokenize(rows: Sequence[Row], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of each row; a document is all response."""
    documents = iter(tokenizer.encode_batch([row.text for row in rows if row.is_document]))
    turns = iter(tokenizer.encode_turns([(row.prompt, row.response) for row in rows if not row.is_document]))
    return [([], tokenizer.end_with_eos(next(documents))) if row.is_document else next(turns) for row in rows]


def _check_no_masks(rows: Sequence[Row], encoded: list[tuple[list[int], list[int]]], tokenizer: Tokenizer) -> None:
    # A mask id in a response would be a position to predict without a target. In a prompt it is what DIJA sends.
    bad = [i for i, (_, response) in enumerate(encoded) if tokenizer.mask_id in response]
    if bad:
        raise ValueError(
            f"{len(bad)} responses or texts hold the mask token itself, which has no target; first: "
            f"{_places(rows, bad)}. Write out what should be learned there, or remove those rows"
        )


def _places(rows: Sequence[Row], indices: Sequence[int]) -> str:
    return ", ".join(rows[i].where for i in indices[:_NUM_EXAMPLES])


def collate(
    encoded: EncodedRows,
    indices: np.ndarray,
    eos_id: int,
    buckets: Sequence[int],
    rows: np.ndarray | None = None,
    pad_to: int = 0,
) -> Batch:
    """One batch of rows, padded as the module says.

    Args:
      encoded: all rows.
      indices: rows of the global batch; they decide its length.
      eos_id: [EOS], the padding.
      buckets: batch lengths, growing.
      rows: which rows of the batch to build (a host's own); None for all.
      pad_to: length that rows are padded to with [EOS] at least.
    """
    lengths = encoded.lengths[indices]
    longest = max(int(lengths.max()), pad_to)
    bucket = next(length for length in buckets if length >= longest)

    if rows is not None:
        indices, lengths = indices[rows], lengths[rows]
    columns = np.arange(bucket)
    is_own = columns < lengths[:, None]  # (B, T)
    tokens = np.full(is_own.shape, eos_id, np.int32)
    tokens[is_own] = np.concatenate([encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]] for i in indices])
    attention_mask = np.broadcast_to(columns < longest, is_own.shape)
    if encoded.is_paired:
        attention_mask = is_own
    is_response = attention_mask & (columns >= encoded.prompt_lengths[indices][:, None])
    return Batch(tokens, is_response, attention_mask.copy(), encoded.is_safe[indices])


def _pools(encoded: EncodedRows, config: DataConfig) -> list[tuple[np.ndarray, float]]:
    """Row numbers to shuffle together, and the share of draws that they get."""
    names = [name for name, _ in encoded.summary.rows_per_file]
    if config.weights is not None and len(config.weights) != len(names):
        raise ValueError(
            f"{len(config.weights)} weights {config.weights} for {len(names)} files {names}; give one a file"
        )
    kinds = [(np.ones_like(encoded.is_safe), 1.0)]
    if encoded.is_paired:  # a pair is drawn by its first row
        kinds = [(encoded.is_safe, 1.0)]
    if config.harmful_share is not None and encoded.is_paired:
        raise ValueError(f"harmful_share={config.harmful_share}, but the rows of {names} are pairs; set it to None")
    if config.harmful_share is not None:
        kinds = [(~encoded.is_safe, config.harmful_share), (encoded.is_safe, 1 - config.harmful_share)]
        if encoded.is_safe.all() or not encoded.is_safe.any():
            raise ValueError(
                f"harmful_share={config.harmful_share} needs harmful and retain rows, but there are "
                f"{encoded.summary.num_harmful} harmful and {encoded.summary.num_retain} retain ones in {names}; add "
                "rows or set harmful_share to None"
            )
    if config.weights is None:
        return [(np.flatnonzero(is_kind), share) for is_kind, share in kinds]

    for index, (name, count) in enumerate(encoded.summary.rows_per_file):
        if not count:
            raise ValueError(f"{name} has weight {config.weights[index]}, but no row of it fits; leave the file out")
    pools = []
    for is_kind, share in kinds:
        cells = [(np.flatnonzero(is_kind & (encoded.file_index == i)), w) for i, w in enumerate(config.weights)]
        cells = [(rows, weight) for rows, weight in cells if len(rows)]
        total = sum(weight for _, weight in cells)
        pools += [(rows, share * weight / total) for rows, weight in cells]
    return pools


class Loader:
    """Endless batches over encoded rows, by step number. Iterating it starts at step 0.

    Each pool of rows (a file, where files have weights; harmful and retain rows, where their share is set; else all
    rows) is passed through whole, in a new order each epoch. Batches run across the ends of epochs: no row is left
    over.

    Attributes:
      buckets: the batch lengths that can occur.
      is_paired: whether rows are pairs; the batch size counts both halves.
      encoded: the rows as tokens.
      summary: the data in numbers.
      steps_per_epoch: rows / global batch, rounded up.
      fingerprint: of rows, configuration, batch size and seed; two loaders with the same one give the same batches.
    """

    def __init__(
        self, encoded: EncodedRows, config: DataConfig, eos_id: int, batch_size: int, seed: int,
        own_rows: np.ndarray | None = None,
    ):  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; a batch has at least 1 row")
        rows_a_draw = 2 if encoded.is_paired else 1
        if batch_size % rows_a_draw:
            raise ValueError(f"batch_size={batch_size}: a pair takes two rows; use an even number")
        self.buckets = tuple(config.buckets)
        self.encoded = encoded
        self.summary = encoded.summary
        self.is_paired = encoded.is_paired
        self.steps_per_epoch = math.ceil(encoded.summary.num_rows / batch_size)
        self.fingerprint = _fingerprint(encoded, config, eos_id, batch_size, seed)

        order = DrawOrder(_pools(encoded, config), batch_size // rows_a_draw, seed)
        self._batches = grain.MapDataset.source(order).map(
            lambda drawn: collate(
                encoded,
                np.ravel(drawn[:, None] + np.arange(rows_a_draw)),
                eos_id,
                config.buckets,
                own_rows,
                config.pad_to,
            )
        )

    def batch_at(self, step: int) -> Batch:
        """This host's rows of a step's batch."""
        return self._batches[operator.index(step)]

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._batches, self.fingerprint)


class BatchIterator(Iterator[Batch]):
    """Batches from a step on, made ahead in a thread.

    Its state is JSON: the step of the next batch, and a fingerprint of data, configuration, batch size and seed, so
    that a run is not resumed on other data unnoticed. It is the same on every host.
    """

    def __init__(self, batches: grain.MapDataset, fingerprint: str):
        self._fingerprint = fingerprint
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {"step": self._iterator.get_state()["next_index"], "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where get_state was called; ValueError if the data, configuration, batch size or seed are others."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the data at step {state['step']} were others: fingerprint {state['fingerprint']}, now "
                f"{self._fingerprint}. Resume with the row files, data configuration, batch size and seed of the first "
                "run, or start in a new folder"
            )
        self.seek(state["step"])

    def seek(self, step: int) -> None:
        """Makes `step` the next batch, at no cost."""
        self._iterator.set_state({"next_index": operator.index(step)})


def _fingerprint(encoded: EncodedRows, config: DataConfig, eos_id: int, batch_size: int, seed: int) -> str:
    digest = hashlib.sha256(repr((config, eos_id, batch_size, seed)).encode())
    for array in (encoded.tokens, encoded.offsets, encoded.prompt_lengths, encoded.is_safe, encoded.file_index):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def make_loader(
    data: Sequence[str] | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    config: DataConfig,
    batch_size: int,
    seed: int,
    own_rows: np.ndarray | None = None,
) -> Loader:
    """Reads, checks and encodes rows, and serves them as batches.

    Args:
      data: file names (.jsonl, .parquet, or a folder written by a2d_jax.safety_rows), or rows as dicts:
        {"prompt", "response", "is_safe", "category" (optional)}, {"text"}, or {"prompt", "chosen", "rejected"}.
      tokenizer: of the model.
      config: see DataConfig.
      batch_size: rows of the global batch, over all hosts.
      seed: of the shuffling; each epoch has its own order.
      own_rows: which rows of each batch this host builds (`distributed.own_rows`); None: all.
    """
    if isinstance(data, str) or not data:
        raise ValueError(f"no rows: data={data!r}; give a list of row files, or a list of rows")
    if isinstance(data[0], Mapping):
        files = [RowFile("rows", tuple(parse_row(raw, f"rows[{i}]") for i, raw in enumerate(data)))]
    else:
        files = [read_rows(path) for path in data]
    encoded = encode_rows(files, tokenizer, config)
    return Loader(encoded, config, tokenizer.eos_id, batch_size, seed, own_rows)
