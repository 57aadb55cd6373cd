"""Each pass over memory in its two forms: the Numba loop (float32 on CPU) and plain torch (here in float64)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from commpress.optim import loops

PASSES: dict[str, tuple[int, Callable[[list[Tensor]], None]]] = {
    "advance": (3, lambda t: loops.apply_update(*t, keep=0.99, rate=0.3)),
    "wander": (6, lambda t: loops.local_step(*t, limit=1.0, beta=0.9, keep=0.99, rate=0.3, decay=0.97)),
    "look back": (5, lambda t: loops.sync_payload(*t, limit=1.0, fresh=0.1, kept=0.9, share=0.3, carry=0.7)),
    "meet": (6, lambda t: loops.sync_apply(*t, decay=0.97, weight=1.2, scale=4.0)),
    "stand": (3, lambda t: loops.restore_local(*t, decay=0.97)),
    "correct": (3, lambda t: loops.momentum_correction(*t, beta=0.9, decay=0.01, nesterov=False)),
    "correct, Nesterov's": (3, lambda t: loops.momentum_correction(*t, beta=0.9, decay=0.01, nesterov=True)),
}
"""How many tensors each takes, and the pass."""


def test_what_is_known_is_bounded_and_half_as_wide() -> None:
    differences = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    differences[7] = torch.nan
    looped, plain = (torch.ones(5000, dtype=torch.bfloat16) for _ in range(2))
    loops.estimate_momentum(differences, looped, -2.0, 3.0)
    loops.estimate_momentum(differences.double(), plain, -2.0, 3.0)
    assert torch.equal(looped, plain)
    assert looped[7] == 0
    assert 0.05 < (looped == 0).double().mean() < 0.2
    kept = looped != 0
    torch.testing.assert_close(looped[kept].float(), -2 * differences[kept], rtol=2**-8, atol=0)
    loops.estimate_momentum(differences, plain, -float("inf"), 3.0)
    assert not plain.any()

    x, y = torch.ones(5000), torch.ones(5000, dtype=torch.float64)
    loops.add_scaled(x, looped, 0.9)
    loops.add_scaled(y, looped, 0.9)
    torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
    assert not torch.equal(x, torch.ones(5000))


@pytest.mark.parametrize("order", ["contiguous", "channels last"])
@pytest.mark.parametrize("name", PASSES)
def test_both_forms_agree(name: str, order: str) -> None:
    count, apply = PASSES[name]
    generator = torch.Generator().manual_seed(0)
    singles = [2 * torch.randn(3, 5, 7, 4, generator=generator) for _ in range(count)]
    if order == "channels last":
        singles = [t.contiguous(memory_format=torch.channels_last) for t in singles]
    doubles = [t.double() for t in singles]
    before = [t.clone() for t in singles]
    apply(singles)
    apply(doubles)
    assert any(not torch.equal(a, b) for a, b in zip(singles, before, strict=True))
    for one, other in zip(singles, doubles, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
