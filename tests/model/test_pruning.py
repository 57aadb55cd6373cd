"""Masks against `torch.nn.utils.prune` and against properties: exact counts, the smallest go, groups, equal ties."""

import copy
import itertools
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from commpress.model.pruning import amount_at, by_amount, by_threshold, n_of_m, regrow, require_n_of_m, share_at

amounts = st.floats(0, 1)
seeds = st.integers(0, 2**20)


def scores_of(seed: int, *, ties: bool = False, last: int = 8) -> dict[str, Tensor]:
    """Of two parameters, with signs."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "a": torch.randn(6, last, generator=generator),
        "b": torch.randn(3, 2, last, generator=generator),
    }
    return {name: s.mul(2).round() for name, s in made.items()} if ties else made


def pruned(masks: dict[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).encoder


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("amount", [0.2, 0.777])
def test_global_amount_is_that_of_torch(encoder: nn.Module, amount: float) -> None:
    ours = by_amount({name: p.detach().abs() for name, p in linear_weights(encoder).items()}, amount)
    theirs = copy.deepcopy(encoder)
    layers = {name: m for name, m in theirs.named_modules() if isinstance(m, nn.Linear)}
    assert len(layers) == 12
    prune.global_unstructured([(m, "weight") for m in layers.values()], prune.L1Unstructured, amount=amount)
    assert {f"{name}.weight" for name in layers} == ours.keys()
    for name, m in layers.items():
        assert torch.equal(ours[f"{name}.weight"], m.weight_mask.bool()), name


def test_local_amount_is_that_of_torch(encoder: nn.Module) -> None:
    ours = by_amount({name: p.detach().abs() for name, p in linear_weights(encoder).items()}, 0.3, "local")
    theirs = copy.deepcopy(encoder)
    for name, m in theirs.named_modules():
        if isinstance(m, nn.Linear):
            prune.l1_unstructured(m, "weight", amount=0.3)
            assert torch.equal(ours[f"{name}.weight"], m.weight_mask.bool()), name


def test_threshold_prunes_what_is_below() -> None:
    w = torch.tensor([[-0.5, 0.25, 0.1], [0.3, -0.2, 0.0]])
    masks = by_threshold({"w": w.abs()}, 0.25)
    assert masks["w"].tolist() == [[True, True, False], [True, False, False]]
    assert by_threshold({"w": w.abs()}, 0.0)["w"].all()


@given(seeds, amounts, st.sampled_from(["global", "local", "row"]), st.booleans())
def test_exactly_the_share_goes_and_it_is_the_smallest(seed: int, amount: float, scope: str, ties: bool) -> None:
    scores = scores_of(seed, ties=ties)
    masks = by_amount(scores, amount, scope)
    assert {name: mask.shape for name, mask in masks.items()} == {name: s.shape for name, s in scores.items()}
    if scope == "global":
        pairs = [(torch.cat([s.flatten() for s in scores.values()]), torch.cat([m.flatten() for m in masks.values()]))]
    elif scope == "local":
        pairs = [(scores[name].flatten(), masks[name].flatten()) for name in scores]
    else:
        pairs = [
            (s, m) for name in scores for s, m in zip(scores[name].flatten(1), masks[name].flatten(1), strict=True)
        ]
    for s, mask in pairs:
        assert int((~mask).sum()) == round(amount * s.numel())
        if mask.any() and not mask.all():
            assert s[mask].min() >= s[~mask].max()
            at_bound = s == s[~mask].max()
            gone, left = (at_bound & ~mask).nonzero(), (at_bound & mask).nonzero()
            assert not left.numel() or gone.max() < left.min()  # of equal ones the first


@given(seeds, amounts, amounts, st.sampled_from(["global", "local", "row"]))
def test_what_is_pruned_stays_pruned(seed: int, one: float, other: float, scope: str) -> None:
    before = by_amount(scores_of(seed), one, scope)
    scores = scores_of(seed + 1)
    after = by_amount(scores, other, scope, keep=before)
    for name, mask in after.items():
        assert not (mask & ~before[name]).any()
    assert pruned(after) == max(pruned(before), pruned(by_amount(scores, other, scope)))


def test_a_mask_to_keep_may_be_of_some_parameters_only() -> None:
    scores = scores_of(0)
    before = {"b": torch.zeros(3, 2, 8, dtype=torch.bool)}
    after = by_amount(scores, 0.75, keep=before)
    assert not after["b"].any()
    assert pruned(after) == round(0.75 * 96)


def test_scores_stay_as_they_were() -> None:
    scores = scores_of(0)
    before = {name: s.clone() for name, s in scores.items()}
    by_amount(scores, 0.5, keep=by_amount(scores, 0.25))
    n_of_m(scores, 2, 4)
    assert all(torch.equal(s, before[name]) for name, s in scores.items())


def test_no_scores_no_masks() -> None:
    assert by_amount({}, 0.5) == by_threshold({}, 0.5) == n_of_m({}, 2, 4) == {}


@pytest.mark.parametrize("amount", [-0.1, 1.5, math.nan])
def test_an_amount_outside_is_refused(amount: float) -> None:
    with pytest.raises(ValueError, match=rf"amount {amount}: expected a share in \[0, 1\]"):
        by_amount({}, amount)


def test_other_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="scope 'layer': expected one of global, local, row"):
        by_amount({}, 0.5, "layer")
    with pytest.raises(ValueError, match=r"scope 'row': 'bias' has no rows, its shape is \(4,\)"):
        by_amount({"bias": torch.ones(4)}, 0.5, "row")
    nan = {"w": torch.tensor([[1.0, math.nan, math.nan, 2.0]])}
    for function in (
        lambda: by_amount(nan, 0.5),
        lambda: by_threshold(nan, 0.5),
        lambda: n_of_m(nan, 2, 4),
        lambda: regrow({"w": torch.ones(1, 4, dtype=torch.bool)}, nan, nan, 0.5),
    ):
        with pytest.raises(ValueError, match="scores of 'w': 2 of 4 are NaN"):
            function()


@given(seeds, st.sampled_from([(2, 4), (1, 4), (4, 8), (0, 2), (2, 2)]), st.booleans())
def test_n_of_m_keeps_the_n_largest_of_each_group(seed: int, pattern: tuple[int, int], ties: bool) -> None:
    n, m = pattern
    scores = scores_of(seed, ties=ties)
    masks = n_of_m(scores, n, m)
    require_n_of_m(masks, n, m)
    for name, s in scores.items():
        for values, mask in zip(s.reshape(-1, m), masks[name].reshape(-1, m), strict=True):
            assert int(mask.sum()) == n
            if 0 < n < m:
                assert values[mask].min() >= values[~mask].max()


def test_a_broken_pattern_is_found() -> None:
    masks = n_of_m(scores_of(0), 2, 4)
    masks["a"][0, 0:4] = False  # fewer may stay
    require_n_of_m(masks, 2, 4)
    masks["b"][1, 1, 4:8] = torch.tensor([True, True, False, True])
    with pytest.raises(ValueError, match=r"'b': 3 of the 4 weights from \[3, 4\] on are kept, expected at most 2"):
        require_n_of_m(masks, 2, 4)


def test_a_pattern_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"2 of 4: the last dimension of 'a' must be a multiple of 4, its shape is \(6, 7\)"
    ):
        n_of_m(scores_of(0, last=7), 2, 4)
    with pytest.raises(ValueError, match="5 of 4: expected 0 <= n <= m"):
        n_of_m(scores_of(0), 5, 4)


@given(seeds, amounts, amounts)
def test_regrow_exchanges_the_least_for_the_steepest(seed: int, amount: float, share: float) -> None:
    scores, gradients = scores_of(seed), scores_of(seed + 1)
    masks = by_amount({name: s.abs() for name, s in scores.items()}, amount, "local")
    changed = regrow(masks, scores, gradients, share)
    for name, mask in masks.items():
        gone, come = mask & ~changed[name], changed[name] & ~mask
        stay = int(mask.sum())
        expected = min(round(share * stay), mask.numel() - stay)
        assert int(gone.sum()) == int(come.sum()) == expected
        assert int(changed[name].sum()) == stay
        if expected > 0:
            left = mask & ~gone
            assert not left.any() or scores[name][gone].max() < scores[name][left].min()
            others = ~mask & ~come
            steep = gradients[name].abs()
            assert not others.any() or steep[come].min() > steep[others].max()


def test_without_a_gradient_nothing_changes_places() -> None:
    scores = scores_of(0)
    masks = by_amount(scores, 0.5, "local")
    changed = regrow(masks, scores, {"a": scores_of(1)["a"]}, 0.5)
    assert torch.equal(changed["b"], masks["b"])
    assert not torch.equal(changed["a"], masks["a"])


def test_cubic_rises_fast_and_ends_at_the_amount() -> None:
    at = [amount_at(step, 10, 30, 0.8, "cubic") for step in range(40)]
    assert at[:11] == [0.0] * 11
    assert at[20] == pytest.approx(0.8 * (1 - 0.5**3))
    assert at[30:] == [0.8] * 10
    assert all(a < b for a, b in itertools.pairwise(at[10:31]))
    rises = [b - a for a, b in itertools.pairwise(at[10:31])]
    assert all(a > b for a, b in itertools.pairwise(rises))


@pytest.mark.parametrize("schedule", ["one-shot", "cubic"])
def test_all_schedules_are_0_before_and_the_amount_after(schedule: str) -> None:
    assert amount_at(9, 10, 20, 0.6, schedule) == 0
    assert amount_at(20, 10, 20, 0.6, schedule) == 0.6
    assert amount_at(10, 10, 10, 0.6, schedule) == 0.6
    assert amount_at(10, 10, 20, 0.6, schedule) == (0 if schedule == "cubic" else 0.6)


def test_a_schedule_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule 'linear': expected one of one-shot, cubic"):
        amount_at(0, 0, 1, 0.5, "linear")
    with pytest.raises(ValueError, match="end 1: expected a step from the start on, 2"):
        amount_at(0, 2, 1, 0.5, "cubic")
    with pytest.raises(ValueError, match="amount 2: expected a share"):
        amount_at(0, 0, 1, 2, "cubic")
    with pytest.raises(ValueError, match="share 2: expected a share"):
        share_at(0, 0, 1, 2)


def test_the_share_falls_along_a_cosine() -> None:
    at = [share_at(step, 100, 300, 0.3) for step in range(90, 320)]
    assert at[:11] == [0.3] * 11
    assert at[110] == pytest.approx(0.15)
    assert at[60] == pytest.approx(0.3 * math.cos(math.pi / 8) ** 2)
    assert at[210:] == [0.0] * 20
    assert all(a >= b for a, b in itertools.pairwise(at))
    assert share_at(5, 5, 5, 0.3) == 0


@pytest.mark.slow
def test_17_million_scores_take_about_a_second() -> None:
    scores = {"w": torch.randn(17_000, 1_000, generator=torch.Generator().manual_seed(0)).abs_()}
    began = time.process_time()
    masks = by_amount(scores, 0.8)
    assert time.process_time() - began < 4  # 0.5 s on a core that has nothing else to do
    assert pruned(masks) == round(0.8 * 17_000_000)
