"""`powersgd(r)` by `low_rank`, over real ranks, against the algorithm in one process in plain torch."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_by_collectives import carried_out, wires
from tiers import slow
from torch import Tensor
from unseen import values_are_unseen

from commpress.comm import cost, factors
from commpress.comm.codecs import parse
from commpress.comm.encoder import Encoder
from commpress.comm.exchange import Labels
from commpress.comm.exchange.low_rank import LowRank, matrix_shape
from commpress.comm.feedback import Feedback, Memory
from commpress.comm.plan import Plan
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment, Segments

CPU = torch.device("cpu")
SHAPES = ((64, 48), (48,), (20, 7, 3, 3), (64, 48), (5,), (2, 2), (33, 200))
"""Tensors of a bucket: matrices, two of them of one shape, vectors, and one that two factors would not make smaller."""
STEPS = 4
RANK = 3


def tensors(rank: int, step: int, bucket: int) -> list[Tensor]:
    """Gradients of a rank: half of them the same on all, of low rank and slowly changing, half of them noise."""
    common = torch.Generator().manual_seed(bucket)
    own = torch.Generator().manual_seed(1000 * step + 10 * rank + bucket + 7)
    found = []
    for shape in SHAPES:
        rows, columns = shape[0], torch.Size(shape).numel() // shape[0]
        thin = torch.randn(rows, 2, generator=common) @ torch.randn(2, columns, generator=common)
        found.append((thin + 0.3 * torch.randn(rows, columns, generator=own)).view(shape))
    return found


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def segments(bucket: int) -> Segments:
    return tuple(Segment.whole(f"{bucket}.{i}", x) for i, x in enumerate(tensors(0, 0, bucket)))


def exchanged(spec: str, dtype: torch.dtype, feedback: bool) -> dict[str, Any]:
    """Some steps of two buckets: the means, what is kept, and the rows of the report."""
    session = replicas_session(spec, dist.group.WORLD, CPU, error_feedback=feedback, verify=1)
    means = []
    for step in range(STEPS):
        buckets = [flat(tensors(session.rank, step, bucket)).to(dtype) for bucket in range(2)]
        futures = [session.step_buffer.submit(x, segments(b), b, last=b == 1) for b, x in enumerate(buckets)]
        means.append([future.wait() for future in futures])
    return {
        "means": means,
        "memories": session.state_dict()["memories"][0],
        "rows": session.report().to_dict()["rows"],
    }


def in_one_process(
    world_size: int, dtype: torch.dtype, feedback: bool
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What all ranks get by step and bucket, and what each keeps by bucket: Vogels et al., algorithm 1, by QR."""
    lost = [[torch.zeros(flat(tensors(0, 0, b)).numel()) for b in range(2)] for _ in range(world_size)]
    qs: dict[str, Tensor] = {}
    means: list[list[Tensor]] = []
    for step in range(STEPS):
        means.append([])
        for bucket in range(2):
            sizes = [segment.n for segment in segments(bucket)]
            sent = [flat(tensors(r, step, bucket)).to(dtype).float() + lost[r][bucket] for r in range(world_size)]
            parts, kept = [], [[torch.zeros(n) for n in sizes] for _ in range(world_size)]
            for i, segment in enumerate(segments(bucket)):
                mine = [x.split(sizes)[i] for x in sent]
                rows, columns = SHAPES[i][0], segment.n // SHAPES[i][0]
                if RANK * (rows + columns) >= rows * columns:
                    parts.append(torch.stack(mine).mean(0))
                    continue
                matrices = [x.view(rows, columns) for x in mine]
                q = qs.get(segment.name, factors.first_factor(RANK, columns, CPU).T)
                basis = torch.linalg.qr(torch.stack([m @ q for m in matrices]).mean(0)).Q
                qs[segment.name] = torch.stack([m.T @ basis for m in matrices]).mean(0)
                mean = basis @ qs[segment.name].T
                parts.append(mean.flatten())
                for r in range(world_size):
                    kept[r][i] = (matrices[r] - mean).flatten()
            for r in range(world_size):
                lost[r][bucket] = torch.cat(kept[r]) if feedback else torch.zeros(sum(sizes))
            means[-1].append(torch.cat(parts).to(dtype))
    return means, lost


