"""ZeRO 3: parameters are gathered before use and freed after it. Uncompressed ones are left to DeepSpeed, and counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from commpress.comm.collectives import SEND_DENSE, Collectives
from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.masks_index import MaskIndex, require_shapes, unpack, zero_others
from commpress.comm.meter import SPEC_IS_NONE, dtype_name
from commpress.comm.plan import DENSE, Override
from commpress.comm.segments import Segment, Segments, sizes
from commpress.comm.sharded_auto import ShardedAuto
from commpress.hooks.deepspeed.auto import TimedHandle, timed
from commpress.hooks.deepspeed.masks import Holding, Part

KEPT_EVERYWHERE = "small: every rank keeps it (stage3_param_persistence_threshold)"


@dataclass
class Gathered:
    """A ZeRO 3 optimizer (`zero`) and its traffic."""

    zero: Any
    module: nn.Module
    shards: Collectives
    names: dict[Tensor, str]
    auto: ShardedAuto | None = None
    _indices: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = {id(p): i for i, p in enumerate(self.module.parameters())}

    def reduce(
        self, original: Callable[..., list[Tensor]], params: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """Return this rank's part of the mean gradient of each parameter."""
        values = sum(p.partition_numel() for p in params) * (self.shards.world_size - 1)
        if self.shards.device.type == "cpu":
            values *= 2  # on Gloo a reduce_scatter is an all_reduce of which each rank keeps a part
        crossing = values * communication_data_type.itemsize
        return self._reduce(params, lambda: original(params, communication_data_type), "reduce_scatter", crossing)

    def reduce_contiguous(
        self, original: Callable[..., list[Tensor]], buffer: Tensor, communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """Return what `reduce` returns, for gradients that are contiguous in `buffer` (`reduce_scatter` off)."""
        params = list(self.zero.ipg_buckets[communication_data_type].params)
        crossing = ring_bytes(buffer.numel() * communication_data_type.itemsize, self.shards.world_size)
        return self._reduce(params, lambda: original(buffer, communication_data_type), "all_reduce", crossing)

    def _reduce(self, params: list[Any], original: Callable[[], list[Tensor]], how: str, crossing: int) -> list[Tensor]:
        shards, W = self.shards, self.shards.world_size
        sizes = [p.partition_numel() for p in params]
        m, dtype = sum(sizes), params[0].grad.dtype
        index = self._indices.setdefault(tuple(self._places[id(p)] for p in params), len(self._indices))
        if self.auto is not None:
            self.auto.note("gradients", W * m, dtype.itemsize)
        segments = self._segments(params)
        override = Override(DENSE, SEND_DENSE) if shards.send_dense else None
        if override is None:
            self._zero_pruned(params)
        choice = shards.gradients.choose(m, dtype.itemsize, W, override)
        if choice.reason or not choice.codec.lossy:
            shards.meter.record_uncompressed(index, W * m, dtype_name(dtype), how, choice.reason, "gradients", crossing)
            shards.traffic.count(index)
            if self.auto is not None:
                self._add_residual(params, segments)
            return timed(self.auto, "gradients", original)()  # type: ignore[no-any-return]
        full = torch.zeros(W, m, dtype=dtype, device=params[0].grad.device)
        for p, size, columns in zip(params, sizes, full.split(sizes, dim=1), strict=True):
            flat, rest = p.grad.reshape(-1), p.ds_numel % size
            whole = p.ds_numel // size
            columns[:whole].copy_(flat[: whole * size].view(whole, size))
            if rest:
                columns[whole, :rest].copy_(flat[whole * size :])
        out = torch.empty(m, dtype=dtype, device=full.device)
        shards.reduce_scatter(full.view(-1), out, segments, index).wait()
        return [
            part[: max(0, min(size, p.ds_numel - shards.rank * size))].to(self.zero.gradient_accumulation_dtype)
            for p, size, part in zip(params, sizes, out.split(sizes), strict=True)
        ]

    def _segments(self, params: list[Any]) -> Segments:
        """Return the shards of these parameters: rank 0's, then rank 1's, and so on. Empty for one that is not trained."""
        ranks = range(self.shards.world_size)
        if any(p not in self.names for p in params):
            return ()
        return tuple(Segment(f"{self.names[p]}[{r}]", p.partition_numel()) for r in ranks for p in params)

    def _zero_pruned(self, params: list[Any]) -> None:
        for p in params:
            for r in range(self.shards.world_size):
                if (places := self.shards.feedback.masks.places(f"{self.names[p]}[{r}]")) is not None:
                    p.grad.data = p.grad.data.contiguous()
                    n = p.partition_numel()
                    zero_others(p.grad.view(-1)[r * n : (r + 1) * n], places)

    def mask_index(self, masks: Mapping[str, Tensor]) -> MaskIndex:
        """Return the index of the values that masks keep: all ranks' shards of a parameter send equally many. Raises ValueError
        for a mask that does not fit."""
        W = self.shards.world_size
        of: dict[str, Any] = {name: p for p, name in self.names.items()}
        require_shapes(masks, {name: p.ds_shape for name, p in of.items()})
        parts, together = dict[str, Tensor](), list[list[str]]()
        for name, mask in masks.items():
            padded = torch.zeros(W * of[name].partition_numel(), dtype=torch.bool, device=mask.device)
            padded[: mask.numel()] = mask.reshape(-1)
            own = {f"{name}[{r}]": chunk for r, chunk in enumerate(padded.view(W, -1))}
            parts |= own
            together.append(list(own))
        return MaskIndex(parts, together)

    def holding(self) -> Holding:
        """Return where this rank steps the values of each parameter, and the shards that are gathered."""
        zero, parts, copies = self.zero, dict[Tensor, list[Part]](), dict[Tensor, list[Part]]()
        p: Any
        for p in self.names:
            place = zero.grad_position.get(zero.get_param_id(p))
            if place is None:
                continue  # no optimizer has it
            group, at, n = place
            start = min(self.shards.rank * n, p.ds_numel)
            values = slice(start, min(start + n, p.ds_numel))
            own = values.stop - values.start
            parts[p] = [(zero.fp32_partitioned_groups_flat[group], slice(at, at + own), values)] if own else []
            copies[p] = [(p.ds_tensor, slice(0, own), values)] if own else []
        return Holding(zero.optimizer, parts, copies, list(self.module.parameters()))

    def _add_residual(self, params: list[Any], segments: Segments) -> None:
        """Add the residual of a lossy codec to the gradients, which are sent exactly now, and clear it."""
        memory = self.shards.feedback.memory(segments, False, None, self.shards.device)
        if memory.residual is None:
            return
        residual, index = memory.residual, self.shards.feedback.masks.kept_index(segments)
        if index is not None:
            residual = torch.empty(sum(sizes(segments)), dtype=torch.float32, device=residual.device)
            unpack(memory.residual, index, residual)
        whole = residual.view(self.shards.world_size, -1)
        for p, columns in zip(params, whole.split([p.partition_numel() for p in params], dim=1), strict=True):
            p.grad.add_(columns.flatten()[: p.ds_numel].view(p.grad.shape))  # the rest is padding
        memory.residual = None

    def gather(self, original: Callable[..., Any], params: Any, safe_mode: bool = False, quantize: bool = False) -> Any:
        """Start to gather parameters. Each is coded by itself, so its decoded values do not depend on the others."""
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
            if self.auto is not None and not p.ds_persist:
                self.auto.note("parameters", shard.ds_numel, shard.element_size())
            if p.ds_persist or choice.reason or not choice.codec.lossy:
                exact.append(p)
                self._note(p, choice.reason or KEPT_EVERYWHERE)
                continue
            if p.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(p.ds_summary())
            p.ds_status = ZeroParamStatus.INFLIGHT
            out = torch.empty(W * shard.ds_numel, dtype=shard.dtype, device=shard.device)
            pending = shards.all_gather(self._own(p), out, self._places[id(p)], segments=self._segments([p]))
            handles.append(AllGatherHandle(pending, p, param_buffer=out, original_dtype=shard.dtype))
        if exact:
            handle = original(exact, safe_mode=safe_mode, quantize=quantize)
            handles.append(handle if self.auto is None else TimedHandle(handle, self.auto))
        return handles[0] if len(handles) == 1 else MultipleAllGatherHandles(handles)

    def _own(self, p: Any) -> Tensor:
        """Return this rank's part of a parameter. Its padding, which DeepSpeed never writes, is zeroed: it would count in a
        block's scale."""
        part: Tensor = p.ds_tensor.detach()
        real = p.ds_numel - self.shards.rank * part.numel()
        if real >= part.numel():
            return part
        padded = torch.zeros_like(part)
        if real > 0:
            padded[:real].copy_(part[:real])
        return padded

    def gather_whole(self, original: Callable[..., Any], p: Any, param_list: Any = None, **settings: Any) -> Any:
        """Gather parameters that are read, not computed with (to save them, say), by DeepSpeed's own way, which is exact."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        kept = param_list is not None and param_list is self.zero.persistent_parameters
        for q in [p] if param_list is None else param_list:
            if q.ds_status == ZeroParamStatus.AVAILABLE and not q.ds_persist and not q.ds_active_sub_modules:
                q.partition()  # a forward without a backward has left decoded values
            if q.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                self._note(q, KEPT_EVERYWHERE if kept else "read as a whole, and exact")
        return original(param_list, **settings)

    def _note(self, p: Any, reason: str) -> None:
        n, dtype, others = p.ds_tensor.ds_numel, p.ds_tensor.dtype, self.shards.world_size - 1
        reason = reason if self.shards.parameters.codec.lossy else SPEC_IS_NONE
        sent = others * n * dtype.itemsize
        self.shards.meter.record_uncompressed(
            self._places[id(p)], (others + 1) * n, dtype_name(dtype), "all_gather", reason, "parameters", sent
        )


def attach_gathered(
    engine: Any, shards: Collectives, names: dict[Tensor, str], auto: ShardedAuto | None = None
) -> Gathered:
    """Replace the methods by which a ZeRO 3 optimizer sends."""
    zero = engine.optimizer
    gathered = Gathered(zero, engine.module, shards, names, auto)
    mangled = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter"
    setattr(zero, f"{mangled}_grads", partial(gathered.reduce, getattr(zero, f"{mangled}_grads")))
    contiguous = partial(gathered.reduce_contiguous, getattr(zero, f"{mangled}_contiguous_grads"))
    setattr(zero, f"{mangled}_contiguous_grads", contiguous)
    for p in engine.module.parameters():
        p.all_gather_coalesced = partial(gathered.gather, p.all_gather_coalesced)
        p.all_gather = partial(gathered.gather_whole, p.all_gather, p)
    return gathered
