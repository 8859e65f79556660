"""Tokenizer of a Hugging Face checkpoint folder, read from its data files only: no network, no code of the checkpoint.

Reads `tokenizer.json` (LLaDA, LLaMA, Mistral, Qwen2, SmolLM2) or `vocab.json` + `merges.txt` (Dream: Qwen2's
byte-level BPE plus its own special tokens), with `tokenizer_config.json` and `chat_template.jinja`. Special ids come
from `config.json` and those files, never from constants; the end of a turn is read off the rendered chat template.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from jinja2 import TemplateError
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from a2d_jax.config import ModelConfig, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How Qwen2 cuts text before byte-level BPE; vocab.json and merges.txt do not carry it (transformers, Qwen2Tokenizer).
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")
_MASK_RUN = re.compile(r"<mask:([^<>]*)>")
MAX_MASK_RUN = 100_000
# What chat templates find beside the messages. Those of LLaMA 3.2 and Mistral Small 3 print today's date by
# `strftime_now`; prompts, and the fingerprints of rows, must not change at midnight. It is always the day that LLaMA
# 3.1's template prints.
TEMPLATE_VARIABLES = {"strftime_now": datetime.date(2024, 7, 26).strftime}


def check_unicode(text: str) -> None:
    """ValueError for half of a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half, around = text[error.start], text[max(0, error.start - 20) : error.start]
        raise ValueError(
            f"the text has half of a character, {half!r}, behind {around!r}; it was cut there: repair or remove it"
        ) from error


