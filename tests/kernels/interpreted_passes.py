"""The kernels for CUDA that belong to no codec give the bits of the loops for the CPU, on Triton's interpreter; and some of
`randomk` and `rotate`, whose whole battery is slow.

`test_triton.py` runs this file in a process of its own. By hand:

    TRITON_INTERPRET=1 SPECS= pytest tests/kernels/interpreted_passes.py
"""

from typing import Any

import battery
import pytest
import torch
from battery import same, same_bits
from interpreted import kernels  # noqa: F401
from torch import Tensor

from commpress.comm import coding, masks_index
from commpress.comm.codecs import parse
from commpress.comm.fingerprint import fingerprint_on_device
from commpress.comm.prologue import Ahead, Prologue
from commpress.kernels import table
from commpress.kernels.cpu import optim
from commpress.model.loops import count_pruned, keep_
from commpress.optim import loops

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("kernels")]

LENGTHS = (1, 1024, 2500)
"""Less than a program, a whole one, several with a tail."""
PASSES: dict[str, tuple[int, tuple[float, ...]]] = {
    "apply_update": (3, (0.99, 0.3)),
    "local_step": (6, (1.0, 0.9, 0.99, 0.3, 0.97)),
    "sync_payload": (5, (1.0, 0.1, 0.9, 0.3, 0.7)),
    "sync_apply": (6, (0.97, 1.2, 4.0)),
    "restore_local": (3, (0.97,)),
    "estimate_momentum": (2, (-2.0, 3.0)),
    "add_scaled": (2, (0.9,)),
    "momentum_correction": (3, (0.9, 0.01, 0.0)),
    "momentum_ahead": (2, (0.1,)),
    "momentum_correction, Nesterov's": (3, (0.9, 0.01, 1.0)),
}
"""How many tensors each takes, and its numbers."""


@pytest.fixture
def cpu_table() -> dict[tuple[str, str | None, str], Any]:
    """The table as it is without the interpreter."""
    return {(op, None, "cpu"): table.Kernel(lambda *a, op=op: optim.run(op, *a)) for op in optim.LOOPS}


def tensors_of(name: str, n: int) -> list[Tensor]:
    """What a pass takes, with some NaN and Inf in the first; the last is bfloat16 where it is what is known."""
    found = [battery.normal(n, seed) for seed in range(PASSES[name][0])]
    found[0][7:9] = torch.tensor([torch.nan, torch.inf])[: max(0, n - 7)]
    return [*found[:-1], found[-1].bfloat16()] if name in ("estimate_momentum", "add_scaled") else found


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equal bits but for those of NaN."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.float().nan_to_num(0), b.float().nan_to_num(0))


