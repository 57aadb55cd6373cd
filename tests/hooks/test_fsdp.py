"""The FSDP2 hook in real training: what FSDP promises without us holds with us, whatever it is told to do."""

import gc
import hashlib
import itertools
import os
import weakref
from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow, slowly
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import CLASSES, INPUTS, WIDTH, Trained, finite, loss_of, network, same, same_training

import commpress
from commpress.launch.model import GPT, Shape

STEPS = 3
Specs = tuple[str, str]
"""Of gradients and of parameters."""
NONE: Specs = ("none", "none")
LOSSY: tuple[Specs, ...] = (("int4", "int8"), ("topk(0.1)|int4", "none"))
BY_TOPK = {"as it comes", "fp16", "unused", "accumulated, reduced each time", "uneven", "replicas, accumulated"}
"""Ways that are trained by both pairs of specs: what a payload holds is not known to what FSDP does with it."""


# --- models, and how FSDP takes them -----------------------------------------------------------------------------


def sharded(model: Any = None, parts: Sequence[int] = (0, 2, 4), **settings: Any) -> Any:
    """A network taken layer by layer, and then as a whole."""
    model = network() if model is None else model
    for part in parts:
        fully_shard(model[part], **settings)
    return fully_shard(model, **settings)


def each(model: Any) -> list[Any]:
    """The modules that FSDP took."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class Branches(nn.Module):
    """Two branches of which a step takes one or both, and one that is never taken, all in one unit."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.trunk = nn.Linear(INPUTS, WIDTH)
            self.left, self.right, self.never = (nn.Linear(WIDTH, CLASSES) for _ in range(3))
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x).tanh()
        out = (self.left(h), self.right(h), self.left(h) + self.right(h))[self.step % 3]
        self.step += 1
        return out


class Tied(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.middle = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.again, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.again.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.again(self.middle(self.first(x).tanh()).tanh()).tanh())
        return y


class Checkpointed(nn.Sequential):
    """Forward runs again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = checkpoint(part, x, use_reentrant=False)
        return x


def frozen(freeze: Callable[[Any], Any] = lambda layer: layer) -> Any:
    """The middle layer is not trained, and in one unit with the last."""
    model = network()
    freeze(model[2]).requires_grad_(False)
    fully_shard(model[0])
    return fully_shard(model)


class Bf16Middle(nn.Sequential):
    """What flows through the middle layer is bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = part(x.bfloat16()).float() if part is self[2] else part(x)
        return x


def mixed_dtypes() -> Any:
    """A frozen bfloat16 layer in one unit with float32 ones: FSDP gathers them as bytes."""
    model = Bf16Middle(*network())
    model[2].bfloat16().requires_grad_(False)
    return fully_shard(model)


def grouped() -> Any:
    """Two layers in one unit, that is no module of its own."""
    model = network()
    fully_shard([model[2], model[4]])
    return fully_shard(model)


def prefetching() -> Any:
    """Each layer asks for the next one's parameters in advance, in both directions."""
    model = sharded()
    layers = [model[0], model[2], model[4]]
    for one, other in itertools.pairwise(layers):
        one.set_modules_to_forward_prefetch([other])
        other.set_modules_to_backward_prefetch([one])
    return model


def divided() -> Any:
    """Gradients divided by something else than the number of ranks."""
    model = sharded()
    for module in each(model):
        module.set_gradient_divide_factor(3.0)
        module.set_force_sum_reduction_for_comms(True)  # Gloo knows no PREMUL_SUM
    return model


def zeros_for_unused() -> Any:
    """FSDP sends zeros for what was not used."""
    model = fully_shard(Branches())
    model.set_reduce_scatter_unused_params(True)
    return model


def by_two(model: Any = None) -> Any:
    """A mesh of two replicas of half the ranks each."""
    half = dist.get_world_size() // 2
    return sharded(model, mesh=init_device_mesh("cpu", (2, half), mesh_dim_names=("replicas", "shards")))


