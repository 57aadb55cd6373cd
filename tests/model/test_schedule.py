"""The scheduler: what a recipe says happens, at its step, on all ranks, and again after a restart."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, batch, network, parameters_of, same

import commpress
from commpress.model import Recipe, RecipeError, Scheduler, importance, prepare, quantization
from commpress.model.distillation import add_projections
from commpress.model.held import whole

LIBRARIES = ("torchao.quantization", "torch_pruning")
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

PRUNE = {"start": 4, "end": 12, "every": 4, "amount": 0.8}
ALL = {
    "prune": [{**PRUNE, "criterion": "taylor"}],
    "quantize": [{"start": 14, "bits": 8}],
    "distil": {"start": 2, "end": 17, "weight": 0.5, "hidden": {"1": "1"}},
}
STEPS = 20


class Run:
    """A network under a recipe, alone or on all ranks by DDP or FSDP2."""

    def __init__(self, recipe: dict[str, Any], way: str = "ddp", spec: str = "int4", optimizer: str = "AdamW") -> None:
        self.model, self.recipe = network(), Recipe.of(recipe)
        self.session: Any = None
        self.wrapped: nn.Module = self.model
        if way == "fsdp":
            prepare(self.model, self.recipe)
            fully_shard(self.model[0])
            fully_shard(self.model)
        parameters = self.model.parameters()
        self.optimizer: Any = {
            "AdamW": lambda: torch.optim.AdamW(parameters, lr=0.01),
            "EF21Muon": lambda: commpress.optim.EF21Muon(self.model, lr=0.01),
            "OneBitAdamW": lambda: commpress.optim.OneBitAdamW(parameters, lr=0.01, warmup_steps=3),
            "ZeroOneAdamW": lambda: commpress.optim.ZeroOneAdamW(parameters, lr=0.01, warmup_steps=3),
        }[optimizer]()
        if way == "ddp":
            self.wrapped = DistributedDataParallel(self.model, bucket_cap_mb=SMALL_BUCKETS)
            behind = None if optimizer == "AdamW" else self.optimizer
            self.session = commpress.attach(self.wrapped, spec, optimizer=behind)
        elif way == "fsdp":
            self.session = commpress.attach(self.model, gradients=spec, parameters="int8")
        teacher = network(seed=1) if self.recipe.distil else None
        self.scheduler = Scheduler(self.recipe, self.model, self.optimizer, session=self.session, teacher=teacher)
        self.phases = [self.scheduler.phase]

    def step(self) -> None:
        x, y = batch(self.scheduler.done, dist.get_rank() if dist.is_initialized() else 0)
        output = self.wrapped(x)
        self.scheduler.loss(nn.functional.cross_entropy(output, y), output, x).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.phases.append(self.scheduler.phase)

    def parameters(self) -> list[Tensor]:
        return [whole(p).clone() for p in self.model.parameters()]

    def state(self) -> dict[str, Any]:
        own = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(own) | {"scheduler": self.scheduler.state_dict(), "session": self.session.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.session.load_state_dict(state["session"])


def train(scheduler: Scheduler, wrapped: nn.Module, steps: int) -> None:
    """A plain loop, the same batches on all ranks."""
    for step in range(steps):
        x, y = batch(step, 0)
        output = wrapped(x)
        scheduler.loss(nn.functional.cross_entropy(output, y), output, x).backward()
        scheduler.optimizer.step()
        scheduler.step()
        scheduler.optimizer.zero_grad()


def test_phases_in_a_plain_loop_on_one_rank():
    alone = Run({**ALL, "prune": [PRUNE]}, way="alone")
    sparsity = [alone.scheduler.masks.sparsity]
    for _ in range(STEPS):
        alone.step()
        sparsity.append(alone.scheduler.masks.sparsity)
    cubic = [0.8 * (1 - (1 - part) ** 3) for part in (0, 0.5, 1)]
    assert sparsity[4] == sparsity[3] == cubic[0]
    assert sparsity[8:13:4] == pytest.approx(cubic[1:], abs=1e-3)
    assert sparsity[12:] == [sparsity[12]] * (STEPS - 11)
    assert alone.phases[:5] == ["dense", "dense", "distil", "distil", "prune + distil"]
    assert alone.phases[11:15] == ["prune + distil", "pruned + distil", "pruned + distil", "pruned + int8 + distil"]
    assert alone.phases[17:] == ["pruned + int8"] * 4
    for name, mask in alone.scheduler.masks.of.items():
        p = alone.model.get_parameter(name)
        moments = alone.optimizer.state[p]
        assert not any(bool(t[~mask].any()) for t in (p, moments["exp_avg"], moments["exp_avg_sq"]))


def whole_run(recipe: dict[str, Any], way: str, spec: str, optimizer: str) -> tuple[list[Tensor], dict[str, Any], Any]:
    made = Run(recipe, way, spec, optimizer)
    for _ in range(STEPS):
        made.step()
    masks = made.scheduler.masks.of
    report = made.session.report()
    parameters = made.parameters()
    if optimizer == "ZeroOneAdamW":
        with made.optimizer.synced():
            parameters = made.parameters()
    return parameters, masks, report.phases


@pytest.mark.parametrize(
    ("way", "world_size", "optimizer"),
    [
        ("ddp", 2, "AdamW"),
        slow("ddp", 3, "AdamW"),
        ("fsdp", 2, "AdamW"),
        ("ddp", 2, "OneBitAdamW"),
        ("ddp", 2, "ZeroOneAdamW"),
        ("ddp", 2, "EF21Muon"),
    ],
)
def test_all_at_once_on_all_ranks(way, world_size, optimizer):
    # gradients of local steps are a rank's own, and EF21Muon has none: no taylor under them
    recipe = ALL if optimizer in ("AdamW", "OneBitAdamW") else {**ALL, "prune": [PRUNE]}
    results = run(world_size, whole_run, recipe, way, "int4", optimizer)
    parameters, masks, phases = results[0]
    for others, other_masks, _ in results:
        assert same(parameters, others)
        assert masks.keys() == other_masks.keys()
        assert all(torch.equal(mask, other_masks[name]) for name, mask in masks.items())
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total - round(0.8 * total)
    assert list(phases)[:3] == ["dense", "distil", "prune + distil"]
    assert sum(of["steps"] for of in phases.values()) == STEPS
    each = {name: of["dense_bytes"] / of["sent_bytes"] for name, of in phases.items()}
    assert each["pruned + int8"] > 2.5 * each["dense"] or optimizer != "AdamW"


TECHNIQUES: dict[str, dict[str, Any]] = {
    "prune": {"prune": [{"start": 2, "end": 6, "every": 2, "amount": 0.8}]},
    "2:4": {"prune": [{"start": 3, "pattern": "2:4", "criterion": "wanda", "parameters": ["*.weight"]}]},
    "int4": {"quantize": [{"start": 4, "bits": 4, "group": 16}]},
    "int8": {"quantize": [{"start": 4, "bits": 8, "activations": "dynamic"}]},
    "distil": {"distil": {"weight": 0.7}},
}
"""All have begun by step 4, and pruning goes on until step 6."""


def pairs(way: str) -> list[str]:
    """What is wrong with any pair of techniques."""
    wrong = []
    for one, other in itertools.combinations(TECHNIQUES, 2):
        recipe = TECHNIQUES[one] | TECHNIQUES[other]
        if len(recipe) < 2:
            continue  # two of one table
        made = Run(recipe, way)
        before = float(nn.functional.cross_entropy(made.model(batch(99, 0)[0]), batch(99, 0)[1]))
        for _ in range(11):
            made.step()
        after = float(nn.functional.cross_entropy(made.model(batch(99, 0)[0]), batch(99, 0)[1]))
        if not after < before:
            wrong.append(f"{one} and {other}: loss {before} -> {after}")
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, [p.tolist() for p in made.parameters()])
        if gathered[0] != gathered[1]:
            wrong.append(f"{one} and {other}: ranks differ")
        for name, mask in made.scheduler.masks.of.items():
            if bool(whole(made.model.get_parameter(name))[~mask].any()):
                wrong.append(f"{one} and {other}: {name} has grown")
        made.scheduler.close()
    return wrong


@pytest.mark.parametrize("way", ["ddp", slow("fsdp")])
def test_every_pair_of_techniques(way):
    assert run(2, pairs, way, timeout=120) == [[], []]


def resumed(way: str, optimizer: str) -> list[str]:
    """At which steps a restart changes what comes out, until the recipe's next change is through."""
    recipe = {**ALL, "prune": [PRUNE]} if optimizer == "EF21Muon" else ALL
    straight = Run(recipe, way, "int4", optimizer)
    states, parameters = {}, []
    for step in range(STEPS):
        if step in (1, 3, 6, 8, 13, 15, 18):
            states[step] = straight.state()
        straight.step()
        parameters.append(straight.parameters())
    wrong = []
    for step, state in states.items():
        again = Run(recipe, way, "int4", optimizer)
        again.load(state)
        if again.scheduler.done != step:
            wrong.append(f"{step}: done {again.scheduler.done}")
        last = STEPS if step == 6 else min(STEPS, step + 5)
        for _ in range(step, last):
            again.step()
        if not same(parameters[last - 1], again.parameters()):
            wrong.append(f"{step}: other parameters")
        again.scheduler.close()
    return wrong


