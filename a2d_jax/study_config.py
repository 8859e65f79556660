"""What a study is made of: trainings, measures, and parts that ask for them. `study.py` runs it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from a2d_jax.batching import DEFAULT_BUCKETS
from a2d_jax.settings import build


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run: a file of configs/ (with {world} for the seed's data), the model or the folder (a path with a
    slash, places in braces) that it starts from, and fields changed."""

    config: str
    start: str = "base"
    changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measure:
    """An evaluation: what is asked, and what of the study's settings differs. `score` names the number to report."""

    attack: str
    prompts: str
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    judge: str | None = None
    score: str = "success"


@dataclasses.dataclass(frozen=True)
class Part:
    """A grid of models and measures, or a program.

    Attributes:
      title, text: heading and lead of its section.
      models, measures: of the grid, by name.
      command: of the program, with places in braces; it writes into {out}.
      tables, pictures: files that it leaves there and that belong in the report.
      seeds: None: those of the study.
    """

    title: str
    text: str = ""
    models: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A whole study.

    Attributes:
      seeds: of worlds and trainings.
      prepare: commands that make a seed's data.
      base: folder of the base model, or the name of a training.
      carried: folders of bases that need no training, by seed.
      sampler, batch_size, buckets, dtype, judge, mesh: of every evaluation; judge_settings: fields of `JudgeSettings`.
    """

    seeds: tuple[int, ...]
    base: str
    trainings: Mapping[str, Training]
    measures: Mapping[str, Measure]
    parts: Mapping[str, Part]
    prepare: tuple[tuple[str, ...], ...] = ()
    carried: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 16
    buckets: tuple[int, ...] = DEFAULT_BUCKETS
    dtype: str = "bfloat16"
    judge: str = "keywords"
    judge_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "StudyConfig":
        """From a config file, where `parts` is a sequence of parts with a "name".

        Raises:
          ValueError: names what is unknown or missing.
        """
        study = build(cls, config, "config")  # its trainings, measures and parts are dicts still
        for number, part in enumerate(study.parts):
            if "name" not in part:
                raise ValueError(f"config.parts[{number}] lacks 'name'.")
        study = dataclasses.replace(
            study,
            trainings=_build_each(Training, study.trainings, "config.trainings"),
            measures=_build_each(Measure, study.measures, "config.measures"),
            parts=_build_each(  # in their order, which the dicts of a config file do not keep
                Part,
                {part["name"]: {key: part[key] for key in part if key != "name"} for part in study.parts},
                "config.parts",
            ),
        )
        study.check()
        return study

    def settings(self) -> dict[str, Any]:
        """What the results depend on, an entry for each training, measure and command; the rest only chooses."""
        plain = dataclasses.asdict(self)
        del plain["seeds"], plain["parts"]
        plain |= {f"parts.{name}.command": part.command for name, part in self.parts.items() if part.command}
        for kind in ("trainings", "measures"):
            plain |= {f"{kind}.{name}": value for name, value in plain.pop(kind).items()}
        return plain

    def check(self) -> None:
        """ValueError for a name that nothing has."""
        models, measures = {"base", *self.trainings}, set(self.measures)
        for name, training in self.trainings.items():
            if "/" not in training.start:
                check_names(f"trainings.{name}.start", [training.start], models)
        for name, part in self.parts.items():
            if bool(part.command) == bool(part.models and part.measures):
                raise ValueError(f"parts.{name}: give a command, or models and measures.")
            if part.command and not (part.tables or part.pictures):
                raise ValueError(f"parts.{name}: name the tables or pictures that its command leaves in {{out}}.")
            check_names(f"parts.{name}.models", part.models, models)
            check_names(f"parts.{name}.measures", part.measures, measures)


def _build_each(kind: type, values: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    return {name: build(kind, value, f"{where}.{name}") for name, value in values.items()}


def check_names(where: str, names: Sequence[str], known: set[str]) -> None:
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"config.{where} names {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
