"""Which array a compiled kernel reads and writes by how many bytes at once, traced back to the kernel's arguments.

Triton writes each access of global memory into its LLVM code as one PTX instruction, whose pointer LLVM computes from an
argument by steps that can be followed. What only programs with missing values run (the last of a launch), or those whose rows
lie anywhere, is left out: it stands in a branch of the kernel of its own, which the lines of the code tell.
"""

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Narrow:
    """Arrays that are accessed by fewer than 16 bytes: a pattern for "MODULE.FUNCTION ARGUMENT", the bytes, the reason."""

    pattern: str
    sizes: frozenset[int]
    reason: str
    beside: bool = False
    """Whether most of the array is accessed by 16 bytes at once."""


NARROW = (
    Narrow(r"\w+\.\w+ [pq]f", frozenset({4}), "a block has one scale, or two"),
    Narrow(
        r"\w+\.\w+ [pq]u",
        frozenset({4}),
        "a payload begins at any multiple of 4 bytes, and its codes stand behind the scales",
    ),
    Narrow(r"two_bit\._encode qu", frozenset({1, 4}), "the second plane of bits begins at any byte"),
    Narrow(
        r"random_k\._take (x|residual|inverse|average)",
        frozenset({2, 4}),
        "strata begin anywhere: their ends, and what is sent",
        True,
    ),
    Narrow(r"random_k\._mean out", frozenset({2, 4}), "strata begin anywhere: their ends, and what was sent", True),
    Narrow(r"random_k\._(settle (x|residual|inverse|average)|clear out)", frozenset({2, 4}), "single places"),
    Narrow(r"random_k\.\w+ (heads?|values?|decoded)", frozenset({4}), "a value a stratum, behind a head of 8 bytes"),
    Narrow(
        r"topk\._set_apart (values|places|sizes|state)",
        frozenset({2, 4, 8}),
        "a part's candidates, from the part's first slot on",
    ),
    Narrow(r"topk\._(refine|count_kept|keep) \w+", frozenset({2, 4, 8}), "candidates, a few in each part"),
    Narrow(r"topk\._(settle|scatter|clear_marked) \w+", frozenset({4, 8}), "single places"),
    Narrow(r"topk\._(narrow state|begin ends|clear_all ends)", frozenset({8}), "a number for all"),
    Narrow(r"topk\._(count_all|refine) histogram", frozenset({8}), "bins, added atomically"),
    Narrow(r"elias_fano\.\w+ (index|kept|words|found)", frozenset({4, 8}), "bits of positions"),
    Narrow(r"masks\._(pack x|unpack out)", frozenset({4}), "single places"),
    Narrow(r"(model\._count found|fingerprint\._sum sums)", frozenset({8}), "a number a program"),
    Narrow(
        r"low_rank\.\w+ (p|q|sums|found|batch|rest)",
        frozenset({4, 8}),
        "factors begin anywhere, and are small beside a matrix",
    ),
)
"""All of them. What is not here is accessed by 16 bytes or more at once."""


ELSEWHERE = {
    "first + SIZE <= n": "orelse",
    "(first + ROWS) * BLOCK <= n": "orelse",
    "first + SIZE > n": "body",
    "(first + ROWS) * BLOCK > n": "body",
    "plane % 4 == 0": "orelse",
    "row % 4 == 0": "orelse",
    "together == 4": "orelse",
}
"""Tests in kernels, and the branch that is not for whole programs with their rows at multiples of 16 bytes."""
POINTER = r"ptr addrspace\(1\)(?: \w+(?:\([^)]*\))?)* (%[\w.]+)"
ACCESS = re.compile(r"(?<![a-z])(ld|st|atom|red)\.global[.\w]*?(?:\.v(\d))?\.[bsuf](\d+)")

Accesses = dict[str, dict[int, int]]
"""By "ARGUMENT read" or "ARGUMENT written" how many accesses there are of how many bytes."""


def function_of(kernel: Any) -> str:
    """The module and the name of what a compiled kernel runs; of `walk` the part that it is given."""
    part = part_of(kernel)
    function = (part or kernel.src.fn).fn
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def part_of(kernel: Any) -> Any:
    """What a kernel of `walk` calls; None for other kernels."""
    return next((value for value in kernel.src.constants.values() if hasattr(value, "fn")), None)


def arguments(kernel: Any) -> list[str]:
    """The names of a compiled kernel's arguments as its machine code has them: those in tuples by the names of their parts."""
    found: list[str] = []
    for name, kind in kernel.src.signature.items():
        found += flat(name, kind, kernel)
    return found


def flat(name: str, kind: Any, kernel: Any) -> list[str]:
    """The names of the arguments that one parameter, or a part of a tuple, is made of."""
    if kind == "constexpr":
        return []
    if not isinstance(kind, tuple):
        return [name]
    if name == "prologue":
        names = ["inverse", "average", "limit", "fresh", "kept"]
    else:  # of `walk`: what it calls begins with `x, ... = arguments`
        code = ast.parse(inspect.getsource(part_of(kernel).fn)).body[0]
        assert isinstance(code, ast.FunctionDef)
        names = next(ast.unparse(x.targets[0]) for x in code.body if isinstance(x, ast.Assign)).strip("()").split(", ")
    return [x for part, inner in zip(names, kind, strict=True) for x in flat(part, inner, kernel)]


def lines_elsewhere(function: Any) -> set[int]:
    """The lines of a kernel that are not for whole programs."""
    lines, start = inspect.getsourcelines(function)
    found: set[int] = set()
    for node in ast.walk(ast.parse("".join(lines))):
        if isinstance(node, ast.If) and (branch := ELSEWHERE.get(ast.unparse(node.test))):
            for statement in getattr(node, branch):
                if not isinstance(statement, ast.If):  # an `elif` is a branch with a test of its own
                    found |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return {start - 1 + line for line in found}


