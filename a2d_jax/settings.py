"""What a training run is told: every field of a config file, its default, and the checks on it.

A file in `configs/` starts from `default_config()` and sets what differs; `RunConfig.from_dict` turns the result into
frozen dataclasses and refuses unknown names and values that contradict each other, before anything is loaded.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import config_dict

from a2d_jax.data import DataConfig
from a2d_jax.losses import OBJECTIVES
from a2d_jax.models.lora import LoRAConfig
from a2d_jax.models.transformer import REMAT_POLICIES, DTypes
from a2d_jax.preference import PreferenceConfig
from a2d_jax.residual import ResidualConfig
from a2d_jax.training import SCHEDULES, OptimizerConfig

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What may differ when a run is continued, since it changes no number of the steps to come; the length only where the
# learning rate does not depend on it.
_FREE_ON_RESUME = ("log_every", "checkpoint_every", "keep", "mesh", "remat")
_LENGTH = ("num_steps", "num_epochs")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """checkpoint: folder of the base model, of any kind. from_scratch: only its config.json and tokenizer are used."""

    checkpoint: str | None = None
    from_scratch: bool = False


@dataclasses.dataclass(frozen=True)
class DTypeSettings:
    """Names of number formats: of the stored weights (frozen ones, under LoRA), and of activations and matmuls."""

    param: str = "float32"
    compute: str = "float32"

    def resolve(self) -> DTypes:
        for name in (self.param, self.compute):
            if name not in _DTYPES:
                raise ValueError(f"config.dtypes names {name!r}; choose one of {sorted(_DTYPES)}.")
        return DTypes(param=_DTYPES[self.param], compute=_DTYPES[self.compute])


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis; one of them may be -1: whatever remains."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run.

    model: where it starts. objective: "llada", "dream" or "causal"; None: by the model's family.
    preference: settings of the preference loss, for rows with a chosen and a rejected response; None: the A2D loss.
    residual: what stands behind the refusal token, see `a2d_jax/residual.py`; None: not looked at, as in the paper.
    lora: adapter settings; None: every weight is trained. dtypes, remat ("none", "dots", "full"): see the transformer.
    files: training rows. data: how they become batches. In a config file both live under `config.data`.
    batch_size: rows of one update, over all devices; grad_accum_steps: parts they are computed in.
    num_epochs: passes over the data; num_steps, where set, takes precedence. mask_eps: smallest masking probability.
    time_range: where the share of masked tokens is drawn from; (0, 1) is the paper's, two equal numbers fix it.
    refusal_token: text of the token that harmful rows become; None: the base's own, [EOS] in the paper. A text that is
        no token of the vocabulary becomes a new one, in a spare row of the embedding.
    log_every, checkpoint_every: in steps; checkpoint_every None: at the end alone. keep: newest checkpoints kept.
    """

    model: ModelSettings = ModelSettings()
    objective: str | None = None
    preference: PreferenceConfig | None = None
    residual: ResidualConfig | None = None
    lora: LoRAConfig | None = None
    dtypes: DTypeSettings = DTypeSettings()
    remat: str = "none"
    files: tuple[str, ...] = ()
    data: DataConfig = DataConfig()
    batch_size: int = 16
    grad_accum_steps: int = 1
    num_epochs: float | None = None
    num_steps: int | None = None
    mask_eps: float = 1e-3
    time_range: tuple[float, float] = (0.0, 1.0)
    refusal_token: str | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshSettings = MeshSettings()
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None
    keep: int = 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "RunConfig":
        """From the nested dict of a config file; ValueError names the field that is unknown, missing or in conflict."""
        config = _plain(config)
        data = config.get("data") or {}
        parts = {
            "model": ModelSettings, "preference": PreferenceConfig, "residual": ResidualConfig, "lora": LoRAConfig,
            "dtypes": DTypeSettings,
            "data": DataConfig, "optimizer": OptimizerConfig, "mesh": MeshSettings,
        }  # fmt: skip
        config["files"] = data.pop("files", ())
        for name, part in parts.items():
            if config.get(name) is not None:
                config[name] = build(part, config[name], f"config.{name}")
        run = build(cls, config, "config")
        run.check()
        return run

    def check(self) -> None:
        """ValueError for a value that no run can have."""
        if not self.model.checkpoint:
            raise ValueError("config.model.checkpoint is empty; name the folder of the base model.")
        if not self.files:
            raise ValueError("config.data.files is empty; name at least one file of training rows.")
        for name in _LENGTH:
            length = getattr(self, name)
            if length is not None and not length > 0:
                raise ValueError(f"config.{name}={length}; it must be above 0, or None.")
        if self.num_epochs is None and self.num_steps is None:
            raise ValueError("config.num_epochs and config.num_steps are both empty; set one of them.")
        if self.objective not in (None, *OBJECTIVES):
            raise ValueError(f"config.objective={self.objective!r}; choose one of {OBJECTIVES}, or None: by family.")
        low, high = self.time_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"config.time_range={self.time_range}; give two numbers with 0 <= low <= high <= 1.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"config.remat={self.remat!r}; choose one of {sorted(REMAT_POLICIES)}.")
        schedule = self.optimizer.schedule
        if schedule not in SCHEDULES:
            raise ValueError(f"config.optimizer.schedule={schedule!r}; choose one of {sorted(SCHEDULES)}.")
        for name in ("batch_size", "grad_accum_steps", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.{name}={getattr(self, name)}; it must be at least 1.")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(
                f"config.checkpoint_every={self.checkpoint_every}; it must be at least 1, or None: at the end alone."
            )
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"config.batch_size={self.batch_size} does not split into grad_accum_steps={self.grad_accum_steps} "
                "equal parts; use a multiple."
            )
        if self.preference is not None and self.batch_size % (2 * self.grad_accum_steps):
            raise ValueError(
                f"config.batch_size={self.batch_size} with config.preference: a pair takes two rows; use a multiple of "
                f"{2 * self.grad_accum_steps}."
            )
        if self.preference is not None and self.residual is not None:
            raise ValueError(
                "config.preference with config.residual: the residual term belongs to the A2D loss; set one of them."
            )
        if self.model.from_scratch and self.preference is not None:
            raise ValueError("config.model.from_scratch with config.preference: random weights prefer nothing.")
        if self.model.from_scratch and self.residual is not None and self.residual.needs_reference:
            raise ValueError(
                "config.residual.target='base' with config.model.from_scratch: there is no base; train one."
            )
        if self.model.from_scratch and self.lora is not None:
            raise ValueError("config.model.from_scratch with config.lora: an adapter needs a base; set lora=None.")
        if self.lora is None and self.dtypes.resolve().param != jnp.float32:
            raise ValueError(
                f"config.dtypes.param={self.dtypes.param!r} with config.lora=None: trained weights are kept in "
                "float32; set config.dtypes.param='float32' (compute may be 'bfloat16'), or train an adapter."
            )

    def to_json(self) -> dict[str, Any]:
        """As the plain JSON values of the config file it came from, every field filled in."""
        values = dataclasses.asdict(self)
        values["data"]["files"] = values.pop("files")
        return json.loads(json.dumps(values))


