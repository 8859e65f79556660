"""Command-line flags for every field of `SamplerConfig`, shared by the programs that decode."""

import dataclasses
import typing

from absl import flags

from a2d_jax.sampling import SamplerConfig

_DEFINE = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
_HELP = {
    "gen_length": "masks appended as the response",
    "steps": "forward passes at most",
    "block_length": "response blocks of this length, one after the other; default 32 for LLaDA, one block for Dream",
    "order": "confidence, margin, entropy, left_to_right, right_to_left or random",
    "temperature": "0 takes the most likely token",
    "cfg_scale": "classifier-free guidance",
    "reject_above": "refuse a row whose P([EOS]) at the first step is above this",
    "top_p": "nucleus of this mass (dream method)",
    "top_k": "the k most likely tokens (dream method)",
    "order_temperature": "noise in the order of positions (Dream's alg_temp)",
    "eps": "last point of Dream's time grid",
    "method": "llada or dream rules; default: by the model and the order",
    "ban_eos": "never choose [EOS]",
    "logits_eos_inf": "remove [EOS] from choice and confidence",
    "confidence_eos_eot_inf": "reveal [EOS] and end of turn last; needs --eot_id",
    "eot_id": "end-of-turn id",
    "count_prompt_masks": "masks in the prompt get a share of the steps",
}


def _plain_type(hint) -> type:
    return next(kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None))


def define_sampler_flags(**defaults) -> None:
    """Defines one flag a field, with the field's default or the one given here."""
    hints = typing.get_type_hints(SamplerConfig)
    for field in dataclasses.fields(SamplerConfig):
        default = defaults.get(field.name, field.default)
        _DEFINE[_plain_type(hints[field.name])](field.name, default, _HELP[field.name])


def sampler_config_from_flags() -> SamplerConfig:
    return SamplerConfig(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(SamplerConfig)})
