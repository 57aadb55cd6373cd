"""Complex parameters: they train as without us, by every hook, and travel as pairs of reals.

The oracle of a lossy spec is the same model whose parameters are these pairs: it must end with the same bits.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import Trained, parameters_of, same, same_training, train

import commpress
from commpress.comm.parameters import real_numel, real_view
from commpress.hooks.ddp import CommState, comm_hook
from commpress.model import Recipe, Scheduler

STEPS = 4
SPECS = ("bf16", "int8", "int4", "sign", "topk(0.1)", "topk(0.1)|int4", "int2")


class Waves(nn.Module):
    """Two complex layers, with a real one between them if it is `mixed`. With `pairs` the parameters are real [..., 2]."""

    def __init__(self, dtype: torch.dtype = torch.complex64, mixed: bool = False, pairs: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        first = (torch.randn(32, 48, dtype=torch.complex64, generator=generator) * 0.15).to(dtype)
        last = (torch.randn(48, 4, dtype=torch.complex64, generator=generator) * 0.15).to(dtype)
        self.pairs = pairs
        self.first, self.last = (nn.Parameter(torch.view_as_real(x) if pairs else x) for x in (first, last))
        self.scale = nn.Linear(48, 48) if mixed else None
        if self.scale is not None:
            nn.init.eye_(self.scale.weight)
            nn.init.zeros_(self.scale.bias)
        self.register_buffer("turn", torch.ones(600, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # each rank turns it by an angle of its own
            self.turn.mul_(torch.polar(torch.ones(()), torch.tensor(0.01 * (1 + dist.get_rank()))))  # type: ignore[operator]
        first, last = (torch.view_as_complex(p) if self.pairs else p for p in (self.first, self.last))
        h = torch.tanh(x @ first)
        if self.scale is not None:
            h = torch.complex(self.scale(h.real.float()), self.scale(h.imag.float())).to(h.dtype)
        return h @ last


def near(some: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> bool:
    """Whether these differ by what int8 loses, and not by more."""
    pairs = zip(some, exact, strict=True)
    return all(a is not None and b is not None and (a - b).norm() < 0.03 * b.norm() for a, b in pairs)


def in_reals(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Complex tensors as pairs of reals."""
    return [real_view(x) for x in tensors if x is not None]


def loss(model: nn.Module, step: int) -> Tensor:
    """How far the model is from a rotation of its first inputs."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    dtype = next(model.buffers()).dtype
    x = torch.randn(32, 32, dtype=torch.complex64, generator=generator).to(dtype)
    return (model(x) - x[:, :4] * 1j).abs().square().mean()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam steps pairs of reals, too; SGD's products of complex numbers are rounded otherwise."""
    return torch.optim.Adam(model.parameters(), lr=5e-3)


def ddp_trainings(dtype: torch.dtype, settings: dict[str, Any]) -> dict[tuple[str, bool], Trained]:
    """The same training without a hook, and by each spec, with complex parameters and with pairs of reals."""
    got = {}
    for spec, pairs in itertools.product(("plain", "none", *SPECS), (False, True)):
        ddp = DistributedDataParallel(Waves(dtype, pairs=pairs))
        session = None if spec == "plain" else commpress.attach(ddp, spec, **(settings if spec in SPECS else {}))
        trained = train(ddp, range(STEPS), optimizer=adam(ddp), loss=loss)
        trained.extra = None if session is None else session.report().to_dict()
        got[spec, pairs] = trained
    return got


