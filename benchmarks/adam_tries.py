"""Ways to compress Adam from the first step that are not part of commpress: their loss against the bytes of a whole run.

    torchrun --nproc-per-node 2 benchmarks/adam_tries.py [--only NAME ...] [--steps 1500] [--rate 3e-3] [--stop-above 2.42]

The byte-level GPT of benchmarks/convergence.py trains without DDP. Every rank codes its gradient or its first moment by a codec
of commpress; all gather the payloads and step by their mean, so all hold the same parameters. Matrices go by the row's spec,
1-D parameters (0.8 % of the values) by int4. Bytes are those of the payloads. Two or three minutes a row on 2 cores.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from convergence import BETAS, CLIP, DECAY, mean_over_ranks, share
from convergence_tasks import Text
from torch import Tensor, nn

from commpress.comm.codecs import parse
from commpress.launch import data
from commpress.launch.run_record import where

EPS, SEED = 1e-8, 0
EXACT, VECTORS = "none", "int4"
"""The codec of matrices and 1-D parameters in exact rows, and that of 1-D parameters in all others."""
Divisor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the first moment before a step and after it and the mean gradient: what divides the first moment."""


def exchange(spec: str, x: Tensor) -> tuple[list[Tensor], int]:
    """Send `x` to all ranks by a codec. Return what each rank's payload says, and the bytes that this rank sent."""
    codec = parse(spec)
    payload = codec.encode(x)
    payloads = [torch.empty_like(payload) for _ in range(dist.get_world_size())]
    dist.all_gather(payloads, payload)
    return [codec.decode(each, x.numel()) for each in payloads], codec.nbytes(x.numel()) * (len(payloads) - 1)


def average(x: Tensor, matrices: int, spec: str) -> tuple[Tensor, Tensor, int]:
    """Send the first values of `x` by a spec, the rest by VECTORS. Return what is read of it, all ranks' mean, the bytes."""
    mine, mean, sent = torch.empty_like(x), torch.empty_like(x), 0
    for part, by in ((slice(0, matrices), spec), (slice(matrices, len(x)), EXACT if spec == EXACT else VECTORS)):
        decoded, count = exchange(by, x[part])
        mine[part], mean[part], sent = decoded[dist.get_rank()], torch.stack(decoded).mean(0), sent + count
    return mine, mean, sent


class Feedback:
    """Error feedback (Seide et al., Interspeech 2014): what the codec lost is added to what is sent next."""

    def __init__(self, values: int, matrices: int, spec: str) -> None:
        self.lost, self.matrices, self.spec, self.sent = torch.zeros(values), matrices, spec, 0

    def mean(self, x: Tensor) -> Tensor:
        self.lost += x
        mine, mean, sent = average(self.lost, self.matrices, self.spec)
        self.lost -= mine
        self.sent += sent
        return mean


class EF21:
    """EF21 (arXiv:2106.05203; of a moment: arXiv:2305.15155): the change against an estimate, whose mean all hold, is sent."""

    def __init__(self, values: int, matrices: int, spec: str) -> None:
        self.mine, self.all = torch.zeros(values), torch.zeros(values)
        self.matrices, self.spec, self.sent = matrices, spec, 0

    def mean(self, x: Tensor) -> Tensor:
        mine, mean, sent = average(x - self.mine, self.matrices, self.spec)
        self.mine += mine
        self.all += mean
        self.sent += sent
        return self.all.clone()


