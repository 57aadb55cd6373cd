"""Other ways to compress Adam: what a link loses comes back, its bytes are those of its payloads, and the ranks stay equal."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor

from commpress.comm.codecs import parse

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

adam_tries = pytest.importorskip("adam_tries", reason="rich is not installed")

VALUES, MATRICES, STEPS = 9000, 8192, 4
SPEC = "topk(0.02)|sign"


def sent_through(link: str, spec: str) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """What this rank put into a link in each step, what came out, and the link's state."""
    torch.manual_seed(dist.get_rank())
    made = getattr(adam_tries, link)(VALUES, MATRICES, spec)
    put = [torch.randn(VALUES) for _ in range(STEPS)]
    return put, [made.mean(x) for x in put], vars(made)


def a_run(name: str, steps: int) -> dict[str, float]:
    """A run of a few steps; it raises if the ranks end with other bits."""
    row = next(row for row in adam_tries.TRIES if row.name == name)
    return dict(adam_tries.train(row, adam_tries.Text(), 0.001, 1, steps))


def other_parameters() -> str:
    """What a rank says of parameters that are not those of rank 0."""
    with pytest.raises(RuntimeError) as error:
        adam_tries.require_same(torch.tensor([1.0, float(dist.get_rank())]))
    return str(error.value)


def bytes_a_step(values: int, matrices: int, spec: str) -> int:
    return parse(spec).nbytes(matrices) + parse(adam_tries.VECTORS).nbytes(values - matrices)


def test_feedback_returns_all_that_it_lost() -> None:
    (put, got, state), (other_put, other_got, other) = run(2, sent_through, "Feedback", SPEC)
    assert all(torch.equal(a, b) for a, b in zip(got, other_got, strict=True))
    arrived = 2 * torch.stack(got).sum(0) + state["lost"] + other["lost"]
    torch.testing.assert_close(arrived, torch.stack(put + other_put).sum(0), atol=1e-4, rtol=1e-4)
    assert state["sent"] == STEPS * bytes_a_step(VALUES, MATRICES, SPEC)


def test_ef21_holds_the_mean_of_the_estimates_on_all_ranks() -> None:
    (_, got, state), (_, other_got, other) = run(2, sent_through, "EF21", SPEC)
    assert all(torch.equal(a, b) for a, b in zip(got, other_got, strict=True))
    torch.testing.assert_close(got[-1], (state["mine"] + other["mine"]) / 2, atol=1e-5, rtol=1e-5)
    assert state["sent"] == STEPS * bytes_a_step(VALUES, MATRICES, SPEC)


def test_masks_keep_what_they_did_not_send() -> None:
    (put, got, state), (other_put, other_got, other) = run(2, sent_through, "Masked", "topk(0.02)|int4")
    assert all(torch.equal(a, b) for a, b in zip(got, other_got, strict=True))
    assert torch.equal(state["places"], other["places"])
    kept = state["kept"] + other["kept"]
    arrived = 2 * torch.stack(got).sum(0) + kept
    torch.testing.assert_close(arrived, torch.stack(put + other_put).sum(0), atol=1e-4, rtol=1e-4)
    places = 2 * round(0.02 * MATRICES / 2)
    assert len(state["places"]) == places + VALUES - MATRICES
    mask = parse("topk(0.02)|sign").nbytes(MATRICES // 2)
    values = parse("int4").nbytes(places) + parse("int4").nbytes(VALUES - MATRICES)
    assert state["sent"] == (STEPS + 1) * mask + STEPS * values


def test_other_parameters_on_a_rank_are_an_error() -> None:
    for said in run(2, other_parameters):
        assert said == "1 ranks hold other parameters than rank 0 after a run; expected the same bits"


@pytest.mark.slow
@pytest.mark.parametrize("row", adam_tries.TRIES, ids=lambda row: row.name)
def test_every_row_trains_and_the_ranks_end_with_the_same_bits(row: Any) -> None:
    one, other = run(2, a_run, row.name, 6, timeout=100)
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert one["loss"] < one["third"] < 5.7
