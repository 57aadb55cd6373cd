"""Small trainings and every exchange on the ranks of one process group, on CPU or GPU. A part of `gpu_check`.

What a model learns and starts from is made on the CPU, so runs on two devices differ by rounding alone.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bandwidth
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.comm import coding
from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange import EXCHANGES, Exchange, Hierarchical, Wire
from commpress.comm.exchange.label import Labels
from commpress.comm.meter import Meter, Row
from commpress.comm.plan import Plan, fits
from commpress.comm.replicas import replicas_session
from commpress.comm.sequencer import Job as SequencerJob
from commpress.comm.sequencer import Sequencer
from commpress.comm.work import Work, not_counted
from commpress.launch.model import GPT, Shape
from commpress.optim import OneBitAdamW

SHAPE, BATCH = Shape(layers=2, width=64, heads=4, context=32), 8
STEPS, WARM_UP, RATE, SGD_RATE = 20, 8, 2e-3, 0.05
SPECS = ("bf16", "fp8", "int8", "int4", "int2", "sign", "topk(0.01)", "topk(0.01)|int4", "randomk(0.1)", "rotate|int4")
SIZES = (256 * 1024, 4 * 1024 * 1024)
"""Bytes of the gradients that are exchanged."""

Trained = tuple[nn.Module, torch.optim.Optimizer, Any]


class ItemError(RuntimeError):
    """What was tried gave something else than expected; the ranks are still in step."""


def text() -> Tensor:
    """Return the bytes that the models learn: this file's."""
    return torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()


def draw(source: torch.Generator, data: Tensor) -> tuple[Tensor, Tensor]:
    """Draw windows of bytes, int64 [BATCH, context], and the byte behind each of them."""
    starts = torch.randint(len(data) - SHAPE.context, (BATCH, 1), generator=source)
    windows = data[starts + torch.arange(SHAPE.context + 1)]
    return windows[:, :-1], windows[:, 1:]


def model_on(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the model as it starts, the same on every device."""
    torch.manual_seed(0)
    return GPT(SHAPE).to(device, dtype)


def ddp(device: torch.device, spec: str, dtype: torch.dtype = torch.float32, sgd: bool = False) -> Trained:
    """DistributedDataParallel and AdamW or SGD, its gradients compressed."""
    model = DistributedDataParallel(model_on(device, dtype))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), lr=SGD_RATE, momentum=0.9)
    return model, optimizer, commpress.attach(model, spec)


def fsdp2(device: torch.device, gradients: str = "int4", parameters: str = "int8") -> Trained:
    """FSDP2 and AdamW, gradients and parameters compressed."""
    model = model_on(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))  # by default it is that of the accelerator
    for block in [m for m in model.modules() if isinstance(m, nn.ModuleList) for m in m]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    return model, optimizer, commpress.attach(model, gradients=gradients, parameters=parameters)


def one_bit(device: torch.device) -> Trained:
    """DistributedDataParallel and OneBitAdamW, which sends signs after its warm-up."""
    model = DistributedDataParallel(model_on(device))
    optimizer = OneBitAdamW(model.parameters(), lr=RATE, warmup_steps=WARM_UP)
    return model, optimizer, commpress.attach(model, "sign", optimizer=optimizer)


RUNS: dict[str, Callable[[torch.device], Trained]] = {
    "DDP, int4": lambda device: ddp(device, "int4"),
    "DDP, bfloat16, int8": lambda device: ddp(device, "int8", torch.bfloat16),
    "DDP, SGD, topk(0.1)|int4": lambda device: ddp(device, "topk(0.1)|int4", sgd=True),
    "DDP, powersgd(2)": lambda device: ddp(device, "powersgd(2)"),
    "FSDP2, int4, parameters int8": fsdp2,
    "FSDP2, none, parameters delta|int4": lambda device: fsdp2(device, "none", "delta|int4"),
    "OneBitAdamW, sign": one_bit,
}
EXCHANGED, COLLECTIVES = "every exchange", "torch's collectives"
ALONE = "a rank alone, by the side stream"
NOTHING_SENT = "one rank: nothing is compressed"
"""What is said of a training on one rank."""


def trained(name: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Train one of RUNS. Returns the ranks' mean loss by step and the bytes that this rank sent. Collective.

    Raises ItemError on all ranks if replicas hold different bits at the end.
    """
    model, optimizer, session = RUNS[name](device)
    source, data = torch.Generator().manual_seed(dist.get_rank()), text()
    losses = []
    for _ in range(steps):
        x, y = (part.to(device) for part in draw(source, data))
        loss = cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    mean = torch.stack(losses).double()
    dist.all_reduce(mean)
    if isinstance(model, DistributedDataParallel):
        require_same_bits([p.detach() for p in model.parameters()])
    found = {"losses": (mean / dist.get_world_size()).tolist(), "sent_bytes": session.report().sent_bytes}
    return found | ({"text": NOTHING_SENT} if dist.get_world_size() == 1 else {})


def require_same_bits(tensors: list[Tensor]) -> None:
    """Raise ItemError on all ranks unless all hold the same bits. Collective."""
    bits = torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors]).long()
    own = (bits * (torch.arange(bits.numel(), device=bits.device) % 65_521 + 1)).sum()
    ends = torch.stack([own, -own])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    most, least = ends.tolist()
    if most != -least:
        raise ItemError("the ranks hold different parameters at the end")


