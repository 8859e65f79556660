"""The device mesh and the one table that lays the model's named axes onto it.

Model code names what an axis *means* ("mlp", "heads", ...); `RULES` says which mesh axis splits it. Three mesh axes:
`data` replicates the weights and splits the batch, `fsdp` splits weights and batch together, `tensor` splits heads,
mlp width and vocabulary.
"""

import contextlib
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "layers": None,  # the scan walks this axis
    "embed": "fsdp",
    "norm": None,  # one short vector a layer: cheaper to keep everywhere than to gather
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # An untied head is cut by vocabulary alone, over all chips that share weights: the loss then gathers a few hidden
    # states where it would gather the largest matrix of the model.
    "head_width": None,
    "head_vocab": ("tensor", "fsdp"),
    "rank": None,
    "rows": ("data", "fsdp", "tensor"),  # of a large matrix that is no weight
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh ("data", "fsdp", "tensor"); one size may be -1: whatever devices remain."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh sizes data={data}, fsdp={fsdp}, tensor={tensor}: each must be >= 1, at most one -1.")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not use the {len(devices)} devices; "
            "the product of the sizes must be their number, and -1 stands for what the others leave."
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def with_auto_axes(mesh: Mesh) -> Mesh:
    """The same devices and names with Auto axis types, which the rules are written for.

    Raises:
      ValueError: a mesh without one of the axes.
    """
    if not set(MESH_AXES) <= set(mesh.axis_names):
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}; needed are {MESH_AXES}: make it by a2d_jax.make_mesh."
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    """Names of the mesh axes that a logical axis is split over."""
    target = RULES[axis] if axis is not None else None
    return (target,) if isinstance(target, str) else target or ()


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Mesh axes for an array with these logical axes; a dimension that the mesh does not divide stays whole."""
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        ways = int(np.prod([mesh.shape[name] for name in _mesh_axes(axis)]))
        entries.append(RULES[axis] if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*entries)


def logical_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Axis names of a parameter; a stacked one has "layers" in front of the names its module gave it."""
    axes = variable.logical_axes
    return ("layers",) * (len(variable.shape) - len(axes)) + tuple(axes)


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """A NamedSharding for each variable of a (possibly abstract) model state."""

    def place(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(NamedSharding(mesh, partition_spec(logical_axes(variable), variable.shape, mesh)))

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """First axis over the batch axes of the mesh, the rest whole."""
    axes = ("batch",) + (None,) * (len(shape) - 1)
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def under(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """A context in which programs are traced with the mesh in force; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh_in_force() -> AbstractMesh | None:
    """The mesh that the program being traced is `under`; None where there is none, or one with other axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names) else mesh


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation is split, where a mesh is in force; else does nothing."""
    if (mesh := mesh_in_force()) is None:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(axes, array.shape, mesh))


def is_for_tpu() -> bool:
    """Whether the program being traced is for a TPU: by the mesh in force, or else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"


def num_shards(axis: str, size: int) -> int:
    """Parts that the mesh in force splits `size` entries of a logical axis into; 1 without a mesh."""
    if (mesh := mesh_in_force()) is None:
        return 1
    ways = int(np.prod([mesh.shape[name] for name in _mesh_axes(axis)]))
    return ways if size % ways == 0 else 1


def mesh_of(model: nnx.Module) -> Mesh | None:
    """The mesh that the model's parameters are split over, or None on a single device."""
    for leaf in jax.tree.leaves(nnx.state(model)):
        sharding = getattr(leaf, "sharding", None)
        return sharding.mesh if isinstance(sharding, NamedSharding) else None
    return None
