"""Structure by a budget: no more of it than the file needs, and what cannot be met is told with the model as it was."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commpress.model import Recipe, RecipeError, Scheduler, export, narrowing, prepare
from commpress.model.budget import BudgetError, Measured
from commpress.model.narrowing import narrow
from commpress.model.sensitivity import Choice, Way, greedy, smallest, units_of
from commpress.model.structured import Shapes, reshape

LIBRARIES = ("torchao.quantization", "torch_pruning")
WIDTH, CLASSES = 32, 8


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def inputs() -> tuple[Tensor, ...]:
    return (torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1)),)


def recipe(**limits: Any) -> Recipe:
    return Recipe.of({"budget": {"format": "safetensors", "end": 4, "every": 2, "structure": 0.75, **limits}})


def widths(model: nn.Module) -> list[int]:
    return [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]


def smallest_bytes(share: float) -> int:
    model = network()
    if share:
        model, _ = narrowed(model, recipe(max_mb=1.0, removed=share))
    return narrowing._tried(model, recipe(max_mb=1e-6).budget, inputs())[0][-1].bytes  # type: ignore[arg-type]


def narrowed(model: nn.Module, of: Recipe) -> tuple[nn.Module, narrowing.Narrowed]:
    return model, narrow(model, of, inputs())[1]


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 0.75])
def test_no_more_goes_than_the_file_needs(share: float) -> None:
    limit = (smallest_bytes(share) + 1) / 1e6
    said, found = narrow(model := network(), recipe(max_mb=limit), inputs())
    assert said.budget is not None
    assert said.budget.removed == found.removed == share
    assert said.chooses
    assert widths(model) == [128 - round(128 * share), 128 - round(128 * share), CLASSES]
    assert found.before is not None
    assert found.after is not None
    assert found.before.parameters == sum(p.numel() for p in network().parameters())
    assert found.after.parameters == sum(p.numel() for p in model.parameters())
    assert found.after.bytes <= limit * 1e6 < found.before.bytes
    assert found.after.ms is None


def test_a_file_that_fits_in_the_run_too(tmp_path: Path) -> None:
    limit = 1.1 * smallest_bytes(0.5) / 1e6
    said, found = narrow(model := network(), recipe(max_mb=limit), inputs())
    assert 0 < found.removed <= 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held_out = [(inputs()[0], torch.arange(16) % CLASSES)]
    scheduler = Scheduler(said, model, optimizer, held_out=held_out)
    for _ in range(6):
        nn.functional.cross_entropy(model(inputs()[0]), held_out[0][1]).backward()
        optimizer.step()
        scheduler.step()
    (file,) = export(model, tmp_path, formats=("safetensors",), example_inputs=inputs())
    assert file.bytes <= 1e6 * limit
    # a fresh model, with what the checkpoint says
    saved = Recipe.of(scheduler.state_dict()["recipe"])
    again, followed = narrow(fresh := network(), saved, inputs())
    assert again == saved
    assert (followed.removed, followed.before) == (found.removed, None)
    prepare(fresh, saved)
    fresh.load_state_dict(model.state_dict())


def test_a_limit_that_the_most_structure_misses_is_told_and_the_model_is_whole() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    said = r"budget.max_mb: 0.0005 MB cannot be met, the closest of model.safetensors is 0.00\d MB, with 0.75 of each width"
    with pytest.raises(BudgetError, match=said):
        narrow(model, recipe(max_mb=0.0005), inputs())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_what_has_no_width_to_remove_is_told() -> None:
    with pytest.raises(
        BudgetError, match=r"cannot be met, .*; budget.structure: nothing can be removed: shrink\(0.75\)"
    ):
        narrow(nn.Sequential(nn.Linear(WIDTH, CLASSES)), recipe(max_mb=0.0001), inputs())


def test_time_is_met_with_a_margin_where_more_could_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes as many ms as the second layer has rows."""

    def measured(model: nn.Module, units: Any, choice: Choice, *rest: Any) -> Measured:
        return Measured(1000, float(widths(model)[1]))

    monkeypatch.setattr(narrowing, "measured", measured)
    for limit, removed in ((128.0, 0), (127.0, 0.125), (112.0, 0.25), (32.0, 0.75)):
        _, found = narrow(network(), recipe(max_ms=limit), inputs())
        assert (limit, found.removed) == (limit, removed)
        assert found.before is not None
        assert found.before.ms == 128
    with pytest.raises(BudgetError, match=r"budget.max_ms: 31 ms cannot be met, the closest .* is 32 ms, with 0.75 of"):
        narrow(network(), recipe(max_ms=31.0), inputs())


