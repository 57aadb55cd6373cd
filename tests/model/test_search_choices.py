"""Choices in a model: what is listed, what a path computes, and the plain model that is left."""

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from battery import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from commpress.model.search import Depth, Heads, OneOf, Paths, Space, Width, choose, chosen, fixed, left_out
from commpress.model.search import parameters as size_of
from commpress.model.search import space as space_of
from commpress.model.search.choices import ChoiceModule


class Attention(nn.Module):
    """Self-attention that finds the size of a head in what it is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: torch.Tensor = self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Bert(nn.Module):
    """Queries, keys and values of layers of their own, and a width that it keeps itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.all_head_size = heads, width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.all_head_size)
        y: torch.Tensor = self.dense(mixed)
        return y


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        OneOf({"3x3": nn.Conv2d(1, 4, 3, padding=1), "5x5": nn.Conv2d(1, 4, 5, padding=2)}),
        Width([2, 4, 6], nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def nested() -> nn.Sequential:
    inner = OneOf(nn.ReLU(), Depth([1, 2], [nn.Linear(8, 8), nn.Linear(8, 8)]))
    return nn.Sequential(nn.Linear(8, 8), Depth([0, 1, 2], [Width([2, 4], nn.Linear(8, 4), nn.Linear(4, 8)), inner]))


MODELS: dict[str, Any] = {
    "convolutions": (convolutions, (3, 1, 8, 8)),
    "nested": (nested, (3, 8)),
    "heads": (lambda: nn.Sequential(Heads([1, 2, 4], Attention(8, 4), "out")), (2, 3, 8)),
    "heads of three layers": (lambda: Heads([1, 3], Bert(12, 3), "dense"), (2, 3, 12)),
}


def choices_of(model: nn.Module) -> list[dict[str, Any]]:
    """All that make a difference."""
    space = space_of(model)
    found = [space.canonical(dict(zip(space, options, strict=True))) for options in itertools.product(*space.values())]
    return [choice for i, choice in enumerate(found) if choice not in found[:i]]


def trained(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model with statistics in its batch norms, and an input."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    for step in range(4):
        Paths(model).take(step)
        model(torch.randn(shape))
    return model.eval(), x


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fixed_computes_what_the_path_does_and_has_no_choice(name: str) -> None:
    model, x = trained(name)
    outputs, sizes = [], set()
    for choice in choices_of(model):
        choose(model, choice)
        plain = fixed(model)
        assert not [module for module in plain.modules() if isinstance(module, ChoiceModule)]
        torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)
        assert {k: v.shape for k, v in fixed(model, choice).state_dict().items()} == {
            k: v.shape for k, v in plain.state_dict().items()
        }
        outputs.append(model(x))
        sizes.add(size_of(plain))
    assert len(outputs) > 1
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))
    assert len(sizes) > 1


def test_it_has_the_parameters_of_the_same_model_written_without_choices() -> None:
    plain = fixed(convolutions(), {"0": "5x5", "1": 2})
    by_hand = nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.Sequential(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 4, 3)),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    assert str(plain) == str(by_hand)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in by_hand.state_dict().items()}
    assert size_of(fixed(MODELS["heads"][0](), {"0": 1})) == 8 * 6 + 6 + 2 * 8 + 8


def test_what_is_fixed_shares_nothing_with_the_supernet() -> None:
    model, x = trained("convolutions")
    plain, before = fixed(model, {"1": 2}), model(x)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            tensor.zero_()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", MODELS)
def test_a_path_has_gradients_of_what_it_uses_alone(name: str) -> None:
    model, x = trained(name)
    for choice in choices_of(model):
        choose(model, choice)
        model.zero_grad()
        model(x).pow(2).sum().backward()
        without = {id(p) for p in model.parameters() if p.grad is None}
        assert without == {id(p) for p in left_out(model)}


