"""What runs on an accelerator, with CPU tensors over Gloo: a collective carries each transfer, and the bits are the same."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from battery import gradient
from ranks import outcome, run
from tiers import slow
from torch import Tensor
from unseen import values_are_unseen

from commpress.comm.codecs import parse
from commpress.comm.collectives import Collectives
from commpress.comm.encoder import Encoder
from commpress.comm.error import ErrorWatch
from commpress.comm.exchange import Labels, Transfer, Wire, all_reduce_found_inf, named
from commpress.comm.exchange.all_gather import all_gather
from commpress.comm.exchange.all_gather_changes import all_gather_changes
from commpress.comm.exchange.all_gather_changes_unseen import all_gather_changes_bytes
from commpress.comm.exchange.all_to_all import all_to_all, all_to_all_bytes
from commpress.comm.exchange.broadcast import broadcast
from commpress.comm.exchange.reduce_scatter import reduce_scatter, reduce_scatter_bytes
from commpress.comm.feedback import Memory
from commpress.comm.node import Node
from commpress.comm.plan import Plan
from commpress.comm.segments import Segment
from commpress.comm.verify import Comparison
from commpress.comm.versions import Version

CPU = torch.device("cpu")
SPECS = ("int4", "sign", "topk(0.1)", "topk(0.1)|int4", "bf16", "randomk(0.1)", "none")
LENGTHS = (
    (70_001, torch.float32),
    (8192, torch.float32),
    (5000, torch.bfloat16),
    (300, torch.float16),
    (5, torch.float32),
)
"""Among them chunks of one length, and chunks of none."""
UNSEEN = ("int4", "sign", "bf16", "none")
"""Those whose definitions in plain torch look at no value; the others' kernels for CUDA are tested for that."""
STEPS = 2
Said = list[tuple[Tensor, int, int]]


def wires() -> list[Wire]:
    """One that sends messages, one that runs collectives."""
    found = [Wire(dist.group.WORLD, CPU) for _ in range(2)]
    found[1].by_message = False
    return found


def carried_out(wire: Wire, exchange: Iterator[Transfer], sees: bool = True) -> tuple[int, int, int]:
    """Carry an exchange out: the bytes that it sent and received, and those that stayed in the node.

    Unless it `sees`, a collective must ask for no value of a tensor: on an accelerator the host would wait.
    """
    sent = received = inside = 0

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a message between two ranks")

    with contextlib.ExitStack() as patched:
        for name in () if wire.by_message else ("isend", "irecv", "send", "recv", "batch_isend_irecv"):
            patched.enter_context(mock.patch.object(dist, name, refused))
        if not (sees or wire.by_message):
            patched.enter_context(values_are_unseen())
        for transfer in exchange:
            transfer.wait()
            sent, received = sent + transfer.sent, received + transfer.received
            inside += transfer.sent * transfer.inside
    return sent, received, inside


def means(wire: Wire, exchange: str, spec: str, n: int, dtype: torch.dtype) -> list[Any]:
    """The means of some steps, what is remembered behind them, and bytes."""
    chosen, codec, labels, W = named(exchange), parse(spec), Labels(), wire.world_size
    memory, found = Memory(), []
    if codec.lossy:
        part, chunk = (of(n, codec, wire.rank, W) for of in (chosen.node_slice, chosen.chunk))
        memory.residual = torch.zeros(n) if part is None else None
        memory.slice_residual = None if part is None else torch.zeros(part.stop - part.start)
        memory.owner_residual = None if chunk is None else torch.zeros(chunk[1] - chunk[0])
    for step in range(STEPS):
        x = gradient(n, 10 * wire.rank + step).to(dtype)
        run = chosen.run(x, Encoder(codec.drawn(step), memory), wire, labels.next("a bucket"))
        found += [carried_out(wire, run, spec not in UNSEEN), x]
    return [*found, *memory.tensors().values()]


def both_ways(exchanges: list[str]) -> dict[str, list[list[Any]]]:
    """By case, the results of messages and of collectives."""
    found, both = {}, wires()
    for exchange in exchanges:
        for spec in SPECS:
            if not named(exchange).linear or parse(spec).linear:
                for n, dtype in LENGTHS:
                    case = f"{exchange} of {spec}, {n} {dtype}"
                    found[case] = [means(wire, exchange, spec, n, dtype) for wire in both]
    return found


