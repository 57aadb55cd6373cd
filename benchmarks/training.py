"""Seconds a training step takes on a link of a given speed, commpress against all that a user could take instead.

Run it as one rank on each of two hosts (as root; network namespaces joined by shaped links), or under torchrun:

    python -m commpress.launch.lab 2 1gbit -- python benchmarks/training.py [SPEC ...] [--only NAME ...] [--json FILE]

A byte-level GPT of 17 M parameters on the standard library's source, batch 2 x 64, SGD with momentum, one thread a rank.
Every row has its own copy of the model (about 0.3 GB), whose gradients are views of DDP's buckets, as in the training program.
Rows take turns of a few steps, so a noisy machine shifts all. `no communication` is DDP with torch's noop_hook: a row is its
median step and the ratio to that one's in the same run.

--optimizer adamw adds rows of the optimizers behind AdamW. --optimizer muon has rows of its own: dense Muon, and EF21Muon by
each SPEC, with Newton-Schulz and the coordinates of coarse codes apart (`muon_steps.py`).

With --loss STEPS it trains every row instead, one after another, from the same weights on the same windows: held-out loss
against steps and bytes. That does not depend on the link; time to a loss is its steps times the median step above.

With --device cuda, under torchrun, each rank has a GPU of its own and they speak by NCCL.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from muon_steps import SPECS as MUON_SPECS
from muon_steps import apart, muon_ways, parts_of_steps
from peers import ABSENT, DENSE, FLOOR, Attached, Way, backward, counted, probe, ways
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_tables import print_losses, print_steps

import commpress
from commpress.launch import data
from commpress.launch.lab import joining, sent_by_kernel
from commpress.launch.model import GPT, Shape
from commpress.launch.run_record import where

SHAPE = Shape(layers=5, width=528, heads=8, context=64)
BATCH = 2
SPECS = ("int8", "int4", "sign", "topk(0.01)", "topk(0.01)|int4", "topk(0.001)|int4", "powersgd(4)")
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}
WARM_UP = 4
"""Steps before the clock starts: DDP lays its buckets out anew after the first, torch's PowerSGD begins in the third."""

RATE, RATES = 0.05, {"sign": 0.01, "topk": 0.1}
"""Highest learning rate: that of rows whose names begin so, and of all others. After the held-out loss of 80 steps, one seed:

             0.01   0.015  0.03   0.05   0.1    0.3
plain DDP           2.935  2.852  2.813  2.946  3.639    (int8 and int4 take its rate)
powersgd(4)                2.868         2.872           (by a re-implementation; 0.05 lies between)
sign         3.227         3.320         4.350
topk(0.01)|int4            3.093         3.045  3.017    (0.3 rises first: 3.880 after 40)
topk(0.001)|int4                         3.177  3.234
"""
RISE, FINAL = 20, 0.1
"""Steps until the highest rate, and where the cosine ends as a share of it."""
CLIP = 1.0
EVERY, HELD_OUT = 10, 32
"""Steps between two validations, and their windows."""


