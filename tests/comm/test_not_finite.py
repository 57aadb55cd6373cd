"""NaN and Inf of one rank are seen by all, at their place, whatever codes and carries them; no memory keeps them."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.distributed as dist
from battery import SPECS, gradient
from ranks import run
from tiers import slow
from torch import Tensor

from commpress.comm.codecs import parse
from commpress.comm.encoder import Encoder
from commpress.comm.exchange import EXCHANGES, Labels, Transfer, Wire
from commpress.comm.exchange.all_gather import all_gather
from commpress.comm.exchange.reduce_scatter import reduce_scatter
from commpress.comm.feedback import Memory
from commpress.comm.plan import fits
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment

CPU = torch.device("cpu")
BAD = (torch.nan, torch.inf, -torch.inf)
LENGTHS = ((300, torch.float32), (5000, torch.float32), (5000, torch.bfloat16), (1000, torch.float16))
FEW = ("bf16", "int4", "sign", "topk(0.1)|int4")
"""Specs of all exchanges; the others take their own: what it does with a payload does not depend on the codec."""
STEPS = 4
"""What is not finite: in the first step one value of one rank, then one of each, a tenth of one rank's, all of one rank's."""


@cache
def hit(n: int, rank: int, step: int, world_size: int) -> Tensor:
    """Where a rank's gradient is not finite: bool [n]. For reading only."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    bad = torch.zeros(n, dtype=torch.bool)
    unlucky = rank == step % world_size
    if step == 1 or (step == 0 and unlucky):
        bad[int(torch.randint(n, (1,), generator=draw))] = True
    elif step == 2 and unlucky:
        bad = torch.rand(n, generator=draw) < 0.1
    elif step == 3 and unlucky:
        bad = ~bad
    return bad


def values(n: int, rank: int, step: int, dtype: torch.dtype, world_size: int) -> Tensor:
    """A rank's gradient."""
    return made(n, rank, step, dtype, world_size).clone()


@cache
def made(n: int, rank: int, step: int, dtype: torch.dtype, world_size: int) -> Tensor:
    """The same, once for all specs. For reading only."""
    x = gradient(n, 1000 * step + rank).clamp(-1e3, 1e3).to(dtype)
    x[hit(n, rank, step, world_size)] = BAD[(step + rank) % 3]
    return x


def means_of(spec: str, exchange: str) -> tuple[list[Tensor], list[str]]:
    """The means of all steps and lengths, and which memories are not finite after the last."""
    session = replicas_session(spec, dist.group.WORLD, CPU, exchange=exchange)
    W = session.world_size
    means, spoilt = [], []
    for step in range(STEPS):
        gradients = [values(n, session.rank, step, dtype, W) for n, dtype in LENGTHS]
        futures = [
            session.step_buffer.submit(x, (Segment(f"p{i}", x.numel()),), i, last=i == len(LENGTHS) - 1)
            for i, x in enumerate(gradients)
        ]
        for future in futures:
            future.wait()
        means += gradients
    for bucket in session.state_dict()["memories"][0]:
        for kind in ("residual", "owner_residual", "momentum"):
            if bucket[kind] is not None and not bucket[kind].isfinite().all():
                spoilt.append(f"{kind} of {bucket['segments']}")
    return means, spoilt


def all_means(specs: tuple[str, ...]) -> dict[str, tuple[list[Tensor], list[str]]]:
    return {
        f"{spec} {exchange}": means_of(spec, exchange)
        for spec in specs
        for exchange in EXCHANGES
        if exchange == parse(spec).exchange or (spec in FEW and fits(EXCHANGES[exchange], parse(spec)))
    }


@pytest.mark.parametrize(("world_size", "specs"), [(2, FEW), slow(3, SPECS)])
def test_what_is_not_finite_on_one_rank_is_not_finite_in_the_mean_of_all(
    world_size: int, specs: tuple[str, ...]
) -> None:
    results = run(world_size, all_means, specs, timeout=200)
    for name, (means, spoilt) in results[0].items():
        assert spoilt == [], name
        for rank, other in enumerate(results):
            assert other[name][1] == [], f"{name}, rank {rank}"
            for mine, theirs in zip(means, other[name][0], strict=True):
                assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), f"{name}, rank {rank}"
        places = iter(means)
        for step in range(STEPS):
            for n, dtype in LENGTHS:
                bad = torch.stack([hit(n, r, step, world_size) for r in range(world_size)]).any(dim=0)
                assert not next(places)[bad].isfinite().any(), f"{name}, {n} {dtype}, step {step}"


def done(exchange: Iterator[Transfer]) -> None:
    """Carry an exchange out."""
    for transfer in exchange:
        transfer.wait()


def sharded(specs: tuple[str, ...]) -> dict[str, tuple[list[Tensor], list[Tensor], bool]]:
    """By spec: this rank's chunk of each step's mean, what all shards became, and whether the memory is finite."""
    wire, labels = Wire(dist.group.WORLD, CPU), Labels()
    me, W, m = wire.rank, wire.world_size, 1000
    found = {}
    for spec in specs:
        codec = parse(spec)
        size, cuts = codec.nbytes(m), [r * m for r in range(W + 1)]
        memory = Memory(torch.zeros(W * m) if codec.lossy else None)
        chunks, wholes = [], []
        for step in range(STEPS):
            full = values(W * m, me, step, torch.float32, W)
            out, whole = torch.empty(m), torch.empty(W * m)
            buffer = torch.empty(2 * W * size, dtype=torch.uint8)
            done(
                reduce_scatter(
                    full.clone(),
                    cuts,
                    out,
                    dist.ReduceOp.AVG,
                    Encoder(codec, memory),
                    buffer,
                    wire,
                    labels.next("a chunk"),
                )
            )
            done(all_gather(full[:m].clone(), whole, Encoder(codec), buffer[: W * size], wire, labels.next("a shard")))
            chunks.append(out)
            wholes.append(whole)
        found[spec] = (chunks, wholes, memory.residual is None or bool(memory.residual.isfinite().all()))
    return found


@pytest.mark.parametrize(("world_size", "specs"), [(2, FEW), slow(3, SPECS)])
def test_shards_do_not_lose_what_is_not_finite_either(world_size: int, specs: tuple[str, ...]) -> None:
    results, m = run(world_size, sharded, specs), 1000
    for spec in specs:
        for step in range(STEPS):
            bads = [hit(world_size * m, r, step, world_size) for r in range(world_size)]
            mean_is_bad = torch.stack(bads).any(dim=0).split(m)
            shard_is_bad = torch.cat([bad[:m] for bad in bads])
            for rank, result in enumerate(results):
                chunks, wholes, finite = result[spec]
                assert finite, f"{spec}, rank {rank}"
                assert not chunks[step][mean_is_bad[rank]].isfinite().any(), f"{spec}, rank {rank}, step {step}"
                assert not wholes[step][shard_is_bad].isfinite().any(), f"{spec}, rank {rank}, step {step}"
