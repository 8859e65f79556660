r"""Program: a chat server that speaks OpenAI's protocol and stops answers by their P([EOS]).

    python -m a2d_jax.serve --checkpoint runs/NAME --reject_above 0.9 --port 8000
    curl localhost:8000/v1/chat/completions \
        -d '{"model": "NAME", "messages": [{"role": "user", "content": "What is lime?"}]}'

The settings of `SamplerConfig` are flags. Answers are streamed a finished block at a time; one that the monitor stops
has the finish_reason "content_filter". At most `--max_queue` requests wait, `--batch_size` are decoded together. On
SIGTERM the server takes nothing new, lets running answers go on for `--grace` seconds, and tells the rest.
It knows no passwords and no TLS: it listens on this machine alone, unless --host says
otherwise, and belongs behind a proxy that has them.
"""

import threading
from pathlib import Path

import jax.numpy as jnp
import uvicorn
from absl import app, flags, logging

from a2d_jax.config import load_config
from a2d_jax.folders import hf_folder
from a2d_jax.mesh_flag import define_mesh_flag
from a2d_jax.pretrained import load_pretrained
from a2d_jax.sampler_flags import define_sampler_flags, sampler_config_from_flags
from a2d_jax.serving.app import Limits, Service
from a2d_jax.serving.engine import Engine
from a2d_jax.serving.metrics import Metrics
from a2d_jax.sharding import make_mesh
from a2d_jax.tokenizer import load_tokenizer


class Server(uvicorn.Server):
    """uvicorn's server; a signal reaches the engine before the connections are waited for."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self._engine, self._grace = engine, grace

    def handle_exit(self, sig, frame) -> None:
        # In a thread: the handler may have interrupted somebody who holds the engine's lock.
        threading.Thread(target=self._engine.close, daemon=True).start()
        timer = threading.Timer(0 if self.should_exit else self._grace, self._engine.stop)
        timer.daemon = True
        timer.start()
        super().handle_exit(sig, frame)


def length_limit(own: int | None, asked: int | None) -> int:
    """The longest row that is decoded: what is asked for, or the model's own; ValueError where it takes no such row."""
    if asked is not None and own is not None and asked > own:
        raise ValueError(f"--max_length={asked}, but config.json says {own}; give {own} or less.")
    return asked or own or 4096


def main(_) -> None:
    given = flags.FLAGS
    sampler = sampler_config_from_flags(given.checkpoint)
    checkpoint = Path(given.checkpoint)
    tokenizer = load_tokenizer(hf_folder(checkpoint), requires_mask=True)
    max_length = length_limit(load_config(hf_folder(checkpoint)).max_length, given.max_length)
    if sampler.gen_length >= max_length:
        raise ValueError(f"--gen_length={sampler.gen_length} leaves no room for a prompt in {max_length} tokens.")
    limits = Limits(
        temperatures=(sampler.temperature, *map(float, given.temperatures)),
        timeout=given.timeout,
        max_body_bytes=given.max_body_bytes,
        allow_mask_tokens=given.allow_mask_tokens,
    )
    mesh = make_mesh(*given.mesh) if given.mesh else None
    model = load_pretrained(checkpoint, mesh, jnp.dtype(given.dtype), given.adapter)
    metrics = Metrics()
    engine = Engine(
        model, tokenizer, sampler, metrics,
        batch_size=given.batch_size, max_queue=given.max_queue, max_length=max_length,
    )  # fmt: skip
    name = given.model_name or checkpoint.resolve().name
    service = Service(engine, tokenizer, metrics, name, limits)
    config = uvicorn.Config(
        service.app(), host=given.host, port=given.port, log_level="info", access_log=False, lifespan="off",
        timeout_graceful_shutdown=int(given.grace) + 5,
    )  # fmt: skip
    logging.info("model %s, %d tokens a request, %d rows, %s", name, max_length, given.batch_size, sampler)
    engine.start()
    try:
        Server(config, engine, given.grace).run()
    finally:
        engine.stop()
        engine.join(30)


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "folder of any kind that loads", required=True)
    flags.DEFINE_string("adapter", None, "PEFT folder to attach")
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "of weights and activations")
    define_mesh_flag()
    flags.DEFINE_string("model_name", None, "name that clients ask for; default: that of the folder")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
    flags.DEFINE_integer("port", 8000, "port to listen on; 0 takes a free one")
    flags.DEFINE_integer("batch_size", 8, "requests decoded together", lower_bound=1)
    flags.DEFINE_integer("max_queue", 64, "requests that may wait; more get 429", lower_bound=1)
    flags.DEFINE_integer("max_length", None, "tokens of prompt and answer; default: what the model takes")
    flags.DEFINE_integer("max_body_bytes", 1 << 20, "of a request", lower_bound=1)
    flags.DEFINE_float("timeout", 300.0, "seconds for a request, waiting included")
    flags.DEFINE_float("grace", 10.0, "seconds that running answers get after SIGTERM")
    flags.DEFINE_list("temperatures", [], "that clients may ask for besides --temperature; each compiles")
    flags.DEFINE_bool("allow_mask_tokens", False, "fill masks in messages, for studies of attacks")
    define_sampler_flags()


if __name__ == "__main__":
    define_flags()
    app.run(main)
