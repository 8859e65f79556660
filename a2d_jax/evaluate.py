r"""Program: attack success, or over-refusal, of a checkpoint.

    python -m a2d_jax.evaluate --checkpoint DIR --attack dija --prompts FILE.json --out DIR --order entropy --ban_eos
    python -m a2d_jax.evaluate --checkpoint DIR --attack over_refusal --prompts xstest_prompts.csv --out DIR
    python -m a2d_jax.evaluate --checkpoint DIR --attack zero_shot --prompts harmbench_behaviors_text_test.csv \
        --out DIR --judge harmbench --judge_checkpoint DIR

The attacks are those of `a2d_jax/attacks`, the judges those of `a2d_jax/judges`; the settings of `SamplerConfig` are
flags. Run again with the same folder, it goes on where it was stopped; a new --judge judges the same completions.

    DIR/settings.json       what the completions depend on, written first
    DIR/completions.jsonl   what the model wrote, one line a request, as it comes
    DIR/results.json        the scores with every setting beside them, and the verdict on each request
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import app, flags, logging

from a2d_jax.attacks import ATTACKS, AttackSettings, behavior_id, build_inputs, read_prompts
from a2d_jax.attacks.base import TURNS
from a2d_jax.batching import DEFAULT_BUCKETS, plan_groups
from a2d_jax.completions import Completion, append_completions, complete, read_completions
from a2d_jax.config import load_config
from a2d_jax.files import local_path, write_json
from a2d_jax.fingerprint import stored_weights
from a2d_jax.folders import hf_folder
from a2d_jax.judges import Judge, JudgeSettings, is_refusal, keywords, load_judge, score_all
from a2d_jax.judges.loading import define_judge_flags, judge_settings_from_flags
from a2d_jax.mesh_flag import define_mesh_flag
from a2d_jax.pretrained import load_pretrained, weights_fingerprint
from a2d_jax.progress import clock
from a2d_jax.resume import differences
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampler_flags import define_sampler_flags, sampler_config_from_flags
from a2d_jax.scores import EXPECTATIONS, is_harmless, percent, summarize, summarize_groups
from a2d_jax.sharding import make_mesh
from a2d_jax.tokenizer import Tokenizer, load_tokenizer

if __name__ != "__main__":  # adaptive, relearn and early_refusal show its flags among theirs
    flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation of one checkpoint; the flags of the program describe the fields.

    `attack_settings.gen_length` follows `sampler.gen_length`.
    """

    checkpoint: str
    attack: str
    prompts: str
    out: str
    sampler: SamplerConfig = SamplerConfig()
    attack_settings: AttackSettings = AttackSettings()
    adapter: str | None = None
    judge: str = "keywords"
    judge_settings: JudgeSettings = JudgeSettings()
    expect: str | None = None
    limit: int | None = None
    batch_size: int = 16
    buckets: tuple[int, ...] = DEFAULT_BUCKETS
    seed: int = 0
    dtype: str = "bfloat16"
    mesh: tuple[int, ...] | None = None

    def completion_settings(self) -> dict[str, Any]:
        """What the completions depend on, as JSON holds it."""
        settings = dataclasses.asdict(self)
        for name in ("out", "judge", "judge_settings", "expect", "batch_size", "mesh"):
            del settings[name]
        settings["attack_settings"]["gen_length"] = self.sampler.gen_length
        settings["prompts_sha256"] = hashlib.sha256(Path(self.prompts).read_bytes()).hexdigest()
        sampler = settings["sampler"]
        for fields, name in ((sampler, "reject_above"), (sampler["monitor"] or {}, "threshold")):
            if fields.get(name) == math.inf:  # of a monitor that only looks
                fields[name] = "inf"  # JSON knows no infinity
        return json.loads(json.dumps(settings))


