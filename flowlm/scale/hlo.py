"""Reads from the HLO text of a compiled program what it does: products, collectives and memory traffic, in every run of a loop.

XLA's own cost analysis counts the body of a loop once. Here every instruction is weighted by the trip counts of the loops
around it: `known_trip_count` where the text has it, otherwise read from the loop's condition, i < n with i from a constant.

Products are read from the program right after SPMD partitioning, where they are still `dot`s; collectives and traffic from the
program after all passes, because late passes move reductions out of loops, merge them and send bfloat16 where it is enough.
There an asynchronous collective is a chain of fusions (`async-collective-start`, steps, `-done`), each of which holds the
same collective: its start is counted. Across slices (DCN) a collective has become a `send` to the host.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Instructions that move nothing: they name parts of other arrays, end what others begin, or are control flow, whose bodies count.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "send", "recv", "iota"),
)


class Shape(NamedTuple):
    """One array of an instruction's result. space: 0 is HBM; on TPUs 1 is vector memory, others are smaller still."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        width = BYTES[self.dtype] if self.dtype in BYTES else int(re.findall(r"\d+", self.dtype)[0]) / 8
        return math.prod(self.dims) * width


class Instruction(NamedTuple):
    """A line of HLO.

    Attributes:
      kind: its result's type, as text.
      shapes: those in the type, a tuple's flattened.
      rest: the text behind the operands, without metadata.
    """

    name: str
    opcode: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    argument: str  # the text between the parentheses
    rest: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """The computation that `key`= names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


class Module(NamedTuple):
    """A program: its computations as {name: {name of an instruction: instruction}}, and the number of devices that run it."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int


class Step(NamedTuple):
    """An instruction, how often it runs, the instructions of its own computation, and whether that is the body of a fusion."""

    instruction: Instruction
    times: float
    scope: dict[str, Instruction]
    fused: bool


class Collective(NamedTuple):
    """`bytes`: the operand's size on one chip; `wire`: what a chip sends in one run (ring algorithm); `times`: runs in a step."""

    kind: str
    group: int
    bytes: float
    wire: float
    times: float


