"""At which size does a compressed exchange beat the dense all-reduce? In the manner of nccl-tests.

    torchrun --nproc-per-node 2 benchmarks/bandwidth.py [SPEC ...] [--from 64kb] [--to 256mb] [--json FILE]
    python -m commpress.launch.lab 2 1gbit -- python benchmarks/bandwidth.py

Gradients of normal values through `Session.submit`, as the hooks do it, with error feedback: what is timed is what training
uses. NCCL where there is a GPU, Gloo elsewhere. The dense all-reduce (divided by W, as DDP does) takes turns with each
spec's exchanges; a time is the median over the repeats of the slowest rank. Each result is checked before it is timed.
`hierarchical` takes the nodes that LOCAL_WORLD_SIZE tells; where all ranks are on one, it takes each half of them for one.

    algorithm bandwidth = size / time           effective bus bandwidth = 2 (W - 1) / W x size / time

The latter is what a link must carry for a dense all-reduce to take that time.
"""

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from commpress.comm.codecs import Codec, parse
from commpress.comm.exchange import EXCHANGES, Hierarchical
from commpress.comm.exchange.hierarchical import LOCAL_RANKS
from commpress.comm.feedback import Memory
from commpress.comm.plan import Plan, fits
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment
from commpress.comm.session import Session
from commpress.launch.lab import joining, sent_by_kernel
from commpress.launch.run_record import where

SPECS = ("bf16", "int8", "int4", "sign", "topk(0.01)|int4")
NEARER = 1e-5
"""By what part a mean must be nearer to the true one than 0 is: more than sums round."""
UNITS = {"": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}


class GarbageError(RuntimeError):
    """A result is not the mean that the exchange claims."""


@dataclass
class Case:
    """One way of exchanging one size. Without a session it is the dense all-reduce."""

    size: int
    spec: str
    exchange: str
    session: Session | None = None
    seconds: list[float] = field(default_factory=list)
    kernel: list[int] = field(default_factory=list)
    dense: "Case | None" = None
    """The dense one that took turns with it."""

    def exchanged(self, x: Tensor, index: int) -> None:
        """Replace `x` by its mean over the ranks, and return when it is there."""
        if self.session is None:
            x.mul_(1.0 / dist.get_world_size())
            dist.all_reduce(x)
        else:
            self.session.step_buffer.submit(x, (Segment.whole(f"size {index}", x),), index, last=True).wait()
        if x.device.type != "cpu":
            torch.accelerator.synchronize()

    def record(self) -> dict[str, Any]:
        """Return its row, times in seconds, bandwidths in bytes a second."""
        W, median = dist.get_world_size(), statistics.median(self.seconds)
        dense = median if self.dense is None else statistics.median(self.dense.seconds)
        sent = 2 * (W - 1) * self.size // W
        if self.session is not None:
            (row,) = (row for row in self.session.report().rows if row.values * 4 == self.size)
            sent = row.sent_bytes // row.steps
        return {
            "size": self.size,
            "spec": self.spec,
            "exchange": self.exchange,
            "seconds": median,
            "quartiles": statistics.quantiles(self.seconds) if len(self.seconds) > 1 else [median] * 3,
            "sent_bytes": sent,
            "kernel_bytes": statistics.median(self.kernel) if self.kernel else None,
            "algorithm_bandwidth": self.size / median,
            "bus_bandwidth": 2 * (W - 1) / W * self.size / median,
            "ratio": median / dense,
        }


def exchanges(codec: Codec) -> list[str]:
    """The names of the exchanges that can carry a codec's payloads among all ranks."""
    W = dist.get_world_size()
    node = int(os.environ.get(LOCAL_RANKS, W))
    if node >= W or W % node:
        node = W // 2 if W % 2 == 0 else 1
    return [str(exchange) for exchange in (*EXCHANGES.values(), Hierarchical(node)) if fits(exchange, codec)]


