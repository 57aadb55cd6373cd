"""Parameters that join an optimizer later, and optimizers that are attached again."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_optimizer_parameters import KINDS, LIKE_TORCHS, SPECS, WARM, Replay, attached, wrapped
from tiers import slow, slowly
from torch import Tensor, nn
from training import finite, loss_of, network, parameters_of, same, train

import commpress
from commpress.comm.meter import Row
from commpress.optim import DGC, OneBitAdamW, ZeroOneAdamW
from commpress.optim.base import CompressedOptimizer


def common(optimizer: CompressedOptimizer, ddp: nn.Module) -> list[Tensor]:
    """Parameters as all ranks have them."""
    if not isinstance(optimizer, ZeroOneAdamW):
        return parameters_of(ddp)
    with optimizer.synced():
        return parameters_of(ddp)


def joined(name: str, warmup_steps: int | None) -> tuple[list[Tensor], list[bool], list[Row], bool]:
    """A layer that is unfrozen behind the warm-up, in a group of its own and a model wrapped anew."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = KINDS[name](list(model[2:].parameters()))
    ddp = wrapped(model)
    commpress.attach(ddp, SPECS[name], optimizer=optimizer)
    train(ddp, range(7), optimizer=optimizer)
    model[0].requires_grad_(True)
    more = {} if name == "DGC" else {"warmup_steps": warmup_steps, "betas": (0.9, 0.9)}
    optimizer.add_param_group({"params": list(model[0].parameters()), **more})
    for group in optimizer.param_groups if warmup_steps is None else ():
        group["lr"] = 1e-6
    ddp = wrapped(model)
    session = commpress.attach(ddp, SPECS[name], optimizer=optimizer)
    moved = []
    for step in range(7, 20) if warmup_steps else [7] * 42:  # a variance settles where gradients stay what they are
        before = parameters_of(model)
        train(ddp, [step], optimizer=optimizer)
        moved.append(all(not torch.equal(a, b) for a, b in zip(before, parameters_of(model), strict=True)))
    frozen = name == "DGC" or all("inverse" in optimizer.state[p] for p in model.parameters())
    return common(optimizer, ddp), moved, session.report().rows, frozen


def warms_up_alone() -> tuple[list[Tensor], list[Tensor]]:
    """A layer that joins: its first steps, and those of AdamW on its mean gradients."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = OneBitAdamW(list(model[2:].parameters()), lr=0.01, warmup_steps=3)
    ddp = wrapped(model)
    commpress.attach(ddp, "sign", optimizer=optimizer)
    train(ddp, range(5), optimizer=optimizer)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.02})
    ddp = wrapped(model)
    commpress.attach(ddp, "sign", optimizer=optimizer)
    copies = [nn.Parameter(p.detach().clone()) for p in model[0].parameters()]
    adamw = torch.optim.AdamW(copies, lr=0.02)
    for step in range(5, 8):
        optimizer.zero_grad()
        own = torch.autograd.grad(loss_of(model, step), list(model[0].parameters()))
        for g in own:
            dist.all_reduce(g)
        loss_of(ddp, step).backward()
        optimizer.step()
        for p, g in zip(copies, own, strict=True):
            p.grad = g / dist.get_world_size()
        adamw.step()
    return parameters_of(model[0]), [p.detach() for p in copies]


def resumed_newcomers(name: str, ats: tuple[int, ...]) -> list[tuple[int, list[Tensor], list[Tensor]]]:
    """A run with a layer that joins, and those that go on from checkpoints of steps in its warm-up, and behind it.

    Returns, for each of these steps, the parameters of the run and of the one that goes on, four steps behind the last one.
    """

    def started(model: nn.Module) -> tuple[nn.Module, CompressedOptimizer, commpress.Session]:
        ddp = wrapped(model)
        optimizer = KINDS[name](list(model[2:].parameters()))  # type: ignore[index]
        return ddp, optimizer, commpress.attach(ddp, SPECS[name], optimizer=optimizer)

    end = ats[-1] + 4
    model = network()
    model[0].requires_grad_(False)
    ddp, optimizer, session = started(model)
    train(ddp, range(7), optimizer=optimizer)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    ddp = wrapped(model)
    session = commpress.attach(ddp, SPECS[name], optimizer=optimizer)
    saved = {}
    for step in range(7, end):
        if step in ats:
            saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))
        train(ddp, [step], optimizer=optimizer)
    unbroken, results = parameters_of(ddp), []
    for at, state in saved.items():
        model = network()
        ddp = wrapped(model)
        optimizer = KINDS[name](list(model[2:].parameters()))
        optimizer.add_param_group({"params": list(model[0].parameters())})
        session = commpress.attach(ddp, SPECS[name], optimizer=optimizer)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        session.load_state_dict(state[2])
        train(ddp, range(at, end), optimizer=optimizer)
        results.append((at, unbroken, parameters_of(ddp)))
    return results


def again(name: str, trainings: list[list[int]]) -> list[list[Tensor]]:
    """Fourteen steps, and the same with a model that is wrapped and attached anew before some of them."""
    results = []
    for ats in ([], *trainings):
        ddp = wrapped()
        optimizer, _ = attached(name, ddp)
        for step in range(14):
            if step in ats:
                ddp = wrapped(ddp.module)
                commpress.attach(ddp, SPECS[name], optimizer=optimizer)
            train(ddp, [step], optimizer=optimizer)
        results.append(parameters_of(ddp))
    return results


def added_without_a_wrapper(name: str) -> tuple[bool, list[Tensor]]:
    """A layer that the optimizer gets later, and no DDP."""
    model = network()
    model[0].requires_grad_(False)
    ddp = wrapped(model)
    optimizer, _ = attached(name, ddp, list(model[2:].parameters()))
    train(ddp, range(6), optimizer=optimizer)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    replay, agree = Replay(name, list(model[0].parameters())), True
    for step in range(6, 12):
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        optimizer.step()
        replay.step()
        agree = agree and replay.agrees()
    return agree, common(optimizer, model[2:])


def no_longer_exchanged(name: str) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """A layer that was exchanged, and that the next DDP ignores: its next step, and AdamW's out of the same momentum."""
    model = network()
    ddp = wrapped(model)
    optimizer, _ = attached(name, ddp)
    train(ddp, range(8), optimizer=optimizer)
    type(ddp)._set_params_and_buffers_to_ignore_for_model(model, ["4.weight", "4.bias"])
    ddp = wrapped(model)
    commpress.attach(ddp, SPECS[name], optimizer=optimizer)
    mine = list(model[4].parameters())
    states = {p: copy.deepcopy(optimizer.state[p]) for p in mine}
    before = parameters_of(model[4])
    train(ddp, [8], optimizer=optimizer)
    expected = []
    for p, start in zip(mine, before, strict=True):
        state, t = states[p], float(states[p]["step"])
        assert p.grad is not None
        v = (optimizer.param_groups[0]["unit"] / state["inverse"] - 1e-8).square() * (1 - 0.999**t)
        m = 0.9 * state["exp_avg"] / state["inverse"] * (1 - 0.9**t) + 0.1 * p.grad
        root = ((0.999 * v + 0.001 * p.grad.square()) / (1 - 0.999 ** (t + 1))).sqrt()
        expected.append(start * (1 - 0.01 * 0.1) - 0.01 * m / (1 - 0.9 ** (t + 1)) / (root + 1e-8))
    keys = [sorted(optimizer.state[p]) == ["exp_avg", "exp_avg_sq", "step"] for p in mine]
    found = parameters_of(model[4])
    train(ddp, range(9, 12), optimizer=optimizer)
    return expected, found, [*keys, finite(parameters_of(model))]


