"""Muon under local SGD and DiLoCo: EF21Muon steps as torch's Muon and AdamW do, and keeps its momentum to itself."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_muon import distance, in_float32
from test_outer import EVERY, STEPS, Reference, interrupted_at, take_steps
from tiers import slow
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import exact_products, finite, network, parameters_of, same

import commpress
from commpress.optim import EF21Muon
from commpress.optim.outer import Outer, OuterSettings

LR = 0.01
TORCHS: dict[str, Any] = {"momentum": 0.95, "nesterov": True}
"""What torch.optim.Muon has by default."""


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """What torch has for it: one optimizer for the matrices, one for the rest."""
    matrices, others = ([p for p in model.parameters() if (p.dim() == 2) == two] for two in (True, False))
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)]


def started(spec: str, seed: int = 0, way: str = "diloco", **settings: Any) -> tuple[nn.Module, EF21Muon, Outer]:
    """A network, its EF21Muon and its outer syncs."""
    model = network(seed)
    optimizer = EF21Muon(model, lr=LR, **TORCHS)
    return model, optimizer, getattr(commpress, way)(model, optimizer, spec, **{"every": EVERY, **settings})


@exact_products
def trained(settings: dict[str, Any], by: str) -> list[Tensor]:
    """Parameters after some steps by EF21Muon, or by torch's two optimizers, either of which steps last."""
    if by == "EF21Muon":
        model, optimizer, _ = started("none", **settings)
        take_steps(model, optimizer, range(STEPS))
        return parameters_of(model)
    model = network()
    optimizers = muon_and_adamw(model)
    commpress.diloco(model, optimizers, "none", every=EVERY, **settings)
    with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", in_float32):
        take_steps(model, optimizers if by == "Muon, AdamW" else optimizers[::-1], range(STEPS))
    return parameters_of(model)


@pytest.mark.parametrize("by", ["EF21Muon", "Muon, AdamW", slow("AdamW, Muon")])
@pytest.mark.parametrize(("world_size", "settings"), [
    (2, {"lr": 1.0, "momentum": 0.0}),
    slow(3, {"lr": 0.7, "momentum": 0.6}),
    (3, {"lr": 0.7, "momentum": 0.6, "fragments": 3, "delay": 2}),
], ids=str)  # fmt: skip
def test_it_is_torchs_muon_and_adamw_between_syncs(world_size: int, settings: dict[str, Any], by: str) -> None:
    with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", in_float32):
        reference = Reference("none", world_size, OuterSettings(every=EVERY, **settings), muon_and_adamw)
        reference.train(STEPS)
    for rank, mine in enumerate(run(world_size, trained, settings, by)):
        assert distance(mine, parameters_of(reference.models[rank])) < 1e-3


