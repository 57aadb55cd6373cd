"""Alternatives to commpress: torch's own DDP hooks, and what pip finds for gradient compression.

A `Way` averages the gradients of one DDP model; its name is that of a row in the table. What may crash is probed first, in
two processes of its own, so that the reason becomes the row and the benchmark goes on.
"""

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import DDPCommHookType
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.comm.exchange.wire import ring_bytes
from commpress.launch.model import GPT, Shape
from commpress.optim import CompressedOptimizer, OneBitAdamW, ZeroOneAdamW

FLOOR, DENSE = "no communication", "plain DDP"
PROBE = Shape(layers=2, width=64, heads=4, context=32)
"""A model that is done in no time and has several buckets of PROBE_BUCKET_MB."""
PROBE_BUCKET_MB = 0.1
PROBE_STEPS = 30
PROBE_SECONDS = 40.0
REASON = 200
"""Characters of a reason at most."""
LOCAL_STEPS = 4
"""Steps between two averages of local SGD."""
ONE_BUCKET_MB = 1e5

ABSENT = {
    "GRACE (grace-dl)": "not on PyPI",
    "epfml powersgd": "powersgd 0.0.2 on PyPI holds no code and wants torch 1.10",
    "gradient-compression": "0.0.2 has random matrices to project a gradient with, and no exchange",
    "torch-cgx": "torch-cgx is not on PyPI; pytorch-cgx does not install: wants ompi_info of a system MPI",
    "bagua": "0.9.2 does not install: its build wants setuptools_rust",
    "byteps": "0.2.5.post15 does not install: its Makefile of ps-lite ends with an error",
    "opendiloco": "0.2.0 on PyPI is a placeholder of two lines",
    "horovod": "0.28.1: its C++ build was not done in 400 s",
    "DeepSpeed 1-bit Adam": "0.19.6 (the last that has it): its NCCL and MPI backends want cupy, the third has no CPU kernel",
    "torchft quantised all-reduce": "torchft-nightly imports triton, which torch for CPU has not",
}
"""Packages that were tried and do not run here, and why (November 2026, Python 3.11, torch 2.13 for CPU)."""
if find_spec("hivemind") is None:
    ABSENT["hivemind"] = "not installed (pip install hivemind 'numpy<2.4')"


def nothing() -> None:
    """Do nothing, as most ways need nothing after a step."""


@dataclass
class Attached:
    """A way at work on one model."""

    session: commpress.Session | None = None
    optimizer: torch.optim.Optimizer | None = None
    """The way's own, if it has one."""
    after_step: Callable[[], None] = nothing
    uncounted: int = 0
    """Bytes a step that DDP itself sends, where `counted` does not see them."""


@dataclass(frozen=True)
class Way:
    """One way to average gradients."""

    name: str
    kind: str
    """floor, torch, peer or commpress"""
    attach: Callable[[DistributedDataParallel], Attached]
    bucket_mb: float | None = None
    """DDP's bucket_cap_mb where the way needs one of its own."""
    period: int = 1
    """Steps after which its traffic repeats."""
    probed: bool = False


def ways(specs: list[str], adam: bool = False) -> list[Way]:
    """All rows that can be tried, in the order of the table: the floor, torch's, others', and commpress with these specs.

    With `adam` there are the optimizers that are compressed behind it, too.
    """
    found = [Way(FLOOR, "floor", partial(register, noop_hook)), Way(DENSE, "torch", plain)]
    for kind in DDPCommHookType:
        if kind is DDPCommHookType.NOOP:
            continue
        name = f"torch {kind.name.removesuffix('_COMPRESS').lower()}"
        found.append(Way(name, "torch", partial(_torch_hook, kind.name), probed=True))
        if "POWER_SGD" in kind.name:
            one = f"{name}, one bucket"
            found.append(Way(one, "torch", partial(_torch_hook, kind.name), bucket_mb=ONE_BUCKET_MB, probed=True))
    local = f"torch post_localSGD, every {LOCAL_STEPS} steps"
    found.append(Way(local, "torch", _local_sgd, period=LOCAL_STEPS, probed=True))
    if find_spec("hivemind") is not None:
        found.append(Way("hivemind uniform 8-bit", "peer", partial(register, hivemind_hook), probed=True))
    found += [Way(spec, "commpress", partial(_commpress, spec)) for spec in specs]
    matrices = [spec for spec in specs if spec.startswith("powersgd")]
    found += [Way(f"{s}, one bucket", "commpress", partial(_commpress, s), bucket_mb=ONE_BUCKET_MB) for s in matrices]
    if adam:
        found.append(Way("OneBitAdamW sign", "commpress", partial(_behind, OneBitAdamW, "sign", {})))
        every = {"sync_every": LOCAL_STEPS}
        for spec in ("sign", "topk(0.1)|sign"):
            name = f"ZeroOneAdamW {spec}, every {LOCAL_STEPS} steps"
            found.append(Way(name, "commpress", partial(_behind, ZeroOneAdamW, spec, every), period=LOCAL_STEPS))
    return found


