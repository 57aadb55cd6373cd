"""What ZeRO 1 and 2 send: the gradients of every part to its owner, and the owners' new values to all.

`Owners` is the traffic; `OneBitPartitions` is OneBitAdamW whose state is partitioned likewise. `zero_partitions`
calls them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import require_agreement
from commpress.comm.codecs import Codec, parse
from commpress.comm.exchange import Label, Transfer, Wire
from commpress.comm.exchange.gather import gather, native_gather
from commpress.comm.feedback import Memory, Segments
from commpress.comm.plan import Choice, Treatment
from commpress.comm.prologue import Prologue
from commpress.comm.shards import Pending, Shards
from commpress.optim import OneBitAdamW, loops
from commpress.optim.base import plain


class Owners(Shards):
    """Shards of any lengths: ZeRO 1 and 2 cut the parameters of a group, one behind the other, in W equal partitions, whatever
    lies in a bucket."""

    def to_owners(
        self,
        x: Tensor,
        cuts: Sequence[int],
        segments: Segments,
        index: int,
        choice: Choice,
        treatment: Treatment,
        dense: int,
        known: Sequence["Known"] = (),
        backend_bytes: int | None = None,
    ) -> Pending:
        """Replace x[cuts[rank] : cuts[rank + 1]] by its mean over the ranks. `x` is float32 [cuts[-1]]; what of it belongs to
        others is undefined afterwards. `known` is coded along, and taken off the mean. `dense` and `backend_bytes`: bytes
        that must be sent without compression, and those that DeepSpeed sends in their place."""
        memory = self.feedback.memory(segments, choice.feedback, None, self.device)
        label = self.label("gradients", segments, x.numel(), choice, "to_owners", index)
        exchange = _to_owners(x, cuts, choice.codec, treatment, known, memory, self.wire, label)
        return self.start("gradients", "to_owners", choice, x, x, index, dense, exchange, None, backend_bytes)

    def differences(self, mine: Tensor, out: Tensor, index: int, codec: Codec, itemsize: int) -> Pending:
        """Fill `out` ([W * m]) with the ranks' `mine` ([m]), float32 both. `itemsize` is what a parameter takes without us."""
        choice = replace(self.parameters, codec=codec).choose(mine.numel(), itemsize, self.world_size)
        buffer: Tensor | None = None
        label = self.label(f"parameters of bucket {index}", (), mine.numel(), choice, "gather", index)
        if choice.codec.lossy:
            buffer = self.take(self.world_size * choice.codec.nbytes(mine.numel()))
            exchange = gather(mine, out, choice.codec, buffer, self.wire, label)
        else:
            exchange = native_gather(mine, out, self.wire, label)
        dense = (self.world_size - 1) * mine.numel() * itemsize
        return self.start("parameters", "gather", choice, out, out, index, dense, exchange, buffer)


def _to_owners(
    x: Tensor,
    cuts: Sequence[int],
    codec: Codec,
    treatment: Treatment,
    known: Sequence["Known"],
    memory: Memory,
    wire: Wire,
    label: Label,
) -> Iterator[Transfer]:
    """Each rank sends to every other its part, coded: (W - 1) / W * nbytes(n) in all if they are of one length."""
    if treatment.prepare is not None:
        treatment.prepare(x, memory)
    for k in known:
        loops.lean(x[k.at : k.at + k.values.numel()], k.values, k.share)
    me, W = wire.rank, wire.world_size
    lengths = [cuts[r + 1] - cuts[r] for r in range(W)]
    sizes = [codec.nbytes(length) if length else 0 for length in lengths]
    outgoing = memory.buffer("outgoing", sum(sizes), x.device).split(sizes)
    gathered = memory.buffer("gathered", W * sizes[me], x.device)
    rows = gathered.split(sizes[me]) if sizes[me] else (gathered,) * W
    for r in range(W):
        if lengths[r]:
            memory.encode(codec, x, slice(cuts[r], cuts[r + 1]), out=rows[me] if r == me else outgoing[r])
    yield wire.swap(outgoing, rows, label, last=True)
    if lengths[me]:
        codec.mean(gathered, lengths[me], W, out=x[cuts[me] : cuts[me + 1]])
        for k in known:
            if cuts[me] <= k.at < cuts[me + 1]:
                loops.lean(x[k.at : k.at + k.values.numel()], k.values, -k.share)


