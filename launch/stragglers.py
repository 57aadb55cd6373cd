"""Ranks that compute slower than the others: all of them do the same small piece of work, again and again, at the same time.

Training waits for the slowest rank in each exchange, so one slow rank makes all slow.
"""

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from commpress.comm.link_speed import FEWEST, largest, repeats

BEHIND = 1.1
"""A rank is a straggler if its median is more than so many times the median of all ranks."""
SIDE, SIDE_ON_ACCELERATOR = 768, 4096
"""Rows of the square matrices that are multiplied."""
MOST = 1000
"""The most repeats: a longer time says more, since other load on a machine changes."""


def seconds_of_work(group: dist.ProcessGroup, device: torch.device, seconds: float) -> float:
    """Return this rank's median for a product of two matrices, on one core or on its accelerator. Collective.

    Takes about `seconds`.
    """
    side = SIDE if device.type == "cpu" else SIDE_ON_ACCELERATOR
    a = torch.ones(side, side, dtype=torch.float32, device=device)
    out = torch.empty_like(a)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ranks of one host do not get into each other's way
    try:
        own = min(work(a, out) for _ in range(FEWEST))  # caches and clocks warm up
        once = largest(own, group, device)  # all begin together
        return statistics.median(work(a, out) for _ in range(repeats(seconds, once, MOST)))
    finally:
        torch.set_num_threads(threads)


def work(a: torch.Tensor, out: torch.Tensor) -> float:
    """Multiply `a` by itself; return the seconds that it took."""
    start = time.perf_counter()
    torch.mm(a, a, out=out)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def shares(medians: Sequence[float]) -> list[float]:
    """Return each rank's seconds as a share of the median of all; of two middle values the faster counts."""
    middle = statistics.median_low(medians)
    return [own / middle for own in medians]


def sentence(medians: Sequence[float], hosts: Sequence[str]) -> str:
    """Return the sentence about stragglers and their delay; `medians` and `hosts` are by rank."""
    found = shares(medians)
    behind = sorted((rank for rank, share in enumerate(found) if share > BEHIND), key=lambda rank: -found[rank])
    if not behind:
        slowest = max(range(len(found)), key=found.__getitem__)
        return (
            f"Stragglers: none. The slowest in computing, rank {slowest} ({hosts[slowest]}), takes {found[slowest] - 1:.0%} "
            f"more than the median."
        )
    named = ", ".join(f"rank {rank} ({hosts[rank]}) by {found[rank] - 1:.0%}" for rank in behind)
    return f"Stragglers in computing: {named} behind the median of {statistics.median_low(medians) * 1e3:.3g} ms."