@pytest.mark.parametrize(("world_size", "exchanges"), [
    slow(3, ["two_shot"]), slow(3, ["one_shot", "all_reduce"]), (4, ["hierarchical(2)"]),
])  # fmt: skip
def test_collectives_give_the_bits_of_messages(world_size: int, exchanges: list[str]) -> None:
    for got in run(world_size, both_ways, exchanges, timeout=120):
        for case, (by_message, by_collective) in got.items():
            assert len(by_message) == len(by_collective)
            for x, y in zip(by_message, by_collective, strict=True):
                assert x == y if isinstance(x, tuple) else same(x, y), case


def same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def shards(spec: str) -> list[list[Tensor]]:
    """By both ways: this rank's chunk of a mean, chunks of other lengths, what all shards become, samples of an error."""
    found, codec = [], parse(spec)
    for wire in wires():
        me, W, labels, results = wire.rank, wire.world_size, Labels(), []
        for cuts in ([0, 1000, 2000, 3000], [0, 0, 1500, 3000]):
            full, out = gradient(cuts[-1], me), torch.empty(cuts[me + 1] - cuts[me])
            buffer = torch.empty(reduce_scatter_bytes(cuts, codec, me), dtype=torch.uint8)
            encoder = Encoder(codec, Memory(torch.zeros(cuts[-1])))
            more = (wire, labels.next("a chunk"))
            sent = reduce_scatter(full, cuts, out, dist.ReduceOp.AVG, encoder, buffer, *more)
            carried_out(wire, sent, spec not in UNSEEN)
            results += [out, encoder.memory.residual]
        whole, buffer = torch.empty(W * 1000), torch.empty(W * codec.nbytes(1000), dtype=torch.uint8)
        more = (wire, labels.next("a shard"))
        carried_out(wire, all_gather(gradient(1000, me), whole, Encoder(codec), buffer, *more), spec not in UNSEEN)
        version, buffer = Version(), torch.empty(all_gather_changes_bytes(1000, codec, W), dtype=torch.uint8)
        for step in (
            0,
            1,
            1,
            2,
        ):  # as a whole, what has changed, nothing, what has changed: the bytes sent are not alike
            shard, known = gradient(1000, me) + 0.01 * step * gradient(1000, 7), torch.empty(W * 1000)
            more = (wire, labels.next("who has changed"), labels.next("what has changed"))
            carried_out(wire, all_gather_changes(shard, known, version, Encoder(codec), buffer, *more))
            results.append(known)
        watch = ErrorWatch(codec)
        carried_out(wire, watch.watch(iter(()), gradient(3000, me), codec, Memory(), wire, labels.next("a sample")))
        found.append([*results, whole, torch.tensor([watch.error()])])
    return found


@pytest.mark.parametrize("spec", ["int4", "topk(0.1)"])
def test_collectives_of_sharded_models_give_the_bits_of_messages(spec: str) -> None:
    for by_message, by_collective in run(3, shards, spec):
        for x, y in zip(by_message, by_collective, strict=True):
            assert same(x, y)


def swapped(spec: str) -> list[list[Tensor]]:
    """By both ways: parts of other lengths for each rank, none for some, what came of the others', and what its own became."""
    found, codec = [], parse(spec)
    lengths = [[300, 0, 1000], [20, 700, 0], [0, 0, 4]]
    for wire in wires():
        me, labels = wire.rank, Labels()
        sizes, arriving = lengths[me], [of[me] for of in lengths]
        x, out = gradient(sum(sizes), me), torch.full((sum(arriving),), torch.nan)
        buffer = torch.empty(all_to_all_bytes(sizes, arriving, codec, me), dtype=torch.uint8)
        more = (Encoder(codec), buffer, wire, labels.next("parts"))
        sent, received, _ = carried_out(wire, all_to_all(x, sizes, out, arriving, *more), sees=False)
        assert sent == sum(codec.nbytes(n) for r, n in enumerate(sizes) if n and r != me)
        assert received == sum(codec.nbytes(n) for r, n in enumerate(arriving) if n and r != me)
        found.append([x, out, gradient(sum(sizes), me)])
    return found


