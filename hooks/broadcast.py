"""Broadcasts: one rank's parameters to all others, and the buffers that DDP broadcasts.

DDP sends rank 0's buffers (the running statistics of batch norm) to all ranks before each forward, unless it was made with
`broadcast_buffers=False`. `_register_buffer_comm_hook` replaces that broadcast. It is not public: only this file uses it, and
a torch without it is an error.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel, distributed

from commpress.comm.agreement import refuse_on_all
from commpress.comm.broadcasts import Broadcasts
from commpress.comm.codecs import Codec
from commpress.comm.meter import Report
from commpress.hooks.parameters import replicated_parameters, uncompiled

COALESCED = 250 << 20
"""Bytes that DDP sends at once."""
_synced: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Broadcasts]]" = weakref.WeakKeyDictionary()


def broadcast_parameters(
    model: nn.Module, spec: str | Codec = "none", *, source: int = 0, group: dist.ProcessGroup | None = None
) -> Report:
    """Give all ranks of `group` the parameters of its rank `source`. Collective; returns the bytes and seconds of all calls.

    Parameters that a DDP module ignores are left alone. With `none` every parameter has the same bits on all ranks. With a
    lossy spec the first call is exact, too. Each later call sends the changes since the call before; all other ranks then hold
    the same bits, and `source` keeps its own values. A lossy spec takes one float32 of memory a value, two for a complex one.
    float64 and values that are not floats are sent uncompressed. Raises on all ranks: ValueError if the spec is unknown, the
    ranks differ or there are no parameters, TypeError for a sharded model.
    """
    module = uncompiled(model)
    module = uncompiled(module.module) if isinstance(module, DistributedDataParallel) else module
    tensors = {name: p.detach() for name, p in replicated_parameters(model).items()}
    group = group or dist.distributed_c10d._get_default_group()
    known = _synced.setdefault(module, {})
    key = (str(spec), source, group, *tensors)
    if key not in known:
        if (refusal := _refusal(module, tensors)) is not None:
            device = next((x.device for x in tensors.values()), torch.device("cpu"))
            refuse_on_all(refusal, group, device)
        known[key] = Broadcasts(spec, tensors, group, source=source)
    known[key].send(tensors)
    return known[key].report()


def _refusal(model: nn.Module, tensors: Mapping[str, Tensor]) -> Exception | None:
    """Return the error if this rank has nothing to send or receive, else None."""
    sharded = [name for name, p in tensors.items() if isinstance(p, DTensor)]
    if sharded:
        return TypeError(f"broadcast_parameters: {sharded[0]!r} is a DTensor, expected whole parameters on every rank")
    if not tensors:
        return ValueError(f"broadcast_parameters: {type(model).__name__} has no parameters, expected at least one")
    return None


def buffer_refusal(model: DistributedDataParallel, spec: str | Codec) -> Exception | None:
    """Return the error if the buffers of a DDP module cannot be sent compressed, else None."""
    if not model.broadcast_buffers or not model.named_module_buffers:
        why = "was made with broadcast_buffers=False" if model.named_module_buffers else "has no buffers"
        return ValueError(f"buffers {str(spec)!r}: the DDP module {why}, expected one that broadcasts buffers")
    if not hasattr(model, "_register_buffer_comm_hook"):
        return RuntimeError("buffers: this version of torch has no DistributedDataParallel._register_buffer_comm_hook")
    return None


def buffer_broadcasts(model: DistributedDataParallel, spec: str | Codec) -> Broadcasts:
    """Return the broadcasts for the buffers of a DDP module. Collective over its process group."""
    return Broadcasts(spec, model.named_module_buffers, model.process_group, role="buffers")


def attach_buffers(model: DistributedDataParallel, broadcasts: Broadcasts) -> None:
    """Have DDP send its buffers through `broadcasts` from now on."""
    location = distributed._BufferCommHookLocation.PRE_FORWARD
    model._register_buffer_comm_hook(BufferState(broadcasts), buffer_hook, location)


class BufferState:
    """The state that DDP keeps for `buffer_hook`. A copy of it, as in a copied or saved model, has no `broadcasts`."""

    def __init__(self, broadcasts: Broadcasts | None = None) -> None:
        self.broadcasts = broadcasts

    def __reduce__(self) -> Any:
        return BufferState, ()


def buffer_hook(state: BufferState, buffers: Mapping[str, Tensor]) -> None:
    """Send the buffers. A copied module sends them as DDP does without a hook: exactly, over its group, the default one."""
    if state.broadcasts is not None:
        state.broadcasts.send(buffers)
        return
    group = dist.distributed_c10d._get_default_group()
    dist._broadcast_coalesced(group, list(buffers.values()), COALESCED, 0)  # type: ignore[attr-defined]
