"""EF21Muon on matrices that FSDP2 or ZeRO 1 and 2 have sharded: each matrix has one owner, the only rank that has all its rows.

    every rank, of its rows    m <- beta m + (1 - beta) g               g is the ranks' mean gradient, by `others_spec`
                               to the owner: c = Q(m - e),              e <- e + c
    the owner                  E <- E + c,   u = NewtonSchulz(E + beta c)
                               to the rows' ranks: d = int8(u - K),     K <- K + d
    every rank, of its rows    k <- k + d,   p <- (1 - lr wd) p - 0.2 lr sqrt(max(rows, columns)) k

Both directions are EF21 (arXiv:2106.05203): a rank sends the difference between a value and the other end's copy of it, so the
part that a code leaves out is in the next difference. e and E, k and K have the same bits on both ends. A rank's own rows of a
matrix that it owns are exact.

A rank holds m, e and k of its rows (12 bytes a value of its shard), and E and K of the matrices that it owns (8 bytes a value).
It holds nothing else. Gradients have no error feedback, which would take a float32 for every value of the model on every rank;
so they are sent by `others_spec`, which is gentle, not by the spec of the momentum. A separate momentum on every rank, as under
DDP, would take 8 bytes for every value of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commpress.comm.agreement import require_equal
from commpress.comm.codecs import AUTO, Codec, parse
from commpress.comm.coding import warm_up
from commpress.comm.collectives import Collectives
from commpress.comm.plan import DENSE, require_flat
from commpress.comm.rules import Spec, open_refusal
from commpress.comm.search import PLAIN
from commpress.comm.segments import Segment
from commpress.optim.muon_groups import others_codec
from commpress.optim.newton_schulz import newton_schulz

if TYPE_CHECKING:
    from commpress.optim.muon import EF21Muon

AS_ADAMW = 0.2
"""Root mean square of an update of AdamW, to which Muon's update is scaled (arXiv:2502.16982, section 2.2)."""
BACK = parse("int8")
"""The codec of updates. If the momentum is sent exactly, the updates are exact, too."""
MOMENTUM, SENT, UPDATE = "momentum_buffer", "sent_momentum", "update"
"""The keys of m, e and k in the optimizer's state; each has the shape of the tensor that holds the shard."""
KEYS = (MOMENTUM, SENT, UPDATE)
Updates = dict[str, tuple[Tensor, dict[str, Any], Tensor]]
"""By name: a tensor that holds parts of matrices, its group and its gradient."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of which each rank holds a part, which may be empty."""

    name: str
    shape: tuple[int, ...]
    """The shape of the whole matrix; all dimensions but the first are its columns."""
    cut: tuple[int, ...]
    """The shape in which it is cut: its own, or [n] for all its values in a line."""
    dim: int
    """The dimension of `cut` that is cut."""
    lengths: tuple[int, ...]
    """The length of each rank's part along it."""
    holder: str
    """The name of the tensor that has this rank's part."""
    at: int | None = None
    """Where the part starts in that tensor, if that is flat and holds others, too; else None."""

    @property
    def rows(self) -> int:
        """Rows of the whole matrix."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the whole matrix."""
        return prod(self.shape[1:])

    @property
    def cost(self) -> int:
        """The work of Newton-Schulz, up to a constant factor."""
        return self.rows * self.columns * min(self.rows, self.columns)

    def numel(self, rank: int) -> int:
        """Return how many values a rank has."""
        return prod(self.shape) // max(1, self.cut[self.dim]) * self.lengths[rank]

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the whole matrix, joined from the flat parts of all ranks."""
        shapes = ((*self.cut[: self.dim], length, *self.cut[self.dim + 1 :]) for length in self.lengths)
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], self.dim).view(
            self.shape
        )

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Return each rank's part of a whole matrix, flat."""
        return [part.reshape(-1) for part in whole.reshape(self.cut).split(list(self.lengths), self.dim)]


