"""Text, token files or training rows to windows of equal length, and these to batches of one shape.

A text is tokenised whole, without special tokens of our own, and cut into windows that follow one another; what is left
at its end is dropped. A token file is .npy, int32: (N,) is cut in the same way; the rows of (N, T) are windows as they
stand, and ids below zero in them are padding. Training rows (prompt and response, as `a2d_jax.train` reads them) are
padded with [EOS] to the longest of those that are taken; all of that counts as response, which alone is masked.
Training does so too, but to the longest row of a batch: where lengths differ much, more of a window is padding. Where
fewer windows are wanted than there are, calibration takes them at even distances, so that they speak for the whole
text, and as many from each file of rows.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from a2d_jax.data import DataConfig, collate, encode_rows
from a2d_jax.rows import read_rows
from a2d_jax.tokenizer import Tokenizer

DEFAULT_CONTEXT_LENGTH = 2048


def default_context_length(max_length: int | None, num_tokens: int = DEFAULT_CONTEXT_LENGTH) -> int:
    """Tokens of a window where no number is given: 2048, or what the model takes or the text has where that is less."""
    return max(2, min(DEFAULT_CONTEXT_LENGTH, num_tokens, max_length or DEFAULT_CONTEXT_LENGTH))


class Windows(NamedTuple):
    """W windows of T tokens; batches have the same fields, (B, T)."""

    tokens: np.ndarray  # (W, T) int32, 0 where padding
    attention_mask: np.ndarray  # (W, T) bool, False = padding
    is_response: np.ndarray  # (W, T) bool, what LLaDA and Dream may see masked


def cut_windows(tokens: np.ndarray, context_length: int, num_windows: int | None, source: object) -> Windows:
    """The first windows of (N,) tokens, at most `num_windows`; fewer where the tokens end before.

    Raises:
      ValueError: fewer tokens than one window.
    """
    num_available = len(tokens) // context_length
    if num_available == 0:
        raise ValueError(
            f"{source} has {len(tokens)} tokens, fewer than one window of {context_length}; give a longer text or a "
            "smaller --context_length."
        )
    num_taken = min(num_available, num_windows or num_available)
    tokens = np.asarray(tokens[: num_taken * context_length], np.int32).reshape(num_taken, context_length)
    everywhere = np.ones(tokens.shape, bool)
    return Windows(tokens, everywhere, everywhere)


def spread_evenly(windows: Windows, num_windows: int | None) -> Windows:
    """`num_windows` of the windows at even distances; all of them where there are no more."""
    num_available = len(windows.tokens)
    num_taken = min(num_available, num_windows or num_available)
    index = np.arange(num_taken) * num_available // num_taken
    return Windows(*(array[index] for array in windows))


def text_windows(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    context_length: int | None,
    num_windows: int | None,
    max_length: int | None = None,
) -> Windows:
    """Windows of a UTF-8 text file; `max_length`: what the model takes, which bounds them where none is given."""
    tokens = np.array(tokenizer.encode(Path(path).read_text(encoding="utf-8")), np.int32)  # (N,)
    context_length = context_length or default_context_length(max_length, len(tokens))
    return spread_evenly(cut_windows(tokens, context_length, None, path), num_windows)


def token_windows(
    path: str | os.PathLike,
    vocab_size: int,
    context_length: int | None,
    num_windows: int | None,
    max_length: int | None = None,
) -> Windows:
    """Windows of a token file (.npy); `max_length` as in `text_windows`.

    Raises:
      ValueError: a file of another kind, rows of another length than `context_length`, ids beyond the vocabulary.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers ({error}); write the ids with numpy.save.") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        found = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {found}; token ids are int32, (N,) or (N, T).")
    if tokens.ndim == 1:
        windows = cut_windows(tokens, context_length or default_context_length(max_length, len(tokens)), None, path)
    else:
        if tokens.size == 0 or tokens.shape[1] != (context_length or tokens.shape[1]):
            raise ValueError(
                f"{path} has rows of shape {tokens.shape}, the context length is {context_length}; leave "
                "--context_length out, or cut the rows anew."
            )
        ids = np.asarray(tokens, np.int32)
        windows = Windows(np.maximum(ids, 0), ids >= 0, ids >= 0)
    windows = spread_evenly(windows, num_windows)
    if not windows.attention_mask.any():
        raise ValueError(f"{path} holds nothing but padding; give rows with tokens.")
    if windows.tokens.max() >= vocab_size or windows.tokens.min() < 0:
        raise ValueError(
            f"{path} has ids from {windows.tokens.min()} to {windows.tokens.max()}, the model {vocab_size} embedding "
            "rows; tokenise with the checkpoint's own tokenizer."
        )
    return windows


def row_windows(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    context_length: int | None,
    num_windows: int | None,
    max_length: int | None = None,
) -> tuple[Windows, str]:
    """Windows of training rows: prompts as they are, responses and the [EOS] after them to be masked.

    Rows longer than `context_length` are cut as in training, those whose prompt alone is as long are left out. Without
    it, windows are as long as the longest row that is taken, but no longer than 2048 and `max_length`, which the model
    takes.

    Returns:
      The windows, and what was cut, left out and padded, for the plan.
    """
    files = [read_rows(path) for path in paths]
    row_length = context_length or default_context_length(max_length)
    encoded = encode_rows(files, tokenizer, DataConfig(row_length=row_length, on_long_prompt="drop"))
    per_file = -(-num_windows // len(files)) if num_windows else None
    taken = []
    for number in range(len(files)):
        (index,) = np.nonzero(encoded.file_index == number)
        num_taken = min(len(index), per_file or len(index))
        taken.append(index[np.arange(num_taken) * len(index) // max(num_taken, 1)])
    index = np.concatenate(taken)[:num_windows]
    lengths = encoded.lengths[index]
    batch = collate(encoded, index, tokenizer.eos_id, (int(lengths.max()),))
    padding = 1 - lengths.sum() / batch.attention_mask.sum()
    note = f"{encoded.summary.truncation}; {padding:.1%} of the tokens are [EOS] behind shorter rows"
    return Windows(batch.tokens, batch.attention_mask, batch.is_response), note


def batches(windows: Windows, batch_size: int) -> Iterator[Windows]:
    """Batches of `batch_size` windows, in order; the last one is filled up with rows of padding."""
    for start in range(0, len(windows.tokens), batch_size):
        batch = [array[start : start + batch_size] for array in windows]
        num_missing = batch_size - len(batch[0])
        yield Windows(*(np.pad(array, ((0, num_missing), (0, 0))) for array in batch))
