"""The chat server over real connections: openai's own client, bad requests, load, clients that leave, SIGTERM."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import openai
import pytest
import uvicorn

import a2d_jax
from a2d_jax import sampling
from a2d_jax.sampling import Decoder, response_plan
from a2d_jax.serving.answer import Answer
from a2d_jax.serving.app import Limits, Service
from a2d_jax.serving.engine import Batch, Engine, Group, Job
from a2d_jax.serving.metrics import Metrics

WORLD_BASE = Path(a2d_jax.__file__).parent / "world_base"
QUESTION = "what goes into the amber bread?"
CONFIG = a2d_jax.SamplerConfig(gen_length=8, steps=8, block_length=4)
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def loaded():
    return a2d_jax.load_pretrained(WORLD_BASE, dtype=jnp.float32), a2d_jax.load_tokenizer(WORLD_BASE)


class RunningServer:
    def __init__(self, model, tokenizer, config, limits, **engine_settings):
        self.metrics = Metrics()
        settings = {"batch_size": 4, "max_queue": 32, "max_length": 64} | engine_settings
        self.engine = Engine(model, tokenizer, config, self.metrics, **settings)
        self.engine.start()
        app = Service(self.engine, tokenizer, self.metrics, "world", limits).app()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],))
        self._thread.start()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="-", max_retries=0)

    def ask(self, content=QUESTION, **settings):
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model="world", messages=messages, **settings)

    def send(self, method, path, body=None):
        """(status, headers, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()
        finally:
            connection.close()

    def metric(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels) or 0

    def close(self):
        self.client.close()
        self.server.should_exit = True
        self.engine.stop()
        self.engine.join(30)
        self._thread.join(30)


@pytest.fixture(scope="module")
def start(loaded):
    """Starts servers, each on a port of its own; they end with the tests."""
    with contextlib.ExitStack() as stack:

        def start(config=CONFIG, limits=None, **engine_settings):
            server = RunningServer(*loaded, config, limits or Limits(), **engine_settings)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture(scope="module")
def server(start):
    return start(limits=Limits(temperatures=(0.0, 0.7), max_body_bytes=4096))


@pytest.fixture
def gate(monkeypatch):
    """Holds the engine back: each `gate.release()` lets it decode once."""
    gate, advance = threading.Semaphore(0), Batch.advance

    def held_advance(batch):
        gate.acquire(timeout=30)
        return advance(batch)

    monkeypatch.setattr(Batch, "advance", held_advance)
    yield gate
    gate.release(1000)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def expected_text(loaded, content=QUESTION, config=CONFIG, key=None):
    """What the library writes, cut at the end of the turn."""
    model, tokenizer = loaded
    prompt = tokenizer.encode_prompt(content)
    tokens = a2d_jax.generate(model, [prompt], config, key).tokens[0, len(prompt) :].tolist()
    end = min([tokens.index(token) for token in (tokenizer.eos_id, tokenizer.eot_id) if token in tokens], default=None)
    return tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(), len(prompt)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_openais_client_gets_what_the_library_writes(server, loaded):
    text, num_prompt = expected_text(loaded)
    answer = server.ask()
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"  # eight tokens are too few for the sentence
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, 8)
    assert [model.id for model in server.client.models.list()] == ["world"]
    assert server.client.models.retrieve("world").id == "world"


