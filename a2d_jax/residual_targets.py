"""The constant targets of the residual term, from a tokenizer and the training rows; see `a2d_jax/residual.py`."""

import numpy as np

from a2d_jax.data import EncodedRows
from a2d_jax.residual import Residual, ResidualConfig, kept_tokens
from a2d_jax.tokenizer import Tokenizer


def make_residual(
    config: ResidualConfig, tokenizer: Tokenizer, rows: EncodedRows, vocab_size: int, refusal_id: int
) -> Residual:
    """The term for a tokenizer and training rows; ValueError where its target would hold no token."""
    is_kept = kept_tokens(vocab_size, (refusal_id, tokenizer.mask_id))
    if config.target == "base":
        return Residual(config, None)
    if config.target == "uniform":
        mass = np.ones(vocab_size)
    elif config.target == "tokens":
        mass = np.zeros(vocab_size)
        ids = tokenizer.encode(config.text) if config.text else [tokenizer.eot_id]
        mass[[token for token in ids if token is not None]] = 1
    else:
        mass = retain_counts(rows, vocab_size)
    mass = np.where(is_kept, mass, 0)
    if not mass.any():
        raise ValueError(
            f"residual.target={config.target!r} holds no token beside the refusal token {refusal_id} and [MASK]; give "
            "residual.text other words, or add retain rows."
        )
    return Residual(config, (mass / mass.sum()).astype(np.float32))


def retain_counts(rows: EncodedRows, vocab_size: int) -> np.ndarray:
    """How often each token occurs in the responses of retain rows, documents included: (V,)."""
    start, end = rows.offsets[:-1] + rows.prompt_lengths, rows.offsets[1:]
    responses = [rows.tokens[first:last] for first, last in zip(start[rows.is_safe], end[rows.is_safe], strict=True)]
    return np.bincount(np.concatenate([*responses, np.zeros(0, np.int32)]), minlength=vocab_size)
