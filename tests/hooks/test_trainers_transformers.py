"""The Trainer of Transformers on two ranks: a small BERT, accumulation, checkpoints, both ways to give it an optimizer."""

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from trainers import blocks, flat, forget, launched, payload_bytes, require_sums, tracked

from commpress import Session
from commpress.optim import OneBitAdamW, ZeroOneAdamW

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIBRARIES = ("transformers", "accelerate")
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")


ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "ddp_bucket_cap_mb": 1,
}


def bert() -> Any:
    """Two layers, dropout as it comes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=2, max_position_embeddings=12, **shape))


def sentences(count: int = 512) -> list[dict[str, Any]]:
    """Tokens, and whether more of them are above than below the middle."""
    tokens = torch.randint(0, 40, (count, 11), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": t, "labels": int((t >= 20).sum() > 5)} for t in tokens]


def trainer(folder: str, steps: int, spec: str | None = "int4", **settings: Any) -> tuple[Any, Any]:
    """A Trainer with a fresh model, and its callback."""
    from transformers import Trainer, TrainingArguments

    from commpress.hooks.transformers import Compression

    kind = settings.pop("optimizer", None)
    arguments = {**ARGUMENTS, "output_dir": folder, "max_steps": steps, **settings}
    given: dict[str, Any] = {}
    model = bert()
    if kind == "by class":
        given["optimizer_cls_and_kwargs"] = (OneBitAdamW, {"lr": 2e-3, "warmup_steps": 4, "max_norm": 1.0})
    elif kind is not None:
        optimizer = ZeroOneAdamW(model.parameters(), lr=2e-3, warmup_steps=3, sync_every=2)
        given["optimizers"] = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.98**step))
    made = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=sentences(), **given)
    callback = None
    if spec is not None:
        callback = Compression(made, spec)
        made.add_callback(callback)
    return made, callback


def result(made: Any, callback: Any) -> dict[str, Any]:
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    report = None if callback is None else callback.session.report().to_dict()
    return {"losses": losses, "parameters": flat(made.model.parameters()), "report": report}


def trained(folder: str, steps: int, spec: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    with launched():
        made, callback = trainer(folder, steps, spec, **settings)
        made.train()
        return result(made, callback)


def interrupted(folder: str, at: int, steps: int, spec: str, settings: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Unbroken with checkpoints; from the first of them by a new Trainer; from it without our files; the warning then."""
    settings = {**settings, "save_strategy": "steps", "save_steps": at}
    with launched():
        made, callback = trainer(folder, steps, spec, **settings)
        made.train()
        whole = result(made, callback)

        resumed, callback = trainer(f"{folder}-resumed", steps, spec, **settings)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{at}")
        pieced = result(resumed, callback)

        dist.barrier()
        (Path(folder) / f"checkpoint-{at}" / f"commpress-rank{dist.get_rank()}.pt").unlink()
        dist.barrier()
        empty, callback = trainer(f"{folder}-without", steps, spec, **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            empty.train(resume_from_checkpoint=f"{folder}/checkpoint-{at}")
        said = [str(w.message) for w in caught if "commpress" in str(w.message)]
        return whole, pieced, {**result(empty, callback), "said": said}


RECIPE = """
[[prune]]
start = 1
end = 4
every = 1
amount = 0.6

[[quantize]]
start = 3
activations = "static"
layers = ["bert.encoder.*"]

[distil]
weight = 0.5
hidden = {"bert.encoder.layer.0" = "bert.encoder.layer.0"}
"""


def recipe(text: str = RECIPE) -> Any:
    from commpress.model import Recipe

    return Recipe.of(tomllib.loads(text), "the recipe of a test")


def from_step_0(folder: str) -> tuple[int, int]:
    """Zeros of a training that prunes by a threshold at step 0 alone, unbroken and from its checkpoint."""
    from commpress.hooks.transformers import Compression

    found = []
    with launched():
        for resumed in (False, True):
            made, _ = trainer(folder, 6, None, save_strategy="steps", save_steps=3)
            made.add_callback(Compression(made, "none", recipe=recipe("[[prune]]\nstart = 0\nthreshold = 0.01")))
            made.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resumed else None)
            found.append(sum(int((p == 0).sum()) for p in made.model.parameters()))
    return found[0], found[1]


