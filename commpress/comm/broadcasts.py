"""Repeated broadcasts of one rank's tensors to all others: parameters to ranks that only use them, or a module's buffers.

The first time everything is sent exactly. Later a codec sends the changes of float tensors; all other ranks then hold the same
bits, and the source keeps its own values. A complex tensor is sent as pairs of floats. With the spec `none` everything is sent
exactly, and all ranks hold the source's bits. float64 tensors, which would lose bits in float32, and non-floats are always sent
exactly.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import require_agreement
from commpress.comm.codecs import Codec
from commpress.comm.coding import FLOAT_DTYPES
from commpress.comm.collectives import UNCOMPRESSED, Collectives
from commpress.comm.meter import SPEC_IS_NONE, Report, dtype_name
from commpress.comm.parameters import real_view
from commpress.comm.plan import Plan, require_flat
from commpress.comm.work import Work

STATE_VERSION = 1


class Broadcasts:
    """The broadcasts of one set of tensors. Collective: all ranks of `group` make one, with the same names of tensors.

    `source` is a rank of `group`, `role` the name of the traffic in the report. Raises ValueError on all ranks if a spec is
    unknown or the ranks differ.
    """

    def __init__(
        self,
        spec: str | Codec,
        tensors: Mapping[str, Tensor],
        group: dist.ProcessGroup,
        *,
        source: int = 0,
        role: str = "parameters",
    ) -> None:
        self.device = next(iter(tensors.values())).device
        self.source, world_size = source, dist.get_world_size(group)
        try:
            plan = Plan.of(spec, None)
            require_flat(plan.codec, "a broadcast has the values of one rank")
            if not 0 <= source < world_size:
                raise ValueError(f"source {source}: expected a rank of the group, 0 to {world_size - 1}")
        except (ValueError, TypeError) as error:
            require_agreement({"error": str(error)}, group, self.device)
            raise
        self.codec = plan.codec
        kinds = {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
        require_agreement({"spec": str(self.codec), "source": source, "tensors": kinds}, group, self.device)
        tensors = {name: real_view(x) for name, x in tensors.items()}
        floats = [name for name, x in tensors.items() if self.codec.lossy and not _not_coded(x.dtype)]
        self._floats, self._others = floats, [name for name in tensors if name not in floats]
        self._values = sum(tensors[name].numel() for name in floats)
        self._float_bytes = sum(tensors[name].nbytes for name in floats)
        self._base: Tensor | None = None
        self._collectives = Collectives(group, self.device, UNCOMPRESSED, plan, role=role, verify=0)

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Give these tensors the source's values on all ranks, in place. Collective.

        It also works under `torch.inference_mode()`. Raises RuntimeError if it failed on any rank.
        """
        tensors = {name: real_view(x) for name, x in tensors.items()}
        if self._collectives.world_size > 1:
            # a tensor that is made under inference mode may not be written to in training, nor by the threads that send
            with torch.inference_mode(False), torch.no_grad():
                waiting = [self._exact(index, tensors[name]) for index, name in enumerate(self._others)]
                if self._floats:
                    waiting.append(self._floating([tensors[name] for name in self._floats]))
            with torch.no_grad():
                for work, put in waiting:
                    work.wait()
                    put()
        self._collectives.meter.steps += 1

    def report(self) -> Report:
        """Return bytes and seconds so far, on this rank."""
        own = self._collectives
        return own.traffic.report(str(self.codec), own.rank, own.world_size)

    def phase(self, name: str) -> None:
        """Call the report's rows by this name from now on."""
        self._collectives.meter.enter(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the version that was sent last, the same on all ranks."""
        return {"version": STATE_VERSION, "base": None if self._base is None else self._base.clone()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` saved, on all ranks. Raises ValueError if it is of other tensors."""
        base = state["base"]
        if state["version"] != STATE_VERSION or (base is not None and base.numel() != self._values):
            found = "none" if base is None else base.numel()
            raise ValueError(
                f"cannot restore: the saved state has version {state['version']} and {found} values, expected "
                f"{STATE_VERSION} and {self._values}"
            )
        self._base = None if base is None else base.to(self.device).clone()

    def _exact(self, index: int, x: Tensor) -> tuple[Work, Callable[[], object]]:
        flat = x.detach().contiguous().view(-1)
        reason = _not_coded(x.dtype) if self.codec.lossy else SPEC_IS_NONE
        work = self._collectives.broadcast(flat, self.source, index, repr(self._others[index]), reason)
        return work, partial(x.copy_, flat.view(x.shape))

    def _floating(self, tensors: list[Tensor]) -> tuple[Work, Callable[[], object]]:
        flat = torch.cat([x.detach().reshape(-1).to(torch.float32) for x in tensors])
        index, sizes = len(self._others), [x.numel() for x in tensors]
        send = partial(self._collectives.broadcast, dense_bytes=self._float_bytes)
        first = self._base is None
        what = f"{len(sizes)} tensors by {'none' if first else self.codec}"
        if self._base is None:
            self._base = flat.clone()
            work = send(self._base, self.source, index, what, "the first time")
        else:
            work = send(flat, self.source, index, what, base=self._base, sizes=sizes)

        def put() -> None:
            if self._collectives.rank != self.source:
                known = self._base if first else flat
                assert known is not None
                for x, part in zip(tensors, known.split(sizes), strict=True):
                    x.copy_(part.view(x.shape))

        return work, put


def _not_coded(dtype: torch.dtype) -> str:
    """Return the reason why tensors of this dtype are sent uncompressed; "" if they are compressed."""
    name = dtype_name(dtype)
    if dtype not in FLOAT_DTYPES:
        return f"{name} is no float"
    return f"{name} has more bits than float32" if dtype.itemsize > 4 else ""
