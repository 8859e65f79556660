"""Which rows make up the batch of a step: pools of rows in fixed shares, each shuffled anew every epoch."""

import functools
import sys
from collections.abc import Sequence

import numpy as np

_MAX_CYCLE = 10_000  # draws after which the turns of the pools repeat, at most


class DrawOrder:
    """Row numbers of each step's global batch: endless, and any step at once, as Grain's random-access sources are.

    Pools take turns in a cycle that holds each of them as often as its share says. The length of the cycle is the
    smallest that gives every pool a whole number of draws; where _MAX_CYCLE draws are too few for that, shares are
    rounded to so many, one turn at least. Each pool is passed through in a new order each epoch. (Not by Grain's
    shuffle, which takes up to 10 ms a row in a pool of few rows.)

    Args:
      pools: (row numbers, share of the draws) of each pool.
      batch_size: rows of a global batch.
      seed: of the orders.
    """

    def __init__(self, pools: Sequence[tuple[np.ndarray, float]], batch_size: int, seed: int):
        self._rows = [rows for rows, _ in pools]
        self._batch_size = batch_size
        self._seed = seed
        shares = np.array([share for _, share in pools])
        shares /= shares.sum()
        turns = shares * np.arange(1, _MAX_CYCLE + 1)[:, None]  # (cycle lengths, pools)
        is_whole = np.all((np.abs(turns - np.round(turns)) < 1e-6) & (turns > 0.5), axis=1)
        cycle = int(np.argmax(is_whole)) + 1 if is_whole.any() else _MAX_CYCLE
        self._counts = np.maximum(1, np.round(shares * cycle)).astype(int).tolist()
        turns = [((turn + 0.5) / n, pool, turn) for pool, n in enumerate(self._counts) for turn in range(n)]
        self._turns = [(pool, turn) for _, pool, turn in sorted(turns)]  # each pool's turns evenly over the cycle
        self._order = functools.lru_cache(maxsize=4 * len(pools))(self._shuffle)

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        draws = range(step * self._batch_size, (step + 1) * self._batch_size)
        return np.array([self._row(draw) for draw in draws])

    def _row(self, draw: int) -> int:
        cycle, slot = divmod(draw, len(self._turns))
        pool, turn = self._turns[slot]
        epoch, position = divmod(cycle * self._counts[pool] + turn, len(self._rows[pool]))
        return self._order(pool, epoch)[position]

    def _shuffle(self, pool: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, pool, epoch]).permutation(self._rows[pool])
