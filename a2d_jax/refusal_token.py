"""The token that harmful rows become: [EOS] in the paper, or, for its ablation, a frequent, a rare or a new one.

    choose   a token's text -> its id; a text that is no token yet gets the next id, in a spare row of the embedding
    record   writes the choice into a checkpoint folder: `refusal_token_id` in config.json, and a new token among the
             added tokens of tokenizer_config.json

Decoding, monitors and judges read the id from there (`ModelConfig.refusal_id`, `Tokenizer.refusal_id`).
"""

import json
import os
from typing import Any

from etils import epath

from a2d_jax.config import ModelConfig
from a2d_jax.files import as_path, write_beside, write_json
from a2d_jax.tokenizer import Tokenizer


def choose(text: str | None, tokenizer: Tokenizer, config: ModelConfig) -> int:
    """The id of the token `text`; None: the model's own refusal token.

    Raises:
      ValueError: several tokens, the mask token, or a new token without a spare row in the embedding.
    """
    if text is None:
        return tokenizer.eos_id if config.refusal_token_id is None else config.refusal_token_id
    token_id = tokenizer.hf.get_vocab().get(text)
    if token_id is None:
        ids = tokenizer.encode(text)
        # A word as users write it may have another form in the vocabulary, such as a space in front.
        if len(ids) == 1 and ids[0] != tokenizer.hf.unk_token_id:
            return ids[0]
        if len(ids) > 1 and not (text.startswith("<") and text.endswith(">")):
            raise ValueError(
                f"config.refusal_token={text!r} is {len(ids)} tokens; name one of the vocabulary, or write a new "
                "one in angle brackets, such as '<|refuse|>'."
            )
        if tokenizer.vocab_size >= config.vocab_size:
            raise ValueError(
                f"config.refusal_token={text!r} is new, but all {config.vocab_size} rows of the embedding are taken; "
                "name a token of the vocabulary, or a base whose config.json has spare rows."
            )
        return tokenizer.vocab_size
    if token_id == tokenizer.mask_id:
        raise ValueError(f"config.refusal_token={text!r} is the mask token, which is never written; name another.")
    return token_id


def record(folder: str | os.PathLike, text: str, token_id: int, tokenizer: Tokenizer) -> None:
    """Writes the choice into the folder of a checkpoint's config and tokenizer files, which may lie in an object store.

    Args:
      tokenizer: as before the choice.
    """
    folder = as_path(folder)
    before = (folder / "config.json").read_text(encoding="utf-8")
    config = ModelConfig.from_hf(json.loads(before), before).with_refusal_token(token_id)
    write_beside(folder / "config.json", lambda file: file.write(config.hf_text.encode()))
    if token_id < tokenizer.vocab_size:
        return
    settings = _read(folder / "tokenizer_config.json")
    older = _read(folder / "added_tokens.json")  # what the loader reads where tokenizer_config.json lists none
    added = settings.get("added_tokens_decoder") or {str(i): _added_token(token) for token, i in older.items()}
    settings["added_tokens_decoder"] = added | {str(token_id): _added_token(text)}
    write_json(folder / "tokenizer_config.json", settings)


def _added_token(text: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": text} | flags


def _read(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
