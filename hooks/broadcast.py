"""Parameters of one rank to all others, and the buffers that DDP broadcasts.

DDP sends rank 0's buffers (the running statistics of batch norm) to all ranks before each forward, unless
`broadcast_buffers=False`. What takes the place of that is `_register_buffer_comm_hook`, which is not public; it is used here
alone, and its absence is an error.
"""

import contextlib
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel, distributed

from commpress.comm.agreement import require_agreement
from commpress.comm.broadcasts import Broadcasts
from commpress.comm.codecs import Codec
from commpress.comm.meter import Report

_synced: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, int, object], Broadcasts]]" = weakref.WeakKeyDictionary()


def broadcast_parameters(
    model: nn.Module, spec: str | Codec = "none", *, source: int = 0, group: dist.ProcessGroup | None = None
) -> Report:
    """Give all ranks of `group` the parameters of its rank `source`. Collective; returns the bytes and seconds of all calls.

    With `none` every parameter has the same bits on all ranks. With a lossy spec the first call is exact, too; each later one
    sends what has changed since the one before it, the ranks other than `source` get the same bits, and `source` keeps its
    own. That takes one float32 a parameter; float64 ones travel as they are. Raises on all ranks: ValueError if the spec is
    unknown, the ranks differ or there are no parameters, TypeError for a sharded model.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    group = group or dist.distributed_c10d._get_default_group()
    known = _synced.setdefault(module, {})
    key = (str(spec), source, group)
    if key not in known:
        if (refusal := _refusal(module)) is not None:
            device = next((x.device for x in tensors.values()), torch.device("cpu"))
            with contextlib.suppress(ValueError):  # what the other ranks raise
                require_agreement({"error": str(refusal)}, group, device)
            raise refusal
        known[key] = Broadcasts(spec, tensors, group, source=source)
    known[key].send(tensors)
    return known[key].report()


def _refusal(model: nn.Module) -> Exception | None:
    """Why this rank has nothing to send or receive, if so."""
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        return TypeError(f"broadcast_parameters: {sharded[0]!r} is a DTensor, expected whole parameters on every rank")
    if next(model.parameters(), None) is None:
        return ValueError(f"broadcast_parameters: {type(model).__name__} has no parameters, expected at least one")
    return None


def buffer_broadcasts(model: DistributedDataParallel, spec: str | Codec) -> Broadcasts:
    """What is to send the buffers of a DDP module. Collective over its process group.

    Raises ValueError if it has none, or does not broadcast them.
    """
    if not model.broadcast_buffers or not model.named_module_buffers:
        why = "was made with broadcast_buffers=False" if model.named_module_buffers else "has no buffers"
        raise ValueError(f"buffers {str(spec)!r}: the DDP module {why}, expected one that broadcasts buffers")
    if not hasattr(model, "_register_buffer_comm_hook"):
        raise RuntimeError("buffers: this version of torch has no DistributedDataParallel._register_buffer_comm_hook")
    return Broadcasts(spec, model.named_module_buffers, model.process_group, role="buffers")


def attach_buffers(model: DistributedDataParallel, broadcasts: Broadcasts) -> None:
    """Have DDP send its buffers by them from now on."""
    model._register_buffer_comm_hook(broadcasts, Broadcasts.send, distributed._BufferCommHookLocation.PRE_FORWARD)
