"""The wire format: OpenAI's chat completions as far as a masked-diffusion model can honour them.

A field that this server cannot honour is an error, not silence, unless it holds its neutral value (n=1, top_p=1).
Contents are text. Control tokens written in them are refused: they would end the user's turn or begin the answer, and
the mask token would turn the request into a template to fill, which is how attacks on these models are written.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from a2d_jax.tokenizer import Tokenizer, has_mask_runs

ROLES = ("system", "developer", "user", "assistant")
NEUTRAL = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "top_p": (1,), "frequency_penalty": (0,),
    "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
READ = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "stream",
    "stream_options",
)  # fmt: skip


class RequestError(Exception):
    """An answer other than 200: its status, message, and the field that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request that has been checked."""

    messages: list[dict[str, str]]
    max_tokens: int | None
    temperature: float
    seed: int | None
    stop: tuple[str, ...]
    is_stream: bool
    has_usage_chunk: bool


def parse_request(body: bytes, model_name: str, temperatures: Sequence[float]) -> ChatRequest:
    """The request in a body; RequestError with the field's name where something is wrong.

    Args:
      temperatures: those that may be asked for (each compiles a program); the first is the default.
    """
    try:
        fields = json.loads(body, parse_constant=_no_constant)
        json.dumps(fields, ensure_ascii=False).encode()  # a lone surrogate, which JSON can escape, fails here
    except UnicodeError as error:
        raise RequestError(400, f"the body is not Unicode: {error}", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body is a JSON {_kind(fields)}; send an object", code="invalid_json")
    for name, value in fields.items():
        is_neutral = value is None or (name in NEUTRAL and value in NEUTRAL[name])
        if name not in READ and name not in NO_EFFECT and not is_neutral:
            known = name in NEUTRAL
            what = f"{name}={value!r} is not supported" if known else f"there is no field {name!r}"
            raise RequestError(400, f"{what}; leave it out", name, "unsupported_parameter")

    model = _typed(fields, "model", str)
    if model is None:
        raise RequestError(400, f"model is missing; this server has {model_name!r}", "model")
    if model != model_name:
        raise RequestError(404, f"no model {model!r} here, only {model_name!r}", "model", "model_not_found")
    temperature = _typed(fields, "temperature", (int, float))
    temperature = temperatures[0] if temperature is None else temperature
    if temperature not in temperatures:
        raise RequestError(
            400, f"temperature={temperature}; this server decodes at {list(temperatures)}", "temperature"
        )
    limits = [_typed(fields, name, int) for name in ("max_completion_tokens", "max_tokens")]
    for name, limit in zip(("max_completion_tokens", "max_tokens"), limits, strict=True):
        if limit is not None and not 1 <= limit < 2**63:
            raise RequestError(400, f"{name}={limit}; ask for 1 to 2^63 - 1", name)
    seed = _typed(fields, "seed", int)
    if seed is not None and not 0 <= seed < 2**63:
        raise RequestError(400, f"seed={seed}; give 0 to 2^63 - 1", "seed")
    options = _typed(fields, "stream_options", dict) or {}
    return ChatRequest(
        messages=_messages(fields),
        max_tokens=next((limit for limit in limits if limit is not None), None),
        temperature=float(temperature),
        seed=seed,
        stop=_stop(fields),
        is_stream=bool(_typed(fields, "stream", bool)),
        has_usage_chunk=bool(_typed(options, "include_usage", bool, "stream_options.")),
    )


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def _kind(value: Any) -> str:
    return {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}.get(
        type(value), "number"
    )


def _typed(fields: Mapping[str, Any], name: str, kinds, prefix: str = "") -> Any:
    value = fields.get(name)
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if value is None or type(value) in kinds:  # a bool is no number here
        return value
    wanted = " or ".join({str: "string", int: "integer", float: "number"}.get(kind, kind.__name__) for kind in kinds)
    raise RequestError(400, f"{prefix}{name} is a JSON {_kind(value)}; it must be {wanted}", prefix + name)


def _stop(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stop = _typed(fields, "stop", (str, list)) or []
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(400, "stop must be a text or up to four texts, none of them empty", "stop")
    return tuple(stop)


def _messages(fields: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = _typed(fields, "messages", list)
    if not messages:
        raise RequestError(400, "messages is missing or empty; give one user message at least", "messages")
    checked = []
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RequestError(400, f"{at} is a JSON {_kind(message)}; it must be an object", at)
        if message.get("role") not in ROLES:
            raise RequestError(400, f"{at}.role is {message.get('role')!r}; choose one of {ROLES}", f"{at}.role")
        role = "system" if message["role"] == "developer" else message["role"]
        checked.append({"role": role, "content": _content(message.get("content"), f"{at}.content")})
    if checked[-1]["role"] != "user":
        raise RequestError(400, "the last message must be the user's: answers cannot be begun", f"{at}.role")
    return checked


def _content(content: Any, at: str) -> str:
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(400, f"{at} holds a part that is not text", at)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(400, f"{at} is a JSON {_kind(content)}; it must be a text", at)
    return content


def encode_messages(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], allows_masks: bool) -> list[int]:
    """Token ids of a conversation, up to where the answer begins; RequestError for control tokens in a content.

    Args:
      allows_masks: mask tokens and `<mask:N>` in contents stand for masks to fill; otherwise they are refused.
    """
    control = {id_ for id_, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    control -= {tokenizer.mask_id, tokenizer.hf.unk_token_id}  # an unknown word is no control token
    expanded = []
    for index, message in enumerate(messages):
        text, at = message["content"], f"messages[{index}].content"
        ids = set(tokenizer.encode(text))
        if not allows_masks and (tokenizer.mask_id in ids or has_mask_runs(text)):
            raise RequestError(400, f"{at} holds masks; this server fills no templates", at, "mask_tokens_refused")
        if allows_masks:
            try:
                text = tokenizer.expand_mask_runs(text)
            except ValueError as error:
                raise RequestError(400, str(error), at) from error
        if ids & control:
            names = tokenizer.hf.convert_ids_to_tokens(sorted(ids & control))
            raise RequestError(400, f"{at} holds control tokens ({', '.join(names)})", at, "control_tokens_refused")
        expanded.append({"role": message["role"], "content": text})
    try:
        ids = tokenizer.encode_messages(expanded)
    except ValueError as error:
        raise RequestError(400, f"the model's chat template takes no such conversation: {error}", "messages") from error
    if not allows_masks and tokenizer.mask_id in ids:
        raise RequestError(400, "the conversation holds masks", "messages", "mask_tokens_refused")
    return ids
