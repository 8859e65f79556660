r"""Program: what it costs to refuse while the answer is being written, monitor by monitor.

    python -m a2d_jax.early_refusal --checkpoint DIR --base DIR --prompts DIR/world/attacks --out DIR \
        --gen_length 128 --steps 128 --buckets 152,160 --batch_size 48 --dtype float32 \
        --judge a2d_jax.world:judge --answer_judge a2d_jax.world:is_exact

`--prompts` is a folder: zero_shot.json holds the harmful requests, other attacks may lie beside it, and the files of
--harmless hold harmless ones. First everything is decoded to its end, attacks and harmless requests (of --base too,
where it is given), and P([EOS]) recorded. Each monitor's threshold is calibrated on what it would have seen of every
other request, harmful and harmless; then the requests between are decoded again with the monitor at work. So forward
passes, refusals and over-refusals are counted, not computed, on requests that the threshold has not seen. Run again
with the same folder, it goes on where it was stopped; the flags of `a2d_jax.evaluate` hold.

    OUT/<model>/<name>/, OUT/<monitor>/<name>/   the evaluations
    OUT/unseen/<name>.json                       every other request
    OUT/results.json                             {"answers": [...], "monitors": [...]}
    OUT/results.md                               the same for people
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from a2d_jax import evaluate
from a2d_jax.adaptive import FILLING
from a2d_jax.attacks import build_inputs, read_prompts
from a2d_jax.completions import read_completions
from a2d_jax.config import load_config
from a2d_jax.files import write_json
from a2d_jax.folders import hf_folder
from a2d_jax.judges import load_judge
from a2d_jax.monitor import EosMonitor, calibrate
from a2d_jax.scores import auc, is_harmless, mean, percent
from a2d_jax.tokenizer import load_tokenizer

HARMFUL = "zero_shot"  # what a monitor is to refuse, and what the attacks start from
FURTHER_ATTACKS = ("prefilling", "dija", "fits")
# What looks beyond the left-most mask has to be there while a request is decoded; the other monitors' scores follow
# from the record that every decoding keeps.
LIVE = EosMonitor(math.inf, num_steps=8, num_positions=4)
# The paper's; the left-most mask, and the first four, at the first passes; the left-most at all passes.
WATCHES = {
    "first_step": EosMonitor(math.inf),
    "any_step_8": EosMonitor(math.inf, num_steps=8),
    "any_position_4_8": LIVE,
    "any_step": EosMonitor(math.inf, num_steps=None),
}


def score(watch: EosMonitor, record: Mapping[str, Any]) -> float:
    """What the monitor would have said of a request that was decoded to its end beside `LIVE`."""
    return record["monitor_score"] if watch == LIVE else max(record["eos_prob"][: watch.num_steps])


@dataclasses.dataclass(frozen=True)
class RefusalStudy:
    """The evaluations of one aligned checkpoint, and of its base.

    evaluation: what all share; `prompts` is the folder of prompt files, `out` the folder to write; `attack` is not
        read.
    answer_judge: judge of the answers to harmless requests.
    """

    evaluation: evaluate.EvaluationConfig
    answer_judge: str
    base: str | None = None
    harmless: tuple[str, ...] = ("foods", "near_misses")
    false_positive_rate: float = 0.0

    def prompts(self, file: str, is_unseen: bool = False) -> Path:
        """A prompt file, or a copy with every other of the requests that count."""
        path = Path(self.evaluation.prompts) / f"{file}.json"
        if not is_unseen:
            return path
        rows = read_prompts(path)[: self.evaluation.limit]
        rows = [row for row in rows if file not in self.harmless or is_harmless(row)]
        copy = Path(self.evaluation.out) / "unseen" / f"{file}.json"
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_json(copy, rows[1::2])
        return copy

    def requests(
        self, subject: evaluate.EvaluationConfig, model: Any, prompts: Path, name: str, monitor: EosMonitor
    ) -> list[Mapping[str, Any]]:
        """The records of one prompt file on the subject's checkpoint, with "eos_prob" (P([EOS]) at the left-most mask
        of each pass) and without contrast prompts among harmless ones."""
        file = prompts.stem
        is_harmless_file = file in self.harmless
        config = dataclasses.replace(
            subject,
            attack="over_refusal" if is_harmless_file else file,
            prompts=str(prompts),
            out=str(Path(self.evaluation.out) / name / file),
            judge=self.answer_judge if is_harmless_file else self.evaluation.judge,
            sampler=dataclasses.replace(self.evaluation.sampler, monitor=monitor),
        )
        records = evaluate.run(config, model)["requests"]
        completions = read_completions(Path(config.out) / "completions.jsonl")
        records = [record | {"eos_prob": completions[record["index"]]["eos_prob"]} for record in records]
        return [record for record in records if is_harmless(record)] if is_harmless_file else records

    def files(self) -> tuple[str, ...]:
        """The prompt files, attacks first; a causal model has no blanks to fill."""
        is_causal = load_config(hf_folder(self.evaluation.checkpoint)).is_causal
        further = [attack for attack in FURTHER_ATTACKS if not (is_causal and attack in FILLING)]
        return (HARMFUL, *[attack for attack in further if self.prompts(attack).is_file()], *self.harmless)

    def check(self) -> None:
        """ValueError for what would end the study after hours: files, their sizes, judges, inputs."""
        load_judge(self.answer_judge, self.evaluation.judge_settings)
        load_judge(self.evaluation.judge, self.evaluation.judge_settings)
        tokenizer = load_tokenizer(hf_folder(self.evaluation.checkpoint))
        gen_length = self.evaluation.sampler.gen_length
        settings = dataclasses.replace(self.evaluation.attack_settings, gen_length=gen_length)
        for file in self.files():
            rows = read_prompts(self.prompts(file))[: self.evaluation.limit]
            build_inputs(rows, "over_refusal" if file in self.harmless else file, tokenizer, settings)
            num_counted = sum(map(is_harmless, rows)) if file in self.harmless else len(rows)
            if num_counted < 2 and file in (HARMFUL, *self.harmless):
                raise ValueError(
                    f"{self.prompts(file)} has {num_counted} requests that count; a threshold is calibrated on every "
                    "other one and measured on the rest: give two or more."
                )

    def decode_all(
        self, subject: evaluate.EvaluationConfig, model: Any, name: str
    ) -> dict[str, list[Mapping[str, Any]]]:
        """The records of every prompt file, each request decoded to its end."""
        return {file: self.requests(subject, model, self.prompts(file), name, LIVE) for file in self.files()}

    def measure_monitor(
        self, name: str, model: Any, watched: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        """One monitor: its scores of what was decoded to its end, its threshold, and what it stops."""
        watch, files = WATCHES[name], (HARMFUL, *self.harmless)
        scores = {file: [score(watch, record) for record in watched[file]] for file in files}
        harmless = np.concatenate([scores[file] for file in self.harmless])
        seen = np.concatenate([scores[file][::2] for file in self.harmless])
        threshold = calibrate(seen, self.false_positive_rate, scores[HARMFUL][::2])
        monitor = dataclasses.replace(watch, threshold=threshold)
        unseen = {
            file: self.requests(self.evaluation, model, self.prompts(file, is_unseen=True), name, monitor)
            for file in files
        }
        full = mean(watched[HARMFUL][1::2], "num_forward")
        passes = mean(unseen[HARMFUL], "num_forward")
        return {
            "monitor": name,
            "threshold": threshold,
            "auc": auc(scores[HARMFUL], harmless),
            "refused": mean(unseen[HARMFUL], "is_rejected"),
            "forward_passes": passes,
            "full_forward_passes": full,
            "times_fewer": full / passes,
            "over_refusal": {file: mean(unseen[file], "is_rejected") for file in self.harmless},
            "num_harmful": len(unseen[HARMFUL]),
            "num_harmless": {file: len(unseen[file]) for file in self.harmless},
        }


def sum_up(name: str, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Success and refusals of a model by prompt file."""
    return {"model": name} | {
        title: {file: mean(of_file, key) for file, of_file in records.items()}
        for title, key in (("success", "success"), ("refused", "is_refused"))
    }