def has_mask_runs(text: str) -> bool:
    """Whether a text holds `<mask:N>`, that is, whether it is a template to fill."""
    return _MASK_RUN.search(text) is not None


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer and its special ids.

    eot_id is the token with which the chat template ends the assistant's turn (None without a template; it may equal
    eos_id). `<mask:N>` in a text stands for N mask ids where a method says so.
    """

    hf: "PreTrainedTokenizerFast"
    eos_id: int
    pad_id: int
    bos_id: int | None
    mask_id: int | None
    eot_id: int | None
    refusal_id: int | None = None  # of a model that refuses by a token of its own instead of [EOS]

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: the fewest embedding rows that a model needs."""
        return max(self.hf.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it is; special tokens written in it are recognised, none are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Like encode, for many texts at once (in parallel threads)."""
        for text in texts:
            check_unicode(text)
        encodings = self.hf.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids, spaces as they are; takes lists and numpy or jax arrays."""
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

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation of {"role", "content"} in the chat template, up to where the next answer starts."""
        return self.encode(self._render(list(messages), add_generation_prompt=True))

    def encode_template(self, text: str) -> list[int]:
        """Ids of a text outside the chat template, each `<mask:N>` as N mask ids; it must hold one at least."""
        if not has_mask_runs(text):
            raise ValueError(f"a template needs masks, but {text[:80]!r} has none; write <mask:N> for N of them")
        return self.encode(self.expand_mask_runs(text))

    def encode_turns(self, turns: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of (user text, response) pairs as the chat template writes them, each as (prompt ids, response ids).

        The two parts are tokenised apart, so that the prompt has the ids that it has when decoding. The response ends
        with the template's end of turn and [EOS] (once, where they are the same token).
        """
        rendered = [self.split_exchange(user, response) for user, response in turns]
        prompts = self.encode_batch([prompt for prompt, _ in rendered])
        responses = self.encode_batch([response for _, response in rendered])
        return [(prompt, self.end_with_eos(response)) for prompt, response in zip(prompts, responses, strict=True)]

    def end_with_eos(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def render_prompt(self, user_text: str) -> str:
        """The chat template's text of one user turn and the start of the assistant's."""
        return self._render([{"role": "user", "content": user_text}], add_generation_prompt=True)

    def render_exchange(self, user_text: str, response: str) -> str:
        """The chat template's text of a user turn and its answer."""
        messages = [{"role": "user", "content": user_text}, {"role": "assistant", "content": response}]
        return self._render(messages, add_generation_prompt=False)

    def split_exchange(self, user_text: str, response: str) -> tuple[str, str]:
        """The same text in two parts: the prompt as decoding has it, and the response with its end of turn."""
        prompt = self.render_prompt(user_text)
        both = self.render_exchange(user_text, response)
        if not both.startswith(prompt):
            raise ValueError(
                f"the chat template writes a finished turn ({both[:200]!r}) that does not begin like its prompt "
                f"({prompt[:200]!r}), so the response cannot be told from it; give a template where the first extends "
                "the second"
            )
        answer = both[len(prompt) :]
        if self.eot_id is not None:
            # Behind the end of turn, templates write a line break or the next header; the response is over there.
            eot = self.hf.convert_ids_to_tokens(self.eot_id)
            answer = answer[: answer.rfind(eot) + len(eot)]
        return prompt, answer

    def expand_mask_runs(self, text: str) -> str:
        """The text with each `<mask:N>` written as N mask tokens."""
        if not has_mask_runs(text):
            return text
        if self.mask_id is None:
            raise ValueError(f"{text[:80]!r} asks for masks, but this model has none; use a masked-diffusion model")
        return _MASK_RUN.sub(self._mask_tokens, text)

    def _mask_tokens(self, match: re.Match) -> str:
        count = match.group(1)
        if not (count.isascii() and count.isdecimal() and int(count) > 0):
            raise ValueError(f"{match.group(0)!r} is no run of masks; write <mask:N> with a number N of 1 or more")
        if len(count) > 6 or int(count) > MAX_MASK_RUN:
            raise ValueError(f"{match.group(0)[:40]!r} is too long a run of masks; N is at most {MAX_MASK_RUN}")
        return self.hf.convert_ids_to_tokens(self.mask_id) * int(count)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if not self.hf.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, so no prompt can be written; add chat_template.jinja (or the key "
                "'chat_template' of tokenizer_config.json) to its folder, as instruction-tuned checkpoints have"
            )
        try:
            return self.hf.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **TEMPLATE_VARIABLES
            )
        except TemplateError as error:
            raise ValueError(f"the chat template renders no user turn with its answer ({error}); correct it") from error


def load_tokenizer(folder: str | os.PathLike, requires_mask: bool | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    If the folder holds a config.json, the ids are checked against it: every id must have an embedding row, and the
    special ids of the config, which go before the tokenizer's own, must be tokens.

    Args:
      folder: a Hugging Face folder; a tokenizer alone (without config.json) will do.
      requires_mask: whether to refuse a tokenizer without a mask token; default: unless config.json is of a causal
        model (LLaMA and the like).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}; give a checkpoint folder on this machine (nothing is downloaded)")
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    hf = _build(folder, settings)
    config = load_config(folder) if (folder / "config.json").is_file() else None
    tokenizer = _with_special_ids(hf, config, folder)
    if requires_mask is None:
        requires_mask = config is None or not config.is_causal
    if requires_mask and tokenizer.mask_id is None:
        raise ValueError(
            f"{folder}: no mask token; a masked-diffusion model names it as mask_token_id in config.json or as "
            "mask_token in tokenizer_config.json. Add it there, or give the folder of a LLaDA or Dream model."
        )
    return tokenizer


def _build(folder: Path, settings: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    # Only here: where PyTorch is installed transformers imports it, which takes about as long as all the rest.
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        backend = _read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _read_qwen2_bpe(folder)
    else:
        raise ValueError(f"{folder}: no tokenizer; it needs tokenizer.json, or vocab.json and merges.txt")
    # A tokenizer.json holds its added tokens already; then this only confirms their ids.
    _add_tokens(backend, _added_tokens(folder, settings), folder)
    names = {name: _text_of(settings[name]) for name in _SPECIAL_NAMES if settings.get(name)}
    for name, token in names.items():
        if backend.token_to_id(token) is None:  # transformers would make up a new id for it
            raise ValueError(
                f"{folder}: wrong vocabulary for the tokenizer: tokenizer_config.json names {name} {token!r}, which is "
                "not in the vocabulary; take both from the same checkpoint"
            )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_chat_template(folder, settings), **names)


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer file ({error}); copy it again from the checkpoint") from error
    backend.no_truncation()  # a file may carry the settings of its last use
    backend.no_padding()
    return backend


def _read_qwen2_bpe(folder: Path) -> tokenizers.Tokenizer:
    try:
        model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{folder}: vocab.json and merges.txt do not fit ({error}); copy both again") from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the BPE vocabulary, by id: from tokenizer_config.json, else from the older added_tokens.json."""
    if settings.get("added_tokens_decoder"):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {
            int(i): AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})
            for i, token in settings["added_tokens_decoder"].items()
        }
    older = _read_json(folder / "added_tokens.json")
    return {i: AddedToken(token, special=True, normalized=False) for token, i in older.items()}


