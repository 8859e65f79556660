"""Counts what a compiled program does: FLOPs, bytes from memory, collectives, each loop as often as it runs.

XLA's own cost analysis counts a loop's body once, so a scanned model seems as deep as one layer; here a body counts as
often as it runs. What is counted:

  FLOPs        of dots and convolutions (a TPU's matmuls), two a multiply-add, wherever they sit, fusions included; of
               attention kernels, and of others that state a cost. Elementwise work is left out.
  collectives  bytes that one chip sends in a ring algorithm, by kind and by the mesh axes they cross; and whether
               the transfer runs beside other work (a start/done pair, or fused with matmuls) or alone.
  memory       bytes that instructions read from and write to the main memory (a fusion: its operands and results; a
               slice of a stack: the slice). An upper bound: what stays in on-chip memory is left out where the
               program says so.

A loop whose length the program does not say (one that depends on data) counts once, and `num_unknown_loops` tells. Of
branches the dearest counts.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from launch.hlo import Array, Computation, Instruction, Module, parse, trip_count

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_PASSES = {"high": 3, "highest": 6}  # of the matrix unit, which multiplies bfloat16, for one product of float32
# Products (T, H) x (H, S) of the splash kernels: scores and output; scores again and four gradients, in one kernel.
_ATTENTION_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
# Instructions that move nothing.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "async-done", "slice-done", "while",
    "conditional", "call", "opt-barrier", "optimization-barrier", "async-update", "send-done", "recv-done",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program with all its runs: bytes sent by a chip, summed over the loop's trips."""

    kind: str
    axes: str  # mesh axes, such as "fsdp" or "data+fsdp"
    num_bytes: float
    num_runs: float
    is_async: bool
    source: str  # the operation in the user's code


