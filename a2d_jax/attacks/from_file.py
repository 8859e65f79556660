"""Prompts that an attacker rewrote beforehand (PAIR, ReNeLLM), read from the file and put as the user turn."""

from collections.abc import Mapping
from typing import Any

from a2d_jax.attacks.base import AttackInput, AttackSettings, response_input, text_of
from a2d_jax.tokenizer import Tokenizer


def from_file(row: Mapping[str, Any], tokenizer: Tokenizer, settings: AttackSettings) -> AttackInput:
    """Row keys: "Refined_behavior", the rewritten prompt."""
    prompt = tokenizer.encode_prompt(text_of(row, "Refined_behavior"))
    return response_input(prompt, tokenizer, settings.gen_length)
