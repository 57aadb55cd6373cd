"""Error feedback over many steps: nothing is lost, sum of decoded = sum of gradients - last residual."""

import pytest
import torch
from battery import LOSSY, gradient

from commpress.comm.codecs import parse
from commpress.comm.coding import encode, recode

N, STEPS = 3000, 200


@pytest.mark.parametrize("spec", LOSSY)
def test_what_was_sent_is_what_was_given_less_the_last_residual(spec: str) -> None:
    codec = parse(spec)
    residual = torch.zeros(N)
    given, sent, largest = (torch.zeros(N, dtype=torch.float64) for _ in range(3))
    for step in range(STEPS):
        x = gradient(N, seed=step).clamp(-50, 50)
        decoded = codec.decode(encode(codec.drawn(step), x, residual), N)
        given += x
        sent += decoded
        largest = torch.maximum(largest, torch.maximum(residual.abs(), decoded.abs()).double())
    error = (sent + residual.double() - given).abs()
    assert (error <= 4 * STEPS * 2.0**-24 * (largest + 50)).all()


@pytest.mark.parametrize("spec", [spec for spec in LOSSY if spec != "topk(0.001)"])  # 200 steps are not one turn of it
def test_the_residual_of_a_constant_gradient_stays_bounded(spec: str) -> None:
    """What is sent keeps up with what is given: no position waits longer than the 100 steps of a turn of topk(0.01), or, of
    randomk(0.01), of the second turn."""
    codec = parse(spec)
    x, residual, sent = torch.where(gradient(N) < 0, -1.0, 1.0), torch.zeros(N), torch.zeros(N)
    for step in range(STEPS):
        sent += codec.decode(encode(codec.drawn(step), x, residual), N)
    assert (sent / STEPS - x).abs().max() <= 0.51


@pytest.mark.parametrize("spec", LOSSY)
def test_feedback_through_recode_loses_nothing_either(spec: str) -> None:
    """The middle of two_shot: the mean of three payloads goes out, its residual stays with the one who recodes."""
    codec = parse(spec)
    residual = torch.zeros(N)
    means, sent = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for step in range(60):
        payloads = torch.cat([codec.encode(gradient(N, seed=3 * step + r).clamp(-50, 50)) for r in range(3)])
        means += codec.mean(payloads, N, 3)
        sent += codec.decode(recode(codec, payloads, N, 3, residual), N)
    error = (sent + residual.double() - means).abs()
    assert (error <= 60 * 4 * 2.0**-24 * 2000).all()
    assert means.abs().sum() > 0
