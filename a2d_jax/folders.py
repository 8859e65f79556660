"""What kind of checkpoint a folder holds, told by its files.

Of the kinds that `pretrained.py` lists, the first that matches is loaded: a training folder, an Orbax folder, a format
of another package, and last a Hugging Face folder.
"""

import importlib.metadata
import os
from pathlib import Path

HF_FOLDER = "hf"  # in a converted or training folder: config.json, tokenizer and all that is no weight
PARAMS_FOLDER = "params"  # in a converted folder: the Orbax checkpoint
TRAIN_CONFIG_NAME = "train_config.json"
FORMATS_GROUP = "a2d_jax.checkpoint_formats"


def hf_folder(path: str | os.PathLike) -> Path:
    """The folder with config.json and the tokenizer of a checkpoint of any kind."""
    inner = Path(path) / HF_FOLDER
    return inner if inner.is_dir() else Path(path)


def is_training_folder(path: str | os.PathLike) -> bool:
    return (Path(path) / TRAIN_CONFIG_NAME).is_file()


def is_orbax_folder(path: str | os.PathLike) -> bool:
    return (Path(path) / PARAMS_FOLDER).is_dir()


def other_format(path: str | os.PathLike):
    """What another package's entry point names for its kind of folder; None for all other folders."""
    for entry_point in importlib.metadata.entry_points(group=FORMATS_GROUP):
        checkpoint_format = entry_point.load()
        if checkpoint_format.matches(Path(path)):
            return checkpoint_format
    return None


def check_target(folder: Path, is_other_format: bool) -> None:
    """ValueError where the folder holds a checkpoint that would be loaded instead of the files written into it.

    Args:
      is_other_format: the files are of another package's format.
    """
    if is_training_folder(folder):
        kind = f"a training run ({TRAIN_CONFIG_NAME})"
    elif is_orbax_folder(folder):
        kind = f"a converted checkpoint ({PARAMS_FOLDER}/)"
    elif not is_other_format and other_format(folder) is not None:
        kind = "a checkpoint of another format, such as a packed one"
    else:
        return
    raise ValueError(f"{folder} holds {kind}, which would be loaded instead of what is written; choose another folder.")
