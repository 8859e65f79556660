"""Training rows from JSON lines, Parquet or a prepared TFDS folder, checked against the schema.

A row is BeaverTails' {"prompt": str, "response": str, "is_safe": bool, "category": {name: bool} (optional)}, a plain
document {"text": str}, or a pair to prefer by, {"prompt": str, "chosen": str, "rejected": str}. Other keys are ignored.
Errors name the file and the line (or row) and what to do.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from a2d_jax.tokenizer import check_unicode


@dataclasses.dataclass(frozen=True)
class Row:
    """One training row: a prompt with its response, a document (only `text` is set), or a pair (`rejected` is set).

    is_safe False marks a harmful response, whose masked positions are to become [EOS]; documents are safe.
    """

    where: str  # "file:line", for messages
    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    is_safe: bool = True
    category: Mapping[str, bool] | None = None
    rejected: str | None = None  # the response that `response` is preferred to

    @property
    def is_document(self) -> bool:
        return self.text is not None

    @property
    def responses(self) -> tuple["Row", ...]:
        """The row itself; of a pair, its two halves: the chosen response, and the rejected one as a harmful row."""
        if self.rejected is None:
            return (self,)
        chosen = dataclasses.replace(self, rejected=None)
        return chosen, dataclasses.replace(chosen, response=self.rejected, is_safe=False)


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The rows of one source, in its order."""

    name: str
    rows: tuple[Row, ...]


def parse_row(raw: Any, where: str) -> Row:
    """Checks one row as read from a file; ValueError says where it is and what is wrong."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: a row must be an object with keys, not {type(raw).__name__}")
    raw = {key: value for key, value in raw.items() if value is not None}  # Parquet has null where JSON has no key
    for key in {"prompt", "response", "text", "chosen", "rejected"} & raw.keys():
        if isinstance(raw[key], str):
            try:
                check_unicode(raw[key])
            except ValueError as error:
                raise ValueError(f"{where}: {key!r}: {error}") from error
    if "text" in raw:
        return _parse_document(raw, where)
    if "chosen" in raw or "rejected" in raw:
        return _parse_pair(raw, where)
    missing = [key for key in ("prompt", "response", "is_safe") if key not in raw]
    if missing:
        raise ValueError(
            f"{where}: missing key {', '.join(map(repr, missing))} (given: {sorted(raw)}); a row needs 'prompt', "
            "'response' and 'is_safe', or is a document with 'text', or a pair with 'prompt', 'chosen' and 'rejected'"
        )
    for key, kind in (("prompt", str), ("response", str), ("is_safe", bool)):
        if not isinstance(raw[key], kind):
            raise _wrong_type(raw, key, kind, where)
    if not raw["response"].strip():
        raise ValueError(f"{where}: the response is empty, so there is nothing to learn; write one or remove the row")
    return Row(where, raw["prompt"], raw["response"], is_safe=raw["is_safe"], category=_parse_category(raw, where))


def _parse_document(raw: Mapping[str, Any], where: str) -> Row:
    both = [key for key in ("prompt", "response") if key in raw]
    if both:
        raise ValueError(f"{where}: has 'text' and {both}; a row is either a document or a prompt with its response")
    if not isinstance(raw["text"], str):
        raise _wrong_type(raw, "text", str, where)
    if not raw["text"].strip():
        raise ValueError(f"{where}: the text is empty, so there is nothing to learn; write one or remove the row")
    if raw.get("is_safe", True) is not True:
        raise ValueError(f"{where}: is_safe is {raw['is_safe']!r} in a document; give 'prompt' and 'response' instead")
    return Row(where, text=raw["text"])


def _parse_pair(raw: Mapping[str, Any], where: str) -> Row:
    keys = ("prompt", "chosen", "rejected")
    missing = [key for key in keys if key not in raw]
    if missing:
        raise ValueError(
            f"{where}: a pair lacks {', '.join(map(repr, missing))} (given: {sorted(raw)}); it needs {keys}"
        )
    for key in keys:
        if not isinstance(raw[key], str):
            raise _wrong_type(raw, key, str, where)
    if not raw["chosen"].strip() or not raw["rejected"].strip() or raw["chosen"] == raw["rejected"]:
        raise ValueError(f"{where}: 'chosen' and 'rejected' must be two different texts; correct or remove the pair")
    return Row(where, raw["prompt"], raw["chosen"], category=_parse_category(raw, where), rejected=raw["rejected"])


def _wrong_type(raw: Mapping[str, Any], key: str, kind: type, where: str) -> ValueError:
    given = f"{type(raw[key]).__name__} ({raw[key]!r})"
    return ValueError(f"{where}: {key!r} must be a {kind.__name__}, not {given}; correct the row")


def _parse_category(raw: Mapping[str, Any], where: str) -> Mapping[str, bool] | None:
    category = raw.get("category")
    if isinstance(category, Mapping):  # in Parquet every row has all names, with null for those that it lacks
        category = {name: value for name, value in category.items() if value is not None} or None
    if category is None:
        return None
    if not isinstance(category, Mapping) or not all(isinstance(value, bool) for value in category.values()):
        raise ValueError(f"{where}: 'category' must map names to true or false, not {category!r}; or leave it out")
    return category


def read_rows(path: str | os.PathLike) -> RowFile:
    """All rows of a .jsonl file, a .parquet file, or a folder that a2d_jax.safety_rows wrote."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raw_rows = _read_tfds_folder(path)
    elif not os.path.isfile(path):
        raise ValueError(f"no rows at {path!r}; give a .jsonl or .parquet file or a folder of a2d_jax.safety_rows")
    elif path.endswith(".jsonl"):
        raw_rows = _read_json_lines(path)
    elif path.endswith(".parquet"):
        raw_rows = _read_parquet(path)
    else:
        raise ValueError(f"unknown format of {path!r}; give .jsonl (one JSON object a line) or .parquet")
    rows = tuple(parse_row(raw, where) for raw, where in raw_rows)
    if not rows:
        raise ValueError(f"{path}: holds no rows; give a file with one at least")
    return RowFile(path, rows)