def owners(matrices: Sequence[Matrix], world_size: int) -> dict[str, int]:
    """Return each matrix's owner, by name. The largest are assigned first, each to the rank with the least work so far."""
    work, found = [0] * world_size, {}
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):
        found[matrix.name] = rank = work.index(min(work))
        work[rank] += matrix.cost
    return found


@dataclass(frozen=True)
class Momentum:
    """The spec of a momentum, which may be `auto`, and its codec, under `auto` that of the first steps."""

    spec: str
    codec: Codec


def momentum_of(spec: Spec, optimizer: "EF21Muon", error_feedback: bool, parameters: object) -> Momentum:
    """Return how the momentum is sent.

    Raises TypeError for patterns, ValueError for an unknown spec, a budget of `auto`, `error_feedback=False`, an
    `others_spec` that needs error feedback, and `parameters` by `auto`.
    """
    if parameters == AUTO:
        raise ValueError(
            "parameters: auto: beside EF21Muon auto finds the spec of the momentum alone; expected a spec, such as 'int8'"
        )
    by_auto = spec == AUTO
    if by_auto:
        spec = PLAIN
    if (refusal := open_refusal(spec, optimizer, None, error_feedback)) is not None:
        raise refusal
    if not error_feedback:
        raise ValueError(
            "error_feedback=False: EF21Muon adds up what it receives, so a later step must send what one left out; leave "
            "error_feedback out (where it is sharded, gradients have no feedback)"
        )
    assert isinstance(spec, str | Codec)
    others_codec(optimizer.param_groups[0]["others_spec"], feedback=False)
    require_flat(codec := parse(spec), "the momentum of a sharded matrix goes to its owner as rows")
    return Momentum(AUTO if by_auto else str(codec), codec)


@dataclass
class Rows:
    """This rank's rows of a matrix, their gradient and their state: views of one shape, float32."""

    group: dict[str, Any]
    values: Tensor
    gradient: Tensor
    momentum: Tensor
    sent: Tensor
    update: Tensor


