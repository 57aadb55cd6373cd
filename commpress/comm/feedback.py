"""Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv:1901.09847): the part that a lossy codec leaves out
in one step is added to the next one. Each step sends Q(g + e) and keeps e <- g + e - Q(g + e).

Momentum correction (Lin et al., arXiv:1712.01887): under a sparse codec each rank keeps the momentum of its own gradients and
sends it. At the places that were sent, the momentum starts again at 0 (momentum factor masking).

Memories belong to parameters, not to buckets: when the layout of buckets changes, each parameter's part moves with it.
`two_shot` encodes a second time, on the rank that owns a chunk, which keeps that error for the next mean (`owner_residual`). If
the owner changes, this error is added to the old owner's residual, times W, since a mean divides by W: nothing is lost.
`hierarchical` encodes the mean of a node, one slice on each of its ranks; the error of a slice (`slice_residual`) counts for
all L ranks of the node.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from commpress.comm.masks_index import MaskIndex
from commpress.comm.parameters import bare_name
from commpress.comm.segments import Segment, Segments

KEPT = ("residual", "slice_residual", "owner_residual", "momentum")
"""The names of a memory's tensors."""


@dataclass(frozen=True)
class NodeSlice:
    """The part of a bucket that a rank encodes for all `ranks` of its node: values `start` to `stop` of its `n` sent ones."""

    start: int
    stop: int
    ranks: int
    n: int


@dataclass
class Memory:
    """The saved tensors of one bucket that sends n values."""

    residual: Tensor | None = None
    """The error of the first encoding: float32 [n]; None without feedback, or if a node encodes as one."""
    slice_residual: Tensor | None = None
    """The error of encoding this rank's slice of its node's mean: float32 [stop - start]; None if there is none."""
    owner_residual: Tensor | None = None
    """The error of the second encoding in this rank's chunk: float32 [stop - start]; None if there is none."""
    momentum: Tensor | None = None
    """The momentum of this rank's gradients: float32 [n]; None without momentum correction."""
    owner_start: int = 0
    """Where the chunk of `owner_residual` starts in the bucket."""
    node_slice: NodeSlice | None = None
    """The slice of `slice_residual`; None if there is none."""
    current: bool = True
    """Whether it holds all of its parameters; False once another layout has taken some over."""
    kept_index: Tensor | None = None
    """The places of the n sent values in the bucket: int32 [n]; None if all of it is sent."""
    factors: dict[str, Tensor] = field(default_factory=dict)
    """The second factors of matrices by parameter, with which the next step of `low_rank` begins: float32 [rank, columns], the
    same on all ranks."""
    draws: int = 0
    """How often the bucket was sent, which is the number of the next draw; the same on all ranks."""

    def next_draw(self) -> int:
        """Return the number of the next draw, and count it."""
        self.draws += 1
        return self.draws - 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {name: values for name in KEPT if (values := getattr(self, name)) is not None}

    def fold(self, world_size: int) -> None:
        """Add the residuals of the slice and the chunk to `residual`, so that other ranks may own them from now on."""
        if self.slice_residual is not None and (part := self.node_slice) is not None:
            if self.residual is None:
                self.residual = torch.zeros(part.n, dtype=torch.float32, device=self.slice_residual.device)
            self.residual[part.start : part.stop].add_(self.slice_residual, alpha=part.ranks)
            self.slice_residual.zero_()
        if self.owner_residual is not None and self.residual is not None:
            stop = self.owner_start + self.owner_residual.numel()
            self.residual[self.owner_start : stop].add_(self.owner_residual, alpha=world_size)
            self.owner_residual.zero_()

    def decay(self, share: float) -> None:
        """Multiply all that was left out, also that of the slice and the chunk."""
        for values in (self.residual, self.slice_residual, self.owner_residual):
            if values is not None and share != 1:
                values.mul_(share)

    def give_back(self, world_size: int) -> None:
        """Fold, and drop the slice and the chunk: this rank no longer encodes them."""
        self.fold(world_size)
        self.owner_residual = self.slice_residual = self.node_slice = None

    def squares(self, stride: int, world_size: int, device: torch.device) -> Tensor:
        """Return the sum of the squares of every stride-th value that it holds, in proportion to a rank's gradient: float32 [].

        An owner holds what is left out of a mean of W in a W-th of the places, so it counts W times; so does a node's slice.
        """
        node = 1 if self.node_slice is None else self.node_slice.ranks
        kinds = ((self.residual, 1), (self.slice_residual, node), (self.owner_residual, world_size))
        total = torch.zeros((), dtype=torch.float32, device=device)
        for values, times in kinds:
            if values is not None:
                total += times * values[::stride].square().sum()
        return total

    def is_of(self, chunk: tuple[int, int] | None, node_slice: NodeSlice | None) -> bool:
        """Whether its other residuals, if it has any, are of this chunk and this slice."""
        second = self.owner_residual
        owned = None if second is None else (self.owner_start, self.owner_start + second.numel())
        return (owned is None or owned == chunk) and (self.slice_residual is None or self.node_slice == node_slice)

    @classmethod
    def saved(cls, bucket: Mapping[str, Any], device: torch.device) -> "Memory":
        """Return the memory of a bucket in a saved state; its tensors are copies on `device`."""
        place = bucket.get("node_slice")
        memory = cls(owner_start=int(bucket["owner_start"]), draws=int(bucket.get("draws", 0)))
        memory.node_slice = None if place is None else NodeSlice(*map(int, place))
        for name in KEPT:
            if (values := bucket.get(name)) is not None:
                setattr(memory, name, values.to(device).clone())
        memory.factors = {bare_name(name): q.to(device).clone() for name, q in bucket.get("factors", ())}
        return memory

    def state(self) -> dict[str, Any]:
        """Return the memory as a dict for `saved`; the tensors are copies."""
        return {
            "owner_start": self.owner_start,
            "node_slice": None if self.node_slice is None else list(astuple(self.node_slice)),
            "draws": self.draws,
            "factors": [[name, q.clone()] for name, q in self.factors.items()],
            **{name: None if (values := getattr(self, name)) is None else values.clone() for name in KEPT},
        }


