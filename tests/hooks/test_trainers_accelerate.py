"""Accelerate's own loop on two ranks: accumulation, clipping, mixed precision, save_state and load_state."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import nn
from torch.utils.data import DataLoader
from trainers import MICRO, OPTIMIZERS, blocks, examples, flat, launched, payload_bytes
from training import SMALL_BUCKETS, batch, network

import commpress
from commpress.files import load_state, save_state

LIBRARIES = ("accelerate",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")


class Run:
    """A training by Accelerate as its users write it."""

    def __init__(self, spec: str | None, optimizer: str = "adamw", accumulate: int = 2, **settings: Any) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        from commpress.hooks.accelerate import attach

        cap = 25 if "dynamo_backend" in settings else SMALL_BUCKETS  # torch.compile takes no bucket below 1 MB
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=cap)],
            **{k: v for k, v in settings.items() if k != "scaler"},
        )
        if settings.get("scaler"):  # as fp16 has one on a GPU
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        model = network()
        plain = OPTIMIZERS[optimizer](model.parameters())
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model,
            plain,
            DataLoader(examples(MICRO * 128), batch_size=MICRO),
            torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 0.99**step),
        )
        self.session = None
        if spec is not None:
            given = None if optimizer == "adamw" else self.optimizer
            self.session = attach(self.accelerator, self.model, spec, optimizer=given)
        self.losses: list[float] = []
        self.micro = 0

    def train(self, steps: int) -> "Run":
        """Optimizer steps, from where it is."""
        micro = steps * self.accelerator.gradient_accumulation_steps
        loader = self.accelerator.skip_first_batches(self.loader, self.micro)
        for _, (x, y) in zip(range(micro), loader, strict=False):
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.cross_entropy(self.model(x), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and getattr(self.optimizer.optimizer, "takes_means", True):
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.losses.append(float(self.accelerator.reduce(loss.detach(), "mean")))
        self.micro += micro
        return self

    def result(self) -> dict[str, Any]:
        report = None if self.session is None else self.session.report().to_dict()
        return {"losses": self.losses, "parameters": flat(self.model.parameters()), "report": report}


def trained(spec: str | None, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    with launched():
        return Run(spec, **settings).train(steps).result()


def interrupted(spec: str, optimizer: str, folder: str, at: int, steps: int) -> tuple[dict[str, Any], ...]:
    """Unbroken; by other objects from a checkpoint on; the same without the session's part of it."""
    with launched():
        whole = Run(spec, optimizer).train(steps).result()
        first = Run(spec, optimizer).train(at)
        first.accelerator.save_state(folder)
        first.train(1)  # what happens afterwards must not reach the files
        first.accelerator.wait_for_everyone()
        second = Run(spec, optimizer)
        second.accelerator.load_state(folder)
        second.micro = first.micro - 2

        without = f"{folder}-{dist.get_rank()}"
        shutil.copytree(folder, without, ignore=shutil.ignore_patterns("custom_checkpoint*"))
        third = Run(None, optimizer)
        behind = None if optimizer == "adamw" else third.optimizer.optimizer
        third.session = commpress.attach(third.model, spec, optimizer=behind)
        third.accelerator.load_state(without)
        third.micro = second.micro
        return whole, second.train(steps - at).result(), third.train(steps - at).result()


def two_models(folder: str) -> tuple[Any, Any]:
    """One accelerator, two sessions: what each loads is what each saved."""
    from commpress.hooks.accelerate import attach

    def prepare() -> tuple[Any, list[Any], list[commpress.Session]]:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        models = [accelerator.prepare(network(seed)) for seed in (1, 2)]
        return accelerator, models, [attach(accelerator, model, "int4") for model in models]

    with launched():
        accelerator, models, sessions = prepare()
        for seed, model in enumerate(models):
            for step in range(2):
                model(torch.full((4, 32), seed + step + dist.get_rank() + 0.5)).square().sum().backward()
        accelerator.save_state(folder)
        accelerator.wait_for_everyone()
        saved = [session.state_dict() for session in sessions]
        accelerator, models, sessions = prepare()
        accelerator.load_state(folder)
        return saved, [session.state_dict() for session in sessions]


def without_a_spec() -> tuple[str, str]:
    from accelerate import Accelerator

    from commpress.hooks.accelerate import attach

    with launched():
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(network())
        session = attach(accelerator, model)
        accelerator.backward(model(torch.ones(4, 32)).square().sum())
        return session.report().spec, session.explain()


def resumed_by_others(folder: str) -> dict[str, Any]:
    """Ranks of another number than those that saved."""
    with launched():
        again = Run("int4")
        again.accelerator.load_state(folder)
        return again.train(2).result()