class Late(nn.Module):
    """A network and a layer beside it that is not used before it is told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.beside, self.uses = network(), nn.Linear(32, 10), False
        nn.init.zeros_(self.beside.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y + self.beside(x) if self.uses else y


def used_late(name: str) -> tuple[list[Tensor], bool, list[Row]]:
    """A layer that is first used behind the warm-up: everything at the end, whether it stood before, what was sent."""
    ddp = wrapped(Late(), unused=True)
    optimizer, session = attached(name, ddp)
    start = parameters_of(ddp.module.beside)
    train(ddp, range(12), optimizer=optimizer)
    stood = same(start, parameters_of(ddp.module.beside))
    ddp.module.uses = True
    train(ddp, range(12, 24), optimizer=optimizer)
    return common(optimizer, ddp), stood, session.report().rows


def left() -> tuple[list[Tensor], list[str]]:
    """A layer that leaves its optimizer for another one: it gets exact means."""
    ddp = wrapped()
    optimizer, session = attached("OneBitAdamW", ddp)
    train(ddp, range(6), optimizer=optimizer)
    layer = list(ddp.module[2].parameters())
    optimizer.param_groups[0]["params"] = [
        p for p in optimizer.param_groups[0]["params"] if all(p is not q for q in layer)
    ]
    other = torch.optim.SGD(layer, lr=0.1)
    for step in range(6, 12):
        optimizer.zero_grad()
        other.zero_grad()
        loss_of(ddp, step).backward()
        optimizer.step()
        other.step()
    return parameters_of(ddp), [row.reason for row in session.report().rows]


def attachments_again() -> dict[str, str]:
    """What is said to a second attach that cannot be, and that the first goes on all the same."""
    said = {}
    first, second = wrapped(), wrapped(network(1))
    optimizer = OneBitAdamW([*first.parameters(), *second.parameters()], warmup_steps=2)
    commpress.attach(first, "sign", optimizer=optimizer)
    train(first, range(4), optimizer=optimizer)
    said["another model"] = outcome(lambda: commpress.attach(second, "sign", optimizer=optimizer))
    said["one DDP twice"] = outcome(lambda: commpress.attach(first, "sign", optimizer=optimizer))
    said["one DDP twice without"] = outcome(lambda: commpress.attach(first, "int4"))
    said["goes on"] = outcome(lambda: train(first, range(4, 6), optimizer=optimizer))
    anew = wrapped(first.module)
    commpress.attach(anew, "sign", optimizer=optimizer)
    said["anew"] = outcome(lambda: train(anew, range(6, 9), optimizer=optimizer))
    said["the old one"] = outcome(lambda: loss_of(first, 9).backward())
    complex_one = wrapped(nn.Linear(8, 8, dtype=torch.complex64))
    said["complex"] = outcome(lambda: commpress.attach(complex_one, "sign", optimizer=DGC(complex_one.parameters())))
    return said


def copied() -> tuple[str, bool]:
    """What a copy of an attached optimizer says, and whether the original goes on."""
    ddp = wrapped()
    optimizer, _ = attached("ZeroOneAdamW", ddp)
    train(ddp, range(6), optimizer=optimizer)
    other = copy.deepcopy(optimizer)
    return outcome(other.step), outcome(lambda: train(ddp, range(6, 9), optimizer=optimizer)) == ""


@pytest.mark.parametrize(
    ("name", "warmup_steps"),
    [
        ("OneBitAdamW", WARM),
        slow("OneBitAdamW", None),
        ("ZeroOneAdamW", WARM),
        slow("ZeroOneAdamW", None),
        ("DGC", WARM),
    ],
)
def test_a_layer_that_joins_behind_the_warm_up_is_trained(name: str, warmup_steps: int | None) -> None:
    results = run(2, joined, name, warmup_steps)
    for parameters, moved, rows, frozen in results:
        assert all(moved)
        assert same(parameters, results[0][0])
        assert finite(parameters)
        assert frozen
        if name == "DGC":
            continue
        warming = {(row.values, row.steps) for row in rows if row.reason == "the variance warms up"}
        if warmup_steps is not None:  # no other layer travels exactly again
            assert {n for n, _ in warming} <= {64, 32 * 64, 33 * 64}
            assert max(steps for _, steps in warming) <= WARM


def test_a_layer_that_joins_warms_up_as_under_adamw() -> None:
    for mine, theirs in run(2, warms_up_alone):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", slowly(LIKE_TORCHS, quick=("OneBitAdamW",)))
def test_a_run_with_a_layer_that_joined_is_resumed_bit_for_bit(name: str) -> None:
    for results in run(2, resumed_newcomers, name, (9, 14)):
        for at, unbroken, resumed in results:
            assert same(unbroken, resumed), f"from step {at} on"


@pytest.mark.parametrize("name", slowly(KINDS, quick=("ZeroOneAdamW",)))
def test_a_second_attach_goes_on_bit_for_bit(name: str) -> None:
    for unbroken, *attached_again in run(2, again, name, [[3, 9], [8]]):
        for parameters in attached_again:
            assert same(unbroken, parameters)


@pytest.mark.parametrize("name", LIKE_TORCHS)
def test_a_layer_that_no_ddp_knows_of_steps_as_under_torch(name: str) -> None:
    results = run(2, added_without_a_wrapper, name)
    for agree, exchanged in results:
        assert agree
        assert same(exchanged, results[0][1])


@pytest.mark.parametrize("name", ["OneBitAdamW", "ZeroOneAdamW"])
def test_a_layer_that_is_no_longer_exchanged_goes_on_with_its_momentum(name: str) -> None:
    for expected, found, rest in run(2, no_longer_exchanged, name):
        assert all(rest), rest
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["OneBitAdamW", slow("ZeroOneAdamW")])
def test_a_layer_that_is_used_late_warms_up_when_it_is(name: str) -> None:
    results = run(2, used_late, name)
    for parameters, stood, rows in results:
        assert stood
        assert same(parameters, results[0][0])
        assert finite(parameters)
        assert parameters[-2].abs().min() > 0
        exact = [row.steps for row in rows if row.reason == "the variance warms up" and row.values in (320, 330)]
        assert sum(exact) == WARM - 1  # of its first step no rank knew that there would be a gradient


def test_a_layer_that_leaves_for_another_optimizer_gets_exact_means() -> None:
    results = run(2, left)
    for parameters, reasons in results:
        assert same(parameters, results[0][0])
        assert "the optimizer does not hold it" in reasons


def test_a_second_attach_that_cannot_be_says_so() -> None:
    for said in run(2, attachments_again):
        assert said["another model"].startswith(
            "ValueError: this OneBitAdamW is attached to another model, whose '0.weight'"
        )
        for case in ("one DDP twice", "one DDP twice without"):
            assert "RuntimeError: commpress.attach: this DistributedDataParallel has a communication hook" in said[case]
        assert said["goes on"] == said["anew"] == ""
        assert "this DDP module's OneBitAdamW has been attached to another DDP module since" in said["the old one"]
        assert said["complex"].startswith("ValueError: parameter 'weight' is complex64, DGC steps real ones")


def test_a_copy_of_an_optimizer_is_not_attached() -> None:
    for said, goes_on in run(2, copied):
        assert said.startswith("RuntimeError: ZeroOneAdamW is not attached")
        assert goes_on
