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

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of any kind that loads", required=True)
_ADAPTER = flags.DEFINE_string("adapter", None, "PEFT folder to attach")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "of weights and activations")
_MESH = define_mesh_flag()
_MODEL_NAME = flags.DEFINE_string("model_name", None, "name that clients ask for; default: that of the folder")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen on; 0 takes a free one")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "requests decoded together", lower_bound=1)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 64, "requests that may wait; more get 429", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "tokens of prompt and answer; default: what the model takes")
_MAX_BODY = flags.DEFINE_integer("max_body_bytes", 1 << 20, "of a request", lower_bound=1)
_TIMEOUT = flags.DEFINE_float("timeout", 300.0, "seconds for a request, waiting included")
_GRACE = flags.DEFINE_float("grace", 10.0, "seconds that running answers get after SIGTERM")
_TEMPERATURES = flags.DEFINE_list("temperatures", [], "that clients may ask for besides --temperature; each compiles")
_ALLOW_MASKS = flags.DEFINE_bool("allow_mask_tokens", False, "fill masks in messages, for studies of attacks")
define_sampler_flags()


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
    sampler = sampler_config_from_flags()
    checkpoint = Path(_CHECKPOINT.value)
    tokenizer = load_tokenizer(hf_folder(checkpoint))
    max_length = length_limit(load_config(hf_folder(checkpoint)).max_length, _MAX_LENGTH.value)
    if sampler.gen_length >= max_length:
        raise ValueError(f"--gen_length={sampler.gen_length} leaves no room for a prompt in {max_length} tokens.")
    limits = Limits(
        temperatures=(sampler.temperature, *map(float, _TEMPERATURES.value)),
        timeout=_TIMEOUT.value,
        max_body_bytes=_MAX_BODY.value,
        allow_mask_tokens=_ALLOW_MASKS.value,
    )
    mesh = make_mesh(*_MESH.value) if _MESH.value else None
    model = load_pretrained(checkpoint, mesh, jnp.dtype(_DTYPE.value), _ADAPTER.value)
    metrics = Metrics()
    engine = Engine(
        model, tokenizer, sampler, metrics,
        batch_size=_BATCH_SIZE.value, max_queue=_MAX_QUEUE.value, max_length=max_length,
    )  # fmt: skip
    name = _MODEL_NAME.value or checkpoint.resolve().name
    service = Service(engine, tokenizer, metrics, name, limits)
    config = uvicorn.Config(
        service.app(), host=_HOST.value, port=_PORT.value, log_level="info", access_log=False, lifespan="off",
        timeout_graceful_shutdown=int(_GRACE.value) + 5,
    )  # fmt: skip
    logging.info("model %s, %d tokens a request, %d rows, %s", name, max_length, _BATCH_SIZE.value, sampler)
    engine.start()
    try:
        Server(config, engine, _GRACE.value).run()
    finally:
        engine.stop()
        engine.join(30)


if __name__ == "__main__":
    app.run(main)
