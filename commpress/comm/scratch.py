"""The working memory of exchanges. It stays allocated, because touching fresh pages costs more time than the codec."""

from collections.abc import Collection

import torch
from torch import Tensor

from commpress.comm.segments import Segments


class Scratch:
    """The buffers of one bucket, by name."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._inner: dict[str, Scratch] = {}

    def buffer(self, name: str, nbytes: int, device: torch.device) -> Tensor:
        """Return the uint8 buffer of this name, [nbytes]; its content is undefined."""
        found = self._buffers.get(name)
        if found is None or found.numel() != nbytes or found.device != device:
            with torch.inference_mode(False):  # it will be written to again in training
                found = self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return found

    def inner(self, name: str) -> "Scratch":
        """Return a separate scratch of this name, for an exchange that runs inside another."""
        return self._inner.setdefault(name, Scratch())


class ScratchPool:
    """The scratch of one group's collectives: buffers of each bucket, and buffers that an exchange takes and gives back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: dict[Segments, Scratch] = {}
        self._free: dict[int, list[Tensor]] = {}

    def of(self, segments: Segments, layouts: Collection[Segments]) -> Scratch:
        """Return the scratch of a bucket, and free the scratch of buckets that are not among `layouts` any more."""
        if segments not in self._of:
            self._of = {kept: scratch for kept, scratch in self._of.items() if kept in layouts}
            self._of[segments] = Scratch()
        return self._of[segments]

    def take(self, nbytes: int) -> Tensor:
        """Return a uint8 buffer, [nbytes], that nobody else uses until it is given back."""
        free = self._free.setdefault(nbytes, [])
        if free:
            return free.pop()
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer to the pool."""
        self._free[buffer.numel()].append(buffer)
