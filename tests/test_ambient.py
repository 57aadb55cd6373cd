"""What a script has set in torch, for all of its process, changes no bit of what we do: default dtype and device,
deterministic algorithms, autocast, grad and inference mode, threads."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from tiers import slowly
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.comm.coding import encode, recode
from commpress.model import Recipe, Scheduler
from commpress.model.held import whole

INPUTS, WIDTH, CLASSES, STEPS = 32, 64, 10, 4
PARAMETERS = 8
"""How many tensors of parameters `network` has."""
CPU = torch.device("cpu")

Found = dict[str, list[Tensor]]


# --- what a script may have set ----------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """`torch.set_default_dtype` at the top of a script."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    """`torch.set_default_device` at the top of a script."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """All that is not deterministic raises, and fresh memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def matmul_precision() -> Iterator[None]:
    """Products of float32 may be computed in bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def threads_by_rank() -> Iterator[None]:
    """As many threads as the host has cores, and the hosts differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 + 7 * dist.get_rank())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Denormal numbers are 0 in the thread of the script, and stay what they are in others."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


SETTINGS: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "default dtype float64": functools.partial(default_dtype, torch.float64),
    "default dtype bfloat16": functools.partial(default_dtype, torch.bfloat16),
    "default dtype float16": functools.partial(default_dtype, torch.float16),
    "default device meta": functools.partial(default_device, "meta"),
    "default device cpu": functools.partial(default_device, "cpu"),
    "with torch.device": functools.partial(torch.device, "meta"),
    "deterministic algorithms": deterministic,
    "anomaly detection": functools.partial(torch.autograd.set_detect_anomaly, True),
}
THAT_CHANGE_THE_MODEL: dict[str, Callable[[], Any]] = {
    "matmul precision medium": matmul_precision,
    "threads by rank": threads_by_rank,
    "denormals flushed": flushed,
    "autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16),
}
"""Under these torch computes other bits itself."""
FOR_SOME = {
    "default dtype bfloat16",
    "default dtype float16",
    "default device cpu",
    "with torch.device",
    "anomaly detection",
    "matmul precision medium",
}
"""Settings that `SOME` programs see: they differ from one above them by a value or by how it is set, or they are about the
model's own forward and backward, which the programs share."""


# --- a model that depends on none of it --------------------------------------------------------------------------


