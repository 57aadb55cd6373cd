"""The kernels for CUDA give the bytes of the definitions: on Triton's interpreter, with CPU tensors.

`test_triton.py` runs this file in a process of its own, since Triton asks for its interpreter when it is imported. By hand:

    TRITON_INTERPRET=1 SPECS="int8 topk(0.1)" LENGTHS="300 5000" pytest tests/kernels/interpreted.py
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import battery
import pytest
import torch
from battery import defined_encode, same, same_bits, same_residual
from tiers import slowly
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from commpress.comm import coding
from commpress.comm.codecs import parse
from commpress.comm.codecs.base import Codec
from commpress.comm.coding import encode, recode
from commpress.comm.prologue import Prologue
from commpress.kernels import table

SPECS = os.environ["SPECS"].split()
SIZE = 1024
"""Of the codecs with blocks of 256 a whole program's values; of `sign` and `int2` a block, their programs have 4 or 8."""
LENGTHS = [int(n) for n in os.environ.get("LENGTHS", "").split()]
"""How many values each input of `topk` has."""
LOOPS = dict(table.KERNELS)
WITHOUT_KERNEL = {("recode", "randomk", "cpu")}
"""A loop for the CPU that has no kernel for CUDA: there the mean is computed, then encoded."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which tells of each NaN


_call: Any = InterpretedFunction.__call__


def called(function: Any, *arguments: Any, **constants: Any) -> Any:
    """Call a function of a kernel, without giving its module the interpreter's language again: the launch has done so."""
    ours = function.fn.__module__.startswith("commpress.")
    return (function.rewrite() if ours else functools.partial(_call, function))(*arguments, **constants)


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[tuple[str, str | None, str], Any]]:
    """The kernels as the interpreter runs them, as if they were those for the CPU. An op without one falls back as on CUDA."""
    from commpress.kernels.triton.table import KERNELS

    found = {(op, word, "cpu"): kernel for (op, word, _), kernel in KERNELS.items()}
    words = {word for _, word, _ in found} - {None}
    others = {key: kernel for key, kernel in LOOPS.items() if key[1] not in words}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "KERNELS", others | found)
        patch.setattr(InterpretedFunction, "__call__", called)
        yield found


@pytest.fixture(params=SPECS)
def codec(request: pytest.FixtureRequest, kernels: object) -> Codec:
    return parse(request.param)


def block_of(codec: Codec) -> int:
    """How many values the codec's block has."""
    return max(256, codec.granularity)


def all_inputs(codec: Codec, tail: int) -> Tensor:
    """Each input of the battery as one block, and `tail` values of a gradient behind them: several programs, whole or not."""
    block = block_of(codec)
    return torch.cat([*battery.tame(block).values(), *battery.wild(block).values(), battery.gradient(tail)])


def remembered(x: Tensor) -> Tensor:
    return 0.25 * x.flip(0).nan_to_num(0.5, 3.0, -3.0)


def settled(codec: Codec, after: Tensor, expected: Tensor | None, total: Tensor, payload: Tensor) -> bool:
    """Whether a residual is that of the definition, as the battery asks it."""
    assert expected is not None
    return same_residual(codec, after, expected, total, codec.define_decode(payload, total.numel()))


def test_every_op_that_has_a_loop_on_cpu_has_a_kernel(kernels: dict[tuple[str, str | None, str], Any]) -> None:
    words = {parse(spec).word for spec in SPECS}
    assert {key for key in LOOPS if key[1] in words} - WITHOUT_KERNEL <= set(kernels)


@pytest.mark.parametrize("tail", [0, 1, 7, 700])
def test_payload_and_residual_are_those_of_the_definition(codec: Codec, tail: int) -> None:
    x = all_inputs(codec, tail) if tail == 700 else battery.gradient(2 * SIZE + tail)
    assert torch.equal(encode(codec, x), defined_encode(codec, x)[0])
    before = remembered(x)
    after, (payload, expected) = before.clone(), defined_encode(codec, x, before)
    assert torch.equal(encode(codec, x, after), payload)
    assert settled(codec, after, expected, x + before, payload)


