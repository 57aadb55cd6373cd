"""EF21-Muon (arXiv:2510.00643; EF21: arXiv:2106.05203): Muon (Jordan et al., 2024; scaled as in arXiv:2502.16982) whose ranks
send the difference of their momentum from an estimate that all of them hold.

Newton-Schulz enlarges the small singular values of a matrix. So it makes the noise of a coarse code as large as the signal, and
error feedback cannot repay that. The difference between a rank's momentum and an estimate is small and shrinks, and so does the
noise of its code:

    m <- beta m + (1 - beta) g          each rank's own
    sent: c = Q(m - e),  e <- e + c     e is what the others know of m
    E <- E + mean of c                  on all ranks, the same bits
    p <- (1 - lr wd) p - 0.2 lr sqrt(max(rows, columns)) NewtonSchulz(E + beta mean of c)

The code sends each step's move of the momentum with error feedback. The residual is then m - e, so e itself is not kept.
Nesterov's E + beta mean of c has about twice the error of E, so `nesterov=None` leaves it out, but for the local steps between
outer syncs, in which nothing is coded.

With a code of fewer than 8 bits a value, m, e and E are kept in other coordinates, in which the code's error is a similar share
of each direction of the matrix (`eigenbasis.py`); Newton-Schulz gets E in the matrix's own coordinates.

Newton-Schulz mixes the values of a matrix. At pruned places m, e, E and the step are set to 0, so a weight that is 0 stays 0.
A pruned matrix stays in its own coordinates; if it was in others, its momentum starts again at 0 when the masks are set.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from commpress.comm.codecs import Codec, parse
from commpress.comm.coding import warm_up
from commpress.comm.feedback import Memory
from commpress.comm.masks_index import MaskIndex, zero_others
from commpress.comm.optimizer_hooks import Candidate
from commpress.comm.plan import Override
from commpress.comm.prologue import Ahead
from commpress.comm.segments import Segments, sizes
from commpress.comm.step_buffer import StepBuffer
from commpress.kernels.cpu.instructions import PROCESSOR
from commpress.optim.base import CompressedOptimizer
from commpress.optim.eigenbasis import Basis, in_own, is_coarse, is_due, keep, move
from commpress.optim.muon_groups import groups, others_codec
from commpress.optim.newton_schulz import CPU_DTYPE, newton_schulz
from commpress.optim.settings import require_in_range
from commpress.optim.sharded_muon import AS_ADAMW, ShardedMuon
from commpress.optim.shared_products import SharedProducts
from commpress.optim.uncompressed import begin_adamw, step_adamw

SPECS = ("none", "int8")
"""The specs that `auto` may choose, the gentlest first. `int4` keeps the loss, too (benchmarks/convergence.py, three seeds),
but needs other coordinates, which are chosen now and then: a search's turns of a few steps do not show what they cost. With
`rotate|sign` a GPT of 0.9 M parameters ended 3.1 % above exact Muon's loss: step time alone must not decide on that."""


@dataclass(frozen=True)
class Move:
    """A matrix in a step. `moved` is the mean move of the ranks' momenta, as it arrived."""

    p: Tensor
    group: dict[str, Any]
    moved: Tensor
    kept: Tensor | None = None
    """The places in the matrix's memory of the values that masks keep: int32 [k]; None if all are kept."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; the columns are all dimensions but the first."""
        return self.p.shape[0], self.p[0].numel()


