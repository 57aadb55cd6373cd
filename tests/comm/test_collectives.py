"""Traffic of sharded models over real Gloo ranks, against the same computed in one process from the codecs."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from battery import gradient
from ranks import outcome, run
from tiers import slow
from torch import Tensor

from commpress.comm.agreement import agree_on_all
from commpress.comm.codecs import Codec, parse
from commpress.comm.coding import encode
from commpress.comm.collectives import Collectives
from commpress.comm.exchange import EXCHANGES
from commpress.comm.exchange.reduce_scatter import over_mean
from commpress.comm.plan import plans, sharded_settings
from commpress.comm.segments import Segment, Segments
from commpress.comm.session import Session

CPU = torch.device("cpu")
SPECS = ("none", "bf16", "int8", "int4", "sign", "topk(0.1)", "topk(0.1)|int4")
SIZES = (256, 1001, 5000)
"""Values of a chunk."""
STEPS = 3


def values(n: int, rank: int, step: int) -> Tensor:
    """What a rank contributes: what all share, and its own noise."""
    return gradient(n, 17 * step) + gradient(n, 1000 * (rank + 1) + step)


def shards(gradients: str, parameters: str = "none", feedback: bool = True) -> Collectives:
    """All ranks of this test."""
    return Collectives(dist.group.WORLD, CPU, *plans(gradients, parameters, feedback))  # type: ignore[arg-type]


def layout(m: int, world_size: int) -> Segments:
    """Two parameters of unequal size in each chunk of m values."""
    return tuple(
        Segment(f"{name} of {m}[{r}]", n) for r in range(world_size) for name, n in (("a", m // 3), ("b", m - m // 3))
    )


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return x.contiguous().view(torch.uint8)


# --- the same in one process -------------------------------------------------------------------------------------


def reduced(codec: Codec, fulls: list[Tensor], residuals: list[Tensor] | None, r: int) -> Tensor:
    """The mean of chunk r, out of what every rank encodes; the residuals become what that misses."""
    m = fulls[0].numel() // len(fulls)
    part = slice(r * m, (r + 1) * m)
    kept = [None] * len(fulls) if residuals is None else [residual[part] for residual in residuals]
    payloads = [encode(codec, x[part], residual) for x, residual in zip(fulls, kept, strict=True)]
    return codec.mean(torch.cat(payloads), m, len(fulls))


# --- what the ranks do -------------------------------------------------------------------------------------------


def reductions(spec: str, feedback: bool) -> dict[str, Any]:
    """Every size in every step; this rank's results, those expected, what is left of feedback, and the report."""
    here, codec = shards(spec, feedback=feedback), parse(spec)
    me, W = here.rank, here.world_size
    kept = {m: [torch.zeros(W * m) for _ in range(W)] for m in SIZES} if feedback else {}
    equal, missing = [], []
    for step in range(STEPS):
        started = []
        for index, m in enumerate(SIZES):  # all under way at once
            full, out = values(W * m, me, step), torch.full((m,), torch.nan)
            started.append((m, out, full.clone(), full, here.reduce_scatter(full, out, layout(m, W), index)))
        for m, out, before, full, pending in started:
            pending.wait()
            fulls = [values(W * m, rank, step) for rank in range(W)]
            if codec.lossy:
                everyone = [reduced(codec, fulls, kept.get(m), r) for r in range(W)]  # all: their residuals are needed
                expected = everyone[me]
            else:
                expected = torch.empty(m)
                dist.reduce_scatter_single(expected, before.clone(), op=dist.ReduceOp.AVG)
                assert not here.feedback.memories
            equal.append(torch.equal(bits(out), bits(expected)))
            if step == 0:
                exact = torch.stack(fulls).mean(dim=0)[me * m : (me + 1) * m]
                missing.append(float((out - exact).norm() / exact.norm()))
            assert not codec.lossy or torch.equal(bits(full), bits(before))  # read, not written
    residuals = {
        m: memory.residual for m in SIZES for memory in [here.feedback.memories.get(layout(m, W))] if memory is not None
    }
    if feedback and codec.lossy:
        equal += [torch.equal(residuals[m], kept[m][me]) for m in SIZES]
    else:
        assert all(residual is None for residual in residuals.values())
    return {"equal": equal, "missing": missing, "report": here.traffic.report(spec, me, W).to_dict()}


