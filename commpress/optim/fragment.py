"""Fragments of a model (Streaming DiLoCo, Douillard et al., arXiv:2501.18512): parts of about the same size that sync at
different steps. A fragment holds its anchor, its outer momentum and the places of its frozen parameters, and saves them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.segments import Segment, Segments


@dataclass(eq=False)  # compared by identity
class Fragment:
    """A part of the model: `parameters`, flat, one after another, then zeros up to a multiple of the inner ranks.

    `anchor` is float32 [n], the same on all ranks. `momentum` (float32 [part]) and the exchange are of this rank's `part`.
    `dense_bytes` is the size of that part's gradients in the model's own dtypes.
    """

    parameters: list[Tensor]
    segments: Segments
    offset: int
    part: slice
    dense_bytes: int
    anchor: Tensor
    momentum: Tensor
    synced_at: int = 0
    mean: "torch.futures.Future[Tensor] | None" = None
    """The mean that is being exchanged, or was when the state was saved."""
    owners: list[Tensor] = field(default_factory=list)
    """Tensors whose memory the parameters are; their `requires_grad` says whether a parameter is trained."""
    trained: set[int] = field(default_factory=set)
    """Places of the parameters that required a gradient in some step since the last sync began."""
    frozen: set[int] = field(default_factory=set)
    """Places of the parameters that required no gradient before the last sync, which does not change them."""

    def flat(self) -> Tensor:
        """Return the parameters' values now: float32 [n]."""
        out = torch.zeros_like(self.anchor)
        for p, part in zip(self.parameters, self._parts(out), strict=True):
            part.copy_(p.detach().reshape(-1))
        return out

    def put(self, values: Tensor, share: float = 1.0) -> None:
        """Set the parameters to `values` (float32 [n]); with `share` below 1 move trained ones by that share of the way."""
        for i, (p, part) in enumerate(zip(self.parameters, self._parts(values), strict=True)):
            if share == 1 or self._is_frozen(i):
                p.copy_(part.view(p.shape))
            else:
                p.lerp_(part.view(p.shape).to(p.dtype), share)

    def note_step(self) -> None:
        """Note which parameters are trained in the local step that was taken."""
        self.trained |= {i for i, p in enumerate(self.owners) if p.requires_grad}

    def begin(self) -> None:
        """Begin a sync. Parameters that were frozen all the time since the last one keep their values and momentum."""
        self.frozen = {i for i in range(len(self.parameters)) if self._is_frozen(i)}
        self.trained = set()

    def moving(self) -> Segments:
        """Return the segments of this rank's part that a sync moves, with the zeros after the parameters."""
        return tuple(
            segment
            for segment, (i, _) in zip(self.segments, [*self._overlaps(), (-1, slice(0))], strict=False)
            if i not in self.frozen
        )

    def frozen_slices(self) -> list[slice]:
        """Return the slices of this rank's part that a sync leaves as they are."""
        return [where for i, where in self._overlaps() if i in self.frozen]

    def arrived(self, mean: Tensor) -> None:
        """Take a mean (float32 [part]) that has already arrived as this fragment's finished exchange."""
        self.mean = torch.futures.Future()
        self.mean.set_result(mean)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of anchor, momentum, mean and the frozen places. Waits for a mean that is being exchanged."""
        return {
            "anchor": self.anchor.clone(),
            "momentum": self.momentum.clone(),
            "synced_at": self.synced_at,
            "mean": None if self.mean is None else self.mean.wait().clone(),
            "trained": sorted(self.trained),
            "still": sorted(self.frozen),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.anchor.copy_(saved["anchor"])
        self.momentum.copy_(saved["momentum"])
        self.synced_at = int(saved["synced_at"])
        self.trained = set(saved.get("trained", range(len(self.parameters))))
        self.frozen = set(saved.get("still", ()))
        self.mean = None
        if saved["mean"] is not None:
            self.arrived(saved["mean"].to(self.anchor.device).clone())

    def receive(self, root: int, group: dist.ProcessGroup, has_mean: bool) -> None:
        """Broadcast anchor, momentum, mean and the frozen places from the global rank `root`. Collective over `group`.

        `has_mean`: whether the root has a mean.
        """
        kept = [self.anchor, self.momentum]
        if has_mean:
            kept.append(torch.empty_like(self.momentum) if self.mean is None else self.mean.wait())
            self.arrived(kept[-1])
        for values in kept:
            dist.broadcast(values, root, group=group)
        for places in (self.trained, self.frozen):
            there = torch.tensor(
                [i in places for i in range(len(self.parameters))], dtype=torch.uint8, device=self.anchor.device
            )
            dist.broadcast(there, root, group=group)
            places.clear()
            places.update(i for i, found in enumerate(there.tolist()) if found)

    def _is_frozen(self, i: int) -> bool:
        return i not in self.trained and not self.owners[i].requires_grad

    def _overlaps(self) -> Iterator[tuple[int, slice]]:
        """Yield the place of each parameter that overlaps this rank's part, with the slice of that part that it fills."""
        at = 0
        for i, p in enumerate(self.parameters):
            start, stop = max(at, self.part.start), min(at + p.numel(), self.part.stop)
            if start < stop:
                yield i, slice(start - self.part.start, stop - self.part.start)
            at += p.numel()

    def _parts(self, flat: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        return list(flat[: sum(sizes)].split(sizes))


def split(
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, Tensor],
    count: int,
    every: int,
    workers: int,
    inner_rank: int,
    inner_size: int,
) -> list[Fragment]:
    """Split a model into at most `count` fragments, in the order of its parameters, their syncs spread over `every` steps.

    `workers` is the number of workers that exchange each part; a worker has `inner_size` ranks, and this is its `inner_rank`.
    """
    total, seen = sum(p.numel() for p in parameters.values()), 0
    members: list[list[str]] = [[] for _ in range(count)]
    for name, p in parameters.items():
        members[min(count - 1, seen * count // max(total, 1))].append(name)
        seen += p.numel()
    fragments = []
    for index, names in enumerate(members):
        if not names:
            continue  # fewer parameters than fragments, or a large one that fills several
        held = {name: parameters[name] for name in names}
        each = -(-sum(p.numel() for p in held.values()) // inner_size)
        part = slice(inner_rank * each, (inner_rank + 1) * each)
        segments, nbytes = _pieces(held, part)
        device = held[names[0]].device
        fragments.append(
            Fragment(
                parameters=list(held.values()),
                owners=[owners[name] for name in held],
                segments=segments,
                offset=-(index * every // count),
                part=part,
                dense_bytes=ring_bytes(nbytes, workers),
                anchor=torch.zeros(each * inner_size, dtype=torch.float32, device=device),
                momentum=torch.zeros(each, dtype=torch.float32, device=device),
            )
        )
    return fragments


def _pieces(parameters: Mapping[str, Tensor], part: slice) -> tuple[Segments, int]:
    """Return the segments in `part` of the flat parameters, and how many bytes of parameters they hold.

    The segments are whole parameters, pieces of them, and the zeros after the last one.
    """
    pieces, at, nbytes = [], 0, 0
    for name, p in parameters.items():
        size = p.numel()
        start, stop = max(at, part.start), min(at + size, part.stop)
        if start < stop:
            nbytes += (stop - start) * p.element_size()
            whole = stop - start == size
            pieces.append(
                Segment.whole(name, p) if whole else Segment(f"{name}[{start - at}:{stop - at}]", stop - start)
            )
        at += size
    if part.stop > max(at, part.start):
        pieces.append(Segment(f"zeros behind {name}", part.stop - max(at, part.start)))
    return tuple(pieces), nbytes
