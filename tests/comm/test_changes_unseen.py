"""Gathered changes of which the host sees no value, as on an accelerator: what the ranks' version becomes all the same."""

from typing import Any

import pytest
import torch
from battery import gradient
from ranks import run
from test_by_collectives import carried_out, same, wires
from torch import Tensor
from unseen import SeenError, values_are_unseen

from commpress.comm.codecs import parse
from commpress.comm.encoder import Encoder
from commpress.comm.exchange import Labels, Wire
from commpress.comm.exchange.all_gather_changes import all_gather_changes
from commpress.comm.exchange.all_gather_changes_unseen import FLAG, all_gather_changes_bytes, known_mark
from commpress.comm.fingerprint import fingerprint_on_device
from commpress.comm.masks_index import MaskIndex
from commpress.comm.segments import Segment
from commpress.comm.versions import Version, Versions

M = 1000
CPU = torch.device("cpu")


class Gathers:
    """Gathers of this rank's shards of M values, one after another."""

    def __init__(self, spec: str, wire: Wire) -> None:
        self.codec, self.wire, self.labels, self.version = parse(spec), wire, Labels(), Version()
        self.buffer = torch.empty(all_gather_changes_bytes(M, self.codec, wire.world_size), dtype=torch.uint8)
        self.sent: list[int] = []

    def __call__(self, shard: Tensor) -> Tensor:
        """What all ranks have of the shards, [W, M]."""
        out = torch.empty(self.wire.world_size * M, dtype=shard.dtype)
        more = (self.buffer, self.wire, self.labels.next("who has changed"), self.labels.next("what has changed"))
        sent, *_ = carried_out(self.wire, all_gather_changes(shard, out, self.version, Encoder(self.codec), *more))
        self.sent.append(sent)
        return out.view(self.wire.world_size, M)


def shard_of(rank: int, step: int) -> Tensor:
    return gradient(M, rank) + 0.01 * step * gradient(M, 7 + rank)


