"""`attach(model)` under FSDP2, without a spec: plain at first, one choice on all ranks, nothing lost when the spec changes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from clocked import by_clock
from ranks import outcome, run
from scripted import Scripted
from test_auto import PLAIN_STEPS, encoded
from test_auto_guard import CLOCK
from test_fsdp import by_two, sharded, shards_of
from tiers import slow
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import Trained, loss_of, network, same, same_training, sgd

import commpress
from commpress.comm.sharded_auto import PATIENCE, ShardedAuto, decides


def trained(model: nn.Module, steps: int) -> Trained:
    optimizer, got = sgd(model), Trained([])
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        got.gradients.append([None if p.grad is None else p.grad.to_local().clone() for p in model.parameters()])
        optimizer.step()
    got.parameters = shards_of(model)
    return got


def first_steps(replicas: bool, parameters: str | None) -> tuple[Trained, Trained]:
    model = by_two if replicas else sharded
    plain, attached = model(), model()
    commpress.attach(attached, parameters=parameters)
    return trained(plain, PLAIN_STEPS), trained(attached, PLAIN_STEPS)


@pytest.mark.parametrize(("world_size", "replicas", "parameters"), [(2, False, "auto"), slow(4, True, None)])
def test_the_first_steps_have_the_bits_of_plain_training(
    world_size: int, replicas: bool, parameters: str | None
) -> None:
    for plain, attached in run(world_size, first_steps, replicas, parameters):
        assert same_training(plain, attached)


PAIRS = {"none": 1.0, "int4": 0.7, "none, parameters int8": 0.8, "int4, parameters int8": 0.5}
"""Seconds of a step by candidate, as far as the ranks of a test say."""
HOPELESS = 9.0
"""Those of all other candidates."""


def searched(replicas: bool = False, parameters: str | None = None) -> dict[str, Any]:
    """What ranks choose whose clocks say which is the fastest, and what they say of it."""
    model, clock = by_two() if replicas else sharded(), CLOCK if parameters is None else PAIRS
    with by_clock(lambda name: clock.get(name, HOPELESS), ShardedAuto):
        session = commpress.attach(model, parameters=parameters)
        trained(model, 60)
    full = [p.full_tensor() for p in model.parameters()]
    rows = [row for row in session.report().rows if row.bucket == 0]
    return {
        "parameters": full,
        "explained": session.explain(),
        "spec": session.report().spec,
        "receipt": str(session.receipt()),
        "choices": session.report().choices,
        "sent": {
            role: {(row.exchange, row.spec): row.sent_bytes / row.steps for row in rows if row.role == role}
            for role in ("gradients", "parameters")
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_choose_the_same(world_size: int) -> None:
    first, *others = run(world_size, searched)
    assert first["spec"] == "auto: int4"
    assert first["choices"][-1].spec == "int4"
    assert first["choices"][-1].seconds("int4") == 0.5
    assert "auto: int4, chosen after" in first["explained"]
    assert "a step takes 0.5000 s, without compression 1.0000 s" in first["receipt"]
    sent = {spec: nbytes for (_, spec), nbytes in first["sent"]["gradients"].items()}
    assert 0 < sent["int4"] < sent["int8"] < sent["none"]
    for other in others:
        assert same(other["parameters"], first["parameters"])
        assert other["explained"] == first["explained"]


@pytest.mark.slow
def test_shards_and_replicas_choose_the_same_where_replicas_are_averaged() -> None:
    first, *others = run(4, searched, True)
    assert first["spec"] == "auto: int4"
    sent = first["sent"]["gradients"]
    assert 0 < sent["one_shot", "int4"] < sent["one_shot", "int8"] < sent["all_reduce", "none"]
    assert [spec for how, spec in sent if how == "reduce_scatter"] == ["none"]  # among the shards of a replica
    for other in others:
        assert same(other["parameters"], first["parameters"])
        assert other["explained"] == first["explained"]


@pytest.mark.parametrize(("world_size", "replicas"), [slow(2, False), (4, True)])
def test_one_search_finds_the_specs_of_gradients_and_parameters(world_size: int, replicas: bool) -> None:
    first, *others = run(world_size, searched, replicas, "auto")
    assert first["spec"] == "auto: int4, parameters int8"
    assert "auto: int4, parameters int8, chosen after" in first["explained"]
    assert "a step takes 0.5000 s, without compression 1.0000 s" in first["receipt"]
    sent = {spec: nbytes for (_, spec), nbytes in first["sent"]["parameters"].items()}
    assert set(sent) == {"none", "int8"}
    assert 0 < sent["int8"] < sent["none"]
    for other in others:
        assert same(other["parameters"], first["parameters"])
        assert other["explained"] == first["explained"]


def predicted(replicas: bool, parameters: str | None) -> dict[str, Any]:
    """The predictions of a real search, from what the ranks have measured."""
    model = by_two() if replicas else sharded()
    session = commpress.attach(model, parameters=parameters)
    trained(model, 60)
    assert session._auto is not None
    assert session._auto.search.choice is not None
    return {trial.spec: trial.predicted for trial in session._auto.search.choice.trials}


@pytest.mark.slow
def test_the_model_ranks_candidates_from_what_was_measured() -> None:
    for world_size, replicas, parameters, count in ((2, False, None, 4), (2, False, "auto", 12), (4, True, None, 4)):
        first, *others = run(world_size, predicted, replicas, parameters)
        assert all(other == first for other in others)
        assert len(first) == count
        assert set(CLOCK) <= set(first)
        assert all(seconds > 0 for seconds in first.values())


def slow_link() -> list[str]:
    """The candidates from the best to the worst, where training waits for the link and the codecs cost nothing to speak of."""
    model = sharded()
    session = commpress.attach(model, parameters="auto")
    trained(model, 1)
    auto = session._auto
    assert isinstance(auto, ShardedAuto)
    said = auto._said()
    costs = {role: {s: auto._cost(role, plan) for s, plan in plans.items()} for role, plans in auto._plans.items()}
    said["roles"] = {role: {"waited": 1.0, "costs": of} for role, of in costs.items()}
    seconds = auto._predicted([said, said], 3.0)
    assert seconds["none"] == 3.0
    return sorted(seconds, key=lambda one: seconds[one])


def test_on_a_slow_link_what_sends_least_is_tried_first() -> None:
    for order in run(2, slow_link):
        assert order[:2] == ["int4, parameters int8", "int8, parameters int8"]
        assert order[-1] == "none"


def evaluated(model: Any, session: Any, train: Any, evaluate: Any) -> tuple[list[Any], list[Any]]:
    """What the ranks would tell each other of the plain steps before and behind 20 evaluations, and after two more."""
    auto, told = session._auto, []
    train(PLAIN_STEPS - 2)
    for evaluations in (0, 20, 0):
        for _ in range(evaluations):
            evaluate()
        told.append(auto._said()["roles"])
    waited = auto._totals()[2]
    train(2)  # ZeRO 3 gathers nothing in a step behind an evaluation
    return told, [auto._said()["roles"], auto._totals()[2] - waited]


def with_evaluations(replicas: bool) -> tuple[list[Any], list[Any]]:
    model = by_two() if replicas else sharded()
    session = commpress.attach(model, parameters="auto")

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            loss_of(model, 0)
        model.train()
        with torch.no_grad():
            loss_of(model, 1)
        model.eval()
        loss_of(model, 2)
        model.train()

    return evaluated(model, session, lambda steps: trained(model, steps), evaluate)


@pytest.mark.parametrize(("world_size", "replicas"), [(2, False), slow(4, True)])
def test_an_evaluation_between_two_steps_is_no_part_of_their_traffic(world_size: int, replicas: bool) -> None:
    for (before, behind, again), (later, waited) in run(world_size, with_evaluations, replicas):
        assert behind == before == again
        assert before["parameters"]["costs"]["none"][0] > 0
        assert later["gradients"]["costs"] == before["gradients"]["costs"]
        assert waited > 0  # training counts again


def counted_behind_evaluations(session: Any, train: Any, evaluate: Any) -> tuple[list[int], list[int], int]:
    """The parameters that were gathered in each step that counts: where some steps are behind an evaluation, and where all are;
    and the steps of the search."""
    auto, counted = session._auto, list[int]()
    assert isinstance(auto, ShardedAuto)
    train(3)  # DeepSpeed records the order of the modules first
    auto.search = search = Scripted(*["none"] * 40)  # type: ignore[assignment]

    def note(*figures: Any, **exchange: Any) -> bool:
        counted.append(sum(times for (role, _, _), times in auto._noted.items() if role == "parameters"))
        return Scripted.note(search, *figures, **exchange)

    search.note = note  # type: ignore[method-assign]
    for behind in (False, False, True, False, True, False, False):
        if behind:
            evaluate()
        train(1)
    some = counted.copy()
    for _ in range(8):
        evaluate()
        train(1)
    return some, counted[len(some) + 1 :], search.steps


def counted_by_fsdp(replicas: bool) -> tuple[list[int], list[int], int]:
    model = by_two() if replicas else sharded()
    session = commpress.attach(model, parameters="auto")

    def evaluate() -> None:
        if replicas and dist.get_rank() >= 2:  # the first replica evaluates alone
            return
        with torch.no_grad():
            loss_of(model, 0)

    return counted_behind_evaluations(session, lambda steps: trained(model, steps), evaluate)


def require_whole_steps(some: list[int], all_behind: list[int], steps: int) -> None:
    """Fail if a step counts that an evaluation has gathered for, or if no step counts where each one is such a step."""
    assert len(set(some)) == 1
    assert some[0] > 0
    assert len(some) == 5  # of 7 that have ended, two of them behind an evaluation
    assert len(all_behind) == 3  # of 7 that have ended, each second one
    assert steps == 15


def test_a_step_that_finds_parameters_which_an_evaluation_has_gathered_does_not_count() -> None:
    for found in run(2, counted_by_fsdp, False):
        require_whole_steps(*found)


@pytest.mark.slow
def test_where_a_replica_evaluates_alone_all_ranks_count_the_same_steps() -> None:
    for some, all_behind, steps in run(4, counted_by_fsdp, True):
        assert (len(some), len(all_behind), steps) == (7, 7, 15)


def summed(replicas: bool, *specs: str) -> tuple[Tensor, Tensor]:
    """The sum of the means that arrived in so many steps of one gradient, and what it should be."""
    shape = (dist.get_world_size(), 1) if replicas else (1, dist.get_world_size())
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    model = fully_shard(nn.Linear(600, 2, bias=False), mesh=mesh)
    session = commpress.attach(model)
    assert session._auto is not None
    session._auto.search = Scripted(*specs)  # type: ignore[assignment]
    x = torch.randn(4, 600, generator=torch.Generator().manual_seed(dist.get_rank()))
    arrived = torch.zeros(2, 600)
    for _ in specs:
        model.zero_grad()
        model(x).sum().backward()
        arrived += model.weight.grad.full_tensor()  # type: ignore[union-attr, operator]
    bare = nn.Linear(600, 2, bias=False)
    bare(x).sum().backward()
    assert bare.weight.grad is not None
    dist.all_reduce(bare.weight.grad, dist.ReduceOp.AVG)
    return arrived, len(specs) * bare.weight.grad


@pytest.mark.parametrize(("world_size", "replicas"), [slow(2, False), (3, False), slow(3, True)])
def test_what_feedback_holds_arrives_when_the_spec_changes(world_size: int, replicas: bool) -> None:
    for arrived, wanted in run(world_size, summed, replicas, "int4", "int4", "int8", "int4", "none"):
        assert torch.allclose(arrived, wanted, rtol=1e-5, atol=1e-5)
    for arrived, wanted in run(world_size, summed, replicas, "int4", "int4"):
        assert not torch.allclose(arrived, wanted, rtol=1e-5, atol=1e-5)


def accumulated(every_time: bool) -> tuple[list[str], int]:
    """The specs that arrive, backward by backward, where two make a step; and the steps that the search has counted."""
    model = sharded()
    session = commpress.attach(model)
    auto = session._auto
    assert isinstance(auto, ShardedAuto)
    auto.search = Scripted(*["none", "int8"] * 4)  # type: ignore[assignment]
    specs = []
    for step in range(8):
        model.set_requires_gradient_sync(every_time or step % 2 == 1)
        loss_of(model, step).backward()
        specs.append(auto.search.spec)
    model.set_requires_gradient_sync(True)
    return specs, auto.search.steps


def test_a_step_ends_where_gradients_are_reduced() -> None:
    for specs, steps in run(2, accumulated, False):
        assert specs == ["none", "none", "int8", "int8"] * 2
        assert steps == 3  # the fourth goes on
    for specs, steps in run(2, accumulated, True):
        assert specs == ["none", "int8"] * 4
        assert steps == 7


def resumed(replicas: bool) -> tuple[str, str, bool]:
    """A state of a search that had come to int4 goes on anew, and what was held back arrives."""
    model, again, other = (by_two() if replicas else sharded() for _ in range(3))
    session = commpress.attach(model, parameters="auto")
    assert session._auto is not None
    session._auto.search = Scripted(*["int4"] * 5)  # type: ignore[assignment]
    trained(model, 3)
    state = session.state_dict()
    kept = [b["residual"] is not None and bool(b["residual"].any()) for m in state["memories"] for b in m]
    second, third = commpress.attach(again, parameters="auto"), commpress.attach(other)
    second.load_state_dict(state)
    refused = outcome(lambda: third.load_state_dict(state))
    trained(again, 1)  # by none, which sends it along
    left = [b["residual"] is not None for m in second.state_dict()["memories"] for b in m]
    return refused, second.report().spec, any(kept) and not any(left)


@pytest.mark.parametrize(("world_size", "replicas"), [(2, False), slow(4, True)])
def test_a_saved_state_goes_on_with_auto_and_looks_anew(world_size: int, replicas: bool) -> None:
    for refused, spec, arrived in run(world_size, resumed, replicas):
        assert "the saved state has auto 'gradients and parameters', this run has True" in refused
        assert spec == "auto: none, still looking"
        assert arrived


def beside_a_spec() -> tuple[str, str]:
    with by_clock(CLOCK.__getitem__, ShardedAuto):
        model = sharded()
        session = commpress.attach(model, parameters="bf16")
        trained(model, 60)
    return session.report().spec, str(session.receipt())


@pytest.mark.slow
def test_the_receipt_of_gradients_beside_a_spec_for_parameters_does_not_call_plain_what_is_not() -> None:
    for spec, said in run(2, beside_a_spec):
        assert spec == "gradients auto, parameters bf16; auto: int4"
        assert "auto, parameters bf16 (int4): a step takes 0.5000 s, with none in the place of auto 1.0000 s" in said


def on_two_meshes() -> Any:
    model = network()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    return fully_shard(model, mesh=init_device_mesh("cpu", (4,)))


def refusals() -> dict[str, str]:
    return {
        "meshes": outcome(lambda: commpress.attach(on_two_meshes())),
        "differ": outcome(lambda: commpress.attach(sharded(), ("int4", "auto", "int4", "int4")[dist.get_rank()])),
        "parameters differ": outcome(
            lambda: commpress.attach(sharded(), parameters=("none", "auto", "none", "none")[dist.get_rank()])
        ),
        "parameters alone": outcome(lambda: commpress.attach(sharded(), "int4", parameters="auto")),
        "budget": outcome(lambda: commpress.attach(sharded(), "auto(error=0)")),
        "no budget": outcome(lambda: commpress.attach(sharded(), "auto(error=0.3)")),
    }


def test_what_auto_cannot_do_is_refused_by_name_on_all_ranks() -> None:
    for got in run(4, refusals):
        assert "auto for modules on 2 meshes: no group of ranks can compare all of them; expected one" in got["meshes"]
        assert "rank 1 has" in got["differ"]
        assert "rank 1 has" in got["parameters differ"]
        assert "parameters: auto beside gradients by int4: one search decides for both" in got["parameters alone"]
        assert "expected an error above 0" in got["budget"]
        assert "auto(error=0.3): the error of sharded means is not measured" in got["no budget"]


def test_who_decides_for_what() -> None:
    assert decides("auto", None) == decides("auto", "int8") == (True, False)
    assert decides("auto", "auto") == (True, True)
    assert decides("int4", "int8") == decides({"*": "auto"}, None) == (False, False)
    with pytest.raises(ValueError, match=r"parameters: auto\(error=0.3\): the error"):
        decides("auto", "auto(error=0.3)")


def two_forwards_then_two_backwards(kept: bool) -> list[str]:
    """The specs after each of some forwards, of which two are outstanding at a time, or one is never used."""
    model = sharded()
    session = commpress.attach(model, parameters="auto")
    auto = session._auto
    assert isinstance(auto, ShardedAuto)
    auto.search = Scripted("none", *["none, parameters int8"] * 20)  # type: ignore[assignment]
    specs, first = [], loss_of(model, 0)
    second = loss_of(model, 1)
    first.backward()  # which makes a step due, while the second backward is to come
    for step in range(2, 12):
        loss = loss_of(model, step)
        specs.append(auto.search.spec)
        loss.backward()
        if step == 3 and not kept:
            second.backward()
    return specs


def test_a_step_begins_where_no_backward_is_to_come() -> None:
    for specs in run(2, two_forwards_then_two_backwards, False):
        assert specs == ["none", "none", *["none, parameters int8"] * 8]
    for specs in run(2, two_forwards_then_two_backwards, True):  # the output of a forward is never used
        assert specs == [*["none"] * PATIENCE, *["none, parameters int8"] * (10 - PATIENCE)]


def loops_of_bfloat16() -> tuple[Any, Any]:
    """What was encoded when a model that computes and reduces in bfloat16 was attached, and what while it is trained."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = fully_shard(nn.Linear(600, 20, bias=False), mp_policy=policy)
    with encoded() as ahead:
        session = commpress.attach(model, parameters="auto")
    assert session._auto is not None
    specs = ("none", "int4, parameters int8", "int8, parameters bf16", "none")
    session._auto.search = Scripted(*specs)  # type: ignore[assignment]
    with encoded() as used:
        for _ in specs:
            model(torch.randn(4, 600)).sum().backward()
    return ahead, used


