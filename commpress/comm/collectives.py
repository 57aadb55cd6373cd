"""The compressed collectives of one process group, with c10d's names. commpress sends everything through them.

    all_reduce       x on each rank [n]              -->  its mean on all [n]              gradients; outer updates
    reduce_scatter   full gradient [W m] on each     -->  the mean of my chunk [m]         gradients of sharded parameters
    all_gather       my shard [m]                    -->  all shards on all ranks [W m]    sharded parameters
    all_to_all       parts for each rank [n]         -->  parts from each rank [m]         rows of matrices, to and from owners
    broadcast        x on one rank                   -->  x on all

Each starts one operation in the background and returns a `Work` at once; all ranks call the same ones in the same order. Read
`all_reduce` from top to bottom for the steps of a bucket: override, plan, memory, encoder, exchange, submit.

This module knows no framework. Decoded values are used, never stored in place of exact ones: the shards that an optimizer steps
stay exact, and all ranks compute with the same decoded bits. If only the changes of shards are sent, all ranks keep a version
of them. Uncompressed sharded traffic uses the group's own collective and has its bits. With error feedback the residual of a
reduce-scatter covers the whole gradient on every rank: W m values of float32.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm import fingerprint
from commpress.comm.codecs import Codec
from commpress.comm.coding import warm_up
from commpress.comm.encoder import Encoder
from commpress.comm.exchange import NO_EXCHANGE, Label, Transfer, all_reduce_found_inf, single_rank
from commpress.comm.exchange.all_gather import all_gather, native_all_gather
from commpress.comm.exchange.all_gather_changes import all_gather_changes
from commpress.comm.exchange.all_gather_changes_unseen import all_gather_changes_bytes
from commpress.comm.exchange.all_reduce import native_all_reduce
from commpress.comm.exchange.all_to_all import all_to_all, all_to_all_bytes
from commpress.comm.exchange.around import prepared, scaled
from commpress.comm.exchange.broadcast import broadcast, exact_broadcast
from commpress.comm.exchange.packed import packed
from commpress.comm.exchange.reduce_scatter import (
    Op,
    native_bytes,
    native_reduce_scatter,
    needed_bytes,
    over_mean,
    reduce_scatter,
    reduce_scatter_bytes,
)
from commpress.comm.exchange.wire import ring_bytes, tree_children
from commpress.comm.feedback import Feedback, Memory
from commpress.comm.meter import SPEC_IS_NONE
from commpress.comm.parameters import real_view
from commpress.comm.plan import ALL_REDUCE, DENSE, BucketPlan, Override, Plan, exact_where_needed
from commpress.comm.scratch import ScratchPool
from commpress.comm.segments import Segments, sizes
from commpress.comm.traffic import Step, Traffic
from commpress.comm.verify import EVERY
from commpress.comm.versions import Versions
from commpress.comm.work import Work
from commpress.kernels.table import compiled_dtypes

ALIGNED = 64
"""Bytes; the parts of a buffer start at multiples of this."""
MEAN = dist.ReduceOp.AVG
UNCOMPRESSED = Plan.of("none")
SEND_DENSE = "all values are looked at"


class GradScaler(Protocol):
    """The part of `torch.amp.GradScaler` that is needed here."""

    def get_scale(self) -> float:
        """Return the factor by which the loss is multiplied now."""


class Collectives:
    """The traffic of one process group. Collective: all its ranks make one at the same point.

    `gradients` is the plan of all_reduce and reduce_scatter, `parameters` that of all_gather and broadcast. `role` is the
    name of all_reduce's traffic in the report. Every `verify` steps (0: never), and in the first three, the ranks compare
    hashes of the results, and payloads have checksums. Under a `grad_scaler` feedback follows its scale. Kernels are compiled
    for gradients of `dtypes`; without any, for those that the device may have.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        gradients: Plan,
        parameters: Plan = UNCOMPRESSED,
        *,
        role: str = "gradients",
        verify: int = EVERY,
        grad_scaler: GradScaler | None = None,
        dtypes: Collection[torch.dtype] = (),
    ) -> None:
        self.group, self.device = group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.gradients, self.parameters = gradients, parameters
        self.role, self.grad_scaler = role, grad_scaler
        self.feedback, self.scratch = Feedback(self.world_size), ScratchPool(device)
        self.versions = Versions(self.rank, self.world_size)
        """The versions of gathered parameters on all ranks, if only their changes are sent."""
        self.traffic = Traffic(group, device, self.scratch, verify)
        self.meter = self.traffic.meter
        self.send_dense = False
        """Whether all gradients are sent exactly, also those of pruned weights, to choose weights that grow again."""
        self.behind = ""
        """The name of the optimizer whose own values are sent in place of gradients; empty if there is none."""
        self.may_undo = False
        """Whether an exchange may turn out to be unused, so that the residual must be restored."""
        self.pairs: set[str] = set()
        """The names of complex parameters: each of their values is two real numbers in segments."""
        self.scale = 1.0
        """The factor by which the residual is multiplied."""
        if self.world_size > 1:
            self._wire = self.traffic.wire
            for plan in (gradients, parameters):
                for dtype in dtypes or compiled_dtypes(device):
                    warm_up(plan.codec, device, dtype)
                plan.join(self._wire)
            if parameters.delta:
                fingerprint.warm_up(device)

    def all_reduce(
        self,
        x: Tensor,
        segments: Segments,
        index: int,
        *,
        op: Op | None = None,
        override: Override | None = None,
        dense_bytes: int | None = None,
        step: Step | None = None,
        last: bool = False,
        then: Callable[[BaseException | None], None] | None = None,
    ) -> Work:
        """Replace `x` ([n], contiguous, any float or complex dtype) by its mean over the ranks, or by the result of `op`.

        `segments` holds the names of the parameters in it and their numbers of real values (a complex value is two); `index` is
        its place in the report. If `op` is given, uncompressed values are reduced by the group's own all_reduce. `dense_bytes`
        is the dense figure of the report, if that is not one dense exchange. `last` marks the last bucket of a `step`. `then`
        is called with None at the end, or with an error.
        """
        W, given, x = self.world_size, x, real_view(x).view(-1)
        kept_index = self._kept_index(segments, x)
        n = x.numel() if kept_index is None else kept_index.numel()

        named, override = override is not None, self._override(override, x, n)
        plan = self.gradients.choose(n, x.element_size(), W, override, segments)
        chunk, node_slice = (None, None) if override.bypass_feedback else plan.parts(n, self.rank, W)
        memory = self.feedback.memory(segments, plan.feedback, chunk, self.device, override.momentum, node_slice)
        scratch = self.scratch.of(segments, self.feedback.memories)
        # an exact mean of gradients must not contain a residual of momenta
        remembers = not override.bypass_feedback and not (override.reason and override.prepare is None)
        if remembers and chunk is None and node_slice is None:
            memory.give_back(W)  # this exchange has no second encoding
        codec, kept = plan.codec.drawn(memory.next_draw()), memory if remembers else None
        encoder = Encoder(codec, kept, scratch, override.masks_momentum)

        values = x
        if kept_index is not None and (override.codec is not None or n == 0):
            values = scratch.buffer("kept values", n * x.element_size(), self.device).view(x.dtype)
        label = self.traffic.label(self.role, segments, values.numel(), plan, plan.exchange.name, index, step)
        exchange = self._mean(values, op, override, plan, encoder, label)
        if kept_index is not None and values is not x:
            exchange = packed(x, kept_index, values, exchange)
        sees_all = kept_index is None and plan.exchange.encodes_bucket
        exchange = self._overridden(override, x, segments, memory, encoder, exchange, sees_all)
        collective = plan.exchange is not NO_EXCHANGE or self.grad_scaler is not None
        if step is not None and step.error is not None and W > 1 and collective:
            sampled = DENSE if named else plan.codec
            told = self.traffic.labels.next(f"a sample of bucket {index}")
            exchange = step.error.watch(exchange, x, sampled, memory, self._wire, told, kept_index)

        dense = ring_bytes(x.nbytes, W) if dense_bytes is None else dense_bytes
        is_complex = given.is_complex() or bool(segments and segments[0].name in self.pairs)
        whole = x.numel() if step is None or plan.reason else step.piece_of or x.numel()
        dtype, count = (x.dtype.to_complex(), whole // 2) if is_complex else (x.dtype, whole)
        name, compared = plan.exchange.name, f"the mean of bucket {index}" if override.codec is not None else ""
        return self.traffic.submit(
            *(self.role, name, plan, count, dtype, given, index, dense, exchange, compared),
            step=step,
            last=last,
            then=then,
            plain=None if values is not x or plan.codec.lossy or override.prepare is not None else (x.nbytes, label),
        )

    def reduce_scatter(
        self,
        full: Tensor,
        out: Tensor,
        segments: Segments,
        index: int,
        op: Op = MEAN,
        reason: str = "",
        *,
        cuts: Sequence[int] | None = None,
        plan: BucketPlan | None = None,
        override: Override | None = None,
        dense_bytes: int | None = None,
        backend_bytes: int | None = None,
    ) -> Work:
        """Fill `out` ([m]) with the reduction by `op` (AVG, SUM, PREMUL_SUM) of the ranks' chunks of `full` ([W * m]).

        Both are contiguous and of one float or complex dtype. `segments` holds the names of the parts of `full` and their
        numbers of real values. A `reason` says why it is not to be compressed. If the chunks differ in length, `cuts` has the
        W + 1 places at which `full` is cut; `out` is then this rank's part of `full`, the other parts are undefined afterwards,
        and the caller gives the `plan`, which must compress. `dense_bytes` is the dense figure of the report, `backend_bytes`
        the bytes that a framework itself would send. Raises ValueError if the sizes do not fit.
        """
        W, given, target = self.world_size, full, out
        full, out = real_view(full).view(-1), real_view(out).view(-1)
        kept_index = None if cuts is not None else self._kept_index(segments, full)
        m = out.numel() if kept_index is None else kept_index.numel() // W

        override = override or Override(self.gradients.codec, reason)
        if plan is None:
            self._require_chunks(full, out)
            override = self._override(override, out, m)
            plan = self.gradients.choose(m, out.element_size(), W, override)
        bounds = [r * m for r in range(W + 1)] if cuts is None else cuts
        payloads = reduce_scatter_bytes(bounds, plan.codec, self.rank) if plan.codec.lossy else 0
        buffer, all_kept, kept, payload = self._room(kept_index, full, m, payloads)
        source, values = (full, out) if kept_index is None else (all_kept, kept)
        label = self.traffic.label("gradients", segments, bounds[-1], plan, "reduce_scatter", index)
        encoder = Encoder(plan.codec)
        if W == 1:
            exchange = single_rank(source, encoder, values, over_mean(op, 1))
        elif m == 0 and cuts is None:
            exchange = iter(())
        elif plan.codec.lossy:
            encoder.memory = self.feedback.memory(segments, plan.feedback, None, self.device)
            encoder.codec = plan.codec.drawn(encoder.memory.next_draw())
            exchange = reduce_scatter(source, bounds, values, op, encoder, payload, self._wire, label)
        else:
            if not override.reason and (remembered := self.feedback.memories.get(segments)) is not None:
                encoder.memory = remembered
            exchange = native_reduce_scatter(source, values, op, encoder, self._wire, label)
        if kept_index is not None:
            exchange = packed(full, kept_index, all_kept, exchange, (out, self._own_kept_index(segments), kept))
        exchange = self._overridden(override, full, segments, encoder.memory, encoder, exchange, False)

        backend = native_bytes(out, W) if backend_bytes is None else backend_bytes
        if dense_bytes is None:  # uncompressed, the group's own bytes are the dense figure
            less = plan.codec.lossy or plan.exchange is NO_EXCHANGE
            dense_bytes = needed_bytes(out, W) if less else backend
        name = NO_EXCHANGE.name if plan.exchange is NO_EXCHANGE else "reduce_scatter"
        return self.traffic.submit(
            *("gradients", name, plan, given.numel(), given.dtype, target, index, dense_bytes, exchange),
            buffer=buffer,
            backend_bytes=backend,
            plain=None if buffer is not None or override.prepare is not None else (full.nbytes, label),
            reads=(full,),
        )

    def all_gather(
        self,
        shard: Tensor,
        out: Tensor,
        index: int,
        reason: str = "",
        segments: Segments = (),
        *,
        codec: Codec | None = None,
        itemsize: int | None = None,
    ) -> Work:
        """Fill `out` ([W * m]) with the ranks' `shard` ([m], which may be this rank's part of `out`).

        Both are contiguous and of one dtype; a dtype that is neither float nor complex is not compressed. `segments` holds the
        parts of `out` in real values: masks need it, and so does a plan that sends changes. `codec` replaces the plan's codec.
        `itemsize` is the bytes of a value in an uncompressed gather, if that is not the dtype's size. Raises ValueError if the
        sizes do not fit.
        """
        W, given = self.world_size, out
        shard, out = real_view(shard).view(-1), real_view(out).view(-1)
        self._require_chunks(out, shard)
        kept_index = self.feedback.masks.kept_index(segments) if _fits(segments, out) else None
        m = shard.numel() if kept_index is None else kept_index.numel() // W
        size = shard.element_size() if itemsize is None else itemsize

        override = exact_where_needed(Override(codec or self.parameters.codec, reason), shard, m)
        plan = self.parameters.choose(m, size, W, override)
        payloads = W * plan.codec.nbytes(m) if plan.codec.lossy else 0
        if payloads and self.parameters.delta:
            payloads = all_gather_changes_bytes(m, plan.codec, W)
        buffer, all_kept, kept, payload = self._room(kept_index, out, m, payloads)
        source, values = (shard, out) if kept_index is None else (kept, all_kept)
        label = self.traffic.label(f"parameters of unit {index}", segments, m, plan, "all_gather", index)
        dense, name, compared = (W - 1) * shard.numel() * size, "all_gather", f"the gathered parameters of unit {index}"
        if W == 1:
            exchange = single_rank(source, Encoder(plan.codec), values)
        elif m == 0:
            exchange = iter(())
        elif plan.codec.lossy and self.parameters.delta:
            name, told = (
                "all_gather_changes",
                self.traffic.labels.next(f"whether the shards of unit {index} have changed"),
            )
            known, encoder = self.versions.of(segments), Encoder(plan.codec)
            exchange = all_gather_changes(source, values, known, encoder, payload, self._wire, told, label)
        elif plan.codec.lossy:
            exchange = all_gather(source, values, Encoder(plan.codec), payload, self._wire, label)
        else:
            exchange = native_all_gather(source, values, self._wire, label)
        if kept_index is not None:
            exchange = packed(shard, self._own_kept_index(segments), kept, exchange, (out, kept_index, all_kept))
        if plan.exchange is NO_EXCHANGE:
            name, compared = NO_EXCHANGE.name, ""
        return self.traffic.submit(
            *("parameters", name, plan, given.numel(), given.dtype, given, index, dense, exchange, compared),
            buffer=buffer,
            plain=None if buffer is not None else (out.nbytes, label),
            reads=(shard,),
        )

    def all_to_all(
        self,
        x: Tensor,
        sizes: Sequence[int],
        out: Tensor,
        arriving: Sequence[int],
        segments: Segments,
        index: int,
        codec: Codec,
        reason: str = "",
    ) -> Work:
        """Send part r of `x` (`sizes[r]` values) to rank r by `codec`; fill `out` with all ranks' parts for this one.

        Both are float32 and contiguous; `arriving[r]` values come from rank r. A rank's part for itself is copied. Afterwards
        `x` holds the values that its receivers have decoded. `segments` describes what all ranks together send. A `reason` says
        why it is sent exactly.
        """
        W, n = self.world_size, sum(part.n for part in segments)
        if W == 1:
            codec, reason = DENSE, "one rank: nothing to send"
        plan = BucketPlan(codec, ALL_REDUCE, False, reason or ("" if codec.lossy else SPEC_IS_NONE))
        buffer: Tensor | None = None
        if W == 1:
            out.copy_(x)
            exchange: Iterator[Transfer] = iter(())
        else:
            label = self.traffic.label("updates", segments, n, plan, "all_to_all", index, Step(self.meter.steps))
            buffer = self.scratch.take(all_to_all_bytes(sizes, arriving, codec, self.rank))
            exchange = all_to_all(x, sizes, out, arriving, Encoder(codec), buffer, self._wire, label)
        dense = x.element_size() * (x.numel() - sizes[self.rank])
        return self.traffic.submit(
            *("updates", "all_to_all", plan, n, x.dtype, out, index, dense, exchange), buffer=buffer, reads=(x,)
        )

    def broadcast(
        self,
        x: Tensor,
        source: int,
        index: int,
        what: str,
        reason: str = "",
        *,
        base: Tensor | None = None,
        sizes: Sequence[int] = (),
        dense_bytes: int | None = None,
    ) -> Work:
        """Give `x` ([n], contiguous, any dtype) the value of the rank `source` on all ranks, bit for bit; `what` names it.

        With `base` (float32 [n]), the version that all ranks got last, only the changes are sent, coded. `x` (float32) then
        holds tensors of these `sizes`; `base` is updated, and the source keeps its own `x`. A `reason` says why it is sent
        exactly.
        """
        plan = BucketPlan(DENSE if base is None else self.parameters.codec, NO_EXCHANGE, False, reason)
        label = self.traffic.labels.next(f"{self.role} of {what} from rank {source}")
        buffer: Tensor | None = None
        if base is None:  # as bytes, since a process group takes few dtypes
            exchange = exact_broadcast(x.view(torch.uint8), self._wire, source, label)
        else:
            encoder = Encoder(plan.codec)
            buffer = self.scratch.take(plan.codec.nbytes(x.numel()) + len(sizes))
            exchange = broadcast(x, sizes, base, encoder, buffer, self._wire, source, label)
        nbytes = x.nbytes if dense_bytes is None else dense_bytes
        dense = nbytes * tree_children(self.rank, source, self.world_size)
        return self.traffic.submit(
            *(self.role, "broadcast", plan, x.numel(), x.dtype, x, index, dense, exchange),
            buffer=buffer,
            step=Step(self.meter.steps),
            reads=() if base is None else (base,),
        )

    def set_dense(self, on: bool) -> None:
        """Send all gradients exactly while `on`. Raises ValueError if others are sent: an optimizer would take one for them."""
        if on and self.behind:
            raise ValueError(
                f"send_dense(True): {self.behind} is sent its own values in place of gradients, and cannot use a gradient; "
                "expected an optimizer of torch, as in attach(model, spec)"
            )
        self.send_dense = on

    def follow_scale(self) -> None:
        """Begin a step: multiply the memories, which hold gradients times the loss scale, by the scale's change."""
        if self.grad_scaler is not None and (scale := float(self.grad_scaler.get_scale())) != self.scale:
            self.feedback.rescale(scale / self.scale)
            self.scale = scale

    # the parts of an exchange

    def _override(self, override: Override | None, x: Tensor, n: int) -> Override:
        """Return the override for `x`, of which n values are sent: the optimizer's, or one that sends `x` exactly."""
        if self.send_dense:
            return Override(DENSE, SEND_DENSE)
        return exact_where_needed(override or Override(self.gradients.codec), x, n)

    def _kept_index(self, segments: Segments, full: Tensor) -> Tensor | None:
        """Return the places in `full` that masks keep: int32 [k]; None if all of it is sent, or if `segments` do not fit it."""
        return None if self.send_dense or not _fits(segments, full) else self.feedback.masks.kept_index(segments)

    def _own_kept_index(self, segments: Segments) -> Tensor:
        """Return the places in this rank's chunk that masks keep; each chunk has the same number of segments."""
        each = len(segments) // self.world_size
        own = self.feedback.masks.kept_index(segments[self.rank * each : (self.rank + 1) * each])
        assert own is not None
        return own

    def _room(
        self, kept_index: Tensor | None, full: Tensor, m: int, payloads: int
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Return a buffer and three parts of it: for the kept values of W chunks, for those of one chunk, and for payloads."""
        each = m * full.element_size() if kept_index is not None else 0
        cuts = [0, -(-self.world_size * each // ALIGNED) * ALIGNED]
        cuts += [cuts[1] + -(-each // ALIGNED) * ALIGNED]
        if not cuts[2] and not payloads:
            return None, full[:0], full[:0], full[:0]
        buffer = self.scratch.take(cuts[2] + payloads)
        kept = buffer[cuts[1] : cuts[1] + each].view(full.dtype)
        return buffer, buffer[: self.world_size * each].view(full.dtype), kept, buffer[cuts[2] :]

    def _require_chunks(self, full: Tensor, part: Tensor) -> None:
        n, W = part.numel(), self.world_size
        if full.numel() != W * n or full.dtype != part.dtype:
            raise ValueError(
                f"{full.numel()} values of {full.dtype} do not make {W} chunks of {n} of {part.dtype}, one a rank"
            )

    def _mean(
        self, x: Tensor, op: Op | None, override: Override, plan: BucketPlan, encoder: Encoder, label: Label
    ) -> Iterator[Transfer]:
        """Return the exchange that leaves in `x` the mean, or the result of `op`."""
        if override.codec is None:
            alone = self.grad_scaler is None or self.world_size == 1
            return iter(()) if alone else all_reduce_found_inf(x, self._wire, label)
        times = 1.0 if op is None else over_mean(op, self.world_size)
        if self.world_size == 1:
            return single_rank(x, encoder, None, times)
        if op is not None and not plan.codec.lossy:
            return native_all_reduce(x, op, encoder, self._wire, label)
        exchange = plan.exchange.run(x, encoder, self._wire, label)
        return exchange if times == 1 else scaled(exchange, x, times)

    def _overridden(
        self,
        override: Override,
        x: Tensor,
        segments: Segments,
        memory: Memory,
        encoder: Encoder,
        exchange: Iterator[Transfer],
        sees_all: bool,
    ) -> Iterator[Transfer]:
        """Wrap an exchange in the optimizer's steps before and after it. If the codec encodes all of `x`, the encoder runs the
        prologue."""
        before: list[Callable[[], None]] = []
        if self.may_undo:
            before.append(partial(self.feedback.snapshot, segments, memory))
        prepare = None if override.prepare is None else partial(override.prepare, x, memory)
        if not before and prepare is None and override.finish is None:
            return exchange
        fused = encoder if sees_all and encoder.codec.lossy and self.world_size > 1 else None
        return prepared(exchange, x, before, prepare, fused, override.finish)


def _fits(segments: Segments, full: Tensor) -> bool:
    return sum(sizes(segments)) == full.numel()