@pytest.mark.parametrize(
    ("way", "optimizer"),
    [("ddp", "AdamW"), slow("fsdp", "AdamW"), slow("ddp", "OneBitAdamW"), slow("ddp", "EF21Muon")],
)
def test_resume_bit_for_bit_in_each_phase(way, optimizer):
    wrong = run(2, resumed, way, optimizer, timeout=120)
    # a state saved between DDP's first two steps goes on with the first layout: not bit for bit
    assert [[w for w in mine if not w.startswith("1:")] for mine in wrong] == [[], []]


def forks() -> list[Any]:
    """A run goes on from step 13 by other recipes, and not by one with another past."""
    straight = Run(ALL)
    for _ in range(13):
        straight.step()
    state, ends = straight.state(), []
    for bits in (4, 8):
        fork = Run({**ALL, "quantize": [{"start": 15, "bits": bits}]})
        fork.load(state)
        for _ in range(13, STEPS):
            fork.step()
        ends.append((fork.scheduler.phase, fork.scheduler.masks.sparsity, fork.parameters()))
    other = Run({**ALL, "prune": [{**PRUNE, "amount": 0.5}]})
    refused = outcome(functools.partial(other.load, state))
    other_teacher = Run(ALL)
    other_teacher.scheduler._teacher[0].weight.data.add_(1)
    return [ends, refused, outcome(functools.partial(other_teacher.load, state))]


