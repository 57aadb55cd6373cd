"""Lightning's Trainer on two ranks: accumulation, clipping, checkpoints of all kinds, a loss scaler."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from torch import nn
from torch.utils.data import DataLoader
from trainers import MICRO, OPTIMIZERS, blocks, examples, flat, launched, payload_bytes, require_sums, tracked
from training import SMALL_BUCKETS, network
from training import batch as data

from commpress import Session
from commpress.files import pack_state, unpack_state

LIBRARIES = ("lightning",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")


def module(optimizer: str = "adamw", count: int = 1, by_step: bool = False) -> Any:
    """A LightningModule around `network()` that keeps its losses. `by_step`: its data follow from the step alone, because
    Lightning takes a loader up again at its beginning.
    """
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = data(self.global_step, dist.get_rank()) if by_step else batch
            loss = nn.functional.cross_entropy(self.network(x), y)
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            made = OPTIMIZERS[optimizer](self.parameters())
            if count > 1:
                self.automatic_optimization = False
                return [made, torch.optim.SGD(self.parameters(), lr=0.1)]
            schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.98**step)
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Classifier()


def trainer(folder: str, steps: int, spec: str | None, **settings: Any) -> Any:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from commpress.hooks.lightning import CompressedDDP

    buckets = {"bucket_cap_mb": SMALL_BUCKETS}
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    strategy = DDPStrategy(**buckets) if spec is None else CompressedDDP(spec, **buckets)
    return Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        max_steps=steps,
        default_root_dir=folder,
        **{"strategy": strategy, "accumulate_grad_batches": 2, "enable_checkpointing": False, **quiet, **settings},
    )


def loader() -> Any:
    return DataLoader(examples(MICRO * 128), batch_size=MICRO)


def result(made: Any, model: Any) -> dict[str, Any]:
    session = getattr(made.strategy, "session", None)
    report = None if session is None else session.report().to_dict()
    return {"losses": model.losses, "parameters": flat(model.parameters()), "report": report}


def trained(folder: str, steps: int, spec: str | None, scaled: bool = False) -> dict[str, Any]:
    with launched():
        settings: dict[str, Any] = {"gradient_clip_val": 1.0}
        if scaled:
            from lightning.pytorch.plugins.precision import MixedPrecision

            scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
            settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
        made, model = trainer(folder, steps, spec, **settings), module()
        made.fit(model, loader())
        return result(made, model)


def without_a_spec(folder: str) -> tuple[str, bool]:
    """The traffic's name after two steps, and whether the session was told the losses."""
    from commpress.hooks.lightning import CompressedDDP

    told: list[float] = []
    with launched(), mock.patch.object(Session, "note_loss", lambda self, loss: told.append(float(loss))):
        made, model = trainer(folder, 2, None, strategy=CompressedDDP()), module()
        made.fit(model, loader())
        return made.strategy.session.report().spec, len(told) == 4 and told == model.losses


