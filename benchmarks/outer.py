"""The cost in loss of local steps under a compressed outer optimizer, against data parallel training on as many tokens.

    torchrun --nproc-per-node 2 benchmarks/outer.py runs/outer [--steps N] [--search N] [--only NAME ...]
    python -m commpress.launch.lab 2 10gbit -- python benchmarks/outer.py runs/outer        # bytes by kernel, too

The GPT and the text of `convergence.py`, AdamW or Muon (EF21Muon) inside, 6,000 steps. Each way gets the learning rate that is
best of its optimizer's after 1,500 steps of seed 0; then three seeds for those that matter most and one for the rest. Each
finished run is a file of JSON in the folder, and is not run again; one that was stopped goes on where it was, to the last 250
steps. Some hours on 2 cores; `--show` prints what is there.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import convergence
import torch
import torch.distributed as dist
from convergence_tasks import Text
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.launch import data
from commpress.launch.lab import sent_by_kernel
from commpress.optim.outer import Outer

RATES = {"AdamW": (2e-3, 4e-3), "EF21Muon": (6e-3, 1.2e-2, 2.4e-2)}
SEARCH, STEPS, SEEDS, PIECE = 1500, 6000, (0, 1, 2), 250
OUTER = {"lr": 0.7, "momentum": 0.6}
OTHERS = tuple({"lr": lr, "momentum": mu} for lr, mu in ((1.0, 0.0), (0.7, 0.0), (0.7, 0.8), (1.0, 0.6)))
"""Rates of the outer step to compare with the defaults."""
DENSE = "DDP"
OPTIONS: dict[str, dict[str, Any]] = {"AdamW": {}, "EF21Muon": {"others_spec": "none"}}


@dataclass(frozen=True)
class Way:
    """A row: a spec and the settings of `commpress.diloco`; without them, DDP."""

    name: str
    spec: str = "none"
    seeds: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "AdamW"
    averaged: bool = False
    """Whether each sync averages the ranks' momenta, too, exactly: a trial, whose bytes are not counted."""


def muon(spec: str, every: int, seeds: int = 1, averaged: bool = False, **settings: Any) -> Way:
    """DiLoCo with Muon inside, at the outer rates that it has by default."""
    more = "".join(f", {key} {value}" for key, value in settings.items()) + averaged * ", averaged momenta"
    return Way(f"Muon {spec} every {every}{more}", spec, seeds, {"every": every, **settings}, "EF21Muon", averaged)


def diloco(spec: str, every: int, seeds: int = 1, **settings: Any) -> Way:
    """DiLoCo with a spec."""
    more = "".join(f", {key} {value}" for key, value in settings.items())
    return Way(f"DiLoCo {spec} every {every}{more}", spec, seeds, {"every": every, **OUTER, **settings})


WAYS = (
    Way(DENSE, seeds=3),
    diloco("topk(0.1)|sign", 100, 3),
    diloco("topk(0.1)|sign", 30, 3),
    diloco("sign", 30),
    diloco("topk(0.03)|int2", 30),
    diloco("sign", 100),
    diloco("topk(0.1)|sign", 100, fragments=4, delay=5),
    diloco("none", 30),
    Way("DDP, Muon", optimizer="EF21Muon"),
    muon("none", 20),
    muon("sign", 20),
    muon("sign", 30),
    muon("int2", 30),
    muon("topk(0.1)|sign", 30),
    muon("topk(0.1)|sign", 90),
    muon("sign", 150),
    muon("rotate|sign", 150, 3),
    muon("topk(0.03)|int2", 40),
    muon("sign", 30, fragments=4, delay=5),
    muon("rotate|sign", 30),
    *(muon("rotate|sign", every, averaged=True) for every in (30, 150)),
    muon("rotate|sign", 20),
    *(muon("rotate|sign", every, **rates) for every in (20, 150) for rates in OTHERS),
)


