"""The table of kernels: an entry runs, without one the definition does; declared dtypes arrive as they are."""

from collections.abc import Iterator

import pytest
import torch
from battery import gradient
from torch import Tensor

from commpress.comm.codecs import WORDS, Codec, parse
from commpress.comm.coding import defined_encode, encode, recode
from commpress.kernels.table import KERNELS, Kernel, devices, lookup

CODEC_OPS = ("encode", "mean", "recode", "clear")
MATRIX_OPS = ("project", "orthonormalize", "project_back", "expand")


@pytest.fixture
def kernels() -> Iterator[dict[tuple[str, str | None, str], Kernel]]:
    """The table, as it was again behind the test."""
    before = dict(KERNELS)
    yield KERNELS
    KERNELS.clear()
    KERNELS.update(before)


def test_every_entry_is_of_a_known_codec() -> None:
    assert all((op in CODEC_OPS + MATRIX_OPS) == (word is not None) for op, word, _ in KERNELS)
    assert {word for _, word, _ in KERNELS if word is not None} <= set(WORDS)


def test_this_machine_has_the_cpu() -> None:
    assert devices()[0] == "cpu"
    assert lookup("encode", "int8", "meta") is None


@pytest.mark.parametrize("spec", ["int8", "sign", "topk(0.1)|int4"])
def test_what_has_no_entry_runs_on_its_definition(
    spec: str, kernels: dict[tuple[str, str | None, str], Kernel]
) -> None:
    codec, x, residual, other = parse(spec), gradient(1500), gradient(1500, seed=1), gradient(1500, seed=1)
    payload = encode(codec, x, residual)
    both = payload.repeat(2)
    mean, again = codec.mean(both, 1500, 2), recode(codec, both, 1500, 2)
    for key in [key for key in kernels if key[1] is not None]:
        del kernels[key]
    assert torch.equal(encode(codec, x, other), payload)
    assert torch.equal(other, residual)
    assert torch.equal(codec.mean(both, 1500, 2), mean)
    assert torch.equal(recode(codec, both, 1500, 2), again)


def test_a_kernel_gets_the_dtypes_that_it_declares_and_float32_for_others(
    kernels: dict[tuple[str, str | None, str], Kernel],
) -> None:
    seen = []

    def watched(codec: Codec, x: Tensor, residual: Tensor | None, prologue: None, payload: Tensor) -> None:
        seen.append(x.dtype)
        defined_encode(codec, x.float(), residual, payload)

    kernels["encode", "int8", "cpu"] = Kernel(watched, (torch.float32, torch.bfloat16))
    codec, x = parse("int8"), gradient(300).bfloat16()
    expected = encode(codec, x.float())
    assert torch.equal(encode(codec, x), expected)
    encode(codec, gradient(300).half())
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