def check(case: Case, gradient: Tensor, index: int) -> None:
    """Exchange `gradient` for the first time and raise GarbageError on all ranks unless the result is right.

    All ranks must hold the same bits, and what those lack of the true mean must be what the memories of error feedback hold,
    for each value up to rounding. It must be less than the mean, and what a rank remembers of its gradient less than that:
    what was sent has brought both nearer.
    """
    W, x, mean = dist.get_world_size(), gradient.clone(), gradient / dist.get_world_size()
    case.exchanged(x, index)
    dist.all_reduce(mean)
    first = x.clone()
    dist.broadcast(first, 0)
    complaint = "" if torch.equal(x.view(torch.uint8), first.view(torch.uint8)) else "the ranks hold different bits"
    rounding = torch.finfo(torch.float32).eps
    missing = torch.zeros_like(x)
    if case.session is not None:
        codec = case.session.collectives[0].gradients.codec
        if case.exchange == "all_reduce" and codec.sum_dtype is not None:
            rounding = torch.finfo(codec.sum_dtype).eps  # the group's sum rounds, too, and no memory holds that
        (saved,) = (
            b for b in case.session.state_dict()["memories"][0] if b["segments"] == [[f"size {index}", x.numel()]]
        )
        kept = Memory.saved(saved, x.device)
        if kept.residual is not None and not kept.residual.norm() < gradient.norm():
            complaint = complaint or "what was left out is as large as the gradient"
        kept.fold(W)
        if kept.residual is not None:
            missing = kept.residual / W
    dist.all_reduce(missing)
    if not _norm(missing) <= (1 - NEARER) * _norm(mean):
        complaint = complaint or "what was left out is as large as the mean"
    worst = (mean - x - missing).abs().max().item()
    if not worst <= 4 * W * rounding * gradient.abs().max().item():
        complaint = complaint or f"a value is off by {worst:.3g} beyond what error feedback remembers"
    complaints: list[Any] = [None] * W
    dist.all_gather_object(complaints, complaint)
    if any(complaints):
        rank, text = next((r, c) for r, c in enumerate(complaints) if c)
        raise GarbageError(f"{case.spec} by {case.exchange}, {shown(case.size)}: {text} (rank {rank})")


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()


def measure(specs: Sequence[str | Codec], sizes: Sequence[int], repeats: int, device: torch.device) -> list[Case]:
    """Check and time every exchange of each spec at each size. Collective. Raises GarbageError."""
    W, cases = dist.get_world_size(), []
    shaped = joining(W)["shaped"]
    generator = torch.Generator().manual_seed(dist.get_rank())
    for codec in map(parse, specs):
        sessions = {
            name: replicas_session(codec, dist.group.WORLD, device, exchange=name, verify=0)
            for name in exchanges(codec)
        }
        for index, size in enumerate(sizes):
            n = size // 4
            gradient = torch.randn(n, generator=generator).to(device)
            x = torch.empty_like(gradient)
            dense = Case(size, "dense", "all_reduce")
            turns = [dense]
            for name, session in sessions.items():
                if not Plan.of(codec, name).choose(n, 4, W).reason:
                    turns.append(Case(size, str(codec), name, session, dense=dense))
            for case in turns:
                check(case, gradient, index)
            for _ in range(repeats):
                for case in turns:
                    x.copy_(gradient)
                    if device.type != "cpu":
                        torch.accelerator.synchronize()
                    dist.barrier()
                    before, start = sent_by_kernel(), time.perf_counter()
                    case.exchanged(x, index)
                    took = torch.tensor(time.perf_counter() - start, device=device)
                    dist.all_reduce(took, dist.ReduceOp.MAX)
                    case.seconds.append(took.item())
                    if shaped:
                        case.kernel.append(sent_by_kernel() - before)
            cases += turns
    return cases


