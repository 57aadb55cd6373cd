"""The encoder of an exchange: a codec, the memory of error feedback and the optimizer's pass together.

encode    prologue(x) + residual  -->  payload       residual <- what the payload misses
mean      W payloads              -->  values
recode    W payloads              -->  payload       of their mean plus the owner's residual: the middle of `two_shot`
"""

import torch
from torch import Tensor

from commpress.comm import coding
from commpress.comm.codecs import Codec
from commpress.comm.feedback import Memory
from commpress.comm.prologue import Ahead, Prologue
from commpress.comm.scratch import Scratch


class Encoder:
    """Encodes one bucket in one step. A `prologue` is applied to the values in the pass that encodes them.

    `memory` is the bucket's memory of error feedback; an empty one means no feedback. `masks_momentum` clears its momentum
    where values are sent.
    """

    __slots__ = ("codec", "masks_momentum", "memory", "prologue", "scratch")

    def __init__(
        self,
        codec: Codec,
        memory: Memory | None = None,
        scratch: Scratch | None = None,
        masks_momentum: bool = False,
    ) -> None:
        self.codec, self.masks_momentum = codec, masks_momentum
        self.prologue: Prologue | Ahead | None = None
        self.memory = Memory() if memory is None else memory
        self.scratch = Scratch() if scratch is None else scratch

    def encode(self, x: Tensor, part: slice, out: Tensor) -> None:
        """Encode x[part] ([n], any float dtype) plus its residual into `out` (uint8 [nbytes])."""
        memory, prologue = self.memory, self.prologue
        residual = None if memory.residual is None else memory.residual[part]
        coding.encode(self.codec, x[part], residual, None if prologue is None else prologue[part], out)
        if self.masks_momentum and memory.momentum is not None:
            coding.clear(self.codec, out, memory.momentum[part])

    def mean(self, payloads: Tensor, n: int, count: int, out: Tensor) -> None:
        """Write the mean of `count` contiguous payloads of n values to `out` ([n], any float dtype)."""
        coding.mean(self.codec, payloads, n, count, out)

    def recode(self, payloads: Tensor, n: int, count: int, out: Tensor) -> None:
        """Encode the mean of `count` payloads of n values plus the chunk owner's residual into `out`."""
        between = None
        if not coding.fuses_recode(self.codec, payloads.device):  # fresh pages would cost more than the codec
            between = self.buffer("mean between", 4 * n, payloads.device).view(torch.float32)
        coding.recode(self.codec, payloads, n, count, self.memory.owner_residual, out, between)

    def decode(self, payload: Tensor, n: int, out: Tensor) -> None:
        """Decode the payload of n values into `out` ([n], any float dtype)."""
        self.codec.decode(payload, n, out)

    def add_residual(self, x: Tensor) -> None:
        """Add the residual of a lossy codec to `x` ([n]), which is sent exactly now, and clear it."""
        if (residual := self.memory.residual) is not None:
            x.add_(residual)
            if x.device.type != "cpu":  # it may have been made on another stream, which would use its memory again
                residual.record_stream(torch.accelerator.current_stream())
            self.memory.residual = None

    def buffer(self, name: str, nbytes: int, device: torch.device) -> Tensor:
        """Return a uint8 buffer of this bucket that stays allocated."""
        return self.scratch.buffer(name, nbytes, device)
