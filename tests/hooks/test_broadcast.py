"""Parameters and buffers from one rank to all: exact where it says so, else deltas, the same bits for all that get them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import batch, network, parameters_of, same

import commpress
from commpress.comm.broadcasts import Broadcasts
from commpress.comm.exchange.wire import tree_children


def moved(model: nn.Module, step: int) -> None:
    """Change all parameters a little, on this rank alone."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))


def broadcasts(spec: str, times: int, source: int) -> tuple[list[Tensor], commpress.Report]:
    model = network(seed=dist.get_rank())
    report = None
    for step in range(times):
        if dist.get_rank() == source:
            moved(model, step)
        report = commpress.broadcast_parameters(model, spec, source=source)
    assert report is not None
    return parameters_of(model), report


@pytest.mark.parametrize(("world_size", "source"), [(2, 0), (3, 2), (4, 1)])
def test_exact_is_exact(world_size: int, source: int) -> None:
    results = run(world_size, broadcasts, "none", 2, source)
    assert all(same(results[source][0], parameters) for parameters, _ in results)


@pytest.mark.parametrize(("world_size", "source"), [(2, 0), (3, 2), (4, 1)])
@pytest.mark.parametrize("spec", ["int8", "int4", "topk(0.1)|int2"])
def test_the_others_hold_the_same_bits_and_the_source_its_own(world_size: int, source: int, spec: str) -> None:
    results = run(world_size, broadcasts, spec, 4, source)
    others = [parameters for rank, (parameters, _) in enumerate(results) if rank != source]
    assert all(same(others[0], parameters) for parameters in others)
    own = torch.cat([p.view(-1) for p in results[source][0]])
    known = torch.cat([p.view(-1) for p in others[0]])
    assert not torch.equal(own, known)
    assert (own - known).norm() < 0.15 * own.norm()


def catches_up() -> list[float]:
    """How far the other rank is from a source that stands still."""
    model = network(seed=dist.get_rank())
    distances = []
    for step in range(6):
        if step < 2 and dist.get_rank() == 0:
            moved(model, step)
        commpress.broadcast_parameters(model, "int4")
        both: list[Any] = [None, None]
        dist.all_gather_object(both, torch.cat([p.view(-1) for p in parameters_of(model)]))
        distances.append(float((both[0] - both[1]).norm()))
    return distances


def test_what_a_codec_withheld_is_sent_next_time() -> None:
    distances = run(2, catches_up)[1]
    assert distances[0] == 0  # the first time is exact
    assert distances[1] > 0
    assert distances[5] < 1e-3 * distances[1]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_are_those_of_the_payloads(world_size: int) -> None:
    results = run(world_size, broadcasts, "int4", 3, 0)
    n = sum(p.numel() for p in results[0][0])
    payload = commpress.parse("int4").nbytes(n) + 6  # a byte for each of six tensors
    assert sum(report.sent_bytes for _, report in results) == (world_size - 1) * (4 * n + 2 * payload)
    assert sum(report.dense_bytes for _, report in results) == (world_size - 1) * 3 * 4 * n
    assert {row.reason for row in results[0][1].rows} == {"the first time", ""}
    assert set(results[0][1].roles) == {"parameters"}


@pytest.mark.parametrize("world_size", range(1, 18))
def test_a_tree_reaches_every_rank_once(world_size: int) -> None:
    for source in range(world_size):
        assert sum(tree_children(rank, source, world_size) for rank in range(world_size)) == world_size - 1


def variances() -> list[Tensor]:
    """A tensor without negative values, some of which fall by less than the codec errs."""
    x = {"running_var": torch.full((256,), 1e-6), "mean": torch.zeros(256)}
    sender = Broadcasts("int4", x, dist.distributed_c10d._get_default_group())
    seen = []
    for step in range(8):
        if dist.get_rank() == 0:
            falling = torch.rand(256, generator=torch.Generator().manual_seed(step)) * 100 / (1 + step) ** 2
            x["running_var"].copy_(falling)
            x["mean"] -= 1.0
        sender.send(x)
        seen += [x["running_var"].clone(), x["mean"].clone()]
    return seen


