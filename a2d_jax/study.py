"""Program: the safety study: trainings x measurements over several seeds, and one report of what they show.

    python -m a2d_jax.study --config configs/study_world.py --workdir DIR [--only defences,depth] [--workers 2]

A study is a config (`configs/study_world.py` says more): how a seed is prepared and its base model made; trainings,
each a file of configs/ with a few fields changed; measures, each an evaluation of `a2d_jax.evaluate`; and parts. A part
is either a grid, models x measures, or a program of its own. Only the trainings that some part asks for are run.
Everything is a command that resumes, so the study does too.

    DIR/study.md         every table, a mean over the seeds with its range, and the plots
    DIR/PART.json, .png  the numbers behind a grid, and its picture
    DIR/seed<N>/{...}    trainings, evaluations, and what the programs wrote
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import string
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from a2d_jax import evaluate
from a2d_jax.attacks import AttackSettings
from a2d_jax.files import write_beside, write_json
from a2d_jax.judges import JudgeSettings
from a2d_jax.progress import clock
from a2d_jax.resume import held
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.scores import share
from a2d_jax.stages import claim_folder, end_on_sigterm, export, run_command, train
from a2d_jax.study_config import Part, StudyConfig, check_names
from a2d_jax.study_grid import Grid, grid_markdown, plot_grid

# On a CPU page faults are a quarter of a training step (docs/performance.md).
HUGE_PAGES = "glibc.malloc.hugetlb=1"


class Seed:
    """One seed of a study: its folder, and its models, made when they are asked for."""

    def __init__(self, study: StudyConfig, seed: int, workdir: Path):
        self.study, self.seed, self.folder = study, seed, workdir / f"seed{seed}"
        self._is_prepared = False
        self._models: dict[str, Path] = {}

    def model(self, name: str) -> Path:
        """The folder of a model; it is trained where it is not."""
        if not self._is_prepared:
            self._is_prepared = True
            done = self.folder / "prepared.json"  # written once: another worker may be reading the files by then
            with held(self.folder / "prepared"):
                if not done.is_file():
                    commands = [[self.fill(word) for word in command] for command in self.study.prepare]
                    for command in commands:
                        run_command(*command)
                    write_json(done, commands)
        if name not in self._models:
            base = self.study.base
            if base in self.study.trainings:
                base = self.study.carried.get(str(self.seed), base)
            own = base if name == "base" else name
            if own not in self.study.trainings:
                self._models[name] = Path(self.fill(own))
            else:
                training = self.study.trainings[own]
                start = self.fill(training.start) if "/" in training.start else self.model(training.start)
                changes = [self.fill(change) for change in training.changes]
                folder = self.folder / "models" / own
                with held(folder):
                    self._models[name] = train(self.fill(training.config), folder, start, self.seed, changes)
        return self._models[name]

    def fill(self, text: str, **more: Any) -> str:
        """`text` with its places filled: {seed}, {folder}, {world}, {MODEL}, {MODEL_hf}, and those of `more`."""
        values = {"seed": self.seed, "folder": self.folder, "world": self.folder / "world", **more}
        for _, place, _, _ in string.Formatter().parse(text):
            if place and place not in values:
                values[place] = self.exported(place[:-3]) if place.endswith("_hf") else self.model(place)
        return text.format(**values)

    def exported(self, name: str) -> Path:
        """The Hugging Face folder of a model."""
        folder, target = self.model(name), self.folder / "models" / f"{name}_hf"
        if (folder / "config.json").is_file():
            return folder
        with held(target):
            return target if (target / "config.json").is_file() else export(folder, target)

    def results(self, model: str, name: str) -> dict[str, Any]:
        """The scores of an evaluation that is there."""
        return json.loads((self.evaluation(model, name) / "results.json").read_text(encoding="utf-8"))

    def evaluation(self, model: str, name: str) -> Path:
        return self.folder / "evaluations" / model / name

    def measure(self, model: str, name: str) -> None:
        """One evaluation."""
        study, measure, out = self.study, self.study.measures[name], self.evaluation(model, name)
        config = evaluate.EvaluationConfig(
            checkpoint=str(self.model(model)),
            attack=measure.attack,
            prompts=self.fill(measure.prompts),
            out=str(out),
            sampler=SamplerConfig(**{**study.sampler, **measure.sampler}),
            attack_settings=AttackSettings(**measure.settings),
            judge=measure.judge or study.judge,
            judge_settings=dataclasses.replace(JudgeSettings.from_dict(study.judge_settings), mesh=study.mesh),
            batch_size=study.batch_size,
            buckets=tuple(study.buckets),
            seed=self.seed,
            dtype=study.dtype,
            mesh=study.mesh,
        )
        with held(out):
            evaluate.run(config)


# -- parts ------------------------------------------------------------------------------------------------------------


def is_filled(name: str, part: Part, seed: Seed) -> bool:
    """Whether everything that the report needs of one part and seed is there."""
    if part.command:
        files = [seed.folder / name / file for file in (*part.tables, *part.pictures)]
    else:
        cells = itertools.product(part.models, part.measures)
        files = [seed.evaluation(model, measure) / "results.json" for model, measure in cells]
    return all(file.is_file() for file in files)


def fill_part(name: str, part: Part, seed: Seed) -> None:
    """Makes what the report needs of one part and seed."""
    if not part.command:
        for model, measure in itertools.product(part.models, part.measures):
            seed.measure(model, measure)
        return
    seed.model("base")
    run_command(*(seed.fill(word, out=seed.folder / name) for word in part.command))


def grid_records(study: StudyConfig, part: Part, seeds: Sequence[Seed]) -> list[dict[str, Any]]:
    """One record a model, measure and seed of a grid that has been filled; a request on which the judge gave no verdict
    counts against the model."""

    def value(scores: Mapping[str, Any], score: str) -> float:
        return share(scores, float(scores["settings"]["expect"] == "refusal")) if score == "success" else scores[score]

    return [
        {
            "model": model,
            "measure": name,
            "seed": seed.seed,
            "value": value(scores := seed.results(model, name), study.measures[name].score),
            "num_requests": scores["num_requests"],
        }
        for seed in seeds
        for model in part.models
        for name in part.measures
    ]


def _as_markdown(table: Path) -> str:
    """A table in the report: one in Markdown as it is, any other as preformatted text."""
    text = table.read_text(encoding="utf-8")
    return text if table.suffix == ".md" else f"```\n{text}```\n"


def section(name: str, part: Part, seeds: Sequence[Seed], workdir: Path) -> str:
    """The part's section of the report, from the files that it left."""
    lines = [f"## {part.title}", "", part.text, ""]
    if part.command:
        for seed in seeds:
            out = seed.folder / name
            lines += [f"### Seed {seed.seed}", ""] if len(seeds) > 1 else []
            lines += [_as_markdown(out / table) for table in part.tables]
            lines += [f"![{part.title}]({(out / picture).relative_to(workdir)})\n" for picture in part.pictures]
        return "\n".join(lines)
    records = json.loads((workdir / f"{name}.json").read_text(encoding="utf-8"))["records"]
    numbers = sorted({record["seed"] for record in records})
    num_requests = sorted({record["num_requests"] for record in records})
    lines += [
        f"Per cent, mean over seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} (lowest-highest); "
        f"{' or '.join(map(str, num_requests))} requests a cell.",
        "",
        grid_markdown(Grid.of(part, records)),
        f"![{part.title}]({name}.png)",
        "",
    ]
    return "\n".join(lines)