def gathered(spec: str, dtype: torch.dtype) -> dict[str, Any]:
    """Collectives of every size, two at once; the input of the first is a part of its output, as FSDP has it."""
    here, codec = shards("none", spec), parse(spec)
    me, W = here.rank, here.world_size
    outs, expected = [], []
    for _ in range(2):
        for index, m in enumerate(SIZES):
            parts = [values(m, rank, 0).to(dtype) for rank in range(W)]
            mine, twice = parts[me].clone(), 2 * parts[me]
            both = [torch.full((W * m,), torch.nan, dtype=dtype) for _ in range(2)]
            own = both[0][me * m : (me + 1) * m].copy_(mine)
            pending = [here.all_gather(own, both[0], index), here.all_gather(twice, both[1], index)]
            for one in pending:
                one.wait()
            assert torch.equal(twice, 2 * mine)  # a shard is as it was
            outs += both
            for factor in (1, 2):
                coded = [codec.decode(codec.encode(factor * p), m, out=torch.empty_like(p)) for p in parts]
                expected.append(torch.cat(coded))
    equal = [torch.equal(bits(a), bits(b)) for a, b in zip(outs, expected, strict=True)]
    return {"equal": equal, "outs": outs, "report": here.traffic.report(spec, me, W).to_dict()}


def replicated(spec: str) -> tuple[list[bool], list[Tensor]]:
    """all_reduce: whether SUM is W times AVG, and the means."""
    here = shards(spec, feedback=False)
    me, W = here.rank, here.world_size
    means, equal = [], []
    for op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
        x = values(5000, me, 0)
        here.all_reduce(x, (Segment("p", 5000),), 0, op=op).wait()
        means.append(x)
    equal.append(torch.allclose(means[1], W * means[0]))
    small = values(100, me, 1)
    here.all_reduce(small, (Segment("small", 100),), 1).wait()
    equal.append(torch.allclose(small, torch.stack([values(100, r, 1) for r in range(W)]).mean(dim=0), atol=1e-6))
    return equal, [means[0], small]


def laid_otherwise(spec: str) -> str:
    """Rank 1 has the columns of a matrix in the place of its rows."""
    here = shards(spec, feedback=False)
    x = torch.ones(50, 100)
    if here.rank == 1:
        x = x.view(100, 50).T
    return outcome(lambda: here.all_reduce(torch.ones(5000), (Segment.whole("p", x),), 0).wait())


@pytest.mark.parametrize("spec", ["none", "int4"])
def test_ranks_whose_parameters_lie_otherwise_in_memory_say_so(spec: str) -> None:
    for said in run(2, laid_otherwise, spec):
        assert "gradients of 'p' (1 parts, 5000 values, layout " in said
        assert "all ranks must do the same" in said


def by_op(spec: str) -> dict[str, Tensor]:
    """The same gradient by each op that a framework may ask for."""
    here = shards(spec, feedback=False)
    found = {}
    for name, op in (("AVG", dist.ReduceOp.AVG), ("SUM", dist.ReduceOp.SUM), ("half", dist.ReduceOp.PREMUL_SUM(0.5))):
        out = torch.empty(1001)
        here.reduce_scatter(values(2002, here.rank, 0), out, layout(1001, 2), 0, op).wait()
        found[name] = out
    return found


def refusals() -> dict[str, str]:
    """What is said to arguments that do not fit, and whether all goes on behind them."""
    here = shards("int4", "int8")
    said = {
        "sizes": outcome(lambda: here.reduce_scatter(torch.zeros(1000), torch.zeros(400), layout(400, 2), 0)),
        "dtypes": outcome(lambda: here.all_gather(torch.zeros(400), torch.zeros(800, dtype=torch.float64), 0)),
        "op": outcome(lambda: over_mean(dist.ReduceOp.MAX, 2)),  # type: ignore[arg-type]
        "sparse": outcome(lambda: plans("int4", "topk(0.1)", True)),
        "word": outcome(lambda: plans("int4", "int5", True)),
        "type": outcome(lambda: plans(4, "int8", True)),  # type: ignore[arg-type]
    }
    out = torch.empty(400)
    here.reduce_scatter(torch.ones(800), out, layout(400, 2), 0).wait()
    said["afterwards"] = f"{out.mean():.2f}"
    return said


