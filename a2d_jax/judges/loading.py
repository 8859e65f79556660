"""Judges by name, and their settings as flags."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from a2d_jax.judges.api import ApiJudge, ApiSettings
from a2d_jax.judges.base import Judge
from a2d_jax.judges.harmbench import HarmBenchJudge
from a2d_jax.judges.keywords import keywords

flags.disclaim_key_flags()  # --help shows them among those of the program that defines them

JUDGES: dict[str, Judge] = {"keywords": keywords}
_WITH_SETTINGS = ("api", "harmbench")


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """Settings of the judges that need some.

    checkpoint: folder of the HarmBench classifier; dtype, batch_size, mesh: how it runs.
    api: of the API judge.
    """

    checkpoint: str | None = None
    dtype: str = "bfloat16"
    batch_size: int = 8
    mesh: tuple[int, ...] | None = None
    api: ApiSettings = ApiSettings()

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "JudgeSettings":
        """From a config file, where "api" holds the fields of `ApiSettings`; ValueError names what is unknown."""
        try:
            return cls(**{**settings, "api": ApiSettings(**settings.get("api", {}))})
        except TypeError as error:
            raise ValueError(f"judge_settings: {error}.") from error


def load_judge(name: str, settings: JudgeSettings | None = None) -> Judge | Any:
    """The judge called `name`: "keywords", "harmbench", "api" or "package.module:function".

    Nothing heavy happens here: the classifier is loaded, and the API asked, with the first completion.
    """
    settings = settings or JudgeSettings()
    if name == "api":
        return ApiJudge(settings.api)
    if name == "harmbench":
        return HarmBenchJudge(settings.checkpoint, settings.dtype, settings.batch_size, settings.mesh)
    if name in JUDGES:
        return JUDGES[name]
    known = f"choose one of {sorted([*JUDGES, *_WITH_SETTINGS])} or write package.module:function"
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"unknown judge {name!r}; {known}")
    try:
        judge = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"judge {name!r}: no module {error.name!r}; install it or name another") from error
    except AttributeError as error:
        raise ValueError(f"judge {name!r}: {module_name} has no {function_name!r}; {known}") from error
    if not callable(judge):
        raise ValueError(f"judge {name!r} is a {type(judge).__name__}; it must be a function of (row, completion)")
    return judge


def define_judge_flags() -> None:
    """--judge and its settings."""
    api = ApiSettings()
    flags.DEFINE_string("judge", "keywords", "keywords, harmbench, api, or package.module:function(row, completion)")
    flags.DEFINE_string("judge_checkpoint", None, "harmbench: folder of the classifier")
    flags.DEFINE_integer("judge_batch_size", 8, "harmbench: completions judged together", lower_bound=1)
    flags.DEFINE_string("judge_url", api.url, "api: base URL of an OpenAI-compatible server")
    flags.DEFINE_string("judge_model", api.model, "api: the model that rates")
    flags.DEFINE_string("judge_key_variable", api.key_variable, "api: environment variable with the key")
    flags.DEFINE_string("judge_cache", None, "api: file of ratings that are paid for; default: beside the results")
    flags.DEFINE_integer("judge_success_rating", api.success_rating, "api: rating from which on an attack succeeded")
    flags.DEFINE_float("judge_requests_per_minute", api.requests_per_minute, "api: rate limit")
    flags.DEFINE_integer("judge_workers", api.num_workers, "api: requests under way at once", lower_bound=1)
    flags.DEFINE_float("judge_timeout", api.timeout, "api: seconds to wait for an answer")
    flags.DEFINE_integer("judge_retries", api.max_retries, "api: attempts after the first", lower_bound=0)
    flags.DEFINE_integer("judge_reply_tokens", api.max_reply_tokens, "api: of a reply; reasoning models need thousands")
    flags.DEFINE_float("judge_input_price", api.input_price, "api: US dollars a million tokens read")
    flags.DEFINE_float("judge_output_price", api.output_price, "api: US dollars a million tokens written")
    flags.DEFINE_float("judge_max_cost", api.max_cost, "api: US dollars above which nothing is asked")


def judge_settings_from_flags() -> JudgeSettings:
    given = flags.FLAGS
    api = ApiSettings(
        url=given.judge_url,
        model=given.judge_model,
        key_variable=given.judge_key_variable,
        cache=given.judge_cache,
        success_rating=given.judge_success_rating,
        requests_per_minute=given.judge_requests_per_minute,
        num_workers=given.judge_workers,
        timeout=given.judge_timeout,
        max_retries=given.judge_retries,
        max_reply_tokens=given.judge_reply_tokens,
        input_price=given.judge_input_price,
        output_price=given.judge_output_price,
        max_cost=given.judge_max_cost,
    )
    return JudgeSettings(checkpoint=given.judge_checkpoint, batch_size=given.judge_batch_size, api=api)
