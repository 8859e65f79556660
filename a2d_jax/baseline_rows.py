"""Program: the rows that the baselines learn from, made of the rows of A2D.

    python -m a2d_jax.baseline_rows --rows data/beavertails.jsonl --out data [--refusals FILE.txt]

    OUT/retain.jsonl        SFT: the safe rows as they are
    OUT/refusals.jsonl      refusal training: each prompt with a harmful response, answered with a refusal
    OUT/preferences.jsonl   VRPO: to a harmful response, a safe one to the same prompt is preferred, or else a refusal;
                            a safe response that is no refusal itself is preferred to one

Which refusal a prompt gets depends on the prompt alone.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from absl import app, flags

from a2d_jax.files import local_path, write_beside
from a2d_jax.judges import is_refusal
from a2d_jax.rows import Row, read_rows

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, I cannot assist with this request, because it could lead to harm.",
    "I can't help with that. If there is something safe that I can do for you, please tell me.",
    "Sorry, but I won't provide this. It could hurt you or other people.",
    "I'm not able to help with that request.",
    "I must decline: what you ask for is harmful. I am glad to help with something else.",
)


def refusal_for(prompt: str, refusals: Sequence[str]) -> str:
    """One of the refusals, the same one for the same prompt."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return refusals[int.from_bytes(digest[:8], "big") % len(refusals)]


def baseline_rows(rows: Iterable[Row], refusals: Sequence[str] = REFUSALS) -> dict[str, list[dict]]:
    """Rows of each baseline by file name; ValueError for pairs, or where rows of a kind are missing."""
    rows = list(rows)
    if any(row.is_document or row.rejected is not None for row in rows):
        raise ValueError("some rows are documents or pairs; give rows with 'prompt', 'response' and 'is_safe' alone")
    safe, harmful = [row for row in rows if row.is_safe], [row for row in rows if not row.is_safe]
    if not safe or not harmful:
        raise ValueError(f"{len(safe)} safe and {len(harmful)} harmful rows; give files with both kinds")
    safe_answers: dict[str, str] = {}
    for row in safe:
        safe_answers.setdefault(row.prompt, row.response)

    def pair(row: Row, chosen: str, rejected: str) -> dict:
        return _with_category({"prompt": row.prompt, "chosen": chosen, "rejected": rejected}, row.category)

    preferences = [
        pair(row, safe_answers.get(row.prompt, refusal_for(row.prompt, refusals)), row.response) for row in harmful
    ]
    preferences += [
        pair(row, row.response, refusal_for(row.prompt, refusals)) for row in safe if not is_refusal(row.response)
    ]
    prompts = {row.prompt: row for row in harmful}  # each once
    return {
        "retain": [_row(row, row.response) for row in safe],
        "refusals": [_row(row, refusal_for(row.prompt, refusals)) for row in prompts.values()],
        "preferences": [row for row in preferences if row["chosen"] != row["rejected"]],
    }


def _row(row: Row, response: str) -> dict:
    return _with_category({"prompt": row.prompt, "response": response, "is_safe": True}, row.category)


def _with_category(row: dict, category: Mapping[str, bool] | None) -> dict:
    return row if category is None else row | {"category": dict(category)}


def main(_) -> None:
    given, refusals = flags.FLAGS, REFUSALS
    if given.refusals:
        refusals = tuple(
            filter(None, map(str.strip, Path(given.refusals).read_text(encoding="utf-8-sig").splitlines()))
        )
        if not refusals:
            raise ValueError(f"{given.refusals} is empty; write one refusal a line")
    files = baseline_rows((row for path in given.rows for row in read_rows(path).rows), refusals)
    out = local_path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_beside(out / f"{name}.jsonl", lambda file, text=text: file.write(text.encode()))
    counts = ", ".join(f"{len(rows)} in {name}.jsonl" for name, rows in files.items())
    print(f"rows of the baselines from {', '.join(given.rows)}: {counts} -> {out}")


if __name__ == "__main__":
    flags.DEFINE_list("rows", None, "row files with safe and harmful responses", required=True)
    flags.DEFINE_string("out", None, "folder to write", required=True)
    flags.DEFINE_string("refusals", None, "file with one refusal a line; by default six of our own")
    app.run(main)