def test_what_has_no_negative_value_gets_none() -> None:
    seen = run(2, variances)[1]
    assert all(bool((var >= 0).all()) for var in seen[::2])
    assert all(bool((mean < 0).all()) for mean in seen[3::2])


def not_finite() -> list[dict[str, Tensor]]:
    """A mask of -inf, and a value that is Inf in the third broadcast of five."""
    x = {"mask": torch.full((64,), -torch.inf), "p": torch.zeros(4096)}
    sender = Broadcasts("int8", x, dist.distributed_c10d._get_default_group())
    seen = []
    for step in range(5):
        if dist.get_rank() == 0:
            x["p"].fill_(step)
            if step == 2:
                x["p"][7] = torch.inf
        sender.send(x)
        seen.append({name: value.clone() for name, value in x.items()})
    return seen


def test_what_is_not_finite_goes_by() -> None:
    seen = run(2, not_finite)[1]
    assert all(torch.equal(step["mask"], torch.full((64,), -torch.inf)) for step in seen)
    for step, values in enumerate(seen):
        assert values["p"].isfinite().all()
        expected = torch.full((4096,), float(step))
        block = slice(1024, None) if step == 2 else slice(None)  # the block of the Inf stays as it was
        torch.testing.assert_close(values["p"][block], expected[block], rtol=0.02, atol=0.02)
    assert seen[2]["p"][7] == seen[1]["p"][7]


def in_float64(spec: str) -> tuple[list[Tensor], str]:
    model = network(seed=dist.get_rank()).double()
    with torch.no_grad():
        for p in model.parameters():
            p.div_(3)
    report = commpress.broadcast_parameters(model, spec)
    return parameters_of(model), report.rows[0].reason


def test_float64_parameters_are_exact() -> None:
    (one, why), (other, _) = run(2, in_float64, "int8")
    assert same(one, other)
    assert why == "float64 has more bits than float32"


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 600), nn.BatchNorm1d(600), nn.ReLU(), nn.Linear(600, 10))


def with_buffers(spec: str | None, steps: int) -> tuple[list[Tensor], list[Tensor], commpress.Report]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Normed())
    session = commpress.attach(ddp, "none", buffers=spec)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(steps):
        x, y = batch(step, dist.get_rank())
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    ddp(batch(0, 0)[0])  # its start brings all buffers together, then each rank's own forward moves them alike
    return [b.clone() for b in ddp.buffers()], parameters_of(ddp), session.report()


def test_exact_buffers_are_those_of_ddp() -> None:
    plain, exact = (run(2, with_buffers, spec, 5) for spec in (None, "none"))
    for one, other in zip(plain, exact, strict=True):
        assert same(one[0], other[0])
        assert same(one[1], other[1])
    assert set(exact[0][2].roles) == {"gradients", "buffers"}
    assert set(plain[0][2].roles) == {"gradients"}


def test_compressed_buffers_follow_those_of_ddp() -> None:
    plain, coded = (run(3, with_buffers, spec, 8) for spec in ("none", "int8"))
    assert same(coded[1][0], coded[2][0])
    for exact, ours in zip(plain[1][0], coded[1][0], strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.01)
    assert plain[1][0][2].item() == coded[1][0][2].item() == 9  # num_batches_tracked, an integer
    roles = coded[0][2].roles["buffers"]
    assert roles["dense_bytes"] > 2 * roles["sent_bytes"] > 0


