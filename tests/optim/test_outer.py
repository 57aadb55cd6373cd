"""Local SGD and DiLoCo against the same in plain torch, and what they promise: one anchor on all ranks, resume, joiners."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, network, parameters_of, same, sgd

import commpress
from commpress.optim import OneBitAdamW
from commpress.optim.outer import Outer, OuterSettings

EVERY, STEPS = 4, 14


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def take_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    steps: range,
    rank: int | None = None,
) -> None:
    for step in steps:
        model.zero_grad()
        loss_of(model, step, rank).backward()
        for one in [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer:
            one.step()


def started(spec: str, seed: int | None = None, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Outer]:
    """A network of this rank's own, its AdamW and its outer syncs."""
    model = network(dist.get_rank() if seed is None else seed)
    optimizer = adamw(model)
    return model, optimizer, commpress.diloco(model, optimizer, spec, **{"every": EVERY, **settings})


class Reference:
    """DiLoCo by all workers in one process; what a codec withholds is kept by worker and fragment. `inside` makes what
    takes the local steps."""

    def __init__(
        self,
        spec: str,
        workers: int,
        settings: OuterSettings,
        inside: Callable[[nn.Module], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]] = adamw,
    ) -> None:
        self.codec, self.settings = commpress.parse(spec), settings
        self.models = [network(0) for _ in range(workers)]
        self.optimizers = [inside(model) for model in self.models]
        names = [name for name, _ in self.models[0].named_parameters()]
        sizes = [p.numel() for p in self.models[0].parameters()]
        self.members: list[list[int]] = [[] for _ in range(settings.fragments)]
        for i in range(len(names)):
            place = sum(sizes[:i]) * settings.fragments // sum(sizes)
            self.members[place].append(i)
        self.order = [f for f in range(settings.fragments) if self.members[f]]
        self.anchors = [self.flat(0, f) if f in self.order else torch.empty(0) for f in range(settings.fragments)]
        self.momenta = [torch.zeros_like(anchor) for anchor in self.anchors]
        self.withheld = [[torch.zeros_like(anchor) for anchor in self.anchors] for _ in range(workers)]
        self.flying: dict[int, tuple[int, Tensor]] = {}

    def flat(self, worker: int, fragment: int) -> Tensor:
        parameters = list(self.models[worker].parameters())
        return torch.cat([parameters[i].detach().reshape(-1) for i in self.members[fragment]])

    def train(self, steps: int) -> None:
        for step in range(steps):
            for worker, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
                take_steps(model, optimizer, range(step, step + 1), worker)
            for fragment in self.order:
                if fragment in self.flying and self.flying[fragment][0] == step + 1:
                    self.land(fragment, 0.5)
                if (step + 1 + fragment * self.settings.every // self.settings.fragments) % self.settings.every == 0:
                    self.send(fragment, step + 1)
                    if not self.settings.delay:
                        self.land(fragment, 1.0)

    def send(self, fragment: int, step: int) -> None:
        decoded = []
        for worker in range(len(self.models)):
            kept = self.withheld[worker][fragment]
            delta = self.anchors[fragment] - self.flat(worker, fragment)
            if self.codec.lossy:
                delta = delta + self.settings.decay * kept
                sent = self.codec.define_decode(self.codec.define_encode(delta), delta.numel())
                kept.copy_(delta - sent)
                delta = sent
            decoded.append(delta / len(self.models))
        self.flying[fragment] = (step + self.settings.delay, torch.stack(decoded).sum(dim=0))

    def land(self, fragment: int, share: float) -> None:
        _, mean = self.flying.pop(fragment)
        momentum = self.momenta[fragment]
        momentum.mul_(self.settings.momentum).add_(mean)
        self.anchors[fragment] -= self.settings.lr * (mean + self.settings.momentum * momentum)
        for model in self.models:
            parameters, at = list(model.parameters()), 0
            for i in self.members[fragment]:
                p = parameters[i]
                target = self.anchors[fragment][at : at + p.numel()].view(p.shape)
                p.data.lerp_(target, share) if share < 1 else p.data.copy_(target)
                at += p.numel()


def trained(spec: str, settings: dict[str, Any]) -> list[Tensor]:
    model, optimizer, _ = started(spec, **settings)
    take_steps(model, optimizer, range(STEPS))
    return parameters_of(model)


@pytest.mark.parametrize(
    ("world_size", "spec", "settings"),
    [
        (2, "none", {"lr": 1.0, "momentum": 0.0}),
        slow(3, "none", {"lr": 0.7, "momentum": 0.9}),
        (2, "int8", {"lr": 0.7, "momentum": 0.9}),
        (2, "topk(0.1)|int2", {"lr": 1.0, "momentum": 0.0, "decay": 0.95}),
        slow(3, "topk(0.1)|int2", {"lr": 1.0, "momentum": 0.0, "decay": 0.95}),
        (2, "none", {"lr": 0.7, "momentum": 0.9, "fragments": 2}),
        (3, "topk(0.1)", {"lr": 0.7, "momentum": 0.5, "fragments": 3, "delay": 2}),
        (2, "none", {"lr": 0.7, "momentum": 0.9, "delay": 3}),
    ],
)
def test_equals_the_reference(world_size: int, spec: str, settings: dict[str, Any]) -> None:
    """To rounding: the codecs' own is amplified by AdamW and by what falls on the other side of a threshold."""
    reference = Reference(spec, world_size, OuterSettings(every=EVERY, **settings))
    reference.train(STEPS)
    for rank, mine in enumerate(run(world_size, trained, spec, settings)):
        for ours, theirs in zip(mine, parameters_of(reference.models[rank]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def syncs_alike(spec: str, decay: float) -> tuple[Tensor, Tensor]:
    """What arrives at two syncs of the same parameters: outer steps of length 0 do not move the anchor."""
    model, _, outer = started(spec, lr=0.0, momentum=0.5, decay=decay)
    start = parameters_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(dist.get_rank())))
    drifted = parameters_of(model)
    momenta = []
    for _ in range(2):
        with torch.no_grad():
            for p, value in zip(model.parameters(), drifted, strict=True):
                p.copy_(value)
        outer.sync()
        momenta.append(torch.cat([fragment["momentum"].clone() for fragment in outer.state_dict()["fragments"]]))
    assert same(parameters_of(model), start)
    return momenta[0], momenta[1] - 0.5 * momenta[0]


@pytest.mark.parametrize(("spec", "world_size"), [("int2", 3), slow("sign", 3), slow("topk(0.1)|int2", 2)])
def test_a_decay_of_0_forgets_all_that_was_left_out(spec: str, world_size: int) -> None:
    """What a worker left out of its differences, and what an owner left out of the mean."""
    for decay, alike in ((0.0, True), (1.0, False)):
        for first, second in run(world_size, syncs_alike, spec, decay):
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-6) == alike