@exact_products
def plain_steps(settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Steps on gradients that do not depend on the parameters: of EF21Muon between syncs, and of torch's optimizers."""
    mine, theirs = network(), network()
    optimizer = EF21Muon(mine, lr=LR, **{**TORCHS, **settings})
    commpress.local_sgd(mine, optimizer, "none", every=100)
    muon, adamw = muon_and_adamw(theirs)
    muon.param_groups[0].update({key: value for key, value in settings.items() if value is not None})
    draw = torch.Generator().manual_seed(0)
    with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", in_float32):
        for _ in range(10):
            for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                one.grad = torch.randn(one.shape, generator=draw)
                other.grad = one.grad.clone()
            for each in (optimizer, muon, adamw):
                each.step()
    return parameters_of(mine), parameters_of(theirs)


@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"momentum": 0.5, "nesterov": None}], ids=str)
def test_a_step_is_torchs(settings: dict[str, Any]) -> None:
    ((mine, theirs),) = run(1, plain_steps, settings)
    for ours, other in zip(mine, theirs, strict=True):
        if ours.dim() == 1:
            assert torch.equal(ours, other)
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def synced(spec: str, way: str, settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    model, optimizer, outer = started(spec, dist.get_rank(), way, **settings)
    take_steps(model, optimizer, range(STEPS))
    drifted = parameters_of(model)
    outer.sync()
    return drifted, parameters_of(model)


@pytest.mark.parametrize(("world_size", "spec", "way", "settings"), [
    (2, "sign", "diloco", {}),
    (3, "topk(0.1)|sign", "diloco", {"fragments": 2, "delay": 2}),
    (3, "int2", "local_sgd", {}),
    slow(2, "topk(0.1)|sign", "local_sgd", {"fragments": 2}),
    slow(4, "sign", "diloco", {"delay": 1}),
], ids=str)  # fmt: skip
def test_replicas_hold_the_same_bits_after_a_sync(
    world_size: int, spec: str, way: str, settings: dict[str, Any]
) -> None:
    results = run(world_size, synced, spec, way, settings)
    for drifted, end in results:
        assert same(end, results[0][1])
        assert finite(end)
        assert not same(drifted, end)
    assert not same(results[0][0], results[1][0])


def momenta(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["momentum_buffer"].clone() for state in optimizer.state.values() if "momentum_buffer" in state]


def momenta_at_a_sync() -> tuple[list[Tensor], list[Tensor]]:
    model, optimizer, outer = started("sign")
    take_steps(model, optimizer, range(EVERY - 1))
    before = momenta(optimizer)
    outer.sync()
    return before, momenta(optimizer)


def test_a_sync_leaves_each_rank_its_own_momentum() -> None:
    one, other = run(2, momenta_at_a_sync)
    assert len(one[0]) == 3
    assert not any(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    for before, after in (one, other):
        assert same(before, after)


def interrupted(spec: str, settings: dict[str, Any], places: list[int]) -> list[int]:
    """The places after which a run that went on in new objects ends with other parameters or momenta."""
    return interrupted_at(spec, settings, places, started, lambda model, by: [*parameters_of(model), *momenta(by)])


@pytest.mark.parametrize(
    ("spec", "settings"), [("sign", {}), ("topk(0.1)|sign", {"fragments": 2, "delay": 2})], ids=str
)
def test_resumes_bit_for_bit(spec: str, settings: dict[str, Any]) -> None:
    assert run(2, interrupted, spec, settings, [3, 6, 9]) == [[], []]


def refused(case: str) -> str:
    """What is said to an optimizer that does not fit outer syncs, or whose outer syncs do not fit what is asked of it."""
    model = network()
    settings: dict[str, Any] = {"max_norm": 1.0} if case == "clips" and dist.get_rank() else {}
    if case == "shards":
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        fully_shard(model, mesh=DeviceMesh.from_group(alone, "cpu"))
    optimizer = EF21Muon(model, lr=LR, **settings)
    if case == "attached":
        commpress.attach(DistributedDataParallel(model), "sign", optimizer=optimizer)
    if case in ("attached later", "twice", "copied"):
        commpress.diloco(model, optimizer, "sign", every=EVERY)
    if case == "attached later":
        return outcome(lambda: commpress.attach(DistributedDataParallel(model), "sign", optimizer=optimizer))
    if case == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
        return outcome(lambda: take_steps(model, optimizer, range(1)))
    if case == "not attached":
        return outcome(lambda: take_steps(model, optimizer, range(1)))
    given = muon_and_adamw(model)[:1] if case == "a part" else optimizer
    return outcome(lambda: commpress.diloco(model, given, "sign", every=EVERY))


@pytest.mark.parametrize(("case", "message"), [
    ("attached", "ValueError: optimizer: this EF21Muon is attached to a session, and exchanges in every step"),
    ("attached later", "this EF21Muon takes local steps between outer syncs, as commpress.diloco or local_sgd has it"),
    ("clips", "optimizer: max_norm 1.0 of EF21Muon clips what is exchanged in every step"),
    ("shards", "TypeError: optimizer: EF21Muon steps whole parameters, and this model's are sharded"),
    ("twice", "this EF21Muon has outer syncs already"),
    ("copied", "RuntimeError: EF21Muon is not attached"),
    ("not attached", "optimizer=optimizer), or commpress.diloco(model, optimizer, ...)"),
    ("a part", "this Muon does not hold '0.bias', which requires a gradient, and 2 others. Expected all optimizers of"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(case: str, message: str) -> None:
    assert all(message in said for said in run(2, refused, case, fresh=case == "attached later"))


def one_that_rests() -> str:
    model = network()
    muon, adamw = muon_and_adamw(model)
    commpress.diloco(model, [muon, adamw], "none", every=EVERY)
    take_steps(model, [muon, adamw], range(2))
    return outcome(lambda: take_steps(model, muon, range(2, 2 + 2 * EVERY)))


def skipped_now_and_then() -> int:
    """Local steps of one whose optimizers a scaler skips in turn, each in more steps than there are between two syncs."""
    model = network()
    optimizers = muon_and_adamw(model)
    outer = commpress.diloco(model, optimizers, "none", every=EVERY)
    for turn in range(2 * EVERY):
        take_steps(model, [optimizers[turn % 2]], range(2 * turn, 2 * turn + 1))
        take_steps(model, optimizers, range(2 * turn + 1, 2 * turn + 2))
    return outer.state_dict()["steps"]  # type: ignore[no-any-return]


def test_steps_of_one_optimizer_that_a_scaler_skips_do_not_add_up() -> None:
    steps = 3 * EVERY - 1  # two halves are one; the first half was a part of the next
    assert run(2, skipped_now_and_then) == [steps] * 2


def test_an_optimizer_that_no_longer_steps_is_an_error_within_an_interval() -> None:
    for said in run(2, one_that_rests):
        assert said.startswith(
            f"RuntimeError: commpress: Muon has taken {EVERY + 1} steps, another optimizer of the same outer syncs none:"
        )