@pytest.mark.parametrize(
    ("dtype", "ranks", "settings"),
    [
        slow(torch.complex64, 2, {}),
        (torch.complex128, 2, {}),
        slow(torch.complex128, 3, {"exchange": "two_shot"}),
        slow(torch.complex64, 2, {"error_feedback": False}),
    ],
)
def test_complex_gradients_are_averaged_as_pairs_of_reals(
    dtype: torch.dtype, ranks: int, settings: dict[str, Any]
) -> None:
    results = run(ranks, ddp_trainings, dtype, settings)
    for got in results:
        assert same_training(got["plain", False], got["none", False])  # bit for bit
        for spec in SPECS:
            trained, twin = got[spec, False], got[spec, True]
            assert same(in_reals(trained.parameters), twin.parameters), spec
            assert same(trained.parameters, results[0][spec, False].parameters)
            assert all(p.imag.any() for p in trained.parameters)
            for key in ("dense_bytes", "sent_bytes", "received_bytes"):
                assert trained.extra[key] == twin.extra[key]
            (row,), (of_pairs,) = trained.extra["rows"], twin.extra["rows"]
            assert (row["dtype"], 2 * row["values"]) == (str(dtype).removeprefix("torch."), of_pairs["values"])
            assert row["dense_bytes"] == STEPS * (2 * (ranks - 1) * row["values"] * dtype.itemsize // ranks)


def mixed_trainings() -> list[Trained]:
    """Real and complex parameters in one model: plain, by none, by int8."""
    trainings = []
    for spec in ("plain", "none", "int8"):
        ddp = DistributedDataParallel(Waves(mixed=True))
        session = None if spec == "plain" else commpress.attach(ddp, spec)
        trainings.append(train(ddp, range(STEPS), optimizer=adam(ddp), loss=loss))
        trainings[-1].extra = None if session is None else session.report().to_dict()
    return trainings


def test_real_and_complex_parameters_in_one_model() -> None:
    for plain, none, coded in run(2, mixed_trainings):
        assert same_training(plain, none)
        assert near(coded.gradients[0], plain.gradients[0])
        assert {row["dtype"] for row in coded.extra["rows"]} == {"float32", "complex64"}  # DDP: one dtype a bucket
        nbytes = sum(p.numel() * p.element_size() for p in plain.parameters)
        assert coded.extra["dense_bytes"] == STEPS * nbytes
        assert coded.extra["ratio"] > 3.9


def resumed(spec: str, exchange: str | None, world_size: int) -> bool:
    """Whether a training that is saved in the middle ends as one that is not; with what feedback keeps of both parts."""
    whole = DistributedDataParallel(Waves(mixed=True))
    commpress.attach(whole, spec, exchange=exchange)
    optimizer = adam(whole)
    train(whole, range(4), optimizer=optimizer, loss=loss)
    # the training that goes on
    first = DistributedDataParallel(Waves(mixed=True))
    session = commpress.attach(first, spec, exchange=exchange)
    stopped = adam(first)
    train(first, range(2), optimizer=stopped, loss=loss)
    state = session.state_dict()
    sizes = {name: n for bucket in state["memories"][0] for name, n in bucket["segments"]}
    assert sizes == {name: real_numel(p) for name, p in first.module.named_parameters()}
    second = DistributedDataParallel(Waves(mixed=True))
    second.load_state_dict(first.state_dict())
    again = commpress.attach(second, spec, exchange=exchange)
    again.load_state_dict(state)
    third = adam(second)
    third.load_state_dict(stopped.state_dict())
    train(second, range(2, 4), optimizer=third, loss=loss)
    return same(parameters_of(whole), parameters_of(second))


@pytest.mark.parametrize(("spec", "exchange", "ranks"), [("int4", None, 2), ("sign", "two_shot", 3)])
def test_the_state_of_complex_parameters_goes_on_bit_for_bit(spec: str, exchange: str | None, ranks: int) -> None:
    assert all(run(ranks, resumed, spec, exchange, ranks))


def by_hand() -> tuple[list[Tensor], list[Tensor], str]:
    """The hook as PyTorch's convention has it, in channels-last memory, against plain DDP."""
    kept = []
    for hooked in (False, True):
        model = Waves()
        with torch.no_grad():
            model.first.data = model.first.data.t().contiguous().t()
        ddp = DistributedDataParallel(model)
        state = CommState("none")
        if hooked:
            ddp.register_comm_hook(state, comm_hook)
        train(ddp, range(3), optimizer=adam(ddp), loss=loss)
        kept.append(parameters_of(ddp))
    assert state.session is not None
    return kept[0], kept[1], state.session.report().rows[0].dtype


def test_the_bare_hook_takes_complex_gradients_in_any_order_of_memory() -> None:
    for plain, hooked, dtype in run(2, by_hand):
        assert same(plain, hooked)
        assert dtype == "complex64"


def with_buffers(spec: str) -> tuple[Tensor, float]:
    """A complex buffer that each rank turns by an angle of its own, but for what rank 0 sends."""
    ddp = DistributedDataParallel(Waves())
    session = commpress.attach(ddp, "none", buffers=spec)
    train(ddp, range(3), optimizer=adam(ddp), loss=loss)
    with torch.no_grad():
        ddp.eval()(torch.zeros(1, 32, dtype=torch.complex64))  # buffers are sent before a forward
    (sent,) = [row for row in session.report().rows if row.role == "buffers" and not row.reason] or [None]
    return ddp.module.turn, 0.0 if sent is None else sent.dense_bytes / max(1, sent.sent_bytes)


@pytest.mark.parametrize("spec", ["none", "int8"])
def test_complex_buffers_are_those_of_rank_0(spec: str) -> None:
    (one, ratio), (other, _) = run(2, with_buffers, spec)
    expected = torch.polar(torch.ones(()), torch.tensor(0.03))
    torch.testing.assert_close(one, expected.expand(600), rtol=0, atol=1e-5)
    torch.testing.assert_close(other, one, rtol=0, atol=0 if spec == "none" else 2e-3)
    assert ratio > 3 or spec == "none"


def masked(spec: str) -> tuple[list[Tensor], Tensor]:
    """Masks of a complex parameter: what they prune gets no gradient, on both ranks; the rest that of plain DDP."""
    gradients = []
    mask = torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) < 0.3
    for hooked in (False, True):
        ddp = DistributedDataParallel(Waves())
        if hooked:
            session = commpress.attach(ddp, spec)
            session.set_masks({"first": mask})
        loss(ddp, 0).backward()
        gradients.append(ddp.module.first.grad)
    assert "ValueError" in outcome(lambda: session.set_masks({"first": torch.ones(32, 96, dtype=torch.bool)}))
    return gradients, mask  # type: ignore[return-value]


