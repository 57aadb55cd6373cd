"""Parameters that are not exchanged, or not always trained: a compressed optimizer does with them what torch's does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow, slowly
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, batch, by_dimensions, finite, loss_of, network, parameters_of, same, train

import commpress
from commpress.optim import DGC, EF21Muon, OneBitAdamW, ZeroOneAdamW
from commpress.optim.base import CompressedOptimizer

WARM, STEPS = 4, 10
KINDS: dict[str, Callable[..., CompressedOptimizer]] = {
    "OneBitAdamW": lambda params, **more: OneBitAdamW(params, lr=0.01, weight_decay=0.1, warmup_steps=WARM, **more),
    "ZeroOneAdamW": lambda params, **more: ZeroOneAdamW(
        params, lr=0.01, weight_decay=0.1, warmup_steps=WARM, sync_every=2, **more
    ),
    "DGC": lambda params, **more: DGC(params, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True, **more),
    "EF21Muon": lambda params, **more: EF21Muon(by_dimensions(params), lr=0.01, others_spec="none", **more),
}
SPECS = {"EF21Muon": "sign", "OneBitAdamW": "sign", "ZeroOneAdamW": "sign", "DGC": "topk(0.1)"}

LIKE_TORCHS = ("OneBitAdamW", "ZeroOneAdamW", "DGC")
"""Those that one optimizer of torch steps as, where nothing is exchanged."""


def torchs(name: str, params: list[Tensor]) -> torch.optim.Optimizer:
    """What the optimizer of this name is without compression."""
    if name == "DGC":
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def wrapped(model: nn.Module | None = None, unused: bool = False, **settings: Any) -> DistributedDataParallel:
    """A network in small buckets."""
    return DistributedDataParallel(
        network() if model is None else model,
        bucket_cap_mb=SMALL_BUCKETS,
        find_unused_parameters=unused,
        **settings,
    )


def attached(
    name: str, ddp: DistributedDataParallel, params: Any = None, **settings: Any
) -> tuple[CompressedOptimizer, commpress.Session]:
    """An optimizer of all of a model's parameters, or of these, and its session."""
    optimizer = KINDS[name](ddp.module.parameters() if params is None else params, **settings)
    return optimizer, commpress.attach(ddp, SPECS[name], optimizer=optimizer)


def average(parameters: list[nn.Parameter]) -> None:
    """What a user does with the gradients of parameters that DDP ignores."""
    for p in parameters:
        assert p.grad is not None
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def wait_for(parameters: list[nn.Parameter]) -> None:
    """Until the means are there that DDP delays: it does not wait for them."""
    apart = torch.ones(1)
    while apart:
        gradients = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        most = gradients.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        apart = (most != gradients).any().float().view(1)
        dist.all_reduce(apart, dist.ReduceOp.MAX)


