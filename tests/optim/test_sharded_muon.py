"""EF21Muon under FSDP2: as under DDP where nothing is left out, EF21 in both directions once something is, and the memory."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from clocked import by_clock
from ranks import Died, outcome, run
from references import ShardedEf21Muon
from scripted import Scripted
from tiers import slow
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from training import CLASSES, INPUTS, WIDTH, exact_products, finite, loss_of, network, same

import commpress
from commpress.comm.codecs import parse
from commpress.comm.sharded_auto import ShardedAuto
from commpress.optim import EF21Muon, OneBitAdamW
from commpress.optim.sharded_muon import SENT, UPDATE, Matrix, owners

LR = 0.01
STEPS = 8


class Odd(nn.Module):
    """A layer used twice, a convolution, a matrix of two rows (some ranks of three have none), and others of uneven rows."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.middle, self.again = nn.Linear(INPUTS, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(2))
            self.convolution, self.narrow = nn.Conv1d(4, 5, 3, padding=1), nn.Linear(WIDTH, 2)
            self.last = nn.Linear(82, CLASSES)
        self.again.weight = self.middle.weight
        self.narrow.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(self.middle(self.first(x).tanh()).tanh()).tanh()
        wide = self.convolution(h.view(-1, 4, 16)).flatten(1).tanh()
        y: Tensor = self.last(torch.cat([wide, self.narrow(h)], dim=1))
        return y


def sharded(model: Any = None, **settings: Any) -> Any:
    """A model whose first layer is a unit of its own."""
    model = network() if model is None else model
    fully_shard(model.first if isinstance(model, Odd) else model[0], **settings)
    return fully_shard(model, **settings)