@dataclasses.dataclass(frozen=True)
class Tally:
    """Of one chip. `mxu_flops` weighs each product by the bfloat16 passes that its precision takes."""

    flops: float = 0.0
    mxu_flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    num_unknown_loops: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.flops + other.flops,
            self.mxu_flops + other.mxu_flops,
            self.memory_bytes + other.memory_bytes,
            self.collectives + other.collectives,
            self.num_unknown_loops + other.num_unknown_loops,
        )

    def times(self, runs: float) -> "Tally":
        repeated = tuple(
            dataclasses.replace(c, num_bytes=c.num_bytes * runs, num_runs=c.num_runs * runs) for c in self.collectives
        )
        flops, mxu_flops, memory_bytes = self.flops * runs, self.mxu_flops * runs, self.memory_bytes * runs
        return Tally(flops, mxu_flops, memory_bytes, repeated, self.num_unknown_loops)


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def _sizes(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def dot_flops(instruction: Instruction, left: Array) -> float:
    contracted = [left.shape[axis] for axis in _sizes(instruction.braces("lhs_contracting_dims"))]
    return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(contracted)


def convolution_flops(instruction: Instruction, left: Array, right: Array) -> float:
    """Two a multiply-add that touches no padding: a TPU writes batched matmuls as convolutions full of padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, out_labels = labels.groups()
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.braces("window") or ""))
    out = instruction.arrays[0].shape
    flops = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * right.shape[right_labels.index("i")]
    for k, label in enumerate(sorted(set(left_labels) - {"b", "f"})):

        def field(name: str, default: str, k: int = k) -> list[int]:
            entries = window.get(name)
            text = entries.split("x")[k] if entries else default
            return [int(n) for n in text.split("_")]

        size = right.shape[right_labels.index(label)]
        (stride,), (pad, *_) = field("stride", "1"), field("pad", "0_0")
        (left_dilate,), (right_dilate,) = field("lhs_dilate", "1"), field("rhs_dilate", "1")
        length = left.shape[left_labels.index(label)]
        position = np.arange(out[out_labels.index(label)])[:, None] * stride + np.arange(size) * right_dilate - pad
        is_inside = (position >= 0) & (position < (length - 1) * left_dilate + 1) & (position % left_dilate == 0)
        flops *= int(is_inside.sum())
    return flops


def kernel_flops(instruction: Instruction, operands: Sequence[Array]) -> float:
    """Of a hand-written kernel: the products of attention, or what the kernel says of itself."""
    for name, num_products in _ATTENTION_PRODUCTS.items():
        if instruction.name.startswith(name):
            q, k = [a for a in operands if len(a.shape) >= 3 and a.dtype in ("bf16", "f32")][:2]
            return 2.0 * num_products * math.prod(q.shape) * k.shape[-2]
    stated = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.attributes)
    return float(json.loads(stated.group(1)).get("flops", 0)) if stated else 0.0


# -- collectives ------------------------------------------------------------------------------------------------------


def replica_groups(instruction: Instruction, num_devices: int) -> list[list[int]]:
    """The groups of devices that a collective joins, of every notation XLA prints."""
    text = instruction.attributes
    pairs = instruction.braces("source_target_pairs")
    if pairs is not None:
        return [_sizes(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs)]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text)
    if named:
        axes = re.findall(r"'([^']+)'=(\d+)", named.group(1))
        kept = re.findall(r"'([^']+)'", named.group(2))
        shape = [int(size) for _, size in axes]
        order = re.search(r"devices=\[([\d,]+)\]", text)  # where the mesh is a permutation of the devices
        grid = np.arange(num_devices).reshape(shape) if order is None else np.array(_sizes(order[1])).reshape(shape)
        names = [name for name, _ in axes]
        front = [names.index(name) for name in names if name not in kept]
        back = [names.index(name) for name in kept]
        return grid.transpose(front + back).reshape(-1, math.prod(shape[axis] for axis in back)).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        groups, dims, order = (_sizes(part) for part in iota.groups())
        grid = np.arange(math.prod(dims)).reshape(dims)
        return (grid.transpose(order) if order else grid).reshape(groups).tolist()
    listed = instruction.braces("replica_groups")
    groups = [_sizes(group) for group in re.findall(r"\{([\d,]+)\}", listed or "")]
    return groups or [list(range(num_devices))]


def crossed_axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> str:
    """Names of the mesh axes along which the members of a group differ; device i sits at index i of the flat mesh."""
    coordinates = np.array(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values()))).T
    crossed = np.zeros(len(mesh), bool)
    for group in groups:
        members = coordinates[list(group)]
        crossed |= (members != members[0]).any(axis=0)
    return "+".join(name for name, is_crossed in zip(mesh, crossed, strict=True) if is_crossed) or "none"


def _sent_bytes(kind: str, in_bytes: float, out_bytes: float, size: int) -> float:
    """What one of `size` chips sends in a ring."""
    share = (size - 1) / size
    if kind == "all-gather":
        return max(out_bytes, in_bytes) * share
    if kind == "all-reduce":
        return 2 * in_bytes * share
    if kind == "collective-permute":
        return in_bytes
    return in_bytes * share


# -- the count --------------------------------------------------------------------------------------------------------


class _Counter:
    def __init__(self, module: Module, mesh: Mapping[str, int]):
        self.module = module
        self.mesh = mesh
        self.num_devices = math.prod(mesh.values())
        self.tally = functools.cache(self._tally)
        self.seen_channels: set[str] = set()

    def _tally(self, name: str, is_fused: bool = False, is_beside: bool = False) -> Tally:
        """Everything a computation does, the bodies of its loops multiplied.

        Args:
          is_fused: it is the inside of a fusion, whose traffic is that of the fusion's own operands.
          is_beside: its collectives run beside other work.
        """
        computation = self.module.computations[name]
        total = Tally()
        for instruction in computation.instructions.values():
            total += self._instruction(computation, instruction, is_fused, is_beside)
        return total

    def _instruction(self, computation, instruction, is_fused, is_beside) -> Tally:
        opcode = instruction.opcode
        operand = lambda i: computation.instructions[instruction.operands[i]].arrays[0]
        if opcode == "while":
            body = self.tally(instruction.attribute("body"))
            trips = trip_count(self.module, computation, instruction)
            return body.times(trips) if trips is not None else body + Tally(num_unknown_loops=1)
        if opcode == "conditional":
            names = re.findall(r"%([\w.\-]+)", instruction.braces("branch_computations") or "")
            names += [n for key in ("true_computation", "false_computation") if (n := instruction.attribute(key))]
            return max((self.tally(n) for n in names), key=lambda t: (t.flops, t.memory_bytes))
        flops = 0.0
        if opcode == "dot":
            flops = dot_flops(instruction, operand(0))
        elif opcode == "convolution":
            flops = convolution_flops(instruction, operand(0), operand(1))
        elif opcode == "custom-call":
            flops = kernel_flops(instruction, [operand(k) for k in range(len(instruction.operands))])
        passes = _PASSES.get(instruction.precision, 1)
        total = Tally(
            flops, flops * passes, collectives=self._collective(computation, instruction, is_fused, is_beside)
        )
        if not is_fused and opcode not in _FREE:
            total += Tally(memory_bytes=self._memory_bytes(computation, instruction))
        for callee in instruction.callees:
            carries = opcode == "async-start" or instruction.name.startswith("async-collective")
            carries |= callee.startswith("async_collective")
            total += self.tally(callee, opcode != "call", is_beside or carries)
        return total

    def _collective(self, computation, instruction, is_fused, is_beside) -> tuple[Collective, ...]:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            return ()
        channel = instruction.attribute("channel_id")
        if is_beside and channel is not None:  # one transfer, cut into steps that matmuls carry along
            if channel in self.seen_channels:
                return ()
            self.seen_channels.add(channel)
        if kind == "all-reduce" and is_fused and self._is_scattered(computation, instruction):
            kind = "reduce-scatter"
        groups = replica_groups(instruction, self.num_devices)
        size = max(map(len, groups))
        if size == 1:
            return ()
        inputs = [a for name in instruction.operands for a in computation.instructions[name].arrays]
        in_bytes = sum(array.num_bytes for array in inputs)
        out_bytes = sum(array.num_bytes for array in instruction.arrays)
        if instruction.opcode.endswith("-start") and kind != "all-reduce":  # its result names the operands too
            out_bytes -= in_bytes
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        return (
            Collective(
                kind, crossed_axes(groups, self.mesh), _sent_bytes(kind, in_bytes, out_bytes, size), 1.0,
                is_beside or self._has_work_before_done(computation, instruction), source.group(1) if source else "",
            ),
        )  # fmt: skip

    def _is_scattered(self, computation: Computation, reduce: Instruction) -> bool:
        """Whether a fusion keeps of a sum this chip's slice alone: the TPU compiler's way to write a reduce-scatter."""
        users = [user.opcode for _, user in _users(computation, reduce.name)]
        return users == ["dynamic-slice"]

    def _has_work_before_done(self, computation: Computation, start: Instruction) -> bool:
        """Whether a start/done pair has a matmul, fusion or loop scheduled between the two."""
        if not start.opcode.endswith("-start"):
            return False
        after = itertools.dropwhile(lambda i: i is not start, computation.instructions.values())
        between = itertools.takewhile(lambda i: start.name not in i.operands, itertools.islice(after, 1, None))
        return any(i.opcode in ("fusion", "dot", "convolution", "while", "custom-call", "call") for i in between)

    def _memory_bytes(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.name.startswith("async-collective") or instruction.opcode.endswith("-update"):
            return 0.0
        written = sum(a.num_bytes for a in instruction.arrays if not a.is_on_chip)
        operands = [computation.instructions[name].arrays for name in instruction.operands]
        if instruction.opcode == "dynamic-slice":
            return 2 * written
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sum(a.num_bytes for a in operands[1])
        if instruction.opcode.endswith("-start"):  # its result names operand and target
            return sum(a.num_bytes for arrays in operands for a in arrays if not a.is_on_chip)
        if instruction.opcode != "fusion":
            return written + sum(a.num_bytes for arrays in operands for a in arrays if not a.is_on_chip)
        name = instruction.attribute("calls")
        inner = self.module.computations[name]
        if name.startswith("async_collective"):  # it passes the buffers of the transfer on, in place
            aliased = re.findall(r"\{(\d*)\}: \((\d+)", instruction.braces("output_to_operand_aliasing") or "")
            kept_outputs, kept_operands = ({int(pair[k] or 0) for pair in aliased} for k in (0, 1))
            written = sum(
                a.num_bytes for k, a in enumerate(instruction.arrays) if not (a.is_on_chip or k in kept_outputs)
            )
            operands = [arrays for k, arrays in enumerate(operands) if k not in kept_operands]
            return written + sum(a.num_bytes for arrays in operands for a in arrays if not a.is_on_chip)
        return sum(_read_bytes(self.module, inner, k, arrays) for k, arrays in enumerate(operands)) + _written_bytes(
            inner, written
        )


def _users(computation: Computation, name: str) -> Iterator[tuple[str, Instruction]]:
    """Who uses a value, looking through bitcasts, and under which name."""
    for user in computation.instructions.values():
        if name in user.operands:
            if user.opcode == "bitcast":
                yield from _users(computation, user.name)
            else:
                yield name, user


def _read_bytes(module: Module, inner: Computation, number: int, arrays: tuple[Array, ...]) -> float:
    """What a fusion reads of its operand: a slice where it only slices, nothing where it only overwrites a part."""
    whole = sum(a.num_bytes for a in arrays if not a.is_on_chip)
    parameter = inner.parameters.get(number)
    users = list(_users(inner, parameter.name)) if parameter else []
    if not whole or not users:
        return whole
    read = 0.0
    for name, user in users:
        if user.opcode == "dynamic-slice":
            read += sum(a.num_bytes for a in user.arrays)
        elif user.opcode == "fusion":
            nested = module.computations[user.attribute("calls")]
            read += sum(_read_bytes(module, nested, k, arrays) for k, o in enumerate(user.operands) if o == name)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            read += whole
    return min(whole, read)


def _written_bytes(inner: Computation, written: float) -> float:
    """What a fusion writes: the part alone where its result is a stack with one part overwritten."""
    updates = [i for i in inner.instructions.values() if i.opcode == "dynamic-update-slice"]
    for update in updates:
        whole = sum(a.num_bytes for a in update.arrays)
        part = sum(a.num_bytes for a in inner.instructions[update.operands[1]].arrays)
        written -= min(whole - part, written)
    return written


def count(text: str, mesh: Mapping[str, int]) -> Tally:
    """FLOPs, memory traffic and collectives of one chip in one run of a compiled program.

    Args:
      text: `compiled.as_text()`.
      mesh: axis name -> size, in the order of the mesh the program was compiled for.
    """
    module = parse(text)
    return _Counter(module, mesh).tally(module.entry)
