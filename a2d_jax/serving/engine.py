"""The thread that owns the model: a bounded queue in front, requests that wait together decoded as one batch.

Requests of one group (same settings, same bucket length) share a compiled program. A batch has 1, 2, 4, ... rows and
grows while requests of its group wait; a row that is done is given to the next. When the oldest request that waits is
of another group, nobody else is let in, so that no group is starved. What a request becomes does not depend on its
company.

The thread looks up after each finished block, and after `max_passes` passes at the latest: to send text, to let go of
requests whose client is gone, and to take in new ones.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from a2d_jax.batching import buckets_up_to
from a2d_jax.decoding import Plan, Rows, replace_rows
from a2d_jax.sampler_config import SamplerConfig
from a2d_jax.sampling import Decoder, pad_left, response_plan, response_rows, row_keys, special_ids
from a2d_jax.serving.answer import Answer
from a2d_jax.serving.metrics import Metrics
from a2d_jax.serving.protocol import RequestError
from a2d_jax.tokenizer import Tokenizer


class Event(NamedTuple):
    """Something that happened to a request. The last event of a request has a finish_reason or an error."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    filled_prompt: str | None = None
    error: RequestError | None = None


class Group(NamedTuple):
    """Requests that one compiled program decodes: their plan and row length."""

    plan: Plan
    length: int


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way. `emit` is called from the engine's thread."""

    prompt: list[int]
    config: SamplerConfig
    seed: int
    answer: Answer
    emit: Callable[[Event], None]
    group: Group
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    is_over: bool = False

    def end(self, event: Event) -> None:
        """Sends the last event, once."""
        if not self.is_over:
            self.is_over = True
            self.emit(event)