def test_a_stream_brings_each_block_and_the_same_text(server, loaded):
    chunks = list(server.ask(stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) == 2 and "".join(texts) == expected_text(loaded)[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_an_answer_that_ends_stops(start, loaded):
    config = a2d_jax.SamplerConfig(gen_length=32, steps=32, block_length=8)
    answer = start(config, max_length=96).ask()
    text, _ = expected_text(loaded, config=config)
    assert answer.choices[0].message.content == text and text.endswith(".")
    assert answer.choices[0].finish_reason == "stop"


def test_cached_and_parallel_decoding_are_served_too(start, loaded):
    config = a2d_jax.SamplerConfig(gen_length=8, steps=8, block_length=4, cache="dual", threshold=0.9)
    assert start(config).ask().choices[0].message.content == expected_text(loaded, config=config)[0]


def test_max_tokens_takes_whole_blocks_and_cuts(server, loaded):
    config = a2d_jax.SamplerConfig(gen_length=4, steps=4, block_length=4)
    answer = server.ask(max_tokens=3)
    assert expected_text(loaded, config=config)[0].startswith(answer.choices[0].message.content)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_a_stop_text_cuts_and_is_not_sent(server, loaded):
    text, _ = expected_text(loaded)
    word = text.split()[2]
    answer = server.ask(stop=[word])
    assert answer.choices[0].message.content == text[: text.index(word)].rstrip()
    assert answer.choices[0].finish_reason == "stop"
    streamed = [chunk.choices[0].delta.content or "" for chunk in server.ask(stop=word, stream=True)]
    assert "".join(streamed) == answer.choices[0].message.content


def test_a_seed_repeats_an_answer(server, loaded):
    config = a2d_jax.SamplerConfig(gen_length=8, steps=8, block_length=4, temperature=0.7)
    first = server.ask(temperature=0.7, seed=5).choices[0].message.content
    assert first == expected_text(loaded, config=config, key=jax.random.key(5))[0]


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_monitor_stops_with_content_filter(start, is_stream):
    server = start(a2d_jax.SamplerConfig(gen_length=8, steps=8, block_length=4, reject_above=-1.0))
    answer = server.ask(stream=is_stream)
    if is_stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
        assert chunks[-1].choices[0].finish_reason == "content_filter"
    else:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "content_filter")
        assert answer.usage.completion_tokens == 0
    assert server.metric("a2d_forward_passes_total") == 1


def test_sixteen_clients_at_once_lose_no_answer(start, loaded):
    server = start(max_passes=2)
    names = "amber bread, deep soup, old cake, calm pie, rusty stew, tiny hex, wild bane, red jinx".split(", ")
    questions = [f"{verb} the {name}?" for verb in ("what goes into", "how do i make") for name in names]
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda question: server.ask(question).choices[0].message.content, questions))
    for question in questions[::5]:
        assert texts[questions.index(question)] == expected_text(loaded, question)[0]
    assert all(texts) and server.metric("a2d_requests_total", outcome="length") == 16
    # Together, not one after the other: 16 alone would have taken 16 turns of one row at least.
    assert server.metric("a2d_batch_requests_sum") / server.metric("a2d_batch_requests_count") > 2


def test_a_model_on_a_mesh_is_decoded_with_that_mesh_in_force(loaded, monkeypatch):
    mesh, tokenizer = a2d_jax.make_mesh(data=2, fsdp=2, tensor=2), loaded[1]
    model, plan, meshes = a2d_jax.load_pretrained(WORLD_BASE, mesh), response_plan(CONFIG, "llada", 32), []

    def decode_nothing(graphdef, state, layers, rows, max_passes, draws, *, plan):
        meshes.append(jax.sharding.get_abstract_mesh())
        return rows

    monkeypatch.setattr(sampling, "decode_to_block", decode_nothing)
    batch = Batch(Decoder(model, plan), model, tokenizer, Group(plan, 32), max_passes=16)
    batch.seat([Job([5, 6], CONFIG, 0, Answer(tokenizer, 8), lambda event: None, Group(plan, 32))])
    assert batch.advance() == [] and meshes == [mesh.abstract_mesh]


# -- bad requests -----------------------------------------------------------------------------------------------------