def test_a_run_forks():
    for (four, eight), refused, teacher in run(2, forks):
        assert four[0] == "pruned + int4"
        assert eight[0] == "pruned + int8"
        assert four[1] == eight[1] == pytest.approx(0.8, abs=1e-3)
        assert not same(four[2], eight[2])
        assert "by step 13 prune[0] has begun, and the saved run had another entry than this recipe" in refused
        assert "cannot restore: the saved run had a teacher" in teacher


def dense_gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """The mean over the ranks of what each one's batch gives, pruned weights and all."""
    copied = copy.deepcopy(model)
    x, y = batch(step, dist.get_rank())
    nn.functional.cross_entropy(copied(x), y).backward()
    found = {}
    for name, p in copied.named_parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        found[name] = p.grad / dist.get_world_size()
    return found


def regrown(way: str) -> tuple[list[int], list[Tensor], float]:
    made = Run(
        {"prune": [{"start": 2, "end": 14, "every": 4, "amount": 0.9, "schedule": "regrow", "scope": "local"}]}, way
    )
    kept, masks, moved = [], [], 0.0
    for step in range(16):
        before = {name: mask.clone() for name, mask in made.scheduler.masks.of.items()}
        gradients = {} if way == "fsdp" or step not in (5, 9) else dense_gradients(made.model, step)
        made.step()
        now = made.scheduler.masks.of
        for name, mask in now.items():
            p = made.model.get_parameter(name)
            for values in (p, *made.optimizer.state[p].values()):
                assert values.dim() == 0 or not bool(whole(values)[~mask].any()), name
            if name in gradients:  # those that came had the largest mean gradients of all that were pruned
                size = gradients[name].abs()
                came = now[name] & ~before[name]
                assert bool(came.any())
                assert float(size[came].min()) >= float(size[~before[name] & ~came].max()), name
        kept.append(sum(int(mask.sum()) for mask in now.values()))
        masks = [mask.clone() for mask in now.values()]
        moved += sum(float((now[name] & ~mask).sum()) for name, mask in before.items())
    return kept, masks, moved


@pytest.mark.parametrize(("way", "world_size"), [("ddp", 2), slow("ddp", 3), slow("fsdp", 2)])
def test_weights_grow_again_where_gradients_are_large(way, world_size):
    results = run(world_size, regrown, way)
    kept, masks, moved = results[0]
    assert kept[1:] == [kept[1]] * 15
    assert moved > 100
    assert all(same(masks, other) for _, other, _ in results)


