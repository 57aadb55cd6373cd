"""Search a network for handwritten digits: which convolution, how wide and how deep, for how many parameters.

    commpress search --space examples.search:problem --finalists 3    # needs 'commpress[launch,search]' and scikit-learn
    torchrun --nproc-per-node 2 -m commpress.launch.search --space examples.search:problem --finalists 3
    commpress train --model examples.search:network --data examples.search:batches --recipe recipe.toml    # docs/recipes.md

One supernet is trained on all ranks, along paths drawn at random; choices are judged by its weights, and the best for their
size are trained on their own. The digits are scikit-learn's, 1,797 of 8 x 8 pixels: a small task.
"""

from collections import OrderedDict

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.model import search

DIGITS, HELD_OUT = load_digits(), 500
X, Y = torch.tensor(DIGITS.images[:, None] / 16, dtype=torch.float32), torch.tensor(DIGITS.target)


def network() -> nn.Sequential:
    """Return a network that leaves three things open: its supernet."""
    return nn.Sequential(
        OrderedDict(
            conv=search.OneOf({"3x3": nn.Conv2d(1, 8, 3, padding=1), "5x5": nn.Conv2d(1, 8, 5, padding=2)}),
            relu=nn.ReLU(),
            width=search.Width([4, 8, 16], nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, 1, 1)),
            flat=nn.Flatten(),
            depth=search.Depth([0, 1, 2], [nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(2)]),
            head=nn.Linear(128, 10),
        )
    )


def train(model: nn.Module, steps: int, paths: search.Paths | None = None) -> nn.Module:
    """Train a supernet along paths, on all ranks together; a model without choices on this rank alone."""
    rank = dist.get_rank() if paths and dist.is_initialized() else None
    wrapped = model if rank is None else DistributedDataParallel(model)
    session = None if rank is None else commpress.attach(wrapped, "int8")
    optimizer, source = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(rank or 0)
    for step in range(steps):
        rows = HELD_OUT + torch.randint(len(X) - HELD_OUT, (64,), generator=source)
        if paths:
            paths.take(step)
        loss = cross_entropy(wrapped(X[rows]), Y[rows])
        (paths.loss(loss) if paths else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    if session is not None and rank == 0 and dist.get_world_size() > 1:
        print(session.receipt())
    return model


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the share of held-out digits that it reads."""
    return (model(X[:HELD_OUT]).argmax(1) == Y[:HELD_OUT]).float().mean().item()


def batches() -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return batches to train on, and those that are held out."""
    found = list(zip(X.split(50), Y.split(50), strict=True))
    return found[HELD_OUT // 50 :], found[: HELD_OUT // 50]


def teacher() -> nn.Module:
    """Return the largest network, trained on its own: what a recipe distils from."""
    return train(search.fixed(network()), 600).eval()


def problem() -> search.Problem:
    """Return what `commpress search` shall look for."""
    torch.set_num_threads(1)  # it is too small for more
    torch.manual_seed(0)
    supernet = network()
    return search.Problem(
        search.space(supernet),
        quality=lambda trial: accuracy(search.fixed(supernet, trial.choice)),
        size=lambda choice: search.parameters(search.fixed(supernet, choice)),
        prepare=lambda: train(supernet, 600, search.Paths(supernet)),
        final=lambda trial: accuracy(train(search.fixed(network(), trial.choice), 300)),
    )
