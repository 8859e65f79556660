"""Configs of the steps other than training, and the architecture that a config's checkpoint names.

    sample      one pass of `a2d_jax.generate`
    calibrate   one layer of `odlri_jax.calibrate`
    decompose   one stack of `odlri_jax.compress`: a matrix of the largest shape on each chip

A training config is that of `a2d_jax.settings`; it needs nothing more.
"""

import dataclasses
import json
from pathlib import Path

from ml_collections import config_dict

from a2d_jax.config import ModelConfig, load_config
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.settings import DTypeSettings, MeshSettings
from odlri_jax.decompose_config import DecomposeConfig

STEPS = ("train", "sample", "calibrate", "decompose")
ARCHITECTURES = Path(__file__).parents[1] / "configs" / "models"  # config.json of the models that configs/ name


def _base(checkpoint: str, step: str) -> dict:
    return {
        "step": step,
        "model": {"checkpoint": checkpoint},
        "dtypes": dataclasses.asdict(DTypeSettings("bfloat16", "bfloat16")),
        "mesh": dataclasses.asdict(MeshSettings()),
    }


def sample_config(
    checkpoint: str, batch_size: int, prompt_length: int, packed: DecomposeConfig | None = None, **sampler
) -> config_dict.ConfigDict:
    """Decoding of `batch_size` rows; `packed`: what every block was compressed with; `sampler`: of SamplerConfig."""
    sizes = {"batch_size": batch_size, "prompt_length": prompt_length}
    sizes["packed"] = None if packed is None else dataclasses.asdict(packed)
    return config_dict.ConfigDict(
        _base(checkpoint, "sample") | sizes | {"sampler": dataclasses.asdict(SamplerConfig(**sampler))}
    )


def compress_config(checkpoint: str, *, batch_size: int, length: int, **decompose) -> config_dict.ConfigDict:
    """Calibration on batches of `batch_size` windows, then decomposition; `decompose`: fields of DecomposeConfig."""
    sizes = {"batch_size": batch_size, "length": length, "layers_per_group": 1}
    return config_dict.ConfigDict(
        _base(checkpoint, "decompose")
        | {"calibrate": sizes, "decompose": dataclasses.asdict(DecomposeConfig(**decompose))}
    )


def architecture(checkpoint: str) -> ModelConfig:
    """The model of a checkpoint folder, or of the file in `configs/models/` that has the folder's name."""
    if (Path(checkpoint) / "config.json").is_file():
        return load_config(checkpoint)
    path = ARCHITECTURES / f"{Path(checkpoint).name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in ARCHITECTURES.glob("*.json"))
        raise ValueError(
            f"config.model.checkpoint={checkpoint!r} is no folder with a config.json, and no architecture of that name "
            f"is known; give a Hugging Face folder (config.json is enough), or end the path in one of {known}."
        )
    return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