def interrupted(folder: str, at: int, steps: int, spec: str, optimizer: str) -> tuple[Any, ...]:
    """Unbroken with checkpoints; from the first of them by a new Trainer; from it without our files; what was said then."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    with launched():
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=at, save_top_k=-1, save_last="link")
        model = module(optimizer, by_step=True)
        made = trainer(folder, steps, spec, accumulate_grad_batches=1, enable_checkpointing=True, callbacks=[keep])
        made.fit(model, loader())
        whole = result(made, model)
        checkpoint = f"{folder}/step={at}.ckpt"

        second = module(optimizer, by_step=True)
        made = trainer(folder, steps, spec, accumulate_grad_batches=1)
        made.fit(second, loader(), ckpt_path=checkpoint)
        pieced = result(made, second)

        dist.barrier()
        Path(f"{checkpoint}.commpress-rank{dist.get_rank()}").unlink()
        dist.barrier()
        third = module(optimizer, by_step=True)
        made = trainer(folder, steps, spec, accumulate_grad_batches=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.fit(third, loader(), ckpt_path=checkpoint)
        said = [str(w.message) for w in caught if "commpress" in str(w.message)]

        last = trainer(folder, steps + 1, spec, accumulate_grad_batches=1)  # a link to the last one
        last.fit(module(optimizer, by_step=True), loader(), ckpt_path=f"{folder}/last.ckpt")
        return whole, pieced, {**result(made, third), "said": said, "linked": last.strategy.session.report().steps}


RECIPE = {
    "prune": [{"start": 1, "end": 3, "every": 1, "amount": 0.6}],
    "quantize": [{"start": 3, "activations": "static"}],
    "distil": {"weight": 0.5},
}


def by_recipe(folder: str, at: int, steps: int) -> list[dict[str, Any]]:
    """A training by a recipe, unbroken by the spec of its [traffic], and from its checkpoint by the same in the line."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from commpress.hooks.lightning import CompressedDDP
    from commpress.model import Recipe

    class Taught(type(module())):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return self.network(x)

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = data(self.global_step, dist.get_rank())
            output = self.network(x)
            loss = nn.functional.cross_entropy(output, y)
            return self.trainer.strategy.scheduler.loss(loss, output, x)

    found = []
    for resumed in (False, True):
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=at, save_top_k=-1)
        settings = {"enable_checkpointing": not resumed, "callbacks": [] if resumed else [keep]}
        its = {"export": {"formats": ("safetensors",)}, "traffic": {"spec": "int4"}}
        chosen = Recipe.of(RECIPE | its, "the recipe of a test")
        example = (data(0, 0)[0],)
        spec = "int4" if resumed else None
        strategy = CompressedDDP(spec, recipe=chosen, teacher=network(), example_inputs=example)
        made, model = trainer(folder, steps, None, strategy=strategy, accumulate_grad_batches=1, **settings), Taught()
        with launched():
            made.fit(model, loader(), ckpt_path=f"{folder}/step={at}.ckpt" if resumed else None)
        zeros = [float((m.weight == 0).float().mean()) for m in model.network if isinstance(m, nn.Linear)]
        ranges = torch.stack([x for name, x in model.named_buffers() if name.endswith("range")])
        more = {"phase": strategy.scheduler.phase, "zeros": sum(zeros) / len(zeros), "ranges": ranges}
        found.append({"parameters": flat(model.parameters()), "done": strategy.scheduler.done, **more})
    return found


def fitted_and_tested(folder: str) -> dict[str, Any]:
    """Two fits by one strategy, and a test of the first one's checkpoint by that one, and by a fresh one."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from commpress.hooks.lightning import CompressedDDP
    from commpress.model import Recipe

    class Tested(type(module())):  # type: ignore[misc]
        def test_step(self, batch: Any, index: int) -> None:
            self.log("mean", self.network(data(index, 0)[0]).square().mean(), sync_dist=True)

    chosen = {"prune": [{"start": 2, "amount": 0.6}], "quantize": [{"start": 2, "bits": 4}]}
    found: dict[str, Any] = {}
    with launched():
        first = CompressedDDP("int4", recipe=Recipe.of(chosen))
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        settings = {"accumulate_grad_batches": 1, "limit_test_batches": 2, "enable_checkpointing": True}
        made, model = trainer(folder, 4, None, strategy=first, callbacks=[keep], **settings), Tested()
        made.fit(model, loader())
        found["tested"] = made.test(model, loader(), verbose=False)
        found["tested again"] = made.test(model, loader(), verbose=False, ckpt_path=f"{folder}/step=4.ckpt")
        made.fit_loop.epoch_loop.max_steps = 5
        made.fit(model, loader())
        found["goes on"] = (first.scheduler.done, first.scheduler.phase)
        fresh = trainer(folder, 4, None, strategy=CompressedDDP("int4", recipe=Recipe.of(chosen)), **settings)
        found["tested afresh"] = fresh.test(Tested(), loader(), verbose=False, ckpt_path=f"{folder}/step=4.ckpt")
    return found


def removed(folder: str) -> list[str]:
    """What stands in the folder when all but the best checkpoint were removed, and weights alone were saved."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    with launched():
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2)
        made = trainer(folder, 6, "int4", enable_checkpointing=True, callbacks=[keep])
        made.fit(module(), loader())
        made.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
        dist.barrier()
        return sorted(path.name for path in Path(folder).iterdir())


