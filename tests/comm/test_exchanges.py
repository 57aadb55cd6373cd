"""Every exchange, over real Gloo ranks, against the same algorithm computed in one process from the codecs' definitions."""

import threading
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from battery import gradient
from ranks import run
from tiers import slowly
from torch import Tensor

from commpress.comm.codecs import Codec, parse
from commpress.comm.codecs.rotate import Rotate, rotated
from commpress.comm.encoder import Encoder
from commpress.comm.exchange import Hierarchical, Labels, Wire, named
from commpress.comm.exchange.two_shot import chunk_bounds
from commpress.comm.feedback import Memory
from commpress.comm.plan import Plan
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment

PAIRS: tuple[tuple[str, str | None], ...] = (
    ("int8", None),  # two_shot
    ("sign", None),
    ("topk(0.01)", None),
    ("topk(0.1)", None),
    ("topk(0.1)|int4", None),
    ("topk(0.01)|int8", None),
    ("topk(0.05)|sign", None),
    ("topk(0.02)|bf16", None),
    ("randomk(0.1)", None),
    ("randomk(0.2)|int4", None),
    ("rotate|int4", None),
    ("rotate|sign", "one_shot"),
    ("int8", "one_shot"),
    ("int4", "one_shot"),
    ("sign", "one_shot"),
    ("bf16", "one_shot"),
    ("none", "one_shot"),
    ("int4", "two_shot"),
    ("topk(0.01)", "two_shot"),
    ("randomk(0.01)", "two_shot"),
    ("randomk(0.1)|int4", "one_shot"),
    ("topk(0.1)|int4", "two_shot"),
    ("fp16", "two_shot"),
    ("bf16", "two_shot"),
    ("none", "two_shot"),
    ("int4", "hierarchical(2)"),
    ("sign", "hierarchical(2)"),
    ("topk(0.1)|int4", "hierarchical(2)"),
    ("bf16", "hierarchical(2)"),
    ("randomk(0.1)", "hierarchical(2)"),
    ("rotate|int4", "hierarchical(2)"),
    ("none", "hierarchical(2)"),
    ("int4", "hierarchical(3)"),
)
"""Spec and exchange (None: the codec's own) of the battery. A new one is one line here."""
SUMMED = ("none", "bf16", "fp16", "randomk(0.1)", "randomk(0.2)|bf16")
WORLD_SIZES = (2, 3, 4)
NODES = ((4, "hierarchical(2)"), (6, "hierarchical(2)"), (6, "hierarchical(3)"))
"""Ranks, and how many of them a node has."""
FEW = ("int4", "sign", "topk(0.1)|int4", "bf16", "randomk(0.1)", "rotate|int4")
"""Specs at 2 and 4 ranks: the chunks are others than at 3, the codecs are not."""
BUCKETS = (
    (257, torch.float32),
    (1000, torch.float32),
    (5000, torch.float32),
    (70_001, torch.float32),
    (5000, torch.float64),
    (5000, torch.bfloat16),
    (1000, torch.float16),
)
"""Length and dtype. 257 int values are two blocks and 1000 signs are one: there some ranks own an empty chunk."""
TINY = (1, 2, 3, 5, 17, 100)
TINY_SPECS = ("none", "bf16", "int8", "int4", "sign", "topk(0.1)", "topk(0.1)|int4")
STEPS = 3
CPU = torch.device("cpu")


def values(n: int, rank: int, step: int, dtype: torch.dtype) -> Tensor:
    """What a rank contributes: a mean that all share and its own noise."""
    return made(n, rank, step, dtype).clone()


