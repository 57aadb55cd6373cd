"""What a parameter is to a session: not what DDP ignores or delays, nothing that is named by a wrapper, and one if tied."""

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow, slowly
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, loss_of, network, parameters_of, same, sgd, train

import commpress
from commpress.hooks.parameters import exchanged_parameters

# --- what DDP ignores or delays ----------------------------------------------------------------------------------


def ignoring(names: list[str], model: nn.Module | None = None) -> DistributedDataParallel:
    """A network of which DDP ignores these parameters and buffers."""
    model = model or network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS)


def step_ignoring(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step in which the user averages what DDP ignores."""
    optimizer.zero_grad()
    loss_of(ddp, step).backward()
    for name, p in ddp.module.named_parameters():
        if name in ddp.parameters_to_ignore:
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    optimizer.step()


def ignored() -> dict[str, Any]:
    """Trainings that are saved in the middle, and that are not, with the last layer ignored."""
    names, got = ["4.weight", "4.bias"], {}
    for spec in ("none", "int4"):
        whole = ignoring(names)
        session, optimizer = commpress.attach(whole, spec), sgd(whole)
        for step in range(4):
            step_ignoring(whole, optimizer, step)
        first = ignoring(names)
        saved, stopped = commpress.attach(first, spec), sgd(first)
        for step in range(2):
            step_ignoring(first, stopped, step)
        second = ignoring(names)
        second.load_state_dict(first.state_dict())
        again, goes_on = commpress.attach(second, spec), sgd(second)
        goes_on.load_state_dict(stopped.state_dict())
        again.load_state_dict(saved.state_dict())
        for step in range(2, 4):
            step_ignoring(second, goes_on, step)
        got[spec] = (parameters_of(whole), parameters_of(second), session.report().to_dict())
        got["said"] = outcome(lambda session=session: session.set_masks({"4.bias": torch.ones(10, dtype=torch.bool)}))
        got["names"] = list(exchanged_parameters(whole))
    return got


def test_what_ddp_ignores_is_not_the_sessions() -> None:
    values = sum(p.numel() for name, p in network().named_parameters() if not name.startswith("4."))
    for got in run(2, ignored):
        assert got["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        for spec in ("none", "int4"):
            whole, resumed, report = got[spec]
            assert same(whole, resumed)
            assert report["dense_bytes"] == 4 * 4 * values
        assert "mask of '4.bias': 10 values, the session has no such parameter" in got["said"]


def ignored_by_its_bare_name() -> tuple[list[str], list[str]]:
    """DDP looks for a root's own parameter as ".scale", and so does not ignore what is given as "scale"."""
    model = network()
    model.scale = nn.Parameter(torch.ones(300))
    ddp = ignoring(["scale", "0.bias"], model)
    session = commpress.attach(ddp, "int4")
    (loss_of(ddp, 0) + 0 * model.scale.sum()).backward()
    saved = [name for bucket in session.state_dict()["memories"][0] for name, _ in bucket["segments"]]
    session.load_state_dict(session.state_dict())
    return list(exchanged_parameters(ddp)), sorted(saved)


def test_what_ddp_exchanges_all_the_same_is_the_sessions() -> None:
    for names, saved in run(2, ignored_by_its_bare_name):
        assert "scale" in names
        assert "0.bias" not in names
        assert saved == sorted(names)


def sparse_ignored() -> str:
    """A sparse embedding is refused, unless DDP ignores it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rest = nn.Embedding(8, 32, sparse=True), network()

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(x + self.table(torch.zeros(len(x), dtype=torch.int64)))

    ddp = ignoring(["table.weight"], Model())
    commpress.attach(ddp, "int4")
    loss_of(ddp, 0).backward()
    assert ddp.module.table.weight.grad.is_sparse
    return outcome(lambda: commpress.attach(DistributedDataParallel(Model()), "int4"))


def test_a_sparse_embedding_that_ddp_ignores_is_no_matter() -> None:
    for said in run(2, sparse_ignored):
        assert said.startswith("TypeError: table: Embedding(sparse=True)")


def ignored_buffers() -> tuple[list[float], int]:
    """Buffers that DDP ignores are each rank's own; the others are rank 0's."""
    model = network()
    model.register_buffer("ours", torch.full((500,), 1.0 + dist.get_rank()))
    model.register_buffer("mine", torch.full((700,), 1.0 + dist.get_rank()))
    ddp = ignoring(["mine"], model)
    session = commpress.attach(ddp, "int4", buffers="int8")
    ddp(torch.zeros(1, 32))
    (row,) = [row for row in session.report().rows if row.role == "buffers"]
    return [float(model.ours[0]), float(model.mine[0])], row.values


def test_ignored_buffers_do_not_travel() -> None:
    assert run(2, ignored_buffers) == [([1.0, 1.0], 500), ([1.0, 2.0], 500)]


def local_ignored() -> list[Tensor]:
    """Two workers of two ranks: what their DDP ignores is nobody's but the rank's."""
    inner, outer_group = (dist.new_subgroups_by_enumeration(ranks)[0] for ranks in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]))
    model = network()
    model.own = nn.Parameter(torch.full((40,), float(dist.get_rank())))
    model.skip = nn.Identity()
    model.skip.weight = nn.Parameter(torch.full((3, 3), float(dist.get_rank())))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["own", ".own", "skip.weight"])
    ddp = DistributedDataParallel(model, process_group=inner, find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    commpress.local_sgd(ddp, optimizer, "int8", every=1, group=outer_group)
    train(ddp, range(2), optimizer=optimizer)
    commpress.broadcast_parameters(ddp, "int8", group=inner)
    return [p.detach() for p in (model.own, model.skip.weight, model[0].weight)]


def test_local_steps_and_broadcasts_leave_alone_what_ddp_ignores() -> None:
    results = run(4, local_ignored)
    for rank, (own, skipped, shared) in enumerate(results):
        assert bool((own == rank).all())
        assert bool((skipped == rank).all())
        assert torch.equal(shared, results[0][2])


def delayed(spec: str) -> dict[str, Any]:
    """The last layer is delayed: DDP sends its gradient when that of the first layer is there. With accumulation."""
    got: dict[str, Any] = {}
    for way in ("plain", spec):
        model = network()
        late = [(f"4.{name}", p) for name, p in model[4].named_parameters()]
        ddp = DistributedDataParallel(
            model, delay_all_reduce_named_params=late, param_to_hook_all_reduce=model[0].weight
        )
        session = None if way == "plain" else commpress.attach(ddp, way)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(ddp, step).backward()
            dist.barrier()  # DDP does not wait for what it delays
            time.sleep(0.05)
            optimizer.step()
        if session is not None:
            session.load_state_dict(session.state_dict())
            got["report"] = session.report().to_dict()
        got[way] = parameters_of(ddp)
    return got


def kept_alive(delays: bool, attached: bool) -> bool:
    """Whether a DDP module that was trained is still there once nobody but torch holds it."""
    model = network()
    late: dict[str, Any] = {"delay_all_reduce_named_params": [("module.4.weight", model[4].weight)]}
    late["param_to_hook_all_reduce"] = model[0].weight
    ddp = DistributedDataParallel(model, **(late if delays else {}))
    if attached:
        commpress.attach(ddp, "int4")
    train(ddp, range(1))
    there = weakref.ref(ddp)
    del ddp, model, late
    gc.collect()
    return there() is not None


@pytest.mark.parametrize("attached", [False, True])
def test_torch_alone_keeps_a_module_that_delays(attached: bool) -> None:
    assert run(2, kept_alive, False, attached) == [False, False]
    assert run(2, kept_alive, True, attached, fresh=True) == [True, True]


def test_what_ddp_delays_is_counted_and_not_compressed() -> None:
    for got in run(2, delayed, "none", fresh=True):  # torch keeps such a module, and so its session, to the end
        assert same(got["plain"], got["none"])
    late = sum(p.numel() for p in network()[4].parameters())
    for got in run(2, delayed, "int4", fresh=True):
        (row,) = [row for row in got["report"]["rows"] if "delayed" in row["reason"]]
        assert (row["values"], row["steps"], row["sent_bytes"], row["spec"]) == (late, 3, 3 * 4 * late, "none")
        values = sum(p.numel() for p in network().parameters())
        assert got["report"]["dense_bytes"] == 3 * 4 * values


def nothing_left() -> list[str]:
    """All that is trained is delayed, on one rank alone: DDP has no hook there."""
    model = network()
    everything = list(model.named_parameters())
    model.still = nn.Identity()
    model.still.weight = nn.Parameter(torch.ones(3), requires_grad=False)
    ddp = DistributedDataParallel(
        model, delay_all_reduce_named_params=everything, param_to_hook_all_reduce=model[0].weight
    )
    other = DistributedDataParallel(network())
    return [outcome(lambda: commpress.attach((ddp, other)[dist.get_rank()], "int4"))]


def test_a_model_of_which_all_is_delayed_is_refused_on_all_ranks() -> None:
    (one,), (other,) = run(2, nothing_left)
    assert "ignores or delays every trained parameter" in one
    assert other == one.replace("ValueError: ", "ValueError: rank 0: ")


def frozen_since() -> bool:
    """A layer that is frozen between wrap and attach is in DDP's buckets: its state loads."""
    ddp = DistributedDataParallel(network(), find_unused_parameters=True)
    ddp.module[0].requires_grad_(False)
    session = commpress.attach(ddp, "int4")
    loss_of(ddp, 0).backward()
    state = session.state_dict()
    session.load_state_dict(state)
    return {name for bucket in state["memories"][0] for name, _ in bucket["segments"]} == set(
        dict(ddp.module.named_parameters())
    )


def test_a_layer_frozen_after_the_wrap_keeps_its_name() -> None:
    assert all(run(2, frozen_since))


# --- names -------------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]  # the bits of what is not compiled


def inner_compiled(model: nn.Module) -> nn.Module:
    """A layer in the middle is compiled, and the last one's activations are checkpointed."""
    model[2] = compiled(model[2])
    model[4] = checkpoint_wrapper(model[4])
    return model


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": DistributedDataParallel,
    "of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled": lambda model: compiled(DistributedDataParallel(model)),
    "twice compiled": lambda model: compiled(DistributedDataParallel(compiled(model))),
    "inside": lambda model: DistributedDataParallel(inner_compiled(model)),
    "checkpointed": lambda model: DistributedDataParallel(checkpoint_wrapper(model)),
}


