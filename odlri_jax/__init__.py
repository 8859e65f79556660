"""ODLRI in JAX: weights as a low-bit matrix plus a low-rank one, W ~ Q + L R, started from the outlier channels."""

from odlri_jax.decompose import DecomposeConfig, Decomposition, decompose, decompose_stack

__all__ = ["DecomposeConfig", "Decomposition", "decompose", "decompose_stack"]