class Branches(nn.Module):
    """A branch for the half of the inputs that says the class, and one for noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tells, self.noise = nn.Linear(16, 96), nn.Linear(16, 96)
        self.of_tells, self.of_noise = nn.Linear(96, CLASSES), nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.of_tells(self.tells(x[:, :16]).relu()) + self.of_noise(self.noise(x[:, 16:]).relu())
        return y


def batches(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    truth = torch.randn(16, CLASSES, generator=torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(seed)
    found = [torch.randn(64, WIDTH, generator=source) for _ in range(count)]
    return [(x, (x[:, :16] @ truth).argmax(1)) for x in found]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = Branches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in batches(1, 150):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_trained_model_loses_the_width_that_does_not_matter(trained: nn.Module) -> None:
    limit = 0.0038
    held_out = batches(2, 4)
    _, alike = narrow(one := copy.deepcopy(trained), recipe(max_mb=limit), inputs())
    model = copy.deepcopy(trained)
    said, found = narrow(model, recipe(max_mb=limit), inputs(), held_out)
    assert isinstance(alike.removed, float)
    assert isinstance(found.removed, dict)
    assert found.removed["noise"] >= 0.5
    assert found.removed.get("tells", 0.0) <= 0.125
    assert found.before is not None
    assert found.after is not None
    assert found.after.bytes <= 1e6 * limit < found.before.bytes
    losses = [
        sum(float(nn.functional.cross_entropy(small(x), y).detach()) for x, y in held_out) / len(held_out)
        for small in (trained, model, one)
    ]
    assert [found.before.loss, found.after.loss] == pytest.approx(losses[:2], rel=1e-4)
    assert losses[1] < 0.8 * losses[2]
    # a fresh model, with what a file says
    saved = Recipe.of(json.loads(json.dumps(said.to_dict())))
    again, followed = narrow(fresh := Branches(), saved, inputs(), held_out)
    assert (again, followed.removed, followed.shapes) == (saved, found.removed, found.shapes)
    fresh.load_state_dict(model.state_dict())


def test_a_model_that_has_learned_nothing_loses_one_share_of_all() -> None:
    limit = recipe(max_mb=0.0038)
    removed = [narrow(Branches(), limit, inputs(), given)[1].removed for given in (batches(2, 4), None)]
    assert isinstance(removed[0], float)
    assert removed[0] == removed[1]


def test_batches_and_names_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match=r"narrow\(batches\): batch 0: expected \(inputs, targets\), got a Tensor"):
        narrow(Branches(), recipe(max_mb=0.0038), inputs(), [inputs()[0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"'tell' is no layer whose outputs can be removed, known: noise, tells"):
        narrow(Branches(), recipe(max_mb=1.0, removed={"noise": 0.5, "tell": 0.5}), inputs())


def test_what_was_removed_is_said_in_words() -> None:
    assert narrowing.described(0.25) == "0.25 of each width"
    assert narrowing.described({"a": 0.5, "b": 0.125}) == "0.5 of 'a', 0.125 of 'b'"
    many = {f"layers.{i}": 0.5 for i in range(11)}
    assert narrowing.described(many).endswith("0.5 of 'layers.7' and of 3 more widths")


def test_sizes_bring_a_fresh_model_to_the_same_shape() -> None:
    model, found = narrowed(network(), recipe(max_mb=1.0, removed=0.5))
    reshape(fresh := network(), Shapes(found.shapes.tensors, found.shapes.sizes))
    fresh.load_state_dict(model.state_dict())


@pytest.mark.parametrize("bits", [(8,), (8, 4)])
@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_the_smallest_choice_is_the_end_of_every_path(format: str, prunes: bool, bits: tuple[int, ...]) -> None:
    units = units_of(network())
    way, everything = Way(format, prunes, bits), Way(format, True, (8, 4))
    rises = {(i, setting): 1.0 + i for i, unit in enumerate(units) for setting in unit.settings(everything)}
    saved = greedy(units, rises, way)[-1][1]
    found = smallest(units, way)
    dense = units[0].settings(Way(format, False, ()))[0]
    assert saved == sum(unit.bytes(dense, format) - unit.bytes(found[i], format) for i, unit in enumerate(units))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            {"max_loss": 0.1, "structure": 0.5},
            "budget.structure: is removed for max_mb or max_ms, expected one of them",
        ),
        ({"max_mb": 1.0, "structure": 1.0}, "budget.structure: expected less than 1, got 1.0"),
        ({"max_mb": 1.0, "removed": 0.5}, "budget.removed: expected at most structure, 0, got 0.5"),
        (
            {"max_mb": 1.0, "structure": 0.5, "removed": {"a": 0.25, "b": 0.75}},
            "budget.removed: expected at most structure, 0.5, got 0.75",
        ),
        (
            {"max_mb": 1.0, "structure": 0.5, "removed": {"a": 1}},
            "budget.removed: expected a share in [0, 1), or a table of them by layers, whose names are in quotes, got {'a': 1}",
        ),
    ],
)
def test_structure_that_makes_no_sense_is_refused(found: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.of({"budget": found})
    assert told in str(error.value)
    with pytest.raises(RecipeError, match=r"budget.structure: is of what a budget chooses"):
        Recipe.of({"budget": {"max_mb": 1.0, "structure": 0.5}, "quantize": [{}]})


def test_a_loop_that_has_not_removed_it_is_told() -> None:
    model = network()
    with pytest.raises(
        RecipeError, match=r"budget.structure: is removed before the model is wrapped, and a scheduler comes"
    ):
        Scheduler(
            recipe(max_mb=1.0), model, torch.optim.SGD(model.parameters()), held_out=[(inputs()[0], torch.zeros(16))]
        )
    with pytest.raises(ValueError, match="narrow: expected a recipe whose"):
        narrow(model, recipe(max_mb=1.0, structure=0.0), inputs())