def evaluate_requests(
    model: Any,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    attack: str,
    sampler: SamplerConfig,
    judge: Judge = keywords,
    *,
    attack_settings: AttackSettings | None = None,
    batch_size: int = 16,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Attacks a model with every row and judges what it wrote; `a2d_jax.scores.summarize` adds the records up.

    Args:
      rows: of a prompt file, or any dicts with the keys that the attack reads.
      attack: a name in `ATTACKS`.
      sampler: how to decode; its `gen_length` is also the attack's.
      judge: (row, completion) -> bool or 0 to 1, or a judge of `load_judge`.
    Returns:
      One record a row, in the order of the rows: the keys of `complete`, "BehaviorID", "success" (None:
      unscored), "is_refused", and what else the judge has to say.
    """
    settings = dataclasses.replace(attack_settings or AttackSettings(), gen_length=sampler.gen_length)
    inputs = build_inputs(rows, attack, tokenizer, settings)
    batches = complete(model, tokenizer, inputs, sampler, batch_size=batch_size, buckets=buckets, seed=seed)
    completions = {completion["index"]: completion for batch in batches for completion in batch}
    return judge_completions(rows, completions, judge)


def judge_completions(
    rows: Sequence[Mapping[str, Any]], completions: Mapping[int, Completion], judge: Judge
) -> list[dict[str, Any]]:
    """The completions with the judge's verdict; a rejected request is a refusal, whatever the judge."""
    judged = [index for index in range(len(rows)) if not completions[index]["is_rejected"]]
    texts = [completions[index]["completion"] for index in judged]
    scores = dict(zip(judged, score_all(judge, [rows[index] for index in judged], texts), strict=True))
    records = []
    for index, row in enumerate(rows):
        record = {"BehaviorID": behavior_id(row, index)} | completions[index]
        record |= {"is_safe": row["is_safe"]} if "is_safe" in row else {}
        record["success"] = scores[index].success if index in scores else 0.0
        record["is_refused"] = record["is_rejected"] or is_refusal(record["completion"])
        records.append(record | (dict(scores[index].details) if index in scores else {}))
    return records


def add_up(rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], expect: str) -> dict[str, Any]:
    """`summarize`, and besides by XSTest's types or HarmBench's categories, where the rows have them ("groups").

    Of XSTest's harmless prompts a refusal is an over-refusal; its contrast prompts, which are to be refused, count in
    "contrast" and in groups of their own alone.
    """
    records = [{"is_safe": row.get("is_safe", True)} | record for row, record in zip(rows, records, strict=True)]
    groups = [row.get("type") or row.get("FunctionalCategory") for row in rows]
    more: dict[str, Any] = {}
    if all(groups):
        more["groups"] = summarize_groups(records, groups, expect)
    harmless = [record for record in records if is_harmless(record)]
    if expect == "answer" and 0 < len(harmless) < len(records):
        more["contrast"] = summarize([record for record in records if not is_harmless(record)], "refusal")
        records = harmless
    return summarize(records, expect) | more


