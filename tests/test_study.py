"""The study program: what a config may say, its numbers worked by hand, and a small study from end to end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import a2d_jax
import a2d_jax.train
from a2d_jax.resume import held
from a2d_jax.stages import ROOT, read_config, train
from a2d_jax.study import Seed, deal, run, work
from a2d_jax.study_config import Measure, Part, StudyConfig, Training
from a2d_jax.study_grid import Grid, grid_markdown

WORLD_BASE = Path(a2d_jax.__file__).parent / "world_base"
GRID = Part("Grid", models=("base", "a2d"), measures=("dija", "fits"))


def test_a_cell_is_the_mean_over_seeds_with_its_range():
    values = {
        ("base", "dija"): (0.5, 1.0),
        ("base", "fits"): (1, 1),
        ("a2d", "dija"): (0, 0),
        ("a2d", "fits"): (0, 0.25),
    }
    records = [
        {"model": model, "measure": measure, "seed": seed, "value": pair[seed]}
        for seed in (1, 0)
        for (model, measure), pair in values.items()
    ]
    table = grid_markdown(Grid.of(GRID, records))
    assert table.splitlines()[2:] == ["| base | 75.0 (50-100) | 100.0 |", "| a2d | 0.0 | 12.5 (0-25) |"]


@pytest.fixture(scope="module")
def study() -> StudyConfig:
    return StudyConfig(
        seeds=(0,),
        prepare=(("a2d_jax.world", "--seed={seed}", "--out={world}"),),
        base=str(WORLD_BASE),
        trainings={"a2d": Training("configs/world_a2d.py:{world}", changes=("num_steps=1", "mesh.data=1"))},
        measures={
            "fits": Measure("fits", "{world}/attacks/fits.json"),
            "near_misses": Measure("over_refusal", "{world}/attacks/near_misses.json", judge="a2d_jax.world:is_exact"),
        },
        parts={
            "grid": Part("A grid", "What it is.", models=("base",), measures=("fits", "near_misses")),
            "world": Part(
                "Another world",
                command=("a2d_jax.world", "--seed=1{seed}", "--out={out}"),
                tables=("data/refusals.jsonl",),
            ),
        },
        sampler={"gen_length": 24, "steps": 24, "block_length": 24},
        batch_size=64,
        buckets=(40, 56),
        dtype="float32",
        judge="a2d_jax.world:judge",
    )


@pytest.fixture(scope="module")
def workdir(study, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    run(study, folder)
    return folder


def test_a_study_measures_models_and_reports(workdir):
    records = json.loads((workdir / "grid.json").read_text())["records"]
    assert [(r["model"], r["measure"], r["num_requests"]) for r in records] == [
        ("base", "fits", 16),
        ("base", "near_misses", 16),
    ]
    values = {r["measure"]: r["value"] for r in records}
    # The carried base knows the recipes of its world: the demo shows the same.
    assert values["fits"] > 0.8 and values["near_misses"] > 0.8
    report = (workdir / "study.md").read_text()
    assert "## A grid" in report
    assert all(f"| {name} | {100 * value:.1f} |" in report for name, value in values.items())
    assert "## Another world" in report and '"is_safe": true' in report
    assert (workdir / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "seed0" / "world" / "world.json").read_text())["seed"] == 0


def test_a_part_is_measured_once(study, workdir, capfd):
    before = (workdir / "seed0" / "evaluations" / "base" / "fits" / "completions.jsonl").stat().st_mtime_ns
    run(study, workdir, ["world", "grid"])
    assert "requests" not in capfd.readouterr().out
    assert (workdir / "seed0" / "evaluations" / "base" / "fits" / "completions.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"parts": [{"name": "p", "title": "P", "models": ("rt",), "measures": ("fits",)}]},
            "parts.p.models names rt; known: a2d",
        ),
        ({"parts": [{"name": "p", "title": "P", "models": ("a2d",)}]}, "give a command, or models and measures"),
        ({"parts": [{"name": "p", "title": "P", "command": ("a2d_jax.world",)}]}, "name the tables or pictures"),
        ({"trainings": {"a2d": {"config": "c", "start": "sft"}}}, "trainings.a2d.start names sft"),
        ({"carryed": {}}, "config has no field 'carryed'"),
        ({"trainings": {"a2d": {"config": "c", "strat": "base"}}}, "config.trainings.a2d has no field 'strat'"),
        ({"measures": {"fits": {"attack": "fits"}}}, "config.measures.fits lacks 'prompts'"),
        ({"parts": [{"name": "p", "titel": "P"}]}, "config.parts.p has no field 'titel'"),
        ({"parts": [{"title": "P"}]}, "config.parts.0. lacks 'name'"),
    ],
)
def test_unknown_names_are_refused(study, change, message):
    config = dataclasses.asdict(study) | {"parts": ()}
    with pytest.raises(ValueError, match=message):
        StudyConfig.from_dict(config | change)


def test_a_folder_of_another_study_is_refused(study, workdir):
    other = dataclasses.replace(study, trainings={"a2d": Training("configs/world_a2d.py:{world}")})
    with pytest.raises(ValueError, match="begun with other settings .trainings.a2d: .*num_steps=1.* then"):
        run(other, workdir, ["grid"])
    more = dataclasses.replace(study, measures=study.measures | {"dija": Measure("dija", "{world}/attacks/dija.json")})
    run(more, workdir, ["grid"])  # what is added changes nothing


def test_unknown_parts_are_refused(study, tmp_path):
    with pytest.raises(ValueError, match="names depths; known: grid, world"):
        run(study, tmp_path / "out", ["depths"])
    assert not (tmp_path / "out").exists()


def test_values_stand_where_their_names_are():
    records = [
        {"model": model, "measure": measure, "seed": 0, "value": i}
        for i, (model, measure) in enumerate([("a2d", "fits"), ("base", "fits"), ("a2d", "dija"), ("base", "dija")])
    ]
    np.testing.assert_array_equal(Grid.of(GRID, records).values[..., 0], [[3, 1], [2, 0]])
    more = [*records, *({"model": m, "measure": "pair", "seed": 0, "value": 9} for m in GRID.models)]
    down = Grid.of(dataclasses.replace(GRID, measures=("dija", "fits", "pair")), more)  # the longer side
    assert down.rows == ("dija", "fits", "pair") and down.columns == ("base", "a2d")
    np.testing.assert_array_equal(down.values[..., 0], [[3, 2], [1, 0], [9, 9]])


@pytest.mark.parametrize(
    ("num_workers", "hands"),
    [(1, [[0, 1, 2]]), (2, [[0], [1, 2]]), (3, [[0], [1], [2]]), (9, [[0], [1], [2], [], [], [], []])],
)
def test_seeds_are_dealt_by_how_much_there_is_to_do(study, num_workers, hands):
    of_one_seed = dataclasses.replace(study.parts["grid"], seeds=(0,))
    three = dataclasses.replace(study, seeds=(0, 1, 2), parts={**study.parts, "more": of_one_seed})
    assert deal(three, list(three.parts), num_workers) == hands
    assert deal(three, ["more"], num_workers) == [[0]]


def test_a_worker_does_its_own_seeds_first_then_what_nobody_has_begun(study, tmp_path, monkeypatch):
    three = dataclasses.replace(study, seeds=(0, 1, 2))
    done = []
    monkeypatch.setattr("a2d_jax.study.fill_part", lambda name, part, seed: done.append((name, seed.seed)))
    with held(tmp_path / "seed2" / "grid.part"):  # another worker is at it
        work(three, tmp_path, ["grid", "world"], [1])
    assert done == [("grid", 1), ("world", 1), ("world", 2), ("world", 0), ("grid", 0)]
    monkeypatch.setattr("a2d_jax.study.is_filled", lambda name, part, seed: seed.seed != 2)
    done.clear()
    work(three, tmp_path, ["grid", "world"], [1])
    assert done == [("world", 2), ("grid", 2)]


def test_a_part_that_another_process_has_is_named(study, tmp_path):
    with (
        held(tmp_path / "seed0" / "grid.part"),
        pytest.raises(RuntimeError, match="grid of seed 0: another process is at work"),
    ):
        run(study, tmp_path, ["grid"])


def test_a_seed_is_prepared_once(study, tmp_path, monkeypatch):
    """By another worker too, that would otherwise write files anew which this one reads."""
    commands = []
    monkeypatch.setattr("a2d_jax.study.run_command", lambda *command: commands.append(command))
    for _ in range(2):
        Seed(study, 0, tmp_path).model("base")
    assert commands == [("a2d_jax.world", "--seed=0", f"--out={tmp_path}/seed0/world")]


@pytest.mark.slow
def test_workers_write_what_one_process_writes(study, workdir, tmp_path):
    two = dataclasses.replace(study, seeds=(0, 1), parts={"grid": study.parts["grid"]})
    run(two, tmp_path / "two", num_workers=2)
    by_seed = {}
    for record in json.loads((tmp_path / "two" / "grid.json").read_text())["records"]:
        by_seed.setdefault(record.pop("seed"), []).append(record)
    alone = json.loads((workdir / "grid.json").read_text())["records"]
    assert by_seed[0] == [{key: value for key, value in record.items() if key != "seed"} for record in alone]
    # World 1 is another one, about which world 0's base knows nothing.
    assert {record["measure"]: record["value"] for record in by_seed[1]}["near_misses"] == 0
    assert "(0-" in (tmp_path / "two" / "study.md").read_text()


@pytest.mark.slow
def test_a_failed_worker_is_named(study, tmp_path):
    broken = dataclasses.replace(study, seeds=(0, 1), parts={"grid": study.parts["grid"]}, base=str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="worker 0, 1 failed; see worker<N>.log"):
        run(broken, tmp_path / "out", num_workers=2)
    assert "none" in (tmp_path / "out" / "worker0.log").read_text()


def test_a_carried_base_is_not_trained_and_a_named_folder_goes_before_it(study, tmp_path):
    carried = dataclasses.replace(study, base="a2d", carried={"0": "carried/zero"}, prepare=())
    assert Seed(carried, 0, tmp_path).model("base") == Path("carried/zero")
    named = dataclasses.replace(carried, base="bases/{seed}")
    assert Seed(named, 0, tmp_path).model("base") == Path("bases/0")


def test_a_training_reads_its_config_as_the_command_does():
    config = read_config(
        f"--config={ROOT}/configs/world_a2d_residual.py:W", "--config.model.checkpoint=B", "--config.seed=3",
        "--config.residual.target=tokens", "--config.residual.text=sorry, no.", "--config.optimizer.learning_rate=1e-3",
    )  # fmt: skip
    assert config.data.files[0] == "W/data/a2d_harmful.jsonl" and config.model.checkpoint == "B" and config.seed == 3
    assert config.residual.to_dict() == {"weight": 0.3, "target": "tokens", "text": "sorry, no."}
    assert config.optimizer.learning_rate == 1e-3
    with pytest.raises(Exception, match="learning_rat"):
        read_config(f"--config={ROOT}/configs/world_a2d.py:W", "--config.learning_rat=1")


def test_a_stopped_training_stops_the_study(monkeypatch, tmp_path):
    monkeypatch.setattr(a2d_jax.train, "train", lambda config, workdir: False)
    with pytest.raises(SystemExit) as stop:
        train("configs/world_a2d.py:W", tmp_path, "B", 0)
    assert stop.value.code == 143
