"""The HTTP application: routes, streaming, limits, clients that leave.

POST /v1/chat/completions    also as server-sent events, a chunk a finished block
GET  /v1/models, /v1/models/NAME
GET  /healthz                200 while requests are taken, 503 otherwise
GET  /metrics                for Prometheus
"""

import asyncio
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from a2d_jax.serving.engine import Engine, Event, Job
from a2d_jax.serving.metrics import Metrics
from a2d_jax.serving.protocol import ChatRequest, RequestError, encode_messages, parse_request
from a2d_jax.tokenizer import Tokenizer

CHAT_PATH = "/v1/chat/completions"
_BODY_SECONDS = 15  # for a client to send its request


@dataclasses.dataclass(frozen=True)
class Limits:
    """What requests may ask for."""

    temperatures: tuple[float, ...] = (0.0,)
    timeout: float = 300.0  # seconds from arrival to the end of the answer
    max_body_bytes: int = 1 << 20
    allow_mask_tokens: bool = False


class Service:
    """The handlers and what they share."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, metrics: Metrics, model_name: str, limits: Limits):
        self._engine, self._tokenizer, self._metrics = engine, tokenizer, metrics
        self._model_name, self._limits, self._created = model_name, limits, int(time.time())

    def app(self) -> Starlette:
        routes = [
            Route(CHAT_PATH, self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/healthz", self.health),
            Route("/metrics", self.metrics),
        ]
        return Starlette(
            routes=routes, exception_handlers={RequestError: self._refuse, HTTPException: self._refuse_http}
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model_name:
            raise RequestError(404, f"no model {name!r} here, only {self._model_name!r}", "model", "model_not_found")
        return JSONResponse(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {"id": self._model_name, "object": "model", "created": self._created, "owned_by": "a2d_jax"}

    async def health(self, request: Request) -> Response:
        is_healthy = self._engine.is_healthy
        return JSONResponse({"status": "ok" if is_healthy else "unavailable"}, 200 if is_healthy else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def chat(self, request: Request) -> Response:
        deadline = time.monotonic() + self._limits.timeout
        chat = parse_request(await self._body(request), self._model_name, self._limits.temperatures)
        prompt = encode_messages(self._tokenizer, chat.messages, self._limits.allow_mask_tokens)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop has ended, and the client with it
                pass

        seed = secrets.randbits(31) if chat.seed is None else chat.seed
        job = self._engine.job(prompt, chat.max_tokens, chat.temperature, seed, chat.stop, emit)
        self._engine.submit(job)
        reply = self._reply(events, deadline)
        is_handed_on = False
        try:
            # Until there is something to say, an error still has a status of its own.
            first = await self._unless_client_leaves(request, anext(reply))
            if not chat.is_stream:
                return await self._unless_client_leaves(request, self._whole(job, first, reply))
            is_handed_on = True
            self._metrics.responses.labels(CHAT_PATH, 200).inc()
            return StreamingResponse(self._stream(chat, job, first, reply), media_type="text/event-stream")
        finally:
            if not is_handed_on:  # nobody waits for it any more: the engine lets go of it at its next look
                job.is_over = True

    async def _body(self, request: Request) -> bytes:
        limit, body = self._limits.max_body_bytes, bytearray()
        too_large = RequestError(413, f"the body is larger than {limit} bytes", None, "body_too_large")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError as error:
            raise RequestError(408, f"the body did not come within {_BODY_SECONDS} seconds", None, "timeout") from error
        return bytes(body)

    async def _reply(self, events: asyncio.Queue, deadline: float) -> AsyncIterator[Event]:
        """The events of a request; raises its error, or RequestError 504 at the deadline."""
        while True:
            try:
                event = await asyncio.wait_for(events.get(), max(deadline - time.monotonic(), 0))
            except TimeoutError as error:
                message = f"no answer within {self._limits.timeout:g} seconds"
                raise RequestError(504, message, None, "timeout", retry_after=5) from error
            if event.error is not None:
                raise event.error
            yield event
            if event.finish_reason is not None:
                self._metrics.requests.labels(event.finish_reason).inc()
                return

    async def _unless_client_leaves(self, request: Request, awaitable) -> Any:
        """The result of `awaitable`; RequestError 499, which nobody reads, as soon as the client is gone."""

        async def until_gone():
            while (await request.receive())["type"] != "http.disconnect":
                pass

        work, gone = asyncio.ensure_future(awaitable), asyncio.ensure_future(until_gone())
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._metrics.requests.labels("cancelled").inc()
                raise RequestError(499, "the client left")
            return work.result()
        finally:
            gone.cancel()
            work.cancel()

    async def _whole(self, job: Job, first: Event, reply: AsyncIterator[Event]) -> Response:
        events = [first, *[event async for event in reply]]
        last = events[-1]
        is_filtered = last.finish_reason == "content_filter"
        message = {"role": "assistant", "content": "" if is_filtered else "".join(event.text for event in events)}
        choice = {"index": 0, "message": message | {"refusal": None}, "logprobs": None}
        choice["finish_reason"] = last.finish_reason
        if last.filled_prompt is not None:
            choice["filled_prompt"] = last.filled_prompt
        return self._json(self._head("chat.completion") | {"choices": [choice], "usage": self._usage(job, last)})

    async def _stream(
        self, chat: ChatRequest, job: Job, first: Event, reply: AsyncIterator[Event]
    ) -> AsyncIterator[bytes]:
        head = self._head("chat.completion.chunk")
        if chat.has_usage_chunk:
            head["usage"] = None

        def chunk(delta: dict[str, Any], finish_reason: str | None = None, **extra: Any) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason} | extra
            return _sse(head | {"choices": [choice]})

        is_complete = False
        try:
            yield chunk({"role": "assistant", "content": ""})
            event = first
            while True:
                if event.text:
                    yield chunk({"content": event.text})
                if event.finish_reason is not None:
                    break
                event = await anext(reply)
            filled = {} if event.filled_prompt is None else {"filled_prompt": event.filled_prompt}
            yield chunk({}, event.finish_reason, **filled)
            if chat.has_usage_chunk:
                yield _sse(head | {"choices": [], "usage": self._usage(job, event)})
            async for _ in reply:  # lets it end
                pass
            is_complete = True
            yield b"data: [DONE]\n\n"
        except RequestError as error:
            is_complete = True
            self._count(error)
            yield _sse(error.body())
        finally:
            if not is_complete:
                self._metrics.requests.labels("cancelled").inc()
            job.is_over = True

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self._model_name,
        }

    def _usage(self, job: Job, last: Event) -> dict[str, int]:
        counts = {"prompt_tokens": len(job.prompt), "completion_tokens": last.num_tokens}
        return counts | {"total_tokens": sum(counts.values())}

    def _json(self, body: dict[str, Any], status: int = 200, headers=None) -> Response:
        self._metrics.responses.labels(CHAT_PATH, status).inc()
        return JSONResponse(body, status, headers)

    def _count(self, error: RequestError) -> None:
        outcomes = {408: "timeout", 429: "busy", 499: "", 500: "error", 503: "shutdown", 504: "timeout"}
        outcome = outcomes.get(error.status, "invalid")
        if outcome:
            self._metrics.requests.labels(outcome).inc()

    async def _refuse(self, request: Request, error: RequestError) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if request.url.path != CHAT_PATH:
            return JSONResponse(error.body(), error.status, headers)
        self._count(error)
        return self._json(error.body(), error.status, headers)

    async def _refuse_http(self, request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        refusal = RequestError(error.status_code, message, code=error.detail.lower().replace(" ", "_"))
        return JSONResponse(refusal.body(), error.status_code, error.headers)


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
