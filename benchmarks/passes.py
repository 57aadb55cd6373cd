"""How fast are the passes of optimizers, masks and prologues, in memory copies? `python benchmarks/passes.py [--device cuda]`

Those that code no flat values: `commpress/optim/loops.py`, `commpress/model/loops.py`, `pack` and `unpack` of
`commpress/comm/masks_index.py`, `Prologue.apply`, `commpress/comm/factors.py` at rank 4. A row is the
median over the median copy of the same values, in turn.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from codec_cases import MB, name_of
from copies import in_turns
from rich.console import Console
from rich.table import Table
from torch import Tensor

from commpress.comm import factors
from commpress.comm.fingerprint import fingerprint_on_device
from commpress.comm.masks_index import pack, unpack
from commpress.comm.prologue import Ahead, Prologue
from commpress.model.loops import count_pruned, keep_
from commpress.optim import loops

KEPT = 0.5
"""The share of values that the masks keep."""
RANK, LENGTH = 4, 4096
"""Of the factors, and of their vectors where these are made orthonormal."""


class Pass(NamedTuple):
    """An op of the table of kernels on n values, and the tensors that it works on, in place."""

    op: str
    call: Callable[[], Any]
    tensors: list[Tensor]
    moved: int
    """Bytes that it must read and write."""
    exact: bool
    """Whether it gives the same bits everywhere, or the same up to rounding."""
    dtype: str = "float32"
    """Of the values."""
    word: str | None = None
    """Of the codec that it belongs to."""


def normal(n: int, seed: int, device: torch.device) -> Tensor:
    """Return n normal values, the same on every device."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(device)


def spoilt(x: Tensor) -> Tensor:
    """Return x ([n]) with a NaN and an Inf in it, where it is long enough: what a gradient may have."""
    x[7:9] = x.new_tensor([torch.nan, torch.inf])[: max(0, x.numel() - 7)]
    return x


def passes(n: int, device: torch.device) -> list[Pass]:
    """All passes over n values."""
    a, b, c, d, e, f = (normal(n, seed, device) for seed in range(6))
    inverse, half = 0.5 + b.abs(), c.bfloat16()
    return [
        *optimizers_passes(n, [spoilt(a), spoilt(b), c, d, e, f], inverse, half),
        *masks_passes(n, device),
        fingerprint_pass(n, device),
        *factors_passes(n, device),
    ]


def optimizers_passes(n: int, values: list[Tensor], inverse: Tensor, half: Tensor) -> list[Pass]:
    """The passes of `commpress/optim/loops.py`, and the prologue by itself; each has copies of its own."""
    word = 4 * n

    def made(
        op: str,
        words: float,
        run: Callable[..., Any],
        *extra: Tensor,
        count: int = 0,
        exact: bool = False,
    ) -> Pass:
        tensors = [x.clone() for x in (*values[:count], *extra)]
        return Pass(op, lambda: run(*tensors), tensors, round(words * word), exact)

    def nesterov(x: Tensor, momentum: Tensor, p: Tensor) -> None:
        loops.momentum_correction(x, momentum, p, 0.5, 0.01, True)

    def prologue(x: Tensor, average: Tensor, inverse: Tensor) -> None:
        Prologue(inverse, average, 1.5, 0.1, 0.9).apply(x)

    return [
        made("prologue", 4, prologue, inverse, count=2, exact=True),
        made("apply_update", 4, lambda p, u, m: loops.apply_update(p, u, m, 0.99, 1e-3), count=3),
        made(
            "local_step",
            8,
            lambda g, m, t, o, p, i: loops.local_step(g, i, m, t, o, p, 1.5, 0.9, 0.99, 1e-3, 0.999),
            inverse,
            count=5,
        ),
        made(
            "sync_payload",
            6,
            lambda g, m, t, lead, i: loops.sync_payload(g, i, m, t, lead, 1.5, 0.1, 0.9, 0.5, 2.0),
            inverse,
            count=4,
        ),
        made("sync_apply", 7, lambda p, u, m, t, o, x: loops.sync_apply(p, u, m, t, o, x, 0.99, 1e-3, 2.0), count=6),
        made("restore_local", 3, lambda p, o, t: loops.restore_local(p, o, t, 0.99), count=3),
        made("estimate_momentum", 1.5, lambda x, k: loops.estimate_momentum(x, k, 0.5, 1.0), half, count=1),
        made("add_scaled", 2.5, lambda x, k: loops.add_scaled(x, k, 0.5), half, count=1),
        made("momentum_correction", 5, nesterov, count=3),
        made("momentum_ahead", 4, lambda x, m: Ahead(m, 0.05).apply(x), count=2),
    ]


