"""Masked-diffusion models in EleutherAI's lm-evaluation-harness, as the model `a2d_jax`.

    python -m a2d_jax.lm_eval run --model a2d_jax --model_args checkpoint=DIR,mc_num=128 --tasks arc_challenge

This is the harness's own command; only the model is added. The entry point "a2d_jax" of the group "lm_eval.models"
names the class, so that harnesses that read this group have the model under their own command too, `lm_eval run --model
a2d_jax` (release 0.4.13 reads no group yet). From Python: `import a2d_jax.lm_eval`, then `lm_eval.simple_evaluate`.

    loglikelihood           Monte-Carlo bound, `mc_num` samples a request, see `a2d_jax/likelihood.py`
    loglikelihood_rolling   the same over windows of `max_length` tokens, each after one token of context
    generate_until          decoding by `a2d_jax/batching.py`

The random numbers of a likelihood come from the seed and the request's own text: a score does not depend on what else
is asked, or in which order. Every setting that moves a score stands in the results, under "config", "a2d_jax".
"""

import dataclasses
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval.models  # noqa: F401  fills the registry with the harness's own models first
import numpy as np
from absl import logging
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from a2d_jax.batching import buckets_up_to, generate_many
from a2d_jax.config import load_config
from a2d_jax.folders import hf_folder
from a2d_jax.likelihood import log_likelihood
from a2d_jax.pretrained import load_pretrained, weights_fingerprint
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import infill
from a2d_jax.sharding import make_mesh, under
from a2d_jax.tokenizer import TEMPLATE_VARIABLES, load_tokenizer

GROUP = "lm_eval.models"
_PAD_MULTIPLE = 32  # row lengths of likelihoods, so that few programs are compiled
_SAMPLER_FIELDS = {field.name for field in dataclasses.fields(SamplerConfig)} - {"monitor"}


def _parse_mesh(sizes: str | None) -> Mesh | None:
    if sizes is None:
        return None
    try:
        data, fsdp, tensor = map(int, sizes.split("x"))
    except ValueError as error:
        raise ValueError(f"mesh={sizes}; give the sizes of data, fsdp and tensor, such as 1x1x4.") from error
    return make_mesh(data, fsdp, tensor)


