"""The kernels of `powersgd` for CUDA do what its definitions in plain torch do, on Triton's interpreter.

`test_triton.py` runs this file in a process of its own. By hand:

    TRITON_INTERPRET=1 SPECS= pytest tests/kernels/interpreted_low_rank.py
"""

import pytest
import torch
from interpreted import kernels  # noqa: F401
from test_low_rank_loops import (  # noqa: F401
    both,
    random,
    test_loops_and_definitions_agree,
    test_rows_become_orthonormal_and_those_without_a_direction_0,
    test_what_is_not_finite_makes_nan_and_leaves_the_residual,
)
from torch import Tensor

from commpress.comm import factors
from commpress.kernels import table
from commpress.kernels.triton import low_rank

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("kernels")]


def test_the_table_has_all_four_for_cuda() -> None:
    from commpress.kernels.triton.table import KERNELS

    found = {KERNELS[op, "powersgd", "cuda"].run for op in ("project", "orthonormalize", "project_back", "expand")}
    assert table.lookup("expand", "powersgd", "cpu") is KERNELS["expand", "powersgd", "cuda"]  # what the tests here run
    assert found == {low_rank.project, low_rank.orthonormalize, low_rank.project_back, low_rank.expand}


@pytest.mark.parametrize("shape", [(150, 40, 9), (70, 131, 5), (1, 300, 1), (300, 1, 1)])
def test_many_strips_and_groups_of_ranks_and_checks(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "LEAST_ROWS", 1)
    monkeypatch.setattr(low_rank, "CHECKED", 2)
    found, definitions = both(monkeypatch, shape, True)
    for name, value in found.items():
        torch.testing.assert_close(value, definitions[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_matrix_may_lie_anywhere_in_its_bucket_and_its_neighbours_are_left_alone() -> None:
    rows, columns, rank = 37, 45, 3
    bucket, memory = torch.full((3 + rows * columns + 5,), 7.0), torch.full((3 + rows * columns + 5,), 7.0)
    x, residual = (flat[3:-5].view(rows, columns) for flat in (bucket, memory))
    x.copy_(random(rows, columns))
    residual.copy_(random(columns, rows).view(rows, columns))
    total, q = x + residual, random(rank, columns)
    p, back = (torch.full((n + 2,), 7.0) for n in (rank * rows, rank * columns))
    factors.project(x, residual, q, p[1:-1].view(rank, rows))
    factors.project_back(x, p[1:-1].view(rank, rows), back[1:-1].view(rank, columns))
    assert torch.equal(x, total)  # a sum of two is rounded once
    torch.testing.assert_close(p[1:-1].view(rank, rows), q @ total.T, rtol=1e-4, atol=1e-4)
    factors.expand(p[1:-1].view(rank, rows), back[1:-1].view(rank, columns), x, residual)
    assert torch.equal(residual, total - x)
    for flat, before, behind in ((bucket, 3, 5), (memory, 3, 5), (p, 1, 1), (back, 1, 1)):
        assert (flat[:before] == 7).all()
        assert (flat[-behind:] == 7).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", ["p", "q"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_value_of_a_factor_that_is_not_finite_makes_nan_of_the_whole_matrix(
    of: str, place: int, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "CHECKED", 32)
    p, q, x, residual = random(2, 70), random(2, 40), random(70, 40), random(40, 70).view(70, 40)
    kept = residual.clone()
    {"p": p, "q": q}[of].view(-1)[place] = bad
    factors.expand(p, q, x, residual)
    assert x.isnan().all()
    assert torch.equal(residual, kept)


def spoilt(bad: float) -> Tensor:
    batch = random(2, 3, 60)
    batch[0, 1, 7] = bad
    return batch


def test_a_vector_with_nan_is_nan_and_so_is_what_comes_behind_it() -> None:
    batch, clean = spoilt(torch.nan), spoilt(1.0)
    factors.orthonormalize(batch)
    factors.orthonormalize(clean)
    assert torch.equal(batch[0, 0], clean[0, 0])
    assert batch[0, 1:].isnan().all()
    assert torch.equal(batch[1], clean[1])
