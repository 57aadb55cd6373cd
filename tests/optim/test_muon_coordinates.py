"""The coordinates in which EF21Muon codes a momentum coarsely: what they promise, and that they survive restarts and masks."""

import copy
from unittest import mock

import pytest
import torch
from ranks import run
from test_muon import LONG as WIDE
from test_muon import attached
from tiers import slow
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, adrift, finite, parameters_of, same, train

import commpress
from commpress.optim.eigenbasis import EVERY, FIRST, FLOOR, IN_SINGLE, LONG, SIDE, Basis, is_due


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-5), (torch.float32, 1e-2)])
@pytest.mark.parametrize("shape", [(8, 300), (300, 8), (256, 256), (1, 256)])
def test_all_directions_of_the_estimate_have_one_length_and_the_way_back_is_exact_for_what_is_kept(
    shape: tuple[int, int], dtype: torch.dtype, error: float
) -> None:
    """What is kept moves in float64. A gradient, in float32, may be as inexact as one in bfloat16."""
    k, m = sorted(shape)
    wide = torch.randn(k, m, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, k)[:, None]
    estimate = (wide if shape == (k, m) else wide.T.contiguous()).to(dtype)
    basis = Basis.of(estimate)
    assert basis is not None
    y = basis.enter(estimate)
    assert (y.shape, y.dtype) == ((k, m), dtype)
    squares = torch.linalg.eigvalsh(wide.double() @ wide.double().T)
    expected = torch.diag(squares / (squares + FLOOR * squares.mean()))
    assert torch.allclose(y.double() @ y.double().T, expected, atol=1e-2)
    back = basis.leave(y.view(shape), shape)
    assert float((back - estimate).norm() / estimate.norm()) < error


