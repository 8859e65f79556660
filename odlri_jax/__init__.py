"""ODLRI in JAX: weights as a low-bit matrix plus a low-rank one, W ~ Q + L R, started from the outlier channels."""

from odlri_jax.decompose import decompose, decompose_arrays, decompose_stack
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.decomposition import Decomposition

__all__ = ["DecomposeConfig", "Decomposition", "decompose", "decompose_arrays", "decompose_stack"]