class Masked:
    """Masks from the first moment, one step old (after the abstract of SCAPE, arXiv:2607.01678: its text was not at hand).

    A rank chooses the places of its share of the matrices by the first moment that all its gradients not sent yet would give.
    They go as a sparse row of one-bit values. A step later all ranks send their values there, by `codec` of `topk(r)|codec`.
    """

    def __init__(self, values: int, matrices: int, spec: str) -> None:
        self.ratio, self.codec = spec.split("|")
        self.kept, self.moment, self.matrices, self.sent = torch.zeros(values), torch.zeros(values), matrices, 0
        self.places: Tensor | None = None

    def choose(self) -> Tensor:
        """Return the places that all ranks chose together, and those of all 1-D parameters."""
        length = self.matrices // dist.get_world_size()
        score = (BETAS[0] * self.moment + (1 - BETAS[0]) * self.kept)[: self.matrices].abs()
        masks, sent = exchange(f"{self.ratio}|sign", score.split(length)[dist.get_rank()])
        self.sent += sent
        return torch.cat([torch.cat(masks).nonzero().view(-1), torch.arange(self.matrices, len(self.kept))])

    def mean(self, x: Tensor) -> Tensor:
        self.kept += x
        places = self.choose() if self.places is None else self.places
        vectors = len(self.kept) - self.matrices
        mine, mean, sent = average(self.kept[places], len(places) - vectors, self.codec)
        self.kept[places] -= mine
        self.sent += sent
        found = torch.zeros_like(self.kept)
        found[places] = mean
        self.moment.mul_(BETAS[0]).add_(found, alpha=1 - BETAS[0])
        self.places = self.choose()
        return found


class Variance:
    """Adam's divisor: the root of the mean square of the gradients that arrived."""

    def __init__(self) -> None:
        self.v, self.steps = torch.zeros(()), 0

    def __call__(self, before: Tensor, moment: Tensor, gradient: Tensor) -> Tensor:
        self.steps += 1
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient.square()
        # both biases, that of the first moment as well: the divisor is all that a method may choose
        return (self.v / (1 - BETAS[1] ** self.steps)).sqrt_().mul_(1 - BETAS[0] ** self.steps)


class VarianceOfMoment(Variance):
    """Adam's divisor, learned from the first moment alone: independent gradients have (1 + b1) / (1 - b1) times its square."""

    def __call__(self, before: Tensor, moment: Tensor, gradient: Tensor) -> Tensor:
        return super().__call__(before, moment, moment * math.sqrt((1 + BETAS[0]) / (1 - BETAS[0])))


def adams(before: Tensor, moment: Tensor, gradient: Tensor) -> Tensor:
    """AdamS (Zhang et al., arXiv:2505.16363): the root of b2 m^2 + (1 - b2) g^2, m from before the step. No variance."""
    return (BETAS[1] * before.square() + (1 - BETAS[1]) * gradient.square()).sqrt_()


@dataclass(frozen=True)
class Try:
    """A row: what is sent, how, by which spec, what divides the first moment, and how many steps lie between two sendings."""

    name: str
    sends: str
    link: type[Feedback] | type[EF21] | type[Masked]
    spec: str
    divisor: Callable[[], Divisor]
    every: int = 1


TRIES = (
    Try("AdamW", "gradient", Feedback, EXACT, Variance),
    Try("AdamS", "gradient", Feedback, EXACT, lambda: adams),
    Try("EF21 gradient topk(0.1)|sign", "gradient", EF21, "topk(0.1)|sign", Variance),
    Try("EF21 gradient topk(0.02)|sign", "gradient", EF21, "topk(0.02)|sign", Variance),
    Try("EF21 moment topk(0.1)|sign", "moment", EF21, "topk(0.1)|sign", VarianceOfMoment),
    Try("EF21 moment topk(0.02)|sign", "moment", EF21, "topk(0.02)|sign", VarianceOfMoment),
    Try("EF21 moment rotate|sign every 5", "moment", EF21, "rotate|sign", VarianceOfMoment, 5),
    Try("AdamS EF21 topk(0.02)|sign", "moment", EF21, "topk(0.02)|sign", lambda: adams),
    Try("AdamS feedback topk(0.02)|sign", "gradient", Feedback, "topk(0.02)|sign", lambda: adams),
    Try("SCAPE topk(0.1)|int4", "gradient", Masked, "topk(0.1)|int4", lambda: adams),
    Try("SCAPE topk(0.02)|int4", "gradient", Masked, "topk(0.02)|int4", lambda: adams),
)


