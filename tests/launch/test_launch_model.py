"""The model: its size, its start, and that it does not look ahead."""

import math

import pytest
import torch

from commpress.launch.model import BYTES, GPT, Shape
from commpress.launch.train import Settings, cross_entropy


@pytest.mark.parametrize("shape", [Settings().shape, Shape(2, 48, 3, 20)])
def test_parameter_count(shape: Shape) -> None:
    d = shape.width
    block = 12 * d * d + 13 * d  # qkv 3, out 1, up and down 8; biases 9, norms 4
    expected = BYTES * d + shape.context * d + shape.layers * block + 2 * d + d * BYTES
    assert sum(p.numel() for p in GPT(shape).parameters()) == expected


def test_the_default_has_about_ten_million() -> None:
    assert sum(p.numel() for p in GPT(Settings().shape).parameters()) == pytest.approx(10.9e6, rel=0.02)


def test_it_starts_out_knowing_nothing() -> None:
    torch.manual_seed(0)
    model = GPT(Shape(2, 48, 3, 20))
    x = torch.randint(BYTES, (4, 20))
    assert cross_entropy(model(x), x).item() == pytest.approx(math.log(BYTES), abs=0.1)


def test_it_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = GPT(Shape(2, 48, 3, 20))
    x = torch.randint(BYTES, (1, 20))
    changed = x.clone()
    changed[0, 12] = (x[0, 12] + 1) % BYTES
    same = (model(x) == model(changed)).all(-1)[0]
    assert same[:12].all()
    assert not same[12:].any()


def test_a_shape_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="--context 0: expected at least 1"):
        Shape(1, 32, 2, 0)
    with pytest.raises(ValueError, match="--width 32 --heads 3: the width must be a multiple of the heads"):
        Shape(1, 32, 3, 8)