_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def _shapes(text: str) -> tuple[Shape, ...]:
    out = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        out.append(Shape(dtype, tuple(int(d.strip("<=")) for d in dims.split(",") if d), int(space[1]) if space else 0))
    return tuple(out)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _instruction(root: bool, name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, tail = text[end:].strip().partition("(")
    close = _closing("(" + tail, 0) - 1
    argument, rest = tail[:close], tail[close + 1 :]
    operands = tuple(part.split(" ")[-1].lstrip("%") for part in argument.split(", ") if part)
    return Instruction(name, opcode, text[:end], _shapes(text[:end]), operands, argument, rest, root)


def _elements(kind: str) -> list[str]:
    """The types that a tuple's type is made of."""
    out, depth = [""], 0
    for char in kind[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            out.append("")
        else:
            out[-1] += char
    return [each.strip() for each in out]


def _write_out(scope: dict[str, Instruction], name: str) -> None:
    """Gives `tuple#1` an instruction of its own: newer XLA names a tuple's element where it is used, older XLA on a line."""
    whole, sign, index = name.rpartition("#")
    if sign and name not in scope:
        _write_out(scope, whole)
        kind = _elements(scope[whole].kind)[int(index)]
        scope[name] = _instruction(False, name, f"{kind} get-tuple-element(%{whole}), index={index}")


def parse(text: str) -> Module:
    """A module from the text of `HloModule ...`, as XLA dumps it. Raises ValueError for what is none."""
    computations, entry, scope = {}, None, None
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        if found := _LINE.match(line):
            if scope is not None:
                body = re.sub(r", metadata=\{.*?\}(?=, |$)", "", found[3])
                made = _instruction(bool(found[1]), found[2], body)
                for name in made.operands:
                    _write_out(scope, name)
                scope[found[2]] = made
        elif found := _HEAD.match(line):
            scope = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
    if entry is None:
        raise ValueError(f"not the text of an HLO module: {text[:60]!r}")
    header = text[: text.index("\n")]
    parts, replicas = (re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count"))
    return Module(computations, entry, int(parts[1] if parts else 1) * int(replicas[1] if replicas else 1))


def _root(scope: dict[str, Instruction]) -> Instruction:
    return next(i for i in scope.values() if i.root)


def _source(scope: dict[str, Instruction], name: str) -> Instruction:
    """The instruction that makes a value, behind copies of it."""
    found = scope[name]
    while found.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "opt-barrier") and (
        found.operands[0] in scope
    ):
        found = scope[found.operands[0]]
    return found


def trip_count(module: Module, loop: Instruction, scope: dict[str, Instruction]) -> int | None:
    """How often a `while` runs; None where its condition is no comparison of a counter with a constant."""
    if known := re.search(r"known_trip_count\D*(\d+)", loop.rest):
        return int(known[1])
    condition = module.computations[loop.attribute("condition")]
    first = _source(scope, loop.operands[0])

    def value(body, name, arguments):
        """(number, whether it is the counter's first value) of a value in the condition, or None."""
        made = _source(body, name)
        if made.opcode == "constant":
            return (int(made.argument), False) if re.fullmatch(r"-?\d+", made.argument) else None
        if made.opcode == "parameter" and arguments is not None:
            return value(condition, arguments[int(made.argument)], None)
        if made.opcode == "get-tuple-element" and first.opcode == "tuple":
            index = int(re.search(r"index=(\d+)", made.rest)[1])
            start = _source(scope, first.operands[index])
            if start.opcode == "constant" and re.fullmatch(r"-?\d+", start.argument):
                return int(start.argument), True
        return None

    test, body, arguments = _root(condition), condition, None
    if test.opcode == "fusion":
        body, arguments = module.computations[test.attribute("calls")], test.operands
        test = _root(body)
    if test.opcode != "compare":
        return None
    left, right = (value(body, name, arguments) for name in test.operands)
    direction = re.search(r"direction=(\w+)", test.rest)[1]
    if left is None or right is None or direction not in ("LT", "LE"):
        return None
    return max(0, right[0] - left[0] + (direction == "LE"))


def walk(module: Module, unknown: list[str] | None = None) -> Iterator[Step]:
    """Every instruction that runs, with how often. A loop of unknown length counts once, and its name goes to `unknown`.

    Of a conditional every branch counts as if it were taken.
    """

    def visit(name, times, fused):
        scope = module.computations[name]
        for each in scope.values():
            yield Step(each, times, scope, fused)
            if each.opcode == "while":
                trips = trip_count(module, each, scope)
                if trips is None and unknown is not None:
                    unknown.append(each.name)
                yield from visit(each.attribute("body"), times * (1 if trips is None else trips), fused)
            elif each.opcode in ("fusion", "async-start"):
                yield from visit(each.attribute("calls"), times, True)
            elif each.opcode == "call":
                yield from visit(each.attribute("to_apply"), times, fused)
            elif each.opcode == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", each.rest)
                branches = re.findall(r"[\w.\-]+", listed[1]) if listed else []
                for branch in branches or [each.attribute(f"{side}_computation") for side in ("true", "false")]:
                    yield from visit(branch, times, fused)

    return visit(module.entry, 1.0, False)


def group_size(rest: str, devices: int) -> int:
    """Chips of one group of `replica_groups`, in any of its three spellings: lists, iota and mesh axes."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        # An axis, or a part of one as 'axis':(before)size.
        return math.prod(
            int(part) if part else sizes[name] for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        )
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", rest):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return devices


def _wire(kind: str, size: float, group: int) -> float:
    if kind == "collective-permute":
        return size
    share = (group - 1) / group
    return {"all-reduce": 2 * share, "all-gather": group * share}.get(kind, share) * size


def _bytes_of(scope, names) -> float:
    return sum(shape.bytes for name in names if name in scope for shape in scope[name].shapes)


def collectives(module: Module) -> list[Collective]:
    """Every collective of one run of the program. kind: as in HLO, or `dcn` for what leaves the slice."""
    out, chains = [], set()
    for step in walk(module):
        each = step.instruction
        if each.opcode == "fusion" and (
            each.name.startswith("async-collective-done")
            or each.attribute("calls").startswith("async_collective_fusion")
        ):
            chains.add(id(module.computations[each.attribute("calls")]))
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES and id(step.scope) not in chains:
            group = 2 if kind == "collective-permute" else group_size(each.rest, module.devices)
            size = _bytes_of(step.scope, each.operands)
            if group > 1:
                out.append(Collective(kind, group, size, _wire(kind, size, group), step.times))
        elif kind == "send" and "megascale" in each.rest:
            size = _bytes_of(step.scope, each.operands)
            out.append(Collective("dcn", 2, size, size, step.times))
    return out


def products(module: Module) -> list[tuple[float, int]]:
    """(FLOPs of all its runs, passes of a bfloat16 multiplier that it takes) of every `dot`.

    Float32 operands take one pass at default precision, three at `high` and six at `highest`, as on TPUs.
    """
    out = []
    for each, times, scope, _ in walk(module):
        if each.opcode == "dot":
            left, right = (scope[name].shapes[0] for name in each.operands)
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
            contracted = math.prod(left.dims[int(d)] for d in dims[1].split(",") if d) if dims else 1
            precision = re.search(r"operand_precision=\{(\w+)", each.rest)
            full = "f32" in (left.dtype, right.dtype)
            passes = {"high": 3, "highest": 6}.get(precision[1], 1) if precision and full else 1
            out.append((2.0 * math.prod(each.shapes[0].dims) * contracted * times, passes))
    return out


def _fused_reads(scope: dict[str, Instruction], index: int, size: float) -> float:
    """Bytes that a fusion reads of operand `index`: of an array that it only slices, or updates in place, the slices."""
    name = next((i.name for i in scope.values() if i.opcode == "parameter" and i.argument == str(index)), None)
    names, read = {name}, 0.0
    for each in scope.values():
        if not names & set(each.operands):
            continue
        if each.opcode == "bitcast":
            names.add(each.name)
        elif each.opcode in ("dynamic-slice", "slice"):
            read += each.shapes[0].bytes
        elif not (each.opcode == "dynamic-update-slice" and each.operands[0] in names):
            return size
    return min(read, size)


def _fused_writes(scope: dict[str, Instruction]) -> list[tuple[float, int]]:
    """(bytes, memory space) of every array that a fusion writes: of one that is updated in place, the update."""

    def written(instruction):
        made = instruction
        while made.opcode == "bitcast":
            made = scope[made.operands[0]]
        if made.opcode == "dynamic-update-slice":
            return _bytes_of(scope, made.operands[1:2])
        return sum(shape.bytes for shape in instruction.shapes)

    root = _root(scope)
    return [written(scope[name]) for name in root.operands] if root.opcode == "tuple" else [written(root)]


def traffic(module: Module) -> float:
    """Bytes that one run reads from and writes to HBM: operands and results of every instruction that is not inside a fusion.

    Exact for what is fused and placed as the text says; what stays in vector memory does not count.
    """
    total = 0.0
    for each, times, scope, fused in walk(module):
        if fused or each.opcode in FREE or each.opcode.endswith(("-done", "-update")):
            continue
        operands = [scope[name].shapes for name in each.operands if name in scope]
        # The result of an asynchronous start lists its operand too, so the first array that is no operand is the one it makes.
        if each.opcode.endswith("-start"):
            made = [shape for shape in each.shapes if shape.dims and shape not in sum(operands, ())] or each.shapes[:1]
            size = min(made[0].bytes, sum(s.bytes for shapes in operands for s in shapes))
            total += times * size * ((made[0].space == 0) + any(s.space == 0 for shapes in operands for s in shapes))
        elif each.opcode == "dynamic-update-slice":
            total += times * 2 * _bytes_of(scope, each.operands[1:2])
        elif each.opcode in ("dynamic-slice", "slice", "gather"):
            total += times * 2 * sum(s.bytes for s in each.shapes)
        else:
            body = module.computations[each.attribute("calls")] if each.opcode == "fusion" else None
            for index, shapes in enumerate(operands):
                size = sum(shape.bytes for shape in shapes if shape.space == 0)
                total += times * (_fused_reads(body, index, size) if body and size else size)
            writes = _fused_writes(body) if body else [shape.bytes for shape in each.shapes]
            total += times * sum(size for size, shape in zip(writes, each.shapes) if shape.space == 0)
    return total


class Memory(NamedTuple):
    """HBM of one chip in bytes: arguments (state and batch, which results overwrite), temporaries and all else."""

    arguments: int
    temporaries: int
    total: int


def memory(report: str, assignment: str) -> Memory:
    """From the texts of `*memory-usage-report.txt` and `*buffer-assignment.txt` that XLA dumps for TPUs.

    Raises ValueError where they say nothing of HBM or of arguments, because every program has some.
    """
    total = re.search(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)", report)
    if total is None:
        raise ValueError(f"not a memory report of XLA: {report[:60]!r}")
    # Newer XLA names the page too; other memories have a color.
    line = r"^allocation \d+: size (\d+), (?:page \d+, )?"

    def sizes(kind):
        return [int(n) for n in re.findall(line + kind, assignment, re.MULTILINE)]

    if not sizes("parameter"):
        raise ValueError(f"no parameter in a buffer assignment of XLA: {assignment[:60]!r}")
    return Memory(sum(sizes("parameter")), sum(sizes("preallocated-temp")), int(total[1]))