class ShardedMuon:
    """The matrices of an EF21Muon that hold its shards, and their traffic. Collective over the ranks of `collectives`.

    `holders` are the tensors that hold this rank's parts, by name; `local` returns this rank's part of one that is a DTensor.
    `momentum` codes the moves of the momentum, until another codec is taken.
    """

    def __init__(
        self,
        optimizer: "EF21Muon",
        collectives: Collectives,
        matrices: Sequence[Matrix],
        holders: Mapping[str, Tensor],
        momentum: Codec,
        local: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self._optimizer, self._collectives, self._local = optimizer, collectives, local
        self.take(momentum)
        self.values = sum(prod(matrix.shape) for matrix in matrices)
        self._holders = dict(holders)
        self.specs, self.back = tuple(candidate.spec for candidate in optimizer.candidates()), str(BACK)
        self._owner = owners(matrices, collectives.world_size)
        self._matrices = sorted(matrices, key=lambda matrix: self._owner[matrix.name])
        """The matrices in the order of their owners, in which they are sent."""
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        """E and K of the matrices that this rank owns, in the matrices' shapes, by name."""
        if collectives.world_size > 1:
            warm_up(momentum, collectives.device)
            warm_up(BACK, collectives.device)
        for holder in dict.fromkeys(matrix.holder for matrix in matrices):  # a checkpoint is loaded into what is there
            for key in KEYS:
                optimizer.state[self._holders[holder]].setdefault(key, torch.zeros_like(self._holders[holder]))

    def take(self, codec: Codec) -> None:
        """Send moves by this codec from now on; all ranks take it before the same step."""
        self._codec, self._back = codec, BACK if codec.lossy else DENSE

    @torch.no_grad()
    def clip(self, gradients: Sequence[Tensor]) -> None:
        """Clip the mean gradients of all stepped parameters to the optimizer's `max_norm`, if it has one, in place."""
        most = self._optimizer.param_groups[0]["max_norm"]
        if most is None:
            return
        mine = [self._local(gradient) for gradient in gradients]
        square = sum(float(torch.linalg.vector_norm(x.float())) ** 2 for x in mine)
        of_all = self._collectives.traffic.ask({"square": square}, "a norm of gradients")
        norm = sum(float(str(of["square"])) for of in of_all) ** 0.5
        if most < norm < float("inf"):
            for gradient in mine:
                gradient.mul_(most / norm)

    @torch.no_grad()
    def begin(self, settings: dict[str, object]) -> None:
        """Begin, or continue from a loaded state: the ranks compare their settings, and owners gather E and K. Collective.

        Raises ValueError on all ranks if settings differ, or if the state is not of sharded matrices.
        """
        fresh = self._optimizer.param_groups[0]["steps"] == 0
        held = dict.fromkeys(matrix.holder for matrix in self._matrices)
        if lost := [name for name in held if set(KEYS) - self._optimizer.state[self._holders[name]].keys()]:
            what = f"EF21Muon: the state that was loaded has no {SENT} of {lost[0]!r}"
            settings = {"error": f"{what}: expected one of sharded matrices"}
        require_equal(self._collectives.traffic.ask(settings, "an optimizer to compare"))
        if fresh:
            mine = (m for m in self._matrices if self._owner[m.name] == self._collectives.rank)
            zeros = partial(torch.zeros, dtype=torch.float32, device=self._collectives.device)
            self._known = {matrix.name: (zeros(matrix.shape), zeros(matrix.shape)) for matrix in mine}
            return
        known = []
        for index, key in enumerate((SENT, UPDATE)):
            parts = [self._part(m, self._optimizer.state[self._holders[m.holder]][key]) for m in self._matrices]
            known.append(self._to_owners(self._matrices, parts, DENSE, index, "what owners know, after a start")[0])
        self._known = {name: (sent, known[1][name]) for name, sent in known[0].items()}

    @torch.no_grad()
    def step(self, updates: Updates) -> None:
        """Step the matrices that have gradients. Raises ValueError for one that came to the optimizer after `attach`."""
        if late := sorted(updates.keys() - {matrix.holder for matrix in self._matrices}):
            raise ValueError(
                f"EF21Muon: matrix {late[0]!r} came to the optimizer after attach, so no rank owns it; expected all that are "
                "ever trained in its groups before attach, frozen ones too"
            )
        moved = [matrix for matrix in self._matrices if matrix.holder in updates]
        rows = {matrix.name: self._rows(matrix, *updates[matrix.holder]) for matrix in moved}
        for of in rows.values():
            of.momentum.lerp_(of.gradient, 1 - of.group["momentum"])
        ahead = [of.momentum - of.sent for of in rows.values()]
        codec = self._codec.drawn(self._optimizer.param_groups[0]["steps"])
        arrived, decoded = self._to_owners(moved, ahead, codec, 0)
        for of, code in zip(rows.values(), decoded, strict=True):
            of.sent.add_(code.view_as(of.sent))
        directions: dict[str, Tensor] = {}
        for name, code in arrived.items():
            estimate, group = self._known[name][0].add_(code), rows[name].group
            directions[name] = estimate.add(code, alpha=group["momentum"]) if group["nesterov"] else estimate
        steps = dict(_orthogonal(directions))
        for of, code in zip(rows.values(), self._to_rows(moved, steps), strict=True):
            of.update.add_(code.view_as(of.update))
        for matrix in moved:
            of = rows[matrix.name]
            lr = float(of.group["lr"])
            of.values.mul_(1 - lr * of.group["weight_decay"])
            of.values.add_(of.update, alpha=-AS_ADAMW * lr * max(matrix.rows, matrix.columns) ** 0.5)

    def _to_owners(
        self, matrices: Sequence[Matrix], parts: Sequence[Tensor], codec: Codec, index: int, reason: str = ""
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Send this rank's `parts` of matrices to their owners.

        Returns the whole matrices that this rank owns, by name, and, flat, the decoded values of the parts that it sent.
        """
        at_owners, at_rows = self._sizes(matrices)
        x = torch.cat([self._empty(0), *(part.reshape(-1) for part in parts)])
        out = self._empty(sum(at_rows))
        self._send(matrices, x, at_owners, out, at_rows, index, codec, reason)
        mine = [matrix for matrix in matrices if self._owner[matrix.name] == self._collectives.rank]
        of_ranks = [
            dict(zip([m.name for m in mine], part.split([m.numel(r) for m in mine]), strict=True))
            for r, part in enumerate(out.split(at_rows))
        ]
        whole = {matrix.name: matrix.whole([of_rank[matrix.name] for of_rank in of_ranks]) for matrix in mine}
        return whole, list(x.split([part.numel() for part in parts]))

    def _to_rows(self, matrices: Sequence[Matrix], steps: Mapping[str, Tensor]) -> list[Tensor]:
        """Send the differences u - K of this rank's own matrices (`steps` are the u) to the ranks that hold their rows.

        Returns the differences of this rank's rows of all matrices, flat.
        """
        at_owners, at_rows = self._sizes(matrices)
        mine = [matrix for matrix in matrices if self._owner[matrix.name] == self._collectives.rank]
        of_ranks = list(zip(*(m.parts(steps[m.name] - self._known[m.name][1]) for m in mine), strict=True))
        x = torch.cat([self._empty(0), *(part for of_rank in of_ranks for part in of_rank)])
        out = self._empty(sum(at_owners))
        self._send(matrices, x, at_rows, out, at_owners, 1, self._back)
        decoded = iter(x.split([m.numel(r) for r in range(self._collectives.world_size) for m in mine]))
        arrived = [[next(decoded) for _ in mine] for _ in range(self._collectives.world_size)]
        for i, matrix in enumerate(mine):
            self._known[matrix.name][1].add_(matrix.whole([of_rank[i] for of_rank in arrived]))
        return list(out.split([matrix.numel(self._collectives.rank) for matrix in matrices]))

    def _send(
        self,
        matrices: Sequence[Matrix],
        x: Tensor,
        sizes: Sequence[int],
        out: Tensor,
        arriving: Sequence[int],
        index: int,
        codec: Codec,
        reason: str = "",
    ) -> None:
        segments = tuple(Segment(matrix.name, prod(matrix.shape)) for matrix in matrices)
        if segments:
            self._collectives.all_to_all(x, sizes, out, arriving, segments, index, codec, reason).wait()

    def _sizes(self, matrices: Sequence[Matrix]) -> tuple[list[int], list[int]]:
        """Return, for each rank, how many values of this rank's rows it owns, and how many of this rank's matrices it holds."""
        me, W = self._collectives.rank, self._collectives.world_size
        at_owners, at_rows = [0] * W, [0] * W
        for matrix in matrices:
            owner = self._owner[matrix.name]
            at_owners[owner] += matrix.numel(me)
            for r in range(W) if owner == me else ():
                at_rows[r] += matrix.numel(r)
        return at_owners, at_rows

    def _rows(self, matrix: Matrix, p: Tensor, group: dict[str, Any], gradient: Tensor) -> Rows:
        state = self._optimizer.state[p]
        tensors = (p, gradient, state[MOMENTUM], state[SENT], state[UPDATE])
        return Rows(group, *(self._part(matrix, x) for x in tensors))

    def _part(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Return this rank's part of a matrix, a view of `x`, which has the shape of the matrix's holder."""
        local = self._local(x.detach())
        return local if matrix.at is None else local[matrix.at : matrix.at + matrix.numel(self._collectives.rank)]

    def _empty(self, n: int) -> Tensor:
        return torch.empty(n, dtype=torch.float32, device=self._collectives.device)


def _orthogonal(directions: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield Newton-Schulz of each matrix, by name; matrices of one shape are computed together."""
    alike: dict[torch.Size, list[str]] = {}
    for name, direction in directions.items():
        alike.setdefault(direction.shape, []).append(name)
    for shape, names in alike.items():
        steps = newton_schulz(torch.stack([directions[name].reshape(shape[0], -1) for name in names]))
        yield from ((name, step.reshape(shape)) for name, step in zip(names, steps, strict=True))