class Variant:
    """One model under one way of averaging its gradients."""

    def __init__(self, way: Way, bucket_mb: float | None, text: Tensor, rate: float, optimizer: str = "sgd") -> None:
        torch.manual_seed(0)
        self.way, self.text = way, text
        self.device = device()
        bucket_mb = way.bucket_mb or bucket_mb
        model = GPT(SHAPE).to(self.device)
        self.model = DistributedDataParallel(model, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
        self.attached: Attached = way.attach(self.model)
        self.optimizer = self.attached.optimizer or (
            torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
            if optimizer == "adamw"
            else torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9, fused=True)
        )
        self.windows = data.generator(0, dist.get_rank())
        self.times: list[float] = []
        self.kernel_bytes: list[int] = []
        self.sent_bytes: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.started: commpress.Report | None = None

    def step(self, rate: float | None = None) -> None:
        """One step from a common start; with a rate, the gradient's norm is clipped and that rate taken."""
        x, y = (part.to(self.device) for part in data.sample(self.text, BATCH, SHAPE.context, self.windows))
        with counted() as sent, apart(partial(finish, self.device)) as parts:
            finish(self.device)
            dist.barrier()
            before, start = sent_by_kernel(), time.perf_counter()
            backward(self.model, x, y)
            if rate is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            self.attached.after_step()
            self.optimizer.zero_grad()
            finish(self.device)
            self.times.append(time.perf_counter() - start)
        self.kernel_bytes.append(sent_by_kernel() - before)
        self.parts.append(parts)
        self.sent_bytes.append(sum(sent) + self.attached.uncounted)

    def warm_up(self) -> None:
        """Steps that do not count."""
        for _ in range(WARM_UP):
            self.step()
        self.times.clear()
        self.kernel_bytes.clear()
        self.sent_bytes.clear()
        self.parts.clear()
        if self.attached.session is not None:
            self.started = self.attached.session.report()

    def total_sent(self) -> float:
        """Bytes of this rank so far: those of the session's report, or of what was handed to torch.distributed."""
        session = self.attached.session
        return float(session.report().sent_bytes) if session is not None else sum(self.sent_bytes)

    def row(self, floor: float) -> dict[str, Any]:
        """The row of a step-time record. `floor` is the median step of the row without communication."""
        times = by_period(self.times, self.way.period)
        row: dict[str, Any] = {"name": self.way.name, "kind": self.way.kind, "seconds": statistics.median(times)}
        row["quartiles"] = statistics.quantiles(times, method="inclusive") if len(times) > 1 else times * 3
        row["ratio"] = row["seconds"] / floor
        row["tokens_per_second"] = tokens_per_step() / row["seconds"]
        row["sent_bytes"] = statistics.median(by_period(self.sent_bytes, self.way.period))
        row["kernel_bytes"] = statistics.median(by_period(self.kernel_bytes, self.way.period))
        row["phases"] = None
        if self.attached.session is not None and self.started is not None:
            before, after = self.started, self.attached.session.report()
            steps = after.steps - before.steps
            row["sent_bytes"] = (after.sent_bytes - before.sent_bytes) / steps
            row["phases"] = {k: (v - before.seconds[k]) / steps for k, v in after.seconds.items()}
        return row | parts_of_steps(self.times, self.parts) | {"error": ""}


def device() -> torch.device:
    """Return this rank's device, which its backend tells: a GPU for NCCL."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def finish(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def join(kind: str) -> None:
    """Join the other ranks, on this rank's GPU or on the CPU."""
    if kind == "cpu":
        dist.init_process_group("gloo")
        return
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(here)
    dist.init_process_group("nccl", device_id=here)


def by_period(values: Sequence[float], period: int) -> list[float]:
    """Means over what repeats."""
    return [statistics.mean(values[i : i + period]) for i in range(0, len(values) - period + 1, period)]


def tokens_per_step() -> int:
    """Return the tokens of a step, of all ranks together."""
    return dist.get_world_size() * BATCH * SHAPE.context


def chosen_ways(
    specs: list[str], only: list[str] | None, always: str, default: Sequence[str] | None, optimizer: str = "sgd"
) -> list[Way]:
    """The rows that are asked for, `always` among them. Raises ValueError for a name that no row has."""
    found = muon_ways(specs) if optimizer == "muon" else ways(specs, adam=optimizer == "adamw")
    table = {way.name: way for way in found}
    for name in only or ():
        if name not in table and name not in ABSENT:
            raise ValueError(f"--only {name!r}: expected a row's name, one of {', '.join((*table, *ABSENT))}")
    names = only or (*(default or table), *specs)
    return [way for name, way in table.items() if name == always or name in names]


def probed(rows: list[Way]) -> dict[str, str]:
    """Why rows do not run, by name. Collective: rank 0 tries them on two processes of its own."""
    reasons: list[dict[str, str]] = [{}]
    if dist.get_rank() == 0:
        reasons = [{way.name: reason for way in rows if way.probed and (reason := probe(way))}]
    dist.broadcast_object_list(reasons)
    return reasons[0]