def with_tensor_parallelism() -> Any:
    """Two layers sharded over columns and rows beside FSDP."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(network(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return sharded(model, mesh=mesh["data"])


def gpt() -> Any:
    """A small transformer, block by block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(Shape(layers=2, width=32, heads=2, context=16))
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def next_byte(model: nn.Module, step: int) -> Tensor:
    """The loss of a rank's batch of bytes that follow a rule."""
    start = torch.randint(0, 64, (4, 1), generator=torch.Generator().manual_seed(1000 * step + dist.get_rank()))
    tokens = (start + 3 * torch.arange(17)) % 64
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


Variant = dict[str, Any]
VARIANTS: dict[str, Variant] = {
    "as it comes": {},
    "one unit": {"model": lambda: fully_shard(network())},
    "grouped": {"model": grouped},
    "kept after forward": {"model": lambda: sharded(reshard_after_forward=False)},
    "prefetching": {"model": prefetching},
    "bf16, reduced in fp32": {
        "model": lambda: sharded(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
    },
    "bf16": {"model": lambda: sharded(mp_policy=MixedPrecisionPolicy(torch.bfloat16))},
    "fp16": {"model": lambda: sharded(mp_policy=MixedPrecisionPolicy(torch.float16))},
    "divided": {"model": divided},
    "frozen": {"model": frozen},
    "mixed dtypes": {"model": mixed_dtypes},
    "unused": {"model": lambda: fully_shard(Branches())},
    "zeros for unused": {"model": zeros_for_unused},
    "tied": {"model": lambda: fully_shard(Tied())},
    "by columns": {"model": lambda: sharded(shard_placement_fn=lambda p: Shard(p.dim() - 1))},
    "offloaded": {"model": lambda: sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))},
    "checkpointed": {"model": lambda: sharded(Checkpointed(*network()))},
    "compiled": {"outside": True},
    "accumulated": {"accumulate": 3},
    "accumulated, reduced each time": {"accumulate": 2, "each time": True},
    "GPT": {"model": gpt, "loss": next_byte},
}
ON_THREE: dict[str, Variant] = {"uneven": {}, "uneven GPT": {"model": gpt, "loss": next_byte}}
ON_FOUR: dict[str, Variant] = {
    "replicas": {"model": by_two},
    "replicas, accumulated": {"model": by_two, "accumulate": 2},
    "replicas, averaged once": {"model": by_two, "accumulate": 2, "once": True},
    "sharded anew": {"model": lambda: sharded(reshard_after_forward=2)},
    "tensor parallelism": {"model": with_tensor_parallelism},
}


