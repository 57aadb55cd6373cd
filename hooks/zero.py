"""The methods of a DeepSpeed engine, and of its ZeRO optimizer, for which ours stand in. What is not compressed is left to the
original, bit for bit, and counted."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from commpress.comm.codecs import Codec, parse
from commpress.comm.codecs.base import warm_up
from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.feedback import Memory, Segments
from commpress.comm.plan import Plan, Treatment
from commpress.comm.session import Session
from commpress.comm.shards import Pending
from commpress.hooks.owners import Layout, OneBitPartitions, Owners, Piece
from commpress.optim import OneBitAdamW
from commpress.optim.base import CompressedOptimizer, dense

BUCKET = 4 << 20
"""Values of a bucket of ZeRO 0, which DeepSpeed would send as one: while one is on the wire, the next is encoded."""
PIECE = 1 << 20
"""Values of a partition that are gathered at a time, for the same reason."""
KEPT_EVERYWHERE = "small: every rank keeps it (stage3_param_persistence_threshold)"


# --- ZeRO 0: replicas --------------------------------------------------------------------------------------------


def attach_replicas(
    engine: Any, plan: Plan, names: dict[Tensor, str], optimizer: CompressedOptimizer | None
) -> Session:
    """Stand in for an engine's mean of all gradients; at ZeRO 1 and 2 for all that shards them, too."""
    if optimizer is not None:
        if engine.zero_optimization():
            _hand_back(engine.optimizer)
        optimizer.bind({name: p for p, name in names.items()}, engine.seq_dp_world_size, may_be_unused=False)
        engine.clip_fp32_gradients = partial(_clip_means, engine.clip_fp32_gradients, optimizer)
    session = Session(
        plan.codec,
        engine.seq_data_parallel_group,
        torch.device(engine.device),
        exchange=plan.exchange,
        error_feedback=plan.error_feedback,
        parameters=tuple((name, p.numel()) for p, name in names.items()),
        optimizer=optimizer,
    )
    dense = optimizer is None and not plan.codec.lossy
    replicas = Replicas(engine.module, session)
    if engine.zero_optimization():
        _step_all(engine, replicas)
        return session
    original = engine.buffered_allreduce_fallback
    engine.buffered_allreduce_fallback = partial(replicas.count, original) if dense else replicas.average
    return session


def _clip_means(original: Callable[[], None], optimizer: CompressedOptimizer) -> None:
    """`gradient_clipping` is for mean gradients; what a compressed optimizer applies later is none."""
    if optimizer.takes_means:
        original()


def _hand_back(zero: Any) -> None:
    """Give the optimizer the parameters that it was made for. Under ZeRO 1 and 2 it has this rank's partition instead."""
    for group, parameters in zip(zero.optimizer.param_groups, zero.bit16_groups, strict=True):
        group["params"] = list(parameters)


