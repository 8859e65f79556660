r"""Program: how deep an alignment goes, KL(aligned || base) along harmful responses.

    python -m a2d_jax.depth --base DIR --aligned rt=DIR,a2d=DIR --rows FILE.jsonl --out DIR \
        --orders left_to_right,confidence,random

For each harmful response the true tokens are written one after the other in a decoding order, and before each is
written both models are asked for it: what stands there already is the same for both. At the position i to be written

    KL_i = sum over tokens v of  p_aligned(v) (log p_aligned(v) - log p_base(v))

A shallow alignment differs from its base in the first tokens and then goes along with it: the curve falls. A2D's stays
(A2D, depth of alignment). The order is that in which the base itself would write: left to right, at random, or the
position of which it is surest; so every aligned model is measured on the same texts with the same gaps.

The curve runs along the tokens in the order in which they are written: its left end is where nothing of the response
stands yet, its right end where all else does. That is position by position where the order is left to right; in other
orders a place near the end may be written early, and means by place mix the two (they are reported too).

KL also depends on how unlikely the base holds a refusal, which differs from place to place. So the total variation
between the two, from 0 to 1, is measured beside it.

    OUT/<model>_<order>.json   KL and place of each token of each response, written as they come
    OUT/results.json           means along the response, and by its quarters; OUT/depth.png, OUT/table.txt
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from a2d_jax import orders
from a2d_jax.batching import DEFAULT_BUCKETS
from a2d_jax.files import local_path, write_json
from a2d_jax.fingerprint import stored_weights
from a2d_jax.folders import hf_folder
from a2d_jax.mesh_flag import define_mesh_flag
from a2d_jax.models.transformer import Transformer
from a2d_jax.plots import plt, save_figure
from a2d_jax.pretrained import load_pretrained
from a2d_jax.progress import clock
from a2d_jax.rows import Row, read_rows
from a2d_jax.sampling import special_ids
from a2d_jax.sharding import make_mesh, mesh_of, under
from a2d_jax.tokenizer import Tokenizer, load_tokenizer

DEPTH_ORDERS = ("left_to_right", "confidence", "random")  # those of the paper; any of `orders.ORDERS` will do
NUM_QUARTERS = 4


class HarmfulText(NamedTuple):
    """A prompt and the harmful response along which depth is measured."""

    prompt: list[int]
    response: list[int]  # without end of turn


def encode_texts(rows: Sequence[Row], tokenizer: Tokenizer, max_response: int) -> list[HarmfulText]:
    """The harmful rows as tokens, responses cut to `max_response`; ValueError where there is none."""
    rows = [row for row in rows if not row.is_safe]
    if not rows:
        raise ValueError("no row has is_safe false; give harmful responses, along which depth is measured")
    ends = {tokenizer.eos_id, tokenizer.eot_id}
    turns = tokenizer.encode_turns([(row.prompt, row.response) for row in rows])
    texts = [(prompt, [token for token in response if token not in ends]) for prompt, response in turns]
    return [HarmfulText(prompt, response[:max_response]) for prompt, response in texts]


def check_vocabulary(base: Tokenizer, aligned: Tokenizer, folder: str) -> None:
    """ValueError where a token of the base is another one for the aligned model; that may have new ones besides."""
    ids = aligned.hf.get_vocab()
    for token, token_id in base.hf.get_vocab().items():
        if ids.get(token) != token_id:
            raise ValueError(
                f"{folder} has another vocabulary than the base: {token!r} is {ids.get(token)} there and {token_id} in "
                "the base, so there is no KL between them; give a model and the base that it was aligned from."
            )


def kl_divergence(logits: jax.Array, base_logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(base_logits)) in nats, float32: (..., V), (..., V) -> (...)."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_probs) * (log_probs - jax.nn.log_softmax(base_logits.astype(jnp.float32))), axis=-1)


def total_variation(logits: jax.Array, base_logits: jax.Array) -> jax.Array:
    """Half the sum of |p - q|, 0 to 1: (..., V), (..., V) -> (...)."""
    probs, base_probs = (jax.nn.softmax(x.astype(jnp.float32)) for x in (logits, base_logits))
    return 0.5 * jnp.sum(jnp.abs(probs - base_probs), axis=-1)


def next_position(
    order: str, logits: jax.Array, positions: jax.Array, is_open: jax.Array, uniforms: jax.Array, mask_id: int
) -> jax.Array:
    """Which of C positions a sampler with these logits writes next, as an index into them, (B,) int32.

    Args:
      logits: (B, C, V) of the positions.
      positions: (B, C) where they stand in the row.
      is_open: (B, C) bool, those not written yet; one at least.
      uniforms: (B, C), for the random order.
    """
    logits = logits.at[..., mask_id].set(-jnp.inf)
    confidence = orders.token_probability(logits, orders.argmax(logits))
    scores = orders.order_scores(order, logits, confidence, positions, uniforms)
    return jnp.argmin(jnp.where(is_open, orders.ranks(scores, is_open), is_open.shape[1]), axis=1)


DISTANCES = {"kl": kl_divergence, "tv": total_variation}


@functools.partial(jax.jit, static_argnames=("graphdefs", "order"))
def _write_token(graphdefs, states, tokens, noisy_tokens, attention_mask, positions, is_open, uniforms, *, order: str):
    """One token of each row: (chosen (B,), `DISTANCES` there (B, 2), noisy tokens after it)."""
    aligned, base = (nnx.merge(graphdef, state) for graphdef, state in zip(graphdefs, states, strict=True))
    row = jnp.arange(len(tokens))[:, None]
    shift = 1 if base.config.shift_logits else 0

    def logits_at(model: Transformer, hidden: jax.Array, places: jax.Array) -> jax.Array:
        return model.logits(jnp.take_along_axis(hidden, (places - shift)[..., None], axis=1))  # (B, C, V)

    hidden = base.hidden_states(noisy_tokens, attention_mask)  # (B, T, D)
    logits = logits_at(base, hidden, positions)
    chosen = next_position(order, logits, positions, is_open, uniforms, base.config.mask_id)  # (B,)
    base_logits = jnp.take_along_axis(logits, chosen[:, None, None], axis=1)  # (B, 1, V)
    place = jnp.take_along_axis(positions, chosen[:, None], axis=1)  # (B, 1)
    aligned_logits = logits_at(aligned, aligned.hidden_states(noisy_tokens, attention_mask), place)
    is_written = jnp.any(is_open, axis=1, keepdims=True)
    written = jnp.where(is_written, jnp.take_along_axis(tokens, place, axis=1), noisy_tokens[row, place])
    distances = jnp.concatenate([distance(aligned_logits, base_logits) for distance in DISTANCES.values()], axis=1)
    return chosen, distances, noisy_tokens.at[row, place].set(written)


def measure(
    aligned: Transformer, base: Transformer, texts: Sequence[HarmfulText], order: str, *,
    batch_size: int = 8, buckets: Sequence[int] = DEFAULT_BUCKETS, seed: int = 0, done: int = 0,
) -> Iterator[list[dict[str, list]]]:  # fmt: skip
    """KL(aligned || base) at each token of each text, when the order comes to it.

    Args:
      order: one of `orders.ORDERS`; confidence, margin and entropy are the base's.
      batch_size: texts measured together.
      seed: of the random order; each text has its own, whatever its company.
      done: texts at the front to leave out.
    Yields:
      Batches of records in the order of the texts: {"kl": of each response position (n,), "tv": total variation
      there, "step": when it was written}.

    Raises:
      ValueError: models of different vocabularies, or an unknown order.
    """
    if order not in orders.ORDERS:
        raise ValueError(f"order={order!r}; choose one of {orders.ORDERS}.")
    if aligned.config.vocab_size != base.config.vocab_size or aligned.config.shift_logits != base.config.shift_logits:
        raise ValueError(
            f"the aligned model ({aligned.config.family}, vocabulary {aligned.config.vocab_size}) and the base "
            f"({base.config.family}, {base.config.vocab_size}) do not share a vocabulary, so there is no KL between "
            "them; give a model and the base that it was aligned from."
        )
    mask_id, eos_id = special_ids(base)
    graphdefs, states = zip(nnx.split(aligned), nnx.split(base), strict=True)
    mesh = mesh_of(base)
    width = max(len(text.response) for text in texts)  # C
    longest = max(len(text.prompt) + len(text.response) for text in texts)
    length = min((bucket for bucket in buckets if bucket >= longest), default=longest)
    for first in range(done, len(texts), batch_size):
        group = texts[first : first + batch_size]
        rows = [*group, *[group[-1]] * (batch_size - len(group))]  # one compiled shape
        tokens = np.full((batch_size, length), eos_id, np.int32)
        starts, sizes = (np.array([len(text[part]) for text in rows]) for part in (0, 1))
        for i, text in enumerate(rows):
            tokens[i, : starts[i] + sizes[i]] = [*text.prompt, *text.response]
        column = np.arange(length)
        attention_mask = column < (starts + sizes)[:, None]
        noisy_tokens = np.where(attention_mask & (column >= starts[:, None]), mask_id, tokens)
        is_open = np.arange(width) < sizes[:, None]  # (B, C)
        positions = np.minimum(starts[:, None] + np.arange(width), length - 1)
        uniforms = np.stack([np.random.default_rng([seed, first + i]).random(width) for i in range(batch_size)])
        values, steps = np.full((*is_open.shape, len(DISTANCES)), np.nan), np.full(is_open.shape, -1)
        for step in range(int(sizes.max())):
            arguments = (tokens, noisy_tokens, attention_mask, positions, is_open, uniforms.astype(np.float32))
            with under(mesh):
                chosen, distances, noisy_tokens = _write_token(graphdefs, states, *arguments, order=order)
            running = np.flatnonzero(is_open.any(axis=1))
            chosen = np.asarray(chosen)[running]
            values[running, chosen], steps[running, chosen] = np.asarray(distances)[running], step
            is_open[running, chosen] = False
        yield [
            {name: np.round(values[i, : sizes[i], k], 6).tolist() for k, name in enumerate(DISTANCES)}
            | {"step": steps[i, : sizes[i]].tolist()}
            for i in range(len(group))
        ]


def summarize(records: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Means over the responses.

    Returns:
      "kl": mean of the first token written, of the second, ...; "kl_quarters": mean within each quarter of every
      response, "kl_last_to_first": the last quarter over the first; "kl_by_place": {"mean", "quarters",
      "last_to_first"} by the place in the response instead; the same of "tv"; "num_tokens": how many responses have so
      many tokens, "num_responses". Responses of fewer than four tokens have no quarters.
    """
    lengths = np.array([len(record["kl"]) for record in records])
    summary: dict[str, Any] = {}
    for name in DISTANCES:
        written = [np.array(record[name])[np.argsort(record["step"])] for record in records]
        along = _means(written)
        summary |= {
            name: along["mean"],
            f"{name}_quarters": along["quarters"],
            f"{name}_last_to_first": along["last_to_first"],
            f"{name}_by_place": _means([record[name] for record in records]),
        }
    num_tokens = np.sum(np.arange(max(lengths)) < lengths[:, None], axis=0).tolist()
    return summary | {"num_tokens": num_tokens, "num_responses": len(records)}


