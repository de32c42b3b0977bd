"""Reads a compiled program's text for its FLOPs, bytes, time and collectives.

XLA's `cost_analysis` counts the body of a loop once; here the trip count of each loop, read from
its condition, is multiplied in. The text is that of `compiled.as_text()`, on TPU, GPU and CPU.

    read(text) -> computations · Reader(...).total() -> Total
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "token": 0} | {f"{kind}4": 0.5 for kind in ("s", "u")}
# Opcodes that cost nothing. Nor do the ends of copies and exchanges, whose starts count.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota")
FREE += ("partition-id", "replica-id", "add-dependency", "opt-barrier")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Instruction:
    """A line of the text. type: as written there; attributes: the text behind the operands."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    written: str  # the text between the operands' brackets
    attributes: str
    root: bool


@dataclass(frozen=True)
class Collective:
    """A collective exchange between devices. group: the first of its groups of devices, by their
    places in the mesh."""

    kind: str  # of COLLECTIVES
    group: tuple[int, ...]
    size: float  # bytes that a device receives in one call
    overlapped: bool  # by computation


@dataclass
class Total:
    """Sums over a computation, loops multiplied in."""

    flops: float = 0.0
    bytes: float = 0.0  # to and from the device's large memory
    computing: float = 0.0  # seconds
    seconds: float = 0.0  # those of collectives that nothing overlaps included
    # Collective -> number of calls.
    collectives: dict[Collective, float] = field(default_factory=lambda: defaultdict(float))
    unread_loops: int = 0  # loops whose trip count cannot be read

    def add(self, other: "Total", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.computing += times * other.computing
        self.seconds += times * other.seconds
        self.unread_loops += other.unread_loops
        for collective, calls in other.collectives.items():
            self.collectives[collective] += times * calls


Computations = dict[str, list[Instruction]]
Instructions = dict[str, Instruction]


def read(text: str) -> tuple[Computations, str]:
    """The computations by name, and the name of the entry computation."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if m := _COMPUTATION.match(line):
                current = computations.setdefault(m[2], [])
                entry = m[2] if m[1] else entry
        elif line.startswith("}"):
            current = None
        elif m := _HEAD.match(line):
            current.append(_instruction(m[2], line[m.end() :], bool(m[1])))
    return computations, entry


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    written = rest[start + 1 : end]
    operands = tuple(_NAME.findall(written))
    return Instruction(name, type_, rest[:start], operands, written, rest[end + 1 :], root)


def _closing(text: str, start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    depth = 0
    for m in re.finditer(r"[()]", text[start:]):
        depth += 1 if m[0] == "(" else -1
        if not depth:
            return start + m.start()
    raise ValueError(f"a bracket stays open in {text[:80]!r}")


def shapes(type_: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(dtype, dimensions, whether in the large memory) of an array type, or of each in a tuple."""
    return [
        (m[1], tuple(int(n) for n in m[2].split(",") if n), not int(m[3] or 0))
        for m in _SHAPE.finditer(type_)
    ]


def size(type_: str, *, large: bool = False) -> float:
    """Bytes of a type; large: count only arrays in the device's large memory."""
    return sum(
        math.prod(dims) * _width(dtype)
        for dtype, dims, in_large in shapes(type_)
        if in_large or not large
    )


def _width(dtype: str) -> float:
    if dtype in BYTES:
        return BYTES[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) / 8 if digits else 0


def flops(instruction: Instruction, types: dict[str, str]) -> float:
    """FLOPs of a matrix product or a convolution, 2 a multiply-add; 0 of anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    out = math.prod(shapes(instruction.type)[0][1])
    left, right = (shapes(types[name])[0][1] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        m = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return 2.0 * out * math.prod(left[int(i)] for i in (m[1] if m else "").split(",") if i)
    return 2.0 * _products(instruction, left, right, shapes(instruction.type)[0][1])


def _products(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Multiplications of a convolution without those of padding, as XLA's cost analysis counts."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    m = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(part.split("=") for part in m[1].split()) if m else {}
    spatial = sorted(c for c in labels[1] if c.isdigit())
    numbers = {key: value.split("x") for key, value in window.items()}

    def of(key: str, axis: int, default: int) -> int:
        return int(numbers[key][axis]) if key in numbers else default

    total = 1.0
    for axis, c in enumerate(spatial):
        n_in, n_out = left[labels[1].index(c)], out[labels[3].index(c)]
        low = int(numbers["pad"][axis].split("_")[0]) if "pad" in numbers else 0
        stride = of("stride", axis, 1)
        dilated, kernel_dilated = of("lhs_dilate", axis, 1), of("rhs_dilate", axis, 1)
        kernel = np.arange(right[labels[2].index(c)])[:, None] * kernel_dilated
        at = np.arange(n_out)[None] * stride + kernel - low
        total *= ((at >= 0) & (at < (n_in - 1) * dilated + 1) & (at % dilated == 0)).sum()
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = left[labels[1].index("b")] / (int(groups[1]) if groups else 1)
    return total * batch * right[labels[2].index("i")] * out[labels[3].index("f")]


def trip_count(loop: Instruction, computations: Computations, siblings: Instructions) -> int | None:
    """A loop's trip count; None where it cannot be read.

    siblings: the instructions, by name, of the computation that holds the loop.
    """
    if m := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(m[1])
    called = dict(re.findall(r"(condition|body)=%([\w.\-]+)", loop.attributes))
    condition = {instruction.name: instruction for instruction in computations[called["condition"]]}
    compared = next(instruction for instruction in condition.values() if instruction.root)
    operands = [condition[name] for name in compared.operands]
    if compared.opcode == "fusion":  # it contains the comparison, with the same operands
        inside = computations[re.search(r"calls=%([\w.\-]+)", compared.attributes)[1]]
        compared = next(instruction for instruction in inside if instruction.root)
    limits = [instruction for instruction in operands if instruction.opcode == "constant"]
    counters = [
        instruction for instruction in operands if instruction.opcode == "get-tuple-element"
    ]
    if compared.opcode != "compare" or len(limits) != 1 or len(counters) != 1:
        return None
    index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
    start = _initial(loop, index, siblings)
    return max(
        0, math.ceil((int(limits[0].written) - start) / _stride(called, index, computations))
    )


def _initial(loop: Instruction, index: int, siblings: Instructions) -> int:
    """The counter before the loop: 0 unless another constant can be read."""
    state = siblings.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return 0
    value = siblings.get(state.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = siblings.get(value.operands[0])
    return int(value.written) if value is not None and value.opcode == "constant" else 0


def _stride(called: dict[str, str], index: int, computations: Computations) -> int:
    """The number that the body adds to the counter: 1 unless another constant can be read."""
    body = {instruction.name: instruction for instruction in computations[called["body"]]}
    root = next(instruction for instruction in body.values() if instruction.root)
    step = body.get(root.operands[index]) if root.opcode == "tuple" else None
    if step is None or step.opcode != "add":
        return 1
    added = [body[name] for name in step.operands if body[name].opcode == "constant"]
    return int(added[0].written) if added else 1


def replica_group(instruction: Instruction) -> tuple[int, ...]:
    """The first group of devices of a collective, by their places in the mesh, in order."""
    if m := re.search(r"source_target_pairs=\{\{([\d,{}]*)\}\}", instruction.attributes):
        return _ring([tuple(map(int, p.split(","))) for p in m[1].split("},{")])
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{('[^}]*)\}", instruction.attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", m[1])}
        ids = _iota(re.search(r"device_ids=\((.*?\])(T\([\d,]+\))?\)", m[2]), sizes)
        return _along(ids.reshape(list(sizes.values())), list(sizes), m[3])
    if m := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\([\d,]+\))?", instruction.attributes
    ):
        groups = [int(n) for n in m[1].split(",")]
        ids = _iota(re.match(r"(.*?\])(T.*)?$", f"[{m[2]}]{m[3] or ''}"), {})
        return tuple(ids.reshape(groups)[0].tolist())
    if m := re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.attributes):
        return tuple(int(n) for n in m[1].split(","))
    return ()


def _ring(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """The devices that data from the first device passes on its way round."""
    to, seen = dict(pairs), [pairs[0][0]]
    while to.get(seen[-1], seen[0]) not in seen:
        seen.append(to[seen[-1]])
    return tuple(sorted(seen))


def _iota(m: re.Match | None, sizes: dict[str, int]) -> np.ndarray:
    """Device numbers of a notation like `[8,2]T(1,0)`: counted, reshaped, transposed."""
    if m is None:
        return np.arange(math.prod(sizes.values()))
    dims = [int(n) for n in re.findall(r"\d+", m[1])]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose([int(n) for n in re.findall(r"\d+", m[2])]) if m[2] else ids


def _along(ids: np.ndarray, names: list[str], listed: str) -> tuple[int, ...]:
    """The devices along axes in a notation like `'a','b':(2)4`: all of axis a, and of axis b the
    middle part, 4 long with 2 before it."""
    shape, chosen = [], []
    parts = {n: (before, length) for n, before, length in re.findall(_AXIS, listed)}
    for name, whole in zip(names, ids.shape):
        before, length = (int(n) if n else 0 for n in parts.get(name, ("", "")))
        # An axis splits into three: before, along, behind; of the outer two the first is taken.
        shape += [before, length, whole // before // length] if length else [1, whole, 1]
        chosen += [slice(1), slice(None) if name in parts else slice(1), slice(1)]
    return tuple(ids.reshape(shape)[tuple(chosen)].reshape(-1).tolist())


class Reader:
    """Adds up the costs of a program.

    seconds: (instruction's estimated cycles or None, its FLOPs, its bytes) -> seconds. exchange:
    Collective -> seconds of one call. A computation takes the time of its instructions or of its
    overlapped collectives, whichever is longer, and that of the other collectives on top.
    default_trip_count: assumed for loops whose trip count cannot be read.
    """

    def __init__(
        self,
        text: str,
        seconds: Callable[[float | None, float, float], float],
        exchange: Callable[[Collective], float],
        default_trip_count: int = 1,
    ):
        self._computations, self._entry = read(text)
        self._seconds, self._exchange = seconds, exchange
        self._default_trip_count = default_trip_count

    def total(self) -> Total:
        """The costs of one call of the program, on one device."""
        return self._total_of(self._entry)

    @functools.cache  # noqa: B019 - a reader is dropped once its total is known
    def _total_of(self, name: str) -> Total:
        total, overlapped, alone = Total(), 0.0, 0.0
        instructions = self._computations[name]
        types = {instruction.name: instruction.type for instruction in instructions}
        siblings = {instruction.name: instruction for instruction in instructions}
        for instruction in instructions:
            if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
                continue
            if instruction.opcode == "while":
                count = trip_count(instruction, self._computations, siblings)
                body = re.search(r"body=%([\w.\-]+)", instruction.attributes)[1]
                total.add(
                    self._total_of(body), self._default_trip_count if count is None else count
                )
                total.unread_loops += count is None
            elif instruction.opcode in ("call", "conditional"):
                branches = [self._total_of(called) for called in _called(instruction)]
                total.add(max(branches, key=lambda branch: branch.seconds))
            else:
                work, traffic = self._work(instruction, types), self._traffic(instruction, types)
                seconds = self._seconds(_cycles(instruction), work, traffic)
                total.flops += work
                total.bytes += traffic
                total.computing += seconds
                total.seconds += seconds
            for collective in self._collectives(instruction, types):
                total.collectives[collective] += 1
                if collective.overlapped:
                    overlapped += self._exchange(collective)
                else:
                    alone += self._exchange(collective)
        total.seconds = max(total.seconds, overlapped) + alone
        return total

    def _work(self, instruction: Instruction, types: dict[str, str]) -> float:
        if instruction.opcode != "fusion":
            return flops(instruction, types)
        inside = [i for called in _called(instruction) for i in self._computations[called]]
        inner_types = {i.name: i.type for i in inside}
        return sum(self._work(i, inner_types) for i in inside)

    def _traffic(self, instruction: Instruction, types: dict[str, str]) -> float:
        """Bytes of operands and results that move between the large memory and the chip.

        An operand that is only sliced counts the bytes of its slices; one that is only written into
        counts the bytes written.
        """
        if instruction.opcode in (*COLLECTIVES, "send", "recv"):
            return 0.0
        if instruction.opcode.endswith(
            "-start"
        ):  # a copy's type holds its destination and its source
            return (
                size(instruction.type, large=True) if instruction.opcode.startswith("copy") else 0.0
            )
        if instruction.opcode == "dynamic-slice":
            return 2 * size(instruction.type, large=True)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * size(types[instruction.operands[1]], large=True)
        if instruction.opcode != "fusion":
            read_ = sum(
                size(types[name], large=True) for name in instruction.operands if name in types
            )
            return read_ + size(instruction.type, large=True)
        inside = self._computations[_called(instruction)[0]]
        parameters = {int(i.written): i.name for i in inside if i.opcode == "parameter"}
        writes = [i for i in inside if i.opcode == "dynamic-update-slice"]
        total, written = 0.0, size(instruction.type, large=True) - _carried(inside)
        for number, name in enumerate(instruction.operands):
            whole = size(types[name], large=True)
            cut = min(whole, self._touched(inside, parameters[number]))
            if cut < whole and any(_cuts(i, parameters[number]) for i in writes):
                written -= whole - cut  # the array is changed in place
                cut = 0.0
            total += cut
        return total + max(written, 0.0)

    def _touched(self, inside: list[Instruction], name: str) -> float:
        """Bytes that a fusion's instructions use of an array; infinite where one uses all of it."""
        by_name, total = {i.name: i for i in inside}, 0.0
        for user in (i for i in inside if name in i.operands):
            if _cuts(user, name):
                total += _cut(user, by_name)
            elif user.opcode == "fusion":
                called = self._computations[_called(user)[0]]
                number = str(user.operands.index(name))
                parameter = next(
                    i for i in called if (i.opcode, i.written) == ("parameter", number)
                )
                touched = self._touched(called, parameter.name)
                if "output_to_operand_aliasing={{}: (" in user.attributes:  # passed on as output
                    touched = min(touched, self._touched(inside, user.name))
                total += touched
            elif user.opcode not in COLLECTIVES and not (user.root and user.opcode == "tuple"):
                return math.inf
        return total

    def _collectives(self, instruction: Instruction, types: dict[str, str]) -> list[Collective]:
        """The collectives of an instruction, or inside its fusion. A collective in several pieces
        counts at its first piece; the later ones, perhaps in a loop, are recognised by name."""
        if instruction.opcode == "fusion":
            called = _called(instruction)
            carries_on = any(name.startswith("async_collective_fusion") for name in called)
            if carries_on or instruction.name.startswith("async-collective-done"):
                return []
            inside = [i for name in called for i in self._computations[name]]
            inner_types = {i.name: i.type for i in inside}
            collectives = [c for i in inside for c in self._collectives(i, inner_types)]
            return [dataclasses.replace(c, overlapped=True) for c in collectives]
        if instruction.opcode == "send":
            return _between_slices(instruction, types)
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return []
        group = replica_group(instruction)
        sent = sum(size(types[name]) for name in instruction.operands)
        received = _received(kind, len(group), sent)
        return [Collective(kind, group, received, overlapped=kind != instruction.opcode)]


def _between_slices(instruction: Instruction, types: dict[str, str]) -> list[Collective]:
    """The exchange between slices that a send starts: a TPU passes its data to its host, and hosts
    exchange it over the network."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    target = re.search(
        r'_xla_megascale_target="\{([\d,:]+)\}x\{(\d+):(\d+)\}', instruction.attributes
    )
    if not transfer or not target:
        return []
    ends = [part.split(":") for part in target[1].split(",")]
    slices = sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    chips = int(target[3]) - int(target[2]) + 1
    kind = transfer[1].lower().replace("_", "-")
    received = _received(kind, slices, size(types[instruction.operands[0]]))
    return [Collective(kind, tuple(range(0, slices * chips, chips)), received, overlapped=False)]


def _received(kind: str, n: int, sent: float) -> float:
    """Bytes that each of n devices receives in the best algorithm. sent: bytes of its operand."""
    if kind == "collective-permute":
        return sent
    share = (n - 1) / n if n else 0.0
    return sent * {"all-gather": n * share, "all-reduce": 2 * share}.get(kind, share)


def _called(instruction: Instruction) -> list[str]:
    if m := re.search(r"(?:calls|to_apply)=%([\w.\-]+)", instruction.attributes):
        return [m[1]]
    m = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if m:
        return _NAME.findall(m[1])
    return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", instruction.attributes)


def _carried(inside: list[Instruction]) -> float:
    """Bytes of a fusion's results that it only passes on: buffers of exchanges."""
    root = next(i for i in inside if i.root)
    by_name = {i.name: i for i in inside}
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    passed_on = (i for i in results if i.opcode in ("parameter", *COLLECTIVES))
    return sum(size(i.type, large=True) for i in passed_on)


def _cuts(instruction: Instruction, name: str) -> bool:
    """Whether an instruction only cuts a slice out of the array, or writes one into it."""
    return (
        instruction.opcode in ("dynamic-slice", "dynamic-update-slice")
        and instruction.operands[0] == name
    )


def _cut(instruction: Instruction, by_name: Instructions) -> float:
    """Bytes of the slice that an instruction cuts out of an array, or writes into it."""
    is_read = instruction.opcode == "dynamic-slice"
    return size(instruction.type if is_read else by_name[instruction.operands[1]].type)


def _cycles(instruction: Instruction) -> float | None:
    """The TPU compiler's estimate; None where it made none."""
    m = re.search(r'"estimated_cycles":(?:"(\d+)"|(\d+))', instruction.attributes)
    return float(m[1] or m[2]) if m else None
