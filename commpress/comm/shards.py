"""Sharded training: each rank owns a part of every parameter. Gradients go to the owners, parameters come from them.

    backward     full gradient [W m] on each rank   -- reduce_scatter -->   mean of my chunk [m]       int4, error feedback
    optimizer    my shard [m] in full precision
    forward      parameters [W m] on each rank      <-- all_gather --       my shard [m]               int8, no feedback

It knows no framework. What is lossy is computed with, never kept: the shards that the optimizer steps stay as they are, and
all ranks compute with the same decoded bits. What is not compressed takes the group's own collective, whose bits it has.

Feedback holds what was withheld of the whole gradient, on every rank: W m values of float32, as much memory as an unsharded
copy of the model. Where that is too much, leave it out (`error_feedback=False`).
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import Settings
from commpress.comm.coding import FLOAT_DTYPES, warm_up
from commpress.comm.exchange import EXCHANGES, Label, Labels, Transfer, Wire, stay
from commpress.comm.exchange.gather import gather, native_gather
from commpress.comm.exchange.packed import packed
from commpress.comm.exchange.reduce_scatter import (
    Op,
    native_bytes,
    native_reduce_scatter,
    needed_bytes,
    over_mean,
    reduce_scatter,
)
from commpress.comm.exchange.two_shot import chunk_bounds
from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.feedback import Feedback, Segments
from commpress.comm.meter import Meter, Report, named
from commpress.comm.parameters import real_view
from commpress.comm.plan import Choice, Plan, Treatment
from commpress.comm.sequencer import Job, Sequencer, promise
from commpress.comm.verify import EVERY, Comparison, is_due

MEAN = dist.ReduceOp.AVG
ALIGNED = 64
"""Bytes: what stands in one buffer starts at multiples of it."""
LOOKED_AT = "all values are looked at"


class Shards:
    """The traffic of one process group among whose ranks parameters are sharded. Collective: all of them make one.

    Each call starts one operation in the background and returns at once; all ranks make the same calls in the same order.
    `index` is the place in the report of what travels together, `reason` says why it shall not be compressed. Every `verify`
    steps (0: never), and in the first three, the ranks compare hashes of what all of them got, and payloads have checksums.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, gradients: Plan, parameters: Plan, verify: int = EVERY
    ) -> None:
        self._verify = verify
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.device = device
        self.gradients, self.parameters = gradients, parameters
        self.feedback = Feedback(self.world_size)
        self.looks = False
        """Whether gradients travel exactly, and those that masks prune with them."""
        self.meter = Meter()
        self.labels = Labels()
        self._reductions: dict[int, int] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._busy = self._landed = self._exposed = 0.0
        if self.world_size > 1:
            self.wire = Wire(group, device)
            self._sequencer = Sequencer(self.wire, self.meter)
            for plan in (gradients, parameters):
                warm_up(plan.codec, device)

    def reduce_scatter(
        self, full: Tensor, out: Tensor, segments: Segments, index: int, op: Op = MEAN, reason: str = ""
    ) -> "Pending":
        """Fill `out` ([m]) with what `op` (AVG, SUM, PREMUL_SUM) makes of the ranks' chunks of `full` ([W * m]).

        Both contiguous, of one float or complex dtype. `segments` names the parts of `full`, and how many reals of it they are:
        feedback belongs to the names. Raises ValueError if the sizes do not fit.
        """
        W, given = self.world_size, (full, out)
        full, out = real_view(full).view(-1), real_view(out).view(-1)
        places = None if self.looks else self._places(segments, full)
        m = out.numel() if places is None else places.numel() // W
        choice = self._choose(self.gradients, full, out, reason or (LOOKED_AT if self.looks else ""), m)
        payloads = (2 * W - 1) * choice.codec.nbytes(m) if choice.codec.lossy else 0
        buffer, all_kept, kept, payload = self._room(places, full, m, payloads)
        source, target = (full, out) if places is None else (all_kept, kept)
        label = self.label("gradients", segments, m, choice, "reduce_scatter", index)
        if W == 1:
            exchange = _alone(source, target, over_mean(op, 1))
        elif m == 0:
            exchange = stay()
        elif choice.codec.lossy:
            memory = self.feedback.memory(segments, choice.feedback, None, self.device)
            exchange = reduce_scatter(source, target, op, choice.codec, memory, payload, self.wire, label)
        else:
            exchange = native_reduce_scatter(source, target, op, self.wire, label)
        if places is not None:
            own = self.feedback.survivors.places(segments[self.rank * len(segments) // W :][: len(segments) // W])
            assert own is not None
            exchange = packed(full, places, all_kept, exchange, (out, own, kept))
        backend = native_bytes(out, W)
        # what is left to the group counts as the group sends it
        dense = needed_bytes(out, W) if choice.codec.lossy or choice.exchange == "none" else backend
        return self.start("gradients", "reduce_scatter", choice, *given, index, dense, exchange, buffer, backend)

    def all_gather(
        self, shard: Tensor, out: Tensor, index: int, reason: str = "", segments: Segments = ()
    ) -> "Pending":
        """Fill `out` ([W * m]) with the ranks' `shard` ([m], which may be this rank's part of `out`).

        Both contiguous, of one dtype; one that is neither float nor complex is not compressed. `segments` names the parts of
        `out`, in reals, for masks. Raises ValueError if the sizes do not fit.
        """
        W, given = self.world_size, out
        shard, out = real_view(shard).view(-1), real_view(out).view(-1)
        places = self._places(segments, out)
        m = shard.numel() if places is None else places.numel() // W
        choice = self._choose(self.parameters, out, shard, reason, m)
        payloads = W * choice.codec.nbytes(m) if choice.codec.lossy else 0
        buffer, all_kept, kept, payload = self._room(places, out, m, payloads)
        source, target = (shard, out) if places is None else (kept, all_kept)
        label = self.label(f"parameters of unit {index}", segments, m, choice, "gather", index)
        if W == 1:
            exchange = _alone(source, target, 1.0)
        elif m == 0:
            exchange = stay()
        elif choice.codec.lossy:
            exchange = gather(source, target, choice.codec, payload, self.wire, label)
        else:
            exchange = native_gather(source, target, self.wire, label)
        if places is not None:
            own = self.feedback.survivors.places(segments[self.rank * len(segments) // W :][: len(segments) // W])
            assert own is not None
            exchange = packed(shard, own, kept, exchange, (out, places, all_kept))
        dense = (W - 1) * shard.nbytes
        return self.start("parameters", "gather", choice, given, given, index, dense, exchange, buffer)

    def all_reduce(self, x: Tensor, segments: Segments, index: int, op: Op = MEAN, reason: str = "") -> "Pending":
        """Replace `x` ([n], contiguous, any float or complex dtype) by what `op` makes of the ranks', the same bits on all.

        For groups that hold replicas of shards. `segments` names the parts of `x`, in reals.
        """
        given, x = x, real_view(x).view(-1)
        places = None if self.looks else self._places(segments, x)
        n = x.numel() if places is None else places.numel()
        treatment = self._treatment(x, reason or (LOOKED_AT if self.looks else ""), n, self.gradients)
        choice = self.gradients.choose(n, x.element_size(), self.world_size, treatment)
        buffer, _, kept, _ = self._room(places, x, n, 0)
        travels = x if places is None else kept
        label = self.label("gradients", segments, n, choice, choice.exchange, index)
        if self.world_size == 1:
            exchange = _alone(travels, travels, over_mean(op, 1))
        elif n == 0:
            exchange = stay()
        elif choice.codec.lossy:
            chunk = None
            if choice.exchange == "two_shot":
                cuts = chunk_bounds(n, self.world_size, choice.codec.granularity)
                chunk = (cuts[self.rank], cuts[self.rank + 1])
            memory = self.feedback.memory(segments, choice.feedback, chunk, self.device)
            mean = EXCHANGES[choice.exchange](travels, choice.codec, memory, self.wire, label)
            exchange = _times(mean, travels, over_mean(op, self.world_size))
        else:
            exchange = _native_all_reduce(travels, op, self.wire, label)
        if places is not None:
            exchange = packed(x, places, kept, exchange)
        dense = ring_bytes(x.nbytes, self.world_size)
        return self.start("gradients", choice.exchange, choice, given, given, index, dense, exchange, buffer)

    def ask(self, settings: Settings, what: str) -> list[Settings]:
        """Every rank's settings. Collective: a rank that does something else meanwhile is an error on all."""
        if self.world_size == 1:
            return [settings]
        return self._sequencer.ask(settings, self.labels.next(what))

    def report(self, spec: str, rank: int, world_size: int) -> Report:
        """Bytes and seconds so far. `exposed` is what training waited for, `hidden` what ran beside it."""
        self.meter.exposed, self.meter.hidden = self._exposed, max(0.0, self._busy - self._exposed)
        return self.meter.report(spec, rank, world_size)

    def _choose(self, plan: Plan, full: Tensor, part: Tensor, reason: str, travel: int) -> Choice:
        n, W = part.numel(), self.world_size
        if full.numel() != W * n or full.dtype != part.dtype:
            raise ValueError(
                f"{full.numel()} values of {full.dtype} do not make {W} chunks of {n} of {part.dtype}, one a rank"
            )
        return plan.choose(travel, part.element_size(), W, self._treatment(part, reason, travel, plan))

    def _places(self, segments: Segments, full: Tensor) -> Tensor | None:
        """Where survivors of masks lie; None if all of it travels, or if these are not the parts of `full`."""
        fits = sum(n for _, n in segments) == full.numel()
        return self.feedback.survivors.places(segments) if fits else None

    def _room(
        self, places: Tensor | None, full: Tensor, m: int, payloads: int
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """A buffer, and in it room for what masks keep of W chunks and of one, and for payloads."""
        each = m * full.element_size() if places is not None else 0
        cuts = [0, -(-self.world_size * each // ALIGNED) * ALIGNED]
        cuts += [cuts[1] + -(-each // ALIGNED) * ALIGNED]
        if not cuts[2] and not payloads:
            return None, full[:0], full[:0], full[:0]
        buffer = self.take(cuts[2] + payloads)
        kept = buffer[cuts[1] : cuts[1] + each].view(full.dtype)
        return buffer, buffer[: self.world_size * each].view(full.dtype), kept, buffer[cuts[2] :]

    def _treatment(self, x: Tensor, reason: str, travel: int, plan: Plan) -> Treatment:
        if travel == 0:
            return Treatment(None, "nothing is left of it")
        if not reason and x.dtype not in FLOAT_DTYPES:
            reason = f"{str(x.dtype).removeprefix('torch.')} is no float"
        return Treatment(plan.codec, reason)

    def start(
        self,
        role: str,
        name: str,
        choice: Choice,
        whole: Tensor,
        out: Tensor,
        index: int,
        dense_bytes: int,
        exchange: Iterator[Transfer],
        buffer: Tensor | None,
        backend_bytes: int | None = None,
    ) -> "Pending":
        """Run an exchange that leaves its result in `out`, and count it. `buffer`, of `take`, is free afterwards.

        `backend_bytes` is what the group itself would send, if that is not `dense_bytes`.
        """
        dtype = named(out.dtype)
        name = choice.exchange if choice.exchange == "none" else name
        row = self.meter.row(index, whole.numel(), dtype, str(choice.codec), name, choice.reason, role)
        step = self.reduced(index) if role == "gradients" else self._reductions.get(index, 0)
        pending = Pending(self, out)
        if self.is_due(step) and choice.exchange != "none" and name not in ("reduce_scatter", "to_owners"):
            comparison, what = Comparison(step, ()), "the gathered parameters" if role == "parameters" else "the mean"
            exchange = comparison.watch(exchange, out, f"{what} of unit {index}")
            exchange = comparison.finish(exchange, self.wire, self.labels.next("hashes of what was exchanged"))
        if out.is_inference():
            exchange = _in_inference_mode(exchange)
        if self.world_size == 1:
            next(exchange, None)
            row.steps += 1
            self._finish(pending, None, None)
        else:
            finished = partial(self._finish, pending, buffer)
            self._sequencer.submit(
                Job(out, exchange, row, step, dense_bytes, False, finished, backend_bytes=backend_bytes)
            )
        return pending

    def is_due(self, step: int) -> bool:
        """Whether what is exchanged in this step is compared."""
        return self.world_size > 1 and is_due(self._verify, step)

    def label(self, role: str, segments: Segments, n: int, choice: Choice, name: str, index: int) -> Label:
        """The label of an exchange in this step of what has this place in the report."""
        self.labels.proven = self.is_due(self._reductions.get(index, 0))
        return self.labels.bucket(role, segments, n, str(choice.codec), name)

    def reduced(self, index: int) -> int:
        """Note a reduction of what has this place in the report; returns how many there were before."""
        before = self._reductions.get(index, 0)
        self._reductions[index] = before + 1
        self.meter.steps = max(self.meter.steps, before + 1)
        return before

    def _finish(self, pending: "Pending", buffer: Tensor | None, error: BaseException | None) -> None:
        now = time.perf_counter()
        self._busy += now - max(pending.submitted, self._landed)
        self._landed = now
        if buffer is not None and error is None:
            self._free[buffer.numel()].append(buffer)
        pending.settle(error)

    def take(self, nbytes: int) -> Tensor:
        """A uint8 buffer that nobody uses now. They stay allocated: fresh pages cost more than the codec."""
        free = self._free.setdefault(nbytes, [])
        if free:
            return free.pop()
        with torch.inference_mode(False):  # it will be written to again in training
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def waited(self, seconds: float) -> None:
        """Training stood still for so long."""
        self._exposed += seconds


class Pending(dist.Work):
    """An operation that is under way."""

    def __init__(self, shards: Shards, out: Tensor) -> None:
        super().__init__()
        self.submitted = time.perf_counter()
        self._shards, self._out = shards, out
        self._future = promise(out.device)

    def wait(self, timeout: Any = None) -> bool:
        """Return when the result is there; on an accelerator the current stream waits for it instead.

        Raises RuntimeError if the operation failed on any rank.
        """
        start = time.perf_counter()
        value = self._future.wait()
        self._shards.waited(time.perf_counter() - start)
        if isinstance(value, BaseException):
            raise value
        return True

    def settle(self, error: BaseException | None) -> None:
        """The result is there, or cannot be."""
        self._future.set_result(error or self._out)


def _alone(x: Tensor, out: Tensor, times: float) -> Iterator[Transfer]:
    """The mean over a single rank."""
    if out.data_ptr() != x.data_ptr():
        out.copy_(x)
    if times != 1:
        out.mul_(times)
    yield from ()


def _in_inference_mode(exchange: Iterator[Transfer]) -> Iterator[Transfer]:
    """Tensors made under inference mode are written to under it alone; it is a mode of each thread."""
    while True:
        with torch.inference_mode():
            transfer = next(exchange, None)
        if transfer is None:
            return
        yield transfer
        del transfer


def _times(exchange: Iterator[Transfer], x: Tensor, times: float) -> Iterator[Transfer]:
    """What was to be more than a mean."""
    yield from exchange
    if times != 1:
        x.mul_(times)


def _native_all_reduce(x: Tensor, op: Op, wire: Wire, label: Label) -> Iterator[Transfer]:
    yield wire.all_reduce(x, label, op)