def exchanged(device: torch.device, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Exchange gradients of each size by every spec and exchange, as `bandwidth` checks them. Collective.

    Raises bandwidth.GarbageError on all ranks if a mean is wrong.
    """
    generator, count, rank = torch.Generator().manual_seed(dist.get_rank()), 0, dist.get_rank()
    for spec in SPECS:
        codec = commpress.parse(spec)
        for name in bandwidth.exchanges(codec):
            session = replicas_session(codec, dist.group.WORLD, device, exchange=name, verify=0)
            for index, size in enumerate(sizes):
                if Plan.of(codec, name).choose(size // 4, 4, dist.get_world_size()).reason:
                    continue
                case = bandwidth.Case(size, spec, name, session)
                try:
                    bandwidth.check(case, torch.randn(size // 4, generator=generator).to(device), index)
                except bandwidth.GarbageError:
                    raise
                except Exception as error:
                    where = f"{spec} by {name}, {bandwidth.shown(size)}, rank {rank}"
                    raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
                count += 1
    return {"comparisons": count}


def exchanged_alone(device: torch.device, size: int) -> dict[str, Any]:
    """Run each exchange on a group of one rank, which a session leaves out, by a sequencer: on a GPU beside the current stream.

    Raises ItemError if a result has other bits than the codec's own encode and decode give.
    """
    wire, labels, failed, count = Wire(dist.group.WORLD, device), Labels(), [], 0
    sequencer = Sequencer(wire, Meter())
    for spec in SPECS:
        codec = commpress.parse(spec)
        x = torch.randn(size // 4, generator=torch.Generator().manual_seed(0)).to(device)
        for exchange in (*EXCHANGES.values(), Hierarchical(ranks_per_node=1)):
            if not fits(exchange, codec):
                continue
            found, where = x.clone(), f"{spec} by {exchange}, {bandwidth.shown(size)}, one rank"
            transfers = exchange.run(found, Encoder(codec), wire, labels.next(where))
            work = Work(found, not_counted)
            row = Row(count, x.numel(), "float32", spec, str(exchange), "")
            sequencer.submit(SequencerJob(found, transfers, row, count, x.nbytes, True, work.finish))
            try:
                work.wait()  # on a GPU the current stream waits, the host does not
            except Exception as error:
                raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
            coded = coded_alone(codec, exchange, x)
            if not (found - x).norm() < x.norm():
                failed.append(f"{where}: the result is off by {(found - x).norm() / x.norm():.2g} of x")
            elif not torch.equal(found, coded):
                unequal = int((found != coded).sum())
                failed.append(f"{where}: {unequal} of {x.numel()} values are not those that the codec decodes to")
            count += 1
    if failed:
        raise ItemError("; ".join(failed))
    return {"comparisons": count, "text": ALONE}


def coded_alone(codec: Codec, exchange: Exchange, x: Tensor) -> Tensor:
    """Return what a rank alone gets of x: its own payload decoded, encoded a second time where the exchange does that."""
    n, payload = x.numel(), coding.encode(codec, x)
    if exchange.chunk(n, codec, 0, 1) is not None:
        payload = coding.recode(codec, payload, n, 1)
    return codec.decode(payload, n)


def collectives(device: torch.device) -> dict[str, Any]:
    """Call each of the group's own collectives that exchanges may use, with bytes and with float32. Collective.

    Raises ItemError on all ranks that names those which failed here, or gave something else than they should.
    """
    W, rank, failed = dist.get_world_size(), dist.get_rank(), []
    for dtype in (torch.uint8, torch.float32):

        def of(*ranks: int, dtype: torch.dtype = dtype) -> Tensor:
            """Eight values of each of these ranks."""
            return torch.cat([torch.full((8,), 1 + r, dtype=dtype, device=device) for r in ranks])

        everyone = range(W)
        total = torch.full((8,), W * (W + 1) // 2, dtype=dtype, device=device)
        for name, call, expected in (
            ("all_reduce", _all_reduce, total),
            ("broadcast", _broadcast, of(0)),
            ("all_gather", _all_gather, of(*everyone)),
            ("all_gather_single", _all_gather_single, of(*everyone)),
            ("all_to_all_single", _all_to_all_single, of(*everyone)),
            ("reduce_scatter_single", _reduce_scatter_single, total),
        ):
            try:
                if not torch.equal(call(of(rank), W), expected):
                    failed.append(f"{name} of {dtype} gave other values than expected")
            except (RuntimeError, ValueError, NotImplementedError) as error:
                failed.append(f"{name} of {dtype}: {' '.join(str(error).split())[:200]}")
    if failed:
        raise ItemError("; ".join(failed))
    return {"comparisons": 12}


def _all_reduce(x: Tensor, W: int) -> Tensor:
    dist.all_reduce(x)
    return x


def _broadcast(x: Tensor, W: int) -> Tensor:
    dist.broadcast(x, 0)
    return x


def _all_gather(x: Tensor, W: int) -> Tensor:
    out = [torch.empty_like(x) for _ in range(W)]
    dist.all_gather(out, x)
    return torch.cat(out)


def _all_gather_single(x: Tensor, W: int) -> Tensor:
    out = torch.empty(W * x.numel(), dtype=x.dtype, device=x.device)
    dist.all_gather_single(out, x)
    return out


def _all_to_all_single(x: Tensor, W: int) -> Tensor:
    given = x.repeat(W)
    out = torch.empty_like(given)
    dist.all_to_all_single(out, given)
    return out


def _reduce_scatter_single(x: Tensor, W: int) -> Tensor:
    out = torch.empty_like(x)
    dist.reduce_scatter_single(out, x.repeat(W))
    return out


def done(name: str, device: torch.device, steps: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Do one item: one of RUNS, EXCHANGED or COLLECTIVES. Collective."""
    if name == COLLECTIVES:
        return collectives(device)
    if name == EXCHANGED:
        return exchanged_alone(device, sizes[0]) if dist.get_world_size() == 1 else exchanged(device, sizes)
    return trained(name, device, steps)


def records(names: list[str], device: torch.device, steps: int, sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield a record for each item. Collective. One that ends the ranks' step together is raised, behind its record."""
    for name in names:
        start = time.perf_counter()
        record: dict[str, Any] = {"item": name, "error": ""}
        try:
            record |= done(name, device, steps, sizes)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except (ItemError, bandwidth.GarbageError) as error:
            record["error"] = str(error)
        record["seconds"] = time.perf_counter() - start
        yield record
