"""What an optimizer codes instead of a gradient: the loop and plain torch, values that are not finite, parts of a bucket."""

import pytest
import torch
from battery import gradient, normal

from commpress.comm.codecs import parse
from commpress.comm.coding import encode
from commpress.comm.prologue import Ahead, Prologue

N = 1000


def a_prologue(n: int = N) -> Prologue:
    """One whose limit bounds about a third of the values."""
    return Prologue(0.5 + normal(n, 1).abs(), normal(n, 2), limit=1.0, fresh=0.1, kept=0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_stated_formula(dtype: torch.dtype) -> None:
    prologue, x = a_prologue(), normal(N).to(dtype)
    before = x.double().clone()
    prologue.apply(x)
    scaled = before * prologue.inverse.double()
    assert 0.2 < (scaled.abs() > 1).double().mean() < 0.6
    expected = 0.1 * scaled.clamp(-1, 1) + 0.9 * prologue.average.double()
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(x.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_bounded_away(bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(N, dtype=dtype)
    x[3] = bad
    a_prologue().apply(x)
    assert x[3].isnan()
    assert x.isfinite().sum() == N - 1


def test_a_part_becomes_what_it_does_in_the_whole() -> None:
    whole, parts = normal(N), normal(N)
    prologue = a_prologue()
    prologue.apply(whole)
    for part in (slice(0, 300), slice(300, N)):
        prologue[part].apply(parts[part])
    assert torch.equal(parts, whole)


def test_one_of_another_length_is_refused() -> None:
    codec = parse("sign")
    with pytest.raises(
        ValueError, match=r"prologue.inverse has shape \(999,\).*expected a contiguous 1-D tensor of 1000 values"
    ):
        encode(codec, gradient(N), prologue=a_prologue(N - 1))
    with pytest.raises(TypeError, match=r"prologue.average has dtype torch.float64, expected torch.float32"):
        encode(codec, gradient(N), prologue=Prologue(torch.ones(N), torch.ones(N).double(), 1.0, 0.1, 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_move_of_a_momentum(dtype: torch.dtype) -> None:
    gradient, before = normal(N).to(dtype), normal(N, 1).to(dtype)
    x, ahead = gradient.clone(), Ahead(before.clone(), fresh=0.1)
    for part in (slice(0, 300), slice(300, N)):
        ahead[part].apply(x[part])
    torch.testing.assert_close(ahead.momentum, 0.9 * before + 0.1 * gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x, ahead.momentum - before, rtol=1e-5, atol=1e-6)


def test_a_pass_that_reads_values_twice_does_not_move_a_momentum() -> None:
    ahead, x = Ahead(torch.ones(N), 0.1), normal(N)
    fit = {
        spec: ahead.fits(parse(spec), x) for spec in ("int4", "sign", "rotate|sign", "topk(0.1)|sign", "randomk(0.1)")
    }
    assert fit == {"int4": True, "sign": True, "rotate|sign": True, "topk(0.1)|sign": False, "randomk(0.1)": False}
    assert not ahead.fits(parse("int4"), x.double())