def plain(model: DistributedDataParallel) -> Attached:
    """Leave a model to DDP's own all-reduce."""
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return Attached(uncounted=ring_bytes(gradients, dist.get_world_size()))


def register(hook: Callable[..., Any], model: DistributedDataParallel) -> Attached:
    """Register a hook of DDP that has no state."""
    model.register_comm_hook(None, hook)
    return Attached()


def _torch_hook(kind: str, model: DistributedDataParallel) -> Attached:
    # PowerSGD would send all gradients whole for a thousand steps; two it must, until DDP has laid its buckets out anew
    begin = {"start_powerSGD_iter": 2} if "POWER_SGD" in kind else {}
    DDPCommHookType[kind].value(model=model, state=None, **begin)
    return Attached()


def _local_sgd(model: DistributedDataParallel) -> Attached:
    state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
    model.register_comm_hook(state, post_localSGD_hook)
    averager = PeriodicModelAverager(period=LOCAL_STEPS)
    return Attached(after_step=lambda: averager.average_parameters(model.parameters()))


def _commpress(spec: str, model: DistributedDataParallel) -> Attached:
    return Attached(session=commpress.attach(model, spec))


def hivemind_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """hivemind's own 8-bit codec; its averager finds peers by a hash table, here they meet in an all-gather of payloads."""
    from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
    from hivemind.proto.runtime_pb2 import UNIFORM_8BIT
    from hivemind.proto.runtime_pb2 import Tensor as Message

    gradient = bucket.buffer()
    text = serialize_torch_tensor(gradient, UNIFORM_8BIT).SerializeToString()  # as long on every rank
    payload = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    of_all = [torch.empty_like(payload) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, payload)
    gradient.zero_()
    for other in of_all:
        gradient.add_(deserialize_torch_tensor(Message.FromString(other.numpy().tobytes())), alpha=1 / len(of_all))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradient)
    return done


def _behind(
    kind: Callable[..., CompressedOptimizer], spec: str, options: dict[str, Any], model: DistributedDataParallel
) -> Attached:
    optimizer = kind(model.parameters(), lr=1e-4, warmup_steps=2, **options)
    return Attached(session=commpress.attach(model, spec, optimizer=optimizer), optimizer=optimizer)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank's calls of `dist.all_reduce` and `dist.all_gather` send while the block runs, one entry a call."""
    sent: list[int] = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def counting_all_reduce(tensor: Tensor, *args: Any, **settings: Any) -> Any:
        sent.append(ring_bytes(tensor.nbytes, dist.get_world_size()))
        return all_reduce(tensor, *args, **settings)

    def counting_all_gather(out: list[Tensor], tensor: Tensor, *args: Any, **settings: Any) -> Any:
        sent.append((len(out) - 1) * tensor.nbytes)
        return all_gather(out, tensor, *args, **settings)

    dist.all_reduce, dist.all_gather = counting_all_reduce, counting_all_gather  # type: ignore[assignment]
    try:
        yield sent
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather


def backward(model: DistributedDataParallel, x: Tensor, y: Tensor) -> None:
    """Forward, backward and exchange: the gradients become the means. `x` and `y` are bytes, int64 [batch, time]."""
    nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()


def probe(way: Way) -> str:
    """Train a small model that way, on two ranks of this machine. Returns the reason why it does not run, or ""."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.nn.parallel", "numba"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(2):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_probed, args=(way, rank, Path(folder), there), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            ranks.append(process)
        try:
            return _verdict(pipes, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _verdict(pipes: list[Connection], folder: Path) -> str:
    """The first reason that a rank gives, "" if both are through."""
    deadline, waiting = time.monotonic() + PROBE_SECONDS, list(pipes)
    while waiting:
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            return f"hangs: no answer in {PROBE_SECONDS:g} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            waiting.remove(pipe)
            try:
                reason: str = pipe.recv()
            except EOFError:  # the process has ended, as it does when C++ throws in a thread of its own
                said = (folder / f"rank{pipes.index(pipe)}").read_text().strip().splitlines()
                reason = f"its process ends: {said[-1].strip() if said else 'without a word'}"
            if reason:
                return reason[:REASON]
    return ""


def _probed(way: Way, rank: int, folder: Path, answer: Connection) -> None:
    os.dup2(os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=PROBE_SECONDS)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
        torch.manual_seed(0)
        model = DistributedDataParallel(GPT(PROBE), bucket_cap_mb=way.bucket_mb or PROBE_BUCKET_MB)
        attached = way.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(PROBE_STEPS):
            words = torch.randint(256, (2, PROBE.context))
            backward(model, words, words)
            optimizer.step()
            attached.after_step()
            optimizer.zero_grad()
        answer.send("")
    except BaseException as error:
        answer.send(in_one_line(error))


def in_one_line(error: BaseException) -> str:
    """An error's name and first line: the innermost of those that torch wraps around each other, or where it was raised."""
    *around, inner = str(error).split("error when running the callback: ")
    first = inner.strip().partition("\n")[0]
    if not first:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        first = f"in {frame.name}, {Path(frame.filename).name} line {frame.lineno}"
    return first if around else f"{type(error).__name__}: {first}"
