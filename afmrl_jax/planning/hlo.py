"""What a compiled program does, read from its text: FLOPs, bytes, time and collectives.

XLA's own `cost_analysis` counts the body of a loop once; here each loop's trip count, read from its
condition, is multiplied in. The text is what `compiled.as_text()` gives, on TPU, GPU and CPU.

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
# What is no work; the ends of moves and exchanges that were begun before are none either.
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
    """A line. type: as it is written; attributes: all behind the operands."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    written: str  # between the operands' brackets
    attributes: str
    root: bool


@dataclass(frozen=True)
class Collective:
    """A kind of exchange. groups: of devices, by their place in the mesh, the first of them."""

    kind: str
    group: tuple[int, ...]
    size: float  # bytes that a device receives, of one call
    overlapped: bool


@dataclass
class Total:
    """Sums of a computation, loops multiplied in. seconds: as `Reader` reckons them."""

    flops: float = 0.0
    bytes: float = 0.0  # to and from the device's large memory
    computing: float = 0.0  # seconds
    seconds: float = 0.0  # with collectives that nothing overlaps
    collectives: dict[Collective, float] = field(default_factory=lambda: defaultdict(float))
    unread_loops: int = 0  # whose trip count is not written in them

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
    """The computations by name, and the name of the one that a call begins with."""
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
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for m in re.finditer(r"[()]", text[start:]):
        depth += 1 if m[0] == "(" else -1
        if not depth:
            return start + m.start()
    raise ValueError(f"a bracket stays open in {text[:80]!r}")