@pytest.mark.parametrize(("world_size", "dtype", "feedback"), [
    (2, torch.float32, True), (3, torch.float32, True), slow(4, torch.float32, True),
    (2, torch.bfloat16, True), slow(3, torch.float64, True), (2, torch.float32, False),
])  # fmt: skip
def test_means_and_memories_are_those_of_the_paper(world_size: int, dtype: torch.dtype, feedback: bool) -> None:
    expected, lost = in_one_process(world_size, dtype, feedback)
    ranks = run(world_size, exchanged, f"powersgd({RANK})", dtype, feedback)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    for rank, got in enumerate(ranks):
        for step in range(STEPS):
            for bucket in range(2):
                mean = got["means"][step][bucket]
                assert torch.equal(mean.view(torch.uint8), ranks[0]["means"][step][bucket].view(torch.uint8))
                torch.testing.assert_close(mean, expected[step][bucket], **tolerance)
        for bucket in range(2):
            residual = got["memories"][bucket]["residual"]
            if feedback:
                torch.testing.assert_close(
                    residual, lost[rank][bucket], rtol=1e-2, atol=2e-2 if dtype.itemsize == 2 else 1e-3
                )
            else:
                assert residual is None
            for (name, q), (other, theirs) in zip(
                got["memories"][bucket]["factors"], ranks[0]["memories"][bucket]["factors"], strict=True
            ):
                assert name == other
                assert torch.equal(q, theirs)


def test_a_mean_of_low_rank_arrives_whole_after_some_steps() -> None:
    """Of two directions that all ranks share, three factors have almost all; nothing of the rest is lost."""
    means, _ = in_one_process(2, torch.float32, True)
    dense = [[flat(tensors(r, step, 0)) for r in range(2)] for step in range(STEPS)]
    far = (means[-1][0] - torch.stack(dense[-1]).mean(0)).norm() / torch.stack(dense[-1]).mean(0).norm()
    assert far < 0.5


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_report_and_the_cost_model_have_the_bytes_of_the_formula(world_size: int) -> None:
    plan, itemsize = Plan.of(f"powersgd({RANK})"), 4
    thin = [(rows, columns) for rows, columns in ((64, 48), (20, 63), (64, 48), (33, 200))]
    values = RANK * sum(rows + columns for rows, columns in thin) + 48 + 5 + 4
    sent = []
    for rank, got in enumerate(run(world_size, exchanged, f"powersgd({RANK})", torch.float32, True)):
        for bucket, row in enumerate(got["rows"]):
            n = sum(segment.n for segment in segments(bucket))
            choice = plan.choose(n, itemsize, world_size, segments=segments(bucket))
            assert (row["exchange"], row["spec"], row["reason"]) == ("low_rank", f"powersgd({RANK})", "")
            transfers = cost.transfers(choice, n, itemsize, world_size, rank)
            assert STEPS * sum(one.sent for one in transfers) == row["sent_bytes"]
            assert STEPS * sum(one.received for one in transfers) == row["received_bytes"]
            sent.append(row["sent_bytes"])
    assert sum(sent) == pytest.approx(2 * STEPS * 2 * (world_size - 1) * 4 * values, rel=0.02)


def of_vectors(spec: str) -> tuple[Tensor, list[str]]:
    """The mean of a bucket without matrices, and why it is not compressed."""
    session = replicas_session(spec, dist.group.WORLD, CPU)
    x = torch.full((600,), float(session.rank))
    session.step_buffer.submit(x, (Segment.whole("a", x[:500]), Segment.whole("b", x[500:])), 0, last=True).wait()
    return x, [row["reason"] for row in session.report().to_dict()["rows"]]


def test_a_bucket_without_matrices_travels_dense_and_says_why() -> None:
    for x, reasons in run(2, of_vectors, "powersgd(2)"):
        assert torch.equal(x, torch.full((600,), 0.5))
        assert reasons == ["payload would be no smaller than 4 bytes a value"]


# --- what is not finite, and gradients of zeros --------------------------------------------------------------------


def with_bad_values(bad: float) -> list[dict[str, Any]]:
    """Steps of which rank 1 has a bad value in one matrix in the second, in a vector in the third; memories after each."""
    session = replicas_session(f"powersgd({RANK})", dist.group.WORLD, CPU, verify=1)
    found = []
    for step in range(4):
        parts = tensors(session.rank, step, 0)
        if session.rank == 1 and step in (1, 2):
            parts[step - 1].view(-1)[17] = bad
        x = flat(parts)
        session.step_buffer.submit(x, segments(0), 0, last=True).wait()
        (kept,) = session.state_dict()["memories"][0]
        found.append({"mean": x, "residual": kept["residual"], "factors": kept["factors"]})
    return found


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_arrives_on_all_and_stays_out_of_what_is_kept(bad: float) -> None:
    ranks = run(2, with_bad_values, bad)
    sizes = [segment.n for segment in segments(0)]
    for steps in ranks:
        for step, got in enumerate(steps):
            assert torch.equal(got["mean"].view(torch.uint8), ranks[0][step]["mean"].view(torch.uint8))
            means, kept = got["mean"].split(sizes), got["residual"].split(sizes)
            assert got["residual"].isfinite().all()
            assert all(q.isfinite().all() for _, q in got["factors"])
            for i, mean in enumerate(means):
                spoilt = step in (1, 2) and i == step - 1
                assert mean.isfinite().all() != spoilt, f"step {step}, tensor {i}"
            if step == 1:  # what was kept before is still there
                assert not means[0].isfinite().any()
                assert torch.equal(kept[0], steps[0]["residual"].split(sizes)[0])
                assert torch.equal(dict(got["factors"])["0.0"], dict(steps[0]["factors"])["0.0"])
            if step == 2:
                assert int((~means[1].isfinite()).sum()) == 1


