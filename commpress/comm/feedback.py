"""Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv:1901.09847): what a lossy codec withheld in one
step is added to the next one: send Q(g + e), keep e <- g + e - Q(g + e).

Momentum correction (Lin et al., arXiv:1712.01887): under a sparse codec each rank keeps the momentum of its own gradients, and
that is what is sent; where it was sent, it starts anew (momentum factor masking).

Memories belong to parameters, not to buckets: when the buckets are laid out anew, each parameter's part moves along.
`two_shot` encodes a second time, on the rank that owns a chunk; what that lost waits there for the next mean
(`owner_residual`). If the owner changes, it goes into the old owner's residual, times W since a mean divides it by W: nothing
is lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commpress.comm.masks_index import MaskIndex
from commpress.comm.parameters import bare_name
from commpress.comm.segments import Segment, Segments

KEPT = ("residual", "owner_residual", "momentum")
"""The tensors of a memory."""


@dataclass
class Memory:
    """The saved tensors of one bucket of which n values travel."""

    residual: Tensor | None = None
    """The error of the first encoding: float32 [n]; None without feedback."""
    owner_residual: Tensor | None = None
    """The error of the second encoding in this rank's chunk: float32 [stop - start]; None if there is none."""
    momentum: Tensor | None = None
    """The momentum of this rank's gradients: float32 [n]; None without momentum correction."""
    owner_start: int = 0
    """Where that chunk starts in the bucket."""
    current: bool = True
    """Whether it holds all of its parameters; not if another layout took some over."""
    kept_index: Tensor | None = None
    """Where these values lie in the bucket: int32 [n]; None if all of it travels."""
    draws: int = 0
    """How often the bucket was sent: the number of the next draw, the same on all ranks."""

    def next_draw(self) -> int:
        """Return the number of the next draw, and count it."""
        self.draws += 1
        return self.draws - 1

    def tensors(self) -> dict[str, Tensor]:
        """Return those that there are, by name."""
        return {name: values for name in KEPT if (values := getattr(self, name)) is not None}

    def fold(self, world_size: int) -> None:
        """Give the owner's residual back to the first one, so that its chunk may pass to another rank."""
        if self.owner_residual is not None and self.residual is not None:
            stop = self.owner_start + self.owner_residual.numel()
            self.residual[self.owner_start : stop].add_(self.owner_residual, alpha=world_size)
            self.owner_residual.zero_()

    def give_back(self, world_size: int) -> None:
        """Fold, and keep no second residual: this rank does not encode that chunk a second time any more."""
        self.fold(world_size)
        self.owner_residual = None