class Training:
    """A run between two of its steps: what is trained, by what, and what it has sent so far."""

    def __init__(self, way: Way, task: Text, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = task.model()
        self.windows = data.generator(seed, dist.get_rank())
        inside = convergence.Way(way.name, "GPT", way.optimizer, options=OPTIONS[way.optimizer])
        self.optimizer = convergence.optimizer_of(inside, self.model, steps)
        self.trained, self.outer = self.model, None
        if way.settings:
            self.session = self.outer = commpress.diloco(self.model, self.optimizer, way.spec, **way.settings)
            if way.averaged:
                self.optimizer.register_step_post_hook(partial(average_momenta, outer=self.outer))
        else:
            self.trained = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            behind = self.optimizer if way.optimizer == "EF21Muon" else None
            self.session = commpress.attach(self.trained, way.spec, optimizer=behind)
        self.done = 0
        self.before = {"sent_bytes": 0, "dense_bytes": 0, "kernel_bytes": 0, "seconds": 0.0}
        """What the pieces of the run before this one have sent."""
        self._start, self._kernel = time.perf_counter(), sent_by_kernel()

    def totals(self) -> dict[str, Any]:
        """What the run has sent and taken so far."""
        report, kernel, now = self.session.report(), sent_by_kernel() - self._kernel, time.perf_counter()
        here = {"sent_bytes": report.sent_bytes, "dense_bytes": report.dense_bytes, "kernel_bytes": kernel}
        return {key: value + self.before[key] for key, value in {**here, "seconds": now - self._start}.items()}

    def save(self, path: Path) -> None:
        """Write this rank's state."""
        state = {"done": self.done, "before": self.totals(), "model": self.model.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "session": self.session.state_dict()}
        torch.save({**state, "windows": self.windows.get_state()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    def load(self, path: Path) -> None:
        """Go on where `save` was, if all ranks have the same step of it. Collective."""
        state = torch.load(path, weights_only=False) if path.exists() else {"done": 0}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, state["done"])
        if min(everyone) != max(everyone) or not state["done"]:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["session"])
        self.windows.set_state(state["windows"])
        self.done, self.before = state["done"], state["before"]


def average_momenta(optimizer: torch.optim.Optimizer, *_: Any, outer: Outer) -> None:
    """Give all ranks the mean of their momenta if they have just synced. Collective."""
    if outer.steps % outer.settings.every:
        return
    for state in optimizer.state.values():
        for name in ("momentum_buffer", "exp_avg"):
            if name in state:
                dist.all_reduce(state[name])
                state[name] /= dist.get_world_size()


def train(way: Way, task: Text, rate: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run: its row. Collective."""
    run = Training(way, task, seed, steps)
    path = folder / f"{convergence.stem(way.name, rate, seed, steps)}_rank{dist.get_rank()}.pt"
    run.load(path)
    while run.done < steps:
        for group in run.optimizer.param_groups:
            group["lr"] = rate * convergence.share(run.done, steps)
        task.loss(run.trained, run.windows).backward()
        if run.outer is not None or way.optimizer == "AdamW":
            nn.utils.clip_grad_norm_(run.model.parameters(), convergence.CLIP)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.done += 1
        if run.done % PIECE == 0 and run.done < steps:
            run.save(path)
    if run.outer is not None:
        run.outer.sync()
    totals = run.totals()
    path.unlink(missing_ok=True)
    return {
        **{"name": way.name, "rate": rate, "seed": seed, "of_steps": steps, "settings": way.settings, **totals},
        **{"loss": [convergence.validate(task, run.model, run.optimizer)], "torch": torch.__version__},
    }


def run_all(ways: list[Way], chosen: argparse.Namespace) -> None:
    """All runs that are not there yet. Collective."""
    folder, task = chosen.folder, Text()
    run = partial(train, folder=folder)
    for way in ways:
        rates = chosen.rates or RATES[way.optimizer]
        losses = {}
        for rate in rates if len(rates) > 1 else ():
            loss = convergence.once(folder, way, task, rate, SEEDS[0], chosen.search, run)["loss"][-1]
            losses[rate] = loss if math.isfinite(loss) else math.inf
        best = min(rates, key=lambda rate: losses.get(rate, math.inf))
        for seed in SEEDS[: min(way.seeds, chosen.seeds)]:
            convergence.once(folder, way, task, best, seed, chosen.steps, run)


def show(folder: Path, steps: int) -> None:
    """Print the table."""
    runs = convergence.rows_in(folder)
    table = Table(
        title=f"{steps} steps, 2 ranks", caption="fewer: bytes of fp32 DDP on as many tokens, over those sent"
    )
    for name in ("", "rate", "seeds", "held-out loss", "spread", "against DDP", "MB sent", "fewer", "kernel"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    dense = None
    for way in WAYS:
        final = [run for run in runs if run["name"] == way.name and run["of_steps"] == steps]
        if not final:
            continue
        rate = min(final, key=lambda run: (run["seed"], run["loss"][-1]))["rate"]  # a search may be as long as a run
        final = [run for run in final if run["rate"] == rate]
        losses, one = [run["loss"][-1] for run in final], final[0]
        loss = statistics.mean(losses)
        dense = loss if way.name == DENSE else dense
        table.add_row(
            *(way.name, f"{one['rate']:g}", str(len(final)), f"{loss:.4f}"),
            f"{min(losses):.3f}-{max(losses):.3f}" if len(final) > 1 else "",
            "" if dense is None else f"{loss / dense - 1:+.2%}",
            *(f"{one['sent_bytes'] / 1e6:.3f}", f"{one['dense_bytes'] / one['sent_bytes']:.1f}"),
            f"{one['kernel_bytes'] / one['sent_bytes']:.3f}" if one["kernel_bytes"] else "",
        )
    Console(width=150).print(table)


def main() -> None:
    """Run what is missing and print the table on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where each finished run is a file")
    options.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"steps of a run, {STEPS} if not given")
    options.add_argument("--search", type=int, default=SEARCH, metavar="N", help="steps in which a rate is searched")
    options.add_argument(
        "--rates", type=float, nargs="+", metavar="R", help="rates to search among; one is taken as it is"
    )
    options.add_argument("--seeds", type=int, default=len(SEEDS), metavar="N", help="the most seeds of a row")
    options.add_argument("--only", nargs="+", metavar="NAME", help="rows to run, by the names in the table")
    options.add_argument("--show", action="store_true", help="run nothing")
    chosen = options.parse_args()
    if chosen.only and (unknown := set(chosen.only) - {way.name for way in WAYS}):
        options.error(f"no row {sorted(unknown)[0]!r}; there are {', '.join(way.name for way in WAYS)}")
    rank = 0
    if not chosen.show:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        chosen.folder.mkdir(parents=True, exist_ok=True)
        run_all([way for way in WAYS if not chosen.only or way.name in chosen.only], chosen)
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        show(chosen.folder, chosen.steps)


if __name__ == "__main__":
    main()