def noise(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers with a batch norm: parameters and buffers."""
    there: Any = {"dtype": dtype, "device": CPU}
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH, **there),
        nn.BatchNorm1d(WIDTH, **there),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH, **there),
        nn.Tanh(),
        nn.Linear(WIDTH, CLASSES, **there),
    )
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(-p).add_(0.1 * noise(*p.shape, seed=100 * seed + i, dtype=dtype))
    return model


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """This rank's inputs and classes of a step."""
    x = noise(16, INPUTS, seed=1000 * step + dist.get_rank())
    return x.to(dtype), x[:, :CLASSES].argmax(dim=1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> None:
    """Some steps of a plain loop."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = batch(step, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def all_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [whole(p).detach().clone() for p in (*model.parameters(), *model.buffers())]


# --- what is done under it ---------------------------------------------------------------------------------------


def codecs(dtype: torch.dtype) -> list[Tensor]:
    found = []
    for spec in (
        "none",
        "bf16",
        "fp16",
        "int8",
        "int4",
        "int2",
        "sign",
        "topk(0.1)",
        "topk(0.1)|int4",
        "topk(0.1)|sign",
    ):
        codec = commpress.parse(spec)
        x, residual = noise(3000, seed=1, dtype=dtype), noise(3000, seed=2)
        payload = encode(codec, x, residual)
        both = torch.cat([payload, codec.encode(x.flip(0))])
        found += [payload, residual, codec.decode(payload, 3000), codec.mean(both, 3000, 2)]
        found += [codec.mean(both, 3000, 2, out=torch.empty_like(x)), recode(codec, both, 3000, 2, residual), residual]
        defined = codec.define_encode(x.float())
        found += [defined, codec.define_decode(defined, 3000)]
    return found


def ddp(spec: str, dtype: torch.dtype, **settings: Any) -> list[Tensor]:
    model = DistributedDataParallel(network(dtype=dtype), bucket_cap_mb=0.01)
    session = commpress.attach(model, spec, **settings)
    train(model, sgd(model))
    session.load_state_dict(session.state_dict())
    train(model, sgd(model), range(STEPS, STEPS + 2))
    return all_of(model)


def fsdp(dtype: torch.dtype) -> list[Tensor]:
    model = network(dtype=dtype)
    fully_shard(model[0])
    fully_shard(model)
    commpress.attach(model, gradients="int4", parameters="int8")
    train(model, sgd(model))
    return all_of(model)


def outer(kind: str, dtype: torch.dtype, **settings: Any) -> list[Tensor]:
    model = network(dtype=dtype)
    optimizer = sgd(model)
    syncs = getattr(commpress, kind)(model, optimizer, **settings)
    train(model, optimizer)
    syncs.sync()
    return [p.detach().clone() for p in model.parameters()]


def compressed(kind: str, spec: str, dtype: torch.dtype, **settings: Any) -> list[Tensor]:
    model = DistributedDataParallel(network(dtype=dtype))
    optimizer = getattr(commpress.optim, kind)(model.parameters(), lr=0.01, **settings)
    commpress.attach(model, spec, optimizer=optimizer)
    train(model, optimizer)
    with optimizer.synced() if kind == "ZeroOneAdamW" else contextlib.nullcontext():
        return all_of(model)


class Side(nn.Module):
    """Layers side by side."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=1)


def sparse_and_large(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """More values than one thread sums, of which half have no gradient before the variance stands."""
    there: Any = {"dtype": dtype, "device": CPU, "bias": False}
    model = nn.ModuleList([nn.Linear(400, 400, **there) for _ in range(3)])
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(-p).add_(noise(*p.shape, seed=i, dtype=dtype))
    wrapped = DistributedDataParallel(Side(model))
    optimizer = getattr(commpress.optim, kind)(model.parameters(), lr=0.01, betas=(0.5, 0.6), max_norm=1.0)
    commpress.attach(wrapped, "sign", optimizer=optimizer)
    for step in range(3 * STEPS):
        x = noise(4, 400, seed=10 * step + dist.get_rank(), dtype=dtype)
        if step < STEPS:
            x[:, ::2] = 0
        wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["frozen_at"], "the warm-up has not ended"
    with optimizer.synced() if kind == "ZeroOneAdamW" else contextlib.nullcontext():
        return all_of(model)


def broadcasts(dtype: torch.dtype) -> list[Tensor]:
    found = []
    for spec in ("none", "int8", "topk(0.1)|int4"):
        model = network(seed=dist.get_rank(), dtype=dtype)
        for call in range(3):
            commpress.broadcast_parameters(model, spec)
            if dist.get_rank():
                found += [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p.add_(0.01 * noise(*p.shape, seed=10 * call + i, dtype=dtype))
    shared = found or [torch.empty(0, dtype=dtype, device=CPU)]
    dist.barrier()
    return shared


def recipe(dtype: torch.dtype) -> list[Tensor]:
    model = network(dtype=dtype)
    optimizer = sgd(model)
    wrapped = DistributedDataParallel(model)
    session = commpress.attach(wrapped, "int4")
    plan = Recipe.of(
        {
            "prune": [{"start": 1, "end": 3, "every": 2, "amount": 0.5, "criterion": "taylor"}],
            "quantize": [] if dtype == torch.float64 else [{"start": 2, "bits": 8}],  # which is refused
            "distil": {"start": 1, "end": 3, "weight": 0.5, "hidden": {"2": "2"}},
        }
    )
    scheduler = Scheduler(plan, model, optimizer, session=session, teacher=network(seed=1, dtype=dtype))
    for step in range(STEPS):
        x, y = batch(step, dtype)
        output = wrapped(x)
        scheduler.loss(nn.functional.cross_entropy(output, y), output, x).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return all_of(model)


PROGRAMS: dict[str, Callable[[torch.dtype], list[Tensor]]] = {
    "codecs": codecs,
    "none": functools.partial(ddp, "none"),
    "bf16": functools.partial(ddp, "bf16"),
    "int4": functools.partial(ddp, "int4"),
    "int4 by two_shot": functools.partial(ddp, "int4", exchange="two_shot"),
    "int4 without feedback": functools.partial(ddp, "int4", error_feedback=False),
    "topk(0.1)|int4": functools.partial(ddp, "topk(0.1)|int4", buffers="int8"),
    "fsdp": fsdp,
    "local_sgd": functools.partial(outer, "local_sgd", every=2, fragments=2),
    "diloco": functools.partial(outer, "diloco", every=3, delay=1),
    "OneBitAdamW": functools.partial(compressed, "OneBitAdamW", "sign", warmup_steps=2),
    "OneBitAdamW, its own warm-up": functools.partial(compressed, "OneBitAdamW", "sign"),
    "ZeroOneAdamW": functools.partial(compressed, "ZeroOneAdamW", "sign", warmup_steps=2, sync_every=2),
    "OneBitAdamW of many values": functools.partial(sparse_and_large, "OneBitAdamW"),
    "ZeroOneAdamW of many values": functools.partial(sparse_and_large, "ZeroOneAdamW"),
    "DGC": functools.partial(compressed, "DGC", "topk(0.1)", momentum=0.9),
    "broadcasts": broadcasts,
    "recipe": recipe,
}


SOME = ("codecs", "int4", "fsdp", "diloco", "ZeroOneAdamW", "broadcasts", "recipe")


def all_under(setting: str, dtype: torch.dtype, only: tuple[str, ...]) -> tuple[Found, dict[str, str]]:
    """What each program leaves, and what it raised where it did."""
    found, raised = {}, {}
    for name in only:
        try:
            with (SETTINGS | THAT_CHANGE_THE_MODEL)[setting]():
                found[name] = PROGRAMS[name](dtype)
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
    return found, raised


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def differing(one: list[Tensor], other: list[Tensor]) -> list[str]:
    """Where two results are not the same bits."""
    if len(one) != len(other):
        return [f"{len(one)} and {len(other)} tensors"]
    return [
        f"tensor {i}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}"
        for i, (a, b) in enumerate(zip(one, other, strict=True))
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(bits(a), bits(b))
    ]


@functools.cache
def under(setting: str, dtype: torch.dtype = torch.float32, only: tuple[str, ...] = tuple(PROGRAMS)) -> list[Found]:
    """What each rank has at the end; nothing was raised."""
    results = run(2, all_under, setting, dtype, only, timeout=120)
    for rank, (_, raised) in enumerate(results):
        assert not raised, f"rank {rank}: {raised}"
    return [found for found, _ in results]


@pytest.mark.parametrize(
    "setting",
    slowly(
        [name for name in SETTINGS if name != "nothing"],
        quick=("default dtype bfloat16",),
    ),
)
def test_a_setting_of_the_script_changes_no_bit(setting: str) -> None:
    only = SOME if setting in FOR_SOME else tuple(PROGRAMS)
    for expected, found in zip(under("nothing"), under(setting, only=only), strict=True):
        for name in only:
            assert not differing(expected[name], found[name]), name


def require_one_model(ranks: list[Found], different: frozenset[str] = frozenset()) -> None:
    """All ranks have the same parameters, and these are numbers; `different` programs leave other things on other ranks."""
    for name in ranks[0].keys() - different:
        parameters = ranks[0][name][:PARAMETERS]  # the rest are buffers, and each rank's own since the last forward
        assert all(x.isfinite().all() for x in parameters if x.is_floating_point()), name
        for other in ranks[1:]:
            assert not differing(parameters, other[name][:PARAMETERS]), name


OWN = frozenset({"broadcasts"})
"""Rank 0 keeps its own values."""


@pytest.mark.parametrize("setting", slowly(THAT_CHANGE_THE_MODEL, quick=("matmul precision medium",)))
def test_a_setting_that_changes_what_the_model_computes_leaves_the_ranks_alike(setting: str) -> None:
    only = SOME if setting in FOR_SOME else tuple(PROGRAMS)
    ranks = under(setting, only=only)
    for expected, found in zip(under("nothing"), ranks, strict=True):
        for name in ("codecs", "broadcasts"):
            assert not differing(expected[name], found[name]), name
    require_one_model(ranks, OWN)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_the_default_dtype_trains_as_one_model(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    only = tuple(PROGRAMS) if dtype == torch.float64 else SOME
    followed = under(f"default dtype {name}", dtype, only)
    require_one_model(followed, OWN)
    for expected, found in zip(under("nothing", dtype, only), followed, strict=True):
        for program in only:
            assert not differing(expected[program], found[program]), program
            assert program == "codecs" or {x.dtype for x in found[program] if x.is_floating_point()} == {dtype}


# --- modes that are on in a part of a script ---------------------------------------------------------------------


MODES: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def looked_at(model: nn.Module, mode: Callable[[], Any]) -> None:
    """A forward to see how good the model is."""
    model.eval()
    with mode():
        model(batch(99)[0])
    model.train()


def ddp_in(mode: Callable[[], Any], exchange: str | None = None) -> list[Tensor]:
    model = DistributedDataParallel(network())
    with mode():
        session = commpress.attach(model, "topk(0.1)|int4", buffers="int8", exchange=exchange)
    looked_at(model, torch.no_grad if mode is contextlib.nullcontext else mode)
    optimizer = sgd(model)
    mask = noise(WIDTH, INPUTS, seed=3) > 0
    for masks in ({"0.weight": mask}, {}):
        train(model, optimizer)
        with mode():
            session.report()
            session.load_state_dict(session.state_dict())
        train(model, optimizer)
        with mode():
            session.set_masks(masks)
    train(model, optimizer)
    return all_of(model)


def compressed_in(kind: str, spec: str, mode: Callable[[], Any], **settings: Any) -> list[Tensor]:
    model = DistributedDataParallel(network())
    optimizer = getattr(commpress.optim, kind)(model.parameters(), lr=0.01, **settings)
    with mode():
        session = commpress.attach(model, spec, optimizer=optimizer)
    train(model, optimizer)
    with mode():
        state = session.state_dict()
        optimizer.load_state_dict(optimizer.state_dict())
        session.load_state_dict(state)
    train(model, optimizer)
    with mode(), optimizer.synced() if kind == "ZeroOneAdamW" else contextlib.nullcontext():
        found = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)
    return found


def outer_in(kind: str, mode: Callable[[], Any], **settings: Any) -> list[Tensor]:
    model = network()
    optimizer = sgd(model)
    with mode():
        syncs = getattr(commpress, kind)(model, optimizer, **settings)
    train(model, optimizer)
    with mode():
        syncs.sync()
        syncs.load_state_dict(syncs.state_dict())
    train(model, optimizer)
    with mode():
        syncs.sync()
        model(batch(0)[0])
    return [p.detach().clone() for p in model.parameters()]


def broadcasts_in(mode: Callable[[], Any]) -> list[Tensor]:
    model = network(seed=dist.get_rank())
    for call in range(4):
        with mode() if call % 2 == 0 else contextlib.nullcontext():
            commpress.broadcast_parameters(model, "int8")
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.01 * noise(*p.shape, seed=10 * call + i))
    return [p.detach().clone() for p in model.parameters()]


PARTLY: dict[str, Callable[[Callable[[], Any]], list[Tensor]]] = {
    "ddp": ddp_in,
    "ddp by two_shot": functools.partial(ddp_in, exchange="two_shot"),
    "OneBitAdamW": functools.partial(compressed_in, "OneBitAdamW", "sign", warmup_steps=2),
    "ZeroOneAdamW": functools.partial(compressed_in, "ZeroOneAdamW", "sign", warmup_steps=2, sync_every=2),
    "DGC": functools.partial(compressed_in, "DGC", "topk(0.1)", momentum=0.9),
    "local_sgd": functools.partial(outer_in, "local_sgd", every=4),
    "diloco": functools.partial(outer_in, "diloco", every=4, delay=1, fragments=2),
    "broadcasts": broadcasts_in,
}


def all_in(mode: str) -> tuple[Found, dict[str, str]]:
    """What each program leaves if the calls around its training stand in a mode, and what it raised where it did."""
    found, raised = {}, {}
    for name, program in PARTLY.items():
        try:
            found[name] = program(MODES.get(mode, contextlib.nullcontext))
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
    return found, raised


@functools.cache
def partly(mode: str) -> list[Found]:
    """What each rank has at the end; nothing was raised."""
    results = run(2, all_in, mode, timeout=120)
    for rank, (_, raised) in enumerate(results):
        assert not raised, f"rank {rank}: {raised}"
    return [found for found, _ in results]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_what_is_called_in_a_mode_without_gradients_can_be_trained_with_afterwards(mode: str) -> None:
    for expected, found in zip(partly("none"), partly(mode), strict=True):
        for name in PARTLY:
            assert not differing(expected[name], found[name]), name