def _means(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The mean of the first numbers of all rows, of the second, ...; of each quarter; the last quarter to the first."""
    longest = max(map(len, rows))
    padded = np.array([[*row, *[np.nan] * (longest - len(row))] for row in rows])
    parts = [np.array_split(row, NUM_QUARTERS) for row in rows if len(row) >= NUM_QUARTERS]
    quarters = [float(np.mean([np.mean(part[i]) for part in parts])) for i in range(NUM_QUARTERS)] if parts else None
    ratio = quarters[-1] / quarters[0] if quarters and quarters[0] > 0 else None
    return {"mean": np.nanmean(padded, axis=0).tolist(), "quarters": quarters, "last_to_first": ratio}


def table(curves: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Means by quarter of the response as it is written, the last over the first, and that by place, as text."""
    quarters = "".join(f"{f'quarter {number}':>12}" for number in range(1, NUM_QUARTERS + 1))
    lines = [f"{'model':10}{'order':16}{'':4}{quarters}{'last/first':>12}{'by place':>12}"]
    for model, of_model in curves.items():
        for order, curve in of_model.items():
            for name in DISTANCES:
                numbers = [*(curve[f"{name}_quarters"] or ()), curve[f"{name}_last_to_first"]]
                numbers.append(curve[f"{name}_by_place"]["last_to_first"])
                cells = "".join(f"{'-' if number is None else format(number, '.3f'):>12}" for number in numbers)
                lines.append(f"{model:10}{order:16}{name:4}{cells}")
    return "\n".join(lines) + "\n"


def plot(curves: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """One panel an order, one line a model: mean KL along the response as it is written."""
    names = list(dict.fromkeys(order for of_model in curves.values() for order in of_model))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), sharey=True, squeeze=False)
    for axis, order in zip(axes[0], names, strict=True):
        for model, of_model in curves.items():
            if order in of_model:
                axis.plot(np.arange(1, len(of_model[order]["kl"]) + 1), of_model[order]["kl"], label=model)
        axis.set_title(order.replace("_", " "))
        axis.set_xlabel("token of the response, as written")
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("KL(aligned || base), nats")
    axes[0, -1].legend(frameon=False)
    save_figure(path, figure, dpi=150)