# -- the program ------------------------------------------------------------------------------------------------------


def run(study: StudyConfig, workdir: Path, only: Sequence[str] | None = None, num_workers: int = 1) -> None:
    """Runs the parts, and writes the report of all that are there.

    Raises:
      RuntimeError: a worker failed, or another process has a part.
    """
    check_names("parts", only or (), set(study.parts))
    todo = [name for name in study.parts if not only or name in only]
    print(
        f"{len(todo)} parts: {', '.join(todo)}; seeds {', '.join(map(str, study.seeds))}; writes {workdir}", flush=True
    )
    claim_folder(workdir, study.settings())
    keep_compiled(workdir / "compiled")
    start = time.monotonic()
    hands = deal(study, todo, num_workers)
    if len(hands) > 1:
        run_workers(study, workdir, todo, hands)
    else:
        work(study, workdir, todo, study.seeds)
    write_report(study, workdir)
    pairs = [(name, Seed(study, number, workdir)) for name in todo for number in seeds_of(study, name)]
    missing = [f"{name} of seed {seed.seed}" for name, seed in pairs if not is_filled(name, study.parts[name], seed)]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)}: another process is at work on {workdir}; run again when it has ended."
        )
    print(f"{len(todo)} parts in {time.monotonic() - start:.0f} s -> {workdir / 'study.md'}")


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in `folder`, for this process and the commands that it runs, unless they are kept."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder.absolute())


