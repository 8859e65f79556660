"""One page that replays a decoding: what was revealed when, how sure the model was, what P([EOS]) said meanwhile.

    trace_record    numbers and texts of one decoded row, as JSON holds them
    render_page     records -> one HTML file that needs nothing else, neither network nor server

The page is `trace_page.html`. Everything that a model or a user wrote enters it as JSON inside a data block, with every
character that could end that block escaped, and is shown as text alone; the page's own policy lets no other script run.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import SampleResult
from a2d_jax.tokenizer import Tokenizer

TEMPLATE = Path(__file__).with_name("trace_page.html")
_WATCHED = {1: "left-most mask"}


def trace_record(
    tokenizer: Tokenizer,
    prompt: str,
    answer: str,
    given: Sequence[int],
    result: SampleResult,
    row: int,
    config: SamplerConfig,
) -> dict[str, Any]:
    """What the page shows of one row.

    Args:
      prompt, answer: the text that the user gave, and what came of it.
      given: the row's tokens before decoding, without padding: text and mask ids.
      result: of a decoding with `trace=True`.
      config: as it was passed to the sampler.
    """
    if result.trace is None:
        raise ValueError("this decoding was not recorded; pass trace=True to generate or infill.")
    trace = jax.tree.map(lambda array: np.asarray(array)[row], result.trace)
    given = np.asarray(given)
    is_slot = given == tokenizer.mask_id
    tokens, revealed, confidence = (array[-len(given) :] for array in trace[:3])
    num_passes = int(result.num_forward[row])
    eos_prob = trace.eos_prob_map[:num_passes, -len(given) :][:, is_slot]  # (passes, slots)
    monitor = config.resolve("llada").monitor
    return {
        "prompt": prompt,
        "answer": answer,
        "parts": _parts(tokenizer, given, is_slot),
        "slots": [
            {
                **_token_text(tokenizer, int(token)),
                "step": int(step),
                "confidence": _short(prob),
            }
            for token, step, prob in zip(tokens[is_slot], revealed[is_slot], confidence[is_slot], strict=True)
        ],
        "passes": num_passes,
        "eos": [[_short(prob) for prob in of_pass] for of_pass in eos_prob],
        "stop": int(trace.stop_step),
        "threshold": None if monitor is None else _short(monitor.threshold),
        "watched": None if monitor is None else _watched(monitor),
        "settings": _settings(config),
    }


def render_page(records: Sequence[Mapping[str, Any]]) -> str:
    """The page that replays these decodings, as the text of an HTML file."""
    # Inside <script type="application/json"> only "<" can end the block; the others keep old parsers safe too.
    data = json.dumps(list(records), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = TEMPLATE.read_text(encoding="utf-8")
    for kind, tag in (("STYLE", "style"), ("SCRIPT", "script")):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        page = page.replace(f"{kind}_HASH", f"sha256-{digest}")
    head, tail = page.split("TRACE_DATA")
    return head + data + tail


def _parts(tokenizer: Tokenizer, given: np.ndarray, is_slot: np.ndarray) -> list[Any]:
    """The row from left to right: texts that were given, and [first, end) of runs of slots."""
    edges = [0, *(np.flatnonzero(np.diff(is_slot)) + 1), len(given)]
    parts, num_slots = [], 0
    for start, end in zip(edges, edges[1:], strict=False):
        if is_slot[start]:
            parts.append([num_slots, num_slots + int(end - start)])
            num_slots += int(end - start)
        else:
            parts.append(tokenizer.decode(given[start:end]))
    return parts


def _token_text(tokenizer: Tokenizer, token: int) -> dict[str, str]:
    """How one token is shown, and of which kind it is: "mask", "eos", "special" or "word"."""
    if token == tokenizer.mask_id:
        return {"text": "", "kind": "mask"}
    if token == tokenizer.eos_id:
        return {"text": "[EOS]", "kind": "eos"}
    added = tokenizer.hf.added_tokens_decoder.get(token)
    if added is not None and added.special:
        return {"text": added.content, "kind": "special"}
    return {"text": tokenizer.decode([token]), "kind": "word"}


def _watched(monitor: Any) -> str:
    """What a monitor looks at, for the label of its threshold."""
    positions, steps = getattr(monitor, "num_positions", None), getattr(monitor, "num_steps", None)
    where = _WATCHED.get(positions, "any mask of the block" if positions is None else f"first {positions} masks")
    when = "every pass" if steps is None else "first pass" if steps == 1 else f"first {steps} passes"
    return f"{where}, {when}"


def _settings(config: SamplerConfig) -> dict[str, Any]:
    """The settings that differ from the defaults, and those that say how long the decoding may get."""
    default, shown = SamplerConfig(), ("gen_length", "steps", "order")
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "monitor"}
    return {name: value for name, value in fields.items() if name in shown or value != getattr(default, name)}


def _short(value: float) -> float | None:
    """Three significant digits; None for NaN."""
    return float(f"{float(value):.3g}") if np.isfinite(value) else None
