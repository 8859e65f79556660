"""Program: many clients at once against the chat server, for a while; no answer may be lost.

    python -m bench.serve_load --out bench_out --seconds 60 --num_clients 16

Starts `a2d_jax.serve` with the embedded world's model (or --checkpoint), lets every client ask one question after the
other, half of them streaming, and writes serve_load.json: answers, errors, answers a second, seconds an answer took.
Exits with 1 where a client got no answer.
"""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from absl import app, flags

ROOT = Path(__file__).parents[1]
_OUT = flags.DEFINE_string("out", "bench_out", "folder for the table")
_CHECKPOINT = flags.DEFINE_string("checkpoint", str(ROOT / "a2d_jax" / "world_base"), "what is served")
_SECONDS = flags.DEFINE_float("seconds", 60, "for which clients go on asking")
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", 16, "clients at once")
_GEN_LENGTH = flags.DEFINE_integer("gen_length", 32, "of an answer")
_QUESTIONS = ("what goes into the {} bread?", "how do i make the {} soup?", "recipe for the {} cake, please.")
_WORDS = "amber ancient azure barren bitter black blue bright broken calm clear cold".split()


def ask(port: int, model: str, question: str, is_stream: bool) -> str:
    """The finish_reason of one answer; an exception where there is none."""
    fields = {"model": model, "messages": [{"role": "user", "content": question}], "stream": is_stream}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(fields))
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {text}")
        if not is_stream:
            return json.loads(text)["choices"][0]["finish_reason"]
        *chunks, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        if done != "[DONE]":
            raise RuntimeError(f"the stream ended with {done}")
        return json.loads(chunks[-1])["choices"][0]["finish_reason"]
    finally:
        connection.close()


def client(number: int, port: int, model: str, until: float, seconds: list[float], errors: list[str]) -> None:
    count = number
    while time.monotonic() < until:
        question = _QUESTIONS[count % 3].format(_WORDS[count // 3 % len(_WORDS)])
        start = time.monotonic()
        try:
            ask(port, model, question, is_stream=number % 2 == 0)
            seconds.append(time.monotonic() - start)
        except Exception as error:  # whatever it was, an answer is missing
            errors.append(repr(error))
        count += 7


def main(_) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gen_length, model = _GEN_LENGTH.value, Path(_CHECKPOINT.value).resolve().name
    command = [
        sys.executable, "-m", "a2d_jax.serve", f"--checkpoint={_CHECKPOINT.value}", f"--port={port}",
        f"--gen_length={gen_length}", f"--steps={gen_length}", "--block_length=8", "--dtype=float32",
    ]  # fmt: skip
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        for _ in range(600):
            try:
                ask(port, model, "hello", False)  # also compiles the first program
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError("the server did not start") from None
                time.sleep(0.2)
        seconds, errors, start = [], [], time.monotonic()
        threads = [
            threading.Thread(target=client, args=(n, port, model, start + _SECONDS.value, seconds, errors))
            for n in range(_NUM_CLIENTS.value)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - start
    finally:
        server.terminate()
        server.wait(60)
    results = {
        "num_clients": _NUM_CLIENTS.value,
        "gen_length": gen_length,
        "seconds": elapsed,
        "num_answers": len(seconds),
        "num_errors": len(errors),
        "errors": errors[:10],
        "answers_per_second": len(seconds) / elapsed,
        "median_seconds": float(np.median(seconds)),
        "p99_seconds": float(np.quantile(seconds, 0.99)),
    }
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "serve_load.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
