"""No tensor of ours takes its dtype or its device from what a user's script has set as torch's default."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("commpress", "hooks", "launch") for path in (ROOT / folder).rglob("*.py"))
# fmt: off
FACTORIES = {
    "arange", "asarray", "as_tensor", "complex", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace",
    "logspace", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}
# fmt: on
"""What torch makes in its default device, and in its default dtype or in one that depends on the arguments."""
DEFAULT_TYPED = {"Tensor", "get_default_dtype", "get_default_device", "set_default_dtype", "set_default_device"}


def defaulting(source: str) -> list[tuple[int, str]]:
    """Line and text of each call whose dtype or device is left to torch's defaults."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            names = {alias.name for alias in node.names} & (FACTORIES | (DEFAULT_TYPED - {"Tensor"}) | {"where"})
            found += [(node.lineno, f"from torch import {name}: call it as torch.{name}") for name in sorted(names)]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
            continue
        given = {keyword.arg for keyword in node.keywords}
        text = ast.unparse(node)
        if node.func.attr in FACTORIES and None not in given:
            missing = [name for name in ("dtype", "device") if name not in given]
            if missing:
                found.append((node.lineno, f"{text}: without {' and '.join(f'{name}=' for name in missing)}"))
        elif node.func.attr in DEFAULT_TYPED:
            found.append((node.lineno, f"{text}: depends on torch's defaults"))
        elif node.func.attr == "where" and len(node.args) == 3 and all(map(is_number, node.args[1:])):
            found.append((node.lineno, f"{text}: two numbers make a tensor of the default dtype"))
    return sorted(found)


def is_number(node: ast.expr) -> bool:
    """Whether an expression is a number that is written out, or torch.inf or torch.nan."""
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in {"inf", "nan", "pi", "e"}
    return isinstance(node, ast.Constant)


def test_every_tensor_is_made_with_its_dtype_and_its_device() -> None:
    assert len(SOURCES) > 50
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}" for path in SOURCES for line, text in defaulting(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch.zeros(3)", "torch.zeros(3): without dtype= and device="),
        ("x = y + torch.arange(3, device=d) * 2", "torch.arange(3, device=d): without dtype="),
        ("torch.tensor([1.0], dtype=torch.float32)", "without device="),
        ("f(lambda: torch.full((2,), 1.0, dtype=t))", "without device="),
        ("torch.Tensor([1.0])", "depends on torch's defaults"),
        ("torch.where(c, 0.0, -torch.inf)", "two numbers"),
        ("from torch import Tensor, zeros", "call it as torch.zeros"),
    ],
)
def test_the_check_names_line_and_call(line: str, said: str) -> None:
    [(number, text)] = defaulting(f"import torch\n{line}\n")
    assert number == 2
    assert said in text


def test_the_check_lets_through_what_depends_on_no_default() -> None:
    source = """
from torch import Tensor
torch.zeros(3, dtype=torch.int32, device=x.device)
torch.zeros_like(x)
x.new_zeros(3)
torch.where(c, x, 0.0)
torch.from_numpy(a)
torch.frombuffer(b, dtype=torch.uint8)
torch.empty(*size, **like)
"""
    assert defaulting(source) == []