class Flat:
    """A model whose parameters and gradients are one row of values each: matrices first, then 1-D parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)
        self.matrices = sum(p.numel() for p in parameters if p.dim() > 1)
        self.values = torch.cat([p.detach().flatten() for p in parameters])
        self.gradient = torch.zeros_like(self.values)
        at = 0
        for p in parameters:
            p.data = self.values[at : at + p.numel()].view_as(p)
            p.grad = self.gradient[at : at + p.numel()].view_as(p)
            at += p.numel()


def train(row: Try, task: Text, rate: float, seed: int, steps: int, stop_above: float = math.inf) -> dict[str, float]:
    """Train by a row; after a third of the steps it ends if its held-out loss is above `stop_above`. Collective."""
    torch.manual_seed(seed)
    flat = Flat(task.model())
    windows = data.generator(seed, dist.get_rank())
    n, exact = flat.values.numel(), row.spec == EXACT
    link, divisor = row.link(n, flat.matrices, row.spec), row.divisor()
    moment, own, start, third = torch.zeros(n), torch.zeros(n), time.perf_counter(), math.inf
    for done in range(steps):
        flat.gradient.zero_()
        task.loss(flat.model, windows).backward()
        g = flat.gradient if exact else clipped(flat.gradient)
        before = moment.clone()
        if row.sends == "gradient":
            g = link.mean(g)
            g = clipped(g) if exact else g  # the mean, as after DDP
            moment.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
        else:
            own.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            if done % row.every == 0:
                moment = link.mean(own)
            g = (moment - BETAS[0] * before) / (1 - BETAS[0])
        lr = rate * share(done, steps)
        flat.values[: flat.matrices] *= 1 - lr * DECAY
        flat.values.addcdiv_(moment, divisor(before, moment, g).add_(EPS), value=-lr)
        if done + 1 == steps // 3 and not (third := mean_over_ranks(task.held_out(flat.model))) <= stop_above:
            break
    require_same(flat.values)
    dense = 2 * (dist.get_world_size() - 1) * 4 * n // dist.get_world_size() * (done + 1)
    found = {
        "steps": done + 1,
        "third": third,
        "loss": mean_over_ranks(task.held_out(flat.model)),
        "sent_bytes": link.sent,
    }
    return {**found, "fewer": dense / link.sent, "seconds": time.perf_counter() - start}


def clipped(gradient: Tensor) -> Tensor:
    """The gradient, no longer than CLIP."""
    return gradient * min(1.0, CLIP / (float(gradient.norm()) + 1e-6))


def require_same(values: Tensor) -> None:
    """Raise RuntimeError unless all ranks hold rank 0's bits. Collective."""
    first = values.clone()
    dist.broadcast(first, 0)
    differ = torch.tensor(int(not torch.equal(first.view(torch.int32), values.view(torch.int32))))
    dist.all_reduce(differ)
    if differ:
        raise RuntimeError(f"{int(differ)} ranks hold other parameters than rank 0 after a run; expected the same bits")


def main() -> None:
    """Train by each row and print it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", metavar="NAME", choices=[row.name for row in TRIES], help="rows to run")
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--rate", type=float, default=3e-3)
    options.add_argument("--stop-above", type=float, default=math.inf, help="the loss above which a third is enough")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    task, machine = Text(), where(torch.device("cpu"))["machine"]
    for row in (row for row in TRIES if not chosen.only or row.name in chosen.only):
        found = train(row, task, chosen.rate, SEED, chosen.steps, chosen.stop_above)
        if dist.get_rank() == 0:
            said = "{loss:.4f} after {steps} steps ({third:.4f} after a third), {fewer:.1f} times fewer bytes, {seconds:.0f} s"
            print(f"{row.name}, rate {chosen.rate:g}, seed {SEED}: {said.format(**found)}; {machine}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