def resumed_buffers() -> bool:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Normed())
    session = commpress.attach(ddp, "none", buffers="int4")
    for step in range(3):
        ddp(batch(step, dist.get_rank())[0])
    state, module = session.state_dict(), {k: v.clone() for k, v in ddp.module.state_dict().items()}
    ddp(batch(3, dist.get_rank())[0])
    whole = [b.clone() for b in ddp.buffers()]
    again = DistributedDataParallel(Normed())
    session = commpress.attach(again, "none", buffers="int4")
    again.module.load_state_dict(module)
    session.load_state_dict(state)
    again(batch(3, dist.get_rank())[0])
    return same(whole, list(again.buffers()))


def test_buffers_resume_bit_for_bit() -> None:
    assert run(2, resumed_buffers) == [True, True]


def evaluated(mode: str, order: str) -> list[Tensor]:
    """A DDP module that trains (t) and is evaluated (e): the buffers on this rank."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Normed())
    commpress.attach(ddp, "none", buffers="int8")
    for step, what in enumerate(order):
        ddp.train(what == "t")
        x, _ = batch(step, dist.get_rank())
        if what == "t":
            ddp(x).sum().backward()
        else:
            with getattr(torch, mode)():
                ddp(x)
    return [b.clone() for b in ddp.buffers()]


@pytest.mark.parametrize("order", ["tetet", "ett"])
def test_a_model_may_be_evaluated_in_inference_mode(order: str) -> None:
    for one, other in zip(run(2, evaluated, "inference_mode", order), run(2, evaluated, "no_grad", order), strict=True):
        assert same(one, other)


def attached_again() -> tuple[str, str, set[str]]:
    """A spec of buffers that does not exist, then one that does."""
    ddp = DistributedDataParallel(Normed())
    said = [outcome(lambda spec=spec: commpress.attach(ddp, "int4", buffers=spec)) for spec in ("int9", "int8")]  # type: ignore[misc]
    session = None if said[1] else ddp(batch(0, 0)[0])
    return said[0], said[1], set() if session is None else {"ran"}


def test_an_attach_that_failed_can_be_repeated() -> None:
    for first, second, ran in run(2, attached_again):
        assert "unknown codec 'int9'" in first
        assert second == ""
        assert ran


def refused(case: str) -> str:
    rank = dist.get_rank()
    if case == "shards":
        return outcome(lambda: commpress.broadcast_parameters(fully_shard(network()), "none"))
    if case == "no parameters":
        return outcome(lambda: commpress.broadcast_parameters(nn.Tanh() if rank else network(), "none"))
    if case == "no buffers":
        return outcome(lambda: commpress.attach(DistributedDataParallel(network()), "none", buffers="int8"))
    if case == "not broadcast":
        ddp = DistributedDataParallel(Normed(), broadcast_buffers=False)
        return outcome(lambda: commpress.attach(ddp, "none", buffers="int8"))
    if case == "compressed by one rank":
        ddp = DistributedDataParallel(Normed())
        return outcome(lambda: commpress.attach(ddp, "none", buffers="int8" if rank else None))
    arguments = {
        "unknown": ("int9", 0),
        "one rank's": ("int9" if rank else "int8", 0),
        "differ": ("int4" if rank else "int8", 0),
        "source": ("int8", 2),
    }[case]
    return outcome(lambda: commpress.broadcast_parameters(network(), arguments[0], source=arguments[1]))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shards", "'0.weight' is a DTensor, expected whole parameters on every rank"),
        ("no parameters", "Tanh has no parameters, expected at least one"),
        ("no buffers", "buffers 'int8': the DDP module has no buffers"),
        ("not broadcast", "was made with broadcast_buffers=False"),
        ("compressed by one rank", "rank 1 has buffers 'compressed', rank 0 has 'dense'"),
        ("unknown", "unknown codec 'int9'"),
        ("one rank's", "rank 1: spec 'int9': unknown codec"),
        ("differ", "rank 1 has spec 'int4', rank 0 has 'int8'"),
        ("source", "source 2: expected a rank of the group, 0 to 1"),
    ],
)
def test_is_refused_on_all_ranks(case: str, message: str) -> None:
    assert all(message in said for said in run(2, refused, case))