def accesses(kernel: Any) -> Accesses:
    """Count the accesses of a compiled kernel. Raises ValueError for one whose array cannot be told."""
    code, names = kernel.asm["llir"], arguments(kernel)
    elsewhere = lines_elsewhere(kernel.src.fn.fn)
    outermost = outermost_lines(code)
    origins: dict[str, set[str]] = {}
    as_numbers: dict[
        str, set[str]
    ] = {}  # pointers that change threads through shared memory, by their place in the code
    for match in re.finditer(r"= ptrtoint " + POINTER + r".*!dbg !(\d+)", code):
        as_numbers.setdefault(match[2], set()).add(match[1])
    for match in re.finditer(r"^\s*(%[\w.]+) = inttoptr .*!dbg !(\d+)$", code, re.M):
        origins[match[1]] = as_numbers[match[2]]
    for match in re.finditer(r"^\s*(%[\w.]+) = (?:getelementptr|phi|select|freeze) (.*)$", code, re.M):
        if "ptr addrspace(1)" in match[2]:
            phi = re.findall(r"\[ (%[\w.]+),", match[2]) if match[0].lstrip().split()[2] == "phi" else []
            origins[match[1]] = set(phi or re.findall(POINTER, match[2]))
    found: Counter[tuple[str, int]] = Counter()
    every: Counter[tuple[str, int]] = Counter()
    for line in code.splitlines():
        if "declare" in line or "define" in line or "addrspace(1)" not in line:
            continue
        wide = instruction(line)
        if wide is None:
            if re.search(r"\b(?:call|load|store|cmpxchg|atomicrmw) ", line):
                raise ValueError(f"{kernel.metadata.name}: no access that is known: {line.strip()}")
            continue
        every[wide] += 1
        debug = re.search(r"!dbg !(\d+)", line)
        if debug and outermost.get(debug[1]) in elsewhere:
            continue
        name = origin(re.findall(POINTER, line)[-1], origins, names)
        found[f"{name} {wide[0]}", wide[1]] += 1
    in_ptx = Counter(filter(None, map(instruction, kernel.asm["ptx"].splitlines())))
    if every != in_ptx:
        raise ValueError(f"{kernel.metadata.name}: {every} in LLVM's code, {in_ptx} in PTX")
    result: Accesses = {}
    for (name, size), count in sorted(found.items()):
        result.setdefault(name, {})[size] = count
    return result


def instruction(line: str) -> tuple[str, int] | None:
    """What a line does ("read", "written" or "added") and to how many bytes; None if it has no access of global memory."""
    match = ACCESS.search(line)
    if match is None:
        return None
    kind = {"ld": "read", "st": "written"}.get(match[1], "added")
    return kind, int(match[2] or 1) * int(match[3]) // 8


def outermost_lines(code: str) -> dict[str, int]:
    """By the number of a place in LLVM's code the line of the kernel itself, wherever the code was inlined from."""
    places = {
        match[1]: (int(match[2]), match[3])
        for match in re.finditer(
            r"^!(\d+) = (?:distinct )?!DILocation\(line: (\d+).*?(?:inlinedAt: !(\d+))?\)$", code, re.M
        )
    }

    def out(number: str) -> int:
        line, inlined = places[number]
        return out(inlined) if inlined else line

    return {number: out(number) for number in places}


def origin(pointer: str, origins: dict[str, set[str]], names: list[str]) -> str:
    """The argument that a pointer was computed from. Raises ValueError if there are several or none."""
    seen, ends, left = set(), set(), [pointer]
    while left:
        here = left.pop()
        if here in seen:
            continue
        seen.add(here)
        if here in origins:
            left += origins[here]
        else:
            ends.add(here)
    if len(ends) != 1 or not (end := ends.pop())[1:].isdigit() or int(end[1:]) >= len(names):
        raise ValueError(f"{pointer} comes from {ends or end}, expected one of the arguments {names}")
    return names[int(end[1:])]


def too_narrow(rows: list[dict[str, Any]]) -> list[str]:
    """Accesses of fewer than 16 bytes that NARROW does not have, in rows of some kernels (`triton_code.py` prints them)."""
    wrong = []
    for row in rows:
        for where, sizes, narrow in arrays_of(row):
            known = entries_of(where, narrow)
            if (narrow and not known) or any(entry.beside and len(narrow) == len(sizes) for entry in known):
                wrong.append(f"{row['kernel']} for {row['capability']}: {where}: {sizes}")
    return wrong


def unused(rows: list[dict[str, Any]]) -> list[str]:
    """Entries of NARROW, some of whose sizes no kernel has: rows of ops on all dtypes are expected."""
    found: dict[Narrow, set[int]] = {}
    for row in rows:
        for where, _, narrow in arrays_of(row):
            for entry in entries_of(where, narrow):
                found.setdefault(entry, set()).update(narrow)
    return [f"{entry.pattern}: is {found.get(entry)}" for entry in NARROW if found.get(entry) != entry.sizes]


def arrays_of(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, int], set[int]]]:
    """Yield "MODULE.FUNCTION ARGUMENT" of each array of a row, its accesses by their bytes, and those below 16 bytes."""
    for name, sizes in row["accesses"].items():
        narrow = {int(size) for size in sizes if int(size) < 16}
        yield f"{row['function']} {name.rpartition(' ')[0]}", sizes, narrow


def entries_of(where: str, narrow: set[int]) -> list[Narrow]:
    """The entries of NARROW that allow such accesses of an array."""
    return [entry for entry in NARROW if narrow <= entry.sizes and re.fullmatch(entry.pattern, where)]