def attached(model: Any, spec: str, held: Any = None, **settings: Any) -> tuple[EF21Muon, commpress.Session]:
    """A model's optimizer, of all of it or of the groups `held`, and its session."""
    optimizer = EF21Muon(
        model if held is None else held,
        **{"lr": LR, "momentum": 0.95, "nesterov": True, "others_spec": "none", **settings},
    )
    return optimizer, commpress.attach(model, spec, optimizer=optimizer)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range, accumulate: int = 1, clip: float = 0.0) -> None:
    for step in steps:
        optimizer.zero_grad()
        for part in range(accumulate):
            last = part == accumulate - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last
            else:
                model.set_requires_gradient_sync(last)
            (loss_of(model, step * accumulate + part) / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def whole(model: nn.Module) -> list[Tensor]:
    """All parameters. Collective where they are sharded."""
    return [p.detach().clone() if type(p) is nn.Parameter else p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def distance(one: list[Tensor], other: list[Tensor], start: nn.Module) -> float:
    """How far the parameters of one training are from the other's, as a share of how far that one went."""
    a, b, c = (torch.cat([t.detach().reshape(-1) for t in tensors]) for tensors in (one, other, start.parameters()))
    return float((a - b).norm() / (b - c).norm())


# --- as under DDP ------------------------------------------------------------------------------------------------

EXACT: dict[str, dict[str, Any]] = {
    "odd": {},
    "without nesterov": {"optimizer": {"nesterov": False, "momentum": 0.8}},
    "frozen": {"frozen": True},
    "by columns": {"shard": {"shard_placement_fn": lambda p: Shard(1 if p.dim() == 2 else 0)}},
    "accumulated": {"accumulate": 2},
    "sharded anew": {"shard": {"reshard_after_forward": 2}},
}


@exact_products
def beside_ddp(name: str) -> tuple[float, list[Tensor]]:
    """How far a training in which nothing is left out is from that of DDP."""
    way = EXACT[name]
    frozen, settings, accumulate = way.get("frozen", False), way.get("optimizer", {}), way.get("accumulate", 1)
    model, ddp = sharded(Odd(frozen), **way.get("shard", {})), DistributedDataParallel(Odd(frozen))
    for one in (model, ddp):
        optimizer, _ = attached(one, "none", **settings)
        train(one, optimizer, range(STEPS), accumulate)
    return distance(whole(model), whole(ddp), Odd()), whole(model)


@pytest.mark.parametrize(("name", "world_size"), [
    ("odd", 3), ("odd", 1), slow("odd", 2), slow("without nesterov", 2), ("frozen", 2), slow("by columns", 2),
    slow("accumulated", 2), slow("sharded anew", 4),
])  # fmt: skip
def test_exact_it_steps_as_under_ddp(name: str, world_size: int) -> None:
    ranks = run(world_size, beside_ddp, name)
    for apart, parameters in ranks:
        assert apart < 1e-4
        assert same(parameters, ranks[0][1])


# --- the spec is searched for ------------------------------------------------------------------------------------


def by_script(specs: list[str]) -> dict[str, Any]:
    """What is left of the momenta that owners do not know, and the rows of the report, after steps by these specs."""
    model = sharded(Odd())
    optimizer, session = attached(model, "auto", others_spec="int8")
    assert session._auto is not None
    session._auto.search = Scripted(*specs)  # type: ignore[assignment]
    train(model, optimizer, range(len(specs)))
    states = [state for state in optimizer.state.values() if SENT in state]
    ahead = [(state["momentum_buffer"] - state[SENT]).to_local().norm() for state in states]
    report = session.report()
    return {
        "ahead": float(sum(ahead) / sum(state["momentum_buffer"].to_local().norm() for state in states)),
        "rows": {(row.role, row.spec) for row in report.rows if row.role == "updates"},
        "gradients": {row.spec for row in report.rows if row.role == "gradients"},
        "spec": report.spec,
        "parameters": whole(model),
    }


@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_a_spec_that_changes_leaves_nothing_out(world_size: int) -> None:
    ranks = run(world_size, by_script, ["none", "none", *["int8"] * 5])
    assert ranks[0]["spec"] == "momentum auto, gradients int8, parameters none; auto: int8, still looking"
    assert ranks[0]["rows"] == {("updates", spec) for spec in ("none", "int8")}
    assert ranks[0]["gradients"] <= {"int8", "none"}
    assert max(of["ahead"] for of in ranks) > 1e-4
    assert all(same(of["parameters"], ranks[0]["parameters"]) for of in ranks)
    again = run(world_size, by_script, ["none", "none", *["int8"] * 5, "none"])
    assert max(of["ahead"] for of in again) < 1e-6


def by_clock_of(seconds: dict[str, float]) -> tuple[str, str, list[str]]:
    """What auto has chosen by clocks that show these seconds, the receipt, and the specs of all choices."""
    model = sharded()
    with by_clock(lambda name: seconds[name], ShardedAuto):
        optimizer, session = attached(model, "auto", others_spec="int8")
        train(model, optimizer, range(60))
    return session.report().spec, session.explain(), [choice.spec for choice in session.report().choices]


@pytest.mark.parametrize(
    ("seconds", "chosen"), [({"none": 1.0, "int8": 0.5}, "int8"), slow({"none": 1.0, "int8": 1.5}, "none")]
)
def test_auto_chooses_what_is_faster(seconds: dict[str, float], chosen: str) -> None:
    for spec, explained, choices in run(2, by_clock_of, seconds):
        assert choices == [chosen]
        assert spec.endswith(f"auto: {chosen}")
        assert "int8" in explained


@exact_products
def against_reference(spec: str) -> tuple[float, list[Tensor]]:
    W = dist.get_world_size()
    model, reference = sharded(), network()
    optimizer, _ = attached(model, spec)
    # in the order of FSDP's units, of which the root is the first; by work "2.weight" is the largest, and "0.weight" the next
    chosen = {"2.weight": 0, "4.weight": W - 1, "0.weight": 1}
    other = ShardedEf21Muon(reference, chosen, W, parse(spec), LR)
    train(model, optimizer, range(STEPS))
    for step in range(STEPS):
        other.step(step)
    return distance(whole(model), list(reference.parameters()), network()), whole(model)


@pytest.mark.parametrize(("spec", "world_size"), [("sign", 3), ("int4", 2), slow("topk(0.1)|sign", 2)])
def test_it_is_ef21_in_both_directions(spec: str, world_size: int) -> None:
    """A few values are so small that rounding decides on their code."""
    ranks = run(world_size, against_reference, spec)
    for apart, parameters in ranks:
        assert apart < 0.02
        assert same(parameters, ranks[0][1])


def losses(spec: str, others: str, under_ddp: bool, lr: float = LR) -> float:
    model: Any = DistributedDataParallel(network()) if under_ddp else sharded()
    optimizer, _ = attached(model, spec, others_spec=others, lr=lr)
    train(model, optimizer, range(60))
    with torch.no_grad():
        return sum(float(loss_of(model, 1000 + step, 0)) for step in range(16)) / 16


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["int4", "sign"])
def test_it_trains_as_far_as_under_ddp(spec: str) -> None:
    exact, untrained = (run(2, losses, "none", "none", True, lr)[0] for lr in (LR, 0.0))
    coded = run(2, losses, spec, "int8", False)[0]
    assert coded - exact < 0.05 * (untrained - exact)


# --- what each rank holds ----------------------------------------------------------------------------------------


def held() -> dict[str, Any]:
    """After some steps of `Odd`: whether both ends know the same bits, values that this rank holds, and bytes by role."""
    model = sharded(Odd())
    optimizer, session = attached(model, "sign", others_spec="int8")
    train(model, optimizer, range(STEPS))
    steps = optimizer._sharded
    assert steps is not None
    alike = []
    for name, p in model.named_parameters():
        if "sent_momentum" in optimizer.state[p]:
            ends = [optimizer.state[p][key].full_tensor() for key in ("sent_momentum", "update")]
            alike.append(name not in steps._known or same(ends, list(steps._known[name])))
    shards = sum(p.to_local().numel() for p in model.parameters())
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    return {
        "alike": alike,
        "shards": shards,
        "state": sum(x.to_local().numel() if hasattr(x, "to_local") else x.numel() for x in tensors),
        "owned": {name: known.numel() for name, (known, _) in steps._known.items()},
        "feedback": [m.tensors() for c in session.collectives for m in c.feedback.memories.values()],
        "rows": [(row.role, row.spec, row.values, row.steps, row.dense_bytes) for row in session.report().rows],
        "spec": session.report().spec,
    }


def test_nobody_holds_more_than_its_shard_and_what_it_owns() -> None:
    ranks = run(3, held)
    sizes = {"first.weight": WIDTH * INPUTS, "middle.weight": WIDTH * WIDTH, "convolution.weight": 60}
    sizes |= {"narrow.weight": 2 * WIDTH, "last.weight": CLASSES * 82}
    owned = {name: n for got in ranks for name, n in got["owned"].items()}
    assert owned == sizes
    assert sum(len(got["owned"]) for got in ranks) == len(sizes)
    for got in ranks:
        assert got["alike"] == [True] * len(sizes)
        assert got["state"] <= 3 * got["shards"] + 20  # and a counter for each of the others
        assert not any(got["feedback"])
        updates = {spec: (values, steps) for role, spec, values, steps, _ in got["rows"] if role == "updates"}
        assert updates == {spec: (sum(sizes.values()), STEPS) for spec in ("sign", "int8")}
        assert got["spec"] == "momentum sign, gradients int8, parameters none"
    to_owners, back = (
        sum(row[4] for got in ranks for row in got["rows"] if row[:2] == ("updates", spec)) for spec in ("sign", "int8")
    )
    assert to_owners == back > 0  # all that goes comes back


def test_owners_have_about_the_same_work() -> None:
    shapes = {"a": (10, 10), "b": (40, 10), "c": (10, 10), "d": (10, 10), "e": (10, 10)}
    matrices = [Matrix(name, shape, shape, 0, (), name) for name, shape in shapes.items()]
    assert owners(matrices, 2) == {"b": 0, "a": 1, "c": 1, "d": 1, "e": 1}
    assert owners(matrices, 1) == dict.fromkeys("abcde", 0)


@exact_products
def clipped() -> list[float]:
    """How far `max_norm` is from torch's clipping of the mean gradient, and both from none."""
    found = []
    for settings, clip in (({"max_norm": 0.05}, 0.0), ({}, 0.05), ({}, 0.0)):
        model = sharded()
        optimizer, _ = attached(model, "none", momentum=0.5, eps=1e-2, **settings)
        train(model, optimizer, range(4), clip=clip)
        found.append(whole(model))
    return [distance(found[0], found[1], network()), distance(found[0], found[2], network())]


def test_max_norm_is_of_the_mean_gradient() -> None:
    for as_torch, as_none in run(2, clipped):
        assert as_torch < 1e-4
        assert as_none > 1e-3


# --- checkpoints -------------------------------------------------------------------------------------------------


def saved(folder: str, steps: int, spec: str = "sign") -> None:
    """Train, and save."""
    model = sharded(Odd())
    optimizer, session = attached(model, spec, others_spec="int8")
    train(model, optimizer, range(steps))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "commpress": session}, checkpoint_id=folder)