def local_sgd_every_step() -> tuple[list[Tensor], list[Tensor]]:
    rank = dist.get_rank()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    commpress.local_sgd(model, optimizer, "none", every=1)
    ddp = DistributedDataParallel(network())
    take_steps(model, optimizer, range(5), rank)
    take_steps(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), range(5), rank)
    return parameters_of(model), parameters_of(ddp)


def test_local_sgd_in_every_step_is_data_parallel() -> None:
    for mine, ddp in run(2, local_sgd_every_step):
        for ours, theirs in zip(mine, ddp, strict=True):
            torch.testing.assert_close(ours, theirs)


def synced_and_drifted(spec: str, settings: dict[str, Any]) -> tuple[list[Tensor], ...]:
    model, optimizer, outer = started(spec, **settings)
    take_steps(model, optimizer, range(EVERY + 2))
    drifted = parameters_of(model)
    with outer.synced():
        shown = parameters_of(model)
    back = parameters_of(model)
    outer.sync()
    return drifted, shown, back, parameters_of(model)


@pytest.mark.parametrize(
    ("world_size", "spec", "settings"),
    [
        (2, "int8", {}),
        (4, "int8", {}),
        (2, "topk(0.05)|int2", {"fragments": 2}),
        (3, "topk(0.05)|int2", {"fragments": 2}),
        (3, "sign", {"delay": 1}),
        (4, "sign", {"delay": 1}),
        (3, "bf16", {}),
    ],
)
def test_replicas_hold_the_same_bits_after_a_sync(world_size: int, spec: str, settings: dict[str, Any]) -> None:
    results = run(world_size, synced_and_drifted, spec, settings)
    drifted, shown, back, synced = zip(*results, strict=True)
    assert all(same(shown[0], other) and same(synced[0], final) for other, final in zip(shown, synced, strict=True))
    assert not same(drifted[0], drifted[1])
    assert all(same(before, after) for before, after in zip(drifted, back, strict=True))
    assert not same(shown[0], drifted[0])


