"""Every codec against every check of the battery, and that the battery knows every codec."""

import doctest
from importlib import import_module

import pytest
import torch
from battery import CODEC_CHECKS, DEVICES, EXAMPLES, SPECS, Subject, defined_encode, same, same_residual
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tiers import slowly

from commpress.comm.codecs import FAMILIES, WORDS, parse
from commpress.comm.coding import encode

FEW = (
    *("none", "bf16", "fp16", "fp8", "int8", "int4", "int4(stochastic)", "int2", "sign"),
    *("topk(0.01)", "topk(0.1)|int4", "randomk(0.1)"),
)
"""At least one of each family but that of rotations, which takes as long as all of these."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", slowly(SPECS, quick=FEW))
def test_codec(spec: str, device: str) -> None:
    subject = Subject(parse(spec), device)
    for check in CODEC_CHECKS:
        check(subject)


def test_the_battery_knows_every_family() -> None:
    matrices = {"powersgd"}  # codes no flat values: tests/comm/test_low_rank.py
    assert {parse(spec).word for spec in SPECS} == set(WORDS) - matrices
    assert not parse("powersgd(4)").flat


def test_the_battery_lists_every_check() -> None:
    import battery

    def is_check(thing: object) -> bool:
        return getattr(thing, "__module__", "") == "battery" and getattr(thing, "__annotations__", {}) == {
            "subject": Subject,
            "return": None,
        }

    assert set(CODEC_CHECKS) == {thing for thing in vars(battery).values() if is_check(thing)}


def any_floats(n: int) -> st.SearchStrategy[NDArray]:  # type: ignore[type-arg]
    """float32 arrays of n values: a few values many times over, NaN and Inf among them."""
    return hnp.arrays("float32", n, elements=st.floats(width=32), fill=st.sampled_from([0.0, -1.0, 1.0, 1e-30]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS)
@settings(EXAMPLES, max_examples=25)  # the battery has many of the same kind
@given(st.data())
def test_kernels_equal_the_definition_on_anything(spec: str, device: str, data: st.DataObject) -> None:
    codec = parse(spec)
    n = data.draw(st.integers(1, 600))
    x = torch.from_numpy(data.draw(any_floats(n))).to(device)
    before = torch.from_numpy(data.draw(any_floats(n))).nan_to_num(0.5, 1.0, -1.0).to(device)
    assert torch.equal(codec.encode(x), defined_encode(codec, x)[0])

    payload, after = defined_encode(codec, x, before)
    residual = before.clone()
    assert after is not None
    assert torch.equal(encode(codec, x, residual), payload)
    decoded = codec.decode(payload, n)
    assert same_residual(codec, residual, after, x + before, decoded)
    assert same(decoded, codec.define_decode(payload, n))


MODULES = sorted({family.__module__ for family in FAMILIES})


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_the_docstrings_run(module: str) -> None:
    result = doctest.testmod(import_module(module), extraglobs={"parse": parse, "torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