def loaded(folder: str, spec: str = "sign") -> tuple[Any, EF21Muon]:
    """A new model and optimizer with what was saved."""
    with torch.random.fork_rng():
        model = sharded(Odd())
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer, session = attached(model, spec, others_spec="int8", lr=0.5)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments, "commpress": session}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return model, optimizer


def states(model: nn.Module, optimizer: EF21Muon) -> list[Tensor]:
    """All that is kept of all parameters. Collective."""
    kept = [optimizer.state[p][key] for p in model.parameters() for key in sorted(optimizer.state[p])]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in kept]


def resumed(folder: str, spec: str) -> tuple[list[Tensor], list[Tensor]]:
    """Six steps unbroken; three steps, a checkpoint on disk, and three more by new objects."""
    model = sharded(Odd())
    optimizer, _ = attached(model, spec, others_spec="int8")
    train(model, optimizer, range(6))
    unbroken = [*whole(model), *states(model, optimizer)]
    saved(folder, 3, spec)
    model, optimizer = loaded(folder, spec)
    train(model, optimizer, range(3, 6))
    return unbroken, [*whole(model), *states(model, optimizer)]


@pytest.mark.parametrize(("spec", "world_size"), [("sign", 2), slow("sign", 3), slow("auto", 2)])
def test_a_resumed_training_goes_on_bit_for_bit(spec: str, world_size: int, tmp_path: Path) -> None:
    """By auto, too, whose first steps are plain ones."""
    for unbroken, pieced in run(world_size, resumed, str(tmp_path), spec):
        assert same(unbroken, pieced)