def work(study: StudyConfig, workdir: Path, todo: Sequence[str], hand: Sequence[int]) -> None:
    """Fills the parts `todo`, part by part: first those of the seeds in `hand`, then, the last first, what no other
    worker has begun."""
    pairs = [(name, number) for name in todo for number in seeds_of(study, name)]
    own = [pair for pair in pairs if pair[1] in hand]
    seeds, start = {number: Seed(study, number, workdir) for _, number in pairs}, time.monotonic()
    for done, (name, number) in enumerate([*own, *(pair for pair in reversed(pairs) if pair not in own)], 1):
        part, seed = study.parts[name], seeds[number]
        with held(seed.folder / f"{name}.part", waits=False) as is_ours:
            if is_ours and not is_filled(name, part, seed):
                fill_part(name, part, seed)
        eta = clock((time.monotonic() - start) / done * max(len(own) - done, 0))
        how_far = f"{done}/{len(own)}, ETA {eta}" if done <= len(own) else "for another worker"
        if is_ours:
            print(f"== {name} of seed {number} done, {how_far}", flush=True)


def seeds_of(study: StudyConfig, name: str) -> tuple[int, ...]:
    """Seeds of a part."""
    return study.parts[name].seeds or study.seeds


def deal(study: StudyConfig, todo: Sequence[str], num_workers: int) -> list[list[int]]:
    """The seeds that each worker begins with: each goes to who has least to do, those with the most parts first."""
    num_parts = Counter(seed for name in todo for seed in seeds_of(study, name))
    hands: list[list[int]] = [[] for _ in range(min(num_workers, num_parts.total()))]
    for seed, _ in num_parts.most_common():
        min(hands, key=lambda hand: sum(num_parts[own] for own in hand)).append(seed)
    return hands


def run_workers(study: StudyConfig, workdir: Path, todo: Sequence[str], hands: Sequence[Sequence[int]]) -> None:
    """A process for each hand of seeds, with its share of the cores; what it prints goes to worker<N>.log.

    Raises:
      RuntimeError: a worker failed; the others have finished.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    os.environ.setdefault("GLIBC_TUNABLES", HUGE_PAGES)  # read by a process when it starts
    workers = []
    for number, hand in enumerate(hands):
        log, own_cores = workdir / f"worker{number}.log", cores[number :: len(hands)]
        print(f"worker {number}: seeds {hand} first, cores {own_cores or 'any'}, log {log}", flush=True)
        # A process started anew: JAX does not survive a fork.
        worker = multiprocessing.get_context("spawn").Process(
            target=_work, args=(log, own_cores, study, workdir, todo, hand)
        )
        worker.start()
        workers.append(worker)
    try:
        for worker in workers:
            worker.join()
    finally:  # stopped: a worker that outlived this process would go on holding its parts
        for worker in workers:
            worker.terminate()
            worker.join()
    failed = [str(number) for number, worker in enumerate(workers) if worker.exitcode]
    if failed:
        raise RuntimeError(
            f"worker {', '.join(failed)} failed; see worker<N>.log in {workdir}, then run again: it goes on."
        )


def _work(log: Path, cores: Sequence[int], study: StudyConfig, workdir: Path, todo: Sequence[str], hand) -> None:
    """What a worker process does."""
    if cores:
        os.sched_setaffinity(0, cores)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    logging.set_verbosity(logging.WARNING)
    end_on_sigterm()
    work(study, workdir, todo, hand)


def write_report(study: StudyConfig, workdir: Path) -> None:
    """study.md, of the parts that have been filled for all their seeds."""
    sections = []
    for name, part in study.parts.items():
        of_part = [Seed(study, number, workdir) for number in seeds_of(study, name)]
        if not all(is_filled(name, part, seed) for seed in of_part):
            continue
        if not part.command:
            records = grid_records(study, part, of_part)
            plot_grid(workdir / f"{name}.png", part.title, Grid.of(part, records))
            write_json(workdir / f"{name}.json", {"part": name, "records": records})
        sections.append(section(name, part, of_part, workdir))
    write_beside(workdir / "study.md", lambda file: file.write(("\n".join(["# Safety study", "", *sections])).encode()))


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    end_on_sigterm()
    run(
        StudyConfig.from_dict(flags.FLAGS.config.to_dict()),
        Path(flags.FLAGS.workdir),
        flags.FLAGS.only,
        flags.FLAGS.workers,
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "the study: a file of configs/")
    flags.DEFINE_string("workdir", None, "folder to write, and to continue", required=True)
    flags.DEFINE_list("only", None, "parts to run now; default: all")
    flags.DEFINE_integer("workers", 1, "processes that share the parts, each with its share of the cores", 1)
    flags.mark_flag_as_required("config")
    app.run(main)
