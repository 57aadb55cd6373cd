"""The DDP hook in real training: what DDP promises without a hook holds with one, whatever DDP is told to do."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow, slowly
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    CLASSES,
    INPUTS,
    SMALL_BUCKETS,
    WIDTH,
    Trained,
    batch,
    finite,
    gradients_of,
    loss_of,
    network,
    parameters_of,
    same,
    same_training,
    sgd,
    train,
)

import commpress
from commpress.hooks.ddp import CommState, comm_hook

STEPS = 4
COMPRESSED = ("int4", "sign", "topk(0.01)|int4", "powersgd(2)")


# --- models that DDP treats in its own ways ----------------------------------------------------------------------


class Branches(nn.Module):
    """Two branches of which a step takes one or both."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.trunk = nn.Linear(INPUTS, WIDTH)
            self.left, self.right = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)
            self.never = nn.Linear(WIDTH, CLASSES)
        self.taken = "both"

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x).tanh()
        out = torch.zeros(())
        if self.taken != "right":
            out = out + self.left(h)
        if self.taken != "left":
            out = out + self.right(h)
        return out


class MixedDtypes(nn.Module):
    """Layers in float32, float64 and bfloat16: DDP makes buckets of one dtype."""

    def __init__(self) -> None:
        super().__init__()
        single = network(2)
        self.first = single[0]
        self.second = nn.Linear(WIDTH, WIDTH).double()
        self.third = nn.Linear(WIDTH, WIDTH).bfloat16()
        self.last = single[4]
        with torch.no_grad():
            for layer in (self.second, self.third):
                layer.weight.copy_(single[2].weight)
                layer.bias.copy_(single[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh().double()).tanh()
        h = self.third(h.bfloat16()).tanh().float()
        return self.last(h)


def frozen() -> nn.Module:
    """A network whose middle layer is not trained."""
    model = network()
    model[2].requires_grad_(False)
    return model


def taken_by_one_rank(model: nn.Module, step: int) -> Tensor:
    """Rank 1 does not use the left branch, nor anyone the layer that is never used."""
    model.module.taken = "right" if dist.get_rank() == 1 and step % 2 == 0 else "both"  # type: ignore[union-attr]
    return loss_of(model, step)


def taken_by_all(model: nn.Module, step: int) -> Tensor:
    """All ranks use one branch and then the other."""
    model.module.taken = ("left", "right", "both")[step % 3]  # type: ignore[union-attr]
    return loss_of(model, step)


def wide() -> nn.Module:
    """A network of 3 MB: torch.compile splits it at DDP's buckets, and takes no bucket below 1 MB."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = [nn.Linear(INPUTS, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(600, CLASSES))


Variant = dict[str, Any]
VARIANTS: dict[str, Variant] = {
    "as it comes": {},
    "several buckets": {"ddp": {"bucket_cap_mb": SMALL_BUCKETS}},
    "gradients are views": {"ddp": {"bucket_cap_mb": SMALL_BUCKETS, "gradient_as_bucket_view": True}},
    "unused on one rank": {"ddp": {"find_unused_parameters": True}, "model": Branches, "loss": taken_by_one_rank},
    "unused on all ranks": {"ddp": {"find_unused_parameters": True}, "model": Branches, "loss": taken_by_all},
    "unused, several buckets": {
        "ddp": {"find_unused_parameters": True, "bucket_cap_mb": SMALL_BUCKETS},
        "model": Branches,
        "loss": taken_by_one_rank,
    },
    "static graph": {"ddp": {"static_graph": True, "bucket_cap_mb": SMALL_BUCKETS}},
    "frozen": {"ddp": {"bucket_cap_mb": SMALL_BUCKETS}, "model": frozen},
    "mixed dtypes": {"ddp": {"bucket_cap_mb": SMALL_BUCKETS}, "model": MixedDtypes},
    "accumulated": {"ddp": {"bucket_cap_mb": SMALL_BUCKETS}, "accumulate": 3},
    "accumulated in views": {
        "ddp": {"bucket_cap_mb": SMALL_BUCKETS, "gradient_as_bucket_view": True},
        "accumulate": 2,
    },
    "compiled inside": {"inside": True},
    "compiled outside": {"outside": True},
    "compiled outside, several buckets": {"ddp": {"bucket_cap_mb": 1}, "model": wide, "outside": True, "steps": 3},
}


def trained_as(variant: Variant, spec: str | None, steps: int = STEPS) -> Trained:
    """Train one variant; `spec` None is DDP without a hook. `extra` is the report as a dict."""
    steps = variant.get("steps", steps)
    torch.compiler.reset()
    model: nn.Module = variant.get("model", network)()
    if variant.get("inside"):
        model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    ddp: Any = DistributedDataParallel(model, **variant.get("ddp", {}))
    session = None if spec is None else commpress.attach(ddp, spec)
    stepped = torch.compile(ddp, backend="aot_eager") if variant.get("outside") else ddp
    loss: Callable[[nn.Module, int], Tensor] = variant.get("loss", loss_of)
    trained = train(stepped, range(steps), loss=loss, accumulate=variant.get("accumulate", 1), optimizer=sgd(ddp))
    trained.extra = None if session is None else session.report().to_dict()
    return trained


# --- what the ranks do -------------------------------------------------------------------------------------------


def variant_trainings(name: str) -> list[Trained]:
    """Without a hook, with `none`, and with each lossy spec; with one where each training is compiled anew."""
    lossy = COMPRESSED[:1] if "compiled" in name else COMPRESSED
    return [trained_as(VARIANTS[name], spec) for spec in (None, "none", *lossy)]


def plain_and(spec: str, repeats: int) -> list[Trained]:
    """Without a hook and `repeats` times with it, in several buckets."""
    variant = VARIANTS["several buckets"]
    return [trained_as(variant, None), *(trained_as(variant, spec) for _ in range(repeats))]


def both_ways(spec: str) -> tuple[Trained, Trained, bool]:
    """Attached, and registered as PyTorch's own convention has it; whether the state has its session afterwards."""
    attached = trained_as(VARIANTS["several buckets"], spec)
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    state = CommState(spec)
    ddp.register_comm_hook(state, comm_hook)
    return attached, train(ddp, range(STEPS)), state.session is not None and state.session.report().sent_bytes > 0


def in_a_subgroup(spec: str | None) -> Trained | None:
    """Ranks 0 and 2 of three train together, rank 1 does not."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    ddp = DistributedDataParallel(network(), process_group=group, bucket_cap_mb=SMALL_BUCKETS)
    if spec is not None:
        commpress.attach(ddp, spec)
    return train(ddp, range(STEPS))


def registered_in_a_subgroup(spec: str) -> Trained | None:
    """The same, with the hook registered by hand."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    ddp = DistributedDataParallel(network(), process_group=group, bucket_cap_mb=SMALL_BUCKETS)
    ddp.register_comm_hook(CommState(spec, group), comm_hook)
    return train(ddp, range(STEPS))


def two_modules(specs: tuple[str, str] | None, alternately: bool) -> Trained:
    """Two DDP modules: one behind the other in one backward, or in turn."""
    models = [DistributedDataParallel(m, bucket_cap_mb=SMALL_BUCKETS) for m in (network(3)[:4], network(4)[2:])]
    if alternately:
        models = [DistributedDataParallel(network(s), bucket_cap_mb=SMALL_BUCKETS) for s in (3, 4)]
    for model, spec in zip(models, specs or (), strict=specs is not None):
        commpress.attach(model, spec)
    optimizers = [sgd(model) for model in models]
    trained = Trained([])
    for step in range(STEPS):
        x, y = batch(step, dist.get_rank())
        used = [step % 2] if alternately else [0, 1]
        for i in used:
            optimizers[i].zero_grad()
            x = models[i](x)
        nn.functional.cross_entropy(x, y).backward()
        trained.gradients.append([g for i in used for g in gradients_of(models[i])])
        for i in used:
            optimizers[i].step()
    trained.parameters = [p for model in models for p in parameters_of(model)]
    return trained


def compressed_and_plain_modules(specs: tuple[str, str], alternately: bool) -> tuple[Trained, Trained]:
    """Two modules by these specs, and without hooks."""
    return two_modules(specs, alternately), two_modules(None, alternately)


def compiled_with_inductor(spec: str) -> Trained:
    """torch.compile as users call it."""
    torch.compiler.reset()
    ddp = DistributedDataParallel(network())
    commpress.attach(ddp, spec)
    return train(torch.compile(ddp), range(4), optimizer=sgd(ddp))  # type: ignore[arg-type]


def with_nan(spec: str, bad: float) -> dict[str, Any]:
    """Rank 1's gradient of one weight is NaN or Inf in step 2."""
    ddp = DistributedDataParallel(network())
    session = commpress.attach(ddp, spec)
    place = (5, 7)
    bad_step = 2

    def spoil(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt[place] = bad
        return spoilt

    weights, gradients = [], []
    for step in range(4):
        ddp.zero_grad()
        handle = ddp.module[2].weight.register_hook(spoil) if step == bad_step and session.rank == 1 else None
        loss_of(ddp, step).backward()
        if handle is not None:
            handle.remove()
        gradients.append([g for g in gradients_of(ddp) if g is not None])
        weights.append(ddp.module[2].weight.grad.clone())
    memories = [
        m for bucket in session.state_dict()["memories"][0] for m in (bucket["residual"], bucket["owner_residual"])
    ]
    return {"weights": weights, "gradients": gradients, "memories": memories}


def tiny_parameters(count: int) -> dict[str, Any]:
    """`count` parameters of 20 values each, in buckets of 25 MB."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(nn.Parameter(torch.full((20,), 0.01 * i)) for i in range(count))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([p * x for p in self.parts]).sum()

    ddp = DistributedDataParallel(Many())
    session = commpress.attach(ddp, "int4")
    sizes = []
    for step in range(4):
        before = {(r["bucket"], r["values"]): r["steps"] for r in session.report().to_dict()["rows"]}
        ddp(torch.arange(20.0) + step + dist.get_rank()).backward()
        rows = session.report().to_dict()["rows"]
        sizes.append([r["values"] for r in rows if r["steps"] > before.get((r["bucket"], r["values"]), 0)])
    return {"buckets by step": sizes, "gradients": gradients_of(ddp)}


def reported(spec: str, path: str) -> dict[str, Any]:
    """The report of a short training with a tiny bucket, in all its forms."""
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES), nn.Linear(CLASSES, CLASSES))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0004)
    session = commpress.attach(ddp, spec)
    before = session.report().to_dict()
    train(ddp, range(5))
    report = session.report()
    report.write_json(f"{path}/{report.rank}.json")
    shown = {"text": str(report), "page": session._repr_html_(), "receipt": session.receipt().summary}
    return {"before": before, "dict": report.to_dict(), **shown}


def refusals() -> dict[str, str]:
    """What attach says to what it cannot do, by what was tried."""
    ddp = DistributedDataParallel(network())
    taken = DistributedDataParallel(network())
    commpress.attach(taken, "int4")
    by_hand = DistributedDataParallel(network())
    by_hand.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
    said = {
        "bare module": outcome(lambda: commpress.attach(network(), "int4")),
        "compiled": outcome(lambda: commpress.attach(torch.compile(network(), backend="eager"), "int4")),  # type: ignore[arg-type]
        "twice": outcome(lambda: commpress.attach(taken, "int4")),
        "other hook": outcome(lambda: commpress.attach(by_hand, "int4")),
        "exchange": outcome(lambda: commpress.attach(ddp, "int4", exchange="ring")),
        "all_reduce": outcome(lambda: commpress.attach(ddp, "int4", exchange="all_reduce")),
        "spec": outcome(lambda: commpress.attach(ddp, "int5")),
        "differ": outcome(lambda: commpress.attach(ddp, ("int4", "int8")[dist.get_rank()])),
        "setting": outcome(lambda: commpress.attach(ddp, "int4", no_such_setting=1)),
    }
    # none of these has harmed the model or the group
    session = commpress.attach(ddp, "int4")
    train(ddp, range(2))
    said["afterwards"] = str(session.report().steps)
    return said


# --- the tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    slowly(
        VARIANTS,
        quick=VARIANTS.keys()
        - {
            "unused, several buckets",
            "several buckets",
            "accumulated in views",
            "compiled inside",
            "compiled outside",
            "compiled outside, several buckets",
        },
    ),
)
def test_every_way_of_using_ddp(name: str) -> None:
    ranks = run(2, variant_trainings, name, timeout=120)
    for plain, none, *lossy in ranks:
        assert same_training(plain, none)  # bit for bit as without a hook
        for trained in lossy:
            assert finite(trained.parameters)
            assert not same(trained.parameters, plain.parameters)  # something was compressed
    for place, (one, other) in enumerate(zip(*ranks, strict=True)):
        assert same_training(one, other), f"ranks differ with {(None, 'none', *COMPRESSED)[place]}"
    for trained in ranks[0][2:]:
        assert trained.extra["ratio"] > 2.5
        assert trained.extra["steps"] == VARIANTS[name].get("steps", STEPS)


def test_none_is_plain_ddp_on_three_ranks() -> None:
    for plain, none in run(3, plain_and, "none", 1):
        assert all(same(a, b) for a, b in zip(plain.gradients, none.gradients, strict=False))
    ranks = run(3, variant_trainings, "several buckets")
    for plain, none, *_ in ranks:
        assert same_training(plain, none)


@pytest.mark.parametrize(
    ("spec", "world_size"),
    slowly(
        [(spec, ranks) for spec in COMPRESSED for ranks in (2, 3, 4)],
        quick=[("int4", 2), ("topk(0.01)|int4", 2), ("sign", 3), ("int4", 4), ("powersgd(2)", 3)],
    ),
)
def test_gradients_are_the_same_bits_on_all_ranks_and_in_every_run(spec: str, world_size: int) -> None:
    bound = {"int4": 0.3, "sign": 0.9, "topk(0.01)|int4": 1.0, "powersgd(2)": 0.9}[spec]
    ranks = run(world_size, plain_and, spec, 2)
    plain, first, *_ = ranks[0]
    for rank, (_, *repeats) in enumerate(ranks):
        for trained in repeats:
            assert same_training(trained, first), f"rank {rank}"
    exact, got = (torch.cat([g.view(-1) for g in t.gradients[0] if g is not None]) for t in (plain, first))
    assert 0 < (got - exact).norm() / exact.norm() < bound
    rows = first.extra["rows"]
    assert len([row for row in rows if row["steps"] == 1]) == 1  # DDP starts with one bucket here
    assert len([row for row in rows if row["steps"] == STEPS - 1]) >= 3  # and laid them out anew after the first step


@pytest.mark.parametrize("spec", slowly(["none", *COMPRESSED], quick=("none", "int4")))
def test_attached_or_registered_is_the_same(spec: str) -> None:
    for attached, registered, has_session in run(2, both_ways, spec):
        assert same_training(attached, registered)
        assert has_session


@pytest.mark.parametrize("spec", ["none", "int4", "topk(0.01)|int4"])
def test_a_subgroup_trains_among_its_own_ranks(spec: str) -> None:
    first, outside, second = run(3, in_a_subgroup, spec)
    assert outside is None
    assert same_training(first, second)
    by_hand = run(3, registered_in_a_subgroup, spec)
    assert same_training(first, by_hand[0])
    assert same_training(first, by_hand[2])
    if spec == "none":
        plain = run(3, in_a_subgroup, None)
        assert same_training(first, plain[0])


@pytest.mark.parametrize("alternately", [False, True], ids=["in one backward", "alternately"])
@pytest.mark.parametrize(
    "specs", [("none", "none"), ("int4", "topk(0.1)|int4"), slow(("sign", "none"))], ids=" and ".join
)
def test_two_modules_in_one_process(specs: tuple[str, str], alternately: bool) -> None:
    (one, plain), (other, _) = run(2, compressed_and_plain_modules, specs, alternately)
    assert same_training(one, other)
    assert finite(one.parameters)
    assert same(one.parameters, plain.parameters) == (specs == ("none", "none"))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    one, other = run(2, compiled_with_inductor, "int4", timeout=120)
    assert same_training(one, other)
    assert finite(one.parameters)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "spec", ["none", "bf16", "int8", "int4", "sign", "topk(0.01)", "topk(0.1)|int4", "powersgd(2)"]
)
def test_nan_and_inf_arrive_on_all_ranks_and_do_not_stay(spec: str, bad: float) -> None:
    ranks = run(2, with_nan, spec, bad)
    for got in ranks:
        for step, gradients in enumerate(got["gradients"]):
            assert same(gradients, ranks[0]["gradients"][step])
            if step != 2:
                assert finite(gradients), f"step {step}"
        assert not got["weights"][2][5, 7].isfinite()
        assert finite(got["memories"])
        spoilt = int(sum((~g.isfinite()).sum() for g in got["gradients"][2]))
        if spec in ("none", "bf16", "topk(0.01)"):
            assert spoilt == 1  # there and nowhere else
        elif spec in ("int8", "int4"):
            assert 1 < spoilt <= 256  # its block
        elif spec == "sign":
            assert 1 < spoilt <= 1024
        elif spec == "powersgd(2)":
            assert spoilt == WIDTH * WIDTH  # its matrix


def test_a_thousand_tiny_parameters_travel_in_few_messages() -> None:
    one, other = run(2, tiny_parameters, 1000)
    assert same(one["gradients"], other["gradients"])
    for values in one["buckets by step"]:
        assert sum(values) == 20_000
        assert len(values) <= 2


def test_report_of_a_training(tmp_path: Path) -> None:
    ranks = run(2, reported, "int4", str(tmp_path))
    for rank, got in enumerate(ranks):
        before, report = got["before"], got["dict"]
        assert (before["steps"], before["sent_bytes"], before["rows"]) == (0, 0, [])
        assert (report["spec"], report["rank"], report["world_size"], report["steps"]) == ("int4", rank, 2, 5)
        assert report["dense_bytes"] == sum(row["dense_bytes"] for row in report["rows"])
        assert report["sent_bytes"] == sum(row["sent_bytes"] for row in report["rows"])
        assert report["ratio"] == report["dense_bytes"] / report["sent_bytes"]
        values = INPUTS * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES + CLASSES * CLASSES + CLASSES
        assert report["dense_bytes"] == 5 * 4 * values  # 2 (W - 1) / W is 1 for two ranks
        reasons = {row["reason"] for row in report["rows"]}
        assert reasons == {"", "fewer than 256 values"}
        for row in report["rows"]:
            ratio = row["dense_bytes"] / row["sent_bytes"]
            assert (ratio == 1.0) if row["reason"] else (ratio > 6)
            assert row["seconds"]["wire"] > 0
        assert "int4 by one_shot" in got["text"]
        assert "not compressed: fewer than 256 values" in unwrapped(got["text"])
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == report
        assert got["page"].startswith("<table>\n<caption>commpress int4: rank ")
        assert got["receipt"] in got["page"]


def unwrapped(table: str) -> str:
    """The words of a table, whatever column width they were broken at."""
    return " ".join(table.replace("│", " ").split())


@pytest.mark.parametrize(("spec", "world_size", "reason"), [
    ("none", 2, "spec is none"), ("int4", 1, "one rank: nothing to send"),
])  # fmt: skip
def test_report_says_why_nothing_is_compressed(spec: str, world_size: int, reason: str, tmp_path: Path) -> None:
    for got in run(world_size, reported, spec, str(tmp_path)):
        assert {row["reason"] for row in got["dict"]["rows"]} == {reason}
        assert got["dict"]["ratio"] == 1.0
        assert f"not compressed: {reason}" in unwrapped(got["text"])


def test_refusals_are_sentences_and_harm_nothing() -> None:
    one, other = run(2, refusals)
    assert one == other
    assert one["bare module"].startswith("TypeError: commpress.attach: expected a torch.nn.parallel.Distributed")
    assert "got Sequential; wrap the model first" in one["bare module"]
    assert one["compiled"] == one["bare module"]  # what was compiled is no DDP either
    for case in ("twice", "other hook"):
        assert one[case].startswith("RuntimeError: ")
        assert "hook" in one[case]
    assert "ValueError: rank 0: unknown exchange 'ring', known: all_reduce, two_shot, one_shot" in one["exchange"]
    assert "payloads of int4 cannot be summed" in one["all_reduce"]
    assert "unknown codec 'int5', known: none, bf16" in one["spec"]
    assert one["differ"] == "ValueError: rank 1 has spec 'int8', rank 0 has 'int4': all ranks must use the same spec"
    assert "no_such_setting" in one["setting"]
    assert one["afterwards"] == "2"


# --- loss scaling ------------------------------------------------------------------------------------------------


def scaled(spec: str | None, poisoned: tuple[int, ...], follow: bool = True, growth: int = 3) -> dict[str, Any]:
    """Twelve steps with a GradScaler; in the poisoned ones rank 1's loss is Inf."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth)
    session = None if spec is None else commpress.attach(ddp, spec, grad_scaler=scaler if follow else None)
    optimizer = sgd(ddp)
    scales, moved, losses, memories_finite = [], [], [], []
    for step in range(12):
        optimizer.zero_grad()
        before = parameters_of(ddp)
        loss = loss_of(ddp, step)
        losses.append(float(loss.detach()))
        if step in poisoned and dist.get_rank() == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not same(before, parameters_of(ddp)))
        if session is not None:
            kept = [m for b in session.state_dict()["memories"][0] for m in (b["residual"], b["owner_residual"])]
            memories_finite.append(finite(kept))
    return {
        "scales": scales,
        "moved": moved,
        "losses": losses,
        "memories finite": all(memories_finite),
        "parameters": parameters_of(ddp),
    }


def unscaled(spec: str) -> list[Tensor]:
    """The same twelve steps without a scaler."""
    return trained_as(VARIANTS["several buckets"], spec, 12).parameters


@pytest.mark.parametrize("spec", ["none", "int4", slow("sign"), slow("topk(0.1)|int4")])
def test_a_scaler_skips_the_steps_that_it_skips_without_a_hook(spec: str) -> None:
    poisoned = (0, 4, 5, 9)
    plain = run(2, scaled, None, poisoned)
    ranks = run(2, scaled, spec, poisoned)
    for got in ranks:
        assert got["scales"] == plain[0]["scales"]
        assert got["moved"] == plain[0]["moved"] == [step not in poisoned for step in range(12)]
        assert got["memories finite"]
        assert finite(got["parameters"])
        assert same(got["parameters"], ranks[0]["parameters"])
        assert sum(got["losses"][-3:]) < sum(got["losses"][:3])  # training goes on
    assert len(set(plain[0]["scales"])) >= 3
    if spec == "none":
        assert same(ranks[0]["parameters"], plain[0]["parameters"])


@pytest.mark.parametrize("spec", [slow("int8"), "int4", slow("sign"), slow("topk(0.1)|int4")])
def test_memories_follow_the_scale(spec: str) -> None:
    """Scales are powers of two: a run that follows them has the bits of a run without a scaler."""
    reference = run(2, unscaled, spec)[0]
    for got in run(2, scaled, spec, (), True):
        assert same(got["parameters"], reference)
        assert len(set(got["scales"])) > 3
    for got in run(2, scaled, spec, (), False):
        assert not same(got["parameters"], reference)


def test_deepcopy_of_the_module_inside_is_not_hooked() -> None:
    """Evaluation copies (an average of weights, say) are plain modules."""
    assert run(2, copied) == [True, True]


def copied() -> bool:
    """Train a DDP module, copy what is inside, and run a backward of the copy on one rank only."""
    ddp = DistributedDataParallel(network())
    session = commpress.attach(ddp, "int4")
    train(ddp, range(2))
    if dist.get_rank() == 0:
        loss_of(copy.deepcopy(ddp.module), 0).backward()
    train(ddp, range(2, 4))
    return session.report().steps == 4 and len(list(itertools.chain(ddp.parameters()))) == 6
