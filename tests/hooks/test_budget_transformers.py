"""A recipe with a budget under the Trainer of Transformers: chosen alike, resumed bit for bit, held by the file in the end."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_trainers_transformers import ARGUMENTS, bert, result, sentences
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trainers import launched, require_one_choice

LIBRARIES = ("transformers", "accelerate")
pytestmark = [pytest.mark.usefixtures("ranks_of_our_own"), pytest.mark.slow]
WIDTH, STEPS = 16, 6


class Classifier(nn.Module):
    """Two layers that give their loss, as Transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 256), nn.Linear(256, 256)
        self.last = nn.Linear(256, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """float [batch, WIDTH] to logits [batch, 4]."""
        logits = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    return [{"x": x, "labels": int(x.argmax()) % 4} for x in torch.randn(count, WIDTH, generator=generator)]


def budget(**limits: Any) -> Any:
    from commpress.model import Recipe

    found = {"start": 2, "end": 4, "every": 1, "format": "onnx", **limits}
    return Recipe.of({"budget": found}, "the recipe of a test")


def trainer(folder: str, model: nn.Module | None = None, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    given = {**ARGUMENTS, "output_dir": folder, "max_steps": STEPS, "learning_rate": 0.01, **settings}
    data = {"train_dataset": rows(256), "eval_dataset": rows(64)}
    return Trainer(model=model or Classifier(), args=TrainingArguments(**given), **data)


def with_callback(made: Any, of: Any, **more: Any) -> Any:
    from commpress.hooks.transformers import Compression

    callback = Compression(made, "int4", recipe=of, **more)
    made.add_callback(callback)
    return callback


def told(train: Callable[[], object]) -> list[str]:
    """What training warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(each.message) for each in caught if "budget" in str(each.message)]


def by_budget(folder: str) -> list[dict[str, Any]]:
    """A training unbroken, and from its checkpoints before the budget chooses, behind that, and with integers."""
    found = []
    with launched():
        for at in (None, 1, 3, 5):
            save = {"save_strategy": "steps", "save_steps": 1} if at is None else {}
            made = trainer(folder if at is None else f"{folder}-{at}", bf16=True, **save)  # files are float32
            callback = with_callback(made, budget(max_mb=0.12, max_loss=10.0))
            said = told(lambda at=at, t=made: t.train(resume_from_checkpoint=at and f"{folder}/checkpoint-{at}"))
            chosen = callback.scheduler.recipe.to_dict()
            found.append({**result(made, callback), "said": said, "recipe": chosen, "phase": callback.scheduler.phase})
    return found


def test_all_ranks_choose_alike_and_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ranks = run(2, by_budget, str(tmp_path / "run"), timeout=400)
    require_one_choice(ranks)
    for at, found in zip(("", "-1", "-3", "-5"), ranks[0], strict=True):
        assert found["said"] == []
        record = json.loads((tmp_path / f"run{at}" / "judged" / "judgement.json").read_text())
        (row,) = record["rows"]
        assert row["small"]["bytes"] < 0.12e6 < row["dense"]["bytes"]
        assert row["quality"]["dense_loss"] == pytest.approx(first_loss(tmp_path / "run"), rel=1e-5)


def beside_entries(folder: str) -> tuple[list[str], dict[str, Any]]:
    """A training by entries of one's own whose file is larger than the budget, resumed; its warnings."""
    from commpress.model import Recipe

    entries = {"quantize": [{"start": 2, "activations": "static"}], "budget": {"max_mb": 0.01}}
    with launched():
        for steps in (1, 4):
            made = trainer(folder, max_steps=steps, save_strategy="steps", save_steps=1)
            with_callback(made, Recipe.of(entries), held_out=[(torch.randn(4, WIDTH), torch.arange(4))])
            said = told(lambda at=steps > 1, t=made: t.train(resume_from_checkpoint=at))
    return said, json.loads((Path(folder) / "judged" / "judgement.json").read_text())


def test_a_limit_that_the_file_misses_is_a_warning_and_training_has_its_result(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (said, record), (silence, _) = run(2, beside_entries, str(tmp_path), timeout=300)
    assert silence == []
    (row,) = record["rows"]
    assert row["small"]["bytes"] < 0.4 * row["dense"]["bytes"]
    size = row["small"]["bytes"] / 1e6
    assert said == [f"commpress: the budget is not met: max_mb 0.01: model.onnx has {size:.3f} MB"]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()


def first_loss(folder: Path) -> float:
    """The loss of the unbroken run's model at the step at which its budget began, on rank 0's half of the held-out rows."""
    from safetensors.torch import load_file

    model, half = Classifier(), [row for i, row in enumerate(rows(64)) if i % 16 < 8]
    model.load_state_dict(load_file(folder / "checkpoint-2" / "model.safetensors"), strict=False)
    x, labels = torch.stack([row["x"] for row in half]), torch.tensor([row["labels"] for row in half])
    return float(model.eval()(x, labels)["loss"].detach())


def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return cross_entropy(outputs["logits"], labels, label_smoothing=0.2)


def refused(folder: str) -> dict[str, str]:
    from commpress.model import Recipe

    class Swapped(Classifier):
        def forward(self, mask: Any = None, x: Any = None, labels: Any = None) -> Any:
            return super().forward(x, labels)

    def says(of: Any, model: nn.Module | None = None, data: Any = None, loss: Any = None) -> str:
        def train() -> None:
            made = trainer(folder, model)
            made.compute_loss_func = loss
            made.eval_dataset = made.eval_dataset if data is None else data or None
            with_callback(made, of)
            made.train()

        return outcome(train)

    some = budget(max_mb=0.12)
    with launched():
        return {
            "no data": says(some, data=[]),
            "several": says(some, data={"a": rows(8), "b": rows(8)}),
            "order": says(some, Swapped()),
            "another loss": says(some, loss=smoothed),
            "not met": says(budget(max_mb=0.001)),
            "structure": says(Recipe.of({"budget": {"max_mb": 0.1, "structure": 0.5}})),
            "removed": says(Recipe.of({"budget": {"max_mb": 0.1, "structure": 0.5, "removed": 0.25}})),
            "search": says(Recipe.of({"search": {"trials": 4}})),
        }


def test_what_a_budget_cannot_use_is_told_on_all_ranks(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for said in run(2, refused, str(tmp_path), timeout=300):
        assert (
            "expected an eval_dataset in the Trainer, got none; or held_out=, batches (inputs, targets)"
            in said["no data"]
        )
        assert "expected an eval_dataset in the Trainer, got several" in said["several"]
        assert "evaluation batches have x, and forward of Swapped takes mask first" in said["order"]
        assert "is not the usual one of outputs and labels" in said["another loss"]
        assert "budget.max_mb: 0.001 MB cannot be met, the closest of model.onnx is " in said["not met"]
        assert (
            "call `recipe, _ = commpress.model.narrowing.narrow(model, recipe, (x,), batches)` before"
            in said["structure"]
        )
        assert "budget.removed: 0.25 of each width is gone: expected dense=" in said["removed"]
        assert "elsewhere by your own call of commpress.model.search.search" in said["search"]


def batches_of_models(folder: str) -> dict[str, Any]:
    """Evaluation batches of a classifier and of a causal model, and whether the usual loss of them is the model's own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from commpress.hooks.eval_batches import batches_for
    from commpress.model.judgement.quality import usual_loss

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    causal = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    found = {}
    with launched():
        for name, model in (("bert", bert()), ("gpt2", causal)):
            made = trainer(folder, model)
            told = [{**each, **({"labels": each["input_ids"]} if name == "gpt2" else {})} for each in sentences(16)]
            made.eval_dataset = told
            (((ids,), targets),) = batches_for(made, made.compute_loss, None)
            with torch.no_grad():
                logits = model.eval()(ids).logits
                own = torch.stack([torch.as_tensor(each["labels"]) for each in told[8 * dist.get_rank() :][:8]])
                loss = float(model(ids, labels=own).loss)
            usual = float(usual_loss(logits, targets)(logits, targets))
            found[name] = (tuple(ids.shape), tuple(targets.shape), usual, loss)
    return found


def test_evaluation_batches_have_the_targets_of_the_model_s_own_loss(tmp_path: Path) -> None:
    for found in run(2, batches_of_models, str(tmp_path), timeout=120):
        for name, targets in (("bert", (8,)), ("gpt2", (8, 11))):
            assert found[name][:2] == ((8, 11), targets)
            assert found[name][2] == pytest.approx(found[name][3], rel=1e-5)