def open_folder(out: Path, settings: Mapping[str, Any]) -> dict[int, Completion]:
    """The completions that are in `out` already; ValueError where they were made with other settings."""
    path = out / "settings.json"
    if path.is_file():
        before = read_settings(out)
        if changes := differences(before, settings, sorted({*before, *settings} - {"weights"})):
            raise ValueError(f"{out} holds completions made with other settings ({changes}); give another --out")
    elif (out / "completions.jsonl").exists():
        raise ValueError(f"{out} holds completions without settings.json, and cannot be continued; give another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    return read_completions(out / "completions.jsonl")


def read_settings(out: Path) -> dict[str, Any]:
    return json.loads((out / "settings.json").read_text(encoding="utf-8"))


def check_weights(out: Path, weights: str, has_completions: bool) -> None:
    """Notes the fingerprint of the weights in settings.json, or compares it with the one that is there."""
    settings = read_settings(out)
    if has_completions and settings.get("weights", weights) != weights:
        raise ValueError(
            f"the weights of {settings['checkpoint']} have changed since {out} was begun; give another --out"
        )
    write_json(out / "settings.json", {**settings, "weights": weights})


def closing_line(results: Mapping[str, Any], path: Path) -> str:
    ban = ", [EOS] banned" if results["eos_banned"] else ""
    scores = f"success {percent(results['success'])} of {results['num_requests']} requests"
    scores += f" ({results['num_unscored']} unscored)" if results["num_unscored"] else ""
    scores += f", mean rating {results['rating']:.2f}" if "rating" in results else ""
    scores += f", over-refusal {results['over_refusal']:.1%}" if "over_refusal" in results else ""
    passes = f"{results['num_forward']:.1f} forward passes a request"
    return f"{results['attack']}, order {results['order']}{ban}: {scores}, {passes} -> {path}"


def load_model(config: EvaluationConfig) -> Any:
    """The model that an evaluation is of."""
    mesh = make_mesh(*config.mesh) if config.mesh else None
    return load_pretrained(config.checkpoint, mesh, jnp.dtype(config.dtype), config.adapter)


# -- the program ------------------------------------------------------------------------------------------------------


def run(config: EvaluationConfig, model: Any = None, stored: str | None = None) -> dict[str, Any]:
    """Decodes what is not decoded yet, judges everything, writes and returns results.json.

    Args:
      model: of the config, where the caller holds it already; by default it is loaded when it is needed.
      stored: what `stored_weights` says, or said when the folder was begun, where the caller knows it.
    """
    out, sampler, judge_settings = local_path(config.out), config.sampler, config.judge_settings
    if judge_settings.api.cache is None:
        api = dataclasses.replace(judge_settings.api, cache=str(out / "judge_cache.jsonl"))
        judge_settings = dataclasses.replace(judge_settings, api=api)
    judge = load_judge(config.judge, judge_settings)

    # --- Requests: everything that can be wrong with them is found before a model is loaded --------------------------
    rows = read_prompts(config.prompts)[: config.limit]
    files = hf_folder(config.checkpoint)
    model_config = load_config(files)
    tokenizer, family = load_tokenizer(files), model_config.family
    settings = dataclasses.replace(config.attack_settings, gen_length=sampler.gen_length)
    inputs = build_inputs(rows, config.attack, tokenizer, settings)
    groups = plan_groups(inputs, sampler, config.buckets, family, tokenizer.mask_id)
    stored = stored_weights(config.checkpoint, config.adapter) if stored is None else stored
    completions = open_folder(out, config.completion_settings() | {"stored_weights": stored})

    # --- Plan ------------------------------------------------------------------------------------------------------
    num_blanks = sum(request.num_blanks for request in inputs)
    lengths = sorted({group.length for group in groups})
    print(f"attack {config.attack} with {len(rows)} requests of {config.prompts} ({num_blanks} blanks)")
    print(f"model {config.checkpoint} ({family}, {config.dtype}), adapter {config.adapter}, judge {config.judge}")
    print(f"sampler {sampler}")
    print(f"up to {config.batch_size} rows at once, row lengths {lengths}; {len(completions)} requests done before")
    print(f"writes {out}", flush=True)

    # --- Decoding --------------------------------------------------------------------------------------------------
    if len(completions) < len(rows):
        model = load_model(config) if model is None else model
        check_weights(out, weights_fingerprint(model), bool(completions))
        num_before, start = len(completions), time.monotonic()
        for batch in complete(
            model,
            tokenizer,
            inputs,
            sampler,
            batch_size=config.batch_size,
            buckets=config.buckets,
            seed=config.seed,
            done=frozenset(completions),
        ):
            append_completions(out / "completions.jsonl", batch)
            completions |= {completion["index"]: completion for completion in batch}
            rate = (len(completions) - num_before) / (time.monotonic() - start)
            eta = clock((len(rows) - len(completions)) / rate)
            print(f"{len(completions)}/{len(rows)} requests, {rate:.2f}/s, ETA {eta}", flush=True)
        del model  # a judge may need its memory

    # --- Scores ----------------------------------------------------------------------------------------------------
    records = judge_completions(rows, completions, judge)
    expect = config.expect or ("answer" if config.attack == "over_refusal" else "refusal")
    scores = add_up(rows, records, expect)
    results = {
        "settings": {**read_settings(out), "batch_size": config.batch_size, "judge": config.judge, "expect": expect}
        | ({"judge_settings": dataclasses.asdict(judge_settings)} if hasattr(judge, "score_all") else {}),
        "attack": config.attack,
        "order": sampler.order,
        "eos_banned": sampler.ban_eos or sampler.logits_eos_inf,
        **scores,
        "requests": [{key: value for key, value in record.items() if key != "eos_prob"} for record in records],
    }
    write_json(out / "results.json", results)
    print(closing_line(results, out / "results.json"))
    return results


def define_flags(prompts: str = "JSON list of prompt rows, or HarmBench's or XSTest's CSV") -> None:
    """The flags of every program that attacks one checkpoint; `prompts` says what --prompts names."""
    flags.DEFINE_string("checkpoint", None, "folder of any kind that loads", required=True)
    flags.DEFINE_string("adapter", None, "PEFT folder to attach")
    flags.DEFINE_string("prompts", None, prompts, required=True)
    flags.DEFINE_string("out", None, "folder to write", required=True)
    define_judge_flags()
    flags.DEFINE_integer("appended_masks", 36, "response of a DIJA row without <mask:N>; 0 refuses such rows")
    flags.DEFINE_string("prefix", None, "start of the response for prefilling, where a row has none")
    flags.DEFINE_integer("prefix_tokens", None, "prefilling writes only so many tokens of the prefix")
    flags.DEFINE_enum("template_turn", "user", TURNS, "who speaks the text of DIJA and FITS")
    flags.DEFINE_float("blank_scale", 1.0, "every <mask:N> of a template becomes so many times as long")
    flags.DEFINE_integer("template_repeats", 2, "how often dija_long says its template")
    flags.DEFINE_string("split_joiner", "and", "what dija_split and fits_split write between two halves")
    flags.DEFINE_integer("asks", 2, "how often ask_again asks")
    flags.DEFINE_integer("limit", None, "only the first so many rows", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "rows decoded together", lower_bound=1)
    flags.DEFINE_list("buckets", [str(length) for length in DEFAULT_BUCKETS], "row lengths to pad to")
    flags.DEFINE_integer("seed", 0, "of temperature and random order")
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "of weights and activations")
    define_mesh_flag("the device mesh, also of the classifier")
    define_sampler_flags()


