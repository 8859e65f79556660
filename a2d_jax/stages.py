"""The stages of a study as the commands that a user types: they are printed, and resume.

`demo.py` and `study.py` are rows of them: a program that prepares data, trainings, exports, evaluations. Trainings and
exports run in this process, as their commands would: starting one takes longer than many of these trainings' steps.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

import a2d_jax.export
import a2d_jax.train
from a2d_jax.files import local_path, write_json
from a2d_jax.resume import differences

ROOT = Path(__file__).parents[1]


def run_command(*command: str) -> None:
    """Runs one of the packages' programs in a process of its own, `command` being its module and flags;
    CalledProcessError where it fails."""
    print(f"\n$ python -m {shlex.join(command)}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    subprocess.run([sys.executable, "-m", *command], check=True, env=environment)


def end_on_sigterm() -> None:
    """Makes SIGTERM an exception, as Ctrl-C is, so that a command that runs meanwhile is ended too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def exit_if_stopped(is_complete: bool) -> None:
    """SystemExit where SIGTERM stopped a stage, which saved what it had: what follows would find half of it."""
    if not is_complete:
        raise SystemExit(128 + signal.SIGTERM)


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes in `folder` what its results depend on; entries may be added later, not changed.

    Raises:
      ValueError: the folder holds results of other settings.
    """
    path, settings = local_path(folder) / "settings.json", json.loads(json.dumps(settings, default=str))
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if changes := differences(before, settings, sorted(before.keys() & settings.keys())):
        raise ValueError(f"{folder} was begun with other settings ({changes}); repeat those or take another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, before | settings)


def read_config(*arguments: str) -> config_dict.ConfigDict:
    """The config that a program reads from "--config=FILE", "--config.FIELD=VALUE", ..."""
    values, argv = flags.FlagValues(), ["", *arguments]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def train(config: str, workdir: Path, start: Path | str, seed: int, changes: Sequence[str] = ()) -> Path:
    """A training run; -> its folder.

    Args:
      config: a file of configs/, from the repository's root, with its argument behind a colon where it takes one.
      start: checkpoint to start from.
      changes: fields of the config that differ, "optimizer.learning_rate=1e-3".
    Raises:
      SystemExit: SIGTERM stopped the run, which saved what it had; run again, it goes on.
    """
    arguments = (
        f"--config={ROOT / config}", f"--config.model.checkpoint={start}", f"--config.seed={seed}",
        *(f"--config.{change}" for change in changes),
    )  # fmt: skip
    print(f"\n$ python -m a2d_jax.train {shlex.join([f'--workdir={workdir}', *arguments])}", flush=True)
    exit_if_stopped(a2d_jax.train.train(read_config(*arguments), workdir))
    return workdir


def export(checkpoint: Path, target: Path) -> Path:
    """A Hugging Face folder of a checkpoint; -> the folder."""
    print(f"\n$ python -m a2d_jax.export --checkpoint={checkpoint} --target={target}", flush=True)
    a2d_jax.export.export(checkpoint, target)
    return target