class Feedback:
    """The memories of all buckets of one session."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.memories: dict[Segments, Memory] = {}
        self.layout_of: dict[str, Segments] = {}
        """The layout that holds each parameter's residual now, by name."""
        self.masks = MaskIndex()
        self._snapshots: dict[Segments, dict[str, Tensor]] = {}
        self._of_this_step: set[Segments] = set()
        """The layouts whose snapshots are of this step; other snapshots are of an earlier one."""

    @torch.inference_mode(False)  # memories outlive a caller's inference mode
    @torch.no_grad()
    def memory(
        self,
        segments: Segments,
        feedback: bool,
        chunk: tuple[int, int] | None,
        device: torch.device,
        momentum: bool = False,
        node_slice: NodeSlice | None = None,
    ) -> Memory:
        """Return the memory of the bucket that holds these parameters. A new layout takes over the memories of its parameters.

        `chunk` is the (start, stop) that this rank encodes a second time, None if there is no second encoding; `node_slice` is
        the slice that it encodes for its node, None if it encodes its own bucket. Without feedback there is a residual only if
        one was taken over; a dense exchange adds it to what it sends, and drops it. With `momentum` there is also a momentum of
        this rank's own gradients.
        """
        found = self.memories.get(segments)
        if found is None or not found.current:
            found = self._take_over(segments, device)
        found.kept_index = self.masks.kept_index(segments)
        n = self.masks.total(segments)
        if (feedback or chunk is not None) and not found.is_of(chunk, node_slice):
            found.give_back(self.world_size)  # another codec or exchange cuts at other places
        if feedback and node_slice is None and found.residual is None:
            found.residual = torch.zeros(n, dtype=torch.float32, device=device)
        if feedback and node_slice is not None and found.slice_residual is None:
            found.node_slice = node_slice
            size = node_slice.stop - node_slice.start
            found.slice_residual = torch.zeros(size, dtype=torch.float32, device=device)
        if feedback and found.owner_residual is None and chunk is not None:
            found.owner_start = chunk[0]
            found.owner_residual = torch.zeros(chunk[1] - chunk[0], dtype=torch.float32, device=device)
        if momentum and found.momentum is None:
            found.momentum = torch.zeros(n, dtype=torch.float32, device=device)
        return found

    def register(self, segments: Segments) -> None:
        """Make an empty memory for each of these parameters that has none, since a saved state holds all of them."""
        if new := tuple(segment for segment in segments if segment.name not in self.layout_of):
            self._take_over(new, torch.device("cpu"))

    def _take_over(self, segments: Segments, device: torch.device) -> Memory:
        """Return a new memory with the memories that other layouts hold of these parameters; empty layouts are dropped."""
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
            moving = memory.factors.keys() & places.keys()
            created.factors |= {name: memory.factors.pop(name) for name in sorted(moving)}
            self._snapshots.pop(old, None)  # it must not restore a memory that moves now
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

    def part(self, name: str) -> tuple[list[Tensor], slice]:
        """Return the flat tensors that hold what is remembered of a parameter, and where in them; none if nothing is.

        Whoever changes a parameter's coordinates changes these: the residual, to which those of second encodings are added
        first, and the momentum.
        """
        if (segments := self.layout_of.get(name)) is None:
            return [], slice(0, 0)
        memory, start = self.memories[segments], 0
        memory.fold(self.world_size)
        for segment in segments:
            n = self.masks.count(segment.name, segment.n)
            if segment.name == name:
                break
            start += n
        return [values for values in (memory.residual, memory.momentum) if values is not None], slice(start, start + n)

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_masks(self, masks: MaskIndex) -> None:
        """Set the masks from the next step on. Memories of pruned values are dropped; those of regrown values start at 0."""
        for segments, memory in self.memories.items():
            memory.give_back(self.world_size)
            for name in ("residual", "momentum"):
                if (values := getattr(memory, name)) is not None:
                    setattr(memory, name, masks.repacked(values, segments, self.masks))
        self._snapshots.clear()
        self.masks = masks

    def begin_step(self) -> None:
        """Begin a step: the exchanges before it were used, so they can no longer be undone."""
        self._of_this_step.clear()

    def snapshot(self, segments: Segments, memory: Memory) -> None:
        """Copy the memory of a bucket as it is now, for `restore_snapshot`."""
        self._of_this_step.add(segments)
        copies = self._snapshots.setdefault(segments, {})
        tensors = memory.tensors()
        for name in copies.keys() - tensors.keys():
            del copies[name]
        for name, values in tensors.items():
            if name not in copies or copies[name].shape != values.shape:
                copies[name] = torch.empty_like(values)
            copies[name].copy_(values)

    def restore_snapshot(self) -> None:
        """Undo the exchanges of the last step in the memories: their means were not used."""
        for segments, memory in self.memories.items():
            if segments in self._of_this_step:
                for name, values in self._snapshots.get(segments, {}).items():
                    setattr(memory, name, values.clone())

    def rescale(self, factor: float) -> None:
        """Multiply all memories by `factor`, as after a change of the loss scale."""
        for memory in self.memories.values():
            for name in KEPT:
                if (kept := getattr(memory, name)) is not None:
                    kept.mul_(factor)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return one dict a bucket, with its layout and memory; each parameter is in one of them."""
        return [
            {"segments": [[segment.name, segment.n] for segment in segments], **memory.state()}
            for segments, memory in map(self._own_part, self.memories)
        ]

    def renamed(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the state of these parameters only, under the names to which `names` maps them, and without masks."""
        buckets = []
        for bucket in self.state_dict():
            known = [(names.get(name, ""), n) for name, n in bucket["segments"]]
            bucket["factors"] = [[names[name], q] for name, q in bucket["factors"] if names.get(name)]
            if all(name for name, _ in known):
                buckets.append({**bucket, "segments": known})
                continue
            memory = Memory.saved(bucket, torch.device("cpu"))
            memory.give_back(self.world_size)
            for kind in ("residual", "momentum"):
                whole = getattr(memory, kind)
                values = () if whole is None else whole.split([n for _, n in known])
                parts = [v for v, (name, _) in zip(values, known, strict=False) if name]
                setattr(memory, kind, torch.cat(parts) if parts else None)
            if segments := [segment for segment in known if segment[0]]:
                buckets.append({"segments": segments, **memory.state()})
        return buckets

    def _own_part(self, segments: Segments) -> tuple[Segments, Memory]:
        """Return a layout and its memory without the parameters that another layout took over."""
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
        return own, Memory(residual=residual, momentum=momentum, factors=memory.factors, draws=memory.draws)

    def require_fit(self, state: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError if a saved state is not of the values that the present masks keep."""
        for saved in state:
            segments = tuple(Segment(str(name), int(n)) for name, n in saved["segments"])
            travel, kept, place = self.masks.total(segments), saved["residual"], saved.get("node_slice")
            known = place[-1] if kept is None and place is not None else travel if kept is None else kept.numel()
            if known != travel:
                raise ValueError(
                    f"cannot restore: feedback was saved for {known} values of {segments[0].name!r} and others, now {travel} "
                    "are sent; restore the masks first"
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Restore what `state_dict` saved. Raises ValueError if it was saved under other masks."""
        self.require_fit(state)
        self.memories.clear()
        self.layout_of.clear()
        self._snapshots.clear()
        for saved in state:
            segments = tuple(Segment(bare_name(name), int(n)) for name, n in saved["segments"])
            self.memories[segments] = Memory.saved(saved, device)
            for segment in segments:
                if segment.name in self.layout_of:
                    self.memories[self.layout_of[segment.name]].current = False
            self.layout_of.update((segment.name, segments) for segment in segments)