def test_values_behind_a_prologue_are_those_of_the_definition(codec: Codec) -> None:
    x = all_inputs(codec, 700)
    inverse, average = 0.5 + battery.normal(x.numel(), 1).abs(), battery.normal(x.numel(), 2)
    scaled = x * inverse  # in this order, with each product rounded
    values = 0.1 * scaled.clamp(-1.5, 1.5) + 0.9 * average + (scaled - scaled)
    after = remembered(x)
    payload, expected = defined_encode(codec, values, remembered(x))
    assert torch.equal(encode(codec, x.clone(), after, Prologue(inverse, average, 1.5, 0.1, 0.9)), payload)
    assert settled(codec, after, expected, values + remembered(x), payload)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_read_and_means_written_in_their_own_dtype(codec: Codec, dtype: torch.dtype) -> None:
    n = 2 * SIZE + 300
    x, before = battery.gradient(n).to(dtype), battery.gradient(n, seed=1)
    payload, expected = defined_encode(codec, x.float(), before)
    assert torch.equal(encode(codec, x, before), payload)
    assert expected is not None
    assert same_bits(before, expected)
    payloads = torch.cat([payload, defined_encode(codec, battery.gradient(n, seed=2))[0]])
    mean = coding.mean(codec, payloads, n, 2, torch.empty(n, dtype=dtype))
    assert same(mean, coding.defined_mean(codec, payloads, n, 2).to(dtype))


@pytest.mark.parametrize(("count", "blocks"), [(1, 4), (3, None)], ids=["of one", "of three"])
def test_mean_and_recode_are_those_of_the_definition(codec: Codec, count: int, blocks: int | None) -> None:
    block = block_of(codec)
    last = None if blocks is None else -(blocks * block + 300)
    xs = [all_inputs(codec, 300).roll(r * block)[last:] for r in range(count)]
    n = xs[0].numel()
    payloads = torch.cat([defined_encode(codec, x)[0] for x in xs])
    mean = coding.defined_mean(codec, payloads, n, count)
    assert same(coding.mean(codec, payloads, n, count), mean)
    before = remembered(xs[0])
    after, (expected, expected_after) = before.clone(), defined_encode(codec, mean, before)
    found = recode(codec, payloads, n, count, after)
    assert same(codec.define_decode(found, n), codec.define_decode(expected, n))  # the sign of a NaN means nothing
    assert settled(codec, after, expected_after, mean + before, expected)


def inputs_alone(n: int) -> dict[str, Tensor]:
    """The inputs of the battery, one by one."""
    return {**battery.tame(n), **battery.wild(n)}


@pytest.fixture
def top(codec: Codec) -> Codec:
    if codec.word != "topk":
        pytest.skip("is no topk")
    return codec


QUICK = ("few magnitudes", "some nan", "many nan and inf")


@pytest.mark.parametrize("name", slowly(inputs_alone(1), QUICK))
def test_each_input_is_sent_as_the_definition_sends_it(top: Codec, name: str) -> None:
    for n in LENGTHS:
        x = inputs_alone(n)[name]
        for before in battery.memories(x):
            after, (payload, expected) = before.clone(), defined_encode(top, x, before)
            assert torch.equal(encode(top, x, after), payload), n
            assert expected is not None
            assert same_bits(after, expected), n
        found, expected = x.nan_to_num(2.0), x.nan_to_num(2.0)
        coding.clear(top, payload, found)
        index = top.define_positions(payload, n)
        expected[index if index.numel() else slice(None)] = 0
        assert same_bits(found, expected), n
        payloads = torch.cat([payload, defined_encode(top, x.flip(0))[0], payload])
        for count in (1, 3):
            part = payloads[: count * payload.numel()]
            mean = coding.defined_mean(top, part, n, count)
            assert same(coding.mean(top, part, n, count), mean), (n, count)


def test_programs_that_have_several_parts_count_them_all(top: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    from commpress.kernels.triton import topk

    monkeypatch.setattr(topk, "PROGRAMS", 2)
    x = battery.gradient(5 * topk.SIZE + 1)
    after, (payload, expected) = remembered(x), defined_encode(top, x, remembered(x))
    assert torch.equal(encode(top, x, after), payload)
    assert expected is not None
    assert same_bits(after, expected)


def test_a_payload_that_does_not_mark_its_positions_is_all_nan_and_writes_nowhere_else(top: Codec) -> None:
    n = 3000
    for garbage in (0x00, 0xFF, 0x5A):
        payload = torch.full((top.nbytes(n),), garbage, dtype=torch.uint8)
        memory = torch.full((3 * n,), 5.0)
        coding.mean(top, payload, n, 1, memory[n : 2 * n])
        assert memory[n : 2 * n].isnan().all()
        assert (memory[:n] == 5).all()
        assert (memory[2 * n :] == 5).all()
