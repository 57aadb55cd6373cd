"""Newton-Schulz of a GPT's hidden matrices: by every rank, against shared out over the ranks of a node.

    torchrun --nproc-per-node 2 benchmarks/newton_schulz.py [--layers 5 --width 528] [--rounds 9]

The model is that of benchmarks/training.py. The two ways take turns; a round is what the slowest rank took, one thread a rank.
The last lines are what the coordinates of coarse codes add: to enter and to leave them in each step, and to choose them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.launch.model import GPT, Shape
from commpress.launch.run_record import machine
from commpress.optim.eigenbasis import EVERY, SIDE, Basis
from commpress.optim.muon_groups import groups
from commpress.optim.newton_schulz import newton_schulz
from commpress.optim.shared_products import SharedProducts, multiply_adds


def coordinates(matrices: list[torch.Tensor], rounds: int) -> tuple[float, float]:
    """Return this rank's median seconds to bring matrices into their coordinates and back, and to choose these. Collective."""
    moving, choosing = [], []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        bases = [Basis.of(m) for m in matrices]
        choosing.append(time.perf_counter() - began)
        dist.barrier()
        began = time.perf_counter()
        for m, basis in zip(matrices, bases, strict=True):
            if basis is not None:
                basis.leave(basis.enter(m), (m.shape[0], m.shape[1]))
        moving.append(time.perf_counter() - began)
    return statistics.median(moving), statistics.median(choosing)


def main() -> None:
    """Measure, and print on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=5)
    options.add_argument("--width", type=int, default=528)
    options.add_argument("--rounds", type=int, default=9)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = GPT(Shape(chosen.layers, chosen.width, heads=8, context=64))
    matrices = [torch.randn(p.shape) for p in groups(model, ["head.*"])[0]["params"]]
    shapes = [(m.shape[0], m.shape[1]) for m in matrices]
    session = commpress.attach(DistributedDataParallel(model), "none")
    products = SharedProducts(session.collectives[0])
    owners = products.owners(shapes)
    if len(set(owners)) == 1:
        raise SystemExit("nothing to share out: expected torchrun with several ranks on a node, and a larger model")

    def made(numbers: list[int]) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for shape in dict.fromkeys(shapes[number] for number in numbers):
            alike = [number for number in numbers if shapes[number] == shape]
            found |= zip(alike, newton_schulz(torch.stack([matrices[number] for number in alike])), strict=True)
        return found

    def alone() -> None:
        made(list(range(len(matrices))))

    def shared() -> None:
        own = made([number for number, owner in enumerate(owners) if owner == products.node.me])
        dist.barrier()
        began = time.perf_counter()
        products.gather(own, shapes, owners)
        gathers.append(time.perf_counter() - began)

    gathers: list[float] = []
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    ways: tuple[tuple[str, Callable[[], None]], ...] = (("alone", alone), ("shared", shared))
    for _ in range(2 + chosen.rounds):
        for name, way in ways:
            dist.barrier()
            began = time.perf_counter()
            way()
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
    moved, chosen_in = coordinates(matrices, chosen.rounds)
    if dist.get_rank() == 0:
        work, values = sum(map(multiply_adds, shapes)), sum(m.numel() for m in matrices)
        one, both = (statistics.median(seconds[name][2:]) for name in ("alone", "shared"))
        print(f"{machine(torch.device('cpu'))['processor']}, {dist.get_world_size()} ranks of one thread")
        print(
            f"{len(matrices)} matrices of {values:,} values, {4 * values / 1e6:.1f} MB, {2 * work / 1e9:.1f} GFLOP a step"
        )
        print(f"every rank makes all: {one * 1e3:.0f} ms, {2 * work / one / 1e9:.0f} GFLOP/s")
        print(f"shared out: {both * 1e3:.0f} ms, of which the gather {statistics.median(gathers[2:]) * 1e3:.0f} ms")
        print(f"shared out it is {one / both:.2f} times as fast")
        print(f"coordinates of coarse codes: {moved * 1e3:.0f} ms a step to enter and leave them on each rank, and")
        print(
            f"{chosen_in * 1e3:.0f} ms to choose those of all matrices, each once in k / {SIDE} steps, at least {EVERY}"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