def _read_json_lines(path: str) -> Iterator[tuple[Any, str]]:
    with open(path, "rb") as file:  # bytes, so that a line of broken UTF-8 can be named too
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # A byte order mark, as some editors write it, is no part of the first row.
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), f"{path}:{number}"
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
                raise ValueError(f"{path}:{number}: not a line of JSON ({error}); correct or remove it") from error


def _read_parquet(path: str) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for raw in batch.to_pylist():
                    yield raw, f"{path}: row {number}"
                    number += 1
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}); write it again from its source") from error


def _read_tfds_folder(path: str) -> Iterator[tuple[Any, str]]:
    import tensorflow_datasets as tfds  # takes seconds, and most rows come from files

    if not os.path.isfile(os.path.join(path, "dataset_info.json")):
        raise ValueError(f"{path!r} is no prepared data set; give the folder a2d_jax.safety_rows printed")
    source = tfds.builder_from_directory(path).as_data_source("train")
    for number in range(len(source)):
        yield _from_example(source[number]), f"{path}: row {number}"


def _from_example(example: dict[str, Any]) -> dict[str, Any]:
    """The row that `safety_rows` stored as this example."""
    if example["is_document"]:
        return {"text": example["text"].decode("utf-8")}
    names, values = example["category"]["name"], example["category"]["value"]
    category = {name.decode("utf-8"): bool(value) for name, value in zip(names, values, strict=True)}
    row = {key: example[key].decode("utf-8") for key in ("prompt", "response")}
    if rejected := example.get("rejected", b"").decode("utf-8"):
        return {"prompt": row["prompt"], "chosen": row["response"], "rejected": rejected, "category": category or None}
    return row | {"is_safe": bool(example["is_safe"]), "category": category or None}