class Replay:
    """Copies of parameters that torch's optimizer steps on the gradients that those have."""

    def __init__(self, name: str, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.copies: list[Tensor] = [nn.Parameter(p.detach().clone()) for p in parameters]
        self.optimizer = torchs(name, self.copies)

    def step(self) -> None:
        for p, other in zip(self.parameters, self.copies, strict=True):
            other.grad = None if p.grad is None else p.grad.clone()
        self.optimizer.step()

    def agrees(self) -> bool:
        return same([p.detach() for p in self.parameters], [p.detach() for p in self.copies])


def ignored(name: str, how: str, dtype: torch.dtype, closure: bool) -> tuple[list[bool], list[Tensor], bool]:
    """Whether a layer that DDP does not exchange is where torch's optimizer has it after each step; and if all else moves."""
    model = network().to(dtype)
    mine = list(model[4].parameters())
    names = [f"4.{key}" for key, _ in model[4].named_parameters()]
    more: dict[str, Any] = {}
    if how == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    else:
        more = {
            "delay_all_reduce_named_params": list(zip(names, mine, strict=True)),
            "param_to_hook_all_reduce": model[0].weight,
        }
    ddp = wrapped(model, **more)
    optimizer, _ = attached(name, ddp)
    start, replay, agree = parameters_of(model), Replay(name, mine), []

    def backward() -> float:
        optimizer.zero_grad(set_to_none=how == "ignored")
        loss = nn.functional.cross_entropy(ddp(x.to(dtype)).float(), y)
        loss.backward()
        (average if how == "ignored" else wait_for)(mine)
        return float(loss.detach())

    for step in range(STEPS):
        x, y = batch(step, dist.get_rank())
        if closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()
        replay.step()
        agree.append(replay.agrees())
    moved = all(not torch.equal(a, b) for a, b in zip(start, parameters_of(model), strict=True))
    return agree, parameters_of(model), moved


def mixed_checkpoint(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """A run with an ignored layer and one that goes on from a checkpoint, in the middle of it."""

    def started() -> tuple[DistributedDataParallel, CompressedOptimizer, commpress.Session]:
        model = network()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["4.weight", "4.bias"])
        ddp = wrapped(model)
        groups = [{"params": list(model[:4].parameters())}, {"params": list(model[4].parameters()), "lr": 0.02}]
        return ddp, *attached(name, ddp, groups)

    def go(ddp: Any, optimizer: CompressedOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(ddp, step).backward()
            average(list(ddp.module[4].parameters()))
            optimizer.step()

    results = []
    for breaks in (False, True):
        ddp, optimizer, session = started()
        go(ddp, optimizer, range(7))
        if breaks:
            saved = copy.deepcopy((ddp.module.state_dict(), optimizer.state_dict(), session.state_dict()))
            ddp, optimizer, session = started()
            ddp.module.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            session.load_state_dict(saved[2])
        go(ddp, optimizer, range(7, 12))
        results.append(parameters_of(ddp))
    return results[0], results[1]


def beside_another_module(name: str) -> tuple[bool, str]:
    """A module that no DDP wraps, in the same optimizer; then it alone is trained."""
    ddp, own = wrapped(), nn.Linear(3, 2)
    optimizer, _ = attached(name, ddp, [*ddp.parameters(), *own.parameters()])
    replay = Replay(name, list(own.parameters()))
    agree = True
    for step in range(STEPS):
        optimizer.zero_grad()
        alone = step == 8
        loss = 0.0 if alone else loss_of(ddp, step)
        (loss + own(torch.full((4, 3), step + 1.0)).square().mean()).backward()
        optimizer.step()
        replay.step()
        agree = agree and replay.agrees()
    return agree, outcome(lambda: train(ddp, [STEPS], optimizer=optimizer))


def kept_of(session: commpress.Session, name: str) -> list[Tensor]:
    """What a session keeps of a parameter."""
    found = []
    for bucket in session.state_dict()["memories"][0]:
        at = 0
        for other, n in bucket["segments"]:
            if other == name:
                values = [bucket[kind] for kind in ("residual", "momentum")]
                found += [value[at : at + n] for value in values if value is not None]
            at += n
    return found


def froze(
    name: str, at: int, set_to_none: bool, settings: dict[str, Any]
) -> tuple[list[bool], list[Tensor], list[Tensor]]:
    """Whether a layer stands, with all that is kept of it, while it is frozen and all else moves; then where all is."""
    ddp = wrapped(unused=True)
    optimizer, session = attached(name, ddp, **settings)

    def go(step: int) -> None:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(ddp, step).backward()
        optimizer.step()

    def state() -> list[Tensor]:
        mine = {key: value for p in layer.parameters() for key, value in optimizer.state[p].items() if key != "idle"}
        return [layer.weight.detach(), layer.bias.detach(), *(v for v in mine.values() if isinstance(v, Tensor))]

    layer = ddp.module[0]
    for step in range(at):
        go(step)
    layer.requires_grad_(False)
    before, kept, rest = copy.deepcopy(state()), kept_of(session, "0.weight"), parameters_of(ddp.module[2])
    stood = []
    for step in range(at, at + 4):
        go(step)
        stood.append(same(before, state()) and not same(rest, parameters_of(ddp.module[2])))
        rest = parameters_of(ddp.module[2])
        stood.append(same(kept, kept_of(session, "0.weight")))
    layer.requires_grad_(True)
    for step in range(at + 4, at + 9):
        go(step)
        stood.append(not same(before[:2], state()[:2]))
    if isinstance(optimizer, ZeroOneAdamW):
        with optimizer.synced():
            return stood, parameters_of(ddp), parameters_of(layer)
    return stood, parameters_of(ddp), parameters_of(layer)


def froze_alone() -> tuple[str, bool]:
    """What is said when rank 1 freezes a layer, and the others do not."""
    ddp = wrapped(unused=True)
    optimizer, _ = attached("OneBitAdamW", ddp)
    train(ddp, range(6), optimizer=optimizer)
    before = parameters_of(ddp)
    if dist.get_rank() == 1:
        ddp.module[2].requires_grad_(False)
    said = outcome(lambda: train(ddp, [6], optimizer=optimizer))
    return said, same(before, parameters_of(ddp))


def froze_without_notice(layer: int, static: bool) -> tuple[str, bool]:
    """What is said when DDP waits for the gradients of a layer that was frozen; whether anything moved."""
    ddp = wrapped(static_graph=static)
    optimizer, _ = attached("OneBitAdamW", ddp)
    train(ddp, range(WARM + 1), optimizer=optimizer)
    before = parameters_of(ddp)
    ddp.module[layer].requires_grad_(False)
    return outcome(lambda: train(ddp, [6], optimizer=optimizer)), same(before, parameters_of(ddp))


def in_turn(name: str) -> tuple[list[Tensor], bool, bool]:
    """Two layers that are frozen in turn, every other step; parameters at the end, which moved, which stood."""
    ddp = wrapped(unused=True)
    optimizer, _ = attached(name, ddp)
    layers, moved, stood = [ddp.module[0], ddp.module[2]], True, True
    for step in range(16):  # each layer warms up in eight of them
        trained, frozen = layers[step % 2], layers[1 - step % 2]
        trained.requires_grad_(True)
        frozen.requires_grad_(False)
        before = parameters_of(trained), parameters_of(frozen)
        train(ddp, [step], optimizer=optimizer)
        moved = moved and not same(before[0], parameters_of(trained))
        stood = stood and same(before[1], parameters_of(frozen))
    if isinstance(optimizer, ZeroOneAdamW):
        anchors = [optimizer.state[p]["anchor"].clone() for p in ddp.parameters()]
        moved = moved and not same(anchors, parameters_of(network()))
        with optimizer.synced():
            return parameters_of(ddp), moved, stood
    return parameters_of(ddp), moved, stood


def frozen_at_the_start(when: str) -> tuple[list[Tensor], bool, bool, str]:
    """A layer that is frozen before the model is wrapped, or before the session is attached; then it is unfrozen."""
    model = network()
    if when == "before wrapping":
        model[0].requires_grad_(False)
    ddp = wrapped(model, unused=True)
    model[0].requires_grad_(False)
    optimizer, session = attached("OneBitAdamW", ddp)
    start = parameters_of(model[0])
    train(ddp, range(8), optimizer=optimizer)
    stood = same(start, parameters_of(model[0]))
    reloads = outcome(lambda: session.load_state_dict(session.state_dict()))
    model[0].requires_grad_(True)
    train(ddp, range(8, 16), optimizer=optimizer)
    return parameters_of(ddp), stood, same(start, parameters_of(model[0])), reloads


def frozen_and_resumed(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """A run in which a layer is frozen for a while, and one that is resumed in that while."""

    def started() -> tuple[DistributedDataParallel, CompressedOptimizer, commpress.Session]:
        ddp = wrapped(unused=True)
        return ddp, *attached(name, ddp)

    results = []
    for breaks in (False, True):
        ddp, optimizer, session = started()
        train(ddp, range(7), optimizer=optimizer)
        ddp.module[2].requires_grad_(False)
        train(ddp, range(7, 10), optimizer=optimizer)
        if breaks:
            saved = copy.deepcopy((ddp.module.state_dict(), optimizer.state_dict(), session.state_dict()))
            ddp, optimizer, session = started()
            ddp.module[2].requires_grad_(False)
            ddp.module.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            session.load_state_dict(saved[2])
        train(ddp, range(10, 12), optimizer=optimizer)
        ddp.module[2].requires_grad_(True)
        train(ddp, range(12, 18), optimizer=optimizer)
        results.append(parameters_of(ddp))
    return results[0], results[1]


def frozen_under_a_scaler(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """A step that is skipped while a layer is frozen, and the same without that step."""
    results = []
    for skips in (True, False):
        ddp, scaler = wrapped(unused=True), torch.amp.GradScaler("cpu", init_scale=64.0)
        optimizer = KINDS[name](ddp.parameters())
        commpress.attach(ddp, SPECS[name], optimizer=optimizer, grad_scaler=scaler)
        for step in range(14):
            ddp.module[2].requires_grad_(not 7 <= step < 11)
            for bad in (True, False) if skips and step in (7, 9, 11) else (False,):
                optimizer.zero_grad()
                loss = loss_of(ddp, step) * (torch.inf if bad and dist.get_rank() == 1 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        results.append(parameters_of(ddp))
    return results[0], results[1]


@pytest.mark.parametrize(("name", "how", "closure"), [
    ("OneBitAdamW", "ignored", False), ("OneBitAdamW", "delayed", True),
    ("ZeroOneAdamW", "ignored", True), ("ZeroOneAdamW", "delayed", False),
    ("DGC", "ignored", False), ("DGC", "delayed", True),
])  # fmt: skip
def test_what_ddp_does_not_exchange_steps_as_under_torch(name: str, how: str, closure: bool) -> None:
    results = run(2, ignored, name, how, torch.float32, closure)
    for agree, parameters, moved in results:
        assert agree == [True] * STEPS
        assert moved
        assert same(parameters[4:], results[0][1][4:])


@pytest.mark.parametrize("name", LIKE_TORCHS)
def test_what_ddp_does_not_exchange_steps_as_under_torch_in_bfloat16(name: str) -> None:
    for agree, _, moved in run(2, ignored, name, "ignored", torch.bfloat16, False):
        assert agree == [True] * STEPS
        assert moved


@pytest.mark.parametrize("name", slowly(KINDS, quick=("DGC",)))
def test_a_checkpoint_with_parameters_of_both_kinds(name: str) -> None:
    for unbroken, resumed in run(2, mixed_checkpoint, name):
        assert same(unbroken, resumed)


@pytest.mark.parametrize("name", LIKE_TORCHS)
def test_a_module_of_another_model_steps_as_under_torch(name: str) -> None:
    for agree, goes_on in run(2, beside_another_module, name):
        assert agree
        assert goes_on == ""


@pytest.mark.parametrize(("name", "at", "settings"), [
    slow("OneBitAdamW", 2, {}), slow("OneBitAdamW", 7, {}), ("OneBitAdamW", 7, {"max_norm": 0.5}),
    ("OneBitAdamW", 2, {"warmup_spec": "int8"}), slow("ZeroOneAdamW", 2, {}), ("ZeroOneAdamW", 7, {}),
    slow("ZeroOneAdamW", 8, {}), ("ZeroOneAdamW", 8, {"refresh_every": 2}),
    ("DGC", 5, {}), slow("DGC", 2, {"warmup_steps": 10}), ("EF21Muon", 5, {}),
], ids=str)  # fmt: skip
def test_a_frozen_layer_stands_still_with_all_that_is_kept_of_it(name: str, at: int, settings: dict[str, Any]) -> None:
    results = run(2, froze, name, at, True, settings)
    for stood, parameters, _ in results:
        assert all(stood), stood
        assert finite(parameters)
        assert same(parameters, results[0][1])


@pytest.mark.parametrize("name", slowly(KINDS, quick=("OneBitAdamW",)))
def test_a_frozen_layer_stands_still_where_its_gradient_is_set_to_zero(name: str) -> None:
    for stood, _, _ in run(2, froze, name, 6, False, {}):
        assert all(stood), stood


def test_a_layer_that_one_rank_freezes_is_an_error_on_all() -> None:
    for said, stood in run(2, froze_alone):
        assert (
            "DisagreementError: commpress: rank 1 has frozen parameters ['2.bias', '2.weight'], rank 0 has []: all ranks must "
            "use the same frozen parameters"
        ) in said
        assert stood


@pytest.mark.parametrize(("layer", "static"), [(0, False), slow(0, True), slow(2, False), (4, True)])
def test_a_frozen_layer_that_ddp_waits_for_is_an_error(layer: int, static: bool) -> None:
    for said, stood in run(2, froze_without_notice, layer, static, fresh=True):
        assert f"'{layer}.weight' does not require a gradient, and DDP waits for one: expected" in said
        assert "find_unused_parameters=True" in said
        assert stood


@pytest.mark.parametrize("name", slowly(KINDS, quick=("ZeroOneAdamW",)))
def test_layers_that_are_frozen_in_turn(name: str) -> None:
    results = run(2, in_turn, name)
    for parameters, moved, stood in results:
        assert moved
        assert stood
        assert same(parameters, results[0][0])


@pytest.mark.parametrize("when", ["before wrapping", "before attaching"])
def test_a_layer_that_is_frozen_from_the_start(when: str) -> None:
    results = run(2, frozen_at_the_start, when)
    for parameters, stood, stands, reloads in results:
        assert stood
        assert not stands
        assert reloads == ""
        exchanged = slice(0, None) if when == "before attaching" else slice(2, None)  # DDP does not know of the others
        assert same(parameters[exchanged], results[0][0][exchanged])


@pytest.mark.parametrize("name", slowly(KINDS, quick=("OneBitAdamW",)))
def test_resumed_while_a_layer_is_frozen(name: str) -> None:
    for unbroken, resumed in run(2, frozen_and_resumed, name):
        assert same(unbroken, resumed)


@pytest.mark.parametrize("name", slowly(KINDS, quick=("ZeroOneAdamW",)))
def test_a_skipped_step_while_a_layer_is_frozen_never_was(name: str) -> None:
    for skipped, plain in run(2, frozen_under_a_scaler, name):
        for a, b in zip(skipped, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
