"""`CompressedLinear`: y = weight_scale S_V U_m^T (Q + L R) U_n S_U x (+ b), computed from the packed arrays.

It takes the place of a dense `Linear` of the transformer, one layer or a stack of layers for its scan. The packed
arrays are `Packed` variables: frozen, in the dtype they are stored in, decoded inside the compiled forward pass and
again in the backward pass, so that no decoded matrix is ever kept. 16-bit factors are `nnx.LoRAParam`: they are what
training changes. Where Q and the factors live in different bases, each is given its own rotations.

On a TPU, in bfloat16, products with lattice codes are those of `kernel.py`; its gradients are those of the plain path.

Shapes: x (..., n), Q (m, n), L (m, r), R (r, n), y (..., m).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from a2d_jax.models.transformer import DTypes
from a2d_jax.sharding import is_for_tpu, mesh_in_force, partition_spec
from odlri_jax import hadamard
from odlri_jax.codebooks import LatticeCodebook
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.decomposition import Decomposition
from odlri_jax.kernel import packed_product
from odlri_jax.packed_tensors import tensor_specs
from odlri_jax.packing import decode, scaled, unpack, unpack_signs


class Packed(nnx.Variable):
    """A packed array: never trained, never cast."""


class CompressedLinear(nnx.Module):
    """A projection in packed form; its call is that of `Linear`, whose place it takes."""

    lora_a = None  # it takes no adapter beside its own factors

    def __init__(
        self,
        shape: tuple[int, int],
        config: DecomposeConfig,
        *,
        axes: tuple[str, str],
        dtypes: DTypes,
        has_bias: bool = False,
        stack: tuple[int, ...] = (),
    ):
        """All arrays zero, to be filled.

        Args:
          shape: (m, n) of W, y = W x.
          config: what the matrix was decomposed with.
          axes: logical names of (inputs, outputs).
          dtypes: 16-bit factors are float32 where parameters are (to be trained), else float16 as stored.
          stack: leading axes of every array.
        """
        names = {"in": axes[0], "out": axes[1], "rank": "rank", None: None}
        factor_dtype = jnp.float32 if jnp.dtype(dtypes.param) == jnp.float32 else jnp.float16
        self.suffixes = tuple(tensor_specs(shape, config))
        for suffix, spec in tensor_specs(shape, config).items():
            kind, dtype = (nnx.LoRAParam, factor_dtype) if suffix in ("left", "right") else (Packed, spec.dtype)
            logical_axes = tuple(names[axis] for axis in spec.axes)
            setattr(self, suffix, kind(jnp.zeros((*stack, *spec.shape), dtype), logical_axes=logical_axes))
        bias = nnx.Param(jnp.zeros((*stack, shape[0]), dtypes.param), logical_axes=axes[1:]) if has_bias else None
        self.bias = nnx.data(bias)
        self.shape = tuple(shape)
        self.axes = tuple(axes)
        self.config = config
        self.dtypes = dtypes

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None, out_dtype=None) -> jax.Array:
        """x (..., n) -> (..., m) in `out_dtype` (default: compute). There is no dropout; the key is ignored."""
        arrays = {suffix: getattr(self, suffix)[...] for suffix in self.suffixes}
        y = _apply(arrays, x, self.shape, self.axes, self.config, self.dtypes).astype(out_dtype or self.dtypes.compute)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def replace_factors(self, config: DecomposeConfig, left: jax.Array, right: jax.Array) -> None:
        """Takes 16-bit factors in place of quantised ones: (L, m, r), (L, r, n), in the basis that `config` says."""
        axes = {"left": self.left_index.logical_axes, "right": self.right_index.logical_axes}
        if self.config.published:
            axes["left"] = axes["left"][::-1]
        for suffix in set(self.suffixes) - set(tensor_specs(self.shape, config)):
            delattr(self, suffix)
        stack = self.weight_scale.shape
        for suffix, factor in (("left", left), ("right", right)):
            factor = factor.reshape(*stack, *factor.shape[-2:]).astype(jnp.float16)
            setattr(self, suffix, nnx.LoRAParam(factor, logical_axes=axes[suffix]))
        self.suffixes, self.config = tuple(tensor_specs(self.shape, config)), config

    def decomposition(self, layer: int | None = None) -> Decomposition:
        """The matrix of one layer (None: of a projection that is not stacked), factors as they are now."""
        arrays = {suffix: getattr(self, suffix)[...] for suffix in self.suffixes}
        arrays = {suffix: np.asarray(x if layer is None else x[layer]) for suffix, x in arrays.items()}
        return unpack(arrays, self.config, self.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _kernel_product(x, arrays, factors, codebook: LatticeCodebook, axes: tuple[str, str], plain) -> jax.Array:
    """`plain(x, arrays, factors)` by the TPU kernel, each chip with its rows of x and its part of the weights."""
    product = functools.partial(packed_product, codebook=codebook)
    rows = x.reshape(-1, x.shape[-1])  # (T, n)
    if factors is not None:
        factors = factors[0].reshape(len(rows), -1), factors[1]
    if (mesh := mesh_in_force()) is None:
        return product(rows, arrays, factors=factors).reshape(*x.shape[:-1], -1)
    # The compiler cannot split a kernel. Weights that are split over `fsdp` are gathered, packed as they are.
    parts = partition_spec(axes[::-1], arrays["q_index"].shape, mesh)
    outputs, inputs = ("tensor" if "tensor" in (entry or ()) else None for entry in parts)
    (batch, _) = partition_spec(("batch", None), rows.shape, mesh)

    def part(rows, arrays, factors):
        if inputs is None:
            return product(rows, arrays, factors=factors)
        if factors is not None:  # once in the sum
            factors = factors[0] * (jax.lax.axis_index(inputs) == 0), factors[1]
        return jax.lax.psum(product(rows, arrays, factors=factors), inputs)

    weights = {name: PartitionSpec(outputs, inputs) if x.ndim else PartitionSpec() for name, x in arrays.items()}
    of_factors = None if factors is None else (PartitionSpec(batch), PartitionSpec(outputs))
    split = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(PartitionSpec(batch, inputs), weights, of_factors),
        out_specs=PartitionSpec(batch, outputs),
        check_vma=False,
    )
    return split(rows, arrays, factors).reshape(*x.shape[:-1], -1)


def _kernel_forward(x, arrays, factors, codebook, axes, plain):
    return _kernel_product(x, arrays, factors, codebook, axes, plain), (x, arrays, factors)


def _kernel_backward(codebook, axes, plain, saved, gradient):
    return jax.vjp(plain, *saved)[1](gradient)


_kernel_product.defvjp(_kernel_forward, _kernel_backward)


def _apply(
    arrays: Mapping[str, jax.Array],
    x: jax.Array,
    shape: tuple[int, int],
    axes: tuple[str, str],
    config: DecomposeConfig,
    dtypes: DTypes,
) -> jax.Array:
    """(Q + L R) x in the basis and the units of W, float32."""
    matmul = functools.partial(jnp.matmul, precision=dtypes.precision, preferred_element_type=jnp.float32)
    cast = lambda values: values.astype(dtypes.compute)
    plain = rotated = cast(x)
    if config.rotates_factors:
        signs_out, signs_in = unpack_signs(arrays["signs_out"], shape[0]), unpack_signs(arrays["signs_in"], shape[1])
        # Rotations are float32: they are cheap beside the products, and bfloat16 would round after every stage.
        rotated = cast(hadamard.rotate(x.astype(jnp.float32) * signs_in))  # U_n S_U x

    def rotate_back(y):
        return hadamard.rotate(y, inverse=True) * signs_out  # S_V U_m^T y

    @jax.checkpoint  # Q is decoded again in the backward pass
    def times_q(x, arrays):
        points = decode(arrays, "q", config.codebook)  # (m, n)
        if isinstance(config.codebook, LatticeCodebook):  # the scale goes last: points are exact in bfloat16
            return matmul(x, cast(points).T) * arrays["q_scale"]
        return matmul(x, cast(scaled(points, arrays["q_scale"])).T)

    def product(x, arrays, factors):
        y = times_q(x, arrays)
        return y if factors is None else y + matmul(factors[0], factors[1].T)

    def factor(name):
        if config.factor_codebook is None:
            return arrays[name]
        return decode(arrays, name, config.factor_codebook) * arrays[f"{name}_scale"]

    left = factor("left")
    if config.factor_codebook is not None and config.published:
        left = left.T  # (m, r)
    low_rank = matmul(rotated, cast(factor("right")).T)  # (..., r)
    factors = cast(low_rank), cast(left)
    if is_for_tpu() and isinstance(config.codebook, LatticeCodebook) and jnp.dtype(dtypes.compute) == jnp.bfloat16:
        product = functools.partial(_kernel_product, codebook=config.codebook, axes=axes, plain=product)
    q_arrays = {name: array for name, array in arrays.items() if name.startswith("q_")}
    if config.hadamard == config.rotates_factors:  # Q and L R in one basis
        y = product(rotated, q_arrays, factors)
        y = rotate_back(y) if config.hadamard else y
    else:  # L R alone is rotated
        y = product(plain, q_arrays, None) + rotate_back(matmul(factors[0], factors[1].T))
    return y * arrays["weight_scale"]
