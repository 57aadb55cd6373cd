"""1-bit Adam whose state is sharded, as ZeRO 1 and 2 shard it: each rank owns a part of the momentum and of the fp32 values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import require_agreement
from commpress.comm.codecs import Codec, parse
from commpress.comm.collectives import Collectives
from commpress.comm.feedback import Memory
from commpress.comm.owned_slices import OwnedBucket
from commpress.comm.plan import Override
from commpress.comm.prologue import Prologue
from commpress.optim import loops
from commpress.optim.one_bit import OneBitAdamW
from commpress.optim.settings import plain


@dataclass(frozen=True)
class Shift:
    """An estimate, known to all ranks, of an owner's values that start at `at` in a bucket: `share` times `values` (bfloat16).

    As in DIANA (Mishchenko et al., arXiv:1901.09269) a known estimate shifts what is coded: here it is added before the coding
    and subtracted from the mean.
    """

    at: int
    values: Tensor
    share: float

    def add(self, x: Tensor, times: float) -> None:
        """Add `times` the estimate to a bucket, in place."""
        loops.add_scaled(x[self.at : self.at + self.values.numel()], self.values, times * self.share)


def shifted(override: Override, shifts: Sequence[Shift], own: slice) -> Override:
    """Return an override that adds the estimates before the coding, and subtracts them from the mean of `own`, this rank's
    values."""
    if not shifts:
        return override

    def prepare(x: Tensor, memory: Memory) -> None:
        if override.prepare is not None:
            override.prepare(x, memory)
        for shift in shifts:
            shift.add(x, 1.0)

    def finish(x: Tensor) -> None:
        for shift in shifts:
            if own.start <= shift.at < own.stop:
                shift.add(x, -1.0)

    return replace(override, prepare=prepare, finish=finish)


class ShardedOneBitAdamW:
    """OneBitAdamW whose momentum n and fp32 values are partitioned. After its warm-up

        rank i sends  (1 - beta1) g_i / d      its owner  n <- beta1 n + mean of what was sent,   p <- (1 - lr wd) p - lr n

    n is the same for all ranks, so a rank need not send its share of it. But a coarse codec loses less of a momentum than of a
    gradient. So beta1 k is added before the coding and subtracted after it. k is an estimate of n that all ranks have: the last
    differences of parameters that they received, divided by -lr. All ranks need d, one float32 a value; it is frozen, and
    gathered once.

    `partitions` returns this rank's fp32 values, one tensor a group, which `optimizer` steps; the ranks of `group` share them.
    `state_changes` is called when the keys of a state change.
    """

    def __init__(
        self,
        optimizer: OneBitAdamW,
        collectives: Collectives,
        partitions: Callable[[], list[Tensor]],
        group: dist.ProcessGroup,
        state_changes: Callable[[], None],
    ) -> None:
        self.optimizer = optimizer
        self._partitions, self._group, self._state_changes = partitions, group, state_changes
        self._collectives = collectives
        self._inverse: list[Tensor] = []
        """unit / d of all parameters of each group, in the order of its partitions: float32 [W * m]."""
        self._estimates: list[Tensor] = []
        """The estimates k of the momentum for each group, in units of n: bfloat16 [W * m]."""
        self._estimates_momentum = collectives.parameters.codec.lossy
        self._warming = True
        self._converted: set[str] = set()
        self._shifted: set[int] = set()
        """The indices of the buckets that were coded with an estimate in this step."""
        self._gradients: list[Tensor] = []
        flats = {f"partition of group {i}": flat for i, flat in enumerate(partitions())}
        optimizer.bind(flats, collectives.world_size, may_be_unused=False)
        optimizer.add_up, optimizer.ends_at_once = self._over_partitions, True

    def override(self, layout: OwnedBucket) -> Override:
        """Return the override of a bucket in this step."""
        optimizer = self.optimizer
        if not optimizer.awaits_step:
            optimizer.begin_backward(1.0)
            self._warming, self._converted, self._shifted = not optimizer.frozen, set(), set()
            if optimizer.must_verify():
                self._prove()
        if self._warming:
            codec = parse(optimizer.param_groups[0]["warmup_spec"])
            return Override(codec, "" if codec.lossy else "the variance warms up")
        return Override(self._collectives.gradients.codec, prepare=partial(self._prepare, layout))

    def parameters(self, codec: Codec) -> tuple[Codec, str]:
        """Return the codec of the parameters after this step, and the reason if it is not `codec`."""
        if not self._warming or not codec.lossy:
            return codec, ""
        codec = parse(self.optimizer.param_groups[0]["warmup_spec"])
        return codec, "" if codec.lossy else "the variance warms up"

    def step(self, group: int) -> bool:
        """Step all groups if `group` is the last one, whose gradients come last. Returns whether it was."""
        flats = self._partitions()
        gradient = flats[group].grad
        assert gradient is not None
        self._gradients.append(gradient)
        if group < len(flats) - 1:
            return False
        optimizer = self.optimizer
        for flat, gradient, settings in zip(flats, self._gradients, optimizer.param_groups, strict=True):
            flat.grad = gradient
            if not self._warming:
                gradient.add_(optimizer.state[flat]["exp_avg"], alpha=settings["betas"][0])
        optimizer.step()
        for flat in flats:
            flat.grad = None
        self._gradients = []
        if self._warming:  # the keys of the state change at the end of the warm-up
            self._state_changes()
        return True

    def shifts(self, layout: OwnedBucket) -> list[Shift]:
        """Return the shifts beta1 k of a bucket's values, at most once a step.

        With one in each backward of an accumulation, the error of the coding would grow, into n and so into the next k.
        """
        if self._warming or not self._estimates_momentum or layout.index in self._shifted:
            return []
        self._shifted.add(layout.index)
        found: list[Shift] = []
        for piece in layout.pieces:
            values = self._estimates[piece.group][piece.at : piece.at + len(piece)]
            at = found[-1].at + found[-1].values.numel() if found else 0
            found.append(Shift(at, values, self.optimizer.param_groups[piece.group]["betas"][0]))
        return found

    def estimate_momentum(self, group: int, start: int, differences: Tensor) -> None:
        """Update the estimates from parameter differences: float32 [W, l]; row r starts at value `start` of rank r's part."""
        if self._warming:
            return
        settings = self.optimizer.param_groups[group]
        lr, part = float(settings["lr"]), slice(start, start + differences.shape[1])
        rows = self._estimates[group].view(self._collectives.world_size, -1)[:, part]
        factor = -settings["unit"] / lr if lr else 0.0
        for row, values in zip(rows, differences, strict=True):
            # differences also hold residuals of earlier steps, at another rate; a value too large for a momentum counts as 0
            loops.estimate_momentum(values, row, factor, settings["unit"])
        flat = self._partitions()[group]
        self.optimizer.state[flat]["known"][part] = rows[self._collectives.rank]

    def _prepare(self, layout: OwnedBucket, x: Tensor, memory: Memory) -> None:
        """x <- (1 - beta1) g / d, in place; the residual of gradients is converted in the same way, once."""
        optimizer, flats = self.optimizer, self._partitions()
        at = 0
        for piece in layout.pieces:
            settings, state = optimizer.param_groups[piece.group], optimizer.state[flats[piece.group]]
            inverse = self._inverse[piece.group][piece.at : piece.at + len(piece)]
            fresh = 1 - settings["betas"][0]
            if not state["feedback_converted"] and piece.name not in self._converted:
                self._converted.add(piece.name)
                if memory.residual is not None:
                    memory.residual[at : at + len(piece)].mul_(inverse).mul_(fresh)
                optimizer.mark_converted([state])
            Prologue(inverse, inverse, optimizer.limit(settings), fresh, 0.0).apply(x[at : at + len(piece)])
            at += len(piece)

    def _prove(self) -> None:
        """Gather the owners' d and k, in one unit, and compare states: after a new phase or a load. Collective."""
        optimizer, device, group = self.optimizer, self._collectives.device, self._group
        self._inverse, self._estimates = [], []
        if optimizer.frozen:
            unit = torch.tensor(optimizer.param_groups[0]["unit"], dtype=torch.float32, device=device)
            dist.all_reduce(unit, dist.ReduceOp.MAX, group)
            for i, flat in enumerate(self._partitions()):
                settings, state = optimizer.param_groups[i], optimizer.state[flat]
                if self._estimates_momentum and "known" not in state:
                    state["known"] = torch.zeros_like(flat)
                    self._state_changes()
                for key in state.keys() & {"inverse", "exp_avg", "known"}:
                    state[key] *= float(unit) / settings["unit"]  # powers of two
                settings["unit"] = float(unit)
                self._inverse.append(self._gathered(state["inverse"], "the variance, once, when it stands", i))
                if self._estimates_momentum:
                    why = "what is known of the momentum, after a start"
                    self._estimates.append(self._gathered(state["known"], why, i).bfloat16())
        groups = [
            {k: plain(v) for k, v in g.items() if k not in ("params", "variance")} for g in optimizer.param_groups
        ]
        total = sum(int(whole.view(torch.uint8).sum(dtype=torch.int64)) for whole in self._inverse)
        settings = {"optimizer's groups": groups, "frozen variance (sum of its bytes)": total}
        require_agreement(settings, group, device)

    def _gathered(self, part: Tensor, why: str, index: int) -> Tensor:
        """Return all ranks' parts ([m]) in one tensor: [W * m]."""
        W = self._collectives.world_size
        whole = torch.empty(W * part.numel(), dtype=part.dtype, device=part.device)
        dist.all_gather(list(whole.split(part.numel())), part, self._group)
        sent = (W - 1) * part.nbytes
        self._collectives.meter.record_uncompressed(
            index, whole.numel(), "float32", "all_gather", why, "parameters", sent
        )
        return whole

    def _over_partitions(self, total: Tensor) -> None:
        dist.all_reduce(total, group=self._group)
