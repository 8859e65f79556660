"""Tokenizer of a Hugging Face checkpoint folder, read from its data files only: no network, no code of the checkpoint.

Reads `tokenizer.json` (LLaDA, LLaMA, Mistral, Qwen2, SmolLM2) or `vocab.json` + `merges.txt` (Dream: Qwen2's byte-level BPE
plus its own special tokens), with `tokenizer_config.json` and `chat_template.jinja`. Special ids come from `config.json` and
those files, never from constants; the end of a turn is read off the rendered chat template.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# How Qwen2 cuts text before byte-level BPE; vocab.json and merges.txt do not carry it (transformers, Qwen2Tokenizer).
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")
_MASK_RUN = re.compile(r"<mask:([^<>]*)>")


def has_mask_runs(text: str) -> bool:
    """Whether a text holds `<mask:N>`, so that it is a template to fill."""
    return _MASK_RUN.search(text) is not None


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer and its special ids.

    eot_id is the token with which the chat template ends the assistant's turn (None without a template; it may equal eos_id).
    `<mask:N>` in a text stands for N mask ids where a method says so.
    """

    hf: PreTrainedTokenizerFast
    eos_id: int
    pad_id: int
    bos_id: int | None
    mask_id: int | None
    eot_id: int | None

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: the fewest embedding rows that a model needs."""
        return max(self.hf.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it is; special tokens written in it are recognised, none are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Like encode, for many texts at once (in parallel threads)."""
        return [encoding.ids for encoding in self.hf.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids, spaces as they are; accepts numpy and jax arrays."""
        ids = [int(i) for i in ids]
        return self.hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def encode_prompt(self, user_text: str, response_start: str = "") -> list[int]:
        """Ids of a user turn in the chat template, up to where the assistant's response starts.

        Args:
          user_text: the user's message; each `<mask:N>` becomes N mask ids.
          response_start: text with which the response begins (prefilling); `<mask:N>` works there too.
        """
        ids = self.encode(self.expand_mask_runs(self.render_prompt(user_text)))
        return ids + self.encode(self.expand_mask_runs(response_start)) if response_start else ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of a text outside the chat template, each `<mask:N>` as N mask ids; it must hold one at least."""
        if not has_mask_runs(text):
            raise ValueError(f"a template needs masks to fill, but {text[:80]!r} has none; write <mask:N> for N of them")
        return self.encode(self.expand_mask_runs(text))

    def encode_turns(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of (prompt, response) pairs as the chat template writes them.

        The two parts are tokenised apart, so that the prompt has the ids it has when decoding. The response ends with the
        template's end of turn and [EOS] (once, where they are the same token). A response that the template leaves empty gives [].
        """

    def render_prompt(self, user_text: str) -> str:
        """The chat template's text for one user turn and the start of the assistant's."""

    def expand_mask_runs(self, text: str) -> str:
        """Writes each `<mask:N>` as N mask tokens."""


def load_tokenizer(folder: str | os.PathLike, requires_mask: bool = True) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    If the folder holds a config.json, ids are checked against it: every id must have an embedding row, and the special ids of
    the config must be tokens. With requires_mask=False a model without a mask token (LLaMA and the like) is accepted.
    """