@pytest.mark.parametrize("spec", ["int4", "none"])
def test_parts_arrive_as_their_senders_know_them(spec: str) -> None:
    ranks = run(3, swapped, spec)
    codec, lengths = parse(spec), [[300, 0, 1000], [20, 700, 0], [0, 0, 4]]
    for got in ranks:
        for x, y in zip(*got, strict=True):
            assert same(x, y)
    for source, ((x, _, before), _) in enumerate(ranks):
        parts = zip(x.split(lengths[source]), before.split(lengths[source]), strict=True)
        for target, (known, exact) in enumerate(parts):
            arrived = ranks[target][0][1].split([of[target] for of in lengths])[source]
            assert same(arrived, known)
            coded = codec.decode(codec.encode(exact), exact.numel()) if len(exact) and source != target else exact
            assert same(known, coded)


def broadcasts() -> list[list[Tensor]]:
    """By both ways: what all ranks hold after two broadcasts of changes, and the version that was sent."""
    found, codec, sizes = [], parse("int8"), [300, 500, 7]
    for wire in wires():
        base, labels = torch.zeros(sum(sizes)), Labels()
        for step in (1, 2):
            x = gradient(sum(sizes), 10 * wire.rank + step)
            x[300:800].abs_().mul_(1e-3)  # as a variance: the version gets nothing below 0 either
            x[3] = -torch.inf
            payload = torch.zeros(codec.nbytes(sum(sizes)) + len(sizes), dtype=torch.uint8)
            more = (payload, wire, 1, labels.next("changes"))
            carried_out(wire, broadcast(x, sizes, base, Encoder(codec), *more), sees=False)
        found.append([x, base])
    return found


def test_changes_are_broadcast_without_a_wait_and_what_is_never_negative_stays_so() -> None:
    ranks = run(2, broadcasts)
    for by_message, by_collective in ranks:
        for x, y in zip(by_message, by_collective, strict=True):
            assert same(x, y)
    (received, base), (_, known) = (by_collective for _, by_collective in ranks)
    assert same(base, known)
    assert same(received, base)
    assert (base[300:800] >= 0).all()
    assert (base[:300] < 0).any()


def compared(bad_rank: int | None) -> str:
    """What hashes say that a collective carries."""
    _, wire = wires()
    comparison, labels, x = Comparison(4, ()), Labels(), torch.ones(1000)
    if wire.rank == bad_rank:
        x[7] = 2
    exchange = comparison.finish(comparison.watch(iter(()), x, "the mean"), wire, labels.next("hashes"))
    return outcome(lambda: carried_out(wire, exchange))


def test_hashes_are_compared_by_collectives() -> None:
    assert run(3, compared, None) == [""] * 3
    for said in run(3, compared, 2):
        assert "rank 2 (" in said
        assert "has other values of the mean" in said