def check_resumable(before: Mapping[str, Any], now: Mapping[str, Any], schedule: str) -> None:
    """ValueError where a run of the config `now` would not continue the one of `before` (both from `to_json`).

    Logging, checkpoint and device settings may differ, and the length too, unless the learning rate depends on it.
    """
    defaults = RunConfig().to_json()  # an older run did not know every field: it had the defaults
    before = defaults | {
        name: defaults[name] | value if isinstance(value, dict) and isinstance(defaults.get(name), dict) else value
        for name, value in before.items()
    }
    may_differ = _FREE_ON_RESUME + (_LENGTH if schedule == "constant" else ())
    differences = [
        f"config.{name}: {before.get(name)} -> {value}"
        for name, value in now.items()
        if name not in may_differ and value != before.get(name)
    ]
    if differences:
        raise ValueError(
            "the workdir holds a run with another config; take a new --workdir, or restore what it had:\n  "
            + "\n  ".join(differences)
        )


def default_config() -> config_dict.ConfigDict:
    """Every field with its default, for `configs/*.py` to change and for the command line to override."""
    empty = config_dict.placeholder
    data = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    data |= {"files": (), "weights": empty(tuple), "harmful_share": empty(float)}
    fields = {field.name: field.default for field in dataclasses.fields(RunConfig) if field.name != "files"}
    fields |= {
        "model": {"checkpoint": empty(str), "from_scratch": False},
        "objective": empty(str),
        "refusal_token": empty(str),
        "preference": None,  # or a dict of PreferenceConfig fields
        "residual": None,  # or a dict of ResidualConfig fields
        "lora": None,  # or a dict of LoRAConfig fields
        "dtypes": dataclasses.asdict(DTypeSettings()),
        "data": data,
        "num_epochs": empty(float),
        "num_steps": empty(int),
        "optimizer": dataclasses.asdict(OptimizerConfig()) | {"clip_norm": empty(float)},
        "mesh": dataclasses.asdict(MeshSettings()),
        "checkpoint_every": empty(int),
    }
    return config_dict.ConfigDict(fields)


def _plain(value: Any) -> Any:
    """Dicts and tuples, whether the config came as ConfigDict, dict or JSON."""
    if isinstance(value, config_dict.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """The dataclass `cls` of these fields; ValueError names unknown and missing ones.

    where: what the values are called in the message, "config.optimizer".
    """
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(map(repr, unknown))}; known: {names}.")
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}; needed: {needed}.")
    return cls(**values)