def test_no_loop_is_compiled_when_a_spec_has_its_turn() -> None:
    for ahead, used in run(2, loops_of_bfloat16):
        assert {("int4", torch.bfloat16, True), ("int8", torch.bfloat16, False)} <= used <= ahead


def saved(steps: int) -> dict[str, Any]:
    model = sharded()
    session = commpress.attach(model)
    for step in range(2 * steps):  # two forwards a step
        model.set_requires_gradient_sync(step % 2 == 1)
        loss_of(model, step).backward()
    return dict(session.state_dict())


def gone_on(states: list[dict[str, Any]]) -> list[Any]:
    """The number of steps in a state that is saved after a restored one, and after one more step."""
    session = commpress.attach(model := sharded())
    session.load_state_dict(states[dist.get_rank()])
    found = [session.state_dict()["search"]["step"]]
    loss_of(model, 0).backward()
    found.append(session.state_dict()["search"]["step"])
    session.load_state_dict(session.state_dict())  # back to itself: the run keeps its count
    return [*found, session.state_dict()["search"]["step"]]


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_steps_are_counted_on_any_number_of_ranks(ranks: int) -> None:
    states = run(ranks, saved, 3)
    assert [state["search"]["step"] for state in states] == [3] * ranks
    assert run(ranks, gone_on, states) == [[3, 4, 4]] * ranks
