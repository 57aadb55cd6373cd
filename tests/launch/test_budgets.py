"""Structure that a budget removes: by the word of rank 0, and the same on all ranks."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from torch import Tensor, nn

from commpress.launch import budgets
from commpress.model import Recipe

LIBRARIES = ("torchao.quantization", "torch_pruning")
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")
BUDGET = {"format": "safetensors", "structure": 0.75}


def removed_on_a_rank(out: Path, limit: float) -> tuple[list[Tensor], dict[str, object], list[int]]:
    torch.manual_seed(dist.get_rank())  # a factory that does not seed
    model = nn.Sequential(nn.Linear(32, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 8))
    recipe = Recipe.of({"budget": {**BUDGET, "max_mb": limit}})
    held_out = [(((torch.randn(64, 32)),), torch.arange(64) % 8)]
    said = budgets.narrowed(model, recipe, held_out[0][0], out, torch.device("cpu"), held_out)
    return [x.detach() for x in model.state_dict().values()], said.to_dict(), [model[0].out_features]


def test_all_ranks_remove_what_the_first_does(tmp_path: Path) -> None:
    (first, said, rows), other = run(2, removed_on_a_rank, tmp_path, 0.006)
    assert said["budget"]["removed"] > 0  # type: ignore[index]
    assert rows[0] < 256
    assert (said, rows) == other[1:]
    assert all(torch.equal(x, y) for x, y in zip(first, other[0], strict=True))
    record = json.loads((tmp_path / budgets.STRUCTURE).read_text())
    assert record["shapes"]["tensors"]["0.weight"] == [rows[0], 32]
    assert budgets.structure_of(tmp_path, Recipe.of(said)) == record
    assert budgets.structure_of(tmp_path, Recipe.of({"budget": {"max_mb": 1.0}})) is None


def failing_on_a_rank(out: Path) -> str:
    return outcome(lambda: removed_on_a_rank(out, 0.0001))


def test_what_cannot_be_met_ends_all_ranks(tmp_path: Path) -> None:
    for said in run(2, failing_on_a_rank, tmp_path):
        assert "budget.max_mb: 0.0001 MB cannot be met" in said
        assert "with 0.75 of each width removed" in said
