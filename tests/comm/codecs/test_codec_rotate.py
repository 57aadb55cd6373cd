"""rotate: an orthogonal matrix that is the same everywhere, what it spreads, and what a sum of rotated values is."""

import hashlib

import pytest
import torch
import torch.distributed as dist
from battery import EXAMPLES, gradient, normal
from hypothesis import given
from hypothesis import strategies as st
from ranks import run
from torch import Tensor

from commpress.comm import coding
from commpress.comm.codecs import parse
from commpress.comm.codecs.rotate import BLOCK, pieces, rotated, signs
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment

CPU = torch.device("cpu")


@EXAMPLES
@given(st.integers(1, 12_000), st.integers(0, 9), st.integers(-60, 60))
def test_the_norm_is_kept_and_the_way_back_is_the_inverse(n: int, seed: int, exponent: int) -> None:
    x = gradient(n, seed) * 2.0**exponent
    z = rotated(x)
    assert (z.double().norm() / x.double().norm() - 1).abs() < 1e-5
    assert (rotated(z, back=True) - x).norm() <= 1e-5 * x.norm()
    assert n == 1 or not torch.equal(z, x)


@pytest.mark.parametrize("m", [BLOCK, 128, 2])
def test_the_matrix_is_the_one_of_the_docstring(m: int) -> None:
    places = (0, 1, m // 2 + m // 8, m - 1)
    columns = torch.stack([rotated(torch.eye(m)[i]) for i in places], dim=1)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < m:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    expected = (hadamard * signs(CPU)[:m] / m**0.5)[:, list(places)]
    if m == BLOCK:
        expected = torch.stack([column.view(64, 16).T.reshape(-1) for column in expected.T], dim=1)
    assert torch.allclose(columns, expected, atol=1e-7)


def test_all_lengths_are_cut_into_powers_of_two() -> None:
    for n in (0, 1, 31, 1023, 1024, 9000, 123_457):
        found = list(pieces(n))
        assert all(size & (size - 1) == 0 and 2 <= size <= BLOCK for _, size in found)
        assert n - sum(blocks * size for blocks, size in found) == n % 2


def test_signs_are_of_both_kinds_and_the_same_in_all_releases() -> None:
    assert int((signs(CPU) < 0).sum()) in range(450, 574)
    assert hashlib.sha256(bytes((signs(CPU) < 0).tolist())).hexdigest()[:16] == "ffb7514f0088988e"


@pytest.mark.parametrize(("word", "most"), [("int8", 0.8), ("int4", 0.95), ("int2", 0.75), ("sign", 0.75)])
def test_rows_of_different_size_lose_less(word: str, most: float) -> None:
    plain, turned = parse(word), parse(f"rotate|{word}")
    x = gradient(200_000)
    before, after = ((codec.decode(codec.encode(x), x.numel()) - x).norm() for codec in (plain, turned))
    assert after < most * before
    assert turned.nbytes(x.numel()) == plain.nbytes(x.numel())


@pytest.mark.parametrize(("word", "share"), [("int2", 0.14), ("sign", 0.40)])
def test_the_error_is_nearly_that_of_normal_values(word: str, share: float) -> None:
    codec = parse(f"rotate|{word}")
    for x in (
        gradient(50_000),
        torch.ones(50_000),
        torch.where(torch.arange(50_000) % 97 == 5, 1000.0, normal(50_000)),
    ):
        assert (codec.decode(codec.encode(x), x.numel()) - x).square().sum() < share * x.square().sum()


@pytest.mark.parametrize("word", ["int8", "int4", "int2", "sign", "fp8"])
def test_loops_cut_long_tensors_and_give_the_bytes_of_the_definition(word: str) -> None:
    codec, n = parse(f"rotate|{word}"), 2 * 131_072 + 4096 + 1000
    x, residual, expected = gradient(n), gradient(n, 1), gradient(n, 1)
    payload, defined = coding.encode(codec, x, residual), torch.empty(codec.nbytes(n), dtype=torch.uint8)
    coding.defined_encode(codec, x, expected, defined)
    assert torch.equal(payload, defined)
    assert torch.equal(residual, expected)
    both = torch.cat([payload, codec.encode(x)])
    assert torch.equal(codec.mean(both, n, 2), coding.defined_mean(codec, both, n, 2))


def test_behind_topk_the_kept_values_are_rotated() -> None:
    codec, x = parse("topk(0.1)|rotate|int4"), gradient(20_000)
    residual = torch.zeros_like(x)
    decoded = codec.decode(coding.encode(codec, x, residual), x.numel())
    assert 1500 < decoded.count_nonzero() <= 2000
    torch.testing.assert_close(decoded + residual, x)


# --- a small training ----------------------------------------------------------------------------------------------


def losses(specs: tuple[str, ...]) -> dict[str, float]:
    """The distance to the optimum of a least-squares problem after 60 steps, by spec; features differ in size."""
    found = {}
    for spec in specs:
        session = replicas_session(spec, dist.group.WORLD, CPU)  # type: ignore[arg-type]
        a = normal(64 * 512, 5 + session.rank).view(64, 512)
        target, w = normal(512, 3), torch.zeros(512)
        for _ in range(60):
            grad = a.T @ (a @ (w - target)) / 64
            mean = session.step_buffer.submit(grad, (Segment("w", 512),), 0, last=True).wait()  # type: ignore[union-attr]
            w = w - 0.05 * mean
        rows = dist.get_world_size()
        every = torch.cat([normal(64 * 512, 5 + r).view(64, 512) for r in range(rows)])
        found[spec] = float((every @ (w - target)).square().mean())
    return found


@pytest.mark.slow
def test_small_trainings_come_as_near_as_without_rotation() -> None:
    specs = ("none", "int4", "rotate|int4", "sign", "rotate|sign", "randomk(0.2)")
    first, second = run(2, losses, specs)
    assert first == second
    assert first["rotate|int4"] <= 1.05 * first["none"] + 1e-3
    assert first["rotate|sign"] <= 1.3 * first["sign"] + 1e-2
    assert first["randomk(0.2)"] < 0.5 * float(normal(512, 3).square().sum())


def test_ranks_of_every_number_hold_the_same_bits() -> None:
    for world_size in (2, 3, 4):
        means = run(world_size, mean_of_three, "rotate|sign")
        assert all(torch.equal(means[0], other) for other in means)


def mean_of_three(spec: str) -> Tensor:
    """The sum of the means of three steps."""
    session, total = replicas_session(spec, dist.group.WORLD, CPU), torch.zeros(9000)  # type: ignore[arg-type]
    for step in range(3):
        x = gradient(9000, 10 * step + session.rank)
        total += session.step_buffer.submit(x, (Segment("p", 9000),), 0, last=True).wait()  # type: ignore[union-attr]
    return total