def spoilt(folder: str) -> dict[str, str]:
    """What load_state says to files that are not those of this checkpoint."""
    said = {}
    with launched():
        own = Path(folder) / f"commpress-rank{dist.get_rank()}.pt"
        runs = [Run("int4") for _ in range(3)] + [Run("int8")]
        files = []
        for _ in range(2):  # two saves at one step, as at the ends of two epochs
            runs[0].accelerator.save_state(folder)
            runs[0].accelerator.wait_for_everyone()
            files.append(load_state(own))
        if dist.get_rank() == 1:
            damaged = bytearray(own.read_bytes())
            damaged[len(damaged) // 2] ^= 1
            own.write_bytes(damaged)
        dist.barrier()
        said["a bit"] = outcome(lambda: runs[0].accelerator.load_state(folder))
        if dist.get_rank() == 1:
            save_state(own, files[0])
        dist.barrier()
        said["another save"] = outcome(lambda: runs[0].accelerator.load_state(folder))
        if dist.get_rank() == 1:
            own.unlink()
        dist.barrier()
        said["one is missing"] = outcome(lambda: runs[1].accelerator.load_state(folder))
        if dist.get_rank() == 0:
            own.unlink()
        dist.barrier()
        said["all are missing"] = outcome(lambda: runs[2].accelerator.load_state(folder))
        save_state(own, files[1])
        dist.barrier()
        said["another spec"] = outcome(lambda: runs[3].accelerator.load_state(folder))
    return said


def with_buffers() -> tuple[dict[str, int], torch.Tensor, torch.Tensor]:
    """What DDP's buffers took, and a running mean before they are brought together and behind it."""
    from accelerate import Accelerator

    from commpress.hooks.accelerate import attach

    with launched():
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)))
        session = attach(accelerator, model, "int4", buffers="bf16")
        for step in range(3):
            model(batch(step, dist.get_rank())[0]).square().mean().backward()
        drifted = model.module[1].running_mean.clone()
        model(batch(0, 0)[0])  # its start brings the buffers together, then all move alike
        return session.report().roles["buffers"], drifted, model.module[1].running_mean.clone()


