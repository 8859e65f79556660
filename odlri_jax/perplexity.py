"""Perplexity: exp of the mean -log p of the tokens of a text, in windows of the context length.

The text is tokenised whole, without special tokens of our own, and cut into windows that follow one another; what is
left at its end is dropped. Each window is read alone, and its tokens 1 .. T - 1 are scored.

    causal models   -log p(token | the tokens before it in the window)
    LLaDA, Dream    a bound from above on -log p(tokens 1 .. T - 1 | token 0), by Monte Carlo: see `likelihood.py`

Logits of large vocabularies are never held for a whole window: the head runs on a few positions at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from a2d_jax.config import DIFFUSION_FAMILIES
from a2d_jax.likelihood import perturb
from a2d_jax.losses import cross_entropy
from a2d_jax.models.transformer import Transformer
from a2d_jax.sharding import batch_sharding, mesh_of, under
from odlri_jax.windows import cut_windows

LOGITS_AT_ONCE = 2**24  # float32 numbers: 64 MB


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What was measured so far.

    Attributes:
      total_nll: summed -log p of the scored tokens, in nats; for LLaDA and Dream the estimate of its bound.
      num_tokens: scored.
      num_windows: read.
    """

    total_nll: float = 0.0
    num_tokens: int = 0
    num_windows: int = 0

    @property
    def nll(self) -> float:
        """Nats a token."""
        return self.total_nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.nll)
        except OverflowError:  # above 709 nats a token, beyond float64
            return math.inf

    def add(self, nll: np.ndarray, tokens_each: int) -> "Perplexity":
        """With the summed -log p of more windows, (windows,)."""
        total = self.total_nll + float(np.sum(nll, dtype=np.float64))
        return Perplexity(total, self.num_tokens + len(nll) * tokens_each, self.num_windows + len(nll))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _token_losses(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, targets: jax.Array, at_once: int
) -> jax.Array:
    """-log p of every target given `tokens`, (B, T), (B, T) -> (B, T) float32; column 0 of shifted models is void."""
    model = nnx.merge(graphdef, state)
    hidden = model.hidden_states(tokens)  # (B, T, D)
    if model.config.shift_logits:
        hidden = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    num_rows, num_positions, width = hidden.shape
    num_chunks = -(-num_positions // at_once)
    padding = ((0, 0), (0, num_chunks * at_once - num_positions))
    hidden = jnp.pad(hidden, (*padding, (0, 0))).reshape(num_rows, num_chunks, at_once, width).swapaxes(0, 1)
    targets = jnp.pad(targets, padding).reshape(num_rows, num_chunks, at_once).swapaxes(0, 1)
    losses = jax.lax.map(lambda chunk: cross_entropy(model.logits(chunk[0]), chunk[1]), (hidden, targets))
    return losses.swapaxes(0, 1).reshape(num_rows, -1)[:, :num_positions]


def token_losses(model: Transformer, tokens: np.ndarray, targets: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """-log p of the targets at the positions of `tokens`, (W, T) both: batch after batch, (up to batch_size, T).

    Column 0 says nothing for models whose logits are shifted (all but LLaDA): no logits come before it.
    """
    graphdef, state = nnx.split(model)
    mesh = mesh_of(model)
    at_once = min(tokens.shape[1], max(1, LOGITS_AT_ONCE // (batch_size * model.config.vocab_size)))  # positions
    for start in range(0, len(tokens), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(tokens) - 1)  # the last row fills the last batch
        batch = [np.asarray(array[rows], np.int32) for array in (tokens, targets)]
        if mesh is not None:
            batch = [jax.device_put(array, batch_sharding(mesh, array.shape)) for array in batch]
        with under(mesh):
            losses = _token_losses(graphdef, state, *batch, at_once)
        yield np.asarray(losses)[: len(tokens) - start]


def bound_of_window(model: Transformer, window: np.ndarray, batch_size: int, num_samples: int, key: jax.Array) -> float:
    """Monte Carlo estimate of the bound on -log p(tokens 1 .. | token 0) of a masked-diffusion model, in nats."""
    sample = perturb(key, window[:1], window[1:], num_samples, model.config.mask_id)
    weight = np.asarray(sample.is_masked, np.float64) / np.asarray(sample.mask_prob)  # (S, T), zero at token 0
    targets = np.broadcast_to(window, weight.shape)
    losses = np.concatenate(list(token_losses(model, np.asarray(sample.noisy_tokens), targets, batch_size)))
    return float(np.sum(losses * weight) / num_samples)


def perplexity(
    model: Transformer,
    tokens: np.ndarray,
    context_length: int,
    batch_size: int = 1,
    max_windows: int | None = None,
    num_samples: int = 32,
    seed: int = 0,
    report: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """Perplexity of a text.

    Args:
      model: of any family.
      tokens: (N,) ids of the text.
      context_length: T of a window.
      batch_size: windows read together; for LLaDA and Dream, masked copies of one window.
      max_windows: only the first so many.
      num_samples: masked copies of each window, for LLaDA and Dream; the numbers of masks are stratified over them.
      seed: of the masks. Window i has the same masks whatever else is measured.
      report: called with the state after every batch (LLaDA, Dream: window).

    Raises:
      ValueError: fewer tokens than one window, a window of one token, or an id beyond the vocabulary.
    """
    tokens = np.asarray(tokens)
    if context_length < 2:
        raise ValueError(f"context_length={context_length}: a window scores its tokens but the first; give 2 or more.")
    windows = cut_windows(tokens, context_length, max_windows, "the text").tokens  # (W, T)
    if windows.max() >= model.config.vocab_size or windows.min() < 0:
        raise ValueError(
            f"the text has ids from {windows.min()} to {windows.max()}, the model {model.config.vocab_size} embedding "
            "rows; tokenise with the checkpoint's own tokenizer."
        )
    state = Perplexity()

    def grow(nll: np.ndarray) -> None:
        nonlocal state
        state = state.add(nll, context_length - 1)
        if report is not None:
            report(state)

    if model.config.family not in DIFFUSION_FAMILIES:
        for losses in token_losses(model, windows, windows, batch_size):
            grow(losses[:, 1:].sum(axis=1, dtype=np.float64))
        return state
    if model.config.mask_id is None:
        raise ValueError(f"the config.json of this {model.config.family} model has no mask_token_id; add it.")
    key = jax.random.key(seed)
    for i, window in enumerate(windows):
        grow(np.array([bound_of_window(model, window, batch_size, num_samples, jax.random.fold_in(key, i))]))
    return state
