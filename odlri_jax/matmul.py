"""The matrix product of everything that is solved or rounded here, in full float32."""

import functools

import jax
import jax.numpy as jnp

# By default a TPU multiplies float32 in one pass of bfloat16, whose 8 bits of mantissa would drown ridge and feedback.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
