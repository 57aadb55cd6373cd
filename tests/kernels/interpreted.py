"""The kernels for CUDA give the bytes of the definitions: on Triton's interpreter, with CPU tensors.

`test_triton.py` runs this file in processes of their own, since Triton asks for its interpreter when it is imported. By hand:

    TRITON_INTERPRET=1 SPECS="int8 sign" pytest tests/kernels/interpreted.py
"""

import os
from collections.abc import Iterator
from typing import Any

import battery
import pytest
import torch
from battery import defined_encode, same, same_bits
from torch import Tensor

from commpress.comm import coding
from commpress.comm.codecs import parse
from commpress.comm.codecs.base import Codec
from commpress.comm.coding import encode, recode
from commpress.comm.prologue import Prologue
from commpress.kernels import table

SPECS = os.environ["SPECS"].split()
BLOCK = 1024
"""A multiple of every codec's block."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which tells of each NaN


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[tuple[str, str | None, str], Any]]:
    """The kernels as the interpreter runs them, as if they were those for the CPU."""
    from commpress.kernels.triton.table import KERNELS

    found = {(op, word, "cpu"): kernel for (op, word, _), kernel in KERNELS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "KERNELS", table.KERNELS | found)
        yield found


@pytest.fixture(params=SPECS)
def codec(request: pytest.FixtureRequest, kernels: object) -> Codec:
    return parse(request.param)


def all_inputs(tail: int) -> Tensor:
    """Each input of the battery as one block, and `tail` values of a gradient behind them."""
    return torch.cat([*battery.tame(BLOCK).values(), *battery.wild(BLOCK).values(), battery.gradient(tail)])


def remembered(x: Tensor) -> Tensor:
    return 0.25 * x.flip(0).nan_to_num(0.5, 3.0, -3.0)


def test_every_op_that_has_a_loop_on_cpu_has_a_kernel(kernels: dict[tuple[str, str | None, str], Any]) -> None:
    words = {parse(spec).word for spec in SPECS}
    assert {key for key in table.KERNELS if key[1] in words} <= set(kernels)


@pytest.mark.parametrize("tail", [0, 1, 7, 700])
def test_payload_and_residual_are_those_of_the_definition(codec: Codec, tail: int) -> None:
    x = all_inputs(tail) if tail == 700 else battery.gradient(2 * BLOCK + tail)
    assert torch.equal(encode(codec, x), defined_encode(codec, x)[0])
    before = remembered(x)
    after, (payload, expected) = before.clone(), defined_encode(codec, x, before)
    assert torch.equal(encode(codec, x, after), payload)
    assert expected is not None
    assert same_bits(after, expected)


def test_values_behind_a_prologue_are_those_of_the_definition(codec: Codec) -> None:
    x = all_inputs(700)
    inverse, average = 0.5 + battery.normal(x.numel(), 1).abs(), battery.normal(x.numel(), 2)
    scaled = x * inverse  # in this order, with each product rounded
    values = 0.1 * scaled.clamp(-1.5, 1.5) + 0.9 * average + (scaled - scaled)
    after = remembered(x)
    payload, expected = defined_encode(codec, values, remembered(x))
    assert torch.equal(encode(codec, x.clone(), after, Prologue(inverse, average, 1.5, 0.1, 0.9)), payload)
    assert expected is not None
    assert same_bits(after, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_read_and_means_written_in_their_own_dtype(codec: Codec, dtype: torch.dtype) -> None:
    n = 2 * BLOCK + 300
    x, before = battery.gradient(n).to(dtype), battery.gradient(n, seed=1)
    payload, expected = defined_encode(codec, x.float(), before)
    assert torch.equal(encode(codec, x, before), payload)
    assert expected is not None
    assert same_bits(before, expected)
    payloads = torch.cat([payload, defined_encode(codec, battery.gradient(n, seed=2))[0]])
    mean = coding.mean(codec, payloads, n, 2, torch.empty(n, dtype=dtype))
    assert same(mean, coding.defined_mean(codec, payloads, n, 2).to(dtype))


@pytest.mark.parametrize("count", [1, 3])
def test_mean_and_recode_are_those_of_the_definition(codec: Codec, count: int) -> None:
    xs = [all_inputs(300).roll(r * BLOCK) for r in range(count)]
    n = xs[0].numel()
    payloads = torch.cat([defined_encode(codec, x)[0] for x in xs])
    mean = coding.defined_mean(codec, payloads, n, count)
    assert same(coding.mean(codec, payloads, n, count), mean)
    before = remembered(xs[0])
    after, (expected, expected_after) = before.clone(), defined_encode(codec, mean, before)
    found = recode(codec, payloads, n, count, after)
    assert expected_after is not None
    assert same(codec.define_decode(found, n), codec.define_decode(expected, n))  # the sign of a NaN means nothing
    assert same_bits(after, expected_after)
