"""One A2D update against a PyTorch + PEFT loop on the same weights and batch: tokens a second, and the loss of both.

    python -m bench.training --out bench_out [--repeats 3]

A random LLaDA of 135M parameters in its body with the published 126,464-row head; LoRA of rank 32 on q, k, v, gate, up,
down and the head; 16 rows of 128 tokens, a quarter of each its prompt, half of the rows harmful; float32, AdamW. The
PyTorch side computes the published loss: logits of every position, cross entropy where a mask stands. Both sides take
turns; the table holds medians. Dropout is off, so that the losses can be compared.
"""

import statistics
import time
from pathlib import Path

import jax
import numpy as np
import peft
import torch
from absl import app, flags

from a2d_jax.assembly import assemble, with_adapter
from a2d_jax.data import Batch
from a2d_jax.files import write_json
from a2d_jax.masking import corrupt
from a2d_jax.models.lora import LoRAConfig
from a2d_jax.settings import RunConfig
from a2d_jax.sharding import make_mesh
from a2d_jax.training import init_state, pure, split_model
from bench.torch_llada import EOS_ID, MASK_ID, TorchLlada, random_llada

ROWS, LENGTH, PROMPT, RANK = 16, 128, 32, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head")

_OUT = flags.DEFINE_string("out", "bench_out", "folder for the table")
_REPEATS = flags.DEFINE_integer("repeats", 3, "updates of each side", lower_bound=1)


def clean_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 120_000, (ROWS, LENGTH)).astype(np.int32)
    is_response = np.broadcast_to(np.arange(LENGTH) >= PROMPT, tokens.shape)
    return Batch(tokens, is_response, np.ones(tokens.shape, bool), np.arange(ROWS) % 2 == 0)


class JaxSide:
    """Updates of this package."""

    def __init__(self, model, batch: Batch):
        lora = LoRAConfig(rank=RANK, alpha=2.0 * RANK, dropout=0.0, targets=TARGETS)
        run = RunConfig(lora=lora, batch_size=ROWS)
        mesh = make_mesh(1, devices=jax.devices()[:1])
        self.mesh, self.batch = mesh, batch
        self.assembled = assemble(run, model, mesh, 100, MASK_ID, EOS_ID)
        _, trained, frozen = split_model(with_adapter(model, run))
        self.frozen = pure(frozen)
        self.state = init_state(pure(trained), self.assembled.optimizer)

    def update(self) -> float:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.assembled.update(self.state, self.frozen, self.batch)
        return float(metrics["loss"])


class TorchSide:
    """Updates of PyTorch and PEFT, with the masks of our updates."""

    def __init__(self, model, batch: Batch):
        module = TorchLlada(model)
        targets = [target.replace("lm_head", "head") for target in TARGETS]
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets)
        self.model, self.batch = peft.get_peft_model(module, config), batch
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        adamw = RunConfig().optimizer
        self.optimizer = torch.optim.AdamW(trained, lr=adamw.learning_rate, weight_decay=adamw.weight_decay)
        self.step = 0

    def update(self) -> float:
        key, _ = jax.random.split(jax.random.fold_in(jax.random.key(RunConfig().seed), self.step))  # as in make_update
        self.step += 1
        noised = corrupt(
            key, self.batch.tokens, self.batch.is_response, self.batch.is_safe, mask_id=MASK_ID, eos_id=EOS_ID
        )
        noisy, targets, is_masked, prob = (
            torch.tensor(np.array(x)) for x in (noised.noisy_tokens, noised.tokens, noised.is_masked, noised.mask_prob)
        )
        logits = self.model(noisy.long())
        losses = torch.nn.functional.cross_entropy(logits[is_masked], targets.long()[is_masked], reduction="none")
        loss = (losses / prob.expand(is_masked.shape)[is_masked]).sum() / ((LENGTH - PROMPT) * ROWS)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def main(_) -> None:
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    model, batch = random_llada(), clean_batch()
    sides = {"jax": JaxSide(model, batch), "pytorch_peft": TorchSide(model, batch)}
    start = time.perf_counter()
    first = {"jax": sides["jax"].update()}
    compile_seconds = time.perf_counter() - start
    first["pytorch_peft"] = sides["pytorch_peft"].update()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(_REPEATS.value):
        for name, side in sides.items():
            start = time.perf_counter()
            loss = side.update()
            seconds[name].append(time.perf_counter() - start)
            print(f"{number + 1}/{_REPEATS.value} {name}: {seconds[name][-1]:.2f} s, loss {loss:.3f}", flush=True)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "tokens": ROWS * LENGTH,
        "repeats": _REPEATS.value,
        "seconds": median,
        "tokens_per_second": {name: ROWS * LENGTH / s for name, s in median.items()},
        "ratio": median["pytorch_peft"] / median["jax"],
        "first_loss": first,
        "first_update_seconds": compile_seconds,
    }
    write_json(out / "training.json", result)
    print(f"{result['ratio']:.2f} times the tokens a second of PyTorch + PEFT -> {out / 'training.json'}")


if __name__ == "__main__":
    app.run(main)
