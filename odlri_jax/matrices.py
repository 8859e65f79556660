"""The matrices of a checkpoint that are decomposed: their names, the rank that suits them all, the files they go to."""

import dataclasses
import zlib
from collections.abc import Sequence

import jax

from a2d_jax.config import ModelConfig
from a2d_jax.models.naming import tensor_names
from odlri_jax.codebooks import BLOCK
from odlri_jax.decompose_config import DecomposeConfig


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One linear layer: its name in the checkpoint, ours ("q_proj", ...), its layer, and (m, n)."""

    name: str
    projection: str
    layer: int | None
    shape: tuple[int, int]

    def key(self, seed: int) -> jax.Array:
        """Random key that depends on the name alone."""
        return jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.name.encode()))

    @property
    def work(self) -> int:
        """Multiplications with H, to which most of the time goes."""
        return self.shape[0] * self.shape[1] ** 2


def list_matrices(config: ModelConfig, has_head: bool) -> list[Matrix]:
    """The matrices to decompose, in the order of the layers."""
    if has_head and config.tie_embeddings:
        raise ValueError("--head: this model's head is its embedding, which stays dense; leave the flag out.")
    return [
        Matrix(name.hf_name.removesuffix(".weight"), name.path[-2], name.layer, name.shape)
        for name in tensor_names(config)
        if name.path[-1] == "kernel" and (name.layer is not None or has_head)
    ]


def default_rank(matrices: Sequence[Matrix]) -> int:
    """Rank where none is given: 64, or half of the smallest side, in multiples of 8, where that side is below 64."""
    smallest = min(min(matrix.shape) for matrix in matrices)
    return DecomposeConfig.rank if DecomposeConfig.rank <= smallest else max(1, smallest // 2 // BLOCK * BLOCK)


def layer_groups(matrices: Sequence[Matrix], layers_per_group: int) -> dict[str, list[Matrix]]:
    """File stem -> its matrices: runs of layers, then the head."""
    last = max((matrix.layer for matrix in matrices if matrix.layer is not None), default=0)
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.layer is None:
            stem = "head"
        else:
            first = matrix.layer // layers_per_group * layers_per_group
            stem = f"layers-{first:03d}-{min(first + layers_per_group - 1, last):03d}"
        groups.setdefault(stem, []).append(matrix)
    return groups