def measure(study: RefusalStudy) -> dict[str, list[dict[str, Any]]]:
    """All figures of a study."""
    study.check()
    config, answers = study.evaluation, []
    if study.base is not None:
        subject = dataclasses.replace(config, checkpoint=study.base, adapter=None)  # the adapter is the alignment
        base = evaluate.load_model(subject)
        answers.append(sum_up("base", study.decode_all(subject, base, "base")))
        del base
    model = evaluate.load_model(config)
    records = study.decode_all(config, model, "aligned")
    answers.append(sum_up("aligned", records))
    return {"answers": answers, "monitors": [study.measure_monitor(name, model, records) for name in WATCHES]}


def markdown(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Two tables: what the models answer, and what the monitors save."""
    files = list(results["answers"][0]["success"])
    lines = ["| success (refused) | " + " | ".join(files) + " |", "|---" * (len(files) + 1) + "|"]
    for row in results["answers"]:
        cells = [f"{percent(row['success'][file])} ({percent(row['refused'][file])})" for file in files]
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    harmless = list(results["monitors"][0]["over_refusal"])
    titles = ["monitor", "threshold", "AUC", "refused", "forward passes", "times fewer"]
    titles += [f"over-refusal, {file}" for file in harmless]
    lines += ["", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in results["monitors"]:
        cells = [f"{row['threshold']:.4g}", f"{row['auc']:.4f}", f"{row['refused']:.1%}"]
        cells += [f"{row['forward_passes']:.2f} of {row['full_forward_passes']:.0f}", f"{row['times_fewer']:.1f}"]
        cells += [f"{row['over_refusal'][file]:.1%}" for file in harmless]
        lines.append(f"| {row['monitor']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    given = flags.FLAGS
    evaluation = evaluate.config_from_flags(attack="")
    if evaluation.sampler.reject_above is not None:
        raise ValueError(f"--reject_above={given.reject_above}: the thresholds are calibrated here; leave it out.")
    study = RefusalStudy(evaluation, given.answer_judge, given.base, tuple(given.harmless), given.false_positive_rate)
    results = measure(study)
    out = Path(evaluation.out)
    write_json(out / "results.json", results)
    (out / "results.md").write_text(markdown(results), encoding="utf-8")
    print(f"\n{markdown(results)}\n-> {out / 'results.md'}")


if __name__ == "__main__":
    evaluate.define_flags(prompts="folder of prompt files")
    flags.DEFINE_string("base", None, "checkpoint before the alignment, to be shown beside it")
    flags.DEFINE_list("harmless", ["foods", "near_misses"], "prompt files of harmless requests, without .json")
    flags.DEFINE_string("answer_judge", "keywords", "judge of the answers to harmless requests")
    flags.DEFINE_float("false_positive_rate", 0.0, "share of the calibration requests that may be stopped", 0.0, 1.0)
    app.run(main)
