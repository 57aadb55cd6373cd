"""A recipe with a budget under Lightning: chosen alike, resumed bit for bit, and held by the file in the end."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_trainers_lightning import module, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers import MICRO, examples, flat, launched, require_one_choice
from training import batch, network

LIBRARIES = ("lightning",)
pytestmark = [pytest.mark.usefixtures("ranks_of_our_own"), pytest.mark.slow]
BUDGET = {"start": 3, "end": 5, "every": 1, "max_mb": 0.2, "max_loss": 10.0}
STORED = {"format": "safetensors"}
STEPS = 7


def budgeted(validates: bool = True) -> Any:
    """A LightningModule whose data follow from the step alone."""

    class Budgeted(type(module())):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.network(x)
            return y

        def training_step(self, _: Any, index: int) -> Tensor:
            x, y = batch(self.global_step, dist.get_rank())
            return nn.functional.cross_entropy(self.network(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    if validates:
        Budgeted.validation_step = lambda self, batch, index: None  # type: ignore[attr-defined]
    torch.manual_seed(0)
    made = Budgeted()
    made.network = nn.Sequential(network(), nn.Tanh(), nn.Linear(10, 4096), nn.Tanh(), nn.Linear(4096, 10))
    return made


def fitted(made: Any, model: Any, **more: Any) -> list[str]:
    """What a fit warns of."""
    train, held = (DataLoader(examples(count), batch_size=MICRO) for count in (128 * MICRO, 4 * MICRO))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(model, train, held, **more)
    return [str(each.message) for each in caught if "budget" in str(each.message)]


def by_budget(folder: str) -> list[dict[str, Any]]:
    """A training unbroken, and from its checkpoints before the budget chooses, behind that, and with integers."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from commpress.hooks.lightning import CompressedDDP
    from commpress.model import Recipe

    found, several = [], {"accumulate_grad_batches": 1, "num_sanity_val_steps": 0}
    for at in (None, 2, 4, 6):
        own = folder if at is None else f"{folder}-{at}"
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        settings = several | {"enable_checkpointing": at is None, "callbacks": [keep] if at is None else []}
        strategy = CompressedDDP("int4", recipe=Recipe.of({"budget": BUDGET}))
        made, model = trainer(own, STEPS, None, strategy=strategy, **settings), budgeted()
        with launched():
            said = fitted(made, model, ckpt_path=f"{folder}/step={at}.ckpt" if at else None)
        scheduler = strategy.scheduler
        more = {"phase": scheduler.phase, "recipe": scheduler.recipe.to_dict(), "done": scheduler.done}
        found.append({"parameters": flat(model.parameters()), "said": said, **more})
    return found


def test_all_ranks_choose_alike_and_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ranks = run(2, by_budget, str(tmp_path / "run"), timeout=400)
    require_one_choice(ranks)
    assert all(pieced["done"] == STEPS for found in ranks for pieced in found)
    for at, found in zip(("", "-2", "-4", "-6"), ranks[0], strict=True):
        assert found["said"] == []
        record = json.loads((tmp_path / f"run{at}" / "judged" / "judgement.json").read_text())
        assert record["batches"] == 2  # this rank's half of 4
        (row,) = record["rows"]
        assert row["small"]["bytes"] < 0.2e6 < row["dense"]["bytes"]


def refused(folder: str) -> dict[str, str]:
    from commpress.hooks.lightning import CompressedDDP
    from commpress.model import Recipe

    def says(model: Any, **more: Any) -> str:
        strategy = CompressedDDP("int4", recipe=Recipe.of({"budget": BUDGET | STORED}), **more)
        made = trainer(folder, STEPS, None, strategy=strategy, accumulate_grad_batches=1, num_sanity_val_steps=0)
        return outcome(lambda: fitted(made, model))

    broken = [(torch.zeros(2, 32), torch.zeros(2).long())] if dist.get_rank() == 0 else [torch.zeros(2, 32)]
    with launched():
        return {"no loader": says(budgeted(False)), "one rank": says(budgeted(), held_out=broken)}


def test_what_a_budget_cannot_use_is_told_on_all_ranks(tmp_path: Path) -> None:
    for said in run(2, refused, str(tmp_path), timeout=120):
        assert (
            "expected one validation dataloader and a validation_step, got 0 loaders; or held_out=" in said["no loader"]
        )
        assert "held_out: batch 0: expected (inputs, targets), got a Tensor" in said["one rank"]


def test_what_ends_early_or_cannot_be_judged_is_a_warning(tmp_path: Path) -> None:
    said = run(2, ended_early, str(tmp_path), timeout=120)
    assert said == [["commpress: the budget is not held against the file: budget.end: 40, but the run has 3 steps"], []]


def ended_early(folder: str) -> list[str]:
    from commpress.hooks.lightning import CompressedDDP
    from commpress.model import Recipe

    held_out = [batch(0, 0)]
    strategy = CompressedDDP(
        "int4", recipe=Recipe.of({"budget": BUDGET | STORED | {"start": 20, "end": 40}}), held_out=held_out
    )
    made = trainer(folder, 3, None, strategy=strategy, accumulate_grad_batches=1)
    with launched():
        return fitted(made, budgeted(False))