def not_compressed() -> list[dict[str, Any]]:
    """The report's rows of what cannot be compressed, or shall not."""
    here = shards("int4", "int8")
    me, W = here.rank, here.world_size
    mixed = torch.full((1000,), me, dtype=torch.uint8)
    out = torch.empty(W * 1000, dtype=torch.uint8)
    here.all_gather(mixed, out, 0).wait()
    assert torch.equal(out, torch.arange(W, dtype=torch.uint8).repeat_interleave(1000))
    small = torch.full((W * 100,), float(me))
    chunk = torch.empty(100)
    here.reduce_scatter(small, chunk, layout(100, W), 1).wait()
    assert torch.equal(chunk, torch.full((100,), (W - 1) / 2))
    here.reduce_scatter(torch.ones(W * 1000), torch.empty(1000), layout(1000, W), 2, reason="told so").wait()
    rows: Any = here.traffic.report("", me, W).to_dict()["rows"]
    return list(rows)


def failing(m: int) -> list[str]:
    """Rank 1 is told of other parameters than are in its gradient: its memory, of 2 m values, does not fit."""
    here = shards("int4")
    wrong = layout(m if here.rank == 1 else 1000, 2)
    pending = here.reduce_scatter(torch.ones(2000), torch.empty(1000), wrong, 0)
    later = here.all_gather(torch.ones(300), torch.empty(600), 0)
    return [outcome(pending.wait), outcome(later.wait)]


def laid_out_anew() -> list[Tensor]:
    """A parameter's gradient is missing for a while. What feedback keeps for the other moves along, chunk by chunk."""
    here, codec = shards("int4"), parse("int4")
    me, W = here.rank, here.world_size
    sizes = {"a": 300, "b": 500}
    kept = [{name: torch.zeros(W, n) for name, n in sizes.items()} for _ in range(W)]
    differences = []
    for step, names in enumerate((("a", "b"), ("a", "b"), ("b",), ("b",), ("a", "b"))):
        trained = tuple(Segment(f"{name}[{r}]", sizes[name]) for r in range(W) for name in names)
        m = sum(sizes[name] for name in names)
        out = torch.empty(m)
        here.reduce_scatter(values(W * m, me, step), out, trained, 0).wait()
        joined = [torch.cat([torch.cat([k[name][r] for name in names]) for r in range(W)]) for k in kept]
        everyone = [reduced(codec, [values(W * m, r, step) for r in range(W)], joined, r) for r in range(W)]
        for k, flat in zip(kept, joined, strict=True):
            for r, chunk in enumerate(flat.split(m)):
                for name, part in zip(names, chunk.split([sizes[n] for n in names]), strict=True):
                    k[name][r] = part
        differences.append(out - everyone[me])
    return differences