def bare(wrapped: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in wrapped.parameters()]


def moves_between(way: str) -> dict[str, bool]:
    """A training of 4 steps that is saved after 2 in a wrapping and goes on in another one, against one that is not saved."""
    same_as: dict[str, bool] = {}
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    for first, second in (("bare", way), (way, "bare")):
        whole = WRAPS["bare"](network())
        session = commpress.attach(whole, "int4")
        session.set_masks({"2.weight": mask})
        train(whole, range(4), optimizer=torch.optim.SGD(whole.parameters(), lr=0.1))
        one = WRAPS[first](network())
        saved = commpress.attach(one, "int4")
        masked = next(name for name, p in one.named_parameters() if p.shape == (64, 64))
        saved.set_masks(
            {masked.removeprefix("_orig_mod.").removeprefix("module."): mask}
        )  # by the name that the module has
        train(one, range(2), optimizer=torch.optim.SGD(one.parameters(), lr=0.1))
        other = WRAPS[second](network())
        for p, q in zip(other.parameters(), one.parameters(), strict=True):
            p.data.copy_(q)
        again = commpress.attach(other, "int4")
        again.set_masks({"2.weight": mask})
        again.load_state_dict(saved.state_dict())
        train(other, range(2, 4), optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
        same_as[f"{first} to {second}"] = same(bare(whole), bare(other))
    return same_as


@pytest.mark.parametrize("way", slowly(list(WRAPS)[1:], quick=("of compiled", "inside", "checkpointed")))
def test_a_state_loads_whatever_wraps_the_model(way: str) -> None:
    for same_as in run(2, moves_between, way, timeout=120):
        assert all(same_as.values()), same_as


def saved_before() -> bool:
    """A state whose names have a wrapper's prefix, as version 0.1.0 saved it, loads."""
    ddp = DistributedDataParallel(network())
    session = commpress.attach(ddp, "int4")
    loss_of(ddp, 0).backward()
    state = session.state_dict()
    for bucket in state["memories"][0]:
        bucket["segments"] = [[f"_orig_mod.{name}", n] for name, n in bucket["segments"]]
    session.load_state_dict(state)
    names = {name for bucket in session.state_dict()["memories"][0] for name, _ in bucket["segments"]}
    return names == set(dict(ddp.module.named_parameters()))


def test_a_state_of_a_compiled_model_that_was_saved_with_its_prefix_loads() -> None:
    assert all(run(2, saved_before))


def sharded(way: str) -> nn.Module:
    """A network whose layers are sharded each for itself, compiled or not."""
    model = network()
    for place in (0, 2, 4):
        if way == "inside":
            model[place] = compiled(model[place])
        elif way == "checkpointed":
            model[place] = checkpoint_wrapper(model[place])
        fully_shard(model[place])
    fully_shard(model)
    return compiled(model) if way == "compiled" else model


def shards_move(way: str) -> list[dict[str, int]]:
    """What sessions of a sharded model call its parameters, and a state that goes from one to the other."""
    found = []
    states = []
    for kind in ("bare", way):
        model = sharded(kind)
        session = commpress.attach(model, gradients="int4", parameters="int8")
        train(model, range(2), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        states.append(session.state_dict())
        found.append({name: n for bucket in states[-1]["memories"][0] for name, n in bucket["segments"]})
        session.load_state_dict(states[0])
        whole_masks = {
            name: torch.ones(p.shape, dtype=torch.bool)
            for name, p in model.named_parameters()
            if kind == "bare" or not name.startswith("_orig_mod")
        }
        session.set_masks(whole_masks)
    return found


@pytest.mark.parametrize("way", ["compiled", slow("inside"), "checkpointed"])
def test_a_sharded_models_names_are_bare(way: str) -> None:
    for plain, wrapped in run(2, shards_move, way, timeout=120):
        assert plain == wrapped
        assert set(plain) == {f"{name}[{r}]" for name, _ in network().named_parameters() for r in range(2)}


def local_moves() -> tuple[list[Tensor], list[Tensor]]:
    """Local steps of a compiled model, saved and gone on with in a bare one; broadcasts of one and the other."""
    one = compiled(network())
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    outer = commpress.diloco(one, optimizer, "int8", every=2)
    train(one, range(2), optimizer=optimizer)
    other = network()
    for p, q in zip(other.parameters(), one.parameters(), strict=True):
        p.data.copy_(q)
    goes_on = torch.optim.SGD(other.parameters(), lr=0.1)
    commpress.diloco(other, goes_on, "int8", every=2).load_state_dict(outer.state_dict())
    train(one, range(2, 4), optimizer=optimizer)
    train(other, range(2, 4), optimizer=goes_on)
    commpress.broadcast_parameters(compiled(other), "int8")
    report = commpress.broadcast_parameters(DistributedDataParallel(other), "int8")
    assert report.steps == 2  # the same broadcasts
    return bare(one), bare(other)


def test_local_steps_and_broadcasts_of_a_compiled_model() -> None:
    for one, other in run(2, local_moves):
        assert same(one, other)


# --- tied parameters ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is read at the start and written at the end, as language models have it."""

    def __init__(self, last_first: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            if last_first:
                self.head = nn.Linear(32, 10, bias=False)
            self.body = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
            self.table = nn.Embedding(10, 32)
            if not last_first:
                self.head = nn.Linear(32, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, :10].argmax(1)
        return self.head(self.body(x + self.table(tokens)))


def tied_ddp(spec: str, last_first: bool) -> dict[str, Any]:
    """Plain, and by a spec with a state that is saved and restored."""
    plain = DistributedDataParallel(Tied(last_first))
    train(plain, range(4), optimizer=torch.optim.SGD(plain.parameters(), lr=0.1))
    ddp = DistributedDataParallel(compiled(Tied(last_first)))
    session = commpress.attach(ddp, spec)
    train(ddp, range(2), optimizer=torch.optim.SGD(ddp.parameters(), lr=0.1))
    again = DistributedDataParallel(Tied(last_first))
    for p, q in zip(again.parameters(), ddp.parameters(), strict=True):
        p.data.copy_(q)
    restored = commpress.attach(again, spec)
    restored.load_state_dict(session.state_dict())
    train(again, range(2, 4), optimizer=torch.optim.SGD(again.parameters(), lr=0.1))
    train(ddp, range(2, 4), optimizer=torch.optim.SGD(ddp.parameters(), lr=0.1))
    names = {name for bucket in session.state_dict()["memories"][0] for name, _ in bucket["segments"]}
    return {"plain": parameters_of(plain), "ours": bare(ddp), "restored": parameters_of(again), "names": names}


@pytest.mark.parametrize("last_first", [False, True])
def test_tied_parameters_are_one_under_ddp(last_first: bool) -> None:
    first = "head.weight" if last_first else "table.weight"
    for spec in ("none", "int4"):
        for got in run(2, tied_ddp, spec, last_first):
            assert same(got["ours"], got["restored"])
            assert same(got["plain"], got["ours"]) or spec != "none"
            assert got["names"] == {first, "body.0.weight", "body.0.bias"}


def tied_elsewhere(last_first: bool) -> dict[str, Any]:
    """Tied parameters under FSDP2, local steps, and broadcasts."""
    plain, none = (Tied(last_first) for _ in range(2))
    got: dict[str, Any] = {}
    for model in (plain, none):
        fully_shard(model.body)
        fully_shard(model)
    session = commpress.attach(none, gradients="none")
    for model in (plain, none):
        train(model, range(2), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        model.reshard()  # type: ignore[operator]
    got["fsdp"] = [[p.full_tensor().detach() for p in model.parameters()] for model in (plain, none)]  # type: ignore[attr-defined]
    coded = Tied(last_first)
    fully_shard(coded)
    session = commpress.attach(coded, gradients="int4")
    loss_of(coded, 0).backward()
    got["names"] = {name for bucket in session.state_dict()["memories"][0] for name, _ in bucket["segments"]}
    torch.manual_seed(dist.get_rank())
    local = Tied(last_first)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    outer = commpress.local_sgd(local, optimizer, "int8", every=2)
    train(local, range(4), optimizer=optimizer)
    outer.load_state_dict(outer.state_dict())
    commpress.broadcast_parameters(local, "int8")
    assert local.head.weight is local.table.weight
    got["local"] = parameters_of(local)
    return got


@pytest.mark.parametrize("last_first", [False, True])
def test_tied_parameters_are_one_under_other_hooks(last_first: bool) -> None:
    first = "head.weight" if last_first else "table.weight"
    one, other = run(2, tied_elsewhere, last_first)
    for got in (one, other):
        plain, none = got["fsdp"]
        assert same(plain, none)
        assert {name.partition("[")[0] for name in got["names"]} == {first, "body.0.weight", "body.0.bias"}
    assert same(one["local"], other["local"])
