"""Program: a Hugging Face folder to an Orbax checkpoint, a few tensors at a time.

    python -m a2d_jax.convert --source HF_DIR --target DIR

Host memory peaks at the largest tensor plus a constant, not at the checkpoint. With several devices each tensor is
split over them (`fsdp`). One host does it all, into a local folder.
"""

import time

import jax
from absl import app, flags, logging

from a2d_jax.config import load_config
from a2d_jax.models.naming import tensor_names
from a2d_jax.orbax_io import convert_folder
from a2d_jax.sharding import make_mesh


def main(_) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    config = load_config(given.source)
    num_tensors = len(tensor_names(config))
    num_devices = jax.device_count()
    of_dtype = f" of {config.dtype}" if config.names_dtype else ""
    print(f"{config.family}, {config.num_layers} layers of width {config.width}, {num_tensors} tensors{of_dtype}")
    print(f"{given.source} -> {given.target}, split over {num_devices} device(s)", flush=True)

    mesh = make_mesh(data=1, fsdp=num_devices) if num_devices > 1 else None
    start = last_print = time.monotonic()
    for done, name in enumerate(convert_folder(given.source, given.target, mesh), start=1):
        now = time.monotonic()
        if now - last_print > 5 or done == num_tensors:
            rate = done / (now - start)
            print(
                f"{done}/{num_tensors} {name.hf_name}  {rate:.1f} tensors/s  ETA {(num_tensors - done) / rate:.0f} s",
                flush=True,
            )
            last_print = now
    print(f"wrote {num_tensors} tensors in {time.monotonic() - start:.0f} s: Orbax checkpoint in {given.target}")


def define_flags() -> None:
    flags.DEFINE_string("source", None, "Hugging Face folder with safetensors", required=True)
    flags.DEFINE_string("target", None, "folder to write", required=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