def agreements() -> dict[str, str]:
    """Four ranks as a mesh of two by two; what one of them says, all hear."""
    me = dist.get_rank()
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    groups: Any = [rows[me // 2], columns[me % 2]]
    return {
        "equal": outcome(lambda: agree_on_all({"spec": "int4"}, groups, CPU, None)),
        "differ": outcome(lambda: agree_on_all({"spec": "int8" if me == 3 else "int4"}, groups, CPU, None)),
        "refusal": outcome(lambda: agree_on_all({"spec": "int4"}, groups, CPU, TypeError("no") if me == 2 else None)),
        "afterwards": outcome(lambda: agree_on_all({"spec": "int4"}, groups, CPU, None)),
    }


def alone() -> dict[str, Any]:
    """One rank: nothing to send."""
    here = shards("int4", "int8")
    full = gradient(1000)
    out, doubled, whole = torch.empty(1000), torch.empty(1000), torch.empty(1000)
    here.reduce_scatter(full, out, layout(1000, 1), 0).wait()
    here.reduce_scatter(full, doubled, layout(1000, 1), 0, dist.ReduceOp.PREMUL_SUM(2.0)).wait()
    here.all_gather(full, whole, 0).wait()
    both = torch.equal(out, full) and torch.equal(doubled, 2 * full) and torch.equal(whole, full)
    return {"equal": both, "report": here.traffic.report("", 0, 1).to_dict()}


def scaled() -> list[Tensor]:
    """What the memory holds before the loss scale doubles, and after."""

    class Scaler:
        scale = 4.0

        def get_scale(self) -> float:
            return self.scale

    here, scaler = shards("int4"), Scaler()
    here.grad_scaler = scaler
    session = Session(here, spec="int4", settings={})
    session.follow_scale()
    here.reduce_scatter(values(2000, here.rank, 0), torch.empty(1000), layout(1000, 2), 0).wait()
    found = []
    for scale in (4.0, 8.0):
        scaler.scale = scale
        session.follow_scale()
        found.append(session.state_dict()["memories"][0][0]["residual"])
    return found


def loaded() -> list[str]:
    """What comes of a session's own state, of another rank's, and of a list."""
    here = shards("int4")
    session = Session(here, spec="int4", settings=sharded_settings(here.gradients, here.parameters, "2 with 5 values"))
    own = session.state_dict()
    other = {**dict(own), "rank": 1 - here.rank}

    def load(state: Any) -> None:
        session.load_state_dict(state)

    return [outcome(lambda state=state: load(state)) for state in (own, other, [{}])]


# --- the tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "none kept"])
@pytest.mark.parametrize(
    ("world_size", "specs"), [(2, SPECS), slow(3, ("none", "int4", "topk(0.1)|int4")), (4, ("sign",))]
)
def test_reduce_scatter_is_the_mean_of_what_was_encoded(
    world_size: int, specs: tuple[str, ...], feedback: bool
) -> None:
    bound = {"none": 1e-6, "bf16": 0.01, "int8": 0.02, "int4": 0.3}  # the others leave most of a single step for later
    for spec in specs:
        codec = parse(spec)
        for rank, got in enumerate(run(world_size, reductions, spec, feedback)):
            assert all(got["equal"]), (spec, rank, got["equal"])
            assert all(error < bound.get(spec, 1.5) for error in got["missing"])
            assert spec in ("none", "bf16") or all(error > 0 for error in got["missing"])
            report = got["report"]
            assert report["steps"] == STEPS
            for row, m in zip(report["rows"], SIZES, strict=True):
                coded = codec.lossy and codec.nbytes(m) < 4 * m
                gloo = STEPS * 2 * (world_size - 1) * 4 * m  # its reduce-scatter is an all-reduce
                dense = gloo // 2 if coded else gloo
                assert row["backend_bytes"] == gloo
                assert (row["values"], row["role"], row["exchange"]) == (world_size * m, "gradients", "reduce_scatter")
                assert row["dense_bytes"] == dense
                assert row["sent_bytes"] == row["received_bytes"]
                assert row["sent_bytes"] == (STEPS * (world_size - 1) * codec.nbytes(m) if coded else dense)
                assert row["reason"] == ("" if coded else "spec is none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world_size", "specs"), [(2, ("none", "int8", "int4", "sign")), (3, ("none", "int8"))])
def test_all_ranks_gather_the_same_decoded_bits(world_size: int, specs: tuple[str, ...], dtype: torch.dtype) -> None:
    for spec in specs:
        ranks = run(world_size, gathered, spec, dtype)
        for got in ranks:
            assert all(got["equal"]), spec
            for own, first in zip(got["outs"], ranks[0]["outs"], strict=True):
                assert torch.equal(bits(own), bits(first))
            for row, m in zip(got["report"]["rows"], SIZES, strict=True):
                size = parse(spec).nbytes(m) if spec != "none" else m * dtype.itemsize
                assert (row["role"], row["exchange"], row["steps"]) == ("parameters", "all_gather", 4)
                assert row["sent_bytes"] == 4 * (world_size - 1) * size
                assert row["dense_bytes"] == 4 * (world_size - 1) * m * dtype.itemsize
            assert got["report"]["steps"] == 0  # no gradient yet


@pytest.mark.parametrize(("spec", "world_size"), [("none", 3), ("int4", 2), ("int4", 3), ("topk(0.1)", 3), ("bf16", 2)])
def test_replicas_hold_the_same_bits(spec: str, world_size: int) -> None:
    ranks = run(world_size, replicated, spec)
    for equal, means in ranks:
        assert all(equal)
        for own, first in zip(means, ranks[0][1], strict=True):
            assert torch.equal(bits(own), bits(first))
    exact = torch.stack([values(5000, r, 0) for r in range(world_size)]).mean(dim=0)
    assert float((ranks[0][1][0] - exact).norm() / exact.norm()) < {"none": 1e-6, "bf16": 0.01}.get(spec, 0.9)
    assert EXCHANGES.keys() >= {"two_shot", "one_shot", "all_reduce"}


def test_every_op_is_the_mean_times_a_number() -> None:
    for found in run(2, by_op, "int4"):
        assert torch.equal(found["SUM"], 2 * found["AVG"])
        assert torch.equal(found["half"], found["AVG"])


def test_what_is_not_compressed_says_why() -> None:
    for rows in run(3, not_compressed):
        assert [row["reason"] for row in rows] == ["uint8 is no float", "fewer than 256 values", "told so"]
        assert all(row["sent_bytes"] == row["dense_bytes"] > 0 for row in rows)


def test_refusals_are_sentences_and_harm_nothing() -> None:
    one, other = run(2, refusals)
    assert one == other
    assert "ValueError: 1000 values of torch.float32 do not make 2 chunks of 400 of torch.float32" in one["sizes"]
    assert "800 values of torch.float64 do not make 2 chunks of 400 of torch.float32" in one["dtypes"]
    assert "expected ReduceOp.AVG, SUM or PREMUL_SUM" in one["op"]
    assert one["sparse"] == (
        "ValueError: parameters: topk(0.1) would make most of them 0; expected none, or a codec that sends all values"
    )
    assert one["word"].startswith("ValueError: parameters: spec 'int5': unknown codec 'int5', known: none")
    assert one["type"].startswith("TypeError: gradients: a spec is a string")
    assert one["afterwards"] == "1.00"


def test_an_error_of_one_rank_ends_all_that_is_under_way() -> None:
    for said in run(2, failing, 400, fresh=True):
        for text in said:
            assert "the gradient exchange failed on rank 1: ValueError: residual has shape" in text


def test_an_error_behind_the_last_message_ends_what_follows() -> None:
    """Rank 1 has sent all that rank 0 needs and fails in its own chunk."""
    one, other = run(2, failing, 999, fresh=True)
    for text in (one[0] or one[1], one[1], *other):  # rank 0 may have had its first result by then
        assert "the gradient exchange failed on rank 1: ValueError: residual has shape" in text


def test_memories_belong_to_parameters_chunk_by_chunk() -> None:
    for differences in run(3, laid_out_anew):
        assert all(not difference.any() for difference in differences)


def test_a_mesh_agrees_along_all_its_dimensions() -> None:
    ranks = run(4, agreements)
    assert all(said["equal"] == said["afterwards"] == "" for said in ranks)
    assert all("has spec 'int8'" in said["differ"] for said in ranks)
    assert ranks[2]["refusal"] == "TypeError: no"
    assert all(said["refusal"].endswith(": no") for said in ranks)


def test_a_single_rank_sends_nothing() -> None:
    (got,) = run(1, alone)
    assert got["equal"]
    assert {row["reason"] for row in got["report"]["rows"]} == {"one rank: nothing to send"}
    assert got["report"]["sent_bytes"] == 0


def test_memories_follow_the_loss_scale() -> None:
    for before, after in run(2, scaled):
        assert before.any()
        assert torch.equal(after, 2 * before)


def test_a_state_fits_its_own_session_only() -> None:
    for rank, (own, other, several) in enumerate(run(2, loaded)):
        assert own == ""
        assert f"the saved state has rank {1 - rank}, this run has {rank}" in other
        assert "TypeError: expected the dict that this rank saved" in several
