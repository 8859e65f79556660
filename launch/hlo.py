"""A compiled program as XLA prints it, parsed: computations, instructions, arrays, and how often each loop runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0, "opaque": 0}
_ITEM_BYTES |= {f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)} | {"c64": 8, "c128": 16}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result. `is_on_chip`: the compiler placed it in a chip's fast memory."""

    dtype: str
    shape: tuple[int, ...]
    is_on_chip: bool = False

    @property
    def num_bytes(self) -> float:
        return _ITEM_BYTES.get(self.dtype, 4) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `attributes` is the text behind the operands."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str  # the text between the parentheses
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The word after `name=`."""
        found = re.search(rf"(?:^|[ ,]){name}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)

    def braces(self, name: str) -> str | None:
        """The text of `name={...}`, braces balanced."""
        start = self.attributes.find(f"{name}={{")
        return None if start < 0 else _balanced(self.attributes, start + len(name) + 1)[1:-1]

    @property
    def precision(self) -> str:
        """Of a dot or convolution: "default", "high" or "highest"."""
        found = re.search(r"operand_precision=\{(\w+)", self.attributes)
        return found.group(1) if found else "default"

    @functools.cached_property
    def callees(self) -> tuple[str, ...]:
        """Computations that run as part of this instruction, those of branches and reductions left out."""
        if self.opcode in ("all-reduce", "reduce", "reduce-window", "scatter", "sort", "map", "reduce-scatter"):
            return ()
        names = [self.attribute(key) for key in ("calls", "to_apply")]
        return tuple(name for name in names if name)


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.argument): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    entry: str
    computations: Mapping[str, Computation]


# -- parsing ----------------------------------------------------------------------------------------------------------


def _balanced(text: str, start: int) -> str:
    """The bracketed text that opens at `start`."""
    closing, depth = {"(": ")", "{": "}"}[text[start]], 0
    for end in range(start, len(text)):
        depth += (text[end] == text[start]) - (text[end] == closing)
        if depth == 0:
            return text[start : end + 1]
    raise ValueError(f"unbalanced {text[start]} in the program: {text[start : start + 80]!r}")


def parse_arrays(text: str) -> tuple[Array, ...]:
    """All arrays of a result such as "(f32[8,4]{1,0}, s32[])"."""
    found = _ARRAY.findall(text)
    return tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), bool(re.search(r"S\([1-9]", layout)))
        for dtype, sizes, layout in found
    )


def _parse_instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    shape = _balanced(rest, 0) if rest.startswith("(") else rest[: rest.index(" ")]
    rest = rest[len(shape) :].lstrip()
    opcode = rest[: rest.index("(")]
    argument = _balanced(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    attributes = rest[len(opcode) + len(argument) :].lstrip(", ")
    return Instruction(
        head.group(2), opcode, parse_arrays(shape), operands, argument[1:-1], attributes, bool(head.group(1))
    )


_END = r'\}(, execution_thread="\w+")?$'  # of a computation; some are given to another core of the chip


def _lines(text: str) -> Iterator[str]:
    """One instruction a line: a hand-written kernel carries notes that run over several."""
    pending = ""
    for line in text.splitlines():
        if re.match(rf"  (ROOT )?%|(ENTRY )?%?[\w.\-]+ \(|{_END}", line):
            yield pending
            pending = line
        else:
            pending += line
    yield pending


def parse(text: str) -> Module:
    """The program that `compiled.as_text()` gives."""
    computations, entry, name, lines = {}, None, None, {}
    for line in _lines(text):
        opening = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if opening:
            name, lines = opening.group(2), {}
            entry = name if opening.group(1) else entry
        elif re.match(_END, line) and name:
            computations[name], name = Computation(name, lines), None
        elif name:
            instruction = _parse_instruction(line)
            if instruction is not None:
                lines[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; give the output of compiled.as_text().")
    return Module(entry, computations)


# -- loops ------------------------------------------------------------------------------------------------------------


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction always holds, seen through copies."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start"):
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
        return int(instruction.argument)
    return None


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, where the program tells: stated, or a counter compared with a constant."""
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if stated:
        return int(stated.group(1))
    condition = module.computations[loop.attribute("condition")]
    compare = condition.root
    if compare.opcode == "fusion":  # the comparison alone, wrapped
        inner = module.computations[compare.attribute("calls")]
        operands = [
            compare.operands[int(i.argument)] if i.opcode == "parameter" else None
            for i in (inner.instructions[name] for name in inner.root.operands)
        ]
        compare = inner.root
    else:
        operands = list(compare.operands)
    if compare.opcode != "compare" or compare.attribute("direction") != "LT" or None in operands:
        return None
    start, stop = (_loop_value(computation, loop, condition, name) for name in operands)
    step = _increment(module, loop, condition.instructions[operands[0]])
    return None if None in (start, stop, step) else max(-(-(stop - start) // step), 0)


def _loop_value(computation: Computation, loop: Instruction, condition: Computation, name: str) -> int | None:
    """What one side of the condition holds before the first trip: a constant, or an entry of the loop's start."""
    value = _constant(condition, name)
    element = condition.instructions[name]
    if value is not None or element.opcode != "get-tuple-element":
        return value
    start = computation.instructions[loop.operands[0]]
    if start.opcode != "tuple":
        return None
    return _constant(computation, start.operands[int(element.attribute("index"))])


def _increment(module: Module, loop: Instruction, counter: Instruction) -> int | None:
    """What the body adds to the counter; an unrolled loop adds more than one."""
    body = module.computations[loop.attribute("body")]
    if counter.opcode != "get-tuple-element" or body.root.opcode != "tuple":
        return None
    update = body.instructions[body.root.operands[int(counter.attribute("index"))]]
    while update.opcode == "copy":
        update = body.instructions[update.operands[0]]
    if update.opcode == "fusion":  # the addition alone, wrapped
        inner = module.computations[update.attribute("calls")]
        update, where = inner.root, inner
    else:
        where = body
    if update.opcode != "add":
        return None
    constants = [_constant(where, name) for name in update.operands]
    return next((c for c in constants if c is not None and c > 0), None)
