"""Attacks by name, and the prompt files that they read.

An attack is a pure function (row, tokenizer, settings) -> `AttackInput`. A prompt file is a JSON list of rows

    {"BehaviorID": "id", "Behavior": "the plain request", "Refined_behavior": "the attack's text", ...}

where `<mask:N>` stands for N masks; each attack's docstring names the keys that it reads. The CSV files of HarmBench
and XSTest are read as they are published.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from a2d_jax.attacks.ask_again import ask_again
from a2d_jax.attacks.base import AttackInput, AttackSettings
from a2d_jax.attacks.dija import dija, dija_long, dija_short, dija_split
from a2d_jax.attacks.fits import fits, fits_split
from a2d_jax.attacks.from_file import from_file
from a2d_jax.attacks.prefilling import prefilling
from a2d_jax.attacks.prompt_csv import is_xstest_row, read_prompt_csv, xstest_row
from a2d_jax.attacks.zero_shot import zero_shot
from a2d_jax.tokenizer import Tokenizer

Row = Mapping[str, Any]
Attack = Callable[[Row, Tokenizer, AttackSettings], AttackInput]

ATTACKS: dict[str, Attack] = {
    "zero_shot": zero_shot,
    "prefilling": prefilling,
    "dija": dija,
    "fits": fits,
    "ask_again": ask_again,
    "dija_long": dija_long,
    "dija_short": dija_short,
    "dija_split": dija_split,
    "fits_split": fits_split,
    "pair": from_file,
    "renellm": from_file,
    "over_refusal": zero_shot,  # harmless requests, where a refusal is the failure
}

__all__ = ["ATTACKS", "AttackInput", "AttackSettings", "behavior_id", "build_inputs", "get_attack", "read_prompts"]


def get_attack(name: str) -> Attack:
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}; choose one of {sorted(ATTACKS)}")
    return ATTACKS[name]


def behavior_id(row: Row, index: int) -> str:
    """The row's own id ("BehaviorID", or "id" as XSTest has it), else its number in the file."""
    return str(row.get("BehaviorID", row.get("id", index)))


def read_prompts(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a prompt file, JSON or CSV; ValueError that names the place where it is no list of prompts."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"no prompt file {path!r}; give a JSON list of prompt rows, or a CSV")
    if path.lower().endswith(".csv"):
        rows = read_prompt_csv(path)
        if not rows:
            raise ValueError(f"{path} holds no prompt; it must have one row or more")
        return rows
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = json.load(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); give a JSON list of prompt rows, unpacked, in UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: not JSON: {error.msg} at {where}; correct it: one list of prompt rows") from error
    if not isinstance(rows, list) or not rows:
        found = "an empty list" if rows == [] else f"a JSON {type(rows).__name__}"
        raise ValueError(f"{path} holds {found}; it must be a list of one prompt row or more")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: prompt {index} is {row!r}; each must be an object with 'Behavior' and the like")
    # XSTest's rows, written as JSON: its contrast prompts are to be refused there too.
    return [xstest_row(row) if is_xstest_row(row) else row for row in rows]


def build_inputs(
    rows: Sequence[Row], attack: str, tokenizer: Tokenizer, settings: AttackSettings | None = None
) -> list[AttackInput]:
    """The model inputs of all rows; a row that the attack cannot use is named in the error."""
    build, settings = get_attack(attack), settings or AttackSettings()
    inputs = []
    for index, row in enumerate(rows):
        try:
            inputs.append(build(row, tokenizer, settings))
        except ValueError as error:
            raise ValueError(f"prompt {index} ({behavior_id(row, index)}), attack {attack!r}: {error}") from error
    return inputs
