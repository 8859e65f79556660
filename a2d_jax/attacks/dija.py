"""DIJA: the user turn is a template, text interleaved with runs of masks, and the model fills the blanks."""

from collections.abc import Mapping
from typing import Any

from a2d_jax.attacks.base import AttackInput, AttackSettings, template_input, text_of
from a2d_jax.tokenizer import Tokenizer, has_mask_runs


def dija(row: Mapping[str, Any], tokenizer: Tokenizer, settings: AttackSettings) -> AttackInput:
    """Row keys: "Refined_behavior", with `<mask:N>` for N masks; a row without any gets masks as its response."""
    template = text_of(row, "Refined_behavior")
    ids = tokenizer.encode_prompt(template)
    if not has_mask_runs(template):
        if settings.appended_masks == 0:
            raise ValueError(
                f"'Refined_behavior' is a template without masks: {template[:80]!r}; write <mask:N> for N tokens "
                "to fill in, or append masks as a response (appended_masks > 0)"
            )
        ids += [tokenizer.mask_id] * settings.appended_masks
    return template_input(ids, tokenizer)