def spoilt(folder: str) -> dict[str, str]:
    with launched():
        made = trainer(folder, 2, "int4")
        made.fit(module(), loader())
        made.save_checkpoint(f"{folder}/a.ckpt")
        own = f"{folder}/a.ckpt.commpress-rank{dist.get_rank()}"
        state = unpack_state(torch.load(own, weights_only=True)["commpress"], own)
        said = {}
        for name, spoil in (
            ("step", lambda: torch.save({"commpress": pack_state({**state, "step": 99})}, own)),
            ("a bit", lambda: flip(own)),
            ("all", lambda: Path(own).write_bytes(b"nothing")),
        ):
            if dist.get_rank() == 1:
                spoil()
            dist.barrier()
            model, made = module(), trainer(folder, 4, "int4")
            said[name] = outcome(lambda m=model, t=made: t.fit(m, loader(), ckpt_path=f"{folder}/a.ckpt"))
            dist.barrier()
        return said


def flip(path: str) -> None:
    """A bit of a tensor in the file of an unspoilt checkpoint."""
    state = torch.load(path, weights_only=True)
    state["commpress"] = pack_state({"step": 4, "session": {"world_size": 2}})
    state["commpress"][100] ^= 1
    torch.save(state, path)


def refusals(folder: str) -> dict[str, str]:
    from commpress.hooks.ddp import CommState, comm_hook
    from commpress.hooks.lightning import CompressedDDP
    from commpress.model import Recipe

    with launched():
        fits = {
            "clipped": (trainer(folder, 2, "sign", gradient_clip_val=0.5), module("one bit")),
            "two optimizers": (trainer(folder, 2, "sign", accumulate_grad_batches=1), module("one bit", 2)),
            "spec": (trainer(folder, 2, "int3"), module()),
            "ranks differ": (trainer(folder, 2, ("int4", "int8")[dist.get_rank()]), module()),
        }
        said = {case: outcome(lambda t=t, m=m: t.fit(m, loader())) for case, (t, m) in fits.items()}
        its = Recipe.of({"traffic": {"spec": "int8"}})
        said["differs"] = outcome(lambda: CompressedDDP("int4", recipe=its))
        said["hook"] = outcome(lambda: CompressedDDP("int4", ddp_comm_hook=comm_hook, ddp_comm_state=CommState("int4")))
    return said


def twice(folder: str) -> tuple[Any, ...]:
    """fit, validate and fit again: each fit wraps the model anew, and has a session of its own."""
    with launched():
        made, model = trainer(folder, 2, "int4"), module()
        made.fit(model, loader())
        first = made.strategy.session
        model.validation_step = model.training_step
        made.validate(model, loader(), verbose=False)
        made.fit_loop.epoch_loop.max_steps = 5
        made.fit(model, loader())
        return first is made.strategy.session, first.report().steps, made.strategy.session.report().steps


def silent_on_cpu(folder: str) -> int:
    """Steps that a hook given to Lightning's own DDPStrategy has seen on CPU."""
    from lightning.pytorch.strategies import DDPStrategy

    from commpress.hooks.ddp import CommState, comm_hook

    with launched():
        state = CommState("int4")
        made = trainer(folder, 2, None)
        made.strategy._ddp_comm_state, made.strategy._ddp_comm_hook = state, comm_hook
        assert isinstance(made.strategy, DDPStrategy)
        made.fit(module(), loader())
        return 0 if state.session is None else state.session.report().steps


