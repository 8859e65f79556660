"""A decomposition W ~ Q + L R: what is stored of it, and what follows from it."""

import dataclasses
import functools

import jax

from odlri_jax import hadamard
from odlri_jax.decompose_config import DecomposeConfig, starts
from odlri_jax.matmul import matmul
from odlri_jax.packed_tensors import matrix_bits


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "q left right q_scale left_scale right_scale weight_scale signs_out signs_in "
        "error errors errors_after_q q_scales q_role lr_role start"
    ).split(),
    meta_fields=("config",),
)
@dataclasses.dataclass(frozen=True)
class Decomposition:
    """W ~ weight_scale * (Q + L R), each part in its basis.

    Attributes:
      q: (m, n), values of the codebook times q_scale.
      left, right: (m, r) and (r, n), on the lattice of left_scale, right_scale when quantised.
      q_scale: () or (m, n / group).
      left_scale, right_scale: (), 1 for 16-bit factors.
      weight_scale: (), root mean square of W.
      signs_out, signs_in: (m,) and (n,), the random signs of the rotation.
      error: (), relative error of the kept iterate: sqrt(tr(E H E^T) / tr(W H W^T)), E = W - Q - L R, in the metric of
        the damped H, H + ridge mean(diag H) I.
      errors, errors_after_q: (outer_iters,), the same after the low-rank step and after the rounding of Q.
      q_scales: (outer_iters,), mean scale of Q.
      q_role, lr_role: (), |Q X| / |W X| and |L R X| / |W X|.
      start: (), number of the start in `starts(config)`.
    """

    q: jax.Array
    left: jax.Array
    right: jax.Array
    q_scale: jax.Array
    left_scale: jax.Array
    right_scale: jax.Array
    weight_scale: jax.Array
    signs_out: jax.Array
    signs_in: jax.Array
    error: jax.Array
    errors: jax.Array
    errors_after_q: jax.Array
    q_scales: jax.Array
    q_role: jax.Array
    lr_role: jax.Array
    start: jax.Array
    config: DecomposeConfig

    def dense_q(self) -> jax.Array:
        """Q (m, n) in the basis and the units of W."""
        q = hadamard.coherent_weight(self.q, self.signs_out, self.signs_in) if self.config.hadamard else self.q
        return q * self.weight_scale

    def dense_low_rank(self) -> jax.Array:
        """L R (m, n) in the basis and the units of W."""
        product = matmul(self.left, self.right)
        if self.config.rotates_factors:
            product = hadamard.coherent_weight(product, self.signs_out, self.signs_in)
        return product * self.weight_scale

    def dense(self) -> jax.Array:
        """The (m, n) matrix that stands for W."""
        return self.dense_q() + self.dense_low_rank()

    @property
    def init(self) -> tuple[str, int]:
        """The start that was taken, and its k (0 where it has none)."""
        return starts(self.config)[int(self.start)]

    @property
    def num_bits_per_weight(self) -> float:
        """Bits of everything that the packed form stores, scales and signs included, over m n."""
        return matrix_bits(self.q.shape, self.config)