def moved(x: Tensor, momentum: Tensor, fresh: float) -> None:
    """`momentum_ahead` of the table."""
    Ahead(momentum, fresh).apply(x)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_of_an_optimizer_has_the_bits_of_the_loop(
    name: str, n: int, cpu_table: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, numbers = moved if name == "momentum_ahead" else getattr(loops, name.partition(",")[0]), PASSES[name][1]
    found, expected, before = (tensors_of(name, n) for _ in range(3))
    apply(*found, *numbers)
    monkeypatch.setattr(table, "KERNELS", table.KERNELS | cpu_table)
    apply(*expected, *numbers)
    assert all(same_values(a, b) for a, b in zip(found, expected, strict=True))
    assert any(not same_values(a, b) for a, b in zip(found, before, strict=True))


def test_a_local_step_is_restored_bit_for_bit_and_in_any_order_of_memory() -> None:
    tensors = [
        battery.normal(420, seed).view(3, 5, 7, 4).contiguous(memory_format=torch.channels_last) for seed in range(6)
    ]
    *_, total, anchor, p = tensors
    loops.local_step(*tensors, limit=1.0, beta=0.9, keep=0.99, rate=0.3, decay=0.97)
    restored = torch.empty_like(p)
    loops.restore_local(restored, anchor, total, 0.97)
    assert same_bits(restored, p)


def test_every_pass_that_has_a_loop_on_cpu_has_a_kernel() -> None:
    from commpress.kernels.triton.table import KERNELS

    assert {op for op, word, device in table.KERNELS if word is None} <= {op for op, word, _ in KERNELS if word is None}


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2048, 5003])
def test_a_hash_on_the_device_is_that_of_its_definition(
    n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (10 * battery.normal(n)).to(dtype)
    assert table.lookup("fingerprint", None, "cpu") is not None
    found = fingerprint_on_device(x)
    monkeypatch.setattr(table, "KERNELS", {})
    assert found.dtype == torch.int64
    assert torch.equal(found, fingerprint_on_device(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("n", [3, 5000])
def test_masks_prune_and_count_the_bits_of_any_dtype(n: int, dtype: torch.dtype) -> None:
    x, kept = battery.gradient(n).to(dtype), battery.normal(n, 1) > 0.3
    x[1], kept[1], kept[2] = -0.0, False, False
    x[2] = torch.nan
    pruned = x.clone()
    keep_(pruned, kept)
    assert pruned[2] == 0
    assert torch.equal(pruned[kept], x[kept])
    assert not pruned[~kept].any()
    if dtype.is_floating_point:
        assert count_pruned(x, kept) == int(((x != 0) & ~kept).sum()) > 0
        assert count_pruned(pruned, kept) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_what_masks_keep_is_packed_and_spread_out_again(dtype: torch.dtype) -> None:
    x = (10 * battery.normal(6000)).to(dtype)
    places = (battery.normal(6000, 1) > 0.4).nonzero().view(-1).to(torch.int32)
    places[5], places[-1] = -1, -1  # zeros that fill up a chunk
    there = places >= 0
    packed, out = torch.full((len(places),), 7, dtype=dtype), torch.full((6000,), 7, dtype=dtype)
    masks_index.pack(x, places, packed)
    assert torch.equal(packed[there], x[places[there]])
    assert not packed[~there].any()
    masks_index.unpack(packed, places, out)
    expected = torch.zeros_like(x)
    expected[places[there]] = x[places[there]]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("n", LENGTHS)
def test_a_prologue_alone_is_that_of_the_loop(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, prologue = battery.gradient(n), Prologue(0.5 + battery.normal(n, 1).abs(), battery.normal(n, 2), 1.0, 0.1, 0.9)
    x[0] = torch.inf
    found, expected = x.clone(), x.clone()
    prologue.apply(found)
    monkeypatch.setattr(table, "KERNELS", {})
    prologue.apply(expected)
    assert same_values(found, expected)


@pytest.mark.parametrize(
    ("spec", "draws"),
    [("randomk(0.01)|int4", (3, 3, 3)), ("randomk(0.3)", (2**40 + 7, 3, 3))],
    ids=["alike", "of two numbers"],
)
def test_payloads_of_any_draws_have_the_mean_and_the_places_of_the_definition(
    spec: str, draws: tuple[int, ...]
) -> None:
    codec, n = parse(spec), 9000
    xs = [battery.gradient(n, seed) for seed in range(3)]
    xs[1][4567] = torch.nan
    payloads = [codec.drawn(draw).encode(x) for draw, x in zip(draws, xs, strict=True)]
    assert all(
        torch.equal(payload, battery.defined_encode(codec.drawn(draw), x)[0])
        for payload, draw, x in zip(payloads, draws, xs, strict=True)
    )
    assert same(codec.mean(torch.cat(payloads), n, 3), coding.defined_mean(codec, torch.cat(payloads), n, 3))
    values, expected = torch.ones(n), torch.ones(n)
    coding.clear(codec, payloads[0], values)
    expected[codec.define_positions(payloads[0], n)] = 0
    assert torch.equal(values, expected)


def test_rotated_blocks_and_what_is_left_of_one_are_coded_as_by_the_definition() -> None:
    codec, n = parse("rotate|int4"), 1024 + 777
    x, before = battery.gradient(n), battery.gradient(n, seed=1)
    after, (payload, expected) = before.clone(), battery.defined_encode(codec, x, before)
    assert torch.equal(coding.encode(codec, x, after), payload)
    assert expected is not None
    assert same_bits(after, expected)
    assert same(codec.mean(payload.repeat(2), n, 2), coding.defined_mean(codec, payload.repeat(2), n, 2))