# -- the program ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """One measurement; the flags of the program describe the fields. `aligned` maps names to checkpoint folders."""

    base: str
    aligned: Mapping[str, str]
    rows: str
    out: str
    orders: tuple[str, ...] = DEPTH_ORDERS
    limit: int = 150
    max_response: int = 128
    batch_size: int = 8
    seed: int = 0
    dtype: str = "bfloat16"
    mesh: tuple[int, ...] | None = None


def run(config: DepthConfig) -> dict[str, Any]:
    """Measures what is not measured yet; writes and returns results.json."""
    out, started = local_path(config.out), time.monotonic()
    unknown = [order for order in config.orders if order not in orders.ORDERS]
    if unknown or not config.orders:
        raise ValueError(f"orders {unknown or 'are none'}; choose from {orders.ORDERS}.")
    tokenizer = load_tokenizer(hf_folder(config.base), requires_mask=True)
    rows = [row for row in read_rows(config.rows).rows if not row.is_safe][: config.limit]
    texts = encode_texts(rows, tokenizer, config.max_response)
    num_tokens = sum(len(text.response) for text in texts)
    print(f"depth of {', '.join(config.aligned)} over {config.base}, orders {', '.join(config.orders)}")
    print(f"{len(texts)} harmful responses of {config.rows} ({num_tokens} tokens), {config.batch_size} at once")
    print(f"writes {out}", flush=True)

    for folder in config.aligned.values():
        check_vocabulary(tokenizer, load_tokenizer(hf_folder(folder)), folder)
    out.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(*config.mesh) if config.mesh else None
    load = functools.partial(load_pretrained, mesh=mesh, dtype=jnp.dtype(config.dtype))
    base, curves = None, {}
    for name, folder in config.aligned.items():
        settings = {
            "base": config.base, "aligned": folder, "weights": [stored_weights(config.base), stored_weights(folder)],
            "max_response": config.max_response, "seed": config.seed,
            "dtype": config.dtype,
            "texts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        }  # fmt: skip
        files = {order: out / f"{name}_{order}.json" for order in config.orders}
        records = {order: _read(path, settings) for order, path in files.items()}
        aligned = None
        for order, measured in records.items():
            if len(measured) < len(texts):
                base = load(config.base) if base is None else base
                aligned = load(folder) if aligned is None else aligned
            batches = () if len(measured) == len(texts) else measure(
                aligned, base, texts, order, batch_size=config.batch_size, seed=config.seed, done=len(measured)
            )  # fmt: skip
            before, begun = len(measured), time.monotonic()
            for batch in batches:
                measured += batch
                write_json(files[order], {"settings": settings, "records": measured})
                rate = (len(measured) - before) / (time.monotonic() - begun)
                eta = clock((len(texts) - len(measured)) / rate)
                print(f"{name}, {order}: {len(measured)}/{len(texts)} responses, {rate:.2f}/s, ETA {eta}", flush=True)
        curves[name] = {order: summarize(measured) for order, measured in records.items()}

    results = {"settings": dataclasses.asdict(config) | {"num_responses": len(texts)}, "models": curves}
    write_json(out / "results.json", results)
    plot(curves, out / "depth.png")
    (out / "table.txt").write_text(table(curves), encoding="utf-8")
    ratios = ", ".join(
        f"{name} {order} {'none' if curve['kl_last_to_first'] is None else format(curve['kl_last_to_first'], '.2f')}"
        for name, of_model in curves.items()
        for order, curve in of_model.items()
    )
    print(f"KL of the last quarter over the first: {ratios}; {time.monotonic() - started:.0f} s -> {out}/results.json")
    return results


def _read(path: Path, settings: Mapping[str, Any]) -> list[dict[str, list]]:
    """Records of an earlier run with the same settings; ValueError where they were others."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in settings if before["settings"].get(key) != settings[key]]
    if changed:
        raise ValueError(f"{path} was measured with another {', '.join(changed)}; give another --out")
    return before["records"]


def named_folders(entries: Sequence[str]) -> dict[str, str]:
    """The folders of --aligned by the name before "=", or by their own; ValueError where two have one name."""
    named = dict(entry.split("=", 1) if "=" in entry else (Path(entry).name, entry) for entry in entries)
    if len(named) < len(entries):
        raise ValueError(f"--aligned={','.join(entries)}: two have one name; write NAME=FOLDER for each.")
    return named


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    given = flags.FLAGS
    run(
        DepthConfig(
            base=given.base,
            aligned=named_folders(given.aligned),
            rows=given.rows,
            out=given.out,
            orders=tuple(given.orders),
            limit=given.limit,
            max_response=given.max_response,
            batch_size=given.batch_size,
            seed=given.seed,
            dtype=given.dtype,
            mesh=given.mesh,
        )  # fmt: skip
    )


if __name__ == "__main__":
    flags.DEFINE_string("base", None, "checkpoint before alignment", required=True)
    flags.DEFINE_list("aligned", None, "checkpoints after it, as name=folder", required=True)
    flags.DEFINE_string("rows", None, "row file; those with is_safe false are the harmful responses", required=True)
    flags.DEFINE_string("out", None, "folder to write", required=True)
    flags.DEFINE_list("orders", list(DEPTH_ORDERS), f"decoding orders, of {', '.join(orders.ORDERS)}")
    flags.DEFINE_integer("limit", 150, "harmful responses, from the start of the file", lower_bound=1)
    flags.DEFINE_integer("max_response", 128, "tokens of a response", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "responses measured together", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the random order")
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "of weights and activations")
    define_mesh_flag()
    app.run(main)