def refusals() -> dict[str, str]:
    """What attach says to what it cannot take."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard

    from commpress.hooks.accelerate import attach

    with launched():
        accelerator = Accelerator(cpu=True)
        sharded = fully_shard(network())
        model = accelerator.prepare(network())
        adam = accelerator.prepare(torch.optim.AdamW(model.parameters()))
        said = {
            "sharded": outcome(lambda: attach(accelerator, sharded, "int4")),
            "spec": outcome(lambda: attach(accelerator, model, "int3")),
            "optimizer": outcome(lambda: attach(accelerator, model, "sign", optimizer=adam)),
            "ranks differ": outcome(lambda: attach(accelerator, model, ("int4", "int8")[dist.get_rank()])),
            "once": outcome(lambda: attach(accelerator, model, "int4")),
            "twice": outcome(lambda: attach(accelerator, model, "int4")),
        }
    return said


def alone() -> tuple[str, str]:
    """One process without a launcher, and one by torchrun."""
    from accelerate import Accelerator
    from trainers import forget

    from commpress.hooks.accelerate import attach

    forget()
    accelerator = Accelerator(cpu=True)
    said = outcome(lambda: attach(accelerator, accelerator.prepare(network()), "int4"))
    forget()
    with launched():
        report = Run("int4", accumulate=1).train(2).result()["report"]
    return said, f"{report['steps']} steps, {report['sent_bytes']} bytes by {report['world_size']}"


def follow_the_page(folder: str) -> dict[str, Any]:
    """Run the blocks of the page, one after another, and say what they leave."""
    with launched():
        names: dict[str, Any] = {
            "model": network(),
            "dataset": examples(64),
            "folder": folder,
        }
        for block in blocks("Accelerate"):
            exec(compile(block, "docs/trainers.md", "exec"), names)
        return {"report": names["session"].report().to_dict(), "parameters": flat(names["model"].parameters())}


@pytest.mark.slow
def test_a_training_sends_what_the_spec_says_and_learns_as_without() -> None:
    steps = 24
    plain = run(2, trained, None, steps, {}, timeout=120)
    ours = run(2, trained, "int4", steps, {}, timeout=120)
    for one, other in (plain, ours):
        assert torch.equal(one["parameters"], other["parameters"])
    for dense, coded in zip(plain, ours, strict=True):
        assert sum(coded["losses"][-4:]) < 0.7 * sum(coded["losses"][:4])
        assert coded["losses"][-1] == pytest.approx(dense["losses"][-1], rel=0.05)
        assert not torch.equal(dense["parameters"], coded["parameters"])
        report = coded["report"]
        assert report["steps"] == steps  # two backwards each
        assert report["sent_bytes"] == payload_bytes(report, "int4")
        assert {row["reason"] for row in report["rows"]} == {""}


@pytest.mark.parametrize(("spec", "optimizer"), [("int4", "adamw"), slow("sign", "one bit"), slow("sign", "zero one")])
def test_load_state_goes_on_as_unbroken(spec: str, optimizer: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    for whole, pieced, without in run(2, interrupted, spec, optimizer, folder, 4, 8, timeout=120):
        assert torch.equal(whole["parameters"], pieced["parameters"])
        assert whole["losses"][-8:] == pieced["losses"]
        assert not torch.equal(whole["parameters"], without["parameters"])


def test_other_ranks_resume_and_strange_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    run(2, interrupted, "int4", "adamw", str(folder), 3, 4, timeout=120)
    assert {path.name for path in folder.glob("commpress-*")} == {"commpress-rank0.pt", "commpress-rank1.pt"}
    first, *rest = run(3, resumed_by_others, str(folder), timeout=120)
    assert all(torch.equal(first["parameters"], other["parameters"]) for other in rest)
    for said in run(2, spoilt, str(folder), timeout=120):
        assert "rank 1's file for commpress is of step" in said["another save"]
        assert "no file of rank 1" in said["one is missing"]
        assert "no commpress-rank*.pt in" in said["all are missing"]
        assert "'int4'" in said["another spec"]
        assert "'int8'" in said["another spec"]
        assert "commpress-rank1.pt: damaged, its checksum is" in said["a bit"]
        assert all(text.split(":")[0] in ("ValueError", "DamagedFileError") for text in said.values())


def test_each_of_two_models_has_its_own_files(tmp_path: Path) -> None:
    for saved, loaded in run(2, two_models, str(tmp_path), timeout=120):
        for one, other in zip(saved, loaded, strict=True):
            for a, b in zip(one["memories"][0], other["memories"][0], strict=True):
                assert torch.equal(a["residual"], b["residual"])
        assert not torch.equal(saved[0]["memories"][0][0]["residual"], saved[1]["memories"][0][0]["residual"])


@pytest.mark.parametrize(
    "settings", [{"mixed_precision": "bf16"}, {"scaler": True}, slow({"dynamo_backend": "AOT_EAGER"})]
)
def test_mixed_precision_and_compiled(settings: dict[str, Any]) -> None:
    one, other = run(2, trained, "int4", 24, settings, timeout=120)
    assert torch.equal(one["parameters"], other["parameters"])
    assert sum(one["losses"][-4:]) < 0.8 * sum(one["losses"][:4])


def test_settings_reach_the_hook() -> None:
    ranks = run(2, with_buffers, timeout=120)
    assert all(buffers["sent_bytes"] + buffers["received_bytes"] > 0 for buffers, _, _ in ranks)
    (_, one, ours), (_, other, theirs) = ranks
    assert float((one - other).norm()) > 0.1 * float(one.norm())
    assert float((ours - theirs).norm()) < 0.01 * float(ours.norm())  # by the rounding of bf16


def test_without_a_spec_one_is_found() -> None:
    for spec, explained in run(2, without_a_spec, timeout=120):
        assert spec == "auto: none, still looking"
        assert explained == "after 0 steps the choice is still open"  # the first step has not ended


def test_what_cannot_be_attached_says_why_on_all_ranks() -> None:
    for said in run(2, refusals, timeout=120):
        assert said["sharded"].startswith("TypeError: commpress: expected the DistributedDataParallel")
        assert "FSDPSequential" in said["sharded"]
        assert "unknown" in said["spec"]
        assert "expected one of commpress.optim, got AdamW" in said["optimizer"]
        assert "rank 1 has spec 'int8', rank 0 has 'int4'" in said["ranks differ"]
        assert said["once"] == ""
        assert said["twice"].startswith("RuntimeError: ")


def test_one_process() -> None:
    ((said, report),) = run(1, alone, timeout=120)
    assert "got Sequential. Accelerate sees one process: start it by accelerate launch or torchrun" in said
    assert report == "2 steps, 0 bytes by 1"


def test_the_page(tmp_path: Path) -> None:
    one, other = run(2, follow_the_page, str(tmp_path), timeout=120)
    assert one["report"]["sent_bytes"] > 0
    assert torch.equal(one["parameters"], other["parameters"])