@pytest.mark.parametrize("spec", ["none", "int8"])
def test_masks_of_complex_parameters_are_by_complex_values(spec: str) -> None:
    for (plain, hooked), mask in run(2, masked, spec):
        assert not hooked[~mask].any()
        if spec == "none":
            assert torch.equal(hooked[mask], plain[mask])
        else:
            assert near([hooked[mask]], [plain[mask]])


def pruned(wrap: str, criterion: str) -> Tensor:
    """A complex layer of which a recipe prunes a half; its real parts are all 0, and those of half its rows are small."""
    model = Waves()
    with torch.no_grad():
        model.first.copy_(torch.complex(torch.zeros(32, 48), model.first.real.abs() + 0.1))
        model.first[:16] *= 0.01
    if wrap == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
        session: Any = commpress.attach(wrapped, "int4")
    else:
        wrapped = fully_shard(model)  # type: ignore[assignment]
        session = commpress.attach(model, gradients="int4", parameters="int8")
    settings = {"start": 1, "end": 3, "every": 1, "amount": 0.5, "schedule": "cubic", "parameters": ("first",)}
    recipe = Recipe.model_validate({"prune": ({**settings, "criterion": criterion},)})
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-4)
    scheduler = Scheduler(recipe, model, optimizer, session=session)
    for step in range(5):
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
        scheduler.step()
    p = model.first.detach()
    return p.full_tensor() if wrap == "fsdp" else p  # type: ignore[no-any-return,operator]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_recipe_prunes_complex_weights_by_their_size(wrap: str) -> None:
    one, other = run(2, pruned, wrap, "magnitude")
    assert torch.equal(one, other)
    assert not one[:16].any()
    assert bool(one[16:].imag.all())


# --- sharded -----------------------------------------------------------------------------------------------------


