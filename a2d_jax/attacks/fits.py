"""FITS (fill in the sentence): one sentence of a harmful text is masked, and the model writes it from the rest."""

import re
from collections.abc import Mapping
from typing import Any

from a2d_jax.attacks.base import AttackInput, AttackSettings, template_ids, template_input, text_of
from a2d_jax.attacks.templates import split_runs
from a2d_jax.tokenizer import Tokenizer, has_mask_runs

_SENTENCE = re.compile(r"\S.*?[.!?]+(?=\s|$)|\S.*$", re.DOTALL)


def fits(row: Mapping[str, Any], tokenizer: Tokenizer, settings: AttackSettings) -> AttackInput:
    """Row keys: "text" (template files call it "Refined_behavior") with `<mask:N>`, or with "sentence", the index, from
    0, of the sentence to mask.

    In the response turn the row's "Behavior" is the request that the text answers.
    """
    return template_input(template_ids(row, _template_of(row, tokenizer), tokenizer, settings), tokenizer)


def fits_split(row: Mapping[str, Any], tokenizer: Tokenizer, settings: AttackSettings) -> AttackInput:
    """Row keys as of FITS; the masked sentence is split over two blanks, `settings.split_joiner` between."""
    template = split_runs(_template_of(row, tokenizer), settings.split_joiner)
    return template_input(template_ids(row, template, tokenizer, settings), tokenizer)


def _template_of(row: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    text = text_of(row, "text", "Refined_behavior")
    if "sentence" in row:
        text = mask_sentence(text, row["sentence"], tokenizer)
    if not has_mask_runs(text):
        raise ValueError(
            f"the text is a template without masks: {text[:80]!r}; write <mask:N> for N tokens to fill in, or name "
            "the sentence to mask by the key 'sentence'"
        )
    return text


def mask_sentence(text: str, index: int, tokenizer: Tokenizer) -> str:
    """`text` with sentence number `index` replaced by as many masks as it has tokens.

    The white space before the sentence goes with it: byte-level vocabularies hold it in the sentence's first token.
    """
    sentences = list(_SENTENCE.finditer(text))
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(sentences):
        raise ValueError(
            f"'sentence' is {index!r}; the text has {len(sentences)} sentences: give 0 to {len(sentences) - 1}"
        )
    start = sentences[index - 1].end() if index else 0
    end = sentences[index].end()
    return text[:start] + f"<mask:{len(tokenizer.encode(text[start:end]))}>" + text[end:]