def kept(folder: str) -> tuple[list[Tensor], list[Tensor], bool]:
    """What a checkpoint brings back, the parameters a step later, and whether owners then know what all rows' ranks sent."""
    model, optimizer = loaded(folder)
    before = [*whole(model), *states(model, optimizer)]
    train(model, optimizer, range(3, 4))
    assert optimizer._sharded is not None
    agree = []
    for name, p in model.named_parameters():
        ends = [optimizer.state[p][key].full_tensor() for key in (SENT, UPDATE) if key in optimizer.state[p]]
        agree += [torch.equal(*pair) for pair in zip(ends, optimizer._sharded._known.get(name, ()), strict=False)]
    return before, whole(model), all(agree) and bool(agree)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_all_that_was_kept(tmp_path: Path) -> None:
    run(3, saved, str(tmp_path), 3)
    ranks = run(2, kept, str(tmp_path))
    others = run(3, kept, str(tmp_path))
    for before, after, owners_know in ranks:
        assert owners_know
        assert same(before, others[0][0])
        assert same(after, ranks[0][1])
        assert finite(after)
        assert not same(after, before[: len(after)])


# --- what goes wrong ---------------------------------------------------------------------------------------------


def died(rank: int) -> str:
    """Training while rank `rank` ends before it steps."""
    model = sharded()
    optimizer, _ = attached(model, "sign")
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    if dist.get_rank() == rank:
        os._exit(3)
    return outcome(optimizer.step)


def test_a_rank_that_dies_ends_the_others() -> None:
    for rank, text in enumerate(run(3, died, 1, fresh=True)):
        if rank == 1:
            assert isinstance(text, Died)
        else:
            assert text.startswith("ExchangeError: commpress: rank 1 (")