class Feedback:
    """The memories of all buckets of one session."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.memories: dict[Segments, Memory] = {}
        self.layout_of: dict[str, Segments] = {}
        """The layout in which each parameter's residual stands now."""
        self.masks = MaskIndex()
        self._snapshots: dict[Segments, dict[str, Tensor]] = {}

    @torch.inference_mode(False)  # what is made here outlives the mode in which a model is looked at
    @torch.no_grad()
    def memory(
        self,
        segments: Segments,
        feedback: bool,
        chunk: tuple[int, int] | None,
        device: torch.device,
        momentum: bool = False,
    ) -> Memory:
        """The memory of the bucket that holds these parameters. A new layout takes over what was kept for them.

        `chunk` is the (start, stop) that this rank encodes a second time, None if there is no second encoding. Without
        feedback there is a residual only if something was taken over; a dense exchange sends it along and drops it.
        With `momentum` there is one of this rank's own gradients.
        """
        found = self.memories.get(segments)
        if found is None or not found.current:
            found = self._take_over(segments, device)
        found.kept_index = self.masks.kept_index(segments)
        n = self.masks.total(segments)
        if feedback and found.residual is None:
            found.residual = torch.zeros(n, dtype=torch.float32, device=device)
        if (
            found.owner_residual is not None
            and chunk is not None
            and chunk != (found.owner_start, found.owner_start + found.owner_residual.numel())
        ):
            found.give_back(self.world_size)  # another codec cuts elsewhere
        if feedback and found.owner_residual is None and chunk is not None:
            found.owner_start = chunk[0]
            found.owner_residual = torch.zeros(chunk[1] - chunk[0], dtype=torch.float32, device=device)
        if momentum and found.momentum is None:
            found.momentum = torch.zeros(n, dtype=torch.float32, device=device)
        return found

    def register(self, segments: Segments) -> None:
        """Have a memory for each of these parameters, if an empty one, as a saved state is of all of them."""
        if new := tuple(segment for segment in segments if segment.name not in self.layout_of):
            self._take_over(new, torch.device("cpu"))

    def _take_over(self, segments: Segments, device: torch.device) -> Memory:
        """A new memory that holds what other layouts keep for these parameters; layouts that hold no more are dropped."""
        created, places, at = Memory(), {}, 0
        for segment in segments:
            travel = self.masks.count(segment.name, segment.n)
            places[segment.name] = slice(at, at + travel)
            at += travel
        layouts = {name: self.layout_of.pop(name) for name in places if name in self.layout_of}
        for old in dict.fromkeys(layouts.values()):
            memory, start = self.memories[old], 0
            memory.current = False
            created.draws = max(created.draws, memory.draws)
            memory.fold(self.world_size)
            self._snapshots.pop(old, None)  # it must not bring back what moves on
            for part in old:
                n = self.masks.count(part.name, part.n)
                if layouts.get(part.name) == old:
                    for kind in ("residual", "momentum"):
                        if (source := getattr(memory, kind)) is None:
                            continue
                        if getattr(created, kind) is None:
                            setattr(created, kind, torch.zeros(at, dtype=torch.float32, device=device))
                        getattr(created, kind)[places[part.name]] = source[start : start + n]
                        source[start : start + n] = 0
                start += n
            if old not in self.layout_of.values():
                del self.memories[old]
        self.memories[segments] = created
        self.layout_of.update((segment.name, segments) for segment in segments)
        return created

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_masks(self, masks: MaskIndex) -> None:
        """From now on these travel: what is remembered of others is dropped, and new ones start at 0."""
        for segments, memory in self.memories.items():
            memory.fold(self.world_size)
            memory.owner_residual = None
            for name in ("residual", "momentum"):
                if (values := getattr(memory, name)) is not None:
                    setattr(memory, name, masks.repacked(values, segments, self.masks))
        self._snapshots.clear()
        self.masks = masks

    def snapshot(self, segments: Segments, memory: Memory) -> None:
        """Copy the memory of a bucket as it is now, for `restore_snapshot`."""
        copies = self._snapshots.setdefault(segments, {})
        tensors = memory.tensors()
        for name in copies.keys() - tensors.keys():
            del copies[name]
        for name, values in tensors.items():
            if name not in copies or copies[name].shape != values.shape:
                copies[name] = torch.empty_like(values)
            copies[name].copy_(values)

    def restore_snapshot(self) -> None:
        """Take back the last exchange: its mean was not used."""
        for segments, memory in self.memories.items():
            for name, values in self._snapshots.get(segments, {}).items():
                setattr(memory, name, values.clone())

    def rescale(self, factor: float) -> None:
        """Multiply all memories, as when the loss scale by which gradients are multiplied changes."""
        for memory in self.memories.values():
            for name in KEPT:
                if (kept := getattr(memory, name)) is not None:
                    kept.mul_(factor)

    def state_dict(self) -> list[dict[str, Any]]:
        """Layout and memories, a dict a bucket, each parameter in one of them."""
        return [
            {
                "segments": [[segment.name, segment.n] for segment in segments],
                "owner_start": memory.owner_start,
                "draws": memory.draws,
                **{k: None if (values := getattr(memory, k)) is None else values.clone() for k in KEPT},
            }
            for segments, memory in map(self._own_part, self.memories)
        ]

    def renamed(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return what `state_dict` returns, of these parameters alone, by the names that they are mapped to; without masks."""
        buckets = []
        for bucket in self.state_dict():
            known = [(names.get(name, ""), n) for name, n in bucket["segments"]]
            if all(name for name, _ in known):
                buckets.append({**bucket, "segments": known})
                continue
            if (residual := bucket["residual"]) is not None and (owned := bucket["owner_residual"]) is not None:
                residual[bucket["owner_start"] : bucket["owner_start"] + owned.numel()].add_(
                    owned, alpha=self.world_size
                )
            kept = {}
            for kind in ("residual", "momentum"):
                values = None if bucket[kind] is None else bucket[kind].split([n for _, n in known])
                parts = [] if values is None else [v for v, (name, _) in zip(values, known, strict=True) if name]
                kept[kind] = torch.cat(parts) if parts else None
            if segments := [segment for segment in known if segment[0]]:
                moved = {"owner_start": 0, "owner_residual": None, "draws": bucket["draws"]}
                buckets.append({"segments": segments, **moved, **kept})
        return buckets

    def _own_part(self, segments: Segments) -> tuple[Segments, Memory]:
        """A memory, without the parameters that another layout took over."""
        memory = self.memories[segments]
        if memory.current:
            return segments, memory
        kept: dict[str, list[Tensor]] = {"residual": [], "momentum": []}
        at = 0
        for segment in segments:
            n = self.masks.count(segment.name, segment.n)
            if self.layout_of.get(segment.name) == segments:
                for kind, parts in kept.items():
                    if (values := getattr(memory, kind)) is not None:
                        parts.append(values[at : at + n])
            at += n
        own = tuple(segment for segment in segments if self.layout_of.get(segment.name) == segments)
        residual, momentum = (torch.cat(kept[kind]) if kept[kind] else None for kind in ("residual", "momentum"))
        return own, Memory(residual=residual, momentum=momentum, draws=memory.draws)

    def require_fit(self, state: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError if what was saved is not of the values that the masks of now let travel."""
        for saved in state:
            segments = tuple(Segment(str(name), int(n)) for name, n in saved["segments"])
            travel, kept = self.masks.total(segments), saved["residual"]
            if kept is not None and kept.numel() != travel:
                raise ValueError(
                    f"cannot restore: feedback was saved for {kept.numel()} values of {segments[0].name!r} and others, now "
                    f"{travel} travel; restore the masks before"
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Restore what `state_dict` saved. Raises ValueError if the masks were others."""
        self.require_fit(state)
        self.memories.clear()
        self.layout_of.clear()
        self._snapshots.clear()
        for saved in state:
            segments = tuple(Segment(bare_name(name), int(n)) for name, n in saved["segments"])
            memory = Memory(owner_start=int(saved["owner_start"]), draws=int(saved.get("draws", 0)))
            self.memories[segments] = memory
            for name in KEPT:
                if saved[name] is not None:
                    setattr(memory, name, saved[name].to(device).clone())
            for segment in segments:
                if segment.name in self.layout_of:
                    self.memories[self.layout_of[segment.name]].current = False
            self.layout_of.update((segment.name, segments) for segment in segments)