@dataclass(frozen=True)
class Known:
    """What all ranks know of the values of one owner that start at `at` in a bucket: `share` times `values` (bfloat16)."""

    at: int
    values: Tensor
    share: float


@dataclass(frozen=True)
class Piece:
    """What of a parameter belongs to one owner: values `start` to `stop` of it, which stand at `at` in group `group`."""

    name: str
    owner: int
    place: int
    """The parameter's place in its bucket."""
    start: int
    stop: int
    group: int
    at: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class Layout:
    """A bucket in the order of its owners."""

    index: int
    pieces: list[Piece]
    segments: Segments
    cuts: list[int]
    x: Tensor


class OneBitPartitions:
    """OneBitAdamW whose momentum n and fp32 values are partitioned. After its warm-up

        rank i sends  (1 - beta1) g_i / d      its owner  n <- beta1 n + mean of what was sent,   p <- (1 - lr wd) p - lr n

    As n is the same for all, what each rank would send of it need not travel. But a coarse codec loses less of a momentum than
    of a gradient; so beta1 k is added before the coding and taken off behind it, where k is what all ranks know of n: the last
    differences of parameters that they were sent, over -lr. d is needed by all, one float32 a value; it stands, and is gathered
    once.
    """

    def __init__(self, optimizer: OneBitAdamW, zero: Any, shards: Owners) -> None:
        self.optimizer = optimizer
        self._zero, self._shards = zero, shards
        self._inverse: list[Tensor] = []
        """unit / d of all parameters of each group, in the order of its partitions: float32 [W * m]."""
        self._known: list[Tensor] = []
        """k of the same, in units of n: bfloat16 [W * m]."""
        self._learns = shards.parameters.codec.lossy
        self._warming = True
        self._converted: set[str] = set()
        self._leaned: set[int] = set()
        """Buckets that were coded with what is known, in this step."""
        self._gradients: list[Tensor] = []
        flats = {f"partition of group {i}": flat for i, flat in enumerate(zero.single_partition_of_fp32_groups)}
        optimizer.bind(flats, shards.world_size, may_be_unused=False)
        optimizer.add_up, optimizer.ends_at_once = self._over_partitions, True

    def treat(self, layout: Layout) -> Treatment:
        """What to do with a bucket in this step."""
        optimizer = self.optimizer
        if not optimizer.awaits_step:
            optimizer.start(1.0)
            self._warming, self._converted, self._leaned = not optimizer.frozen, set(), set()
            if optimizer.unproven():
                self._prove()
        if self._warming:
            codec = parse(optimizer.param_groups[0]["warmup_spec"])
            return Treatment(codec, "" if codec.lossy else "the variance warms up")
        return Treatment(self._shards.gradients.codec, prepare=partial(self._prepare, layout))

    def parameters(self, codec: Codec) -> tuple[Codec, str]:
        """By what the parameters travel after this step, and why not by the codec that was asked for."""
        if not self._warming or not codec.lossy:
            return codec, ""
        codec = parse(self.optimizer.param_groups[0]["warmup_spec"])
        return codec, "" if codec.lossy else "the variance warms up"

    def step(self, original: Callable[..., None], group: int) -> None:
        """DeepSpeed steps group by group; all step with the last."""
        flats = self._zero.single_partition_of_fp32_groups
        self._gradients.append(flats[group].grad)
        if group < len(flats) - 1:
            return
        optimizer = self.optimizer
        for flat, gradient, settings in zip(flats, self._gradients, optimizer.param_groups, strict=True):
            flat.grad = gradient
            if not self._warming:
                gradient.add_(optimizer.state[flat]["exp_avg"], alpha=settings["betas"][0])
        optimizer.step()
        for flat in flats:
            flat.grad = None
        self._gradients = []
        if self._warming:  # the state has become another when that was the last step
            self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def known(self, layout: Layout) -> list[Known]:
        """beta1 k of a bucket's values, if there is one. Once a step: what feedback keeps of the coding would grow with each
        backward of an accumulation, into n and so into the next k."""
        if self._warming or not self._learns or layout.index in self._leaned:
            return []
        self._leaned.add(layout.index)
        found: list[Known] = []
        for piece in layout.pieces:
            values = self._known[piece.group][piece.at : piece.at + len(piece)]
            at = found[-1].at + found[-1].values.numel() if found else 0
            found.append(Known(at, values, self.optimizer.param_groups[piece.group]["betas"][0]))
        return found

    def learn(self, group: int, start: int, differences: Tensor) -> None:
        """All ranks were sent these differences of parameters: float32 [W, l], each rank's own from its value `start` on."""
        if self._warming:
            return
        settings = self.optimizer.param_groups[group]
        lr, part = float(settings["lr"]), slice(start, start + differences.shape[1])
        rows = self._known[group].view(self._shards.world_size, -1)[:, part]
        factor = -settings["unit"] / lr if lr else 0.0
        for row, values in zip(rows, differences, strict=True):
            # the differences also hold what was withheld before, at another rate; what is no momentum is no knowledge
            loops.learn(values, row, factor, settings["unit"])
        flat = self._zero.single_partition_of_fp32_groups[group]
        self.optimizer.state[flat]["known"][part] = rows[self._shards.rank]

    def _prepare(self, layout: Layout, x: Tensor, memory: Memory) -> None:
        """x <- (1 - beta1) g / d, and what feedback kept of gradients likewise."""
        optimizer, flats = self.optimizer, self._zero.single_partition_of_fp32_groups
        at = 0
        for piece in layout.pieces:
            settings, state = optimizer.param_groups[piece.group], optimizer.state[flats[piece.group]]
            inverse = self._inverse[piece.group][piece.at : piece.at + len(piece)]
            fresh = 1 - settings["betas"][0]
            if not state["settled"] and piece.name not in self._converted:
                self._converted.add(piece.name)
                if memory.residual is not None:
                    memory.residual[at : at + len(piece)].mul_(inverse).mul_(fresh)
                optimizer.settles([state])
            Prologue(inverse, inverse, optimizer.limit(settings), fresh, 0.0).apply(x[at : at + len(piece)])
            at += len(piece)

    def _prove(self) -> None:
        """A phase begins, or a state was loaded: all get the owners' d and k, in one unit, and compare where they stand."""
        optimizer, device, group = self.optimizer, self._shards.device, self._zero.dp_process_group
        self._inverse, self._known = [], []
        if optimizer.frozen:
            unit = torch.tensor(optimizer.param_groups[0]["unit"], dtype=torch.float32, device=device)
            dist.all_reduce(unit, dist.ReduceOp.MAX, group)
            for i, flat in enumerate(self._zero.single_partition_of_fp32_groups):
                settings, state = optimizer.param_groups[i], optimizer.state[flat]
                if self._learns and "known" not in state:
                    state["known"] = torch.zeros_like(flat)
                    self._zero._hp_optimizer_states_linked = False
                for key in state.keys() & {"inverse", "exp_avg", "known"}:
                    state[key] *= float(unit) / settings["unit"]  # powers of two
                settings["unit"] = float(unit)
                self._inverse.append(self._gathered(state["inverse"], "the variance, once, when it stands", i))
                if self._learns:
                    why = "what is known of the momentum, after a start"
                    self._known.append(self._gathered(state["known"], why, i).bfloat16())
        groups = [
            {k: plain(v) for k, v in g.items() if k not in ("params", "variance")} for g in optimizer.param_groups
        ]
        total = sum(int(whole.view(torch.uint8).sum(dtype=torch.int64)) for whole in self._inverse)
        settings = {"optimizer's groups": groups, "frozen variance (sum of its bytes)": total}
        require_agreement(settings, group, device)

    def _gathered(self, part: Tensor, why: str, index: int) -> Tensor:
        """All ranks' parts ([m]), one behind the other."""
        W = self._shards.world_size
        whole = torch.empty(W * part.numel(), dtype=part.dtype, device=part.device)
        dist.all_gather(list(whole.split(part.numel())), part, self._zero.dp_process_group)
        sent = (W - 1) * part.nbytes
        self._shards.meter.by_itself(index, whole.numel(), "float32", "gather", why, "parameters", sent)
        return whole

    def _over_partitions(self, total: Tensor) -> None:
        dist.all_reduce(total, group=self._zero.dp_process_group)