def of_little() -> list[Tensor]:
    """Means of a matrix that is 0, then of rank one, then tiny, then huge."""
    session = replicas_session("powersgd(4)", dist.group.WORLD, CPU, verify=1)
    rows, columns = torch.linspace(1, 2, 40), torch.linspace(-1, 1, 30)
    thin = torch.outer(rows, columns)
    found = []
    for x in (torch.zeros(40, 30), thin, torch.zeros(40, 30), thin * 1e-30, thin * 1e30, thin):
        values = x.flatten().clone()
        session.step_buffer.submit(values, (Segment.whole("a", x),), 0, last=True).wait()
        found.append(values.view(40, 30))
    return found


def test_a_matrix_of_zeros_or_of_less_than_its_rank_does_no_harm() -> None:
    rows, columns = torch.linspace(1, 2, 40), torch.linspace(-1, 1, 30)
    thin = torch.outer(rows, columns)
    for zero, one, again, tiny, huge, last in run(2, of_little):
        assert not zero.any()
        torch.testing.assert_close(one, thin, rtol=1e-4, atol=1e-5)
        assert again.abs().max() < 1e-5
        assert (tiny - thin * 1e-30).abs().max() < 1e-5
        assert (huge / 1e30 - thin).norm() < 0.5 * thin.norm()  # from what rounding had left as the last step's factors
        assert last.isfinite().all()


# --- where matrices lie, and what belongs to them ------------------------------------------------------------------


@pytest.mark.parametrize(("x", "shape"), [
    (torch.empty(6, 8), (6, 8)),
    (torch.empty(8, 6).T, (8, 6)),  # as it lies in memory
    (torch.empty(16, 4, 3, 3), (16, 36)),
    (torch.empty(16, 4, 3, 3).to(memory_format=torch.channels_last), (16, 36)),
    (torch.empty(4, 50, 60), (200, 60)),  # matrices in one tensor: the cut with the fewest rows and columns
    (torch.empty(9), (9, 1)),
    (torch.empty(()), (1, 1)),
    (torch.empty(1, 9), (9, 1)),
    (torch.empty(6, 8, dtype=torch.complex64), (6, 16)),
])  # fmt: skip
def test_a_tensor_is_cut_into_rows_and_columns(x: Tensor, shape: tuple[int, int]) -> None:
    rows, columns = matrix_shape(Segment.whole("x", x))
    assert rows * columns == shape[0] * shape[1]
    assert {rows, columns} == set(shape)


def test_factors_move_with_their_parameters_and_survive_a_file() -> None:
    feedback, other = Feedback(2), Feedback(2)
    a, b = Segment("a", 12), Segment("b", 20)
    memory = feedback.memory((a, b), True, None, CPU)
    memory.factors = {"a": torch.ones(1, 3), "b": torch.full((1, 5), 2.0)}
    feedback.rescale(4.0)  # they have no scale
    first = feedback.memory((b,), True, None, CPU)
    assert {name: q.tolist() for name, q in first.factors.items()} == {"b": [[2.0] * 5]}
    state = feedback.state_dict()
    assert sorted(name for bucket in state for name, _ in bucket["factors"]) == ["a", "b"]
    other.load_state_dict(state, CPU)
    assert sorted(other.memory((a, b), True, None, CPU).factors) == ["a", "b"]
    renamed = feedback.renamed({"b": "c"})
    assert [name for bucket in renamed for name, _ in bucket["factors"]] == ["c"]


def unseen(dtype: torch.dtype) -> list[Tensor]:
    """Means of two steps of a bucket by messages, then by collectives, on the definitions, of which the host sees no value."""
    found = []
    for wire in wires():
        x, codec = flat(tensors(wire.rank, 0, 0)).to(dtype), parse(f"powersgd({RANK})")
        exchange, labels = LowRank().laid_out(x.numel(), segments(0), codec), Labels()
        encoder = Encoder(codec, Memory(torch.zeros(x.numel())))
        for _ in range(2):
            mean = x.clone()
            with contextlib.nullcontext() if wire.by_message else values_are_unseen():
                carried_out(wire, exchange.run(mean, encoder, wire, labels.next("factors")))
            found.append(mean)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_collectives_nobody_waits_for_a_value(dtype: torch.dtype) -> None:
    one, other = run(2, unseen, dtype)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)
    rounding = 1e-3 if dtype == torch.float32 else 2**-7
    for by_message, by_collective in zip(one[:2], one[2:], strict=True):
        torch.testing.assert_close(by_collective, by_message, rtol=rounding, atol=1e-3)
    assert not torch.equal(one[2], one[3])  # the residual and the factors of the first step