def shapes(type_: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """dtype, dimensions and whether it lies in the large memory, of a type or each of a tuple's."""
    return [
        (m[1], tuple(int(n) for n in m[2].split(",") if n), not int(m[3] or 0))
        for m in _SHAPE.finditer(type_)
    ]


def size(type_: str, *, large: bool = False) -> float:
    """Bytes; large: of what lies in the device's large memory alone."""
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


def flops(one: Instruction, types: dict[str, str]) -> float:
    """Of a matrix product or a convolution, a multiply-add counting 2; else 0."""
    if one.opcode not in ("dot", "convolution"):
        return 0.0
    out = math.prod(shapes(one.type)[0][1])
    left, right = (shapes(types[name])[0][1] for name in one.operands[:2])
    if one.opcode == "dot":
        m = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        return 2.0 * out * math.prod(left[int(i)] for i in (m[1] if m else "").split(",") if i)
    return 2.0 * _products(one, left, right, shapes(one.type)[0][1])


def _products(
    one: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Multiplications of a convolution, those with padding left out, as XLA's cost analysis."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    given = re.search(r"window=\{([^}]*)\}", one.attributes)
    window = dict(part.split("=") for part in given[1].split()) if given else {}
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
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    batch = left[labels[1].index("b")] / (int(groups[1]) if groups else 1)
    return total * batch * right[labels[2].index("i")] * out[labels[3].index("f")]


def trip_count(loop: Instruction, computations: Computations, siblings: Instructions) -> int | None:
    """How often a loop runs, where that is written in it; None otherwise.

    siblings: by name, of the computation that holds the loop.
    """
    if m := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(m[1])
    called = dict(re.findall(r"(condition|body)=%([\w.\-]+)", loop.attributes))
    condition = {one.name: one for one in computations[called["condition"]]}
    compared = next(one for one in condition.values() if one.root)
    operands = [condition[name] for name in compared.operands]
    if compared.opcode == "fusion":  # the comparison stands in it; its operands are the same
        inside = computations[re.search(r"calls=%([\w.\-]+)", compared.attributes)[1]]
        compared = next(one for one in inside if one.root)
    limits = [one for one in operands if one.opcode == "constant"]
    counters = [one for one in operands if one.opcode == "get-tuple-element"]
    if compared.opcode != "compare" or len(limits) != 1 or len(counters) != 1:
        return None
    place = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
    start = _initial(loop, place, siblings)
    return max(
        0, math.ceil((int(limits[0].written) - start) / _stride(called, place, computations))
    )


def _initial(loop: Instruction, place: int, siblings: Instructions) -> int:
    """The counter before the loop: 0 unless it is written as another constant."""
    given = siblings.get(loop.operands[0])
    if given is None or given.opcode != "tuple":
        return 0
    value = siblings.get(given.operands[place])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = siblings.get(value.operands[0])
    return int(value.written) if value is not None and value.opcode == "constant" else 0


def _stride(called: dict[str, str], place: int, computations: Computations) -> int:
    """What the body adds to the counter: 1 unless another constant can be read."""
    body = {one.name: one for one in computations[called["body"]]}
    root = next(one for one in body.values() if one.root)
    step = body.get(root.operands[place]) if root.opcode == "tuple" else None
    if step is None or step.opcode != "add":
        return 1
    added = [body[name] for name in step.operands if body[name].opcode == "constant"]
    return int(added[0].written) if added else 1


def replica_group(one: Instruction) -> tuple[int, ...]:
    """The first group of devices of a collective, by their places in the mesh, in order."""
    if m := re.search(r"source_target_pairs=\{\{([\d,{}]*)\}\}", one.attributes):
        return _ring([tuple(map(int, p.split(","))) for p in m[1].split("},{")])
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{('[^}]*)\}", one.attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", m[1])}
        ids = _iota(re.search(r"device_ids=\((.*?\])(T\([\d,]+\))?\)", m[2]), sizes)
        return _along(ids.reshape(list(sizes.values())), list(sizes), m[3])
    if m := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\([\d,]+\))?", one.attributes):
        groups = [int(n) for n in m[1].split(",")]
        ids = _iota(re.match(r"(.*?\])(T.*)?$", f"[{m[2]}]{m[3] or ''}"), {})
        return tuple(ids.reshape(groups)[0].tolist())
    if m := re.search(r"replica_groups=\{\{([\d,]+)\}", one.attributes):
        return tuple(int(n) for n in m[1].split(","))
    return ()


def _ring(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """Where data that begins at the first device comes by."""
    to, seen = dict(pairs), [pairs[0][0]]
    while to.get(seen[-1], seen[0]) not in seen:
        seen.append(to[seen[-1]])
    return tuple(sorted(seen))


def _iota(m: re.Match | None, sizes: dict[str, int]) -> np.ndarray:
    """Device numbers as `[8,2]T(1,0)` says: counted, laid out, transposed."""
    if m is None:
        return np.arange(math.prod(sizes.values()))
    dims = [int(n) for n in re.findall(r"\d+", m[1])]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose([int(n) for n in re.findall(r"\d+", m[2])]) if m[2] else ids


def _along(ids: np.ndarray, names: list[str], listed: str) -> tuple[int, ...]:
    """The devices along axes as `'a','b':(2)4`: the last is the middle part of an axis, 4 long with
    2 before it."""
    shape, chosen = [], []
    parts = {n: (before, length) for n, before, length in re.findall(_AXIS, listed)}
    for name, whole in zip(names, ids.shape):
        before, length = (int(n) if n else 0 for n in parts.get(name, ("", "")))
        # An axis is three: before, along, behind; of the first and last the first stays.
        shape += [before, length, whole // before // length] if length else [1, whole, 1]
        chosen += [slice(1), slice(None) if name in parts else slice(1), slice(1)]
    return tuple(ids.reshape(shape)[tuple(chosen)].reshape(-1).tolist())


class Reader:
    """Adds up a program.

    seconds: (instruction's estimated cycles or None, its FLOPs, its bytes) -> seconds. exchange:
    Collective -> seconds of one call. A computation takes what is computed, or what collectives
    that are overlapped take, whichever is longer, and collectives that are not. unread: how often a
    loop runs whose trip count is not written in it.
    """

    def __init__(
        self,
        text: str,
        seconds: Callable[[float | None, float, float], float],
        exchange: Callable[[Collective], float],
        unread: int = 1,
    ):
        self._computations, self._entry = read(text)
        self._seconds, self._exchange, self._unread = seconds, exchange, unread

    def total(self) -> Total:
        """Of one call of the program, on one device."""
        return self._of(self._entry)

    @functools.cache  # noqa: B019 - a reader lives as long as its one total is asked for
    def _of(self, name: str) -> Total:
        total, overlapped, alone = Total(), 0.0, 0.0
        instructions = self._computations[name]
        types = {one.name: one.type for one in instructions}
        siblings = {one.name: one for one in instructions}
        for one in instructions:
            if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
                continue
            if one.opcode == "while":
                count = trip_count(one, self._computations, siblings)
                body = re.search(r"body=%([\w.\-]+)", one.attributes)[1]
                total.add(self._of(body), self._unread if count is None else count)
                total.unread_loops += count is None
            elif one.opcode in ("call", "conditional"):
                branches = [self._of(called) for called in _called(one)]
                total.add(max(branches, key=lambda branch: branch.seconds))
            else:
                work, traffic = self._work(one, types), self._traffic(one, types)
                took = self._seconds(_cycles(one), work, traffic)
                total.flops += work
                total.bytes += traffic
                total.computing += took
                total.seconds += took
            for collective in self._collectives(one, types):
                total.collectives[collective] += 1
                if collective.overlapped:
                    overlapped += self._exchange(collective)
                else:
                    alone += self._exchange(collective)
        total.seconds = max(total.seconds, overlapped) + alone
        return total

    def _work(self, one: Instruction, types: dict[str, str]) -> float:
        if one.opcode != "fusion":
            return flops(one, types)
        inside = [i for called in _called(one) for i in self._computations[called]]
        own = {i.name: i.type for i in inside}
        return sum(self._work(i, own) for i in inside)

    def _traffic(self, one: Instruction, types: dict[str, str]) -> float:
        """Bytes between the large memory and the chip, of operands and results.

        Of an operand that is only sliced what is cut out counts, of one that is only written into
        what is written.
        """
        if one.opcode in (*COLLECTIVES, "send", "recv"):
            return 0.0
        if one.opcode.endswith("-start"):  # a copy's type names where it goes and whence it comes
            return size(one.type, large=True) if one.opcode.startswith("copy") else 0.0
        if one.opcode == "dynamic-slice":
            return 2 * size(one.type, large=True)
        if one.opcode == "dynamic-update-slice":
            return 2 * size(types[one.operands[1]], large=True)
        if one.opcode != "fusion":
            read_ = sum(size(types[name], large=True) for name in one.operands if name in types)
            return read_ + size(one.type, large=True)
        inside = self._computations[_called(one)[0]]
        parameters = {int(i.written): i.name for i in inside if i.opcode == "parameter"}
        writes = [i for i in inside if i.opcode == "dynamic-update-slice"]
        total, written = 0.0, size(one.type, large=True) - _carried(inside)
        for number, name in enumerate(one.operands):
            whole = size(types[name], large=True)
            cut = min(whole, self._touched(inside, parameters[number]))
            if cut < whole and any(_cuts(i, parameters[number]) for i in writes):
                written -= whole - cut  # it is changed in place
                cut = 0.0
            total += cut
        return total + max(written, 0.0)

    def _touched(self, inside: list[Instruction], name: str) -> float:
        """Bytes that a fusion's instructions use of an array: infinite where one uses all of it."""
        own, total = {i.name: i for i in inside}, 0.0
        for user in (i for i in inside if name in i.operands):
            if _cuts(user, name):
                total += _cut(user, own)
            elif user.opcode == "fusion":
                called = self._computations[_called(user)[0]]
                number = str(user.operands.index(name))
                given = next(i for i in called if (i.opcode, i.written) == ("parameter", number))
                touched = self._touched(called, given.name)
                if "output_to_operand_aliasing={{}: (" in user.attributes:  # it is given on
                    touched = min(touched, self._touched(inside, user.name))
                total += touched
            elif user.opcode not in COLLECTIVES and not (user.root and user.opcode == "tuple"):
                return math.inf
        return total

    def _collectives(self, one: Instruction, types: dict[str, str]) -> list[Collective]:
        """Those of an instruction, or inside its fusion; one in several pieces counts where it
        begins: what carries it on, perhaps in a loop, and what ends it are told by their names."""
        if one.opcode == "fusion":
            called = _called(one)
            carries_on = any(name.startswith("async_collective_fusion") for name in called)
            if carries_on or one.name.startswith("async-collective-done"):
                return []
            inside = [i for name in called for i in self._computations[name]]
            own = {i.name: i.type for i in inside}
            found = [c for i in inside for c in self._collectives(i, own)]
            return [dataclasses.replace(c, overlapped=True) for c in found]
        if one.opcode == "send":
            return _between_slices(one, types)
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return []
        group = replica_group(one)
        given = sum(size(types[name]) for name in one.operands)
        return [Collective(kind, group, _received(kind, len(group), given), kind != one.opcode)]


def _between_slices(one: Instruction, types: dict[str, str]) -> list[Collective]:
    """What a TPU gives to its host, which exchanges it with the other slices' over the network."""
    given = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{(\d+):(\d+)\}', one.attributes)
    if not given or not target:
        return []
    ends = [part.split(":") for part in target[1].split(",")]
    slices = sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    chips = int(target[3]) - int(target[2]) + 1
    kind = given[1].lower().replace("_", "-")
    size_ = _received(kind, slices, size(types[one.operands[0]]))
    return [Collective(kind, tuple(range(0, slices * chips, chips)), size_, False)]


def _received(kind: str, n: int, given: float) -> float:
    """Bytes that each of n devices receives, each of which gives so many, in the best algorithm."""
    if kind == "collective-permute":
        return given
    share = (n - 1) / n if n else 0.0
    return given * {"all-gather": n * share, "all-reduce": 2 * share}.get(kind, share)


def _called(one: Instruction) -> list[str]:
    if m := re.search(r"(?:calls|to_apply)=%([\w.\-]+)", one.attributes):
        return [m[1]]
    m = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    if m:
        return _NAME.findall(m[1])
    return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", one.attributes)


def _carried(inside: list[Instruction]) -> float:
    """Bytes of a fusion's results that it does not write: buffers of exchanges, given on."""
    root = next(i for i in inside if i.root)
    own = {i.name: i for i in inside}
    results = [own[name] for name in root.operands] if root.opcode == "tuple" else [root]
    given_on = (i for i in results if i.opcode in ("parameter", *COLLECTIVES))
    return sum(size(i.type, large=True) for i in given_on)


def _cuts(one: Instruction, name: str) -> bool:
    """Whether an instruction only cuts out of, or writes into, the array of that name."""
    return one.opcode in ("dynamic-slice", "dynamic-update-slice") and one.operands[0] == name


def _cut(one: Instruction, own: Instructions) -> float:
    return size(one.type if one.opcode == "dynamic-slice" else own[one.operands[1]].type)


def _cycles(one: Instruction) -> float | None:
    """The TPU compiler's estimate, where it made one."""
    m = re.search(r'"estimated_cycles":(?:"(\d+)"|(\d+))', one.attributes)
    return float(m[1] or m[2]) if m else None