def trained_as(variant: Variant, specs: Specs | None, steps: int = STEPS) -> Trained:
    """Train one variant; without specs it is plain FSDP. Parameters and gradients are this rank's shards."""
    torch.compiler.reset()
    model = variant.get("model", sharded)()
    session = None if specs is None else commpress.attach(model, gradients=specs[0], parameters=specs[1])
    loss, accumulate = variant.get("loss", loss_of), variant.get("accumulate", 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    stepped = torch.compile(model, backend="aot_eager") if variant.get("outside") else model
    trained = Trained([])
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            last = part == accumulate - 1
            if variant.get("once"):
                model.set_requires_all_reduce(last)
            elif not variant.get("each time"):
                model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
            (loss(stepped, step * accumulate + part) / accumulate).backward()
        trained.gradients.append([None if p.grad is None else p.grad.to_local().clone() for p in model.parameters()])
        optimizer.step()
    trained.parameters = shards_of(model)
    trained.extra = None if session is None else session.report().to_dict()
    return trained


def shards_of(model: nn.Module) -> list[Tensor]:
    """Copies of this rank's shards."""
    return [p.detach().to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]


def digest(x: Tensor) -> str:
    """A hash of a tensor's bytes."""
    return hashlib.sha256(x.detach().clone().view(torch.uint8).numpy().tobytes()).hexdigest()


# --- what the ranks do -------------------------------------------------------------------------------------------


def variant_trainings(name: str) -> list[Trained]:
    """Plain FSDP, ours with `none`, and with one or both lossy pairs of specs."""
    variant = (VARIANTS | ON_THREE | ON_FOUR)[name]
    lossy = LOSSY if name in BY_TOPK else LOSSY[:1]
    return [trained_as(variant, specs) for specs in (None, NONE, *lossy)]


def computed_with(parameters: str) -> dict[str, Any]:
    """What forward and backward compute with, by module and step; whether the shards stay; what one weight must be."""
    model = sharded(nn.Sequential(*(nn.Sequential(part) for part in network())))
    commpress.attach(model, gradients="none", parameters=parameters)
    seen: list[tuple[str, str]] = []
    weights: list[Tensor] = []

    def note(phase: str) -> Callable[..., None]:
        def noted(module: nn.Module, *arguments: Any) -> None:
            assert isinstance(module.weight, Tensor)
            seen.append((phase, digest(module.weight)))
            if module is model[2][0]:
                weights.append(module.weight.detach().clone())

        return noted

    for layer in (model[0][0], model[2][0], model[4][0]):
        layer.register_forward_pre_hook(note("forward"))
        layer.register_full_backward_pre_hook(note("backward"))
    before = shards_of(model)
    loss_of(model, 0).backward()
    with torch.no_grad():
        loss_of(model, 1)  # evaluation computes with the same
    codec = commpress.parse(parameters)
    me, W = dist.get_rank(), dist.get_world_size()
    flat = torch.cat([before[2].flatten(), before[3].flatten()])  # a unit's shard: weight, then bias
    mine = codec.decode(codec.encode(flat), flat.numel())[: before[2].numel()].view_as(before[2])
    rows = WIDTH // W
    return {
        "seen": seen,
        "shards stay": same(before, shards_of(model)),
        "decoded": all(torch.equal(weight[me * rows : (me + 1) * rows], mine) for weight in weights),
        "differs": not torch.equal(mine, before[2]),
    }


def after_learning(specs: Sequence[Specs | None]) -> list[float]:
    """The mean of the last losses over steps and ranks, for each pair of specs."""
    means = []
    for pair in specs:
        model = fully_shard(network())
        if pair is not None:
            commpress.attach(model, gradients=pair[0], parameters=pair[1])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for step in range(60):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
        mean = torch.stack(losses[-20:]).mean()
        dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        means.append(float(mean))
    return means


def evaluated(specs: Specs | None) -> tuple[list[float], Trained]:
    """Losses under inference mode between steps, and the training."""
    found: list[float] = []

    def loss(model: nn.Module, step: int) -> Tensor:
        with torch.inference_mode():
            found.append(float(loss_of(model, step)))
        return loss_of(model, step)

    # FSDP makes its parameters in the first forward, which must not be an evaluation
    model = sharded(mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    loss_of(model, 0).backward()
    return found, trained_as({"model": lambda: model, "loss": loss}, specs)


def both_ways_of_resharding(specs: Specs) -> tuple[Trained, Trained]:
    """With parameters freed after forward, and kept."""
    kept: Variant = {"model": lambda: sharded(reshard_after_forward=False)}
    return trained_as({}, specs), trained_as(kept, specs)


def reported(specs: Specs) -> dict[str, Any]:
    """The report of a GPT's training, and the sizes of its parameters by unit."""
    model = gpt()
    owned = [
        [*model.tokens.parameters(), *model.positions.parameters(), *model.norm.parameters(), *model.head.parameters()]
    ]
    owned += [list(block.parameters()) for block in model.blocks]
    shapes = [[tuple(p.shape) for p in unit] for unit in owned]
    session = commpress.attach(model, gradients=specs[0], parameters=specs[1])
    for step in range(3):
        next_byte(model, step).backward()
    with torch.no_grad():
        next_byte(model, 3)
    return {"shapes": shapes, "report": session.report().to_dict(), "text": str(session.report())}


def replicas(specs: Specs, variant: Variant) -> tuple[Trained, list[list[Tensor]]]:
    """A training on a mesh of replicas, and this rank's shards on all replicas."""
    trained = trained_as(variant, specs)
    half = dist.get_world_size() // 2
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, trained.parameters)
    return trained, [everyone[r] for r in range(len(everyone)) if r % half == dist.get_rank() % half]


def by_shape(shape: tuple[int, int], specs: Specs | None) -> Trained:
    """Meshes one of whose dimensions is 1."""
    return trained_as({"model": lambda: sharded(mesh=init_device_mesh("cpu", shape, mesh_dim_names=("r", "s")))}, specs)


def scaled(specs: Specs | None, poisoned: tuple[int, ...], follow: bool = True, steps: int = 10) -> dict[str, Any]:
    """Steps with a GradScaler; in the poisoned ones rank 1's loss is Inf."""
    model = sharded()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    if specs is not None:
        commpress.attach(model, gradients=specs[0], parameters=specs[1], grad_scaler=scaler if follow else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step in poisoned and dist.get_rank() == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {"scales": scales, "parameters": shards_of(model)}


def without_and_with_a_scaler(specs: Specs) -> list[list[Tensor]]:
    """Parameters without a scaler, with one whose scale is followed, and with one whose scale is not; it grows twice."""
    of_scaled = [scaled(specs, (), follow, steps=7)["parameters"] for follow in (True, False)]
    return [trained_as({}, specs, 7).parameters, *of_scaled]


def two_models(specs: Specs) -> tuple[Trained, Trained]:
    """Two attached models in one process, trained in turn, each as if it were alone."""
    models = [sharded(network(seed)) for seed in (3, 4)]
    for model in models:
        commpress.attach(model, gradients=specs[0], parameters=specs[1])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    alone = [trained_as({"model": lambda seed=seed: sharded(network(seed))}, specs) for seed in (3, 4)]
    return Trained([p for m in models for p in shards_of(m)]), Trained([p for t in alone for p in t.parameters])


def refusals() -> dict[str, str]:
    """What attach says to what it cannot do, by what was tried."""
    me = dist.get_rank()

    def attach(model: Any, *spec: Any, **settings: Any) -> str:
        return outcome(lambda: commpress.attach(model, *spec, **settings))

    def first_forward(model: Any) -> str:
        commpress.attach(model[2], gradients="int4")
        return outcome(lambda: loss_of(model, 0))

    taken, ran, custom = sharded(), sharded(), sharded()
    commpress.attach(taken, gradients="int4", parameters="int8")
    loss_of(ran, 0).backward()
    custom[2].set_custom_all_gather(type("Mine", (), {})())
    older = sharded()
    del older[2]._get_fsdp_state()._fsdp_param_groups  # as a torch that keeps them elsewhere
    model = sharded()
    behind = commpress.optim.OneBitAdamW(model.parameters(), lr=0.1, warmup_steps=1)
    said = {
        "buffers": attach(model, "int4", buffers="int8"),
        "exchange": attach(model, "int4", exchange="two_shot"),
        "DDP's parameters": attach(DistributedDataParallel(network()), "int4", parameters="int8"),
        "bare module": attach(network(), gradients="int4"),
        "word": attach(model, gradients="int5", parameters="int8"),
        "sparse parameters": attach(model, gradients="int4", parameters="topk(0.1)"),
        "differ": attach(model, gradients=("int4", "int8")[me]),
        "parameters differ": attach(model, gradients="int4", parameters=("int8", "int4")[me]),
        "feedback differs": attach(model, gradients="int4", error_feedback=bool(me)),
        "one rank refuses": attach(taken if me else model, gradients="int4"),
        "optimizer": attach(model, gradients="sign", optimizer=behind),
        "setting": attach(model, gradients="int4", no_such_setting=1),
        "another word": attach(model, spec="int4"),
        "a typing error": attach(model, "int4", paramters="int8"),
        "twice": attach(taken, gradients="int4"),
        "custom": attach(custom, gradients="int4"),
        "inside": attach(ran[2], gradients="int4"),
        "inside, not run": first_forward(sharded()),
        "replicated": attach(replicated(), gradients="int4"),
        "other torch": attach(older, gradients="int4"),
    }
    # none of these has harmed the model or the group
    session = commpress.attach(model, gradients="int4", parameters="int8")
    for step in range(2):
        loss_of(model, step).backward()
    said["afterwards"] = str(session.report().steps)
    return said


def replicated() -> Any:
    """What torch's composable replicate() makes: FSDP's machinery without shards."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(network())


def died(rank: int) -> str:
    """Training while rank `rank` ends."""
    model = sharded()
    commpress.attach(model, gradients="int4", parameters="int8")
    loss_of(model, 0).backward()
    if dist.get_rank() == rank:
        os._exit(3)
    return outcome(lambda: loss_of(model, 1).backward())


def timed() -> dict[str, Any]:
    """The trace of two steps."""
    model = sharded()
    session = commpress.attach(model, gradients="int4", parameters="int8", verify=0)
    with session.timeline() as timeline:
        for step in range(2):
            loss_of(model, step).backward()
    loss_of(model, 2).backward()
    return {
        "spans": [(span.phase, span.step, span.bucket) for span in timeline.spans],
        "report": session.report().to_dict(),
    }


# --- the tests ---------------------------------------------------------------------------------------------------


def check(name: str, world_size: int) -> list[list[Trained]]:
    ranks = run(world_size, variant_trainings, name, timeout=120)
    for plain, none, *lossy in ranks:
        assert same_training(plain, none)  # bit for bit as without us
        for trained in lossy:
            assert finite(trained.parameters)
            assert not same(trained.parameters, plain.parameters)  # something was compressed
            distance = sum(float((a - b).norm()) for a, b in zip(trained.parameters, plain.parameters, strict=True))
            assert distance < 0.2 * sum(float(p.norm()) for p in plain.parameters)
    return ranks


@pytest.mark.parametrize(
    "name",
    slowly(
        VARIANTS,
        quick=VARIANTS.keys()
        - {"compiled", "prefetching", "bf16", "fp16", "offloaded", "checkpointed", "accumulated", "GPT"}
        - {"one unit", "divided", "zeros for unused", "by columns"},
    ),
)
def test_every_way_of_using_fsdp(name: str) -> None:
    ranks = check(name, 2)
    for _, none, int4, *topk in ranks:
        assert none.extra["ratio"] == 1.0
        # in bfloat16 there is half as much to save
        assert int4.extra["ratio"] > {"bf16": 2.3, "fp16": 2.3, "mixed dtypes": 1.4}.get(name, 2.9)
        for trained in topk:
            assert trained.extra["roles"]["parameters"]["sent_bytes"] == none.extra["roles"]["parameters"]["sent_bytes"]
        assert int4.extra["steps"] == STEPS * (2 if name == "accumulated, reduced each time" else 1)
    reasons = {row["reason"] for row in ranks[0][2].extra["rows"]}
    assert reasons == ({"", "uint8 is no float"} if name == "mixed dtypes" else {""})
    if name == "unused":
        branch, trunk = (WIDTH + 1) * CLASSES, (INPUTS + 1) * WIDTH
        values = [row["values"] for row in ranks[0][2].extra["rows"] if row["role"] == "gradients"]
        assert values == [trunk + branch, trunk + 2 * branch]  # one branch or both, never the third


@pytest.mark.parametrize("name", slowly(ON_THREE, quick=("uneven",)))
def test_uneven_shards(name: str) -> None:
    check(name, 3)


@pytest.mark.parametrize("name", slowly(ON_FOUR, quick=("replicas", "tensor parallelism")))
def test_meshes(name: str) -> None:
    ranks = check(name, 4)
    rows = ranks[0][2].extra["rows"]
    if name == "sharded anew":
        again = [row for row in rows if row["reason"] == "decoded before, sharded anew after forward"]
        assert len(again) == 3  # a layer each
        assert all(row["role"] == "parameters" and row["steps"] == STEPS for row in again)


@pytest.mark.parametrize(("parameters", "world_size"), [("int8", 2), ("int4", 4)])
def test_all_ranks_compute_with_the_same_decoded_parameters(parameters: str, world_size: int) -> None:
    ranks = run(world_size, computed_with, parameters)
    for got in ranks:
        assert got["seen"] == ranks[0]["seen"]
        assert len(got["seen"]) == 9  # three layers in forward, backward, and evaluation
        assert len({seen for _, seen in got["seen"]}) == 3  # and in each of those with the same
        assert got["shards stay"]
        assert got["decoded"]
        assert got["differs"]


@pytest.mark.parametrize("specs", [slow(NONE), ("int4", "int8"), ("int4", "delta|int4")], ids=" and ".join)
def test_evaluation_under_inference_mode(specs: Specs) -> None:
    for (plain, alone), (losses, trained) in zip(run(2, evaluated, None), run(2, evaluated, specs), strict=True):
        assert len(losses) == STEPS
        assert torch.allclose(torch.tensor(losses), torch.tensor(plain), atol=0.05)
        assert (losses == plain and same_training(trained, alone)) == (specs == NONE)


@pytest.mark.slow
def test_learning_is_as_good_as_uncompressed() -> None:
    pairs = (None, ("int8", "int8"), ("int4", "int4"), ("sign", "none"), ("topk(0.1)|int4", "int8"))
    plain, *lossy = run(2, after_learning, pairs, timeout=120)[0]
    assert plain < 0.6 * float(torch.tensor(float(CLASSES)).log())
    for pair, loss in zip(pairs[1:], lossy, strict=True):
        assert loss < plain * (1.05 if pair[0] in ("int8", "int4") else 1.3), pair


@pytest.mark.parametrize(
    "specs", [("int4", "int8"), ("topk(0.1)|int4", "int4"), ("int4", "delta|int4")], ids=" and ".join
)
def test_resharding_after_forward_changes_no_bit(specs: Specs) -> None:
    for freed, kept in run(2, both_ways_of_resharding, specs):
        assert same_training(freed, kept)
        assert freed.extra["sent_bytes"] > kept.extra["sent_bytes"]


@pytest.mark.parametrize("world_size", [2, slow(3)])
@pytest.mark.parametrize("specs", [NONE, ("int4", "int8"), ("bf16", "bf16")], ids=" and ".join)
def test_the_report_counts_to_the_byte(specs: Specs, world_size: int) -> None:
    for rank, got in enumerate(run(world_size, reported, specs)):
        report = got["report"]
        assert (report["rank"], report["world_size"], report["steps"]) == (rank, world_size, 3)
        assert report["spec"] == f"gradients {specs[0]}, parameters {specs[1]}"
        rows = {(row["role"], row["bucket"]): row for row in report["rows"]}
        assert len(rows) == len(report["rows"]) == 6
        for unit, shapes in enumerate(got["shapes"]):
            m = sum(ceil(shape[0] / world_size) * prod(shape[1:]) for shape in shapes)
            gathers = 4 if unit == 0 else 7  # the root is not resharded, the blocks are; one forward has no backward
            for role, spec, times in (("gradients", specs[0], 3), ("parameters", specs[1], gathers)):
                row, codec = rows[role, unit], commpress.parse(spec)
                gloo = 4 * m * (2 if role == "gradients" else 1)  # its reduce-scatter is an all-reduce
                dense = 4 * m if codec.lossy else gloo
                size = codec.nbytes(m) if codec.lossy else gloo
                assert row["backend_bytes"] == times * (world_size - 1) * gloo
                assert row["steps"] == times
                assert row["values"] == world_size * m
                assert row["dense_bytes"] == times * (world_size - 1) * dense
                assert row["sent_bytes"] == row["received_bytes"] == times * (world_size - 1) * size
        for key in ("dense_bytes", "sent_bytes", "received_bytes"):
            assert (
                report[key] == sum(row[key] for row in report["rows"]) == sum(r[key] for r in report["roles"].values())
            )
        assert all(report["seconds"][key] > 0 for key in ("encode", "wire", "decode", "exposed"))
        assert "all parameters" in got["text"]
        doubled = "a reduce-scatter must send" in got["text"]
        assert doubled == (specs != NONE)
        assert report["backend_bytes"] == sum(row["backend_bytes"] for row in report["rows"])


@pytest.mark.parametrize(
    "specs", [("int4", "int8"), slow(("topk(0.1)|int4", "none")), slow(("sign", "none"))], ids=" and ".join
)
def test_replicas_stay_the_same_and_are_where_bytes_are_saved(specs: Specs) -> None:
    for trained, everyone in run(4, replicas, specs, ON_FOUR["replicas"]):
        assert len(everyone) == 2
        assert same(*everyone)
        rows = trained.extra["rows"]
        inner = [row for row in rows if row["role"] == "gradients" and row["exchange"] == "reduce_scatter"]
        outer = [row for row in rows if row["role"] == "gradients" and row["exchange"] != "reduce_scatter"]
        assert len(inner) == len(outer) == 3
        for row, of in zip(inner, outer, strict=True):
            assert row["reason"] == "among the shards of a replica"
            assert row["sent_bytes"] == row["dense_bytes"] == STEPS * 8 * of["values"]
            assert (of["reason"], of["steps"], of["bucket"]) == ("", STEPS, row["bucket"])
            assert of["dense_bytes"] == STEPS * 4 * of["values"]  # 2 (W - 1) / W is 1 for two replicas
            assert of["sent_bytes"] == STEPS * commpress.parse(specs[0]).nbytes(of["values"])


def test_replicas_are_averaged_as_often_as_fsdp_would() -> None:
    for trained, everyone in run(4, replicas, ("int4", "none"), ON_FOUR["replicas, averaged once"]):
        assert same(*everyone)
        times = {(row["exchange"], row["steps"]) for row in trained.extra["rows"] if row["role"] == "gradients"}
        assert times == {("reduce_scatter", 2 * STEPS), ("one_shot", STEPS)}


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_meshes_with_a_dimension_of_one(shape: tuple[int, int]) -> None:
    plain, none, lossy = (run(2, by_shape, shape, specs) for specs in (None, NONE, ("int4", "none")))
    for one, other in zip(plain, none, strict=True):
        assert same_training(one, other)
    for trained in lossy:
        assert not same(trained.parameters, plain[0].parameters)
        gradients = trained.extra["roles"]["gradients"]
        assert gradients["dense_bytes"] > 7 * gradients["sent_bytes"]


@pytest.mark.parametrize("specs", [slow(NONE), ("int4", "int8")], ids=" and ".join)
def test_a_scaler_skips_the_steps_that_it_skips_without_us(specs: Specs) -> None:
    plain, ours = (run(2, scaled, pair, (0, 4, 7)) for pair in (None, specs))
    for one, other in zip(plain, ours, strict=True):
        assert one["scales"] == other["scales"]
        assert len(set(one["scales"])) >= 3
        assert finite(other["parameters"])
        assert same(one["parameters"], other["parameters"]) == (specs == NONE)


@pytest.mark.parametrize("spec", [slow("int8"), "int4", slow("sign"), slow("topk(0.1)|int4")])
def test_memories_follow_the_scale(spec: str) -> None:
    """Scales are powers of two: a run that follows them has the bits of a run without a scaler."""
    for reference, followed, not_followed in run(2, without_and_with_a_scaler, (spec, "none")):
        assert same(reference, followed)
        assert not same(reference, not_followed)


def test_two_models_in_one_process() -> None:
    for together, alone in run(2, two_models, ("int4", "int8")):
        assert same(together.parameters, alone.parameters)


def test_refusals_are_sentences_and_harm_nothing() -> None:
    one, other = run(2, refusals)
    for case, text in one.items():
        if case not in ("one rank refuses",):
            assert text == other[case], case
    assert one["buffers"] == "TypeError: commpress.attach: buffers='int8': FSDP sends none; leave it out"
    assert one["exchange"].startswith("TypeError: commpress.attach: exchange='two_shot': FSDP's are")
    assert one["DDP's parameters"].startswith("TypeError: commpress.attach: parameters='int8': DistributedDataParallel")
    assert "or a model that fully_shard took, got Sequential; wrap the model first" in one["bare module"]
    assert one["word"].startswith("ValueError: gradients: spec 'int5': unknown codec 'int5', known: none")
    assert "parameters: topk(0.1) would make most of them 0" in one["sparse parameters"]
    assert "rank 1 has gradients' plan" in one["differ"]
    assert "'codec': 'int8'" in one["differ"]
    assert "rank 1 has parameters' plan" in one["parameters differ"]
    assert "'error_feedback': True" in one["feedback differs"]
    assert other["one rank refuses"] == one["twice"]
    assert one["one rank refuses"].startswith("ValueError: rank 1: commpress.attach: attached already")
    assert "TypeError: optimizer: OneBitAdamW does not work on sharded parameters" in one["optimizer"]
    assert one["setting"].startswith(
        "TypeError: commpress.attach: unknown argument 'no_such_setting', known: gradients, "
    )
    assert one["another word"] == "TypeError: commpress.attach: unknown argument 'spec', expected gradients="
    assert one["a typing error"] == "TypeError: commpress.attach: unknown argument 'paramters', expected parameters="
    assert one["twice"].startswith("RuntimeError: commpress.attach: attached already")
    assert "are sent by Mine, expected FSDP's default" in one["custom"]
    assert one["inside"] == one["inside, not run"].replace(
        "commpress.attach was given a module", "commpress.attach: this module is"
    )
    assert "is replicated, expected it sharded: use DDP" in one["replicated"]
    assert "has no _fsdp_param_groups where 2.13 has it; expected torch 2.13" in one["other torch"]
    assert one["afterwards"] == "2"


def collected() -> list[bool]:
    """Whether a model and its session are still there when nobody holds them."""
    model = sharded()
    session = commpress.attach(model, gradients="int4", parameters="int8")
    for step in range(2):
        loss_of(model, step).backward()
    watched: list[Any] = [weakref.ref(model), weakref.ref(session)]
    del model, session
    gc.collect()
    return [ref() is not None for ref in watched]


def test_a_session_ends_with_its_model() -> None:
    assert run(2, collected) == [[False, False]] * 2


def test_a_rank_that_dies_ends_the_others() -> None:
    said, _, also = run(3, died, 1, fresh=True)
    for text in (said, also):
        assert text.startswith("ExchangeError: commpress: rank 1 (")
        assert "is gone: the gradient exchange failed on rank" in text


def test_a_timeline_of_both_roles() -> None:
    got = run(2, timed)[0]
    counted = {phase: sum(span[0] == phase for span in got["spans"]) for phase in ("encode", "wire", "decode")}
    exchanges = 2 * 3 * 3  # steps; units; a gather in forward and backward each, a reduction
    assert counted == {"encode": exchanges, "wire": exchanges, "decode": exchanges}
    assert {(step, bucket) for _, step, bucket in got["spans"]} == {(s, b) for s in range(2) for b in range(3)}
    assert got["report"]["steps"] == 3