def body(**fields):
    return json.dumps({"model": "world", "messages": [{"role": "user", "content": QUESTION}]} | fields)


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("text", "status", "param"),
    [
        ('{"model": "world", ', 400, None),
        ("[1]", 400, None),
        ("[" * 3000, 400, None),
        ('{"model": "world", "seed": NaN}', 400, None),
        (body(model="gpt-4"), 404, "model"),
        (body(model=None), 400, "model"),
        (body(messages=[]), 400, "messages"),
        (body(messages="hello"), 400, "messages"),
        (body(messages=[{"role": "wizard", "content": "hi"}]), 400, "messages[0].role"),
        (body(messages=user("\ud800")), 400, None),
        ('{"model": "world", "\\ud800": 1}', 400, None),
        (body(messages=user(7)), 400, "messages[0].content"),
        (body(messages=user([{"type": "image_url", "image_url": {}}])), 400, "messages[0].content"),
        (body(messages=[*user("hi"), {"role": "assistant", "content": "sure"}]), 400, "messages[1].role"),
        (body(messages=user("the <|mdm_mask|> cake")), 400, "messages[0].content"),
        (body(messages=user("the <mask:4> cake")), 400, "messages[0].content"),
        (body(messages=user("hi<|eot_id|><|start_header_id|>")), 400, "messages[0].content"),
        (body(max_tokens=0), 400, "max_tokens"),
        (body(max_tokens="many"), 400, "max_tokens"),
        (body(max_tokens=True), 400, "max_tokens"),
        (body(temperature=0.3), 400, "temperature"),
        (body(temperature=10**400), 400, "temperature"),
        (body(seed=-1), 400, "seed"),
        (body(stop=["a", ""]), 400, "stop"),
        (body(stream_options={"include_usage": 1}), 400, "stream_options.include_usage"),
        (body(n=2), 400, "n"),
        (body(tools=[{"type": "function"}]), 400, "tools"),
        (body(colour="red"), 400, "colour"),
        (body(max_tokens=1000), 413, "messages"),
        (body(messages=user("cake " * 60)), 413, "messages"),
        (body(messages=user("x" * 5000)), 413, None),
    ],
)
def test_bad_requests_name_the_field(server, text, status, param):
    given, _, answer = server.send("POST", CHAT, text)
    error = json.loads(answer)["error"]
    assert (given, error["param"]) == (status, param) and error["message"]


def test_unknown_paths_and_methods_answer_in_json(server):
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("GET", "/v1/models/gpt-4", 404)]:
        given, _, answer = server.send(method, path)
        assert given == status and json.loads(answer)["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        server.client.chat.completions.create(model="gpt-4", messages=user("hi"))


def test_neutral_values_are_taken(server):
    neutral = body(n=1, top_p=1, tools=[], user="me", response_format={"type": "text"}, stop=None, max_tokens=4)
    assert server.send("POST", CHAT, neutral)[0] == 200


def test_masks_are_filled_where_the_operator_allows_it(start):
    server = start(limits=Limits(allow_mask_tokens=True), max_length=64)
    answer = server.ask("the <mask:2> cake")
    assert answer.choices[0].model_extra["filled_prompt"].count("<") == 0
    assert "cake" in answer.choices[0].model_extra["filled_prompt"]
    status, _, text = server.send("POST", CHAT, body(messages=user("the <mask:zero> cake")))
    assert status == 400 and json.loads(text)["error"]["param"] == "messages[0].content"


# -- under load and at the end ----------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back(start, gate):
    server = start(batch_size=1, max_queue=2)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(server.ask)
        wait_for(lambda: server.metric("a2d_requests_running") == 1)
        waiting = [pool.submit(server.ask) for _ in range(2)]
        wait_for(lambda: server.metric("a2d_requests_waiting") == 2)
        status, headers, _ = server.send("POST", CHAT, body())
        assert status == 429 and int(headers["retry-after"]) >= 1
        gate.release(100)
        assert all(job.result().choices[0].message.content for job in [running, *waiting])
    assert server.metric("a2d_requests_total", outcome="busy") == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_its_row(start, gate, is_stream):
    server = start()
    connection = socket.create_connection(("127.0.0.1", server.port))
    content = body(stream=is_stream).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    connection.sendall(head + content)
    wait_for(lambda: server.metric("a2d_requests_running") == 1)
    if is_stream:
        gate.release()
        received = b""
        while b"chat.completion.chunk" not in received:  # the headers may come alone
            received += connection.recv(65536)
    connection.close()
    wait_for(lambda: server.metric("a2d_requests_total", outcome="cancelled") == 1)
    gate.release(1)
    wait_for(lambda: server.metric("a2d_requests_running") == 0)
    gate.release(100)
    assert server.ask().choices[0].message.content


def test_a_request_that_takes_too_long_times_out(start, gate):
    server = start(limits=Limits(timeout=0.3))
    status, headers, text = server.send("POST", CHAT, body())
    assert status == 504 and json.loads(text)["error"]["code"] == "timeout" and "retry-after" in headers


def test_a_stream_that_the_shutdown_cuts_gets_an_error_event(start, gate):
    server = start(batch_size=1)
    gate.release()
    stream = iter(server.ask(stream=True))
    assert next(stream).choices[0].delta.role == "assistant" and next(stream).choices[0].delta.content
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.send, "POST", CHAT, body())
        wait_for(lambda: server.metric("a2d_requests_waiting") == 1)
        server.engine.close()  # those that wait are told at once, the running one goes on
        assert waiting.result()[0] == 503
    assert server.send("GET", "/healthz")[0] == 503 and server.send("POST", CHAT, body())[0] == 503
    server.engine.stop()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)


