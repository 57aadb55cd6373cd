"""A change of the shared pieces compiles every loop that holds them anew, though Numba looks at a loop's own file only."""

import ast
import hashlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "commpress" / "kernels" / "cpu"
SHARED = FOLDER / "blocks.py", FOLDER / "instructions.py"
FILES = sorted(set(FOLDER.glob("*.py")) - set(SHARED))
COMPILED = {"loop", "summing_loop", "part", "by_type"}
"""The decorators of what Numba compiles."""


def borrowed(tree: ast.Module) -> dict[str, str]:
    """The names that loops and parts use of other modules of commpress, and which module."""
    origin = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("commpress")
        for alias in node.names
    }
    compiled = [
        f for f in tree.body if isinstance(f, ast.FunctionDef) and {ast.unparse(d) for d in f.decorator_list} & COMPILED
    ]
    used = {node.id for f in compiled for each in f.body for node in ast.walk(each) if isinstance(node, ast.Name)}
    return {name: origin[name] for name in used & origin.keys()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_whose_loops_hold_shared_pieces_has_their_hash(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = set(borrowed(tree).values())
    shared = {f"commpress.kernels.cpu.{file.stem}" for file in SHARED}
    assert modules <= shared, "a loop may use pieces of its own file, of blocks.py and of instructions.py only"
    found = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SHARED_SHA256"
    ]
    expected = [hashlib.sha256(b"".join(file.read_bytes() for file in SHARED)).hexdigest()[:16]] if modules else []
    assert found == expected, (
        f"a shared piece has changed: write SHARED_SHA256 = {expected[0]!r} in {path.name}"
        if modules
        else (f"no loop of {path.name} uses a shared piece: leave SHARED_SHA256 out")
    )


def test_shared_pieces_use_those_of_no_other_file() -> None:
    blocks, instructions = SHARED
    assert set(borrowed(ast.parse(blocks.read_text())).values()) == {"commpress.kernels.cpu.instructions"}
    assert borrowed(ast.parse(instructions.read_text())) == {}


def test_all_families_of_shared_pieces_are_found() -> None:
    holders = {path.stem for path in FILES if borrowed(ast.parse(path.read_text()))}
    assert holders == {
        "cast",
        "elias_fano",
        "float8",
        "integer",
        "low_rank",
        "random_k",
        "rotate",
        "scatter",
        "sign",
        "topk",
        "two_bit",
    }
