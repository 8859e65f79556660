"""Prompt rows from the CSV files that HarmBench and XSTest publish.

    HarmBench   Behavior, BehaviorID, ContextString, FunctionalCategory, ...
    XSTest      prompt, type, and id and label (2024), or id_v2 (2023)

Every column is kept. XSTest's rows also get "is_safe": contrast prompts are harmful, and to be refused.
"""

import csv
import os
from collections.abc import Mapping
from typing import Any

HARMBENCH_COLUMNS = ("Behavior", "BehaviorID")
XSTEST_COLUMNS = ("prompt", "type")
XSTEST_LABELS = ("safe", "unsafe")


def read_prompt_csv(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a CSV file; ValueError where its columns are none of the known, or a row is broken."""
    path = os.fspath(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns, rows = reader.fieldnames or [], list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no readable CSV ({error}, line {reader.line_num}); correct the file") from error
    is_xstest = set(XSTEST_COLUMNS) <= set(columns)
    needed = XSTEST_COLUMNS if is_xstest else HARMBENCH_COLUMNS
    if not set(needed) <= set(columns):
        raise ValueError(
            f"{path} has the columns {columns}; it needs {list(HARMBENCH_COLUMNS)} (HarmBench) or "
            f"{list(XSTEST_COLUMNS)} (XSTest). Rename its columns."
        )
    for number, row in enumerate(rows):
        if None in row or None in row.values() or not row[needed[0]].strip():
            raise ValueError(f"{path}: prompt {number} does not fill its columns: {row}; correct the row")
    if not is_xstest:
        return rows
    for number, row in enumerate(rows):
        if row.get("label", "safe") not in XSTEST_LABELS:
            raise ValueError(f"{path}: prompt {number}: the label is {row['label']!r}; XSTest's are {XSTEST_LABELS}")
    return [xstest_row(row) for row in rows]


def is_xstest_row(row: Mapping[str, Any]) -> bool:
    """Whether a row of JSON is XSTest's, and does not say by itself if its prompt is safe."""
    if "is_safe" in row or not all(isinstance(row.get(name), str) for name in XSTEST_COLUMNS):
        return False
    return row.get("label", "safe") in XSTEST_LABELS


def xstest_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of XSTest with "is_safe", and "id" where it has that of 2023."""
    is_safe = row["label"] == "safe" if "label" in row else not row["type"].startswith("contrast_")
    number = {"id": row["id_v2"]} if "id_v2" in row else {}
    return {**number, **row, "is_safe": is_safe}
