"""Compression settings as a space: the recipe of a choice, and the size of what it leaves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import batch, network

from commpress.model import Recipe, Scheduler, stored
from commpress.model.search import Compression, Problem, Trial, search, stored_bytes

ALL = Compression(
    {
        "0": {"bits": (None, 8, 4), "group": (None, 8)},
        "[24]": {"bits": (8,), "sparsity": (0.0, 0.5, 0.9)},
    },
    prune={"start": 2, "end": 6, "every": 2},
    quantize={"start": 7},
)
DENSE = {"0 bits": None, "0 group": None, "[24] bits": 8, "[24] sparsity": 0.0}
SMALL = {"0 bits": 4, "0 group": 8, "[24] bits": 8, "[24] sparsity": 0.9}


def trained(recipe: Recipe, steps: int = 10) -> tuple[nn.Module, Scheduler]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = Scheduler(recipe, model, optimizer)
    for step in range(steps):
        x, y = batch(step, 0)
        output = model(x)
        scheduler.loss(nn.functional.cross_entropy(output, y), output, x).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, scheduler


def test_a_choice_makes_a_recipe() -> None:
    assert dict(ALL.space) == {
        "0 bits": (None, 8, 4),
        "0 group": (None, 8),
        "[24] bits": (8,),
        "[24] sparsity": (0.0, 0.5, 0.9),
    }
    prune = {"start": 2, "end": 6, "every": 2, "amount": 0.9, "parameters": ["[24].weight"]}
    first, rest = {"bits": 4, "group": 8, "layers": ["0"]}, {"bits": 8, "layers": ["[24]"]}
    assert ALL.recipe({**SMALL, "of another space": 1}) == Recipe.of(
        {"prune": [prune], "quantize": [{"start": 7, **first}, {"start": 7, **rest}]}
    )
    assert ALL.recipe(DENSE) == Recipe.of({"quantize": [{"start": 7, **rest}]})
    assert Compression({"*": {"bits": (None, 8)}}).recipe({"* bits": 8}) == Recipe.of({"quantize": [{"layers": ["*"]}]})


def test_a_group_counts_beside_bits_alone() -> None:
    assert ALL.space.canonical({**DENSE, "0 group": 8}) == DENSE
    assert ALL.space.canonical({**SMALL, "0 bits": 8})["0 group"] == 8


@pytest.mark.parametrize("choice", [DENSE, SMALL, {**SMALL, "[24] sparsity": 0.5}], ids=range(3))
def test_the_size_is_that_of_the_file_which_the_trained_model_leaves(tmp_path: Path, choice: dict[str, Any]) -> None:
    model, scheduler = trained(ALL.recipe(choice))
    stored.save(tmp_path / "model", model, masks=scheduler.masks.of)
    before = network()
    state = copy.deepcopy(before.state_dict())
    assert ALL.stored_bytes(before, choice) == pytest.approx((tmp_path / "model").stat().st_size, abs=16)
    assert all(torch.equal(x, state[name]) for name, x in before.state_dict().items())  # it looks, it does not touch


def test_small_choices_are_small() -> None:
    sizes = [ALL.stored_bytes(network(), choice) for choice in (DENSE, {**DENSE, "0 bits": 8}, SMALL)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert sizes[0] < stored_bytes(network())


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({}, "Compression: expected options by globs of layers, got none"),
        ({"*": {"bit": (8,)}}, "Compression '*': 'bit' is unknown, expected some of bits, group, sparsity"),
        ({"*": {"bits": (None, 3)}}, "Compression '*' bits 3: quantize[0].bits: expected 4 or 8, got 3"),
        ({"*": {"group": (32,)}}, "Compression '*': a group needs bits"),
        ({"*": {"bits": (8,), "group": (1,)}}, "Compression '*' group 1: quantize[0].group"),
        ({"*": {"sparsity": (0.0, 1.5)}}, "Compression '*' sparsity 1.5: prune[0].amount"),
    ],
)
def test_settings_that_no_recipe_can_have(layers: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the words follow
        Compression(layers)
    assert words in str(error.value)
    with pytest.raises(ValueError, match=r"choice '0 group': missing"):
        ALL.recipe({name: option for name, option in SMALL.items() if name != "0 group"})


def test_a_search_over_recipes() -> None:
    def quality(trial: Trial) -> float:
        model, _ = trained(ALL.recipe(trial.choice))
        x, y = batch(100, 0, size=128)
        return -nn.functional.cross_entropy(model(x), y).item()

    found = search(
        Problem(ALL.space, quality, lambda choice: ALL.stored_bytes(network(), choice)), trials=6, strategy="tpe"
    )
    assert all(tried.state == "done" for tried in found.trials)
    smallest = min(found.trials, key=lambda tried: tried.size)
    assert found.front[0].size == smallest.size
    assert len({tried.size for tried in found.trials}) == len(found.trials)