def merged(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The rows of all cases by size. The dense ones of a size, one a spec, become one."""
    rows = []
    for size in sorted({case.size for case in cases}):
        dense, ours = [], []
        for case in cases:
            if case.size == size:
                (dense if case.session is None else ours).append(case)
        whole = Case(size, "dense", "all_reduce")
        for case in dense:
            whole.seconds += case.seconds
            whole.kernel += case.kernel
        rows += [whole.record(), *(case.record() for case in ours)]
    return rows


def answer(rows: Sequence[dict[str, Any]]) -> str:
    """From which size on each spec's best exchange is faster than dense."""
    found = []
    for spec in dict.fromkeys(row["spec"] for row in rows if row["spec"] != "dense"):
        since = None
        for size in sorted({row["size"] for row in rows if row["spec"] == spec}, reverse=True):
            best = min((r for r in rows if (r["spec"], r["size"]) == (spec, size)), key=lambda r: r["ratio"])
            if best["ratio"] >= 1:
                break
            since = best
        if since is None:
            found.append(f"{spec} at none of these sizes")
        else:
            found.append(f"{spec} from {shown(since['size'])} ({since['exchange']})")
    return f"faster than dense: {'; '.join(found) or 'nothing was compared'}"


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows as a table, a section a size."""
    made = Table(title=title)
    columns = ("size", "spec", "exchange", "ms", "MB sent", "kernel MB", "algorithm MB/s", "bus MB/s", "against dense")
    for name in columns:
        made.add_column(name, justify="left" if name in ("spec", "exchange") else "right")
    for i, row in enumerate(rows):
        if i and row["size"] != rows[i - 1]["size"]:
            made.add_section()
        kernel = "" if row["kernel_bytes"] is None else f"{row['kernel_bytes'] / 1e6:.3f}"
        rates = (f"{row[key] / 1e6:.1f}" for key in ("algorithm_bandwidth", "bus_bandwidth"))
        cells = (
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['sent_bytes'] / 1e6:.3f}",
            kernel,
            *rates,
            f"{row['ratio']:.2f}x",
        )
        made.add_row(shown(row["size"]), row["spec"], row["exchange"], *cells)
    return made


def shown(size: int) -> str:
    """A size in the largest unit that leaves no fraction: 64 KB, 1 MB (of 1024)."""
    name, unit = max((u for u in UNITS.items() if u[1] <= size and size % u[1] == 0), key=lambda u: u[1])
    return f"{size // unit} {name.upper() or 'B'}"


def size_of(text: str) -> int:
    """`64kb`, `1mb`, `4096` in bytes."""
    match = re.fullmatch(r"(\d+)\s*(|kb|mb|gb)", text.strip().lower())
    if match is None or int(match[1]) * UNITS[match[2]] < 4:
        raise argparse.ArgumentTypeError(f"size {text!r}: expected a number and kb, mb or gb, such as 64kb")
    return int(match[1]) * UNITS[match[2]]


def main() -> None:
    """Check and time everything, print the table on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("specs", nargs="*", default=SPECS)
    options.add_argument("--from", dest="least", type=size_of, default="64kb", help="smallest gradient")
    options.add_argument(
        "--to", dest="most", type=size_of, default="256mb", help="largest; each is 4 times the one before"
    )
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    sizes = [chosen.least * 4**i for i in range(32) if chosen.least * 4**i <= chosen.most]
    if not sizes or chosen.repeats < 1:
        options.error(f"--from {chosen.least} --to {chosen.most} --repeats {chosen.repeats}: nothing to measure")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    W, rank, link = dist.get_world_size(), dist.get_rank(), joining(dist.get_world_size())
    if W < 2:
        raise SystemExit("one rank: nothing to exchange; start it with torchrun --nproc-per-node 2, or in the lab")
    rows = merged(measure(chosen.specs, sizes, chosen.repeats, device))
    if rank == 0:
        here = where(device)
        title = f"{W} ranks, {backend}, {link['rate']} link, {here['machine']}, torch {torch.__version__}"
        Console(width=132).print(table(rows, title))
        if chosen.json:
            about = {"what": "bandwidth", "link": link, **here, "torch": torch.__version__}
            record = {**about, "backend": backend, "world_size": W, "repeats": chosen.repeats, "rows": rows}
            chosen.json.write_text(json.dumps(record, indent=2) + "\n")
        print(answer(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