def learns(spec: str) -> tuple[float, float]:
    """The held-out loss before and after."""
    model, optimizer, outer = started(spec, every=10, lr=0.7, momentum=0.6)

    def loss() -> float:
        x, y = batch(10**6, 0, 2000)
        with torch.no_grad(), outer.synced():
            return float(nn.functional.cross_entropy(model(x), y))

    before = loss()
    take_steps(model, optimizer, range(100))
    outer.sync()
    return before, loss()


@pytest.mark.parametrize("spec", [slow("none"), "int4", "topk(0.03)|int2"])
def test_learns(spec: str) -> None:
    for before, after in run(2, learns, spec):
        assert before > 2.2
        assert after < 0.85


def bytes_sent(spec: str, settings: dict[str, Any]) -> tuple[commpress.Report, int]:
    model, optimizer, outer = started(spec, **settings)
    take_steps(model, optimizer, range(2 * EVERY))
    outer.sync()
    return outer.report(), sum(p.numel() for p in model.parameters())


def test_the_report_has_the_bytes_against_those_of_ddp_in_the_same_steps() -> None:
    report, n = run(3, bytes_sent, "topk(0.1)|int2", {})[0]
    codec = commpress.parse("topk(0.1)|int2")
    assert report.steps == 2 * EVERY
    assert [(row.role, row.spec, row.exchange, row.steps) for row in report.rows] == [
        ("outer", "topk(0.1)|int2", "one_shot", 3)
    ]
    assert report.sent_bytes == 3 * 2 * codec.nbytes(n)
    assert report.dense_bytes == 2 * EVERY * (2 * 2 * 4 * n // 3)
    assert report.roles["outer"]["sent_bytes"] == report.sent_bytes


def logged() -> tuple[list[dict[str, float]], commpress.Report, dict[str, float]]:
    """What the log says after each of two rounds and the report then; and after a round of one that goes on from there."""
    model, optimizer, outer = started("int4")
    said = []
    for round in range(2):
        take_steps(model, optimizer, range(round * EVERY, (round + 1) * EVERY))
        said.append(outer.log())
    state, report = outer.state_dict(), outer.report()
    _, optimizer, again = started("int4")
    again.load_state_dict(state)
    take_steps(_, optimizer, range(2 * EVERY, 3 * EVERY))
    return said, report, again.log()


def test_the_log_has_the_steps_since_the_last_one_and_after_a_restart_since_that() -> None:
    said, report, after = run(2, logged)[0]
    assert sum(one["commpress/sent_mb_per_step"] for one in said) * EVERY * 1e6 == pytest.approx(report.sent_bytes)
    for one in (*said, after):
        assert one["commpress/sent_mb_per_step"] == pytest.approx(report.sent_bytes / 2 / EVERY / 1e6)
        assert one["commpress/ratio"] == pytest.approx(report.ratio)
        assert one["commpress/ratio_bf16"] == pytest.approx(report.ratio / 2)


def interrupted_at(
    spec: str,
    settings: dict[str, Any],
    places: list[int],
    started: Callable[..., Any] = started,
    kept: Callable[..., list[Tensor]] = lambda model, optimizer: parameters_of(model),
) -> list[int]:
    """The places after which a run that went on in new objects has `kept` something else than the one without a break."""
    model, optimizer, outer = started(spec, **settings)
    saved = {}
    for step in range(STEPS):
        if step in places:
            saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict(), outer.state_dict()))
        take_steps(model, optimizer, range(step, step + 1))
    whole, wrong = kept(model, optimizer), []
    for at, state in saved.items():
        model, optimizer, outer = started(spec, seed=7, **settings)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        outer.load_state_dict(state[2])
        take_steps(model, optimizer, range(at, STEPS))
        if not same(whole, kept(model, optimizer)):
            wrong.append(at)
    return wrong


@pytest.mark.parametrize(
    ("spec", "settings"),
    [("topk(0.1)|int2", {}), slow("int4", {"fragments": 2}), ("topk(0.1)", {"fragments": 2, "delay": 2})],
)
def test_resumes_bit_for_bit(spec: str, settings: dict[str, Any]) -> None:
    assert run(2, interrupted_at, spec, settings, [3, 5, 8, 9]) == [[], []]


