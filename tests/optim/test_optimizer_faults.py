"""What is refused, by whom and in which words; and who is advised to take another spec."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, loss_of, network, parameters_of, same, train

import commpress
from commpress.optim import DGC, Growing, OneBitAdamW, ZeroOneAdamW
from commpress.optim.base import CompressedOptimizer

KINDS: dict[str, Callable[..., CompressedOptimizer]] = {
    "OneBitAdamW": OneBitAdamW, "ZeroOneAdamW": ZeroOneAdamW, "DGC": DGC
}  # fmt: skip


def wrapped(model: nn.Module | None = None) -> DistributedDataParallel:
    """A network under DDP."""
    return DistributedDataParallel(model or network(), bucket_cap_mb=SMALL_BUCKETS)


def attachments() -> dict[str, str]:
    """What attach says to optimizers that do not fit, on rank 1 alone where that is said."""
    said = {}
    cases: dict[str, Callable[[DistributedDataParallel], Any]] = {
        "missing": lambda ddp: OneBitAdamW(list(ddp.parameters())[1:]),
        "stranger": lambda ddp: ZeroOneAdamW([*ddp.parameters(), nn.Parameter(torch.zeros(3, 5))]),
        "of another model": lambda ddp: DGC(network().parameters()),
        "torch's": lambda ddp: torch.optim.AdamW(ddp.parameters()),
    }
    for case, make in cases.items():
        ddp = wrapped()
        made = make(ddp)
        said[case] = outcome(lambda d=ddp, o=made: commpress.attach(d, "sign", optimizer=o))
    ddp = wrapped()
    held = list(ddp.parameters())
    chosen = OneBitAdamW(held[:-1] if dist.get_rank() == 1 else held)
    said["missing on rank 1"] = outcome(lambda: commpress.attach(ddp, "sign", optimizer=chosen))
    sparse = DistributedDataParallel(nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)))
    said["sparse"] = outcome(lambda: commpress.attach(sparse, "sign", optimizer=OneBitAdamW(sparse.parameters())))
    frozen = wrapped()
    frozen.module[0].weight.requires_grad_(False)
    said["frozen"] = outcome(
        lambda: commpress.attach(wrapped(frozen.module), "sign", optimizer=DGC(frozen.parameters()))
    )
    return said


def steps_out_of_turn(name: str, scaled: bool) -> dict[str, str]:
    """What a step says that has nothing to apply, and a backward whose predecessor nobody used."""
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    ddp = wrapped()
    optimizer = KINDS[name](ddp.parameters(), warmup_steps=2)
    said = {"not attached": outcome(optimizer.step)}
    commpress.attach(ddp, "sign", optimizer=optimizer, grad_scaler=scaler)
    start = parameters_of(ddp)
    said["before backward"] = outcome(optimizer.step)
    with ddp.no_sync():
        loss_of(ddp, 0).backward()
    said["no_sync"] = outcome(optimizer.step)
    assert same(start, parameters_of(ddp))
    optimizer.zero_grad()
    train(ddp, range(4), optimizer=optimizer)
    said["twice"] = outcome(optimizer.step)
    optimizer.zero_grad()
    loss_of(ddp, 4).backward()
    said["two backwards"] = outcome(lambda: loss_of(ddp, 5).backward())
    return said


def unlike(name: str, key: str, values: tuple[Any, Any]) -> str:
    """What the first backward says on ranks of other settings."""
    ddp = wrapped()
    optimizer = KINDS[name](ddp.parameters(), **{key: values[dist.get_rank()]})
    commpress.attach(ddp, "topk(0.1)", optimizer=optimizer)
    return outcome(lambda: loss_of(ddp, 0).backward())


def other_kinds() -> str:
    """What attach says on ranks of other optimizers."""
    ddp = wrapped()
    optimizer = KINDS["OneBitAdamW" if dist.get_rank() else "ZeroOneAdamW"](ddp.parameters())
    return outcome(lambda: commpress.attach(ddp, "sign", optimizer=optimizer))


def other_checkpoints(name: str, mine: int, seeds: tuple[int, int], steps: tuple[int, int]) -> tuple[str, str]:
    """What backward says when rank 1 has loaded the state of another training, and when all have loaded one."""
    states = []
    for seed, many in zip(seeds, steps, strict=True):
        ddp = wrapped(network(seed))
        optimizer = KINDS[name](ddp.parameters(), warmup_steps=mine)
        commpress.attach(ddp, "sign", optimizer=optimizer)
        train(ddp, range(many), optimizer=optimizer)
        states.append(copy.deepcopy(optimizer.state_dict()))
    said = []
    for state in (states[dist.get_rank()], states[0]):
        ddp = wrapped()
        optimizer = KINDS[name](ddp.parameters(), warmup_steps=mine)
        commpress.attach(ddp, "sign", optimizer=optimizer)
        optimizer.load_state_dict(state)
        said.append(outcome(lambda d=ddp: loss_of(d, 0).backward()))
    return said[0], said[1]


def advised(spec: str, name: str) -> list[str]:
    """The warnings of four steps."""
    ddp = wrapped()
    kind = getattr(torch.optim, name, None) or KINDS[name]
    optimizer = kind(ddp.parameters(), lr=0.001)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(optimizer, CompressedOptimizer):
            commpress.attach(ddp, spec, optimizer=optimizer)
        else:
            commpress.attach(ddp, spec)
        stranger = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
        stranger.step()
        before = len([w for w in caught if "commpress" in str(w.message)])
        train(ddp, range(4), optimizer=optimizer)
    assert before == 0
    return [str(w.message) for w in caught if "commpress" in str(w.message)]


def test_optimizers_that_do_not_fit_are_refused() -> None:
    for rank, said in enumerate(run(2, attachments)):
        assert "parameter '0.weight' is trained, but the optimizer does not hold it" in said["missing"]
        assert said["stranger"] == ""  # as under torch, it may be of another module
        assert "parameter '0.weight' is trained, but the optimizer does not hold it" in said["of another model"]
        assert "expected one of commpress.optim, got AdamW" in said["torch's"]
        assert "parameter '4.bias' is trained" in said["missing on rank 1"]
        assert rank == 1 or "rank 1: parameter" in said["missing on rank 1"]
        assert "0: Embedding(sparse=True) has sparse gradients, expected sparse=False" in said["sparse"]
        assert said["frozen"] == ""
        for case in ("missing", "of another model", "missing on rank 1"):
            assert said[case].startswith("ValueError: "), case


def test_what_is_of_another_type_is_a_type_error() -> None:
    for said in run(2, attachments):
        assert said["torch's"].startswith("TypeError: ")
        assert said["sparse"].startswith("TypeError: ")


@pytest.mark.parametrize("name", KINDS)
def test_steps_out_of_turn(name: str) -> None:
    for said in run(2, steps_out_of_turn, name, False):
        assert said["not attached"] == (
            f"RuntimeError: {name} is not attached: commpress.attach(ddp_model, spec, optimizer=optimizer)"
        )
        assert said["before backward"] == ""
        for case in ("no_sync", "twice"):
            assert f"RuntimeError: {name}.step(): no backward has exchanged gradients since the last step" in said[case]
        assert "two backward passes have exchanged gradients without optimizer.step()" in said["two backwards"]
    for said in run(2, steps_out_of_turn, name, True):  # no skip: the scale is what it was
        assert "two backward passes have exchanged gradients without optimizer.step()" in said["two backwards"]


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("OneBitAdamW", {"lr": -1.0}, "lr -1.0: expected a number in [0, inf)"),
    ("OneBitAdamW", {"betas": (1.0, 0.9)}, "betas[0] 1.0: expected a number in [0, 1)"),
    ("OneBitAdamW", {"betas": (0.9, -0.5)}, "betas[1] -0.5: expected a number in [0, 1)"),
    ("OneBitAdamW", {"eps": -1e-8}, "eps -1e-08"),
    ("OneBitAdamW", {"weight_decay": -0.1}, "weight_decay -0.1"),
    ("OneBitAdamW", {"warmup_steps": 0}, "warmup_steps 0: expected a number in [1, inf)"),
    ("OneBitAdamW", {"warmup_spec": "int5"}, "int5"),
    ("OneBitAdamW", {"max_norm": -2.0}, "max_norm -2.0"),
    ("OneBitAdamW", {"lr": float("nan")}, "lr nan"),
    ("ZeroOneAdamW", {"sync_every": 0}, "sync_every 0: expected a number in [1, inf)"),
    ("ZeroOneAdamW", {"refresh_every": -1}, "refresh_every -1"),
    ("ZeroOneAdamW", {"lr": -1.0}, "lr -1.0"),
    ("DGC", {"lr": -1.0}, "lr -1.0"),
    ("DGC", {"momentum": 1.0}, "momentum 1.0: expected a number in [0, 1)"),
    ("DGC", {"weight_decay": -1}, "weight_decay -1"),
    ("DGC", {"warmup_steps": -1}, "warmup_steps -1"),
    ("DGC", {"max_norm": -1.0}, "max_norm -1.0"),
])  # fmt: skip
def test_settings_out_of_range(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        KINDS[name](network().parameters(), **settings)


def test_growing_out_of_range() -> None:
    for arguments, message in (((0,), "Growing.steps 0"), ((1, 0), "Growing.first 0"), ((1, 4, 3), "Growing.last 3")):
        with pytest.raises(ValueError, match=message):
            Growing(*arguments)


@pytest.mark.parametrize(("name", "key", "values"), [
    ("OneBitAdamW", "lr", (0.001, 0.0025)),
    ("OneBitAdamW", "warmup_steps", (7, 19)),
    ("OneBitAdamW", "warmup_spec", ("none", "int4")),
    ("ZeroOneAdamW", "sync_every", (4, 6)),
    ("ZeroOneAdamW", "refresh_every", (0, 3)),
    ("DGC", "lr", (0.001, 0.0025)),
    ("DGC", "warmup_steps", (0, 19)),
])  # fmt: skip
def test_ranks_of_other_settings_all_fail(name: str, key: str, values: tuple[Any, Any]) -> None:
    for said in run(2, unlike, name, key, values):
        assert "DisagreementError" in said
        assert all(str(value) in said for value in values), said
        assert "all ranks must use the same optimizer's groups" in said


def test_ranks_of_other_optimizers_all_fail() -> None:
    for said in run(2, other_kinds):
        assert "rank 1 has optimizer 'OneBitAdamW', rank 0 has 'ZeroOneAdamW'" in said


@pytest.mark.parametrize(("name", "seeds", "steps", "message"), [
    slow("OneBitAdamW", (0, 0), (4, 6), "optimizer's groups"),
    ("OneBitAdamW", (0, 0), (1, 2), "optimizer's groups"),  # both in the warm-up
    slow("OneBitAdamW", (0, 1), (5, 5), "frozen variance"),
    ("ZeroOneAdamW", (0, 1), (5, 5), "frozen variance"),
    ("DGC", (0, 0), (4, 6), "optimizer's groups"),
])  # fmt: skip
def test_ranks_of_other_checkpoints_all_fail(
    name: str, seeds: tuple[int, int], steps: tuple[int, int], message: str
) -> None:
    for unlike_states, like_states in run(2, other_checkpoints, name, 3, seeds, steps):
        assert "DisagreementError" in unlike_states
        assert f"all ranks must use the same {message}" in unlike_states
        assert like_states == ""


@pytest.mark.parametrize("name", ["AdamW", "Adam", "RMSprop"])
@pytest.mark.parametrize("spec", ["sign", "topk(0.01)"])
def test_adaptive_optimizers_are_advised_once(spec: str, name: str) -> None:
    said, others = run(2, advised, spec, name)
    assert others == []
    assert len(said) == 1
    assert f"{name} divides by" in said[0]
    assert f"commpress: {spec} leaves" in said[0]
    assert "commpress.optim.OneBitAdamW" in said[0]


@pytest.mark.parametrize(("spec", "name"), [
    ("int4", "AdamW"), ("int8", "AdamW"), ("none", "AdamW"), ("sign", "SGD"), ("topk(0.01)", "SGD"),
    ("sign", "OneBitAdamW"), ("topk(0.01)", "DGC"), ("sign", "ZeroOneAdamW"),
])  # fmt: skip
def test_others_are_not(spec: str, name: str) -> None:
    assert run(2, advised, spec, name) == [[], []]
