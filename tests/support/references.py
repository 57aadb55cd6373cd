"""References of the optimizers: their papers in plain torch, all ranks in one process.

Only the codecs are commpress's. No unit, no loss scale, no thread, no fused loop.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from training import loss_of

from commpress.comm.codecs import Codec, parse
from commpress.comm.exchange.two_shot import chunk_bounds

FEWEST_VALUES = 256
"""Smaller buckets travel dense."""

Layout = Sequence[Sequence[tuple[str, int]]]
Tensors = dict[str, Tensor]


def constant(_: int) -> float:
    """A schedule that leaves lr alone."""
    return 1.0


class Bucket:
    """The parameters of one bucket, and what each rank's error feedback keeps of them."""

    def __init__(self, segments: Sequence[tuple[str, int]], world_size: int) -> None:
        self.names, self.sizes = [name for name, _ in segments], [n for _, n in segments]
        self.residuals = [torch.zeros(sum(self.sizes)) for _ in range(world_size)]
        self.seconds: list[Tensor] | None = None
        self.settled = True

    def flat(self, values: Tensors) -> Tensor:
        """Return these parameters' values, one after another."""
        return torch.cat([values[name].reshape(-1) for name in self.names])

    def parts(self, flat: Tensor, like: Tensors) -> Tensors:
        """The reverse."""
        parts = zip(self.names, flat.split(self.sizes), strict=True)
        return {name: part.view(like[name].shape).clone() for name, part in parts}

    def mean(self, sent: list[Tensor], codec: Codec, exchange: str) -> Tensor:
        """Return what all ranks get out of what each has to send."""
        n, W = sent[0].numel(), len(sent)
        if not codec.lossy or n < FEWEST_VALUES:
            return torch.stack(sent).mean(dim=0)
        if exchange == "one_shot":
            decoded = [self._code(codec, x, residual) for x, residual in zip(sent, self.residuals, strict=True)]
            return torch.stack(decoded).mean(dim=0)
        cuts = chunk_bounds(n, W, codec.granularity)
        if self.seconds is None:
            self.seconds = [torch.zeros(cuts[r + 1] - cuts[r]) for r in range(W)]
        chunks = []
        for r in range(W):
            own = slice(cuts[r], cuts[r + 1])
            decoded = [self._code(codec, x[own], e[own]) for x, e in zip(sent, self.residuals, strict=True)]
            chunks.append(self._code(codec, torch.stack(decoded).mean(dim=0), self.seconds[r]))
        return torch.cat(chunks)

    def fold(self, codec: Codec) -> None:
        """Give what the owners of chunks kept back to their first memories."""
        if self.seconds is not None:
            cuts = chunk_bounds(sum(self.sizes), len(self.seconds), codec.granularity)
            for r, second in enumerate(self.seconds):
                self.residuals[r][cuts[r] : cuts[r + 1]] += len(self.seconds) * second
            self.seconds = None

    @staticmethod
    def _code(codec: Codec, x: Tensor, residual: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        decoded = codec.decode(codec.encode(x + residual), x.numel())
        residual.copy_(x + residual - decoded)
        return decoded


def gradients(model: nn.Module, step: int, rank: int) -> Tensors:
    """One rank's gradients in one step."""
    model.zero_grad()
    loss_of(model, step, rank).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm_of(values: Tensors) -> float:
    """Return the norm of all of them as one vector."""
    return float(torch.cat([v.reshape(-1) for v in values.values()]).norm())


def clipped(gradient: Tensors, most: float | None) -> Tensors:
    """A gradient whose norm is `most` at most."""
    if most is None or (norm := norm_of(gradient)) <= most:
        return gradient
    return {name: g * (most / norm) for name, g in gradient.items()}


class FrozenAdam:
    """AdamW that freezes its variance, then exchanges n = momentum / (sqrt(variance) + eps) each `every` steps.

    One bucket syncs when the number of steps behind the warm-up is a multiple of `every`. `groups` are settings by parameter
    name, `schedule` lr's factor by step. `refreshes` are the steps in which the variance learns from the exact mean.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        world_size: int,
        spec: str,
        exchange: str,
        groups: Callable[[str], dict[str, Any]],
        *,
        warmup_steps: int,
        warmup_spec: str = "none",
        schedule: Callable[[int], float] = constant,
        max_norm: float | None = None,
        every: int = 1,
        refreshes: Sequence[int] = (),
    ) -> None:
        self.model, self.world_size, self.exchange, self.every = model, world_size, exchange, every
        self.codec, self.warm_codec = parse(spec), parse(warmup_spec)
        self.groups, self.schedule, self.max_norm = groups, schedule, max_norm
        self.warmup_steps, self.refreshes = warmup_steps, refreshes
        self.buckets = [Bucket(segments, world_size) for segments in layout]
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.ranks = [{name: p.clone() for name, p in start.items()} for _ in range(world_size)]
        self.momenta = [{name: torch.zeros_like(p) for name, p in start.items()} for _ in range(world_size)]
        self.variance = {name: torch.zeros_like(p) for name, p in start.items()}
        self.size: Tensors = {}  # d
        self.anchor: Tensors = {}
        self.decay = dict.fromkeys(start, 1.0)
        self.weight = dict.fromkeys(start, 0.0)
        self.steps = self.learnt = 0
        self.waiting = self.covered = 0  # steps since the last sync, and those that it had
        self.bounded = 0.0
        """The largest share of gradients of a step that were bounded."""

    def lay_out(self, layout: Layout) -> None:
        """From now on in these buckets; what feedback keeps of a parameter moves along."""
        kept: list[Tensors] = [{} for _ in range(self.world_size)]
        for bucket in self.buckets:
            bucket.fold(self.warm_codec if not self.size else self.codec)
            for rank, residual in enumerate(bucket.residuals):
                kept[rank] |= zip(bucket.names, residual.split(bucket.sizes), strict=True)
        self.buckets = [Bucket(segments, self.world_size) for segments in layout]
        for bucket in self.buckets:
            bucket.residuals = [bucket.flat(values) for values in kept]

    def step(self, batch: int) -> None:
        """One step of all ranks on a step's batches."""
        own = []
        for rank in range(self.world_size):
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(self.ranks[rank][name])
            own.append(gradients(self.model, batch, rank))
        if self.steps < self.warmup_steps:
            self._warm_up(own)
        else:
            self._frozen(own)
        self.steps += 1
        if self.steps == self.warmup_steps:
            self._freeze()

    def _warm_up(self, own: list[Tensors]) -> None:
        mean: Tensors = {}
        for bucket in self.buckets:
            got = bucket.mean([bucket.flat(g) for g in own], self.warm_codec, self._default_exchange(self.warm_codec))
            mean |= bucket.parts(got, own[0])
        mean = clipped(mean, self.max_norm)
        self.learnt += 1
        for name, g in mean.items():
            lr, beta1, beta2, eps, wd = self._settings(name)
            self.variance[name] = beta2 * self.variance[name] + (1 - beta2) * g.square()
            m = beta1 * self.momenta[0][name] + (1 - beta1) * g
            root = (self.variance[name] / (1 - beta2**self.learnt)).sqrt()
            p = (1 - lr * wd) * self.ranks[0][name] - lr * m / (1 - beta1**self.learnt) / (root + eps)
            for rank in range(self.world_size):
                self.momenta[rank][name], self.ranks[rank][name] = m, p

    def _freeze(self) -> None:
        self.size = {name: self._size(name) for name in self.variance}
        self.anchor = {name: p.clone() for name, p in self.ranks[0].items()}
        for bucket in self.buckets:
            bucket.fold(self.warm_codec)
            bucket.settled = False
        for momenta in self.momenta:
            for name, m in momenta.items():
                beta1 = self._settings(name)[1]
                momenta[name] = m / (1 - beta1**self.learnt) / self.size[name]

    def _frozen(self, own: list[Tensors]) -> None:
        W, behind = self.world_size, self.steps - self.warmup_steps
        refreshes = self.steps in self.refreshes
        if refreshes:
            mean = {}
            for bucket in self.buckets:  # by the warm-up's codec, without feedback
                fresh = Bucket(list(zip(bucket.names, bucket.sizes, strict=True)), W)
                sent = [fresh.flat(g) for g in own]
                got = fresh.mean(sent, self.warm_codec, self._default_exchange(self.warm_codec))
                mean |= fresh.parts(got, own[0])
            own = [mean] * W
            self.learnt += 1
            for name, g in mean.items():
                beta2 = self._settings(name)[2]
                self.variance[name] = beta2 * self.variance[name] + (1 - beta2) * g.square()
                before, self.size[name] = self.size[name], self._size(name)
                for momenta in self.momenta:
                    momenta[name] = momenta[name] * before / self.size[name]
        elif self.max_norm is not None:
            own = [clipped(g, self.max_norm * math.sqrt(W)) for g in own]
        beyond = total = 0
        for name in self.size:
            lr, beta1, _, _, wd = self._settings(name)
            self.decay[name] *= 1 - lr * wd
            self.weight[name] = (1 - lr * wd) * self.weight[name] + lr
            for rank in range(W):
                scaled = own[rank][name] / self.size[name]
                beyond, total = beyond + int((scaled.abs() > 2 * math.sqrt(W)).sum()), total + scaled.numel()
                scaled = scaled.clamp(-2 * math.sqrt(W), 2 * math.sqrt(W))
                n = self.momenta[rank][name] = beta1 * self.momenta[rank][name] + (1 - beta1) * scaled
                self.ranks[rank][name] = (1 - lr * wd) * self.ranks[rank][name] - lr * n
        self.bounded = max(self.bounded, beyond / total)
        self.waiting += 1
        if not refreshes and (behind + 1) % self.every == 0:
            for bucket in self.buckets:
                self._sync(bucket)
            self.covered, self.waiting = self.waiting, 0

    def _sync(self, bucket: Bucket) -> None:
        if not bucket.settled:  # what feedback kept of gradients becomes what it keeps of n
            bucket.settled = True
            share = bucket.flat({name: (1 - self._settings(name)[1]) / self.size[name] for name in bucket.names})
            for residual in bucket.residuals:
                residual *= share
        gained = [torch.zeros_like(residual) for residual in bucket.residuals]
        if (
            self.covered and self.covered != self.waiting
        ):  # a mean of so many steps becomes one of as many as this sync has
            bucket.fold(self.codec)
            for gain, residual in zip(gained, bucket.residuals, strict=True):
                gain += residual * (1 - self.covered / self.waiting)
                residual *= self.covered / self.waiting
        sent = []
        for rank in range(self.world_size):
            mine = {}
            for name in bucket.names:
                weight, drift = self.weight[name], self.decay[name] * self.anchor[name] - self.ranks[rank][name]
                direct = self.every == 1 or weight == 0  # what the division would give, without its rounding
                mine[name] = self.momenta[rank][name] if direct else drift / weight
            sent.append(bucket.flat(mine))
        own = [bucket.parts(mine - gain, self.anchor) for mine, gain in zip(sent, gained, strict=True)]
        got = bucket.parts(bucket.mean(sent, self.codec, self.exchange), self.anchor)
        for name, n in got.items():
            self.anchor[name] = self.decay[name] * self.anchor[name] - self.weight[name] * n
            self.decay[name], self.weight[name] = 1.0, 0.0
            for rank in range(self.world_size):
                self.ranks[rank][name] = self.anchor[name].clone()
                self.momenta[rank][name] = n + self.momenta[rank][name] - own[rank][name]

    def _size(self, name: str) -> Tensor:
        _, _, beta2, eps, _ = self._settings(name)
        variance = self.variance[name] / (1 - beta2**self.learnt)
        return torch.where(variance > 0, variance.sqrt(), variance.mean().sqrt()) + eps

    def _settings(self, name: str) -> tuple[float, float, float, float, float]:
        group = self.groups(name)
        beta1, beta2 = group["betas"]
        return group["lr"] * self.schedule(self.steps), beta1, beta2, group["eps"], group["weight_decay"]

    def _default_exchange(self, codec: Codec) -> str:
        return "one_shot" if codec.exchange == "one_shot" or self.world_size == 2 else "two_shot"


class Dgc:
    """Deep Gradient Compression: momentum of own gradients, the largest of it sent, momentum cleared where it was."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        world_size: int,
        ratio: float,
        *,
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_norm: float | None = None,
        masked: bool = True,
    ) -> None:
        self.model, self.world_size, self.ratio, self.masked = model, world_size, ratio, masked
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov
        self.max_norm = max_norm
        self.buckets = [Bucket(segments, world_size) for segments in layout]
        self.momenta = [[torch.zeros(sum(b.sizes)) for b in self.buckets] for _ in range(world_size)]

    def step(self, batch: int) -> None:
        """One step of all ranks on a step's batches."""
        model, W = self.model, self.world_size
        own = [gradients(model, batch, rank) for rank in range(W)]
        if self.max_norm is not None:
            own = [clipped(g, self.max_norm * math.sqrt(W)) for g in own]
        values = {name: p.detach() for name, p in model.named_parameters()}
        for i, bucket in enumerate(self.buckets):
            mean = torch.zeros(sum(bucket.sizes))
            for rank in range(W):
                u, residual = self.momenta[rank][i], bucket.residuals[rank]
                g = bucket.flat(own[rank]) + self.weight_decay * bucket.flat(values)
                u.mul_(self.momentum).add_(g)
                total = residual + (g + self.momentum * u if self.nesterov else u)
                at = total.abs().topk(max(1, round(self.ratio * total.numel()))).indices
                mean[at] += total[at] / W
                residual.copy_(total)
                residual[at] = 0
                if self.masked:
                    u[at] = 0
            for name, update in bucket.parts(mean, values).items():
                values[name] -= self.lr * update


class Ef21Muon:
    """EF21-Muon with an estimate of each rank's momentum, and AdamW on mean gradients for the other parameters.

    `layout` are the buckets of matrices. What a rank's momentum is ahead of its estimate is coded, all ranks take the mean.
    Where `turns` has a matrix it is coded in other coordinates; all that is kept stays in the matrices' own.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        world_size: int,
        codec: Codec,
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
    ) -> None:
        self.model, self.world_size, self.codec = model, world_size, codec
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.buckets = [Bucket(segments, world_size) for segments in layout]
        sizes = [sum(bucket.sizes) for bucket in self.buckets]
        self.momenta, self.estimates = ([[torch.zeros(n) for n in sizes] for _ in range(world_size)] for _ in range(2))
        self.common = [torch.zeros(n) for n in sizes]
        self.turns: dict[str, tuple[Tensor, Tensor]] = {}
        """By matrix what it is multiplied with along its shorter side before it is coded, and what takes that back."""
        names = {name for bucket in self.buckets for name in bucket.names}
        self.others = [p for name, p in model.named_parameters() if name not in names]
        self.adamw = torch.optim.AdamW(self.others, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self, batch: int) -> None:
        """One step of all ranks on a step's batches."""
        own = [gradients(self.model, batch, rank) for rank in range(self.world_size)]
        values = dict(self.model.named_parameters())
        for i, bucket in enumerate(self.buckets):
            moved = torch.zeros_like(self.common[i])
            for rank in range(self.world_size):
                m, e = self.momenta[rank][i], self.estimates[rank][i]
                m.lerp_(bucket.flat(own[rank]), 1 - self.momentum)
                ahead = m - e
                coded = self._coded(ahead, bucket, values) if self.codec.lossy else ahead
                e += coded
                moved += coded / self.world_size
            self.common[i] += moved
            direction = self.common[i] + self.momentum * moved if self.nesterov else self.common[i]
            for name, part in bucket.parts(direction, values).items():
                with torch.no_grad():
                    p, step = values[name], _orthogonal(part)
                    p.mul_(1 - self.lr * 0.1).sub_(step, alpha=0.2 * self.lr * math.sqrt(max(p.shape)))
        means = {name: torch.stack([g[name] for g in own]).mean(dim=0) for name in own[0]}
        for name, p in values.items():
            p.grad = means[name]
        self.adamw.step()

    def _coded(self, ahead: Tensor, bucket: Bucket, values: Mapping[str, Tensor]) -> Tensor:
        """What arrives of matrices, in their own coordinates."""
        if not self.turns:
            return self.codec.decode(self.codec.encode(ahead), ahead.numel())
        there = bucket.parts(ahead, values)
        for name, (turn, _) in self.turns.items():
            there[name] = turn @ (there[name].T if _is_tall(there[name]) else there[name])
        decoded = self.codec.decode(self.codec.encode(bucket.flat(there)), ahead.numel())
        back = bucket.parts(decoded, there)
        for name, (_, turn) in self.turns.items():
            back[name] = (turn @ back[name]).T if _is_tall(values[name]) else turn @ back[name]
        return bucket.flat(back)


def _is_tall(x: Tensor) -> bool:
    return x.shape[0] > x.shape[1]


class ShardedEf21Muon:
    """EF21Muon on matrices whose rows are sharded as FSDP2 has them, each with an owner; AdamW for the other parameters.

    Gradients are exact means. A rank codes all of its rows that one owner gets as one message; its own are exact.
    """

    def __init__(self, model: nn.Module, owners: Mapping[str, int], world_size: int, codec: Codec, lr: float) -> None:
        self.model, self.owners, self.world_size, self.codec, self.lr = model, owners, world_size, codec, lr
        values = dict(model.named_parameters())
        self.names = sorted(owners, key=lambda name: owners[name])
        self.m, self.e, self.k = ({name: torch.zeros_like(values[name]) for name in owners} for _ in range(3))
        self.adamw = torch.optim.AdamW(
            [p for name, p in values.items() if name not in owners], lr=lr, betas=(0.9, 0.95), weight_decay=0.1
        )

    def step(self, batch: int) -> None:
        """One step of all ranks on a step's batches."""
        own = [gradients(self.model, batch, rank) for rank in range(self.world_size)]
        for name, p in self.model.named_parameters():
            p.grad = torch.stack([g[name] for g in own]).mean(dim=0)
            if name in self.owners:
                self.m[name].lerp_(p.grad, 0.05)
        coded = self._coded({name: self.m[name] - self.e[name] for name in self.names}, self.codec)
        steps = {}
        for name in self.names:
            self.e[name] += coded[name]
            steps[name] = _orthogonal(self.e[name] + 0.95 * coded[name])
        back = self._coded({name: steps[name] - self.k[name] for name in self.names}, parse("int8"))
        for name, p in self.model.named_parameters():
            if name in self.owners:
                self.k[name] += back[name]
                p.data.mul_(1 - self.lr * 0.1).sub_(self.k[name], alpha=0.2 * self.lr * math.sqrt(max(p.shape)))
                p.grad = None
        self.adamw.step()

    def _coded(self, matrices: dict[str, Tensor], codec: Codec) -> dict[str, Tensor]:
        """What arrives of matrices on the other end, whichever of the two it is."""
        found = {name: matrix.clone() for name, matrix in matrices.items()}
        for rank in range(self.world_size):
            for owner in set(range(self.world_size)) - {rank}:
                parts = [found[name].chunk(self.world_size) for name in self.names if self.owners[name] == owner]
                rows = [part[rank] for part in parts if rank < len(part)]
                if rows:
                    flat = torch.cat([part.reshape(-1) for part in rows])
                    decoded = codec.decode(codec.encode(flat), flat.numel()).split([part.numel() for part in rows])
                    for part, values in zip(rows, decoded, strict=True):
                        part.copy_(values.view_as(part))
        return found


def _orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of the quintic of Muon, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()