def drifted(way: str) -> str:
    made = Run({"prune": [{"start": 2, "amount": 0.5}]}, way, spec="none")
    made.step()
    if dist.get_rank() == 1:  # of shards all ranks see the same: there scores go wrong on one
        with torch.no_grad():
            if way == "ddp":
                made.model[2].weight.add_(torch.randn_like(made.model[2].weight))
            else:
                rank_1 = importance.Magnitude.scores
                importance.Magnitude.scores = lambda self: {name: -s for name, s in rank_1(self).items()}
    return outcome(made.step)


@pytest.mark.parametrize("way", ["ddp", slow("fsdp")])
def test_a_mask_that_differs_stops_all_ranks_with_its_name(way):
    for told in run(2, drifted, way, fresh=True):
        assert "weight" in told
        if way == "ddp":  # what the masks come from differs before they do
            assert "rank 1 (" in told
            assert "has other values of parameter '2.weight'" in told
        else:
            assert "rank 1 has mask of " in told
            assert "all ranks must use the same" in told


def test_on_several_ranks_a_session_is_needed():
    assert run(2, without_session) == ["ValueError"] * 2


def other_files() -> list[str]:
    """Recipes, and teachers, that differ from rank to rank."""
    told = [outcome(lambda: Run({"prune": [{**PRUNE, "start": 4 + dist.get_rank()}]}))]
    model = network()
    wrapped = DistributedDataParallel(model)
    session = commpress.attach(wrapped, "none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teacher = network(seed=dist.get_rank())
    recipe = Recipe.of({"distil": {}})
    told.append(outcome(lambda: Scheduler(recipe, model, optimizer, session=session, teacher=teacher)))
    dgc = commpress.optim.DGC(model.parameters())
    behind = commpress.attach(DistributedDataParallel(model), "topk(0.1)", optimizer=dgc)
    told.append(outcome(lambda: Scheduler(Recipe.of({"prune": [PRUNE]}), model, dgc, session=behind)))
    return told


def test_what_differs_or_cannot_be_is_told_before_the_first_step():
    for recipe, teacher, dgc in run(2, other_files):
        assert recipe.startswith("ValueError: rank 1 has recipe {")
        assert teacher.startswith("ValueError: rank 1 has teacher '")
        assert "DGC keeps the momentum of all values" in dgc


def one_rank_of_fsdp() -> bool:
    """FSDP2 on one rank calls no collective of ours; after an evaluation its root is whole."""
    model = network()
    fully_shard(model[0])
    fully_shard(model)
    session = commpress.attach(model, gradients="int4", parameters="int8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torch.no_grad():
        model(batch(0, 0)[0])
    scheduler = Scheduler(Recipe.of({"prune": [{"start": 1, "amount": 0.8}]}), model, optimizer, session=session)
    train(scheduler, model, 4)
    return all(not bool(whole(model.get_parameter(name))[~m].any()) for name, m in scheduler.masks.of.items())


@pytest.mark.parametrize("world_size", [1, 2])
def test_pruned_weights_stay_after_an_evaluation(world_size):
    assert all(run(world_size, one_rank_of_fsdp))


@pytest.mark.parametrize("second", [{"pattern": "2:4"}, {"threshold": 0.0}])
def test_a_later_entry_revives_nothing(second):
    alone = Run({"prune": [{"start": 1, "amount": 0.8}, {"start": 3, **second}]}, way="alone")
    for _ in range(4):
        alone.step()
    assert alone.scheduler.masks.sparsity >= 0.799
    total = sum(int((alone.model.get_parameter(name) == 0).sum()) for name in alone.scheduler.masks.of)
    assert total >= 0.799 * 6784


def test_an_optimizer_that_mixes_values_moves_nothing_that_is_pruned():
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 10, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01)
    scheduler = Scheduler(Recipe.of({"prune": [{"start": 1, "amount": 0.8}]}), model, optimizer)
    train(scheduler, model, 4)
    for name, mask in scheduler.masks.of.items():
        assert not bool(model.get_parameter(name)[~mask].any())


def phases_of_a_mesh() -> dict[str, Any]:
    model = network()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    session = commpress.attach(model, gradients="int4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(Scheduler(Recipe.of({"prune": {"start": 2, "amount": 0.5}}), model, optimizer, session=session), model, 6)
    return session.report().phases


def phases_with_buffers() -> dict[str, Any]:
    model = nn.Sequential(network(), nn.BatchNorm1d(10))
    wrapped = DistributedDataParallel(model)
    session = commpress.attach(wrapped, "int4", buffers="none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(Scheduler(Recipe.of({"prune": {"start": 2, "amount": 0.5}}), model, optimizer, session=session), wrapped, 6)
    phases = session.report().phases
    assert sum(of["sent_bytes"] for of in phases.values()) == session.report().sent_bytes
    return phases


@pytest.mark.parametrize(("made", "world_size"), [slow(phases_of_a_mesh, 4), (phases_with_buffers, 2)])
def test_phases_hold_all_bytes_and_count_steps_once(made, world_size):
    for phases in run(world_size, made):
        assert {name: of["steps"] for name, of in phases.items()} == {"dense": 2, "pruned": 4}


def skipped_step() -> float:
    """How much of what feedback keeps is lost when masks come behind a step that the scaler has skipped."""
    model = network()
    optimizer = commpress.optim.OneBitAdamW(model.parameters(), lr=1e-3, warmup_steps=3)
    wrapped = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    session = commpress.attach(wrapped, "sign", optimizer=optimizer, grad_scaler=scaler)
    masks = {"0.weight": torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) > 0.5}
    session.set_masks(masks)
    before: list[Tensor] = []
    for step in range(7):
        optimizer.zero_grad()
        x, y = batch(step, dist.get_rank())
        loss = nn.functional.cross_entropy(wrapped(x), y)
        if step == 6:
            before = kept(session)
            loss = loss * float("inf") if dist.get_rank() == 0 else loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    session.set_masks(masks)
    return max(float((a - b).abs().max()) for a, b in zip(before, kept(session), strict=True))


def kept(session: Any) -> list[Tensor]:
    return [each["residual"] for each in session.state_dict()["memories"][0] if each["residual"] is not None]


def test_masks_behind_a_skipped_step_lose_nothing():
    assert run(2, skipped_step) == [0.0, 0.0]


class Inside(nn.Module):
    """A module that may have children beside those that its forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def test_projections_are_neither_pruned_nor_quantised():
    student, teacher = Inside(), nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 10))
    add_projections(student, {"net.0": (64, 96)})
    recipe = {
        "prune": {"start": 1, "amount": 0.8},
        "quantize": {"start": 2},
        "distil": {"hidden": {"net.0": "0"}, "end": 3},
    }
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    scheduler = Scheduler(Recipe.of(recipe), student, optimizer, teacher=teacher)
    train(scheduler, student, 5)
    with pytest.raises(ValueError, match="a Sequential calls all its children"):
        add_projections(network(), {"0": (64, 96)})
    assert set(scheduler.masks.of) == {"net.0.weight", "net.2.weight", "net.4.weight"}
    assert [name for name, *_ in quantization.prepared(student)] == ["net.0", "net.2", "net.4"]


def test_a_glob_may_name_projections_too():
    student, teacher = Inside(), nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 10))
    add_projections(student, {"net.0": (64, 96)})
    recipe = {"prune": {"start": 1, "amount": 0.5, "parameters": ["*weight"]}, "distil": {"hidden": {"net.0": "0"}}}
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    scheduler = Scheduler(Recipe.of(recipe), student, optimizer, teacher=teacher)
    train(scheduler, student, 2)
    assert len(scheduler.masks.of) == 4


def test_scores_do_not_depend_on_the_loss_scale():
    """A fused optimizer gets scaled gradients, and the scale, from its GradScaler."""
    masks = []
    for scale in (1.0, 1024.0):
        alone = Run({"prune": [{"start": 3, "amount": 0.5, "criterion": "taylor"}]}, way="alone")
        for step in range(3):
            alone.optimizer.grad_scale = torch.tensor(scale if step == 1 else 1.0)  # a scaler changes it now and then
            x, y = batch(step, 0)
            output = alone.model(x)
            (nn.functional.cross_entropy(output, y) * alone.optimizer.grad_scale).backward()
            alone.scheduler._pruner.steps.arrived()
            alone.optimizer.zero_grad()
            alone.scheduler.step()
        masks.append(alone.scheduler.masks.of)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def without_session() -> str:
    model = network()
    made = functools.partial(Scheduler, Recipe.of({}), model, torch.optim.SGD(model.parameters(), lr=0.1))
    return outcome(made).split(":")[0]


def test_fsdp_must_be_prepared_before():
    assert all("call prepare(model, recipe) before fully_shard" in told for told in run(2, unprepared))


def unprepared() -> str:
    model = network()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = commpress.attach(model, gradients="none")
    return outcome(lambda: Scheduler(Recipe.of({"quantize": [{"bits": 8}]}), model, optimizer, session=session))


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"prune": [{"start": 0, "amount": 0.5, "parameters": ["9.*"]}]}, "prune[0].parameters: '9.*' matches nothing"),
        ({"prune": [PRUNE, {"start": 8, "amount": 0.9}]}, "prune[1].start: 8, while prune[0] prunes '0.weight', too"),
        ({"prune": [{"start": 0, "pattern": "2:3"}]}, "prune[0].pattern: "),
        (
            {"prune": [{"start": 1, "amount": 0.5, "criterion": "wanda", "parameters": ["*.bias"]}]},
            "prune[0].criterion: ",
        ),
        ({"quantize": [{"bits": 4, "group": 48}]}, "quantize[0]: Quantization(group=48): '0' has rows of 32"),
        ({"quantize": [{"layers": ["9"]}]}, "quantize[0]: Quantization(layers=('9',)): '9' matches no"),
        ({"distil": {"hidden": {"7": "1"}}}, "distil: "),
    ],
)
def test_recipes_that_do_not_fit_the_model(recipe, told):
    model = network()
    with pytest.raises(RecipeError) as error:
        Scheduler(Recipe.of(recipe), model, torch.optim.SGD(model.parameters(), lr=0.1), teacher=network(1))
    assert str(error.value).startswith(told)


def local_steps() -> str:
    return outcome(lambda: Run({"prune": [{**PRUNE, "criterion": "taylor"}]}, optimizer="ZeroOneAdamW"))


def test_no_gradient_criterion_under_local_steps():
    assert all(
        "taylor needs gradients that all ranks share; under ZeroOneAdamW" in told for told in run(2, local_steps)
    )


def by_moves(criterion: str) -> str:
    return outcome(lambda: Run({"prune": [{**PRUNE, "criterion": criterion}]}, optimizer="EF21Muon"))


def test_no_gradient_criterion_under_an_optimizer_that_has_no_gradients():
    for criterion in ("taylor", "movement"):
        for told in run(2, by_moves, criterion):
            assert (
                f"prune[0].criterion: {criterion} needs gradients, and EF21Muon gets the change of a momentum" in told
            )


def test_without_a_teacher():
    model = network()
    with pytest.raises(TypeError, match="the recipe distils, expected teacher="):
        Scheduler(Recipe.of({"distil": {}}), model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_empty_recipe_changes_nothing():
    plain, ours = network(), Run({}, way="alone")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for step in range(5):
        x, y = batch(step, 0)
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.step()
    assert same(parameters_of(plain), ours.parameters())
    assert not quantization.is_prepared(ours.model)


def in_a_group_of_two() -> list[Tensor]:
    """A recipe whose scores are means over two of three ranks; the third one does nothing."""
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return []
    model = network()
    wrapped = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = commpress.attach(wrapped, "none")
    recipe = Recipe.of({"prune": {"start": 2, "amount": 0.5, "criterion": "wanda"}})
    train(Scheduler(recipe, model, optimizer, session=session), wrapped, 3)
    return [p.detach().clone() for p in model.parameters()]


def test_scores_are_means_over_the_ranks_of_the_model_s_group() -> None:
    one, other, _ = run(3, in_a_group_of_two)
    assert same(one, other)
    assert any(bool((p == 0).any()) for p in one)


def test_a_step_without_the_teachers_part_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = Scheduler(Recipe.of({"distil": {"end": 2}}), model, optimizer, teacher=network())
    x, y = batch(0, 0)
    for step in range(3):
        output = model(x)
        loss = nn.functional.cross_entropy(output, y)
        if step != 1:
            loss = scheduler.loss(loss, output, x)
        loss.backward()
        optimizer.step()
        if step == 1:
            with pytest.raises(RuntimeError, match=r"distils in step 1, and loss\(\) was not called"):
                scheduler.step()
            scheduler.loss(nn.functional.cross_entropy(model(x), y), model(x), x)
        scheduler.step()