def joined(settings: dict[str, Any]) -> tuple[list[Tensor], ...]:
    """Rank 1 is new: it loads nothing, and all go on together."""
    model, optimizer, outer = started("topk(0.1)|int2", **settings)
    take_steps(model, optimizer, range(EVERY + 1))
    state = copy.deepcopy(outer.state_dict())
    anchor = [fragment["anchor"] for fragment in state["fragments"]]
    model, optimizer, outer = started("topk(0.1)|int2", seed=9, **settings)
    outer.load_state_dict(None if dist.get_rank() == 1 else state)
    first = torch.cat([p.reshape(-1) for p in parameters_of(model)])
    take_steps(model, optimizer, range(EVERY + 1, STEPS))
    outer.sync()
    return anchor, [first], parameters_of(model)


def saved(spec: str) -> dict[str, Any]:
    _, _, outer = states_of(spec, range(EVERY + 1))
    return copy.deepcopy(outer.state_dict())


def states_of(spec: str, steps: range) -> tuple[nn.Module, torch.optim.Optimizer, Outer]:
    model, optimizer, outer = started(spec)
    take_steps(model, optimizer, steps)
    return model, optimizer, outer


def another_group(spec: str, states: list[dict[str, Any]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What feedback holds and where the parameters stand once each rank has loaded its own of `states`, and the end."""
    model, optimizer, outer = started(spec)
    outer.load_state_dict(states[dist.get_rank()])
    assert outer.steps == EVERY + 1
    withheld = sum_withheld([copy.deepcopy(outer.state_dict())])
    with outer.synced():
        anchor = torch.cat([p.reshape(-1) for p in parameters_of(model)])
    take_steps(model, optimizer, range(EVERY + 1, STEPS))
    outer.sync()
    return withheld, anchor, parameters_of(model)


def sum_withheld(states: list[dict[str, Any]]) -> Tensor:
    """What these ranks had withheld, as it counts in a mean."""
    total = torch.zeros(sum(p.numel() for p in network().parameters()))
    for state in states:
        for bucket in state["session"]["memories"][0]:
            total += bucket["residual"] / state["session"]["world_size"]
            if bucket["owner_residual"] is not None:
                total[bucket["owner_start"] :][: bucket["owner_residual"].numel()] += bucket["owner_residual"]
    return total


@pytest.mark.parametrize(("old", "places"), [(3, [None, 2, 0, 1]), (2, [None, 0]), (3, [0, 2])])
def test_ranks_may_join_and_leave_and_change_places(old: int, places: list[int | None]) -> None:
    """`places`: the old rank that each of the ranks was; None for a new one. int8 of three ranks has a second memory."""
    states = run(old, saved, "int8")
    holders = [rank for rank in places if rank is not None]
    results = run(len(places), another_group, "int8", [None if rank is None else states[rank] for rank in places])
    for _, anchor, end in results:
        assert torch.equal(anchor, states[0]["fragments"][0]["anchor"])
        assert same(end, results[0][2])
    before = sum_withheld([states[rank] for rank in holders])
    assert before.abs().max() > 0
    assert all(states[rank]["session"]["memories"][0][0]["owner_residual"] is not None for rank in holders) == (old > 2)
    torch.testing.assert_close(sum(withheld for withheld, _, _ in results), before, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"fragments": 2, "delay": 3}])
def test_a_rank_that_joins_gets_the_anchor_in_full_precision(settings: dict[str, Any]) -> None:
    results = run(3, joined, settings)
    anchor = torch.cat(results[0][0])
    assert torch.equal(results[1][1][0], anchor)
    assert all(same(results[0][2], other[2]) for other in results)


def nobody_has_a_state() -> str:
    _, _, outer = started("none")
    return outcome(lambda: outer.load_state_dict(None))


def wrong_states() -> list[str]:
    said = []
    for place, key, value in (("settings", "every", 99), ("session", "settings", "strange")):
        _, _, outer = started("none")
        state = outer.state_dict()
        if dist.get_rank() == 1:
            state[place][key] = value
        said.append(outcome(lambda outer=outer, state=state: outer.load_state_dict(state)))  # type: ignore[misc]
    return said


def test_states_that_do_not_fit_are_refused_on_all_ranks() -> None:
    assert set(run(2, nobody_has_a_state)) == {
        "ValueError: cannot restore: no rank has a state, expected at least one with a state"
    }
    for settings, session in run(2, wrong_states):
        assert "rank 1: the saved state has settings {'every': 99" in settings
        assert "cannot restore: rank 1: the saved state has settings 'strange', this run has {" in session


def workers_of_two(spec: str) -> tuple[list[Tensor], commpress.Report, commpress.Report]:
    """Four ranks: two workers, each a DDP over two ranks. The report of the outer syncs, and one of all."""
    rank = dist.get_rank()
    inner = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    outer_group = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    ddp = DistributedDataParallel(network(), process_group=inner)
    session = commpress.attach(ddp, "none")
    optimizer = adamw(ddp)
    outer = commpress.diloco(ddp, optimizer, spec, every=EVERY, group=outer_group)
    take_steps(ddp, optimizer, range(STEPS))
    outer.sync()
    return parameters_of(ddp), outer.report(), commpress.Report.merge(session.report(), outer.report())


@pytest.mark.parametrize("spec", [slow("none"), "topk(0.1)|int2"])
def test_a_ddp_inside_each_worker(spec: str) -> None:
    results = run(4, workers_of_two, spec)
    assert all(same(results[0][0], parameters) for parameters, _, _ in results)
    n = sum(p.numel() for p in results[0][0])
    half = -(-n // 2)
    # each rank sends its half to its peer in the other worker, and shares the result inside
    for rank, (_, report, both) in enumerate(results):
        assert report.roles["parameters"]["sent_bytes"] == 4 * 4 * half
        assert report.roles["outer"]["sent_bytes"] == 4 * (
            4 * half if spec == "none" else commpress.parse(spec).nbytes(half)
        )
        assert (both.rank, both.world_size) == (rank, 4)
        assert set(both.roles) == {"gradients", "outer", "parameters"}
    parts = [report.roles["outer"]["dense_bytes"] for _, report, _ in results[:2]]
    assert parts == [STEPS * 4 * half, STEPS * 4 * (n - half)]


def workers_of_shards() -> tuple[list[Tensor], list[Tensor]]:
    """Four ranks: two workers, each an FSDP2 over two ranks. This rank's shards, and the whole parameters."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("workers", "shards"))
    model = network(seed=mesh.get_local_rank("workers"))
    fully_shard(model, mesh=mesh["shards"])
    optimizer = adamw(model)
    outer = commpress.diloco(model, optimizer, "topk(0.1)|int2", every=EVERY, group=mesh.get_group("workers"))
    take_steps(model, optimizer, range(STEPS))
    outer.sync()
    parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
    return [p.to_local().detach().clone() for p in parameters], [p.full_tensor().detach().clone() for p in parameters]


def test_fsdp2_inside_each_worker() -> None:
    results = run(4, workers_of_shards)
    assert len(results[0][1]) == 6
    assert all(same(results[0][1], whole) for _, whole in results)
    assert same(results[0][0], results[2][0])
    assert not same(results[0][0], results[1][0])


def in_bfloat16() -> tuple[list[Tensor], commpress.Report]:
    model = network().to(torch.bfloat16)
    optimizer = adamw(model)
    outer = commpress.local_sgd(model, optimizer, "int8", every=2)
    for step in range(4):
        x, y = batch(step, dist.get_rank())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.bfloat16()).float(), y).backward()
        optimizer.step()
    outer.sync()
    return parameters_of(model), outer.report()