@register_model("a2d_jax")
class A2DLM(LM):
    """A checkpoint of any kind that `a2d_jax.load_pretrained` reads.

    Args:
      checkpoint: folder.
      adapter: PEFT folder to attach.
      dtype: "float32" or "bfloat16", of weights and activations.
      mesh: sizes data x fsdp x tensor of the device mesh, such as "1x1x4"; default: the first device.
      batch_size: rows decoded together.
      max_length: tokens of a row; longer contexts lose their beginning. Default: what the model takes.
      seed: of all random numbers.
      mc_num, mc_batch_size: samples of a likelihood, and how many of them are stratified (and computed) together.
      likelihood_cfg_scale: classifier-free guidance of likelihoods.
      check_greedy: whether likelihoods also say if greedy decoding would have written the same, at the cost of one
        pass a token; without, the answer is always no, and metrics that use it mean nothing.
      sampler: any field of `SamplerConfig`. Where gen_length or steps is not given, a task's max_gen_toks, rounded up
        to whole blocks, is the length, with one pass a token.
    """

    def __init__(
        self,
        checkpoint: str,
        adapter: str | None = None,
        dtype: str = "bfloat16",
        mesh: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        seed: int = 0,
        mc_num: int = 128,
        mc_batch_size: int = 16,
        likelihood_cfg_scale: float = 0.0,
        check_greedy: bool = True,
        device: str | None = None,
        max_batch_size: int | None = None,
        **sampler: Any,
    ):
        super().__init__()
        unknown = sorted(set(sampler) - _SAMPLER_FIELDS)
        if unknown:
            raise ValueError(f"model_args {unknown}: no such settings; decoding has {sorted(_SAMPLER_FIELDS)}.")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype}; choose float32 or bfloat16.")
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size={batch_size}; give a number.")
        if device is not None or max_batch_size is not None:
            logging.warning("device and max_batch_size play no part: JAX chooses the device, batch_size is fixed")
        if mc_num % mc_batch_size:
            raise ValueError(f"mc_num={mc_num} is no multiple of mc_batch_size={mc_batch_size}.")
        self._tokenizer = load_tokenizer(hf_folder(checkpoint), requires_mask=True)
        self._mesh = _parse_mesh(mesh)
        self._model = load_pretrained(checkpoint, self._mesh, jnp.dtype(dtype), adapter)
        self._max_length = max_length or load_config(hf_folder(checkpoint)).max_length or 4096
        self._seed, self._batch_size, self._check_greedy = seed, int(batch_size), check_greedy
        self._mc = {"mc_num": mc_num, "batch_size": mc_batch_size, "cfg_scale": likelihood_cfg_scale}
        self._sampler = sampler
        SamplerConfig(**sampler)  # wrong values are refused now, not after an hour of likelihoods
        self._settings = {
            "checkpoint": os.fspath(checkpoint),
            "adapter": adapter,
            "weights": weights_fingerprint(self._model),
            "dtype": dtype,
            "max_length": self._max_length,
            "seed": seed,
            "mc_num": mc_num,
            "mc_batch_size": mc_batch_size,
            "likelihood_cfg_scale": likelihood_cfg_scale,
            "check_greedy": check_greedy,
            "samplers": [],  # as they were used, filled in while requests come
            "num_truncated": 0,
            "jax": jax.__version__,
            "backend": jax.default_backend(),
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the scores."""
        return {"a2d_jax": self._settings}

    # -- likelihood ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        results = []
        for request in tqdm(requests, "likelihoods", disable=disable_tqdm):
            context, continuation = request.args
            prompt, answer = self._encode_pair(context, continuation)
            prompt = self._fit(prompt, len(answer))
            result = self._log_likelihood(prompt, answer), self._check_greedy and self._is_greedy(prompt, answer)
            self.cache_hook.add_partial("loglikelihood", request.args, result)
            results.append(result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        results = []
        for request in tqdm(requests, "texts", disable=disable_tqdm):
            (text,) = request.args
            tokenizer = self._tokenizer
            prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            windows = get_rolling_token_windows(tokenizer.encode(text), prefix, self._max_length - 1, context_len=1)
            pairs = map(make_disjoint_window, windows)
            result = sum(self._log_likelihood(self._fit(prompt, len(answer)), answer) for prompt, answer in pairs)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
            results.append(float(result))
        return results

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation, cut where the text of both together is cut; spaces begin a continuation."""
        num_spaces = len(context) - len(context.rstrip())
        if num_spaces:
            context, continuation = context[:-num_spaces], context[-num_spaces:] + continuation
        tokenizer = self._tokenizer
        if not context:
            prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            return [prefix], tokenizer.encode(continuation)
        prompt, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
        return both[: len(prompt)], both[len(prompt) :]

    def _log_likelihood(self, prompt: list[int], answer: list[int]) -> float:
        key = self._key(repr((prompt, answer)))
        with under(self._mesh):
            return log_likelihood(self._model, prompt, answer, **self._mc, key=key, multiple_of=_PAD_MULTIPLE)

    def _is_greedy(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether filling the answer's masks, the surest one first, brings the answer."""
        tokens = prompt + [self._tokenizer.mask_id] * len(answer)
        pad = -len(tokens) % _PAD_MULTIPLE
        row = np.array([[self._tokenizer.pad_id] * pad + tokens], np.int32)
        is_real = np.arange(row.shape[1])[None] >= pad
        length = 1 << (len(answer) - 1).bit_length()  # steps are compiled in; more than there are masks do no harm
        filled = infill(self._model, row, SamplerConfig(steps=length, method="llada"), attention_mask=is_real)
        return np.asarray(filled.tokens)[0, -len(answer) :].tolist() == answer

    def _fit(self, prompt: list[int], num_answer: int) -> list[int]:
        """The prompt's end, as much as there is room for; ValueError where the answer alone is too long."""
        room = self._max_length - num_answer
        if room < 1:
            raise ValueError(
                f"an answer of {num_answer} tokens does not fit into {self._max_length}; raise max_length."
            )
        self._settings["num_truncated"] += len(prompt) > room
        return prompt[-room:]

    def _key(self, text: str) -> jax.Array:
        digest = hashlib.sha256(text.encode()).digest()
        return jax.random.fold_in(jax.random.key(self._seed), int.from_bytes(digest[:4], "little"))

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[SamplerConfig, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._config(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        progress = tqdm(desc="answers", total=len(requests), disable=disable_tqdm)
        for config, indices in groups.items():
            self._note(config)
            prompts = [self._fit(self._tokenizer.encode(requests[i].args[0]), config.gen_length) for i in indices]
            answers = self._generate(prompts, config, progress.update)
            for index, tokens, is_rejected in zip(indices, *answers, strict=True):
                texts[index] = "" if is_rejected else self._text(tokens, requests[index].args[1].get("until"))
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        progress.close()
        return texts

    def _generate(
        self, prompts: list[list[int]], config: SamplerConfig, report: Callable[[int], Any]
    ) -> tuple[list[np.ndarray], list[bool]]:
        """The responses' tokens, and whether the monitor stopped them. Equal prompts get equal answers."""
        key = jax.random.key(self._seed) if config.needs_key else None
        buckets = buckets_up_to(self._max_length)
        results = generate_many(
            self._model, prompts, config, key, batch_size=self._batch_size, buckets=buckets, report=report
        )
        tokens = [np.asarray(result.tokens)[-config.gen_length :] for result in results]
        return tokens, [bool(result.is_rejected) for result in results]

    def _config(self, asked: Mapping[str, Any]) -> SamplerConfig:
        """How to decode a request: the model's settings, and of the task's the length and the temperature."""
        settings = dict(self._sampler)
        length = asked.get("max_gen_toks") or asked.get("max_tokens") or 256
        if "gen_length" not in settings:
            default = 32 if self._model.config.family == "llada" else length
            block_length = min(settings.get("block_length") or default, length)
            settings["gen_length"] = -(-length // block_length) * block_length
            settings["block_length"] = block_length
        settings.setdefault("steps", settings["gen_length"])
        if "temperature" not in settings and asked.get("do_sample"):
            settings["temperature"] = float(asked.get("temperature") or 0.0)
        return SamplerConfig(**settings)

    def _note(self, config: SamplerConfig) -> None:
        settings = dataclasses.asdict(config.resolve(self._model.config.family))
        if settings not in self._settings["samplers"]:
            self._settings["samplers"].append(settings)

    def _text(self, tokens: np.ndarray, until: str | Sequence[str] | None) -> str:
        """The text up to the end of the turn or the first stop text."""
        tokenizer = self._tokenizer
        ends = np.flatnonzero(np.isin(tokens, [i for i in (tokenizer.eos_id, tokenizer.eot_id) if i is not None]))
        if len(ends):
            tokens = tokens[: ends[0]]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, [until] if isinstance(until, str) else list(until or []), None)

    # -- chat templates -----------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.hf.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **TEMPLATE_VARIABLES,
        )

    @property
    def tokenizer_name(self) -> str:
        return self._settings["checkpoint"].replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.hf.chat_template if chat_template else ""


def register_entry_points() -> None:
    """What newer harnesses do themselves: every model of the group that the registry does not have yet."""
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        if entry_point.name not in model_registry:
            model_registry.register(entry_point.name, target=entry_point.value)


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    register_entry_points()
    cli_evaluate()


if __name__ == "__main__":
    main()