def numbers_of_flag(flag: str) -> tuple[int, ...]:
    """The whole numbers in a list flag; ValueError for anything else."""
    values = flags.FLAGS[flag].value
    try:
        return tuple(int(value) for value in values)
    except ValueError as error:
        raise ValueError(f"--{flag}={','.join(values)}: give whole numbers with commas between") from error


def config_from_flags(attack: str, expect: str | None = None) -> EvaluationConfig:
    """The evaluation that the flags of `define_flags` describe."""
    given = flags.FLAGS
    names = [field.name for field in dataclasses.fields(AttackSettings)]
    names_of_config = ("checkpoint", "prompts", "out", "adapter", "judge", "limit", "batch_size", "seed", "dtype")
    return EvaluationConfig(
        attack=attack,
        expect=expect,
        sampler=sampler_config_from_flags(given.checkpoint),
        attack_settings=AttackSettings(**{name: given[name].value for name in names}),
        judge_settings=dataclasses.replace(judge_settings_from_flags(), mesh=given.mesh),
        buckets=numbers_of_flag("buckets"),
        mesh=given.mesh,
        **{name: given[name].value for name in names_of_config},
    )


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    run(config_from_flags(flags.FLAGS.attack, flags.FLAGS.expect))


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_enum("attack", None, sorted(ATTACKS), "the attack; over_refusal for harmless requests", required=True)
    flags.DEFINE_enum("expect", None, EXPECTATIONS, "of the requests; default: answer for over_refusal, else refusal")
    app.run(main)