def test_parameters_in_bfloat16() -> None:
    (one, report), (other, _) = run(2, in_bfloat16)
    assert same(one, other)
    assert one[0].dtype == torch.bfloat16
    assert report.dense_bytes == 4 * 2 * sum(p.numel() for p in one)  # what DDP sends of bfloat16 in four steps


def in_float64() -> tuple[list[Tensor], list[Tensor]]:
    model = network().double()
    with torch.no_grad():
        for p in model.parameters():
            p.div_(3)
    optimizer = sgd(model)
    outer = commpress.local_sgd(model, optimizer, "none", every=EVERY)
    model(batch(0, 0)[0].double()).square().mean().backward()
    optimizer.step()
    drifted = parameters_of(model)
    with outer.synced():
        assert not same(drifted, parameters_of(model))
    return drifted, parameters_of(model)


def test_float64_parameters_come_back_as_they_were() -> None:
    for drifted, back in run(2, in_float64):
        assert same(drifted, back)


def scaled(kind: str, fragments: int) -> tuple[str, int]:
    """Ten steps under a loss scale, one of which rank 0 alone would skip, and a last sync."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model, optimizer, outer = started("none", every=5, fragments=fragments)
    scaler = {"own": torch.amp.GradScaler, "shared": ShardedGradScaler}[kind]("cpu", init_scale=64.0)

    def train() -> None:
        for step in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, step) * (torch.inf if step == 3 and dist.get_rank() == 0 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        outer.sync()

    return outcome(train), outer.steps


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_step_that_one_rank_skips_is_an_error_on_all(fragments: int) -> None:
    (one, _), (other, _) = run(2, scaled, "own", fragments)
    assert one == other
    assert one.startswith("ValueError: rank 1 has local steps 10, rank 0 has 9")


def test_a_step_that_all_ranks_skip_does_not_count() -> None:
    assert run(2, scaled, "shared", 2) == [("", 9), ("", 9)]


def refused(case: str) -> str:
    model, rank = network(), dist.get_rank()
    arguments: dict[str, Any] = {"spec": "int8", "every": 4}
    arguments |= {
        "every 0": {"every": 0},
        "too many fragments": {"every": 4, "fragments": 5},
        "delay": {"delay": 4},
        "half a step": {"delay": 0.5},
        "momentum": {"momentum": 1.0},
        "decay": {"decay": 1.5},
        "spec": {"spec": "int7"},
        "ranks differ": {"every": 4 + rank},
        "one rank's spec": {"spec": "int7" if rank else "int8"},
    }.get(case, {})
    optimizer: torch.optim.Optimizer = adamw(model)
    if case == "compressed optimizer":
        optimizer = OneBitAdamW(model.parameters(), lr=0.1, warmup_steps=1)
    if case == "nothing trained" or (case == "one rank trains nothing" and rank == 1):
        optimizer = sgd(model)
        model.requires_grad_(False)
    if case == "a part":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1])
    if case == "twice":
        commpress.diloco(model, optimizer, "int8", every=4)
    if case == "shards":
        optimizer = adamw(fully_shard(model))
    wrapped = DistributedDataParallel(model) if case == "same group" else model
    return outcome(lambda: commpress.diloco(wrapped, optimizer, **arguments))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("every 0", "every 0: expected a number in [1, inf)"),
        ("too many fragments", "fragments 5: expected a number in [1, 5)"),
        ("delay", "delay 4: expected a number in [0, 4)"),
        ("half a step", "delay 0.5: expected a whole number"),
        ("momentum", "momentum 1.0: expected a number in [0, 1)"),
        ("decay", "decay 1.5: expected a number in [0, 1]"),
        ("spec", "unknown codec 'int7'"),
        ("ranks differ", "rank 1 has every 5, rank 0 has 4"),
        ("one rank's spec", "rank 1: spec 'int7': unknown codec 'int7'"),
        ("compressed optimizer", "OneBitAdamW exchanges by itself"),
        ("nothing trained", "no parameter is trained"),
        ("one rank trains nothing", "no parameter is trained"),
        ("same group", "the DDP module and the outer group share ranks [0, 1]"),
        ("shards", "the sharded model and the outer group share ranks [0, 1]"),
        ("twice", "this AdamW has outer syncs already"),
        (
            "a part",
            "this AdamW does not hold '0.weight', which requires a gradient, and 2 others. Expected all optimizers",
        ),
    ],
)
def test_is_refused_on_all_ranks(case: str, message: str) -> None:
    assert all(message in said for said in run(2, refused, case))


def alone() -> tuple[list[Tensor], list[Tensor]]:
    model, optimizer, outer = started("int8", lr=1.0, momentum=0.0)
    take_steps(model, optimizer, range(STEPS))
    outer.sync()
    plain = network()
    take_steps(plain, adamw(plain), range(STEPS))
    return parameters_of(model), parameters_of(plain)


def test_a_single_worker_trains_as_without() -> None:
    ((mine, plain),) = run(1, alone)
    for ours, theirs in zip(mine, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
