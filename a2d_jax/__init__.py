"""A2D in JAX: token-level safety alignment of masked-diffusion language models."""