def with_buffers(folder: str) -> tuple[int, dict[str, int]]:
    """The steps of a model with batch norm, and what DDP's buffers took."""
    from commpress.hooks.lightning import CompressedDDP

    with launched():
        model, made = module(), trainer(folder, 3, None, strategy=CompressedDDP("int4", buffers="bf16"))
        model.network = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
        made.fit(model, loader())
        report = made.strategy.session.report()
        return report.steps, report.roles["buffers"]


def alone(folder: str) -> tuple[int, int]:
    with launched():
        made = trainer(folder, 2, "int4")
        made.fit(module(), loader())
        report = made.strategy.session.report()
        return report.steps, report.sent_bytes


def follow_the_page(folder: str) -> dict[str, Any]:
    """Run the blocks of the page, one after another, and say what they leave."""
    with launched():
        names: dict[str, Any] = {"model": module(), "dataset": examples(64), "folder": folder, "network": network()}
        for block in blocks("Lightning"):
            exec(compile(block, "docs/trainers.md", "exec"), names)
        report = names["strategy"].session.report().to_dict()
        return {"report": report, "parameters": flat(names["model"].parameters())}


def with_a_logger(folder: str) -> tuple[dict[str, Any], list[str]]:
    from lightning.pytorch.loggers import TensorBoardLogger

    with launched(), contextlib.redirect_stderr(io.StringIO()) as out:
        logging.getLogger("lightning.pytorch").addHandler(handler := logging.StreamHandler(out))
        made, model = trainer(folder, 4, "int4", logger=TensorBoardLogger(folder), log_every_n_steps=2), module()
        made.fit(model, loader())
        logging.getLogger("lightning.pytorch").removeHandler(handler)
        return result(made, model)["report"], out.getvalue().splitlines()


def test_loggers_get_the_session_s_numbers_and_the_last_line_says_what_was_sent(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (report, said), (_, silence) = run(2, with_a_logger, str(tmp_path), timeout=120)
    found = tracked(tmp_path)
    require_sums(found, report, every=2)
    assert set(found["commpress/ratio"]) == {1, 3}  # as Lightning counts the steps of what a module logs
    assert said[-1].startswith("commpress int4: sent ")
    assert not [line for line in silence if line.startswith("commpress ")]


@pytest.mark.slow
def test_a_training_sends_what_the_spec_says_and_learns_as_without(tmp_path: Path) -> None:
    steps = 24
    plain = run(2, trained, str(tmp_path), steps, None, timeout=120)
    ours = run(2, trained, str(tmp_path), steps, "int4", timeout=120)
    for one, other in (plain, ours):
        assert torch.equal(one["parameters"], other["parameters"])
    for dense, coded in zip(plain, ours, strict=True):
        end, start, without = (sum(x) / 8 for x in (coded["losses"][-8:], coded["losses"][:8], dense["losses"][-8:]))
        assert end < 0.7 * start
        assert end == pytest.approx(without, rel=0.05)
        assert not torch.equal(dense["parameters"], coded["parameters"])
        report = coded["report"]
        assert report["steps"] == steps  # two backwards each
        assert report["sent_bytes"] == payload_bytes(report, "int4")
        assert {row["reason"] for row in report["rows"]} == {""}


@pytest.mark.slow
def test_a_loss_scaler_is_followed(tmp_path: Path) -> None:
    one, other = run(2, trained, str(tmp_path), 24, "int4", True, timeout=120)
    assert torch.equal(one["parameters"], other["parameters"])
    assert sum(one["losses"][-8:]) < 0.8 * sum(one["losses"][:8])


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "optimizer"), [("int4", "adamw"), ("sign", "one bit"), ("sign", "zero one")])
def test_ckpt_path_goes_on_as_unbroken(spec: str, optimizer: str, tmp_path: Path) -> None:
    ranks = run(2, interrupted, str(tmp_path), 4, 8, spec, optimizer, timeout=120)
    for rank, (whole, pieced, without) in enumerate(ranks):
        assert torch.equal(whole["parameters"], pieced["parameters"])
        assert whole["losses"][4:] == pieced["losses"]
        assert not torch.equal(whole["parameters"], without["parameters"])
        assert len(without["said"]) == (rank == 0)
        assert without["linked"] == 1