def exporting(folder: str) -> dict[str, str]:
    """Train by a recipe that exports, and by one whose example is missing."""
    from commpress.hooks.transformers import Compression

    found = recipe("[[quantize]]\nstart = 1\n[export]\nformats = ['safetensors', 'pt2e']")
    ids = torch.stack([each["input_ids"] for each in sentences(4)])
    with launched():
        made, _ = trainer(folder, 2, None)
        callback = Compression(made, "none", recipe=found, example_inputs=(ids,))
        made.add_callback(callback)
        made.train()
        short, _ = trainer(f"{folder}-short", 1, None)
        short.add_callback(Compression(short, "none", recipe=found, example_inputs=(ids,)))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            short.train()
        early = "; ".join(str(each.message) for each in warned if "quantize[0].start" in str(each.message))
        forgetful, _ = trainer(f"{folder}-2", 2, None)
        forgetful.add_callback(Compression(forgetful, "none", recipe=found))
        return {"missing": outcome(forgetful.train), "early": early}


def refused_recipes(folder: str) -> dict[str, str]:
    from transformers import Trainer, TrainingArguments

    from commpress.hooks.transformers import Compression

    with launched():
        made, _ = trainer(folder, 2, None, save_strategy="steps", save_steps=1)
        made.add_callback(Compression(made, "none", recipe=recipe("[[quantize]]\nstart = 1")))
        made.train()
        plain, _ = trainer(folder, 2, "none")
        own = Trainer(model_init=bert, args=TrainingArguments(output_dir=folder, use_cpu=True, report_to=[]))
        again, _ = trainer(folder, 1, None)
        again.model = made.model
        return {
            "no recipe": outcome(lambda: plain.train(resume_from_checkpoint=f"{folder}/checkpoint-1")),
            "model_init": outcome(lambda: Compression(own, "none", recipe=recipe())),
            "teacher": outcome(lambda: Compression(made, "none", teacher=bert())),
            "prepared before": outcome(lambda: Compression(again, "none", recipe=recipe("[[quantize]]\nstart = 1"))),
        }