def _step_all(engine: Any, replicas: "Replicas") -> None:
    """Have every rank of a ZeRO 1 or 2 engine keep its gradients, and step all parameters.

    What is partitioned all the same: `single_partition_of_fp32_groups`, which checkpoints hold and training does not read.
    """
    zero = engine.optimizer

    def keep(*_: Any) -> None:
        """A gradient is there: it stays where it is."""

    def exchange() -> None:
        if zero.is_gradient_accumulation_boundary():
            replicas.average()

    def step(closure: Any = None) -> None:
        if engine.gradient_clipping() > 0:
            engine.clip_fp32_gradients()
        zero.optimizer.step()

    def state_dict(original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        parts = (parts[replicas.session.rank] for parts in zero.parallel_partitioned_bit16_groups)
        for part, master in zip(parts, zero.single_partition_of_fp32_groups, strict=True):
            master.data.copy_(part)
        return original()

    zero.process_gradients = zero.reduce_ready_partitions_and_remove_grads = keep
    zero.overlapping_partition_gradients_reduce_epilogue = exchange
    zero.finalize_gradient_accumulation_boundary = replicas.average
    zero.step = step
    zero.state_dict = partial(state_dict, zero.state_dict)


@dataclass
class Bucket:
    """Parameters of one dtype whose gradients travel together in `flat`, each in the order of its own memory."""

    parameters: list[Any]
    segments: Segments
    flat: Tensor

    def parts(self) -> list[Tensor]:
        """What of `flat` is each parameter's gradient."""
        flat = self.flat.split([n for _, n in self.segments])
        return [
            part.as_strided(p.shape, p.stride(), part.storage_offset()) if dense(p) else part.view(p.shape)
            for p, part in zip(self.parameters, flat, strict=True)
        ]


@dataclass
class Replicas:
    """A model of which every rank has all, and its gradients' traffic."""

    module: nn.Module
    session: Session
    _buckets: dict[tuple[int, ...], list[Bucket]] = field(default_factory=dict)

    def average(self, grads: Any = None, elements_per_buffer: int = BUCKET) -> None:
        """Replace all gradients by their mean; a parameter without one has 0, as DeepSpeed has it."""
        trained = self._trained()
        key = tuple(id(p) for p in trained.values())
        if key not in self._buckets:
            self._buckets[key] = list(_filled(trained))
        buckets, futures = self._buckets[key], []
        for index, bucket in enumerate(buckets):
            for p, part in zip(bucket.parameters, bucket.parts(), strict=True):
                if p.grad is None:
                    part.zero_()
                elif p.grad.data_ptr() != part.data_ptr():
                    part.copy_(p.grad)
                p.grad = part
            futures.append(self.session.submit(bucket.flat, bucket.segments, index, bucket is buckets[-1]))
        for future in futures:
            future.wait()

    def count(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's own mean."""
        original(*args, **kwargs)
        meter, trained = self.session.meter, self._trained().values()
        for index, dtype in enumerate(dict.fromkeys(p.dtype for p in trained)):
            n = sum(p.numel() for p in trained if p.dtype == dtype)
            sent = ring_bytes(n * dtype.itemsize, self.session.world_size)
            meter.by_itself(index, n, named(dtype), "all_reduce", "spec is none", "gradients", sent)
        meter.steps += 1

    def _trained(self) -> dict[str, Any]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad and p.numel()}


def _filled(trained: dict[str, Any]) -> Iterator[Bucket]:
    """Buckets in the order of the parameters; one ends with the parameter that fills it."""
    for dtype in dict.fromkeys(p.dtype for p in trained.values()):
        waiting: dict[str, Any] = {}
        alike = [(name, p) for name, p in trained.items() if p.dtype == dtype]
        for name, p in alike:
            waiting[name] = p
            n = sum(q.numel() for q in waiting.values())
            if n >= BUCKET or p is alike[-1][1]:
                segments = tuple((name, q.numel()) for name, q in waiting.items())
                yield Bucket(list(waiting.values()), segments, torch.empty(n, dtype=dtype, device=p.device))
                waiting = {}


# --- ZeRO 1 and 2: partitions ------------------------------------------------------------------------------------


@dataclass
class Partitions:
    """A ZeRO 1 or 2 optimizer (`zero`) and its traffic."""

    zero: Any
    shards: Owners
    names: dict[Tensor, str]
    behind: "OneBitPartitions | None" = None
    _layouts: dict[tuple[int, ...], Layout] = field(default_factory=dict)
    _before: list[Tensor] | None = None
    """What all ranks have of this rank's partitions, while the optimizer steps."""

    def __post_init__(self) -> None:
        self._offsets = {
            id(p): (i, offset)
            for i, group in enumerate(self.zero.round_robin_bit16_groups)
            for p, offset in zip(group, self.zero.round_robin_bit16_offsets[i], strict=True)
        }

    # gradients

    def average_tensor(
        self, original: Callable[..., None], tensor: Tensor, communication_data_type: torch.dtype
    ) -> None:
        """The bucket's mean, each part on its owner; `tensor` holds its parameters' gradients one behind the other."""
        from deepspeed.accelerator import get_accelerator

        zero, bucket, device = self.zero, self.zero.ipg_buckets[communication_data_type], get_accelerator()
        if not bucket.params:
            return
        stream = zero.reduction_stream if zero.overlap_comm else device.current_stream()
        if zero.overlap_comm and not device.resolves_data_dependency():  # as the original does
            for producer in bucket.copy_streams or {device.current_stream()}:
                stream.wait_stream(producer)
            device.current_stream().wait_stream(stream)
        with device.stream(stream):
            sizes = [zero.bit16_groups[i][j].numel() for i, j, _ in bucket.params]
            if not self._reduce(tensor.split(sizes), bucket.params):
                original(tensor, communication_data_type)

    def average_apart(self, original: Callable[..., None], place: int, *args: Any, **kwargs: Any) -> None:
        """The same for gradients that have no memory in common (`contiguous_gradients` off): `args[place]`."""
        bucket = next(b for b in self.zero.ipg_buckets.values() if b.grads is args[place])
        if not self._reduce([g.view(-1) for g in bucket.grads], bucket.params):
            original(*args, **kwargs)

    def _reduce(self, gradients: Sequence[Tensor], params: Sequence[tuple[int, int, int]]) -> bool:
        """Exchange a bucket if it is to be compressed, else count it and return False."""
        if not params:
            return True
        layout = self._layout(params)
        shards, dtype = self.shards, gradients[0].dtype
        treatment = Treatment(shards.gradients.codec) if self.behind is None else self.behind.treat(layout)
        n = layout.cuts[-1]
        choice = shards.gradients.choose(n, dtype.itemsize, shards.world_size, treatment)
        crossing = self._crossing(layout, dtype.itemsize)
        parts = list(zip(layout.pieces, layout.x.split([len(piece) for piece in layout.pieces]), strict=True))
        compressed = choice.codec.lossy and not choice.reason
        if compressed or treatment.prepare is not None:
            for piece, part in parts:
                part.copy_(gradients[piece.place][piece.start : piece.stop])
        if not compressed:
            shards.meter.by_itself(layout.index, n, named(dtype), "all_reduce", choice.reason, "gradients", crossing)
            shards.reduced(layout.index)
            if treatment.prepare is not None:
                treatment.prepare(layout.x, Memory())
                for piece, part in parts:
                    gradients[piece.place][piece.start : piece.stop].copy_(part)
            return False
        known = [] if self.behind is None else self.behind.known(layout)
        shards.to_owners(
            layout.x, layout.cuts, layout.segments, layout.index, choice, treatment, crossing, known
        ).wait()
        for piece, part in parts:
            if piece.owner == shards.rank:
                zero, (_, _, param_id) = self.zero, params[piece.place]
                total = zero._get_compact_grad_partition_slice(piece.group, piece.owner, param_id, len(piece))
                zero._add_to_grad_partition_buffer(total, part)
                gradients[piece.place][piece.start : piece.stop].copy_(part)
        return True

    def _crossing(self, layout: Layout, itemsize: int) -> int:
        """What DeepSpeed would send: it all-reduces, whoever owns what, unless told otherwise."""
        zero, cuts, me = self.zero, layout.cuts, self.shards.rank
        if zero.reduce_scatter and zero.contiguous_gradients and not zero.use_multi_rank_bucket_allreduce:
            return (cuts[-1] - cuts[me + 1] + cuts[me]) * itemsize
        return ring_bytes(cuts[-1] * itemsize, self.shards.world_size)

    def _layout(self, params: Sequence[tuple[int, int, int]]) -> Layout:
        key = tuple(param_id for _, _, param_id in params)
        if key not in self._layouts:
            pieces = [
                piece
                for place, (i, j, _) in enumerate(params)
                for piece in self._pieces(self.zero.bit16_groups[i][j], place)
            ]
            pieces.sort(key=lambda piece: piece.owner)
            cuts = [sum(len(p) for p in pieces if p.owner < r) for r in range(self.shards.world_size + 1)]
            x = torch.empty(cuts[-1], dtype=torch.float32, device=self.shards.device)
            segments = tuple((piece.name, len(piece)) for piece in pieces)
            self._layouts[key] = Layout(len(self._layouts), pieces, segments, cuts, x)
        return self._layouts[key]

    def _pieces(self, p: Tensor, place: int) -> Iterator[Piece]:
        group, offset = self._offsets[id(p)]
        size, n = int(self.zero.partition_size[group]), p.numel()
        for owner in range(offset // size, (offset + n - 1) // size + 1):
            start, stop = max(0, owner * size - offset), min(n, (owner + 1) * size - offset)
            name = self.names[p] if stop - start == n else f"{self.names[p]}[{start}:{stop}]"
            yield Piece(name, owner, place, start, stop, group, offset + start)

    # parameters

    def step(self, original: Callable[..., None], closure: Any = None) -> None:
        """The owners' step, and what follows it."""
        clip, means = self.zero.clip_grad, self.behind is None or self.behind.optimizer.takes_means
        mine = [partitions[self.shards.rank] for partitions in self.zero.parallel_partitioned_bit16_groups]
        # the step overwrites them
        self._before = [part.clone() for part in mine] if self.shards.parameters.codec.lossy else mine
        try:
            if not means:
                self.zero.clip_grad = 0.0  # these are no gradients
            original(closure)
        finally:
            self._before = None
            self.zero.clip_grad = clip

    def gather(self, original: Callable[..., None], **arguments: Any) -> None:
        """Bring all ranks' parameters to the owners' new values, or near to them."""
        zero, shards, size = self.zero, self.shards, self.zero.bit16_groups_flat[0].element_size()
        codec, reason = shards.parameters.codec, ""
        if self.behind is not None:
            codec, reason = self.behind.parameters(codec)
        if shards.world_size == 1:
            reason = "one rank: nothing to send"
        elif not codec.lossy:
            reason = reason or "spec is none"
        elif codec.nbytes(PIECE) >= PIECE * size:
            reason = f"payload would be no smaller than {size} bytes a value"
        if self._before is not None and not reason:
            self._differences(codec)
            return
        for i, (flat, master) in enumerate(
            zip(zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True)
        ):
            zero.parallel_partitioned_bit16_groups[i][shards.rank].copy_(master.data)
            if self._before is not None:  # else it is not a step that asks for it
                sent = (shards.world_size - 1) * master.numel() * size
                shards.meter.by_itself(i, flat.numel(), named(flat.dtype), "gather", reason, "parameters", sent)
        original(**arguments)

    def _differences(self, codec: Codec) -> None:
        """Send what was stepped minus what all ranks have of it, in pieces, and add what was decoded."""
        zero, shards, index = self.zero, self.shards, 0
        assert self._before is not None
        ahead: list[tuple[Pending, Tensor, Tensor, int, int]] = []
        for i, flat in enumerate(zero.bit16_groups_flat):
            rows = flat.view(shards.world_size, -1)
            rows[shards.rank].copy_(self._before[i])
            stepped, start = zero.single_partition_of_fp32_groups[i].detach(), 0
            for new, old, place in zip(
                stepped.split(PIECE), self._before[i].split(PIECE), rows.split(PIECE, dim=1), strict=True
            ):
                out = torch.empty(place.shape, dtype=torch.float32, device=place.device)
                difference = new.float() - old.float()
                pending = shards.differences(difference, out.view(-1), index, codec, flat.element_size())
                ahead.append((pending, out, place, i, start))
                index, start = index + 1, start + PIECE
                if len(ahead) > 2:
                    self._arrive(*ahead.pop(0))
        for piece in ahead:
            self._arrive(*piece)
        for i, flat in enumerate(zero.bit16_groups_flat):
            stop = 0
            for p, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
                flat[stop:offset].zero_()  # what aligns them is no parameter, and in no checkpoint
                stop = offset + p.numel()
            flat[stop:].zero_()

    def _arrive(self, pending: Pending, out: Tensor, place: Tensor, group: int, start: int) -> None:
        pending.wait()
        place.add_(out)
        if self.behind is not None:
            self.behind.learn(group, start, out)


_GATHERS: "weakref.WeakValueDictionary[int, Partitions]" = weakref.WeakValueDictionary()
"""Who gathers the parameters of which optimizer, by the id of its list of flat parameters."""


def attach_partitions(engine: Any, shards: Owners, names: dict[Tensor, str], optimizer: OneBitAdamW | None) -> None:
    """Stand in for what a ZeRO 1 or 2 optimizer sends."""
    from deepspeed.runtime.zero import stage_1_and_2

    zero = engine.optimizer
    partitions = Partitions(zero, shards, names)
    if optimizer is not None:
        partitions.behind = OneBitPartitions(optimizer, zero, shards)
        warm_up(parse(optimizer.param_groups[0]["warmup_spec"]), shards.device)
        zero._optimizer_step = partial(partitions.behind.step, zero._optimizer_step)
    zero.average_tensor = partial(partitions.average_tensor, zero.average_tensor)
    apart = partitions.average_apart
    zero.buffered_reduce_fallback = partial(apart, zero.buffered_reduce_fallback, 1)
    zero._buffered_reduce_fallback_preserving_fp32 = partial(apart, zero._buffered_reduce_fallback_preserving_fp32, 0)
    zero.step = partial(partitions.step, zero.step)
    _GATHERS[id(zero.bit16_groups_flat)] = partitions
    if not hasattr(stage_1_and_2.all_gather_dp_groups, "commpress"):
        # a function of DeepSpeed's module: there is no object of the engine's to stand in for
        stage_1_and_2.all_gather_dp_groups = _gathering(stage_1_and_2.all_gather_dp_groups)


def _gathering(original: Callable[..., None]) -> Callable[..., None]:
    def all_gather_dp_groups(groups_flat: Any, **arguments: Any) -> None:
        ours = partial(original, groups_flat=groups_flat)
        if (partitions := _GATHERS.get(id(groups_flat))) is None:
            ours(**arguments)
        else:
            partitions.gather(ours, **arguments)

    all_gather_dp_groups.commpress = True  # type: ignore[attr-defined]
    return all_gather_dp_groups


# --- ZeRO 3: parameters that come and go -------------------------------------------------------------------------


@dataclass
class Gathered:
    """A ZeRO 3 optimizer (`zero`) and its traffic."""

    zero: Any
    module: nn.Module
    shards: Owners
    names: dict[Tensor, str]
    _indices: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = {id(p): i for i, p in enumerate(self.module.parameters())}

    def reduce(
        self, original: Callable[..., list[Tensor]], params: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """This rank's part of the mean gradient of each parameter."""
        values = sum(p.partition_numel() for p in params) * (self.shards.world_size - 1)
        if self.shards.device.type == "cpu":
            values *= 2  # Gloo all-reduces and keeps a part
        crossing = values * communication_data_type.itemsize
        return self._reduce(params, lambda: original(params, communication_data_type), "reduce_scatter", crossing)

    def reduce_contiguous(
        self, original: Callable[..., list[Tensor]], buffer: Tensor, communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """The same where the gradients lie one behind the other in `buffer` (`reduce_scatter` off)."""
        params = list(self.zero.ipg_buckets[communication_data_type].params)
        crossing = ring_bytes(buffer.numel() * communication_data_type.itemsize, self.shards.world_size)
        return self._reduce(params, lambda: original(buffer, communication_data_type), "all_reduce", crossing)

    def _reduce(self, params: list[Any], original: Callable[[], list[Tensor]], how: str, crossing: int) -> list[Tensor]:
        shards, W = self.shards, self.shards.world_size
        sizes = [p.partition_numel() for p in params]
        m, dtype = sum(sizes), params[0].grad.dtype
        index = self._indices.setdefault(tuple(self._places[id(p)] for p in params), len(self._indices))
        choice = shards.gradients.choose(m, dtype.itemsize, W)
        if choice.reason or not choice.codec.lossy:
            shards.meter.by_itself(index, W * m, named(dtype), how, choice.reason, "gradients", crossing)
            shards.reduced(index)
            return original()
        full = torch.zeros(W, m, dtype=dtype, device=params[0].grad.device)
        for p, size, columns in zip(params, sizes, full.split(sizes, dim=1), strict=True):
            flat, rest = p.grad.reshape(-1), p.ds_numel % size
            whole = p.ds_numel // size
            columns[:whole].copy_(flat[: whole * size].view(whole, size))
            if rest:
                columns[whole, :rest].copy_(flat[whole * size :])
        out = torch.empty(m, dtype=dtype, device=full.device)
        segments = tuple((f"{self.names[p]}[{r}]", n) for r in range(W) for p, n in zip(params, sizes, strict=True))
        shards.reduce_scatter(full.view(-1), out, segments, index).wait()
        return [
            part[: max(0, min(size, p.ds_numel - shards.rank * size))].to(self.zero.gradient_accumulation_dtype)
            for p, size, part in zip(params, sizes, out.split(sizes), strict=True)
        ]

    def gather(self, original: Callable[..., Any], params: Any, safe_mode: bool = False, quantize: bool = False) -> Any:
        """Start to gather parameters. Each is coded for itself: what is decoded does not depend on which come together."""
        from deepspeed.runtime.zero.partition_parameters import (
            AllGatherHandle,
            MultipleAllGatherHandles,
            ZeroParamStatus,
        )

        shards, W = self.shards, self.shards.world_size
        handles, exact = [], []
        for p in sorted(params, key=lambda p: p.ds_id):
            shard = p.ds_tensor
            choice = shards.parameters.choose(shard.ds_numel, shard.element_size(), W)
            if p.ds_persist or choice.reason or not choice.codec.lossy:
                exact.append(p)
                self._note(p, choice.reason or KEPT_EVERYWHERE)
                continue
            if p.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(p.ds_summary())
            p.ds_status = ZeroParamStatus.INFLIGHT
            out = torch.empty(W * shard.ds_numel, dtype=shard.dtype, device=shard.device)
            pending = shards.all_gather(self._own(p), out, self._places[id(p)])
            handles.append(AllGatherHandle(pending, p, param_buffer=out, original_dtype=shard.dtype))
        if exact:
            handles.append(original(exact, safe_mode=safe_mode, quantize=quantize))
        return handles[0] if len(handles) == 1 else MultipleAllGatherHandles(handles)

    def _own(self, p: Any) -> Tensor:
        """This rank's part of a parameter. What pads it was never written, and would be in the scale of a block."""
        part: Tensor = p.ds_tensor.detach()
        real = p.ds_numel - self.shards.rank * part.numel()
        if real >= part.numel():
            return part
        padded = torch.zeros_like(part)
        if real > 0:
            padded[:real].copy_(part[:real])
        return padded

    def gather_whole(self, original: Callable[..., Any], p: Any, param_list: Any = None, **settings: Any) -> Any:
        """Parameters that are read, not computed with: DeepSpeed's own, exact."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        kept = param_list is not None and param_list is self.zero.persistent_parameters
        for q in [p] if param_list is None else param_list:
            if q.ds_status == ZeroParamStatus.AVAILABLE and not q.ds_persist and not q.ds_active_sub_modules:
                q.partition()  # a forward without a backward has left what was decoded
            if q.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                self._note(q, KEPT_EVERYWHERE if kept else "read as a whole, and exact")
        return original(param_list, **settings)

    def _note(self, p: Any, reason: str) -> None:
        n, dtype, others = p.ds_tensor.ds_numel, p.ds_tensor.dtype, self.shards.world_size - 1
        reason = reason if self.shards.parameters.codec.lossy else "spec is none"
        sent = others * n * dtype.itemsize
        self.shards.meter.by_itself(
            self._places[id(p)], (others + 1) * n, named(dtype), "gather", reason, "parameters", sent
        )


def attach_gathered(engine: Any, shards: Owners, names: dict[Tensor, str]) -> None:
    """Stand in for what a ZeRO 3 optimizer sends."""
    zero = engine.optimizer
    gathered = Gathered(zero, engine.module, shards, names)
    mangled = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter"
    setattr(zero, f"{mangled}_grads", partial(gathered.reduce, getattr(zero, f"{mangled}_grads")))
    contiguous = partial(gathered.reduce_contiguous, getattr(zero, f"{mangled}_contiguous_grads"))
    setattr(zero, f"{mangled}_contiguous_grads", contiguous)
    for p in engine.module.parameters():
        p.all_gather_coalesced = partial(gathered.gather, p.all_gather_coalesced)
        p.all_gather = partial(gathered.gather_whole, p.all_gather, p)


def named(dtype: torch.dtype) -> str:
    """As a report has it."""
    return str(dtype).removeprefix("torch.")
