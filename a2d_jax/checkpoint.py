"""Checkpoints of a training folder: saved beside the run, kept whole, restored onto any mesh.

    DIR/hf/                  every file of the base's folder that is not weights
    DIR/train_config.json    the run's config, every field filled in
    DIR/checkpoints/<step>/  Orbax: params (what is trained), opt_state, meta (JSON: step, data iterator)

A checkpoint gets its name when its last byte is written, and older ones go only after that: whatever stops the program,
the newest named folder is good. An adapter's base weights are not copied; train_config.json names their folder.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from a2d_jax.files import as_path
from a2d_jax.folders import TRAIN_CONFIG_NAME
from a2d_jax.training import TrainState

CHECKPOINTS_FOLDER = "checkpoints"


def complete_steps(folder: epath.Path) -> list[int]:
    """Steps whose checkpoints are whole: an unfinished one has another name or, in an object store, no commit file."""
    return sorted(ocp.utils.checkpoint_steps(folder))


class Checkpoints:
    """The checkpoints of one training folder. Saving runs beside the next steps; `wait` before relying on it."""

    def __init__(self, workdir: str | os.PathLike, keep: int = 1):
        self.folder = as_path(workdir) / CHECKPOINTS_FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps that could be continued from now."""
        return complete_steps(self.folder)

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Begins to write the state after `step` updates; the arrays may be donated as soon as this returns."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            meta=ocp.args.JsonSave({"step": step, "data": data_state}),
        )
        self._guard(lambda: self._manager.save(step, args=items, force=True))

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, state of the data iterator) of a step, put onto the shardings that `abstract` carries."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
            meta=ocp.args.JsonRestore(),
        )
        with _named(self.folder / str(step)):
            items = self._manager.restore(step, args=items)
        counters = jax.device_put((np.int32(step), np.bool_(True)), abstract.step.sharding)
        return TrainState(items.params, items.opt_state, *counters), items.meta["data"]

    def check(self) -> None:
        """Raises what went wrong in the background, if anything did."""
        self._guard(self._manager.check_for_errors)

    def wait(self) -> None:
        """Returns when everything begun is on disk."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self._manager.close()

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # the writer reports a full disk as ValueError, OSError or its own kinds
            raise OSError(
                f"a checkpoint could not be written to {self.folder}: {error}\n"
                f"Complete ones there are untouched (steps {self.steps()}). Free space or mend the disk, then run the "
                "same command again: it continues from the newest."
            ) from error


@contextlib.contextmanager
def _named(checkpoint: epath.Path) -> Iterator[None]:
    """Errors while reading a checkpoint name it."""
    try:
        yield
    except Exception as error:  # damage comes as ValueError, OSError, KeyError, or Exception itself
        reason = str(error).partition("\n")[0][:300]  # what follows may be the store's settings, page by page
        raise ValueError(
            f"checkpoint {checkpoint} cannot be restored ({reason}). If it is damaged, remove it and run again: the "
            "run continues from the one before."
        ) from error


def abstract_arrays(shapes: Any, shardings: Any) -> Any:
    """Shapes with the places where the arrays shall be restored."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def read_train_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """`train_config.json` of a training folder."""
    path = as_path(workdir) / TRAIN_CONFIG_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give a folder written by a2d_jax.train.") from error


def restore_params(workdir: str | os.PathLike, step: int | None, abstract: Any) -> Any:
    """The trained parameters of a step (None: the newest), put where `abstract` says.

    Raises:
      ValueError: no such step, or a damaged checkpoint.
    """
    folder = as_path(workdir) / CHECKPOINTS_FOLDER
    steps = complete_steps(folder)
    if not steps or step not in (None, *steps):
        raise ValueError(f"{folder} holds no checkpoint of step {step}; complete are those of the steps {steps}.")
    checkpoint = folder / str(steps[-1] if step is None else step)
    with _named(checkpoint), ocp.StandardCheckpointer() as reader:
        return reader.restore(checkpoint / "params", abstract)