@pytest.mark.slow
def test_a_recipe_prunes_quantises_and_distils_and_goes_on_as_unbroken(tmp_path: Path) -> None:
    ranks = run(2, by_recipe, str(tmp_path), 4, 8, timeout=120)
    for whole, pieced in ranks:
        assert whole["phase"] == "pruned + int8 + distil"
        assert (whole["done"], pieced["done"]) == (8, 8)
        assert whole["zeros"] > 0.4
        for name in ("parameters", "ranges"):
            assert torch.equal(whole[name], pieced[name])
            assert torch.equal(whole[name], ranks[0][0][name])
    assert {each.name for each in (tmp_path / "exported").iterdir()} == {"model.safetensors", "export.json"}


@pytest.mark.slow
def test_a_second_fit_goes_on_with_the_recipe_and_a_checkpoint_is_tested_as_it_was_trained(tmp_path: Path) -> None:
    for found in run(2, fitted_and_tested, str(tmp_path), timeout=120):
        assert found["tested"] == found["tested again"] == found["tested afresh"]
        assert found["goes on"] == (5, "pruned + int4")


@pytest.mark.slow
def test_files_go_with_their_checkpoint(tmp_path: Path) -> None:
    for names in run(2, removed, str(tmp_path / "kept"), timeout=120):
        assert names == ["step=6.ckpt", "step=6.ckpt.commpress-rank0", "step=6.ckpt.commpress-rank1", "weights.ckpt"]
    for said in run(2, spoilt, str(tmp_path), timeout=120):
        assert "rank 1's file for commpress is of step 99, the checkpoint of step 2" in said["step"]
        assert "a.ckpt.commpress-rank1: damaged, its checksum is" in said["a bit"]
        assert "a.ckpt.commpress-rank1: damaged: " in said["all"]


def test_settings_reach_the_hook(tmp_path: Path) -> None:
    for steps, buffers in run(2, with_buffers, str(tmp_path), timeout=120):
        assert steps == 3
        assert buffers["sent_bytes"] + buffers["received_bytes"] > 0


def test_without_a_spec_one_is_found(tmp_path: Path) -> None:
    assert run(2, without_a_spec, str(tmp_path), timeout=120) == [("auto: none, still looking", True)] * 2


def test_each_fit_has_its_session(tmp_path: Path) -> None:
    for same, first, second in run(2, twice, str(tmp_path), timeout=120):
        assert (same, first, second) == (False, 2, 3)


def test_what_cannot_be_attached_says_why_on_all_ranks(tmp_path: Path) -> None:
    for said in run(2, refusals, str(tmp_path), timeout=120):
        assert "gradient_clip_val=0.5 would clip the update of OneBitAdamW" in said["clipped"]
        assert "2 optimizers: OneBitAdamW must be the only one" in said["two optimizers"]
        assert "unknown" in said["spec"]
        assert "rank 1 has spec 'int8', rank 0 has 'int4'" in said["ranks differ"]
        assert said["hook"].endswith("got ddp_comm_hook, ddp_comm_state")
        assert "CompressedDDP(gradients): got 'int4', the recipe has traffic.spec 'int8'" in said["differs"]
        assert all(text.startswith("ValueError: ") for text in said.values())


def test_one_process_and_lightning_s_own_hook_on_cpu(tmp_path: Path) -> None:
    assert run(1, alone, str(tmp_path), timeout=120) == [(2, 0)]
    assert run(2, silent_on_cpu, str(tmp_path), timeout=120) == [0, 0]  # why the page says to take CompressedDDP


def test_the_page(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")  # its budget is of model.onnx
    one, other = run(2, follow_the_page, str(tmp_path), timeout=600)
    assert one["report"]["sent_bytes"] > 0
    assert torch.equal(one["parameters"], other["parameters"])