def time_steps(
    rows: list[Way], rounds: int, steps: int, bucket_mb: float | None, text: Tensor, optimizer: str
) -> list[dict[str, Any]]:
    """All rows in turn: so many rounds of so many steps each."""
    variants = [Variant(way, bucket_mb, text, 0.01, optimizer) for way in rows]
    for variant in variants:
        variant.warm_up()
    for _ in range(rounds):
        for variant in variants:
            for _ in range(-(-steps // variant.way.period) * variant.way.period):
                variant.step()
    floor = statistics.median(next(v for v in variants if v.way.name == FLOOR).times)
    return [variant.row(floor) for variant in variants]


def train(way: Way, steps: int, bucket_mb: float | None, text: data.Text) -> dict[str, Any]:
    """The row of a loss record."""
    highest = next((rate for prefix, rate in RATES.items() if way.name.startswith(prefix)), RATE)
    variant = Variant(way, bucket_mb, text.train, highest)
    row: dict[str, Any] = {"name": way.name, "kind": way.kind, "lr": highest, "steps": [], "loss": [], "sent_bytes": []}
    for done in range(steps + 1):
        if done % EVERY == 0 or done == steps:
            loss = held_out_loss(variant.model.module, text.validation)
            if not math.isfinite(loss):
                return row | {"error": f"the held-out loss is {loss} at step {done}"}
            row["steps"].append(done)
            row["loss"].append(loss)
            row["sent_bytes"].append(variant.total_sent())
        if done < steps:
            variant.step(highest * share(done, steps))
    return row | {"error": ""}


def share(step: int, steps: int) -> float:
    """Return the share of the highest rate, for the update after `step` updates: a linear rise, then a cosine."""
    part = max(0, step - RISE) / max(1, steps - RISE)
    return min(1.0, (step + 1) / RISE) * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * part)))


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor) -> float:
    """Nats a byte over fixed windows, the mean over the ranks' models and their shares of the windows. Collective."""
    mine = data.validation_starts(text, HELD_OUT, SHAPE.context)[dist.get_rank() :: dist.get_world_size()]
    x, y = (part.to(device()) for part in data.windows(text, mine, SHAPE.context))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    total = torch.tensor([loss * len(mine), len(mine)], device=device())
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def steps_to(target: float, row: dict[str, Any]) -> float | None:
    """Steps until a row's loss was as low as the target, on straight lines between validations; None if it never was."""
    before = None
    for step, loss in zip(row["steps"], row["loss"], strict=True):
        if loss <= target:
            return (
                step if before is None else before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
            )
        before = step, loss
    return None


def described() -> dict[str, Any]:
    """Return what ran and on what: the head of both records."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(SHAPE).parameters())
    return {
        "link": joining(dist.get_world_size()),
        **where(device()),
        "torch": torch.__version__.partition("+")[0],
        "world_size": dist.get_world_size(),
        "model": f"GPT, {SHAPE.layers} layers, {SHAPE.width} wide",
        "parameters": parameters,
        "tokens_per_step": tokens_per_step(),
    }


def main() -> None:
    """Measure, print the table on rank 0 and write the record."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("specs", nargs="*", help=f"default: {' '.join(SPECS)}; by muon {' '.join(MUON_SPECS)}")
    options.add_argument("--only", nargs="+", metavar="NAME", help="rows to measure, by the names in the table")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=3, help="steps of one row before the next takes its turn")
    options.add_argument("--bucket-mb", type=float, help="DDP's bucket_cap_mb; default: DDP's own, 1 MB and then 25")
    options.add_argument("--loss", type=int, metavar="STEPS", help="train every row for so many steps instead")
    options.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="what the rows step by (see above)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU a rank, and NCCL")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: this machine has no GPU that torch can use, expected cpu")
    losses = chosen.loss is not None
    if losses and chosen.optimizer != "sgd":
        options.error(f"--optimizer {chosen.optimizer}: --loss trains by SGD, expected sgd")
    chosen.specs = chosen.specs or (MUON_SPECS if chosen.optimizer == "muon" else SPECS)
    specs = [str(commpress.parse(spec)) for spec in chosen.specs]
    try:
        always, default = (DENSE, (DENSE,)) if losses else (FLOOR, None)
        rows = chosen_ways(specs, chosen.only, always, default, chosen.optimizer)
    except ValueError as error:
        options.error(str(error))
    torch.set_num_threads(1)
    join(chosen.device)
    reasons = probed(rows)
    running = [way for way in rows if way.name not in reasons]
    failed = [{"name": way.name, "kind": way.kind, "error": reasons[way.name]} for way in rows if way.name in reasons]
    failed += [
        {"name": name, "kind": "peer", "error": reason}
        for name, reason in ABSENT.items()
        if (name in chosen.only if chosen.only else not losses and chosen.optimizer != "muon")
    ]
    text = data.load(None)
    record = described()
    if losses:
        results = [train(way, chosen.loss, chosen.bucket_mb, text) for way in running]
        dense = next(row for row in results if row["name"] == DENSE)
        target = min(
            loss for step, loss in zip(dense["steps"], dense["loss"], strict=True) if step <= chosen.loss * 2 / 3
        )
        results = [row | {"steps_to_target": steps_to(target, row)} for row in results]
        record = {"what": "losses", **record, "target": target, "rows": results + failed}
    else:
        results = time_steps(running, chosen.rounds, chosen.steps, chosen.bucket_mb, text.train, chosen.optimizer)
        taken = {"steps": chosen.rounds * chosen.steps, "bucket_mb": chosen.bucket_mb}
        taken["optimizer"] = OPTIMIZERS[chosen.optimizer]
        record = {"what": "step times", **record, **taken, "rows": results + failed}
    if dist.get_rank() == 0:
        (print_losses if losses else print_steps)(record)
        if chosen.json:
            chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
