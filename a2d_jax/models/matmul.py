"""x W, with a gradient that is cheap on every chip.

The gradient of W is a sum over rows of x and g, one of which a CPU writes out transposed before it multiplies; for g it
computes again on the way whatever elementwise chain g came from, which can take longer than the product itself. JAX
asks for (g^T x)^T whatever their widths. Here the narrower of the two goes first, and is what is transposed.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, w: jax.Array, precision: jax.lax.Precision, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """(..., in) x (in, out) -> (..., out) in `out_dtype`; None: that of x and W."""
    return jnp.matmul(x, w, precision=precision, preferred_element_type=out_dtype)


def _forward(x, w, precision, out_dtype):
    return matmul(x, w, precision, out_dtype), (x, w)


def _backward(precision, out_dtype, saved, gradient):
    x, w = saved
    product = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=out_dtype)
    rows = tuple(range(x.ndim - 1))
    of_x = product(gradient, w, (((gradient.ndim - 1,), (1,)), ((), ())))  # g W^T, (..., in)
    over_rows = ((rows, rows), ((), ()))
    if x.shape[-1] <= gradient.shape[-1]:
        of_w = product(x, gradient, over_rows)  # x^T g, (in, out)
    else:
        of_w = product(gradient, x, over_rows).T  # (g^T x)^T
    return of_x.astype(x.dtype), of_w.astype(w.dtype)


matmul.defvjp(_forward, _backward)
