"""Gradients in bfloat16: which exchanges round their mean once, and which one after each addition."""

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commpress

WORLD_SIZE = 4
HALF_A_PLACE = 2.0**-8
"""Half of the last place of a bfloat16, as a share of the value: the error of one rounding."""


def means(exchange: str) -> tuple[Tensor, Tensor]:
    """The mean gradient of a model in bfloat16 as a rank has it after an exchange, and that of all gradients in float64."""
    torch.manual_seed(0)
    model = nn.Linear(96, 64, bias=False).bfloat16()
    alone = nn.Linear(96, 64, bias=False).bfloat16()
    alone.load_state_dict(model.state_dict())
    ddp = DistributedDataParallel(model)
    commpress.attach(ddp, "bf16", exchange=exchange)
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    for each in (ddp, alone):
        each(x).square().sum().backward()
    assert model.weight.grad is not None
    assert alone.weight.grad is not None
    exact = alone.weight.grad.double() / WORLD_SIZE
    dist.all_reduce(exact)
    return model.weight.grad, exact


@pytest.mark.parametrize(("exchange", "rounds_once"), [("two_shot", True), ("one_shot", True), ("all_reduce", False)])
def test_a_mean_of_bfloat16_is_summed_in_float32_but_by_the_groups_own_sum(exchange: str, rounds_once: bool) -> None:
    ranks = run(WORLD_SIZE, means, exchange)
    for mean, exact in ranks:
        assert mean.dtype == torch.bfloat16
        assert torch.equal(mean, ranks[0][0])
        errors = (mean.double() - exact).abs() / exact.abs()
        assert (float(errors.max()) <= 1.001 * HALF_A_PLACE) == rounds_once
