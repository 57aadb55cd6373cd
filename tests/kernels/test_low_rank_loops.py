"""The loops of `powersgd` do what its definitions in plain torch do."""

import pytest
import torch
from torch import Tensor

from commpress.comm import factors

SHAPES = ((64, 48, 4), (300, 7, 1), (5, 2100, 3), (130, 1100, 8), (33, 1025, 6), (3, 3, 2))
"""Rows, columns and rank: in one tile of columns and in several, in one group of four rows of a factor and in more."""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def both(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], feedback: bool, bad: float | None = None
) -> list[dict[str, Tensor]]:
    """All that the operations write, by the loops and by the definitions."""
    rows, columns, rank = shape
    found = []
    for defined in (False, True):
        with monkeypatch.context() as patch:
            if defined:
                patch.setattr(factors, "lookup", lambda *key: None)
            x, residual = random(rows, columns), random(columns, rows).view(rows, columns) if feedback else None
            if bad is not None:
                x[rows // 2, columns // 2] = bad
            q, p, back = random(rank, columns), torch.empty(rank, rows), torch.empty(rank, columns)
            factors.project(x, residual, q, p)
            total, products = x.clone(), p.clone()
            factors.orthonormalize(p.unsqueeze(0))
            factors.project_back(x, p, back)
            factors.expand(p, back, x, residual)
        found.append({"total": total, "products": products, "p": p, "q": back, "mean": x})
        if residual is not None:
            found[-1]["residual"] = residual
    return found


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_loops_and_definitions_agree(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], feedback: bool
) -> None:
    loops, definitions = both(monkeypatch, shape, feedback)
    for name, value in loops.items():
        torch.testing.assert_close(value, definitions[name], rtol=1e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_nan_and_leaves_the_residual(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    for got in both(monkeypatch, (64, 48, 4), True, bad):
        assert got["mean"].isnan().all()
        assert torch.equal(got["residual"], random(48, 64).view(64, 48))


@pytest.mark.parametrize("defined", [True, False])
def test_rows_become_orthonormal_and_those_without_a_direction_0(
    monkeypatch: pytest.MonkeyPatch, defined: bool
) -> None:
    if defined:
        monkeypatch.setattr(factors, "lookup", lambda *key: None)
    batch = random(3, 4, 50)
    batch[0] *= torch.tensor([1e-20, 1.0, 1e12, 1e-6])[:, None]
    batch[1, 2] = 3 * batch[1, 0] - batch[1, 1]
    batch[2, 1:] = 0
    before = batch.clone()
    factors.orthonormalize(batch)
    for m, directions in enumerate(([1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0])):
        gram = batch[m] @ batch[m].T
        torch.testing.assert_close(gram, torch.diag(torch.tensor(directions, dtype=torch.float32)), rtol=0, atol=1e-5)
        rest = before[m] / before[m].norm(dim=-1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close(rest @ batch[m].T @ batch[m], rest, rtol=0, atol=1e-4)


def test_the_first_factor_is_the_same_in_every_process_and_no_two_rows_are_alike() -> None:
    q = factors.first_factor(4, 100, torch.device("cpu"))
    factors.first_factor.cache_clear()
    assert torch.equal(q, factors.first_factor(4, 100, torch.device("cpu")))
    assert torch.linalg.matrix_rank(q) == 4