@pytest.mark.slow
@pytest.mark.parametrize("directions", [IN_SINGLE, IN_SINGLE + 100])
def test_one_long_direction_leaves_the_short_ones_their_length(directions: int) -> None:
    """The error of float32 is a share of the longest direction, which is far longer than the mean of so many."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(directions, 2 * directions, generator=draw) * torch.logspace(0, -3, directions)[:, None]
    outer = torch.outer(torch.randn(directions, generator=draw), torch.randn(2 * directions, generator=draw))
    estimate = wide / wide.norm() + 0.65 * outer / outer.norm()
    with mock.patch.object(torch.linalg, "eigh", side_effect=torch.linalg.eigh) as decomposed:
        basis = Basis.of(estimate)
    assert decomposed.call_args.args[0].dtype == (torch.float32 if directions <= IN_SINGLE else torch.float64)
    assert basis is not None
    assert basis.vectors.dtype == basis.sizes.dtype == torch.float32
    y = basis.enter(estimate.double())
    assert float(torch.linalg.matrix_norm(y, 2)) ** 2 < 1.01


def test_a_matrix_that_is_short_or_zero_or_not_finite_stays_in_its_own() -> None:
    assert Basis.of(torch.randn(64, LONG - 1)) is None
    assert Basis.of(torch.zeros(8, 300)) is None
    assert (
        Basis.of(torch.full((8, 300), 1e-22)) is None
    )  # of a matrix whose gradients have been 0 for hundreds of steps
    assert Basis.of(torch.full((8, 300), torch.nan)) is None


@pytest.mark.parametrize(("directions", "every"), [(LONG, EVERY), (4096, 4096 // SIDE)])
def test_coordinates_are_chosen_in_turn_and_large_ones_more_rarely(directions: int, every: int) -> None:
    """Each choice is an eigendecomposition on every rank: many of them in one step would make it long."""
    numbers, steps = range(2 * every), range(FIRST + 2 * every)
    due = [[number for number in numbers if is_due(step, number, directions)] for step in steps]
    assert not any(due[:FIRST])
    assert all(len(numbers) == 2 for numbers in due[FIRST:])
    assert due[FIRST][0] == 0
    assert {number for numbers in due[FIRST : FIRST + every] for number in numbers} == set(numbers)


def coded(spec: str, exchange: str, steps: int) -> tuple[float, float, int]:
    """How far estimate and residuals together, and the estimate alone, are from the mean momentum; matrices in other ones."""
    ddp, optimizer, session = attached(spec, exchange=exchange, width=WIDE)
    train(ddp, range(steps), optimizer=optimizer)
    turned = sum("basis_vectors" in state for state in optimizer.state.values())
    return *adrift(ddp, optimizer, session), turned


@pytest.mark.parametrize(("spec", "exchange", "world_size"), [
    ("int4", "two_shot", 3), ("sign", "one_shot", 2), slow("topk(0.1)|sign", "one_shot", 3),
    slow("int2", "hierarchical(2)", 4),
], ids=str)  # fmt: skip
def test_a_change_of_coordinates_loses_nothing(spec: str, exchange: str, world_size: int) -> None:
    """They change behind steps 10, 11 and 12, and the first again behind 35, with all that has been left out so far."""
    for off, alone, turned in run(world_size, coded, spec, exchange, 36):
        assert off < 1e-5 < 1e-2 < alone
        assert turned == 3


def test_fine_codes_need_none() -> None:
    assert [turned for _, _, turned in run(2, coded, "int8", "two_shot", 11)] == [0, 0]


def resumed() -> tuple[list[Tensor], list[Tensor], int]:
    """Parameters of a training over two changes of coordinates, and of one that was restarted between them."""
    ddp, optimizer, session = attached("int4", exchange="two_shot", width=WIDE)
    train(ddp, range(34), optimizer=optimizer)
    model, states = (
        copy.deepcopy(ddp.module.state_dict()),
        copy.deepcopy((optimizer.state_dict(), session.state_dict())),
    )
    train(ddp, range(34, 37), optimizer=optimizer)
    again, following, later = attached("int4", exchange="two_shot", width=WIDE)
    again.module.load_state_dict(model)
    following.load_state_dict(states[0])
    later.load_state_dict(states[1])
    train(again, range(34, 37), optimizer=following)
    turned = sum("basis_vectors" in state for state in following.state.values())
    return parameters_of(ddp.module), parameters_of(again.module), turned


def test_a_restart_goes_on_bit_for_bit() -> None:
    for unbroken, again, turned in run(2, resumed):
        assert same(unbroken, again)
        assert turned == 3


def taken_over() -> tuple[list[list[Tensor]], float]:
    """Parameters after a new wrapper and session, and how far estimate and residuals together are from the mean momentum."""
    ddp, optimizer, _ = attached("int4", exchange="two_shot", width=WIDE)
    train(ddp, range(12), optimizer=optimizer)
    again = DistributedDataParallel(ddp.module, bucket_cap_mb=25)
    session = commpress.attach(again, "sign", optimizer=optimizer)
    history = [train(again, [step], optimizer=optimizer).parameters for step in range(12, 15)]
    return history, adrift(again, optimizer, session)[0]


def test_a_new_session_takes_over_what_is_in_other_coordinates() -> None:
    (history, off), (other, _) = run(2, taken_over)
    assert all(same(one, two) for one, two in zip(history, other, strict=True))
    assert off < 1e-5


def masked_later(spec: str, bucket_cap_mb: float) -> tuple[list[list[Tensor]], int, int, float]:
    """Parameters when masks come behind a change of coordinates; pruned weights that are not 0; matrices in other ones; and how
    far estimate and residuals together are from the mean momentum of the matrix without a mask."""
    ddp, optimizer, session = attached(spec, bucket_cap_mb, width=WIDE)
    train(ddp, range(12), optimizer=optimizer)
    draw = torch.Generator().manual_seed(0)
    masks: dict[str, Tensor] = {}
    for name in ("0.weight", "2.weight"):
        masks[name] = torch.rand(ddp.module.get_parameter(name).shape, generator=draw) < 0.4
    session.set_masks(masks)
    with torch.no_grad():
        for name, mask in masks.items():
            ddp.module.get_parameter(name).mul_(mask)
    history = [train(ddp, [step], optimizer=optimizer).parameters for step in range(12, 27)]
    wrong = sum(int((ddp.module.get_parameter(name)[~mask] != 0).sum()) for name, mask in masks.items())
    turned = sum("basis_vectors" in state for state in optimizer.state.values())
    return history, wrong, turned, adrift(ddp, optimizer, session, {"4.weight"})[0]


@pytest.mark.parametrize("bucket_cap_mb", [SMALL_BUCKETS, 25])
@pytest.mark.parametrize("spec", ["int4", slow("topk(0.1)|sign")])
def test_where_masks_come_momenta_start_anew_in_the_matrices_own_coordinates(spec: str, bucket_cap_mb: float) -> None:
    """And those of other matrices, in the same bucket or not, go on."""
    results = run(2, masked_later, spec, bucket_cap_mb)
    for history, wrong, turned, off in results:
        assert off < 1e-5
        assert wrong == 0
        assert turned == 1  # the one without a mask
        assert finite(history[-1])
        assert all(same(one, two) for one, two in zip(history, results[0][0], strict=True))


def fine_again() -> tuple[list[int], float]:
    """Matrices in other coordinates after steps by int4, and then by int8 of a new session; and what is lost."""
    ddp, optimizer, _ = attached("int4", width=WIDE)
    train(ddp, range(12), optimizer=optimizer)
    turned = [sum("basis_vectors" in state for state in optimizer.state.values())]
    again = DistributedDataParallel(ddp.module, bucket_cap_mb=25)
    session = commpress.attach(again, "int8", optimizer=optimizer)
    train(again, range(12, 38), optimizer=optimizer)
    turned.append(sum("basis_vectors" in state for state in optimizer.state.values()))
    return turned, adrift(again, optimizer, session)[0]


def test_a_code_that_is_fine_again_brings_the_matrices_back_to_their_own() -> None:
    for turned, off in run(2, fine_again):
        assert turned == [3, 0]
        assert off < 1e-5


def away_for_a_while(ignored: bool) -> tuple[list[Tensor], float]:
    """Parameters of a training in which a matrix was not exchanged for some steps: it was frozen, or each rank stepped it by
    its own gradients; and how far estimate and residuals together are from its mean momentum."""
    ddp, optimizer, _ = attached("int4", width=WIDE)
    model = ddp.module
    train(ddp, range(12), optimizer=optimizer)
    before = model[2].weight.detach().clone()
    if ignored:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["2.weight"])
    else:
        model[2].weight.requires_grad_(False)
    without = DistributedDataParallel(model, bucket_cap_mb=25)
    commpress.attach(without, "int4", optimizer=optimizer)
    train(without, range(12, 15), optimizer=optimizer)
    with torch.no_grad():
        model[2].weight.copy_(before)
    model[2].weight.requires_grad_(True)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [])
    back = DistributedDataParallel(model, bucket_cap_mb=25)
    session = commpress.attach(back, "int4", optimizer=optimizer)
    train(back, range(15, 18), optimizer=optimizer)
    return parameters_of(model), adrift(back, optimizer, session, {"2.weight"})[0]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_matrix_that_comes_back_starts_with_no_estimate(ignored: bool) -> None:
    (one, off), (other, _) = run(2, away_for_a_while, ignored)
    assert same(one, other)
    assert off < 1e-5


def masked_while_frozen(width: int) -> tuple[float, float]:
    """How far estimate and residuals together are from the mean momentum of a matrix that was frozen while it had a mask,
    and of the others."""
    ddp, optimizer, session = attached("int4", width=width, unused=True)
    weight = ddp.module[2].weight
    train(ddp, range(12), optimizer=optimizer)
    weight.requires_grad_(False)
    session.set_masks({"2.weight": torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4})
    train(ddp, range(12, 14), optimizer=optimizer)
    session.set_masks({})
    weight.requires_grad_(True)
    train(ddp, range(14, 16), optimizer=optimizer)
    return adrift(ddp, optimizer, session, {"2.weight"})[0], adrift(ddp, optimizer, session, {"0.weight", "4.weight"})[
        0
    ]


@pytest.mark.parametrize("width", [64, WIDE])
def test_masks_that_come_and_go_while_a_matrix_is_frozen_leave_nothing_in_its_estimate(width: int) -> None:
    for frozen, others in run(2, masked_while_frozen, width):
        assert frozen < 1e-5
        assert others < 1e-5
