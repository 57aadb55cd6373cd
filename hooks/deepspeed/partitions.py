"""ZeRO 1 and 2: each rank steps a part of the parameters. Uncompressed traffic is left to DeepSpeed, and counted."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from commpress.comm.codecs import Codec, parse
from commpress.comm.coding import warm_up
from commpress.comm.collectives import MEAN, SEND_DENSE, Collectives
from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.feedback import Memory
from commpress.comm.masks_index import MaskIndex, require_shapes
from commpress.comm.meter import SPEC_IS_NONE, dtype_name
from commpress.comm.owned_slices import OwnedBucket, OwnedSlice
from commpress.comm.plan import DENSE, Override
from commpress.comm.segments import Segment
from commpress.comm.sharded_auto import ShardedAuto
from commpress.comm.work import Work
from commpress.hooks.deepspeed.auto import timed
from commpress.hooks.deepspeed.masks import Holding, Part, pack_piece, unpacked, zero_pruned
from commpress.optim import EF21Muon, OneBitAdamW
from commpress.optim.sharded_muon import Matrix, ShardedMuon
from commpress.optim.sharded_one_bit import ShardedOneBitAdamW, shifted

PIECE = 1 << 20
"""Values of a partition that are gathered at a time: while one piece is on the wire, the next is encoded."""


@dataclass
class Partitions:
    """A ZeRO 1 or 2 optimizer (`zero`) and its traffic."""

    zero: Any
    shards: Collectives
    names: dict[Tensor, str]
    sharded: ShardedOneBitAdamW | None = None
    auto: ShardedAuto | None = None
    coded: str = ""
    """The name of the optimizer whose momentum is sent, if there is one."""
    muon: ShardedMuon | None = None
    """The matrices of an EF21Muon."""
    _layouts: dict[tuple[int, ...], OwnedBucket] = field(default_factory=dict)
    _masks: MaskIndex | None = None
    """The masks by which layouts were made."""
    _before: list[Tensor] | None = None
    """While the optimizer steps: the values of this rank's partitions that all ranks hold."""

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
        """Average a bucket, each part on its owner. `tensor` holds the gradients of its parameters, contiguous."""
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
                timed(self.auto, "gradients", original)(tensor, communication_data_type)

    def average_apart(self, original: Callable[..., None], place: int, *args: Any, **kwargs: Any) -> None:
        """Reduce gradients that have no memory in common (`contiguous_gradients` off): `args[place]`."""
        bucket = next(b for b in self.zero.ipg_buckets.values() if b.grads is args[place])
        if not self._reduce([g.view(-1) for g in bucket.grads], bucket.params):
            timed(self.auto, "gradients", original)(*args, **kwargs)

    def _reduce(self, gradients: Sequence[Tensor], params: Sequence[tuple[int, int, int]]) -> bool:
        """Exchange a bucket and return True if it is compressed; else count it and return False."""
        if not params:
            return True
        layout = self._layout(params)
        shards, dtype, masks = self.shards, gradients[0].dtype, self.shards.feedback.masks
        override = Override(shards.gradients.codec) if self.sharded is None else self.sharded.override(layout)
        if shards.send_dense:
            override = Override(DENSE, SEND_DENSE)
        else:
            zero_pruned(layout.pieces, gradients, masks)
        n = layout.whole[-1]
        if self.auto is not None:
            self.auto.note("gradients", n, dtype.itemsize)
        choice = shards.gradients.choose(layout.cuts[-1], dtype.itemsize, shards.world_size, override)
        crossing = self._crossing(layout, dtype.itemsize)
        parts = list(zip(layout.pieces, layout.x.split(layout.kept), strict=True))
        compressed = choice.codec.lossy and not choice.reason
        if compressed or override.prepare is not None:
            for piece, part in parts:
                pack_piece(gradients[piece.place][piece.start : piece.stop], piece, masks, part)
        if not compressed:
            shards.meter.record_uncompressed(
                layout.index, n, dtype_name(dtype), "all_reduce", choice.reason, "gradients", crossing
            )
            shards.traffic.count(layout.index)
            if self.auto is not None:
                self._add_residual(layout, gradients)
            if override.prepare is not None:
                override.prepare(layout.x, Memory())
                for piece, part in parts:
                    gradients[piece.place][piece.start : piece.stop].copy_(part)
            return False
        me = shards.rank
        own = slice(layout.cuts[me], layout.cuts[me + 1])
        if self.sharded is not None:
            override = shifted(override, self.sharded.shifts(layout), own)
        needed = (n - layout.whole[me + 1] + layout.whole[me]) * dtype.itemsize
        shards.reduce_scatter(
            *(layout.x, layout.x[own], layout.segments, layout.index, MEAN),
            cuts=layout.cuts,
            plan=choice,
            override=override,
            dense_bytes=needed,
            backend_bytes=crossing,
        ).wait()
        for piece, part in parts:
            if piece.owner == shards.rank:
                zero, (_, _, param_id) = self.zero, params[piece.place]
                mean = unpacked(part, piece, masks)
                total = zero._get_compact_grad_partition_slice(piece.group, piece.owner, param_id, len(piece))
                zero._add_to_grad_partition_buffer(total, mean)
                gradients[piece.place][piece.start : piece.stop].copy_(mean)
        return True

    def _add_residual(self, layout: OwnedBucket, gradients: Sequence[Tensor]) -> None:
        """Add the residual of a lossy codec to the gradients, which are sent exactly now, and clear it."""
        memory = self.shards.feedback.memory(layout.segments, False, None, self.shards.device)
        if memory.residual is None:
            return
        for piece, part in zip(layout.pieces, memory.residual.split(layout.kept), strict=True):
            gradients[piece.place][piece.start : piece.stop].add_(unpacked(part, piece, self.shards.feedback.masks))
        memory.residual = None

    def _crossing(self, layout: OwnedBucket, itemsize: int) -> int:
        """Return the bytes that DeepSpeed would send: unless set otherwise it all-reduces, whoever owns the parts."""
        zero, cuts, me = self.zero, layout.whole, self.shards.rank
        if zero.reduce_scatter and zero.contiguous_gradients and not zero.use_multi_rank_bucket_allreduce:
            return (cuts[-1] - cuts[me + 1] + cuts[me]) * itemsize
        return ring_bytes(cuts[-1] * itemsize, self.shards.world_size)

    def _layout(self, params: Sequence[tuple[int, int, int]]) -> OwnedBucket:
        masks = self.shards.feedback.masks
        if masks is not self._masks:
            self._layouts.clear()
            self._masks = masks
        key, W = tuple(param_id for _, _, param_id in params), self.shards.world_size
        if key not in self._layouts:
            pieces = [
                piece
                for place, (i, j, _) in enumerate(params)
                for piece in self._pieces(self.zero.bit16_groups[i][j], place)
            ]
            pieces.sort(key=lambda piece: piece.owner)
            kept = [masks.count(piece.name, len(piece)) for piece in pieces]
            cuts, whole = (
                [sum(n for n, p in zip(counts, pieces, strict=True) if p.owner < r) for r in range(W + 1)]
                for counts in (kept, [len(piece) for piece in pieces])
            )
            x = torch.empty(cuts[-1], dtype=torch.float32, device=self.shards.device)
            segments = tuple(Segment(piece.name, len(piece)) for piece in pieces)
            self._layouts[key] = OwnedBucket(len(self._layouts), pieces, segments, cuts, x, whole, kept)
        return self._layouts[key]

    def _pieces(self, p: Tensor, place: int) -> Iterator[OwnedSlice]:
        group, offset = self._offsets[id(p)]
        size, n = int(self.zero.partition_size[group]), p.numel()
        for owner in range(offset // size, (offset + n - 1) // size + 1):
            start, stop = max(0, owner * size - offset), min(n, (owner + 1) * size - offset)
            name = self.names[p] if stop - start == n else f"{self.names[p]}[{start}:{stop}]"
            yield OwnedSlice(name, owner, place, start, stop, group, offset + start)

    def mask_index(self, masks: Mapping[str, Tensor]) -> MaskIndex:
        """Return the index of the values that masks keep. Raises ValueError for a mask that does not fit, and for any under an
        optimizer whose momentum is sent."""
        if self.coded and masks:
            raise ValueError(
                f"masks: {self.coded} sends a momentum of all values where it is sharded; expected a torch optimizer, or "
                f"{self.coded} under DistributedDataParallel"
            )
        of = {self.names[p]: p for p in self._stepped()}
        require_shapes(masks, {name: p.shape for name, p in of.items()})
        parts: dict[str, Tensor] = {}
        for name, mask in masks.items():
            parts |= {piece.name: mask.reshape(-1)[piece.start : piece.stop] for piece in self._pieces(of[name], 0)}
        return MaskIndex(parts)

    def holding(self) -> Holding:
        """Return where this rank steps the values of each parameter."""
        zero, me = self.zero, self.shards.rank
        parts: dict[Tensor, list[Part]] = {}
        for p in self._stepped():
            parts[p] = []
            for piece in self._pieces(p, 0):
                if piece.owner == me:
                    flat, at = zero.single_partition_of_fp32_groups[piece.group], self._place(piece)
                    parts[p].append((flat, slice(at, at + len(piece)), slice(piece.start, piece.stop)))
        return Holding(zero.optimizer, parts)

    def _stepped(self) -> list[Tensor]:
        """The parameters that the optimizer has."""
        return [p for p in self.names if id(p) in self._offsets]

    def _place(self, piece: OwnedSlice) -> int:
        """Where a piece begins in its owner's partition."""
        return piece.at - piece.owner * int(self.zero.partition_size[piece.group])

    def matrices(self, groups: set[int]) -> Iterator[Matrix]:
        """Yield the parameters of these groups as matrices, with the cut of their values over the ranks."""
        ranks, me = range(self.shards.world_size), self.shards.rank
        for i in sorted(groups):
            for p in self.zero.round_robin_bit16_groups[i]:
                pieces = {piece.owner: piece for piece in self._pieces(p, 0)}
                lengths = tuple(len(pieces[r]) if r in pieces else 0 for r in ranks)
                at = self._place(pieces[me]) if me in pieces else 0
                yield Matrix(self.names[p], tuple(p.shape), (p.numel(),), 0, lengths, _partition(i), at)

    # parameters

    def step(self, original: Callable[..., None], closure: Any = None) -> None:
        """Take the owners' step; the gather of the new parameters happens inside."""
        clip, means = self.zero.clip_grad, self.sharded is None or self.sharded.optimizer.takes_means
        mine = [partitions[self.shards.rank] for partitions in self.zero.parallel_partitioned_bit16_groups]
        # a copy, because the step overwrites the values
        self._before = [part.clone() for part in mine] if self.shards.parameters.codec.lossy else mine
        try:
            if not means:
                self.zero.clip_grad = 0.0  # what arrived are updates, not gradients
            original(closure)
        finally:
            self._before = None
            self.zero.clip_grad = clip

    def gather(self, original: Callable[..., None], **arguments: Any) -> None:
        """Bring all ranks' parameters to the owners' new values: exactly, or by the spec of the parameters."""
        zero, shards, size = self.zero, self.shards, self.zero.bit16_groups_flat[0].element_size()
        codec, reason = shards.parameters.codec, ""
        if self.sharded is not None:
            codec, reason = self.sharded.parameters(codec)
        if self.auto is not None and self._before is not None:
            for part in self._before:
                self.auto.note("parameters", part.numel(), size)
        if shards.world_size == 1:
            reason = "one rank: nothing to send"
        elif not codec.lossy:
            reason = reason or SPEC_IS_NONE
        elif codec.nbytes(PIECE) >= PIECE * size:
            reason = f"payload would be no smaller than {size} bytes a value"
        if self._before is not None and not reason:
            self._differences(codec)
            return
        for i, (flat, master) in enumerate(
            zip(zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True)
        ):
            zero.parallel_partitioned_bit16_groups[i][shards.rank].copy_(master.data)
            if self._before is not None:  # else this is not a step (DeepSpeed also gathers when it loads a state)
                sent = (shards.world_size - 1) * master.numel() * size
                shards.meter.record_uncompressed(
                    i, flat.numel(), dtype_name(flat.dtype), "all_gather", reason, "parameters", sent
                )
        timed(self.auto, "parameters", original)(**arguments)

    def _differences(self, codec: Codec) -> None:
        """Send the stepped values minus those that all ranks hold, in pieces, and add the decoded differences."""
        zero, shards, index = self.zero, self.shards, 0
        assert self._before is not None
        ahead: list[tuple[Work, Tensor, Tensor, int, int]] = []
        for i, flat in enumerate(zero.bit16_groups_flat):
            rows = flat.view(shards.world_size, -1)
            rows[shards.rank].copy_(self._before[i])
            stepped, start = zero.single_partition_of_fp32_groups[i].detach(), 0
            for new, old, place in zip(
                stepped.split(PIECE), self._before[i].split(PIECE), rows.split(PIECE, dim=1), strict=True
            ):
                out = torch.empty(place.shape, dtype=torch.float32, device=place.device)
                difference = new.float() - old.float()
                pending = shards.all_gather(difference, out.view(-1), index, codec=codec, itemsize=flat.element_size())
                ahead.append((pending, out, place, i, start))
                index, start = index + 1, start + PIECE
                if len(ahead) > 2:
                    self._arrive(*ahead.pop(0))
        for piece in ahead:
            self._arrive(*piece)
        for i, flat in enumerate(zero.bit16_groups_flat):
            stop = 0
            for p, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
                flat[stop:offset].zero_()  # padding for alignment: it belongs to no parameter, and to no checkpoint
                stop = offset + p.numel()
            flat[stop:].zero_()
        for p in self._stepped():  # a coarse code of 0 may be another value
            zero_pruned(list(self._pieces(p, 0)), [p.detach().view(-1)], shards.feedback.masks)

    def _arrive(self, pending: Work, out: Tensor, place: Tensor, group: int, start: int) -> None:
        pending.wait()
        place.add_(out)
        if self.sharded is not None:
            self.sharded.estimate_momentum(group, start, out)


_GATHERS: "weakref.WeakValueDictionary[int, Partitions]" = weakref.WeakValueDictionary()
"""The partitions that gather the parameters of an optimizer, by the id of its list of flat parameters."""


def attach_partitions(
    engine: Any,
    shards: Collectives,
    names: dict[Tensor, str],
    optimizer: OneBitAdamW | EF21Muon | None,
    momentum: Codec | None,
    auto: ShardedAuto | None = None,
) -> Partitions:
    """Replace the methods by which a ZeRO 1 or 2 optimizer sends. `momentum` is the codec of an EF21Muon's momentum."""
    from deepspeed.runtime.zero import stage_1_and_2

    zero = engine.optimizer
    partitions = Partitions(zero, shards, names, auto=auto, coded="" if optimizer is None else type(optimizer).__name__)
    if isinstance(optimizer, EF21Muon):
        assert momentum is not None
        _shard_muon(optimizer, partitions, momentum)
    elif optimizer is not None:
        shards.behind = type(optimizer).__name__
        partitions.sharded = ShardedOneBitAdamW(
            optimizer,
            shards,
            lambda: list(zero.single_partition_of_fp32_groups),
            zero.dp_process_group,
            lambda: setattr(zero, "_hp_optimizer_states_linked", False),
        )
        warm_up(parse(optimizer.param_groups[0]["warmup_spec"]), shards.device)
        zero._optimizer_step = partial(_step_group, zero, partitions.sharded)
    zero.average_tensor = partial(partitions.average_tensor, zero.average_tensor)
    apart = partitions.average_apart
    zero.buffered_reduce_fallback = partial(apart, zero.buffered_reduce_fallback, 1)
    zero._buffered_reduce_fallback_preserving_fp32 = partial(apart, zero._buffered_reduce_fallback_preserving_fp32, 0)
    zero.step = partial(partitions.step, zero.step)
    _GATHERS[id(zero.bit16_groups_flat)] = partitions
    if not hasattr(stage_1_and_2.all_gather_dp_groups, "commpress"):
        # a function of DeepSpeed's module: no object of the engine holds it, so it is replaced for all engines
        stage_1_and_2.all_gather_dp_groups = _gathering(stage_1_and_2.all_gather_dp_groups)
    return partitions


def _partition(group: int) -> str:
    return f"partition of group {group}"


def _shard_muon(optimizer: EF21Muon, partitions: Partitions, momentum: Codec) -> None:
    """Have an EF21Muon step all partitions when DeepSpeed steps the last of its groups."""
    zero, shards = partitions.zero, partitions.shards
    flats = list(zero.single_partition_of_fp32_groups)
    holders = {_partition(i): flat for i, flat in enumerate(flats)}
    optimizer.bind(holders, shards.world_size, may_be_unused=True)
    hidden = {i for i, group in enumerate(optimizer.param_groups) if group["muon"]}
    partitions.muon = ShardedMuon(optimizer, shards, list(partitions.matrices(hidden)), holders, momentum)
    optimizer.hold_shards(partitions.muon)
    gradients: list[Tensor] = []

    def step(group: int) -> None:
        gradients.append(flats[group].grad)  # DeepSpeed removes it before it comes to the next group
        if group < len(flats) - 1:
            return
        for flat, gradient in zip(flats, gradients, strict=True):
            flat.grad = gradient
        gradients.clear()
        optimizer.step()
        for flat in flats:
            flat.grad = None
        zero._lazy_init_hp_params_optimizer_state()

    zero._optimizer_step = step


def _step_group(zero: Any, optimizer: ShardedOneBitAdamW, group: int) -> None:
    """Replace DeepSpeed's step of one group: all groups step with the last."""
    if optimizer.step(group):
        zero._lazy_init_hp_params_optimizer_state()


def _gathering(original: Callable[..., None]) -> Callable[..., None]:
    def all_gather_dp_groups(groups_flat: Any, **arguments: Any) -> None:
        ours = partial(original, groups_flat=groups_flat)
        if (partitions := _GATHERS.get(id(groups_flat))) is None:
            ours(**arguments)
        else:
            partitions.gather(ours, **arguments)

    all_gather_dp_groups.commpress = True  # type: ignore[attr-defined]
    return all_gather_dp_groups