@cache
def made(n: int, rank: int, step: int, dtype: torch.dtype) -> Tensor:
    """The same, once for all specs. For reading only."""
    return (gradient(n, 17 * step) + gradient(n, 1000 * (rank + 1) + step)).to(dtype)


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN and the sign of zero compare too."""
    return x.contiguous().view(torch.uint8)


# --- the same algorithms in one process --------------------------------------------------------------------------


@dataclass
class Simulated:
    """The memories of all ranks for one bucket; where nodes have several ranks, `residuals` are of each rank's slice."""

    residuals: list[Tensor]
    seconds: list[Tensor] = field(default_factory=list)
    ranks_per_node: int = 0

    def of_slice(self, place: int) -> "Simulated":
        """Return those of the ranks that own this slice, one a node."""
        return Simulated(self.residuals[place :: self.ranks_per_node], self.seconds[place :: self.ranks_per_node])


def encoded(codec: Codec, x: Tensor, residual: Tensor | None) -> Tensor:
    """What the definition sends for x + residual; the residual becomes what that misses."""
    if x.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    total = x.float() if residual is None else x.float() + residual
    payload = codec.define_encode(total)
    if residual is not None:
        residual.copy_(total - codec.define_decode(payload, x.numel()))
    return payload


def mean_of(codec: Codec, payloads: list[Tensor], n: int) -> Tensor:
    """The decoded payloads, each divided by their number, summed in the order of the ranks; rotated back as a sum."""
    if isinstance(codec, Rotate):
        return rotated(mean_of(codec.values, payloads, n), back=True)
    mean = torch.zeros(n)
    for r, payload in enumerate(payloads if n else []):
        part = codec.define_decode(payload, n) * (1.0 / len(payloads))
        mean = part if r == 0 else mean + part
    return mean