def unseen(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Gathers of shards that change little, of which one rank's does not change, and of none that does."""
    _, wire = wires()
    gathers, me = Gathers("int4", wire), wire.rank
    with values_are_unseen():
        known = [gathers(shard_of(me, step if me else min(step, 1)).to(dtype)) for step in (0, 1, 2, 2, 3)]
    return {"known": known, "sent": gathers.sent}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nobody_waits_and_all_ranks_have_one_version(dtype: torch.dtype) -> None:
    ranks = run(3, unseen, dtype)
    nbytes = 2 * (parse("int4").nbytes(M) + FLAG)
    for got in ranks:
        for step, known in enumerate(got["known"]):
            assert same(known, ranks[0]["known"][step])
            for rank, part in enumerate(known):
                shard = shard_of(rank, (0, 1, 2, 2, 3)[step] if rank else min(step, 1))
                assert float((part - shard).norm() / shard.norm()) < 0.01
        assert got["sent"] == [2 * 2 * M + nbytes, nbytes, nbytes, nbytes, nbytes]
        assert same(got["known"][3], got["known"][2])  # what has not changed stays to the bit
        assert same(got["known"][4][0], got["known"][1][0])


def seen() -> str:
    """What becomes of the exchange by messages, which asks."""
    wire, _ = wires()
    with values_are_unseen():
        try:
            Gathers("int4", wire)(shard_of(wire.rank, 0))
        except SeenError as error:
            return str(error)
    return ""


def test_the_exchange_on_cpu_asks() -> None:
    assert all("the host would wait" in said for said in run(2, seen))


def jumped(spec: str) -> list[Tensor]:
    """What all ranks have once rank 1 has loaded other weights, and in the gathers after it."""
    _, wire = wires()
    gathers, me = Gathers(spec, wire), wire.rank
    gathers(shard_of(me, 0))
    return [gathers(shard_of(5 if me else 0, 0)) for _ in range(12)]


@pytest.mark.parametrize("spec", ["int4", "int8", "int2", "sign"])
def test_other_weights_are_no_farther_than_their_own_code_and_come_closer(spec: str) -> None:
    codec = parse(spec)
    shards = [shard_of(0, 0), shard_of(5, 0)]
    coded = float((codec.decode(codec.encode(shards[1]), M) - shards[1]).norm())
    for got in run(2, jumped, spec):
        far = [float((known[1] - shards[1]).norm()) for known in got]
        assert far[0] <= 1.01 * coded + 2**-8 * float(shards[1].norm())
        assert far[1] < max(0.95 * far[0], 2**-8 * float(shards[1].norm()))
        assert all(same(known, got[1]) for known in got[2:])  # an evaluation does not change them any more
        assert all(float((known[0] - shards[0]).norm() / shards[0].norm()) < 0.01 for known in got)


def spoilt() -> list[Tensor]:
    """What all ranks have where a value of rank 1 is not finite, and when it is again."""
    _, wire = wires()
    gathers, me = Gathers("int4", wire), wire.rank
    shard = shard_of(me, 0)
    found = [gathers(shard)]
    for value in (torch.nan, torch.inf, 0.5, 0.5):
        if me == 1:
            shard[300] = value
        found.append(gathers(shard))
    return found


def test_what_is_not_finite_is_there_on_all_ranks_and_goes_again() -> None:
    for first, nan, inf, mended, after in run(2, spoilt):
        for bad in (nan, inf):
            assert not bad[1, 300].isfinite()
            assert bad[1, 512:].isfinite().all()  # but those of its block
            assert same(bad[0], first[0])
        expected = shard_of(1, 0)
        expected[300] = 0.5
        assert float((mended[1] - expected).norm() / expected.norm()) < 0.2
        assert float((after[1] - expected).norm() / expected.norm()) < 0.02


def restored(jumps: bool) -> list[Tensor]:
    """What is gathered after three gathers, without and with a restart in between that saves and loads.

    With `jumps` the last of the three sends other weights as a whole, of which the next one sends the rest.
    """
    found, segments = [], (Segment("of rank 0", M), Segment("of rank 1", M))
    for restarts in (False, True):
        _, wire = wires()
        gathers, versions = Gathers("int4", wire), Versions(wire.rank, 2)
        gathers.version = versions.of(segments)
        for step in range(3):
            gathers(shard_of(wire.rank, step) if step < 2 or not jumps else shard_of(wire.rank + 3, step))
        if restarts:
            saved, versions = versions.state_dict(), Versions(wire.rank, 2)
            assert isinstance(saved[0]["mark"], int)
            versions.load_state_dict(saved, MaskIndex(), CPU)
            gathers.version = versions.of(segments)
            assert gathers.version.own is not None
        found += [gathers(shard_of(wire.rank + 3 * jumps, step)) for step in (2, 3)]
    return found


@pytest.mark.parametrize("jumps", [False, True])
def test_a_saved_version_goes_on_to_the_bit(jumps: bool) -> None:
    for *unbroken, again, later in run(2, restored, jumps):
        assert same(unbroken[0], again)
        assert same(unbroken[1], later)


def test_a_version_of_other_ranks_is_forgotten_whatever_the_names_are() -> None:
    segments = tuple(Segment(name, 4) for name in ("a", "a[7]", "b[x]"))
    versions = Versions(1, 3)
    versions.of(segments).values = torch.arange(12.0).bfloat16()
    (saved,) = versions.state_dict()
    assert torch.equal(saved["own"], torch.arange(4.0, 8.0).bfloat16())
    for world_size, kept in ((3, True), (2, False), (4, False)):
        other = Versions(0, world_size)
        other.load_state_dict([saved], MaskIndex(), CPU)
        assert (other.of(segments).own is not None) == kept


def test_a_hash_that_was_saved_is_read_as_64_bits_with_or_without_a_sign() -> None:
    for mark in (0, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)):
        assert int(known_mark(Version(mark=mark), CPU)) % 2**64 == mark % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_each_value_that_differs_shows_in_the_hash(dtype: torch.dtype) -> None:
    x = (10 * gradient(777)).to(dtype)
    before, found = int(fingerprint_on_device(x)), set()
    for place in range(len(x)):
        changed = x.clone()
        changed.view(torch.uint8)[place * x.element_size()] ^= 1
        found.add(int(fingerprint_on_device(changed)))
    assert before not in found
    assert len(found) == len(x)
    assert int(fingerprint_on_device(x.flip(0))) != before
