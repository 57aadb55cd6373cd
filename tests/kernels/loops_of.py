"""The innermost loops of LLVM's code, and what they compute one value at a time."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

LABEL = re.compile(r'^("?[^"\s;]+"?):')
TARGET = re.compile(r'label %("[^"]+"|[^\s,\]]+)')


@dataclass(frozen=True)
class Loop:
    """The instructions of an innermost loop.

    `rest`: it runs what a vectorised loop leaves over, or where arrays overlap, or it is the begin or the end of an unrolled
    loop, which is here, too.
    """

    lines: tuple[str, ...]
    rest: bool

    @property
    def packed(self) -> bool:
        """Whether it computes with vectors."""
        return any(re.search(r"<(?:vscale x )?\d+ x (?:i\d+|float|double)>", line) for line in self.lines)


def innermost(code: str) -> Iterator[Loop]:
    """Yield the innermost loops of all functions of a module."""
    marks = dict(re.findall(r"^(!\d+) = distinct !\{(.*)\}", code, re.MULTILINE))
    done = {name for name, text in re.findall(r"^(!\d+) = !\{(.*)\}", code, re.MULTILINE) if "isvectorized" in text}
    for function in re.findall(r"^define .*?^\}", code, re.MULTILINE | re.DOTALL):
        blocks = _blocks(function)
        loops = _natural(blocks)
        for header, (body, latches) in loops.items():
            if any(other in body for other in loops if other != header):
                continue
            ends = [found for latch in latches for found in re.findall(r"!llvm\.loop (!\d+)", blocks[latch][-1])]
            rest = any(mark in done for end in ends for mark in marks[end].replace(",", " ").split())
            rest = rest or all(re.search(r"\.(?:prol|epil)\b", name) for name in latches)  # as LLVM names them
            yield Loop(tuple(line for name in blocks if name in body for line in blocks[name]), rest)


def _blocks(function: str) -> dict[str, list[str]]:
    """Lines of each block of a function, by its label; the last one is the terminator."""
    found: dict[str, list[str]] = {}
    name = "entry"
    for line in function.splitlines()[1:-1]:
        if label := LABEL.match(line):
            name = label[1]
        elif line.strip():
            found.setdefault(name, []).append(line.strip())
    return {name: _joined(lines) for name, lines in found.items()}


def _joined(lines: list[str]) -> list[str]:
    """A switch's cases stand on lines of their own."""
    for i, line in enumerate(lines):
        if line.startswith("switch "):
            return [*lines[:i], " ".join(lines[i:])]
    return lines


def _natural(blocks: dict[str, list[str]]) -> dict[str, tuple[set[str], list[str]]]:
    """The blocks of each loop, and those that jump back, by the loop's first block."""
    after = {name: TARGET.findall(lines[-1]) for name, lines in blocks.items()}
    before: dict[str, list[str]] = {name: [] for name in blocks}
    for name, targets in after.items():
        for target in targets:
            before[target].append(name)
    loops: dict[str, tuple[set[str], list[str]]] = {}
    for latch, header in _back_edges(after):
        body, latches = loops.setdefault(header, ({header}, []))
        latches.append(latch)
        todo = [latch]
        while todo:
            name = todo.pop()
            if name not in body:
                body.add(name)
                todo += before[name]
    return loops


def _back_edges(after: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield the jumps to a block that is still on the way from the first one."""
    first = next(iter(after))
    way, seen, todo = {first}, {first}, [(first, iter(after[first]))]
    while todo:
        name, targets = todo[-1]
        target = next(targets, None)
        if target is None:
            way.discard(name)
            todo.pop()
        elif target in way:
            yield name, target
        elif target not in seen:
            seen.add(target)
            way.add(target)
            todo.append((target, iter(after[target])))