def closed() -> tuple[list[str], float]:
    """What the parts of a closed wire say, and a sum on the user's group afterwards."""
    _, wire = wires()
    parts = [wire.part([wire.rank // 2 * 2, wire.rank // 2 * 2 + 1]), wire.part([wire.rank % 2, wire.rank % 2 + 2])]
    rows = list(torch.zeros(4, 4, dtype=torch.uint8))
    for part in parts:
        part.all_gather(rows[:2], Labels().next("a row"), last=True).wait()
    dist.barrier()
    wire.close()

    def gather(part: Wire) -> None:
        part.all_gather(rows[: part.world_size], Labels().next("a row"), last=True)

    said = [outcome(partial(gather, part)) for part in (wire, *parts)]
    total = torch.ones(())
    dist.all_reduce(total)
    return said, total.item()


def test_the_groups_of_a_node_close_with_the_whole() -> None:
    for said, total in run(4, closed):
        assert said == ["RuntimeError: the connections are closed"] * 3
        assert total == 4


def local_steps(bad: float, dtype: torch.dtype) -> list[Tensor]:
    """A bucket that stays on each rank, of which rank 1's has one value that is not finite, and one in which none has."""
    found, (_, wire), labels = [], wires(), Labels()
    for value in (bad, 1.0):
        x = gradient(300, wire.rank).to(dtype)
        if wire.rank == 1:
            x[7] = value
        with values_are_unseen():
            carried_out(wire, all_reduce_found_inf(x, wire, labels.next("found inf")))
        found.append(x)
    return found


@pytest.mark.parametrize(("bad", "dtype"), [(torch.inf, torch.float32), (torch.nan, torch.bfloat16)])
def test_without_an_exchange_all_skip_what_one_must_and_nobody_waits_for_a_value(
    bad: float, dtype: torch.dtype
) -> None:
    for rank, (spoilt, kept) in enumerate(run(2, local_steps, bad, dtype)):
        assert spoilt.isnan().all()
        expected = gradient(300, rank).to(dtype)
        assert torch.equal(kept[8:], expected[8:])
        assert kept.isfinite().all()


class SideStream:
    """What stands for a stream of an accelerator: it is entered, waits for others, and has no order of its own."""

    def __enter__(self) -> None:
        """Work from here on is the stream's."""

    def __exit__(self, *_: object) -> None:
        """Work from here on is the caller's."""

    def wait_stream(self, _: object) -> None:
        """All has been done already."""


def held_for_the_stream(spec: str, parameters: str, sends: str) -> tuple[set[str], set[str]]:
    """Which tensors of the caller a collective on a side stream uses, and which of them that stream has recorded.

    The memory of a tensor that it has not recorded is allocated anew once the caller drops it.
    """
    of_parameters = Plan.of(parameters.removeprefix("delta|"), None)
    of_parameters = replace(of_parameters, delta=parameters.startswith("delta|"))
    collectives = Collectives(dist.group.WORLD, CPU, Plan.of(spec), of_parameters, verify=0)
    collectives.traffic.wire.by_message = False
    collectives.traffic._sequencer._stream = SideStream()  # type: ignore[assignment]
    me, W, n = collectives.rank, collectives.world_size, 512
    whole = (Segment("w", W * n),) if sends != "reduce_scatter" else tuple(Segment(str(r), n) for r in range(W))
    full, part, base = gradient(W * n, me), gradient(n, me), torch.zeros(n)
    rows = [torch.zeros(n) for _ in range(W)]
    calls = {
        "all_reduce": (lambda: collectives.all_reduce(full, whole, 0), [full]),
        "reduce_scatter": (lambda: collectives.reduce_scatter(full, part, whole, 0), [full, part]),
        "all_gather": (lambda: collectives.all_gather(part, full, 0, "", whole), [part, full]),
        "all_to_all": (
            lambda: collectives.all_to_all(full, [n] * W, base.repeat(W), [n] * W, whole, 0, parse(spec)),
            [full],
        ),
        "broadcast": (lambda: collectives.broadcast(part, 0, 0, "w", base=base, sizes=[n]), [part, base]),
        "rows of a node": (lambda: Node(collectives).all_gather(rows, "rows"), rows),
    }
    recorded: set[int] = set()

    def note(x: Tensor, _: object) -> None:
        recorded.add(x.untyped_storage().data_ptr())

    start, used = calls[sends]
    with (
        mock.patch.object(torch.accelerator, "current_stream", return_value=None),
        mock.patch.object(Tensor, "record_stream", note),
    ):
        start().wait()
    places = {str(i): x.untyped_storage().data_ptr() for i, x in enumerate(used)}
    return set(places), {name for name, place in places.items() if place in recorded}


KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "rows of a node")


def all_held() -> dict[str, tuple[set[str], set[str]]]:
    """By collective and specs, what the side stream uses, and what it has recorded."""
    specs = (("int4", "int4"), ("none", "none"), ("int4", "delta|int4"))
    return {
        f"{sends} of {spec}, {parameters}": held_for_the_stream(spec, parameters, sends)
        for spec, parameters in specs
        for sends in KINDS
        if not (sends == "broadcast" and spec == "none")
    }


def test_a_side_stream_records_all_that_it_uses_of_the_callers() -> None:
    for found in run(2, all_held):
        assert {case: used - recorded for case, (used, recorded) in found.items() if used - recorded} == {}
