"""Seconds a training step takes on a link of a given speed, against no communication at all.

Run it as one rank on each of two hosts (as root; network namespaces joined by shaped links):

    python -m commpress.launch.lab 2 1gbit -- python benchmarks/step_time.py [SPEC ...] [--json FILE]

A 16.8 M-parameter transformer (4 layers, 512 wide, 4096 words), batch 2 x 64, SGD with momentum, one thread a rank. Every
variant has its own copy of the model; the variants take turns of a few steps, so a noisy machine shifts all. `noop` is DDP
with torch's noop_hook: everything but communication. A row is the median step and the ratio to noop's in the same run.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

import commpress

WORDS, WIDTH, LAYERS, BATCH, LENGTH = 4096, 512, 4, 2, 64
DEFAULT = ("noop", "ddp", "int8", "int4", "sign", "topk(0.01)", "topk(0.01)|int4")


class Transformer(nn.Module):
    """A decoder made of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [batch, length, WORDS] of word numbers [batch, length]."""
        return self.head(self.body(self.embed(words), mask=self.mask, is_causal=True))  # type: ignore[no-any-return]


class Variant:
    """One model under one way of communicating."""

    def __init__(self, name: str, bucket_mb: float) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(Transformer(), bucket_cap_mb=bucket_mb)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.session = None
        if name == "noop":
            self.model.register_comm_hook(None, noop_hook)
        elif name != "ddp":
            self.session = commpress.attach(self.model, name)
        self.times: list[float] = []
        self.kernel_bytes: list[int] = []

    def step(self, words: Tensor) -> None:
        """One step, timed from a common start."""
        dist.barrier()
        before, start = sent_by_kernel(), time.perf_counter()
        logits = self.model(words)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(time.perf_counter() - start)
        self.kernel_bytes.append(sent_by_kernel() - before)


def sent_by_kernel() -> int:
    """Bytes that this host's interface has sent, by the kernel's counter; 0 on loopback."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    counter = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
    return int(counter.read_text()) if interface and counter.exists() else 0


def main() -> None:
    """Time all variants in turn and print the table on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("specs", nargs="*", default=DEFAULT)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=3, help="steps of one variant before the next takes its turn")
    options.add_argument("--bucket-mb", type=float, default=25.0, help="DDP's bucket_cap_mb")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    names = list(dict.fromkeys(("noop", *chosen.specs)))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    variants = {name: Variant(name, chosen.bucket_mb) for name in names}
    words = torch.randint(WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(rank))
    for variant in variants.values():
        for _ in range(3):  # buckets are laid out anew after the first step
            variant.step(words)
        variant.times.clear()
        variant.kernel_bytes.clear()
    for _ in range(chosen.rounds):
        for variant in variants.values():
            for _ in range(chosen.steps):
                variant.step(words)
    if rank == 0:
        parameters = sum(p.numel() for p in variants["noop"].model.parameters())
        title = f"{parameters / 1e6:.1f} M parameters, {dist.get_world_size()} ranks, {chosen.bucket_mb:g} MB buckets"
        table = Table(title=title)
        for name in (
            "spec",
            "s a step",
            "spread",
            "against noop",
            "MB sent",
            "kernel MB",
            "encode",
            "wire",
            "decode",
            "exposed",
        ):
            table.add_column(name, justify="left" if name == "spec" else "right")
        rows = []
        floor = statistics.median(variants["noop"].times)
        for name, variant in variants.items():
            median = statistics.median(variant.times)
            quartiles = statistics.quantiles(variant.times)
            row = {"spec": name, "seconds": median, "quartiles": quartiles, "ratio": median / floor}
            row["kernel_bytes"] = statistics.median(variant.kernel_bytes)
            cells = ["", "", "", "", ""]
            if variant.session is not None:
                report = variant.session.report()
                row["sent_bytes"] = report.sent_bytes / report.steps
                per_step = {k: v / report.steps for k, v in report.seconds.items()}
                row["phases"] = per_step
                cells = [f"{row['sent_bytes'] / 1e6:.2f}"]
                cells += [f"{per_step[k] * 1e3:.0f} ms" for k in ("encode", "wire", "decode", "exposed")]
            kernel = f"{row['kernel_bytes'] / 1e6:.2f}"
            spread = f"{quartiles[0]:.3f}-{quartiles[2]:.3f}"
            table.add_row(name, f"{median:.3f}", spread, f"{median / floor:.2f}x", cells[0], kernel, *cells[1:])
            rows.append(row)
        Console(width=132).print(table)
        if chosen.json:
            chosen.json.write_text(json.dumps({"parameters": parameters, "rows": rows}, indent=2) + "\n")
        best = min((r for r in rows if r["spec"] not in ("noop", "ddp")), key=lambda r: r["ratio"], default=rows[0])
        print(f"closest to no communication: {best['spec']} {best['ratio']:.2f}x")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