def fsdp_training(gradients: str | None, parameters: str, dtype: torch.dtype, pairs: bool) -> tuple[list[Tensor], Any]:
    """Whole parameters at the end, and the report."""
    model = Waves(dtype, pairs=pairs)
    fully_shard(model)
    session = None
    if gradients is not None:
        session = commpress.attach(model, gradients=gradients, parameters=parameters)
    train(model, range(STEPS), optimizer=adam(model), loss=loss)
    whole = [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[operator]
    if session is not None:
        state = session.state_dict()
        session.load_state_dict(state)
        assert same(*([b["residual"] for b in s["memories"][0]] for s in (state, session.state_dict())))
    return whole, None if session is None else session.report().to_dict()


SHARDED = [("none", "none"), ("int4", "int8"), ("sign", "none"), ("topk(0.1)|int4", "bf16")]


def fsdp_trainings(dtype: torch.dtype) -> list[Any]:
    """By each pair of specs, without us first; each with complex parameters and with pairs of reals."""
    return [[fsdp_training(*spec, dtype, pairs) for pairs in (False, True)] for spec in ((None, "none"), *SHARDED)]


@pytest.mark.parametrize("dtype", [torch.complex64, slow(torch.complex128)])
def test_complex_shards_train_as_without_us(dtype: torch.dtype) -> None:
    for (plain, _), *trainings in run(2, fsdp_trainings, dtype):
        assert same(plain[0], trainings[0][0][0])  # bit for bit
        for (whole, report), (twin, of_pairs) in trainings:
            assert same(in_reals(whole), twin)
            assert all(p.imag.any() for p in whole)
            assert report["sent_bytes"] == of_pairs["sent_bytes"]
            assert {row["dtype"] for row in report["rows"]} == {str(dtype).removeprefix("torch.")}
            assert {row["values"] for row in report["rows"]} == {sum(p.numel() for p in whole)}


def hybrid(spec: str) -> list[Tensor]:
    """Mean gradients on a mesh of 2 replicas and 2 shards."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    model = Waves()
    fully_shard(model, mesh=mesh)
    if spec != "plain":
        commpress.attach(model, gradients=spec)
    loss(model, 0).backward()
    return [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]


def test_complex_shards_are_averaged_over_replicas() -> None:
    plain, none, coded = (run(4, hybrid, spec)[0] for spec in ("plain", "none", "int8"))
    assert same(plain, none)
    assert near(coded, plain)


# --- local steps and broadcasts ----------------------------------------------------------------------------------


def local_steps(way: str, spec: str, delay: int) -> tuple[Any, Any]:
    """12 local steps, synced every 4, with a state that is saved and restored on the way: complex, then pairs of reals."""
    kept = []
    for pairs in (False, True):
        model = Waves(pairs=pairs)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        start = getattr(commpress, way)
        outer = start(model, optimizer, spec, every=4, delay=delay, fragments=2)
        train(model, range(10), optimizer=optimizer, loss=loss)
        outer.load_state_dict(copy.deepcopy(outer.state_dict()))
        train(model, range(10, 12), optimizer=optimizer, loss=loss)
        outer.sync()
        report = outer.report()
        kept.append((parameters_of(model), report.sent_bytes, report.dense_bytes))
    return kept[0], kept[1]


@pytest.mark.parametrize("way", ["diloco", "local_sgd"])
@pytest.mark.parametrize(("spec", "delay"), [slow("none", 0), ("int8", 1), ("topk(0.1)|sign", 0)])
def test_local_steps_train_imaginary_parts(way: str, spec: str, delay: int) -> None:
    (one, twin), (other, _) = run(2, local_steps, way, spec, delay)
    assert same(one[0], other[0])
    assert same(in_reals(one[0]), twin[0])
    assert one[1:] == twin[1:]
    for start, p in zip(Waves().parameters(), one[0], strict=True):
        assert (p.imag - start.imag).norm() > 0.02 * start.imag.norm()


def first_sync(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The mean of the ranks' parameters, computed by hand and by local_sgd."""
    model = Waves(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = commpress.local_sgd(model, optimizer, "none", every=100)
    train(model, range(2), optimizer=optimizer, loss=loss)
    means = []
    for p in parameters_of(model):
        dist.all_reduce(p)
        means.append(p / dist.get_world_size())
    outer.sync()
    return means, parameters_of(model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_sync_is_the_mean_of_complex_values(dtype: torch.dtype) -> None:
    for means, synced in run(2, first_sync, dtype):
        for mean, p in zip(means, synced, strict=True):
            torch.testing.assert_close(p, mean, rtol=1e-5, atol=1e-6)


def broadcasts(spec: str, dtype: torch.dtype) -> list[Tensor]:
    """What rank 1 has after two broadcasts from rank 0, between which rank 0 trains."""
    torch.manual_seed(dist.get_rank())
    model = Waves(dtype if dtype != torch.complex32 else torch.complex64, mixed=True)
    model.first.data = torch.randn(32, 48, dtype=torch.complex64).to(dtype)
    commpress.broadcast_parameters(model, spec)
    first = parameters_of(model)
    with torch.no_grad():
        for p in model.parameters():
            real_view(p).add_(0.01 * (1 + dist.get_rank()))
    commpress.broadcast_parameters(model, spec)
    return [real_view(p) for p in (*first, *parameters_of(model))]  # pickle does not know complex32


@pytest.mark.parametrize("spec", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
def test_complex_parameters_are_broadcast(spec: str, dtype: torch.dtype) -> None:
    one, other = run(2, broadcasts, spec, dtype)
    half = len(one) // 2
    assert same([real_view(p) for p in one[:half]], [real_view(p) for p in other[:half]])  # the first time exactly
    for p, q in zip(one[half:], other[half:], strict=True):
        exact = spec == "none" or p.dtype == torch.complex128
        torch.testing.assert_close(real_view(p).float(), real_view(q).float(), rtol=0, atol=0 if exact else 5e-3)


# --- what is refused ---------------------------------------------------------------------------------------------


def refused() -> dict[str, str]:
    """What is said to complex parameters where they do not work."""
    said = {}
    kinds: dict[str, Callable[..., Any]] = {
        "OneBitAdamW": commpress.optim.OneBitAdamW,
        "ZeroOneAdamW": commpress.optim.ZeroOneAdamW,
        "DGC": commpress.optim.DGC,
    }
    for name, kind in kinds.items():
        # rank 1 alone has a complex model: it says so on both
        model: nn.Module = Waves(mixed=True) if dist.get_rank() == 1 else nn.Linear(8, 8)
        ddp = DistributedDataParallel(model, init_sync=False)
        said[name] = outcome(lambda ddp=ddp, kind=kind: commpress.attach(ddp, "sign", optimizer=kind(ddp.parameters())))
    return said


def test_compressed_optimizers_refuse_complex_parameters_on_all_ranks() -> None:
    one, other = run(2, refused)
    for name in one:
        assert other[name].startswith("ValueError: parameter 'first' is")
        assert "complex64" in other[name]
        assert one[name].removeprefix("ValueError: ") == "rank 1: " + other[name].removeprefix("ValueError: ")


class Eighths(nn.Module):
    """A parameter that is neither float nor complex for torch's collectives."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.arange(300).float().to(torch.float8_e4m3fn), requires_grad=trained)
        self.layer = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.q.float().sum()


def other_dtypes() -> dict[str, Any]:
    """Trained float8 parameters are refused; those that are not, integers and bools go where parameters go."""
    said: dict[str, Any] = {}
    ddp = DistributedDataParallel(Eighths(True), init_sync=False)
    said["ddp"] = outcome(lambda: commpress.attach(ddp, "int4"))
    model = Eighths(True)
    said["local_sgd"] = outcome(lambda: commpress.local_sgd(model, torch.optim.SGD(model.parameters()), every=2))
    sharded = Eighths(True)
    fully_shard(sharded)
    said["fsdp"] = outcome(lambda: commpress.attach(sharded, gradients="int4"))
    still = Eighths(False)
    fully_shard(still)
    said["fsdp, not trained"] = outcome(lambda: commpress.attach(still, gradients="int4"))
    for spec in ("none", "int8"):
        model = Eighths(False)
        model.extra = nn.Parameter(torch.full((7,), dist.get_rank(), dtype=torch.int16), requires_grad=False)
        model.flags = nn.Parameter(torch.full((3, 2), dist.get_rank() == 0), requires_grad=False)
        with torch.no_grad():
            model.q.copy_((model.q.float() * (1 + dist.get_rank())).to(torch.float8_e4m3fn))
        for _ in range(2):
            commpress.broadcast_parameters(model, spec)
        said[spec] = (model.q.float(), model.extra.detach(), model.flags.detach())
    return said


def test_dtypes_that_are_neither_float_nor_complex() -> None:
    one, other = run(2, other_dtypes)
    assert one["fsdp, not trained"] == other["fsdp, not trained"] == ""
    for way in ("ddp", "local_sgd", "fsdp"):
        assert one[way] == other[way]
        assert (
            "parameter 'q' has dtype float8_e4m3fn, expected one of float32, float64, bfloat16, float16, or" in one[way]
        )
    for spec in ("none", "int8"):
        assert same(one[spec], other[spec])
        assert not one[spec][1].any()
        assert one[spec][2].all()