def test_zeros_for_what_a_path_leaves_out_even_beside_values_that_are_not_finite() -> None:
    model, x = trained("nested")
    choose(model, {"1": 0})
    with torch.no_grad():
        model.get_parameter("1.blocks.0.layers.0.weight").fill_(torch.nan)
    Paths(model).loss(model(x).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not any(p.grad.any() for p in left_out(model) if p.grad is not None)
    assert left_out(model)


def test_a_block_that_stands_twice_is_not_left_out_where_it_is_used_once() -> None:
    block = nn.Linear(4, 4)
    model = Depth([1, 2], [block, block])
    choose(model, {"model": 1})
    assert not left_out(model)


def test_a_choice_that_stands_twice_is_one_and_counts_where_one_place_is_used() -> None:
    shared = Width([2, 4], nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    either = OneOf({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared, nn.Tanh()), "c": nn.Identity()})
    model = nn.Sequential(either, nn.ReLU())
    assert space_of(model).conditions["0.candidates.a.0"] == {"0": ("a", "b")}
    assert space_of(nn.Sequential(either, shared)).conditions["0.candidates.a.0"] == {}
    narrow = fixed(nn.Sequential(shared, nn.ReLU(), shared), {"0": 2})
    assert narrow[0] is narrow[2]
    assert size_of(narrow) == 3 * 2 + 2 + 2 * 3 + 3


def test_the_space_of_a_model() -> None:
    space = space_of(nested())
    assert dict(space) == {
        "1": (0, 1, 2),
        "1.blocks.0": (2, 4),
        "1.blocks.1": ("0", "1"),
        "1.blocks.1.candidates.1": (1, 2),
    }
    first = {"1": 0, "1.blocks.0": 4, "1.blocks.1": "1", "1.blocks.1.candidates.1": 2}
    assert space.canonical(first) == {"1": 0, "1.blocks.0": 2, "1.blocks.1": "0", "1.blocks.1.candidates.1": 1}
    assert space.canonical({**first, "1": 1})["1.blocks.0"] == 4
    assert space.counting({**first, "1": 2}) == list(space)
    assert list(space_of(OneOf(nn.ReLU(), nn.GELU()))) == ["model"]


def test_names_are_those_without_torch_compile() -> None:
    model = nested()
    compiled: Any = torch.compile(model)
    assert dict(space_of(compiled)) == dict(space_of(model))
    choose(compiled, {"1": 1})
    assert chosen(model)["1"] == chosen(compiled)["1"] == 1


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"2": 1}, "choice '2': unknown name, expected one of '1', '1.blocks.0'"),
        ({"1": 3}, "choice '1': expected one of 0, 1, 2, got 3"),
        ({"1": True}, "choice '1': expected one of 0, 1, 2, got True"),
        ({"1": 1, "1.blocks.1": 0}, "choice '1.blocks.1': expected one of '0', '1', got 0"),
    ],
)
def test_a_wrong_choice_says_what_was_expected_and_changes_nothing(choice: dict[str, Any], words: str) -> None:
    model = nested()
    before = chosen(model)
    for set_it in (choose, fixed):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the words follow
            set_it(model, choice)
        assert words in str(error.value)
    assert chosen(model) == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OneOf(nn.ReLU()), "OneOf: expected at least two modules"),
        (lambda: OneOf(nn.ReLU(), 3), "OneOf: expected at least two modules"),  # type: ignore[arg-type]
        (lambda: OneOf({"a.b": nn.ReLU(), "c": nn.ReLU()}), "OneOf: a candidate's name is 'a.b'"),
        (lambda: OneOf({3: nn.ReLU(), 5: nn.ReLU()}), "OneOf: a candidate's name is 3"),
        (lambda: OneOf({"keys": nn.ReLU(), "c": nn.ReLU()}), "OneOf: a candidate's name is 'keys'"),
        (lambda: Depth([1, 3], [nn.ReLU()] * 2), "Depth: the largest choice is 3, expected 2, the number of blocks"),
        (lambda: Depth([2, 1], [nn.ReLU()] * 2), "Depth: expected at least two rising whole numbers from 0"),
        (lambda: Width([0, 4], nn.Linear(8, 4), nn.Linear(4, 8)), "Width: expected at least two rising whole numbers from 1"),
        (lambda: Width([2, 4], nn.Linear(8, 4), nn.Linear(5, 8)), "the first layer has 4 outputs, the last 5 inputs"),
        (lambda: Width([2, 4], nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 8)), "got LayerNorm"),
        (lambda: Width([2, 4], nn.Linear(8, 4)), "Width: expected two Linear layers or two convolutions"),
        (lambda: Width([2, 4], nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3)), "convolutions without groups"),
        (lambda: Width([2, 4], nn.Conv2d(4, 4, 1), nn.Linear(4, 8)), "Width: expected two Linear layers"),
        (lambda: Heads([1, 2], nn.MultiheadAttention(8, 2), "out_proj"), "Heads: a MultiheadAttention has none of"),
        (lambda: Heads([1, 2], Attention(8, 4), "out"), "Heads: the largest choice is 2, expected 4"),
        (lambda: Heads([1, 4], Attention(8, 4), "gone"), "Heads: 'gone' is None, expected a Linear that takes 4 heads of 2"),
        (lambda: space_of(nn.Linear(2, 2)), "space: a Linear without a OneOf, Depth, Width or Heads"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_says_what_was_expected(make: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the words follow
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "conditions", "words"),
    [
        ({"a": []}, {}, "space 'a': expected a list of options, got []"),
        ({"a": "xy"}, {}, "space 'a': expected a list of options, got 'xy'"),
        ({}, {}, "space: there is nothing to choose"),
        ({"a": [1, 1]}, {}, "space 'a': an option appears twice"),
        ({"a": list(np.arange(2.0))}, {}, "is a float64, expected a plain str, int, float or bool"),
        ({"a": [1.0, math.nan]}, {}, "space 'a': the option nan is a float"),
        (
            {"a": [1], "b": [1]},
            {"a": {"b": [1]}},
            "space 'a': depends on 'b', expected the name of an earlier choice",
        ),
        ({"a": [1], "b": [1]}, {"b": {"a": [2]}}, "space 'b': depends on 'a' being one of 2, expected some of 1"),
        ({"a": [1]}, {"c": {}}, "space: a condition for 'c', which is not one of its names: 'a'"),
    ],
)
def test_a_space_that_cannot_be_says_what_was_expected(options: Any, conditions: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the words follow
        Space(options, conditions)
    assert words in str(error.value)
    assert Space({"a": [1, True, 1.0, None]})["a"] == (1, True, 1.0, None)
    with pytest.raises(ValueError, match="space 'a': is in both spaces"):
        Space({"a": [1]}) | Space({"a": [2]})


@given(seed=st.integers(0, 2**32), other=st.integers(0, 2**32))
@EXAMPLES
def test_choices_that_differ_where_it_does_not_count_are_one(seed: int, other: int) -> None:
    space = space_of(nested())
    choice, noise = space.draw(random.Random(seed)), space.draw(random.Random(other))
    assert space.canonical(choice) == choice
    counting = space.counting(choice)
    changed = {name: option if name in counting else noise[name] for name, option in choice.items()}
    assert space.canonical(changed) == choice