class Engine:
    """Decodes jobs in a thread of its own.

    Args:
      config: how to decode; requests may change gen_length and temperature.
      batch_size: rows at most.
      max_queue: requests that may wait; more are told to come back.
      max_length: tokens of a prompt and its answer together.
      max_passes: passes between two looks at the world.
    """

    def __init__(
        self,
        model,
        tokenizer: Tokenizer,
        config: SamplerConfig,
        metrics: Metrics,
        *,
        batch_size: int = 8,
        max_queue: int = 64,
        max_length: int = 4096,
        max_passes: int = 16,
    ):
        self._model, self._tokenizer, self._metrics = model, tokenizer, metrics
        self._config, self._batch_size, self._max_queue = config, batch_size, max_queue
        self._max_passes, self.max_length = max_passes, max_length
        self._buckets = buckets_up_to(max_length)
        special_ids(model)  # refuses a causal model here, and not with the first request
        self._num_blocks = config.num_blocks(model.config.family)  # also checks the settings
        self._decoders: dict[Plan, Decoder] = {}
        self._layers = model.layers_apart()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._condition = threading.Condition()
        self._is_closed = False  # takes no new requests
        self._is_stopped = False  # the thread is to end
        self._seconds_per_request = 1.0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and not self._is_closed

    def job(self, prompt: list[int], max_tokens: int | None, temperature: float, seed, stop, emit) -> Job:
        """A job for a prompt; RequestError 413 where it is too long."""
        block_length = self._config.gen_length // self._num_blocks
        gen_length = self._config.gen_length
        if max_tokens is not None:  # whole blocks, each with its share of the steps; the answer is cut to the limit
            num_blocks = -(-max_tokens // block_length)
            gen_length = num_blocks * block_length
        total = len(prompt) + gen_length
        if total > self.max_length:
            raise RequestError(
                413,
                f"the conversation has {len(prompt)} tokens and the answer up to {gen_length}; the limit for both is "
                f"{self.max_length}. Shorten the conversation or lower max_tokens.",
                "messages",
                "context_length_exceeded",
            )
        steps = gen_length // block_length * (self._config.steps // self._num_blocks)
        config = dataclasses.replace(
            self._config, gen_length=gen_length, steps=steps, block_length=block_length, temperature=temperature
        )
        length = min(bucket for bucket in self._buckets if bucket >= total)
        num_masks = sum(token == self._tokenizer.mask_id for token in prompt)
        try:
            plan = response_plan(config, self._model.config.family, length, num_masks)
        except ValueError as error:
            raise RequestError(400, str(error), "messages") from error
        answer = Answer(self._tokenizer, gen_length if max_tokens is None else max_tokens, stop)
        return Job(prompt, config, seed, answer, emit, Group(plan, length))

    def submit(self, job: Job) -> None:
        """Puts a job into the queue; RequestError 429 where it is full, 503 where the server is going down."""
        with self._condition:
            if self._is_closed or not self._thread.is_alive():
                raise shutting_down()
            if len(self._waiting) >= self._max_queue:
                turns = math.ceil((len(self._waiting) + 1) / self._batch_size)
                wait = max(1, math.ceil(turns * self._seconds_per_request))
                raise RequestError(429, f"{len(self._waiting)} requests wait already", None, "busy", retry_after=wait)
            self._waiting.append(job)
            self._metrics.waiting.set(len(self._waiting))
            self._condition.notify()

    def close(self) -> None:
        """Refuses new requests and those that wait; those that are being decoded go on."""
        with self._condition:
            self._is_closed = True
            waiting, self._waiting = self._waiting, []
            self._condition.notify()
        for job in waiting:
            job.end(Event(error=shutting_down()))

    def stop(self) -> None:
        """Tells everybody that it is over, at once; the thread ends at its next look."""
        self.close()
        with self._condition:
            self._is_stopped = True
            running = list(self._running)
            self._condition.notify()
        for job in running:
            job.end(Event(error=shutting_down()))

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed and not self._waiting:
                    return
                group = self._waiting[0].group
            try:
                self._run(group)
            except Exception:  # one batch that fails (out of memory, say) must not end the service
                logging.exception("a batch failed")
                error = RequestError(500, "the model failed on this batch; try again", code="internal_error")
                for job in self._running:
                    job.end(Event(error=error))
                self._set_running([])

    def _run(self, group: Group) -> None:
        """Decodes requests of one group until none is left, or another group's turn has come."""
        if group.plan not in self._decoders:
            self._decoders[group.plan] = Decoder(self._model, group.plan, layers=self._layers)
        batch = Batch(self._decoders[group.plan], self._model, self._tokenizer, group, self._max_passes)
        while not self._is_stopped:
            newcomers = self._admit(group, self._batch_size - batch.num_seated)
            if newcomers:
                batch.seat(newcomers)
            self._set_running([job for job in batch.jobs if job is not None])
            if not batch.num_seated:
                return
            self._metrics.batch_rows.observe(batch.num_seated)
            for job, event, num_passes in batch.advance():
                self._deliver(job, event, num_passes)
        self._set_running([])

    def _set_running(self, jobs: list[Job]) -> None:
        with self._condition:
            self._running = jobs
            self._metrics.running.set(len(jobs))

    def _admit(self, group: Group, num_free: int) -> list[Job]:
        """Takes the oldest requests off the queue while they are of this group."""
        with self._condition:
            self._waiting = [job for job in self._waiting if not job.is_over]
            count = 0
            while count < min(num_free, len(self._waiting)) and self._waiting[count].group == group:
                count += 1
            admitted, self._waiting = self._waiting[:count], self._waiting[count:]
            self._running = [*self._running, *admitted]  # told of a failure or of the end before they have rows
            self._metrics.waiting.set(len(self._waiting))
        return admitted

    def _deliver(self, job: Job, event: Event, num_passes: int) -> None:
        seconds = time.monotonic() - job.arrived
        if event.text and len(event.text) == len(job.answer.text):
            self._metrics.first_text_seconds.observe(seconds)
        if event.finish_reason is None:
            if event.text and not job.is_over:
                job.emit(event)
            return
        self._metrics.passes.inc(num_passes)
        self._metrics.tokens.labels("prompt").inc(len(job.prompt))
        self._metrics.tokens.labels("completion").inc(event.num_tokens)
        self._metrics.seconds.observe(seconds)
        self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
        job.end(event)


class Batch:
    """The rows of one group of requests."""

    def __init__(self, decoder: Decoder, model, tokenizer: Tokenizer, group: Group, max_passes: int):
        self._decoder, self._tokenizer, self._group, self._max_passes = decoder, tokenizer, group, max_passes
        self._mask_id, self._eos_id = special_ids(model)
        self._config = group.plan.config
        self.jobs: list[Job | None] = []
        self._rows: Rows | None = None

    @property
    def num_seated(self) -> int:
        return sum(job is not None for job in self.jobs)

    def seat(self, newcomers: list[Job]) -> None:
        """Gives each newcomer a free row; grows to the next power of two where there are too few."""
        num_rows = 1 << (self.num_seated + len(newcomers) - 1).bit_length()
        self.jobs += [None] * (num_rows - len(self.jobs))
        free = [row for row, job in enumerate(self.jobs) if job is None]
        is_new = np.zeros(len(self.jobs), bool)
        for row, job in zip(free, newcomers, strict=False):
            self.jobs[row], is_new[row] = job, True

        prompts = [job.prompt if job else [self._eos_id] for job in self.jobs]
        padded = [[0] * (self._group.length - self._config.gen_length), *prompts]  # the first sets the length
        tokens, is_real = (array[1:] for array in pad_left(padded, self._tokenizer.pad_id))
        num_blocks = self._group.plan.num_blocks
        tokens, block, attention_mask = response_rows(tokens, is_real, self._config, num_blocks, self._mask_id)
        block = np.where(is_new[:, None], block, num_blocks)  # no masks: such a row takes part in nothing
        keys = jnp.stack([row_keys(self._config, jax.random.key(job.seed if job else 0), [0])[0] for job in self.jobs])
        fresh = self._decoder.start(tokens, block, attention_mask, keys)
        if self._rows is None:
            self._rows = fresh
        else:
            num_old = len(self._rows.tokens)
            grown = jax.tree.map(lambda old, new: jnp.concatenate([old, new[num_old:]]), self._rows, fresh)
            self._rows = replace_rows(grown, fresh, is_new)

    def advance(self) -> list[tuple[Job, Event, int]]:
        """Decodes on to the next finished block; what came of it, as (job, event, passes so far)."""
        self._rows = self._decoder.advance_to_block(self._rows, self._max_passes)
        rows, config = self._rows, self._config
        tokens, current, is_rejected, num_forward = map(
            np.asarray, (rows.tokens, rows.current, rows.is_rejected, rows.num_forward)
        )
        is_left = self._decoder.is_running(rows)
        block_length = config.gen_length // self._group.plan.num_blocks
        events, released = [], np.zeros(len(self.jobs), bool)
        for row, job in enumerate(self.jobs):
            if job is None:
                continue
            if job.is_over:
                released[row] = True
                continue
            if is_rejected[row]:
                event = Event(finish_reason="content_filter", num_tokens=job.answer.num_tokens)
            else:
                num_done = config.gen_length if not is_left[row] else int(current[row]) * block_length
                response = tokens[row, len(tokens[row]) - config.gen_length :]
                text = job.answer.extend(response[:num_done].tolist(), not is_left[row]) if num_done else ""
                event = Event(text, job.answer.finish_reason, job.answer.num_tokens, self._filled(job, tokens[row]))
            if event.text or event.finish_reason:
                events.append((job, event, int(num_forward[row])))
            released[row] = event.finish_reason is not None
        if released.any():
            self._rows = rows._replace(is_open=rows.is_open & ~released[:, None])
            self.jobs = [None if released[row] else job for row, job in enumerate(self.jobs)]
        return events

    def _filled(self, job: Job, tokens: np.ndarray) -> str | None:
        """The prompt with its blanks filled, where it had any."""
        if job.answer.finish_reason is None or self._mask_id not in job.prompt:
            return None
        prompt = tokens[: len(tokens) - self._config.gen_length][-len(job.prompt) :]
        return self._tokenizer.decode(prompt, skip_special_tokens=True)


def shutting_down() -> RequestError:
    return RequestError(503, "the server is shutting down; try again", None, "shutting_down", retry_after=5)
