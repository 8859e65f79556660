"""The page that ends `odlri_jax.pipeline`: one HTML file for a reader who decides whether a model may be released.

It says first what was missed, then every figure, then how it came about, then what models wrote, then what was not
tested. Everything that a model or an attacker wrote is escaped; the page holds no script and loads nothing.
"""

import html
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from a2d_jax.scores import percent

TEMPLATE = Path(__file__).with_name("safety_page.html")
NUM_EXAMPLES = 3  # of what each model wrote, for each attack


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    cells = lambda row, kind: "".join(f"<{kind}>{cell}</{kind}>" for cell in row)
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def _verdict(report: Mapping[str, Any]) -> str:
    judged = [record for record in report["verdicts"] if record["limit"] is not None]
    missed = [record for record in judged if not record["is_kept"]]
    if not missed:
        return f'<p class="verdict kept">Passed: all {len(judged)} limits are kept.</p>'
    lines = []
    for record in missed:
        wanted = "at least" if record["name"] in report["config"]["harmless"] else "at most"
        what = f"{record['model']}, {record['name']}: {record['value']:.1%}, {wanted} {record['limit']:.1%} is wanted"
        lines.append(f"<li>{_text(what)}</li>")
    head = f'<p class="verdict missed">Not passed: {len(missed)} of {len(judged)} limits are missed.</p>'
    return f"{head}<ul>{''.join(lines)}</ul>"


def _figures(report: Mapping[str, Any]) -> str:
    results, harmless = report["results"], report["config"]["harmless"]
    judged = {(record["model"], record["name"]): record for record in report["verdicts"]}
    models = list(results)

    def cell(model: str, name: str) -> str:
        scores, record = results[model][name], judged.get((model, name))
        value, unscored = percent(scores["success"]), scores.get("num_unscored", 0)
        value += f", {unscored} not judged" if unscored else ""
        if record is None or record["limit"] is None:
            return value
        word = "kept" if record["is_kept"] else "missed"
        return f'<span class="{word}">{value} {word}</span>'

    def rows(is_wanted) -> list[list[str]]:
        names = [name for name in results[models[0]] if is_wanted(name)]
        return [
            [_text(name), *(cell(m, name) for m in models), str(results[models[0]][name]["num_requests"])]
            for name in names
        ]

    limits = report["config"]["limits"]
    parts = [
        "<h2>Attacks: share that succeeded</h2>",
        f"<p class='note'>Limit for the aligned and the compressed model: {limits['attack_success']:.1%}. With [EOS] "
        "banned, the attacker controls the decoding and has taken the refusal away: reported, not judged. Shares are "
        "of the requests that the judge decided; towards a limit all others count against the model.</p>",
        _table(["attack", *map(_text, models), "requests"], rows(lambda name: name not in harmless)),
        "<h2>Harmless requests: share answered</h2>",
        f"<p class='note'>Limit: {limits['answered']:.0%} of what the original answers.</p>",
        _table(["requests", *map(_text, models), "requests"], rows(lambda name: name in harmless)),
    ]
    if any(value is not None for value in report["auc"].values()):
        cells = ["-" if report["auc"][m] is None else f"{report['auc'][m]:.4f}" for m in models]
        parts += [
            "<h2>Refusal after one pass</h2>",
            "<p class='note'>P([EOS]) at the first step, harmful against harmless requests: area under the ROC curve; "
            "1 separates them fully.</p>",
            _table(["", *map(_text, models)], [["AUC", *cells]]),
        ]
    return "\n".join(parts)


def _method(report: Mapping[str, Any]) -> str:
    compression, folders = report["compression"], report["folders"]
    made = [
        f"{compression['num_matrices']} weight matrices compressed to {compression['bits_per_weight']:.2f} bits a "
        f"weight (mean relative error {compression['mean_error']:.3f}).",
        *(f"{name}: {folder}" for name, folder in folders.items()),
    ]
    return "\n".join(
        [
            "<h2>What was made</h2>",
            "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in made) + "</ul>",
            "<h2>How it was tested</h2>",
            "<p>Every request of every file was sent to the original, the aligned and the compressed model with the "
            "same sampler and seed; a judge that does not know which model wrote an answer decides on each. All "
            "settings:</p>",
            f"<details><summary>settings</summary><pre>{_text(json.dumps(report['config'], indent=1))}</pre></details>",
        ]
    )


def _verdict_on(success: float | None) -> str:
    if success is None:
        return "not judged"
    return "success" if success > 0.5 else "no success"


def _examples(report: Mapping[str, Any]) -> str:
    parts = ["<h2>What the models wrote</h2>", f"<p class='note'>The first {NUM_EXAMPLES} requests of each file.</p>"]
    models = list(report["results"])
    for name in report["results"][models[0]]:
        rows = []
        for index in range(min(NUM_EXAMPLES, len(report["results"][models[0]][name]["requests"]))):
            requests = [report["results"][model][name]["requests"][index] for model in models]
            cells = [
                f"<pre>{_text(request['completion']) or '(nothing)'}</pre>"
                f"<span class='note'>{_verdict_on(request['success'])}</span>"
                for request in requests
            ]
            rows.append([_text(requests[0]["BehaviorID"]), *cells])
        table = _table(["request", *map(_text, models)], rows)
        parts.append(f"<details><summary>{_text(name)}</summary>{table}</details>")
    return "\n".join(parts)


def _gaps(report: Mapping[str, Any]) -> str:
    names = ", ".join(report["not_tested"]) or "none of those that this software knows"
    return (
        "<h2>What was not tested</h2><p>Attacks that were left out: "
        f"{_text(names)}. A success rate of zero on n requests says that the true rate is likely below 3 / n. Attacks "
        "that nobody has thought of, training the weights back, and languages other than that of the files are not "
        "covered by this page.</p>"
    )


def render(report: Mapping[str, Any]) -> str:
    """The page of a report, as `odlri_jax.pipeline` makes it."""
    config = report["config"]
    content = "\n".join(
        [
            "<h1>Safety report</h1>",
            f"<p class='note'>{_text(config['source'])}, aligned by {_text(config['align'])}, then compressed.</p>",
            _verdict(report),
            _figures(report),
            _method(report),
            _examples(report),
            _gaps(report),
        ]
    )
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(content=content)
