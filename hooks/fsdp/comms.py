"""The collectives that replace FSDP2's for one unit: gather, reduction, and the mean over replicas.

FSDP calls them in the caller's thread, for one unit at a time. It waits for a gather where it needs the parameters, and for a
reduction as soon as it has started it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.collectives import Collectives
from commpress.comm.exchange.reduce_scatter import Op
from commpress.comm.parameters import real_numel
from commpress.comm.plan import Override
from commpress.comm.sharded_auto import ShardedAuto
from commpress.comm.work import Work
from commpress.hooks.fsdp.units import Unit, ranks

INSIDE = "among the shards of a replica"
AGAIN = "decoded before, sharded anew after forward"


def empty(size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for the input or output of a gather or a reduction."""
    return torch.empty(*size, dtype=dtype, device=device)


class Gather:
    """FSDP's all-gather of one unit."""

    allocate = staticmethod(empty)

    def __init__(self, shards: dict[tuple[int, ...], Collectives], unit: Unit, auto: ShardedAuto | None = None) -> None:
        self._shards, self._unit, self._auto = shards, unit, auto

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        """Gather `input_tensor` ([m]) into `output_tensor` ([W * m])."""
        who = ranks(group)
        again = "" if who == ranks(self._unit.shard_groups[0]) else AGAIN
        if self._auto is not None and not again:
            self._auto.note("parameters", input_tensor.numel(), input_tensor.element_size())
        segments = (
            () if again else self._unit.gathered()
        )  # they do not fit a gather of bytes, as FSDP makes of mixed dtypes
        work = self._shards[who].all_gather(input_tensor, output_tensor, self._unit.index, again, segments)
        if async_op or output_tensor.device.type == "cpu":
            return work
        work.wait()
        return None


class Reduce:
    """FSDP's reduce-scatter of one unit."""

    allocate = staticmethod(empty)

    def __init__(self, shards: Collectives, unit: Unit, auto: ShardedAuto | None = None) -> None:
        self._shards, self._unit, self._auto = shards, unit, auto

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Op, async_op: bool = False
    ) -> Work | None:
        """Reduce `input_tensor` ([W * m]) to `output_tensor` ([m])."""
        inside = self._unit.replica_group is not None
        if self._auto is not None and not inside:
            self._auto.note("gradients", input_tensor.numel(), input_tensor.element_size())
            self._auto.due = True
        parts, reason = self._unit.reduced(real_numel(output_tensor), ends=not inside)
        if inside and self._shards.gradients.codec.lossy:
            reason = INSIDE
        segments = self._unit.full(parts, self._shards.world_size)
        work = self._shards.reduce_scatter(input_tensor, output_tensor, segments, self._unit.index, op, reason)
        if async_op:
            return work
        work.wait()
        return None


class Replicas(dist.ProcessGroup):
    """The process group of one unit's replicas that FSDP is given: its all_reduce is compressed."""

    def __init__(self, shards: Collectives, unit: Unit, auto: ShardedAuto | None = None) -> None:
        super().__init__(shards.rank, shards.world_size)  # type: ignore[call-arg]  # torch's stub lacks this form
        self._shards, self._unit, self._auto = shards, unit, auto

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> Work:
        """Reduce `tensors` (a list of one, a shard's gradient) over the replicas, in place, by `opts.reduceOp`."""
        (x,) = tensors
        if self._auto is not None:
            self._auto.note("gradients", x.numel(), x.element_size())
            self._auto.due = True
        parts, reason = self._unit.reduced(real_numel(x), ends=True)
        override = Override(self._shards.gradients.codec, reason) if reason else None
        return self._shards.all_reduce(x, parts, self._unit.index, op=opts.reduceOp, override=override)