def simulated(codec: Codec, exchange: str, inputs: list[Tensor], kept: Simulated | None) -> Tensor:
    """The float32 mean that `exchange` must give for the ranks' inputs; `kept` is brought up to date."""
    n, W = inputs[0].numel(), len(inputs)
    if L := ranks_per_node(exchange):
        parts, inner = [], between_nodes(codec, W // L)
        for place, part in enumerate(chunks(n, L, codec.granularity)):
            means = []
            for first in range(0, W, L):
                total = inputs[first + place][part].float()
                for step in range(1, L):
                    total = (total + inputs[first + (place + step) % L][part]).float()
                means.append(total * (1 / L))
            parts.append(simulated(codec, inner, means, None if kept is None else kept.of_slice(place)))
        return torch.cat(parts)
    residuals: list[Tensor | None] = [None] * W if kept is None else list(kept.residuals)
    if exchange == "one_shot":
        return mean_of(codec, [encoded(codec, x, e) for x, e in zip(inputs, residuals, strict=True)], n)
    parts = []
    for r, part in enumerate(chunks(n, W, codec.granularity)):
        rows = [encoded(codec, x[part], e if e is None else e[part]) for x, e in zip(inputs, residuals, strict=True)]
        mean = mean_of(codec, rows, part.stop - part.start)
        sent = encoded(codec, mean, None if kept is None else kept.seconds[r])
        parts.append(codec.define_decode(sent, mean.numel()) if mean.numel() else mean)
    return torch.cat(parts)


def ranks_per_node(exchange: str) -> int:
    """How many ranks a node has, if nodes matter; else 0."""
    found = Hierarchical.read(exchange)
    return 0 if found is None else found.ranks_per_node


def between_nodes(codec: Codec, nodes: int) -> str:
    """The exchange of a slice between nodes."""
    return "one_shot" if nodes == 2 or codec.exchange == "one_shot" else "two_shot"


def chunks(n: int, world_size: int, granularity: int) -> list[slice]:
    """The chunk of each rank: whole blocks, shared out evenly, the tail to the last."""
    blocks = -(-n // granularity)
    cuts = [min(n, blocks * r // world_size * granularity) for r in range(world_size + 1)]
    return [slice(cuts[r], cuts[r + 1]) for r in range(world_size)]


def zeros(codec: Codec, exchange: str, n: int, world_size: int) -> Simulated | None:
    """Empty memories as a session starts with them."""
    if not codec.lossy:
        return None
    if L := ranks_per_node(exchange):
        slices, nodes = chunks(n, L, codec.granularity), world_size // L
        each = [zeros(codec, between_nodes(codec, nodes), part.stop - part.start, nodes) for part in slices]
        residuals, seconds = (
            [kept for of_node in zip(*(getattr(one, kind) for one in each), strict=True) for kept in of_node]
            for kind in ("residuals", "seconds")
        )
        return Simulated(residuals, seconds, L)
    parts = chunks(n, world_size, codec.granularity) if exchange == "two_shot" else []
    return Simulated([torch.zeros(n) for _ in range(world_size)], [torch.zeros(p.stop - p.start) for p in parts])


# --- what the ranks do -------------------------------------------------------------------------------------------


def all_exchanged(pairs: list[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """Every spec and exchange, one after another."""
    return [exchanged(spec, exchange) for spec, exchange in pairs]


def exchanged(spec: str, exchange: str | None) -> dict[str, Any]:
    """STEPS steps with all BUCKETS: means and memories by step and bucket, and the report's rows."""
    session = replicas_session(spec, dist.group.WORLD, CPU, exchange=exchange)
    means, memories = [], []
    for step in range(STEPS):
        futures = []
        for index, (n, dtype) in enumerate(BUCKETS):
            x = values(n, session.rank, step, dtype)
            futures.append(
                session.step_buffer.submit(x, (Segment(f"p{index}", n),), index, last=index == len(BUCKETS) - 1)
            )
        means.append([future.wait() for future in futures])
        memories.append(session.state_dict()["memories"][0])
    return {"means": means, "memories": memories, "rows": session.report().to_dict()["rows"]}


def all_tiny(specs: tuple[str, ...]) -> dict[tuple[str, str], list[list[Tensor]]]:
    """The means of every spec by every exchange."""
    names = ["one_shot", "two_shot"] + ["hierarchical(2)"] * (dist.get_world_size() == 4)
    return {(spec, exchange): tiny(spec, exchange) for spec in specs for exchange in names}


def tiny(spec: str, exchange: str) -> list[list[Tensor]]:
    """Lengths at which a plan would not compress, through the exchange itself: the means by length and step."""
    wire, codec, labels = Wire(dist.group.WORLD, CPU), parse(spec), Labels()
    means = []
    for n in TINY:
        kept = zeros(codec, exchange, n, wire.world_size)
        memory = Memory()
        if kept is not None:
            residual = kept.residuals[wire.rank]
            if kept.ranks_per_node:
                memory.slice_residual = residual
            else:
                memory.residual = residual
            memory.owner_residual = kept.seconds[wire.rank] if kept.seconds else None
        means.append([])
        for step in range(STEPS):
            x = values(n, wire.rank, step, torch.float32)
            for transfer in named(exchange).run(x, Encoder(codec, memory), wire, labels.next("a bucket")):
                if transfer is not None:
                    transfer.wait()
            means[-1].append(x)
    return means


def all_summed() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Every spec's means and sums."""
    return {spec: summed(spec) for spec in SUMMED}


def summed(spec: str) -> list[tuple[Tensor, Tensor]]:
    """Means by all_reduce and what the group's own sum of the rounded gradients gives, for each bucket and step."""
    codec, group = parse(spec), dist.group.WORLD
    session, pairs = replicas_session(spec, group, CPU, exchange="all_reduce"), []
    share = 1.0 / session.world_size
    for index, (n, dtype) in enumerate(BUCKETS):
        residual = torch.zeros(n)
        for step in range(STEPS):
            x = values(n, session.rank, step, dtype)
            if codec.lossy and codec.nbytes(n) < x.nbytes:
                assert codec.sum_dtype is not None
                total, part = x.float() + residual, codec.summed(n)
                payload = codec.drawn(step).define_encode(total)
                residual = total - codec.define_decode(payload, n)
                expected = payload[part].view(codec.sum_dtype)
            else:
                payload, expected = None, x.clone()
            expected *= share
            dist.all_reduce(expected)
            expected = expected if payload is None else codec.define_decode(payload, n)
            pairs.append(
                (session.step_buffer.submit(x, (Segment(f"p{index}", n),), index, last=True).wait(), expected.to(dtype))
            )
    return pairs


def all_alone(pairs: list[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """Every spec and exchange on one rank."""
    return [alone(spec, exchange) for spec, exchange in pairs]


def alone(spec: str, exchange: str | None) -> dict[str, Any]:
    """One rank: what comes back, whether it is the tensor that went in, threads and report."""
    before = threading.enumerate()
    session = replicas_session(spec, dist.group.WORLD, CPU, exchange=exchange)
    x = values(5000, 0, 0, torch.float32)
    result = session.step_buffer.submit(x, (Segment("p", 5000),), 0, last=True).wait()
    return {
        "result": result.clone(),
        "same memory": result.data_ptr() == x.data_ptr(),
        "threads": [t.name for t in threading.enumerate() if t not in before],
        "report": session.report().to_dict(),
    }


def in_a_subgroup(spec: str) -> list[Tensor] | None:
    """Ranks 0 and 2 of three exchange; rank 1 has nothing to do with it."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    session = replicas_session(spec, group, CPU)
    return [
        session.step_buffer.submit(
            values(5000, session.rank, step, torch.float32), (Segment("p", 5000),), 0, last=True
        ).wait()
        for step in range(STEPS)
    ]


def among_other_messages(spec: str) -> tuple[list[Tensor], list[Tensor]]:
    """Exchanges while the user's own collectives and messages are under way on the same group and tags."""
    session = replicas_session(spec, dist.group.WORLD, CPU)
    me, W = session.rank, session.world_size
    means, others = [], []
    for step in range(STEPS):
        future = session.step_buffer.submit(
            values(70_001, me, step, torch.float32), (Segment("p", 70_001),), 0, last=True
        )
        theirs, got = torch.full((1000,), float(me + step)), torch.empty(1000)
        sending = dist.isend(theirs, (me + 1) % W, tag=step)
        dist.recv(got, (me - 1) % W, tag=step)
        sending.wait()
        dist.all_reduce(got)
        others.append(got)
        means.append(future.wait())
    return means, others


# --- the battery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "exchange"),
    slowly(
        [*((ranks, exchange) for ranks in WORLD_SIZES for exchange in (None, "one_shot", "two_shot")), *NODES],
        quick=[(2, None), (3, "two_shot"), (4, "one_shot")],
    ),
)
def test_means_memories_and_bytes_are_those_of_the_algorithm(world_size: int, exchange: str | None) -> None:
    nodes = (world_size, exchange) in NODES
    pairs = [pair for pair in PAIRS if pair[1] == exchange and (world_size == 3 or nodes or pair[0] in FEW)]
    ranks = run(world_size, all_exchanged, pairs, timeout=200)
    for place, (spec, _) in enumerate(pairs):
        name = str(Plan.of(spec, exchange).choose(100_000, 4, world_size).exchange)
        for index in range(len(BUCKETS)):
            require_the_algorithm(spec, name, index, [rank[place] for rank in ranks])


def require_the_algorithm(spec: str, name: str, index: int, ranks: list[dict[str, Any]]) -> None:
    """The bits of all steps of one bucket on all ranks, and its row of their reports."""
    codec, world_size, (n, dtype) = parse(spec), len(ranks), BUCKETS[index]
    if codec.lossy and codec.nbytes(n) >= n * dtype.itemsize:
        return  # travels dense: test_plan, and test_all_reduce_is_the_groups_own_sum for the values
    kept = zeros(codec, name, n, world_size)
    for step in range(STEPS):
        inputs = [values(n, r, step, dtype) for r in range(world_size)]
        before = contribution(kept)
        expected = simulated(codec.drawn(step), name, inputs, kept)
        for rank, got in enumerate(ranks):
            where = f"{spec}, rank {rank}, {n} of {dtype} in step {step}"
            mean, memory = got["means"][step][index], got["memories"][step][index]
            assert mean.dtype == dtype
            assert torch.equal(bits(mean), bits(expected.to(dtype))), where
            if kept is None:
                assert memory["residual"] is None
                continue
            first = "slice_residual" if kept.ranks_per_node else "residual"
            assert torch.equal(bits(memory[first]), bits(kept.residuals[rank])), where
            assert memory[{"residual": "slice_residual", "slice_residual": "residual"}[first]] is None
            if kept.seconds:
                assert torch.equal(bits(memory["owner_residual"]), bits(kept.seconds[rank])), where
        if kept is not None:
            # error feedback loses nothing: what went in came out or is remembered
            offered = before + torch.stack(inputs).double().mean(dim=0)
            kept_or_given = expected.double() + contribution(kept)
            assert (offered - kept_or_given).abs().max() <= 1e-6 * torch.stack(inputs).double().abs().max()
    for rank, got in enumerate(ranks):
        row = got["rows"][index]
        sent, received = crossing(codec, name, n, world_size, rank, dtype.itemsize)
        assert (row["steps"], row["spec"], row["exchange"], row["values"]) == (STEPS, spec, named(name).name, n)
        assert (row["sent_bytes"], row["received_bytes"]) == (STEPS * sent, STEPS * received)
        assert row["inside_bytes"] == STEPS * inside(codec, name, n * dtype.itemsize, n, rank)
        assert row["dense_bytes"] == STEPS * (2 * (world_size - 1) * n * dtype.itemsize // world_size)


def contribution(kept: Simulated | None) -> Tensor:
    """What the memories will add to means to come: the mean of the first ones and the second ones in their places."""
    if kept is None:
        return torch.zeros(())
    if L := kept.ranks_per_node:
        return torch.cat([contribution(kept.of_slice(place)) for place in range(L)])
    total = torch.stack(kept.residuals).double().mean(dim=0)
    return total + torch.cat(kept.seconds).double() if kept.seconds else total


def crossing(codec: Codec, exchange: str, n: int, world_size: int, rank: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a rank sends and receives for one bucket."""
    if L := ranks_per_node(exchange):
        mine = chunks(n, L, codec.granularity)[rank % L]
        of_slice = between_nodes(codec, world_size // L), mine.stop - mine.start, world_size // L, rank // L
        sent, received = crossing(codec, *of_slice, itemsize)
        both = inside(codec, exchange, n * itemsize, n, rank)
        return both + sent, both + received
    if exchange == "one_shot":
        return (world_size - 1) * codec.nbytes(n), (world_size - 1) * codec.nbytes(n)
    sizes = [codec.nbytes(part.stop - part.start) for part in chunks(n, world_size, codec.granularity)]
    both = sum(sizes) - sizes[rank] + (world_size - 1) * sizes[rank]
    return both, both


def inside(codec: Codec, exchange: str, nbytes: int, n: int, rank: int) -> int:
    """Bytes of those that stay inside the node: the slices of the others, and L - 1 times the own one."""
    if not (L := ranks_per_node(exchange)):
        return 0
    mine = chunks(n, L, codec.granularity)[rank % L]
    own = (mine.stop - mine.start) * nbytes // n
    return nbytes - own + (L - 1) * own


@pytest.mark.parametrize("world_size", slowly(WORLD_SIZES, quick=(3,)))
def test_lengths_below_the_number_of_ranks(world_size: int) -> None:
    specs = {2: FEW, 3: TINY_SPECS, 4: ("int4", "topk(0.1)|int4")}[world_size]
    ranks = run(world_size, all_tiny, specs, timeout=200)
    for spec, exchange in ranks[0]:
        codec = parse(spec)
        for index, n in enumerate(TINY):
            kept = zeros(codec, exchange, n, world_size)
            for step in range(STEPS):
                inputs = [values(n, r, step, torch.float32) for r in range(world_size)]
                expected = simulated(codec, exchange, inputs, kept)
                for rank, means in enumerate(ranks):
                    got = means[spec, exchange][index][step]
                    where = f"{spec} {exchange}, rank {rank}, {n} values, step {step}"
                    assert torch.equal(bits(got), bits(expected)), where


@pytest.mark.parametrize("world_size", slowly(WORLD_SIZES, quick=(3,)))
def test_all_reduce_is_the_groups_own_sum(world_size: int) -> None:
    ranks = run(world_size, all_summed)
    for spec in SUMMED:
        for place, (first, _) in enumerate(ranks[0][spec]):
            for mean, expected in (rank[spec][place] for rank in ranks):
                assert torch.equal(bits(mean), bits(expected)), spec
                assert torch.equal(bits(mean), bits(first)), spec


def test_one_rank_gets_its_own_gradient_back() -> None:
    pairs = [*PAIRS, *((spec, None) for spec in SUMMED)]
    (results,) = run(1, all_alone, pairs)
    for (spec, exchange), got in zip(pairs, results, strict=True):
        assert torch.equal(bits(got["result"]), bits(values(5000, 0, 0, torch.float32))), f"{spec} {exchange}"
        assert got["same memory"]
        assert got["threads"] == []
        report = got["report"]
        assert (report["steps"], report["sent_bytes"], report["ratio"]) == (1, 0, 1.0)
        assert report["rows"][0]["reason"] == "one rank: nothing to send"


@pytest.mark.parametrize("spec", ["int4", "topk(0.01)"])
def test_a_subgroup_exchanges_among_its_own_ranks(spec: str) -> None:
    ranks = run(3, in_a_subgroup, spec)
    codec = parse(spec)
    exchange = Plan.of(spec).choose(100_000, 4, 2).exchange.name
    kept = zeros(codec, exchange, 5000, 2)
    for step in range(STEPS):
        inputs = [values(5000, r, step, torch.float32) for r in range(2)]
        expected = simulated(codec, exchange, inputs, kept)
        assert torch.equal(bits(ranks[0][step]), bits(expected))
        assert torch.equal(bits(ranks[2][step]), bits(expected))
    assert ranks[1] is None


@pytest.mark.parametrize("spec", ["none", "int4", "topk(0.01)"])
def test_messages_of_the_user_do_not_get_between(spec: str) -> None:
    ranks = run(3, among_other_messages, spec)
    codec = parse(spec)
    kept = zeros(codec, codec.exchange, 70_001, 3)
    for step in range(STEPS):
        inputs = [values(70_001, r, step, torch.float32) for r in range(3)]
        for means, others in ranks:
            assert torch.equal(others[step], torch.full((1000,), 3.0 + 3 * step))
            assert torch.equal(bits(means[step]), bits(ranks[0][0][step]))
        if spec == "none":
            torch.testing.assert_close(ranks[0][0][step], torch.stack(inputs).mean(dim=0))
        else:
            assert torch.equal(bits(ranks[0][0][step]), bits(simulated(codec, codec.exchange, inputs, kept)))


@pytest.mark.parametrize("granularity", [1, 256, 1024])
def test_chunks_cover_the_bucket_in_whole_blocks_of_equal_number(granularity: int) -> None:
    for n in (0, 1, 255, 256, 257, 1000, 5000, 70_001):
        for world_size in (1, 2, 3, 4, 7, 64):
            cuts = chunk_bounds(n, world_size, granularity)
            assert len(cuts) == world_size + 1
            assert cuts == sorted(cuts)
            assert (cuts[0], cuts[-1]) == (0, n)
            assert all(cut % granularity == 0 or cut == n for cut in cuts)
            blocks = [-(-(cuts[r + 1] - cuts[r]) // granularity) for r in range(world_size)]
            assert max(blocks) - min(blocks) <= 1
