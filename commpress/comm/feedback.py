"""Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv:1901.09847): what a lossy codec withheld in one
step is added to the next one: send Q(g + e), keep e <- g + e - Q(g + e).

Memories belong to parameters, not to buckets: when the buckets are laid out anew, each parameter's part moves along.
`two_shot` encodes a second time, on the rank that owns a chunk; what that lost waits there for the next mean (`second`). If
the owner changes, it goes into the old owner's first memory, times W since a mean divides it by W: nothing is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Segments = tuple[tuple[str, int], ...]
"""The parameters of a bucket in order: (name, number of values)."""


@dataclass
class Memory:
    """What is kept from step to step for one bucket of n values."""

    residual: Tensor | None = None
    """What the first encoding missed: float32 [n]; None without feedback."""
    second: Tensor | None = None
    """What the second encoding missed of this rank's chunk: float32 [stop - start]; None if there is none."""
    start: int = 0
    """Where that chunk starts in the bucket."""
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def buffer(self, name: str, nbytes: int, device: torch.device) -> Tensor:
        """A uint8 buffer that stays allocated: fresh pages cost more than the codec."""
        found = self.buffers.get(name)
        if found is None or found.numel() != nbytes or found.device != device:
            found = self.buffers[name] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return found

    def fold(self, world_size: int) -> None:
        """Give the second memory back to the first, so that its chunk may pass to another rank."""
        if self.second is not None and self.residual is not None:
            self.residual[self.start : self.start + self.second.numel()].add_(self.second, alpha=world_size)
            self.second.zero_()


class Feedback:
    """The memories of all buckets of one session."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.memories: dict[Segments, Memory] = {}
        self.homes: dict[str, Segments] = {}
        """The layout in which each parameter's residual stands now."""

    def memory(self, segments: Segments, feedback: bool, chunk: tuple[int, int] | None, device: torch.device) -> Memory:
        """The memory of the bucket that holds these parameters. A new layout takes over what was kept for them.

        `chunk` is the (start, stop) that this rank encodes a second time, None if there is no second encoding. Without
        feedback there is a residual only if something was taken over; a dense exchange sends it along and drops it.
        """
        found = self.memories.get(segments)
        if found is not None and all(self.homes[name] == segments for name, _ in segments):
            return found
        created = Memory()
        residual = torch.zeros(sum(n for _, n in segments), dtype=torch.float32, device=device)
        if self._take_over(segments, residual) or feedback:
            created.residual = residual
        if feedback and chunk is not None:
            created.start = chunk[0]
            created.second = torch.zeros(chunk[1] - chunk[0], dtype=torch.float32, device=device)
        self.memories[segments] = created
        self.homes.update((name, segments) for name, _ in segments)
        return created

    def _take_over(self, segments: Segments, residual: Tensor) -> bool:
        """Move what other layouts keep for these parameters into `residual`; drop the layouts that hold no more."""
        places, at, found = {}, 0, False
        for name, n in segments:
            places[name] = slice(at, at + n)
            at += n
        homes = {name: self.homes.pop(name) for name in places if name in self.homes}
        for old in set(homes.values()):
            memory, at = self.memories[old], 0
            memory.fold(self.world_size)
            for name, n in old:
                if memory.residual is not None and homes.get(name) == old:
                    residual[places[name]] = memory.residual[at : at + n]
                    memory.residual[at : at + n] = 0
                    found = True
                at += n
            if old not in self.homes.values():
                del self.memories[old]
        return found

    def rescale(self, factor: float) -> None:
        """Multiply all memories, as when the loss scale by which gradients are multiplied changes."""
        for memory in self.memories.values():
            for kept in (memory.residual, memory.second):
                if kept is not None:
                    kept.mul_(factor)

    def state_dict(self) -> list[dict[str, Any]]:
        """Layout and memories, a dict a bucket."""
        return [
            {
                "segments": [[name, n] for name, n in segments],
                "residual": None if memory.residual is None else memory.residual.clone(),
                "second": None if memory.second is None else memory.second.clone(),
                "start": memory.start,
            }
            for segments, memory in self.memories.items()
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Restore what `state_dict` saved."""
        self.memories.clear()
        self.homes.clear()
        for saved in state:
            segments = tuple((str(name), int(n)) for name, n in saved["segments"])
            residual, second = (
                None if saved[k] is None else saved[k].to(device).clone() for k in ("residual", "second")
            )
            self.memories[segments] = Memory(residual, second, int(saved["start"]))
            self.homes.update((name, segments) for name, _ in segments)