class EF21Muon(CompressedOptimizer):
    """Muon for the hidden matrices of a model, AdamW for its other parameters: `EF21Muon(model, lr=2e-3)`.

    The spec of `attach(ddp_model, "sign", optimizer=...)` is that of the matrices' momentum: `sign`, `int2`, `topk(0.1)|sign`.
    Gradients of the other parameters are sent by `others_spec`: `int8`, `int4`, `rotate|int2`, or `none`, which is exact.
    Coarser ones are refused. There is no warm-up. Attached to nothing, it takes the local steps of `diloco` and `local_sgd`:
    Muon on each rank's own gradients.

    Hidden matrices are float32 and have two dimensions or more (all but the first are flattened). Embeddings are not among
    them, nor is the model's last matrix if it has the shape of an embedding, as a head does. `others` holds patterns of
    further names for AdamW. Updates are scaled to the size of AdamW's, so one `lr` serves both. `momentum`, `nesterov` and
    `weight_decay` mean what they mean in torch.optim.Muon, whose defaults are 0.95, True and 0.1; `nesterov=None` is True in
    local steps, else False. `max_norm` clips each rank's gradient to max_norm sqrt(W) before it is sent, and then no bucket is
    sent before backward is over.

    Under FSDP2 and ZeRO 1 and 2 it is sharded (`sharded_muon.py`): all gradients are sent by `others_spec`, not by
    `rotate|int2`, since they have no error feedback, and `max_norm` clips their mean.

    In place of a model it takes parameter groups, as torch's optimizers do, with `muon` True or False in each. Raises
    ValueError for a setting out of range, a pattern that matches nothing, a group without `muon`, and a model whose hidden
    matrices are all in 16 bits.
    """

    needs_feedback = True
    sends_moves = True
    """Whether the ranks send moves of a momentum; their sum is not a sum of gradients."""
    may_step_alone = True
    shared = ("max_norm", "others_spec", "steps")

    def __init__(
        self,
        model: nn.Module | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        nesterov: bool | None = None,
        others: Sequence[str] = (),
        others_spec: str = "int8",
        max_norm: float | None = None,
    ) -> None:
        require_in_range("lr", float(lr), 0)
        require_in_range("momentum", momentum, 0, 1)
        require_in_range("betas[0]", betas[0], 0, 1)
        require_in_range("betas[1]", betas[1], 0, 1)
        require_in_range("eps", eps, 0)
        require_in_range("weight_decay", weight_decay, 0)
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
        defaults |= {
            "weight_decay": weight_decay,
            "others_spec": str(others_codec(others_spec)),
            "muon": None,
            "steps": 0,
        }
        super().__init__(groups(model, others) if isinstance(model, nn.Module) else model, defaults, max_norm)

    def _forget(self) -> None:
        super()._forget()
        self._lacks_momenta = False
        """Whether the estimates were loaded, but not the momenta that they estimate."""
        self._products: SharedProducts | None = None
        self._pruned_by: MaskIndex | None = None
        """The masks by which the estimates were pruned last."""
        self._coarse: set[str] = set()
        """The names of matrices whose code is so coarse that it needs other coordinates."""
        self._sharded: ShardedMuon | None = None
        """Steps the matrices if they are sharded, else None."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, below in (("lr", float("inf")), ("momentum", 1), ("weight_decay", float("inf"))):
            require_in_range(name, float(group[name]), 0, below)
        if group["muon"] not in (True, False):
            raise ValueError(
                f"EF21Muon: a group has muon {group['muon']!r}: expected a model, or groups with True (Newton-Schulz) or "
                "False (AdamW)"
            )
        for p in group["params"] if group["muon"] else ():
            if p.dim() < 2 or p.dtype != torch.float32:  # an estimate in 16 bits would keep each rounding for good
                raise ValueError(
                    f"EF21Muon: a group of matrices has a parameter of shape {tuple(p.shape)} and {p.dtype}: expected float32 "
                    "and two dimensions or more"
                )

    def bind(self, parameters: dict[str, Tensor], world_size: int, may_be_unused: bool, **more: bool) -> None:
        super().bind(parameters, world_size, may_be_unused, **more)
        self._sharded = None
        warm_up(parse(self.param_groups[0]["others_spec"]), next(iter(parameters.values())).device)

    @property
    def takes_means(self) -> bool:
        return self._sharded is not None

    def hold_shards(self, sharded: ShardedMuon) -> None:
        """Step shards from now on; their mean gradients are in `grad` when `step` is called. For hooks, after `bind`.

        All state of the shards is allocated now, since a checkpoint is loaded into existing tensors.
        """
        self._sharded, self._lacks_momenta = sharded, False  # a state has all of them
        for p, group in self._places.values():
            if not group["muon"] and "exp_avg" not in self.state[p]:
                begin_adamw(p, self.state[p])

    def replicated_state(self) -> dict[str, object]:
        if self._sharded is not None:
            return super().replicated_state()
        device = next(iter(self._bound.values())).device
        ranks = 1 if self._products is None else len(self._products.node.ranks)
        how = f"{PROCESSOR}, {torch.backends.cpu.get_cpu_capability()}, {CPU_DTYPE}, {torch.get_num_threads()} threads"
        how = f"{how}, {ranks} ranks a node"
        if device.type == "cuda":
            how = torch.cuda.get_device_name(device)
        return {**super().replicated_state(), "matrix products by": how}  # the bits of the update depend on that

    def needs_all_buckets(self) -> bool:
        return self.param_groups[0]["max_norm"] is not None

    def candidates(self) -> Sequence[Candidate]:
        """Return `SPECS`."""
        return [Candidate(spec) for spec in SPECS]

    def kind(self, name: str) -> object:
        group = self._places[name][1]
        return ("matrix", group["momentum"]) if group["muon"] else "other"

    def override_held(self, segments: Segments, codec: Codec) -> Override:
        group = self._places[segments[0].name][1]
        if not group["muon"]:
            other = parse(group["others_spec"]) if codec.lossy else codec
            return Override(other, prepare=lambda bucket, memory: self.clip(bucket))

        names = {segment.name for segment in segments}
        self._coarse = self._coarse | names if is_coarse(codec) else self._coarse - names

        def prepare(bucket: Tensor, memory: Memory) -> Ahead | None:
            assert memory.momentum is not None
            self.clip(bucket)
            self._enter(bucket, segments)
            ahead, index = Ahead(memory.momentum, 1 - group["momentum"]), memory.kept_index
            if index is None:
                return ahead  # in the pass that encodes
            kept = bucket[index]
            ahead.apply(kept)
            bucket[index] = kept
            return None

        return Override(codec, prepare=prepare, momentum=True)

    def hand_over(self, buckets: StepBuffer) -> None:
        """Take the step buffer that exchanges the bound parameters. For hooks.

        An estimate whose momenta are not taken over starts again at 0, as they do: after masks, and of a matrix that was not
        exchanged for a while. It only adds moves, so what it has of an older momentum would stay.
        """
        self._products = SharedProducts(buckets.collectives)
        super().hand_over(buckets)
        if self._lacks_momenta:
            return  # loaded before the session's state, which has them
        for name, p in self._bound.items():
            if p in self.state and not buckets.collectives.feedback.part(name)[0]:
                self.state[p].pop("momentum_buffer", None)
                keep(self.state[p], None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self._sharded is not None:
            self.begin_backward(1.0)  # what was reduced is there
        return super().step(closure)

    def apply(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        there = {name: (p, group, update) for name, (p, group, update) in updates.items() if update is not None}
        matrices = {name: place for name, place in there.items() if place[1]["muon"]}
        if self._sharded is None:
            masks = self.masks
            self._prune_estimates(matrices)
            moves = [Move(p, group, moved, masks.places(name)) for name, (p, group, moved) in matrices.items()]
            self._step_matrices(moves, self._products)
            hidden = [name for name, (_, group) in self._places.items() if group["muon"]]
            numbers = {name: number for number, name in enumerate(hidden)}
            short = {name: min(p.shape[0], p[0].numel()) for name, (p, _, _) in matrices.items()}
            due = [n for n, (_, group, _) in matrices.items() if is_due(group["steps"] + 1, numbers[n], short[n])]
            self._turn(due)
        else:
            if self.must_verify():
                self._sharded.begin(self.replicated_state())
            self._sharded.clip([gradient for _, _, gradient in there.values()])
            self._sharded.step(matrices)
        for group in self.param_groups:
            others = [p for p, of, _ in updates.values() if of is group and not group["muon"] and p.grad is not None]
            if others:
                step_adamw(others, group, self.state, fused=True)
            group["steps"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.came_with_session(state_dict):
            super().load_state_dict(state_dict)
            self._lacks_momenta = self._sharded is None and any("momentum_buffer" in s for s in self.state.values())

    def load_own_state(self, state: dict[str, Any]) -> None:
        self._lacks_momenta = False  # the session restores its feedback, which holds the momenta, in the same call

    def begin_backward(self, scale: float) -> bool:
        if self._lacks_momenta:
            raise RuntimeError(
                "EF21Muon: a state was loaded without the session's, which has each rank's momentum: expected "
                "session.load_state_dict(...) after optimizer.load_state_dict(...)"
            )
        return super().begin_backward(scale)

    def step_plain(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not group["muon"]:
            step_adamw(parameters, group, self.state)
            return
        fresh = 1 - group["momentum"]  # the whole move of the momentum: nothing is compressed here
        moves = []
        for p in parameters:
            if (gradient := p.grad) is None:
                continue
            if (basis := self._basis(p)) is not None:
                gradient = basis.enter(gradient.flatten(1)).view(p.shape)
            moves.append(Move(p, group, (gradient - self._estimate(p)).mul_(fresh)))
        self._step_matrices(moves)

    def _estimate(self, p: Tensor) -> Tensor:
        """Return the estimate of a matrix's momentum that all ranks hold."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]  # type: ignore[no-any-return]

    def _basis(self, p: Tensor) -> Basis | None:
        """Return the coordinates in which a matrix's momentum and estimate are; None if they are its own."""
        return Basis.kept_in(self.state.get(p, {}))

    def _enter(self, flat: Tensor, segments: Segments) -> None:
        """Replace the gradients of matrices, one behind the other in `flat`, by what they are in these coordinates.

        Masks do not know coordinates. What is kept of a matrix that has got a mask starts anew, in its own.
        """
        for segment, part in zip(segments, flat.split(sizes(segments)), strict=True):
            p = self._places[segment.name][0]
            if (basis := self._basis(p)) is None:
                continue
            if self.masks.places(segment.name) is None:
                part.copy_(basis.enter(part.view(p.shape[0], -1)).view(-1))
                continue
            for values in self._kept(segment.name):
                values.zero_()

    def _kept(self, name: str) -> list[Tensor]:
        """Return what feedback keeps of a matrix: this rank's momentum, and how far it is ahead of what was sent."""
        assert self._withheld is not None
        tensors, part = self._withheld[0].part(name)
        return [values[part] for values in tensors]

    def _turn(self, names: Sequence[str]) -> None:
        """Choose new coordinates for these matrices, or their own if the code is fine now, and move all that is kept there."""
        for name in names:
            p = self._places[name][0]
            old, wanted = self._basis(p), name in self._coarse and p.is_contiguous()
            if self.masks.places(name) is not None or (old is None and not wanted):
                continue
            shape, estimate = (p.shape[0], p[0].numel()), self._estimate(p).view(-1)
            new = Basis.of(in_own(estimate, shape, old)) if wanted else None
            if wanted and new is None:
                continue
            move((estimate, *self._kept(name)), shape, old, new)
            keep(self.state[p], new)

    def _prune_estimates(self, moving: Collection[str]) -> None:
        """Set the estimates to 0 where new masks have set the momenta to 0, those of matrices that do not move now, too.

        A pruned matrix that was in other coordinates starts anew. The momenta of one that moves began again with this move.
        """
        masks = self.masks
        for name, (p, _) in self._places.items() if self._pruned_by is not masks else ():
            kept, estimate = masks.places(name), self.state.get(p, {}).get("momentum_buffer")
            if kept is None or estimate is None:
                continue
            if self._basis(p) is None:
                zero_others(estimate, kept)
                continue
            for values in (estimate, *(() if name in moving else self._kept(name))):
                values.zero_()
            keep(self.state[p], None)
        self._pruned_by = masks

    def _step_matrices(self, moves: Sequence[Move], products: SharedProducts | None = None) -> None:
        """Step matrices by the moves of their momenta. The ranks of a node divide Newton-Schulz among them."""
        for one in moves:
            self._estimate(one.p).add_(one.moved)
        shapes = [one.shape for one in moves]
        me = 0 if products is None else products.node.me
        owners = [me] * len(shapes) if products is None else products.owners(shapes)
        alike: dict[object, list[int]] = {}
        for number, (one, owner) in enumerate(zip(moves, owners, strict=True)):
            if owner == me:
                alike.setdefault((one.shape, one.p.device), []).append(number)
        steps: dict[int, Tensor] = {}
        for numbers in alike.values():
            directions = torch.stack([self._direction(moves[number]) for number in numbers])
            steps |= zip(numbers, newton_schulz(directions), strict=True)
        if products is not None and len(set(owners)) > 1:
            steps = dict(enumerate(products.gather(steps, shapes, owners)))
        for number, one in enumerate(moves):
            lr, step = float(one.group["lr"]), steps[number].reshape(one.p.shape)
            if one.kept is not None:
                step = torch.empty_like(one.p).copy_(step)
                zero_others(step, one.kept)
            one.p.mul_(1 - lr * one.group["weight_decay"])
            one.p.add_(step, alpha=-AS_ADAMW * lr * max(one.shape) ** 0.5)

    def _direction(self, one: Move) -> Tensor:
        """Return the input of Newton-Schulz for a matrix: [rows, columns]."""
        estimate, basis = self._estimate(one.p), self._basis(one.p)
        nesterov = self._alone if one.group["nesterov"] is None else one.group["nesterov"]
        direction = estimate.add(one.moved, alpha=one.group["momentum"]) if nesterov else estimate
        return direction.reshape(one.shape) if basis is None else basis.leave(direction, one.shape)