@pytest.mark.parametrize("stage", ["seat", "advance"])
def test_a_failing_model_is_an_error_and_not_the_end(start, monkeypatch, stage):
    server = start(limits=Limits(timeout=60))
    with monkeypatch.context() as patch:
        patch.setattr(Batch, stage, lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="failed on this batch"):
            server.ask()
    assert server.ask().choices[0].message.content


def test_health_and_metrics(server):
    def chats():
        """Answers to chats by their status."""
        text = server.send("GET", "/metrics")[2]
        counts = re.findall(
            r'^a2d_http_responses_total{path="/v1/chat/completions",status="(\d+)"} ([0-9.]+)$', text, re.M
        )
        return {status: float(count) for status, count in counts}

    server.ask()
    before = chats()
    list(server.ask(stream=True))
    assert server.send("GET", "/v1/models/unknown")[0] == 404
    assert chats() == before | {"200": before["200"] + 1}
    assert server.send("GET", "/healthz")[::2] == (200, '{"status":"ok"}')
    status, headers, text = server.send("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    for name in ("a2d_requests_total", "a2d_tokens_total", "a2d_request_seconds_bucket", "a2d_requests_waiting"):
        assert re.search(rf"^{name}\b.* [0-9.]+$", text, re.MULTILINE), name


def test_sigterm_in_the_middle_of_a_request_tells_the_client(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "a2d_jax.serve", f"--checkpoint={WORLD_BASE}", f"--port={port}", "--gen_length=96",
        "--steps=96", "--dtype=float32", "--grace=0",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment, stdout=log, stderr=log)

    def send(method, path, content=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, content)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def is_up():
        assert process.poll() is None, (tmp_path / "log").read_text()
        with contextlib.suppress(OSError):
            return send("GET", "/healthz")[0] == 200

    try:
        deadline = time.monotonic() + 300  # of a start beside other work
        while not is_up():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(send, "POST", CHAT, json.dumps({"model": "world_base", "messages": user(QUESTION)}))
            wait_for(lambda: "a2d_requests_running 1.0" in send("GET", "/metrics")[1])  # it compiles: long enough
            process.send_signal(signal.SIGTERM)
            status, text = asked.result()
        assert status == 503 and json.loads(text)["error"]["code"] == "shutting_down"
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()


# -- the text of an answer --------------------------------------------------------------------------------------------


def test_text_that_may_become_a_stop_text_is_held_back(loaded):
    _, tokenizer = loaded
    ids = tokenizer.encode("mix milk with honey, then add salt.")
    answer = Answer(tokenizer, 100, stop=["with honey"])
    assert answer.extend(ids[:3], False) == "mix milk"
    assert answer.extend(ids[:4], False) == "" and answer.finish_reason == "stop" and answer.text == "mix milk"
    other = Answer(tokenizer, 100, stop=["with oil"])
    assert [other.extend(ids[:n], False) for n in (3, 4)] == ["mix milk", " with honey"]


def test_nothing_behind_the_end_of_the_turn_is_given_out(loaded):
    _, tokenizer = loaded
    ids = [*tokenizer.encode("mix milk"), tokenizer.eos_id, *tokenizer.encode("with salt")]
    answer = Answer(tokenizer, 100)
    assert answer.extend(ids, False) == "mix milk"
    assert (answer.finish_reason, answer.num_tokens) == ("stop", 3)
