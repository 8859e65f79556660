"""Command-line flags for every field of `SamplerConfig`, shared by the programs that decode."""

import dataclasses
import os
import typing

from absl import flags

from a2d_jax.folders import hf_folder
from a2d_jax.monitor import MONITORS
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.tokenizer import load_tokenizer

flags.disclaim_key_flags()  # --help shows them among those of the program that defines them

_DEFINE = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
_HELP = {
    "gen_length": "masks appended as the response",
    "steps": "forward passes at most",
    "block_length": "response blocks of this length, one after the other; default 32 for LLaDA, one block for Dream",
    "order": "confidence, margin, entropy, left_to_right, right_to_left or random",
    "temperature": "0 takes the most likely token",
    "cfg_scale": "classifier-free guidance",
    "reject_above": "refuse a row whose P([EOS]) at the first step is above this; --monitor looks longer",
    "cache": "prefix or dual: keys and values of other blocks are kept while one is filled (an approximation)",
    "threshold": "reveal every token at least so probable at once",
    "factor": "reveal the n most probable tokens, the largest n with (n + 1)(1 - probability of the n-th) < factor",
    "stop_after_eos": "a row is done once a block ended in [EOS]",
    "top_p": "nucleus of this mass (dream method)",
    "top_k": "the k most likely tokens (dream method)",
    "order_temperature": "noise in the order of positions (Dream's alg_temp)",
    "eps": "last point of Dream's time grid",
    "method": "llada or dream rules; default: by the model and the order",
    "ban_eos": "never choose [EOS]",
    "ban_eot": "never choose the end of turn",
    "logits_eos_inf": "remove [EOS] from choice and confidence",
    "confidence_eos_eot_inf": "reveal [EOS] and end of turn last",
    "eot_id": "end-of-turn id; default: the tokenizer's",
    "count_prompt_masks": "masks in the prompt get a share of the steps",
}


def _plain_type(hint) -> type:
    return next(kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None))


def define_sampler_flags(**defaults) -> None:
    """Defines one flag a field, with the field's default or the one given here."""
    hints = typing.get_type_hints(SamplerConfig)
    for field in dataclasses.fields(SamplerConfig):
        if field.name == "monitor":
            continue
        default = defaults.get(field.name, field.default)
        _DEFINE[_plain_type(hints[field.name])](field.name, default, _HELP[field.name])
    flags.DEFINE_enum(
        "monitor",
        "first_step",
        sorted(MONITORS),
        "what --reject_above is compared with: P([EOS]) at the left-most mask "
        "at the first step or at any, or the largest of any masked position of the block at any step",
    )


def sampler_config_from_flags(checkpoint: str | os.PathLike | None = None) -> SamplerConfig:
    """The settings that the flags give; where they need the end of turn, the tokenizer of `checkpoint` names it."""
    names = [field.name for field in dataclasses.fields(SamplerConfig) if field.name != "monitor"]
    settings = {name: flags.FLAGS[name].value for name in names}
    if settings["eot_id"] is None and (settings["ban_eot"] or settings["confidence_eos_eot_inf"]) and checkpoint:
        settings["eot_id"] = load_tokenizer(hf_folder(checkpoint)).eot_id
    name = flags.FLAGS.monitor
    if name != "first_step":
        threshold = settings.pop("reject_above")
        if threshold is None:
            raise ValueError(f"--monitor={name} has no threshold; give --reject_above.")
        settings["monitor"] = MONITORS[name](threshold)
    return SamplerConfig(**settings)