def by_recipe(folder: str, at: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training by a recipe, unbroken by the spec of its [traffic], and from its checkpoint by the same in the line."""
    found = []
    with launched():
        for resumed in (False, True):
            made, _ = trainer(folder, steps, None, save_strategy="steps", save_steps=at)
            from commpress.hooks.transformers import Compression

            its = recipe(f"{RECIPE}\n[traffic]\nspec = 'int4'\n")
            callback = Compression(made, "int4" if resumed else None, recipe=its, teacher=bert())
            made.add_callback(callback)
            made.train(resume_from_checkpoint=f"{folder}/checkpoint-{at}" if resumed else None)
            weight = made.model.bert.encoder.layer[1].intermediate.dense.weight
            scheduler = callback.scheduler
            more = {"phase": scheduler.phase, "zeros": float((weight == 0).float().mean()), "done": scheduler.done}
            ranges = [buffer.clone() for name, buffer in made.model.named_buffers() if name.endswith("range")]
            found.append({**result(made, callback), **more, "ranges": torch.stack(ranges)})
    return found[0], found[1]


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """A loss that is its part of an accumulation's mean."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def accumulated(folder: str, parts: int, shares: bool) -> torch.Tensor:
    """The parameters behind three steps of 16 examples a rank, distilled, each step's in so many parts.

    `shares`: the loss is of the kind that the Trainer does not divide by the number of parts.
    """
    from commpress.hooks.transformers import Compression

    with launched():
        batch = {"per_device_train_batch_size": 16 // parts, "gradient_accumulation_steps": parts}
        made, _ = trainer(folder, 3, None, **batch, learning_rate=0.5, optim="sgd", max_grad_norm=0.0)
        made.model.eval()
        made.model.train = lambda mode=True: made.model  # no dropout: other parts would draw others
        made.model_accepts_loss_kwargs = False  # it says so, and gives means
        made.compute_loss_func = summed if shares else None
        torch.manual_seed(1)
        teacher = bert()
        torch.nn.init.normal_(teacher.classifier.weight)
        made.add_callback(Compression(made, "none", recipe=recipe("[distil]\nweight = 0.9"), teacher=teacher))
        made.train()
        return flat(made.model.parameters())


def again(folder: str) -> tuple[Any, ...]:
    """train() twice by one Trainer, the second time from the last checkpoint; the state then, and what was saved."""
    with launched():
        made, callback = trainer(folder, 3, save_strategy="steps", save_steps=3)
        made.train()
        first = callback.session
        saved = first.state_dict()
        made.args.max_steps = 5
        made.train(resume_from_checkpoint=True)
        return first is callback.session, first.report().steps, saved["memories"][0][0]["residual"].abs().sum() > 0


def without_a_spec(folder: str) -> tuple[str, int]:
    """The traffic's name after two steps of two backwards, and how many losses the session was told."""
    from commpress.hooks.transformers import Compression

    told: list[Any] = []
    with launched(), mock.patch.object(Session, "note_loss", lambda self, loss: told.append(loss)):
        made, _ = trainer(folder, 2, None)
        callback = Compression(made)
        made.add_callback(callback)
        made.train()
        assert callback.session is not None
        return callback.session.report().spec, len(told)


def refusals(folder: str) -> dict[str, str]:
    with launched():
        clipped, _ = trainer(folder, 2, "sign", optimizer="by class")
        twice, _ = trainer(folder, 2)
        from commpress.hooks.transformers import Compression

        twice.add_callback(Compression(twice, "int4"))
        its = recipe("[traffic]\nspec = 'int8'")
        differs = outcome(lambda: Compression(trainer(folder, 2, None)[0], "int4", recipe=its))
        unknown, _ = trainer(folder, 2, "int3")
        said = {"clipped": outcome(clipped.train), "unknown": outcome(unknown.train), "twice": outcome(twice.train)}
    return {**said, "differs": differs}


def alone(folder: str) -> str:
    forget()
    made, _ = trainer(folder, 2)
    said = outcome(made.train)
    forget()
    return said


def follow_the_page(folder: str) -> dict[str, Any]:
    """Run the blocks of the page, one after another, and say what they leave."""
    with launched():
        names: dict[str, Any] = {"model": bert(), "trained": bert(), "dataset": sentences(64), "folder": folder}
        for block in blocks("Transformers") + blocks("Structure and search before the trainer"):
            exec(compile(block, "docs/trainers.md", "exec"), names)
        return {"parameters": flat(names["model"].parameters())}


def with_a_tracker(folder: str) -> tuple[dict[str, Any], list[str]]:
    with launched(), contextlib.redirect_stdout(io.StringIO()) as out:
        made, callback = trainer(folder, 4, report_to=["tensorboard"], logging_steps=2)
        made.train()
        return result(made, callback)["report"], out.getvalue().splitlines()


def test_trackers_get_the_session_s_numbers_and_the_last_line_says_what_was_sent(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (report, said), (_, silence) = run(2, with_a_tracker, str(tmp_path), timeout=120)
    require_sums(tracked(tmp_path), report, every=2)
    assert said[-1].startswith("commpress int4: sent ")
    assert not [line for line in silence if line.startswith("commpress ")]


@pytest.mark.slow
def test_a_training_sends_what_the_spec_says_and_learns_as_without(tmp_path: Path) -> None:
    steps = 40
    plain = run(2, trained, str(tmp_path / "plain"), steps, None, {}, timeout=120)
    ours = run(2, trained, str(tmp_path / "ours"), steps, "int4", {}, timeout=120)
    for one, other in (plain, ours):
        assert torch.equal(one["parameters"], other["parameters"])
    for dense, coded in zip(plain, ours, strict=True):
        end, start, without = (sum(x) / 8 for x in (coded["losses"][-8:], coded["losses"][:8], dense["losses"][-8:]))
        assert end < 0.9 * start
        assert end == pytest.approx(without, rel=0.1)
        report = coded["report"]
        assert report["steps"] == steps  # two backwards each
        assert report["sent_bytes"] == payload_bytes(report, "int4")
        assert {row["reason"] for row in report["rows"]} == {""}
    written = json.loads((tmp_path / "ours" / "commpress.json").read_text())
    assert written == ours[0]["report"]


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("int4", {}),
        slow("sign", {"optimizer": "by class", "max_grad_norm": 0.0}),
        slow("sign", {"optimizer": "by object", "max_grad_norm": 0.0, "bf16": True}),
    ],
)
def test_resume_from_checkpoint_goes_on_as_unbroken(spec: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    ranks = run(2, interrupted, folder, 5, 9, spec, settings, timeout=120)
    for rank, (whole, pieced, without) in enumerate(ranks):
        assert torch.equal(whole["parameters"], pieced["parameters"])
        assert whole["losses"] == pieced["losses"]
        assert not torch.equal(whole["parameters"], without["parameters"])
        assert len(without["said"]) == (rank == 0)
    if "bf16" not in settings:  # the other's replicas have not synced by then
        assert torch.equal(ranks[0][0]["parameters"], ranks[1][0]["parameters"])


def test_a_recipe_prunes_quantises_and_distils_and_goes_on_as_unbroken(tmp_path: Path) -> None:
    ranks = run(2, by_recipe, str(tmp_path / "run"), 5, 8, timeout=120)
    for whole, pieced in ranks:
        assert whole["phase"] == "pruned + int8 + distil"
        assert whole["report"]["spec"] == "int4"
        assert (whole["done"], pieced["done"]) == (8, 8)
        assert whole["zeros"] == pytest.approx(0.6, abs=0.2)
        for name in ("parameters", "ranges"):
            assert torch.equal(whole[name], pieced[name])
            assert torch.equal(whole[name], ranks[0][0][name])
        assert (whole["ranges"][:, 0] < whole["ranges"][:, 1]).all()


@pytest.mark.slow
def test_what_is_pruned_at_step_0_is_not_pruned_once_more_when_a_run_resumes(tmp_path: Path) -> None:
    for whole, pieced in run(2, from_step_0, str(tmp_path), timeout=120):
        assert whole == pieced > 1000


@pytest.mark.slow
def test_what_a_recipe_exports_is_there_when_training_ends(tmp_path: Path) -> None:
    ranks = run(2, exporting, str(tmp_path / "run"), timeout=120)
    assert "quantize[0].start: 1, but the run has 1 steps" in ranks[0]["early"]  # a warning: the model is the user's
    assert not ranks[1]["early"]
    for said in ranks:
        assert "the recipe has an [export], expected example_inputs=, a tuple" in said["missing"]
    record = json.loads((tmp_path / "run" / "exported" / "export.json").read_text())
    assert [row["format"] for row in record["rows"]] == ["safetensors", "pt2e"]
    assert max(row["difference"] for row in record["rows"]) < 1e-4


@pytest.mark.slow
def test_recipes_that_cannot_be_followed_are_refused_on_all_ranks(tmp_path: Path) -> None:
    for said in run(2, refused_recipes, str(tmp_path), timeout=120):
        assert "is of a run that follows a recipe, this one has none" in said["no recipe"]
        assert "the Trainer has model_init" in said["model_init"]
        assert "expected a recipe that distils" in said["teacher"]
        assert said["prepared before"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("shares", [False, True])
def test_a_teacher_counts_alike_however_a_step_is_accumulated(shares: bool, tmp_path: Path) -> None:
    one, two = (run(2, accumulated, str(tmp_path), parts, shares, timeout=120)[0] for parts in (1, 2))
    start = flat(bert().parameters())
    assert float((one - two).norm()) < 1e-3 * float((one - start).norm())


def test_without_a_spec_one_is_found(tmp_path: Path) -> None:
    assert run(2, without_a_spec, str(tmp_path), timeout=120) == [("auto: none, still looking", 4)] * 2


def test_a_second_train_goes_on_with_the_session(tmp_path: Path) -> None:
    for same, steps, kept in run(2, again, str(tmp_path), timeout=120):
        assert same
        assert steps == 5
        assert kept


def test_what_cannot_be_attached_says_why_on_all_ranks(tmp_path: Path) -> None:
    for said in run(2, refusals, str(tmp_path), timeout=120):
        assert said["clipped"].startswith("ValueError: max_grad_norm=1.0 would clip the update of OneBitAdamW")
        assert said["unknown"].startswith("ValueError: ")
        assert "unknown" in said["unknown"]
        assert said["twice"].startswith("RuntimeError: ")
        assert "Compression(gradients): got 'int4', the recipe has traffic.spec 'int8'" in said["differs"]
    (said,) = run(1, alone, str(tmp_path), timeout=120)
    assert "got BertForSequenceClassification. Accelerate sees one process" in said


@pytest.mark.slow
def test_the_page(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")  # its budget is of model.onnx
    for name in ("optuna", "torch_pruning"):
        pytest.importorskip(name)
    one, other = run(2, follow_the_page, str(tmp_path), timeout=600)
    assert torch.equal(one["parameters"], other["parameters"])
    assert json.loads((tmp_path / "commpress.json").read_text())["sent_bytes"] > 0
