"""A supernet under compressed DDP: the same path and the same bits on all ranks, whatever a path leaves out."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from tiers import slowly
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import CLASSES, INPUTS, SMALL_BUCKETS, batch, parameters_of

import commpress
from commpress.model.search import Depth, OneOf, Paths, Width, left_out


def supernet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OneOf(nn.Linear(INPUTS, 32), nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, 32))),
        Depth([0, 1, 2], [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2)]),
        Width([8, 16, 32], nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, CLASSES)),
    )


def trained(
    spec: str, zeros: bool, optimizer: str, steps: int = 12
) -> tuple[list[Tensor], list[Any], int, float, float]:
    """Train along paths: parameters, paths, how many weights they left out, and the loss at first and last."""
    model = supernet()
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS, find_unused_parameters=not zeros)
    commpress.attach(ddp, spec)
    make: Any = {
        "SGD": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "AdamW": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
    }[optimizer]
    moving, paths, taken, without, losses = make(), Paths(model, seed=3), [], 0, []
    for step in range(steps):
        taken.append(paths.take(step))
        without += sum(p.numel() for p in left_out(model))
        x, y = batch(step % 3, dist.get_rank())
        loss = nn.functional.cross_entropy(ddp(x), y)
        (paths.loss(loss) if zeros else loss).backward()
        losses.append(loss.item())
        moving.step()
        moving.zero_grad()
    return parameters_of(model), taken, without, losses[0], min(losses[-3:])


@pytest.mark.parametrize(
    ("world_size", "spec", "zeros", "optimizer"),
    slowly(
        [
            (2, "int4", True, "AdamW"),
            (2, "topk(0.1)|int4", True, "SGD"),
            (2, "none", True, "SGD"),
            (3, "int8", True, "AdamW"),
            (2, "int4", False, "AdamW"),
        ],
        quick=[(2, "int4", True, "AdamW"), (2, "int4", False, "AdamW")],
    ),
)
def test_replicas_hold_the_same_bits_whatever_paths_leave_out(
    world_size: int, spec: str, zeros: bool, optimizer: str
) -> None:
    by_rank = run(world_size, trained, spec, zeros, optimizer)
    parameters, taken, without, first, last = by_rank[0]
    for other in by_rank[1:]:
        assert other[1] == taken
        assert all(torch.equal(a, b) for a, b in zip(parameters, other[0], strict=True))
    assert without > 0
    assert len({str(path) for path in taken}) > 3
    assert last < first
    assert not torch.equal(parameters[0], parameters_of(supernet())[0])


def test_paths_follow_from_seed_and_step_alone() -> None:
    one, other = Paths(supernet(), seed=1), Paths(supernet(), seed=1)
    one.take(7)
    assert [one.at(step) for step in range(20)] == [other.at(step) for step in range(20)]
    assert [one.at(step) for step in range(20)] != [Paths(supernet(), seed=2).at(step) for step in range(20)]
    for name, options in one.space.items():
        assert {one.at(step)[name] for step in range(60)} == set(options)


def second_gradient(zeros: bool) -> Tensor | None:
    """The gradient of a weight that the first step uses and the second leaves out, under int2 with feedback."""
    torch.manual_seed(0)
    model = Depth([1, 2], [nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)])
    ddp = DistributedDataParallel(model, find_unused_parameters=not zeros)
    commpress.attach(ddp, "int2")
    paths, x = Paths(model), batch(0, dist.get_rank())[0]
    for depth in (2, 1):
        model.zero_grad()
        model.choose(depth)
        loss = ddp(x).pow(2).mean()
        (paths.loss(loss) if zeros else loss).backward()
    return model.get_parameter("blocks.1.weight").grad


def test_what_feedback_holds_of_a_weight_that_is_left_out_arrives_with_zeros_alone() -> None:
    for gradient in run(2, second_gradient, True):
        assert gradient is not None
        assert gradient.any()
    for gradient in run(2, second_gradient, False):
        assert gradient is None or not gradient.any()