def differing() -> list[str]:
    """What ranks hear whose settings differ, or that lost what they had kept."""
    me, said = dist.get_rank(), []
    model = sharded()
    optimizer, _ = attached(model, "sign", lr=LR * (1 + me))
    said.append(outcome(lambda: train(model, optimizer, range(1))))
    model = sharded()
    optimizer, _ = attached(model, "sign")
    state = optimizer.state_dict()
    state["state"][0] = {key: value for key, value in state["state"][0].items() if key != "sent_momentum"}
    optimizer.load_state_dict(state)
    said.append(outcome(lambda: train(model, optimizer, range(1))))
    return said


def test_ranks_that_differ_are_an_error_on_all() -> None:
    for settings, state in run(2, differing):
        assert "rank 1 has optimizer's groups" in settings
        assert "EF21Muon: the state that was loaded has no sent_momentum of '" in state


def late() -> str:
    """What is said to a matrix that was frozen, and held by no group, when the session was attached."""
    model = sharded()
    weight = model[2].weight.requires_grad_(False)
    held = [
        {"params": [p for p in model.parameters() if (p.dim() == 2) == two and p is not weight], "muon": two}
        for two in (True, False)
    ]
    optimizer, _ = attached(model, "sign", held)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [weight.requires_grad_(True)], "muon": True})
    return outcome(lambda: train(model, optimizer, range(2, 3)))


def test_a_matrix_that_comes_after_attach_says_so() -> None:
    for said in run(2, late):
        assert said.startswith("ValueError: EF21Muon: matrix '2.weight' came to the optimizer after attach")


def refusals() -> dict[str, str]:
    """What attach says to what it cannot do, by what was tried."""

    def attach(model: Any, *spec: Any, optimizer: Any = None, **settings: Any) -> str:
        optimizer = EF21Muon(model, lr=LR) if optimizer is None else optimizer
        return outcome(lambda: commpress.attach(model, *spec, optimizer=optimizer, **settings))

    W = dist.get_world_size()
    mesh = init_device_mesh("cpu", (W, 1), mesh_dim_names=("replicas", "shards"))
    model = sharded()
    part = EF21Muon([{"params": [model[0].weight], "muon": True}])
    said = {
        "replicas": attach(sharded(mesh=mesh), "sign"),
        "offloaded": attach(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), "sign"),
        "budget": attach(model, "auto(error=0.3)"),
        "patterns": attach(model, {"*": "sign"}),
        "unknown": attach(model, "int5"),
        "factors": attach(model, "powersgd(4)"),
        "parameters by auto": attach(model, "sign", parameters="auto"),
        "feedback": attach(model, "sign", error_feedback=False),
        "others": attach(model, "sign", optimizer=EF21Muon(model, lr=LR, others_spec="rotate|int2")),
        "not held": attach(model, "sign", optimizer=part),
        "another": attach(model, "sign", optimizer=OneBitAdamW(model.parameters(), lr=LR)),
    }
    optimizer, session = attached(model, "sign")  # none of these has harmed it
    name, p = next(iter(model.named_parameters()))
    said["masks"] = outcome(lambda: session.set_masks({name: torch.ones(p.shape, dtype=torch.bool, device="cpu")}))
    train(model, optimizer, range(2))
    return said


def test_what_is_not_possible_says_so() -> None:
    one, other = run(2, refusals)
    assert one == other
    assert "expected one mesh of one dimension for all modules" in one["replicas"]
    assert "leave offload_policy out" in one["offloaded"]
    assert "expected auto without a budget" in one["budget"]
    assert "EF21Muon needs one spec of the gradients, as in" in one["patterns"]
    assert one["unknown"].startswith("ValueError: spec 'int5': unknown codec 'int5'")
    assert "powersgd(4) sends whole matrices as factors" in one["factors"]
    assert "parameters: auto: beside EF21Muon auto finds the spec of the momentum alone" in one["parameters by auto"]
    assert one["feedback"].startswith("ValueError: error_feedback=False: EF21Muon adds up what it receives")
    assert "'rotate|int2': sharded gradients have no error feedback; expected one of none" in one["others"]
    assert "is trained, but the optimizer does not hold it" in one["not held"]
    assert "OneBitAdamW does not work on sharded parameters; expected DistributedDataParallel" in one["another"]
    assert one["masks"].startswith(
        "ValueError: rank 0: masks: EF21Muon mixes the values of a matrix, and where it is sharded"
    )