def _add_tokens(backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken], folder: Path) -> None:
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(added.items()):
        if token.content not in known:  # one that the BPE has as a word keeps its id
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise ValueError(
                f"{folder}: wrong vocabulary for the tokenizer: the added token {token.content!r} should have id {i}, "
                f"but the vocabulary gives it {backend.token_to_id(token.content)}; take all tokenizer files from the "
                "same checkpoint"
            )


def _with_special_ids(hf: "PreTrainedTokenizerFast", config: ModelConfig | None, folder: Path) -> Tokenizer:
    vocabulary = hf.get_vocab()
    tokens = {i: token for token, i in vocabulary.items()}
    if config is not None and max(tokens) >= config.vocab_size:
        raise ValueError(
            f"{folder}: wrong vocabulary for the tokenizer: its largest id is {max(tokens)} ({tokens[max(tokens)]!r}), "
            f"but the model has {config.vocab_size} embedding rows (config.json); take the tokenizer of the same "
            "checkpoint"
        )

    def special_id(name: str) -> int | None:
        of_config = None if config is None else getattr(config, f"{name}_id")
        if of_config is not None and of_config not in tokens:
            raise ValueError(
                f"{folder}: wrong vocabulary for the tokenizer: config.json has {name}_token_id {of_config}, but the "
                f"tokenizer's ids end at {max(tokens)}; take the tokenizer of the same checkpoint"
            )
        own = vocabulary.get(getattr(hf, f"{name}_token"))
        if name == "mask" and None not in (own, of_config) and own != of_config:
            raise ValueError(
                f"{folder}: wrong vocabulary for the tokenizer: config.json has mask_token_id {of_config} "
                f"({tokens[of_config]!r}), tokenizer_config.json has mask_token {tokens[own]!r} with id {own}; take "
                "both from the same checkpoint"
            )
        return own if of_config is None else of_config

    mask_id, eos_id, pad_id = special_id("mask"), special_id("eos"), special_id("pad")
    if eos_id is None:
        raise ValueError(f"{folder}: no [EOS]; add eos_token to tokenizer_config.json or eos_token_id to config.json")
    # Qwen2's and Dream's configs repeat another token as bos_token_id; the tokenizer's own goes first.
    bos_id = vocabulary.get(hf.bos_token) if hf.bos_token else special_id("bos")
    tokenizer = Tokenizer(hf, eos_id, eos_id if pad_id is None else pad_id, bos_id, mask_id, eot_id=None)
    if mask_id is not None and mask_id not in hf.added_tokens_decoder:
        raise ValueError(
            f"{folder}: wrong vocabulary for the tokenizer: the mask id {mask_id} is {tokens[mask_id]!r}, which is no "
            "special token there; take config.json and the tokenizer of the same checkpoint"
        )
    return dataclasses.replace(
        tokenizer,
        eot_id=_end_of_turn(tokenizer) if hf.chat_template else None,
        refusal_id=None if config is None else config.refusal_token_id,
    )


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The first special token that the chat template writes behind the assistant's text."""
    special = tokenizer.hf.added_tokens_decoder
    ids = tokenizer.encode(tokenizer.render_exchange("question", "answer").rpartition("answer")[2])
    return next((i for i in ids if i in special and special[i].special), None)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _text_of(token: str | Mapping[str, Any]) -> str:
    """A token as configs write it: its text, or an object with its text."""
    return token if isinstance(token, str) else token["content"]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again from the checkpoint") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; copy it again from the checkpoint")
    return content
