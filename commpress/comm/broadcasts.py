"""One rank's tensors, sent to all others again and again: parameters to those that only use them, or a module's buffers.

The first time everything is sent exactly. Later float tensors travel as what has changed since, by a codec; the others hold
the same bits, and the source keeps its own. A complex tensor travels as pairs of floats. With the spec `none` all is sent as it
is, and all ranks hold the source's bits. So are float64 tensors, which would lose bits in float32, and all that are no floats.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import require_agreement
from commpress.comm.codecs import Codec
from commpress.comm.coding import FLOAT_DTYPES, warm_up
from commpress.comm.exchange import Labels, Transfer, Wire
from commpress.comm.exchange.broadcast import broadcast, exact_broadcast
from commpress.comm.exchange.wire import tree_children
from commpress.comm.meter import Meter, Report, named
from commpress.comm.parameters import real_view
from commpress.comm.plan import Plan
from commpress.comm.sequencer import Job, Sequencer, promise

STATE_VERSION = 1


class Broadcasts:
    """The broadcasts of one set of tensors. Collective: all ranks of `group` make one, with tensors of the same names.

    `source` is a rank of `group`, `role` what the report calls the traffic. Raises ValueError on all ranks if a spec is
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
        self.rank, self.world_size, self.source = dist.get_rank(group), dist.get_world_size(group), source
        try:
            self.codec = Plan.of(spec, None).codec
            if not 0 <= source < self.world_size:
                raise ValueError(f"source {source}: expected a rank of the group, 0 to {self.world_size - 1}")
        except (ValueError, TypeError) as error:
            require_agreement({"error": str(error)}, group, self.device)
            raise
        kinds = {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
        require_agreement({"spec": str(self.codec), "source": source, "tensors": kinds}, group, self.device)
        tensors = {name: real_view(x) for name, x in tensors.items()}
        self._role, self._meter, self._labels = role, Meter(), Labels()
        floats = [name for name, x in tensors.items() if self.codec.lossy and not _not_coded(x.dtype)]
        self._floats, self._others = floats, [name for name in tensors if name not in floats]
        self._values = sum(tensors[name].numel() for name in floats)
        self._float_bytes = sum(tensors[name].nbytes for name in floats)
        self._base: Tensor | None = None
        if self.world_size > 1:
            self._wire = Wire(group, self.device)
            self._sequencer = Sequencer(self._wire, self._meter)
            warm_up(self.codec, self.device)

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these tensors on all ranks what the source has. Collective. Raises RuntimeError if it failed on any rank.

        Under `torch.inference_mode()`, too.
        """
        tensors = {name: real_view(x) for name, x in tensors.items()}
        if self.world_size > 1:
            # what is made under inference mode may not be written to in training, nor by the threads that send
            with torch.inference_mode(False), torch.no_grad():
                waiting = [self._exact(index, tensors[name]) for index, name in enumerate(self._others)]
                if self._floats:
                    waiting.append(self._floating([tensors[name] for name in self._floats]))
            with torch.no_grad():
                for future, put in waiting:
                    result = future.wait()
                    if isinstance(result, BaseException):
                        raise result
                    put()
        self._meter.steps += 1

    def report(self) -> Report:
        """Bytes and seconds so far, on this rank."""
        return self._meter.report(str(self.codec), self.rank, self.world_size)

    def phase(self, name: str) -> None:
        """What the report's rows are called by from now on."""
        self._meter.enter(name)

    def state_dict(self) -> dict[str, Any]:
        """The version that was sent last, the same on all ranks."""
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

    def _exact(self, index: int, x: Tensor) -> Any:
        flat = x.detach().contiguous().view(-1)
        reason = _not_coded(x.dtype) if self.codec.lossy else "spec is none"
        label = self._labels.next(f"{self._role} of {self._others[index]!r} from rank {self.source}")
        # as bytes: a process group knows few dtypes
        exchange = exact_broadcast(flat.view(torch.uint8), self._wire, self.source, label)
        future = self._start(index, flat, flat.nbytes, reason, exchange)
        return future, partial(x.copy_, flat.view(x.shape))

    def _floating(self, tensors: list[Tensor]) -> Any:
        flat = torch.cat([x.detach().reshape(-1).to(torch.float32) for x in tensors])
        index, sizes = len(self._others), [x.numel() for x in tensors]
        first = self._base is None
        spec = "none" if first else str(self.codec)
        label = self._labels.next(f"{self._role} of {len(sizes)} tensors from rank {self.source} by {spec}")
        if self._base is None:
            self._base = flat.clone()
            exchange = exact_broadcast(self._base, self._wire, self.source, label)
        else:
            nbytes = self.codec.nbytes(flat.numel()) + len(sizes)
            payload = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            exchange = broadcast(flat, sizes, self._base, self.codec, payload, self._wire, self.source, label)
        reason = "the first time" if first else ""
        future = self._start(index, flat, self._float_bytes, reason, exchange)

        def put() -> None:
            if self.rank != self.source:
                known = self._base if first else flat
                assert known is not None
                for x, part in zip(tensors, known.split(sizes), strict=True):
                    x.copy_(part.view(x.shape))

        return future, put

    def _start(self, index: int, flat: Tensor, nbytes: int, reason: str, exchange: Iterator[Transfer]) -> Any:
        spec = "none" if reason else str(self.codec)
        dtype = named(flat.dtype)
        row = self._meter.row(index, flat.numel(), dtype, spec, "broadcast", reason, self._role)
        future = promise(self.device)
        dense = nbytes * tree_children(self.rank, self.source, self.world_size)
        self._sequencer.submit(Job(flat, exchange, row, self._meter.steps, dense, False, future.set_result))
        return future


def _not_coded(dtype: torch.dtype) -> str:
    """Why tensors of this dtype are sent as they are; "" if they are not."""
    name = named(dtype)
    if dtype not in FLOAT_DTYPES:
        return f"{name} is no float"
    return f"{name} has more bits than float32" if dtype.itemsize > 4 else ""