def masks_passes(n: int, device: torch.device) -> list[Pass]:
    """The passes of masks that keep KEPT of n values."""
    kept = normal(n, 7, device) > torch.special.ndtri(torch.tensor(1 - KEPT, dtype=torch.float64)).item()
    places = torch.nn.functional.pad(kept.nonzero().flatten().to(torch.int32), (0, 1), value=-1)  # and a filling zero
    k = places.numel()
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        x, wide, packed = (
            spoilt(normal(n, 8, device)).to(dtype),
            normal(n, 9, device).to(dtype),
            spoilt(normal(k, 10, device)).to(dtype),
        )
        narrow, size, name = torch.zeros_like(packed), x.element_size(), str(dtype).removeprefix("torch.")
        pruned = x.clone()
        made += [
            Pass("pack", lambda x=x, out=narrow: pack(x, places, out), [narrow], (4 + 2 * size) * k, True, name),
            Pass(
                "unpack",
                lambda p=packed, out=wide: unpack(p, places, out),
                [wide],
                (4 + size) * k + size * n,
                True,
                name,
            ),
            Pass("keep", lambda x=pruned: keep_(x, kept), [pruned], n + 2 * size * n, True, name),
            Pass("count_pruned", lambda x=x: count_pruned(x, kept), [x], n + size * n, True, name),
        ]
    return made


def fingerprint_pass(n: int, device: torch.device) -> Pass:
    """The hash of n values that stays on their device."""
    x, hashed = normal(n, 16, device), torch.zeros((), dtype=torch.int64, device=device)

    def run() -> None:
        hashed.copy_(fingerprint_on_device(x))

    return Pass("fingerprint", run, [hashed], x.nbytes, True)


def factors_passes(n: int, device: torch.device) -> list[Pass]:
    """The passes of `powersgd` over a matrix that is nearly square, and its Gram-Schmidt over n values of factors."""
    columns = max(1, int(n**0.5) // 4 * 4)
    rows, word = n // columns, factors.WORD
    rank, length = min(RANK, rows, columns), min(n, LENGTH)
    x, residual = (normal(rows * columns, seed, device).view(rows, columns) for seed in (11, 12))
    p, q = normal(rank * rows, 13, device).view(rank, rows), normal(rank * columns, 14, device).view(rank, columns)
    batch = normal(max(1, n // (rank * length)) * rank * length, 15, device).view(-1, rank, length)

    def made(op: str, words: int, run: Callable[..., Any], *tensors: Tensor) -> Pass:
        copies = [tensor.clone() for tensor in tensors]
        return Pass(op, lambda: run(*copies), copies, 4 * words * x.numel(), False, word=word)

    return [
        made("project", 3, factors.project, x, residual, q, torch.zeros_like(p)),
        made("project_back", 1, factors.project_back, x, p, torch.zeros_like(q)),
        made("expand", 3, factors.expand, p, q, x, residual),
        made("orthonormalize", 2, factors.orthonormalize, batch),
    ]


def rows_of(x: Tensor, repeat: int) -> tuple[float, list[dict[str, Any]]]:
    """The median seconds of a copy of x, and a row for each pass over as many values."""
    found = passes(x.numel(), x.device)
    copies, times = in_turns({i: each.call for i, each in enumerate(found)}, x, repeat)
    copy = statistics.median(copies)
    rows: list[dict[str, Any]] = []
    for i, each in enumerate(found):
        seconds = statistics.median(times[i])
        about = {"op": each.op, "of": each.dtype, "seconds": seconds, "copies": seconds / copy}
        rows.append({**about, "bytes_per_second": each.moved / seconds})
    return copy, rows


def main() -> None:
    """Time all passes and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument(
        "--mb", type=float, help=f"size of the values; default {MB['cpu']:.0f}, on cuda {MB['cuda']:.0f}"
    )
    options.add_argument("--repeat", type=int, default=11)
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: this machine has no GPU that torch can use, expected cpu")
    torch.set_num_threads(1)
    device = torch.device(chosen.device, *([torch.cuda.current_device()] if chosen.device == "cuda" else []))
    x = normal(int((chosen.mb or MB[chosen.device]) * 1e6 / 4), 0, device)
    copy, rows = rows_of(x, chosen.repeat)
    rate = 2 * x.nbytes / copy / 1e9
    table = Table(
        title=f"{x.nbytes / 1e6:.0f} MB of values, {name_of(device)}: a copy {copy * 1e3:.3g} ms, {rate:.1f} GB/s"
    )
    for name in ("pass", "of", "copies", "GB/s"):
        table.add_column(name, justify="left" if name in ("pass", "of") else "right")
    for row in rows:
        table.add_row(row["op"], row["of"], f"{row['copies']:.2f}", f"{row['bytes_per_second'] / 1e9:.1f}")
    Console(width=120).print(table)
    slowest = min(rows, key=lambda row: row["bytes_per_second"])
    print(
        f"slowest against what it must move: {slowest['op']} {slowest['bytes_per_second'] / 1e9 / rate:.0%} of a copy's rate"
    )


if __name__ == "__main__":
    main()
