"""Which weights a recipe reaches, along which of their dimensions, and what it says of those that it leaves out."""

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from tiers import slow, slowly
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss
from torch.nn.utils import parametrizations
from training import network

from commpress.model import Recipe, RecipeError, Scheduler, layers, pruning
from commpress.model.importance import Wanda
from commpress.model.structured import reshape, shrink

Told = list[str]


def scheduled(model: nn.Module, *entries: dict[str, Any], **recipe: Any) -> tuple[Scheduler, Told]:
    """A scheduler of these entries, and what it warned of."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = Scheduler(Recipe.of({"prune": list(entries), **recipe}), model, optimizer)
    return made, [str(each.message) for each in caught if each.category is UserWarning]


def train(scheduler: Scheduler, model: Any, x: Tensor, steps: int = 6) -> tuple[list[float], Told]:
    """Losses, and what was warned of."""
    losses, target = [], torch.Generator().manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            output = model(x)
            loss = mse_loss(output, torch.randn(output.shape, generator=target))
            scheduler.loss(loss, output, x).backward()
            assert scheduler.optimizer is not None
            scheduler.optimizer.step()
            scheduler.optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.item())
    return losses, [str(each.message) for each in caught if each.category is UserWarning]


def gpt2(tied: bool = True, kind: str = "GPT2LMHeadModel") -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 4, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3, tie_word_embeddings=tied, use_cache=False)
    return getattr(transformers, kind)(config)


BLOCK = [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


# Conv1D: a Linear transposed


@pytest.mark.parametrize(
    ("tied", "kind", "head"),
    [
        (True, "GPT2LMHeadModel", []),
        (False, "GPT2LMHeadModel", ["lm_head.weight"]),
        (True, "GPT2ForSequenceClassification", ["score.weight"]),
    ],
)
def test_a_default_takes_the_blocks_of_gpt2(tied: bool, kind: str, head: list[str]) -> None:
    model = gpt2(tied, kind)
    scheduler, _ = scheduled(model, {"start": 0, "amount": 0.8})
    assert list(scheduler.masks.of) == BLOCK + head
    pruned = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2)
    assert scheduler.reach.of_model == pytest.approx(pruned / sum(p.numel() for p in model.parameters()))
    assert scheduler.reach.pruned == pytest.approx(0.8, abs=1e-3)


def test_conv1d_is_pruned_as_the_linear_that_it_is() -> None:
    """The masks of a GPT-2's Conv1D are those of a Linear with the same weights."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = nn.Sequential(Conv1D(24, 16), nn.Tanh(), Conv1D(8, 24))
    same = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    for index in (0, 2):
        w = torch.randn(same[index].weight.shape)
        same[index].weight.data.copy_(w)
        conv[index].weight.data.copy_(w.t())
        same[index].bias.data.copy_(conv[index].bias)
    x = torch.randn(32, 16)
    recipes = [
        {"start": 1, "pattern": "2:4"},
        {"start": 1, "amount": 0.5, "scope": "row"},
        {"start": 2, "amount": 0.6, "criterion": "wanda", "scope": "row", "every": 2},
        {"start": 2, "pattern": "2:4", "criterion": "wanda", "every": 2},
        {"start": 2, "amount": 0.5, "criterion": "wanda", "every": 2},
    ]
    for recipe in recipes:
        models = [copy.deepcopy(conv), copy.deepcopy(same)]
        masks = []
        for model in models:
            scheduler, _ = scheduled(model, recipe)
            train(scheduler, model, x, 3)
            masks.append(scheduler.masks.of)
        assert list(masks[0]) == ["0.weight", "2.weight"]
        if "pattern" in recipe:
            pruning.require_n_of_m(layers.inputs_last(conv, masks[0]), 2, 4)
        for name, mask in masks[0].items():
            assert torch.equal(mask.t(), masks[1][name]), (recipe, name)


def test_heads_and_units_of_gpt2_go() -> None:
    model = gpt2().eval()
    ids = torch.randint(0, 64, (2, 8))
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = shrink(model, {"input_ids": ids}, 0.5)
    found = [tuple(shapes.tensors[name]) for name in BLOCK]
    assert found == [(16, 24), (8, 16), (16, 32), (32, 16)]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.transformer.h[0].attn.num_heads == 2
    fresh = gpt2().eval()
    reshape(fresh, shapes)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# convolutions


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_two_of_four_stand_along_the_inputs_of_a_convolution(kernel: int, groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(kind(16, 8, kernel, groups=groups))
    scheduler, _ = scheduled(model, {"start": 0, "pattern": "2:4", "parameters": ["0.weight"]})
    w = model[0].weight.detach()
    if transposed:  # [inputs, outputs / groups, ...]
        fours = w.unflatten(0, (groups, -1, 4))
        kept = (fours != 0).sum(2)
    else:
        kept = (w.unflatten(1, (-1, 4)) != 0).sum(2)
    assert bool((kept == 2).all())
    pruning.require_n_of_m(layers.inputs_last(model, scheduler.masks.of), 2, 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_row_of_a_transposed_convolution_is_an_output(groups: int) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=groups, bias=False))
    scheduled(model, {"start": 0, "amount": 0.5, "scope": "row", "parameters": ["0.weight"]})
    size = 8 // groups * 9
    for output in range(6):
        # what one output is made of: the gradient of its sum at an inner place is the weights behind it
        x = torch.zeros(1, 8, 7, 7, requires_grad=True)
        (g,) = torch.autograd.grad(model(x)[0, output, 4, 4], x)
        assert int((g != 0).sum()) == size - round(0.5 * size)


def test_a_row_of_a_convolution_is_an_output() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3))
    scheduled(model, {"start": 0, "amount": 0.5, "scope": "row", "parameters": ["0.weight"]})
    assert (model[0].weight == 0).flatten(1).sum(1).tolist() == [36] * 6


def test_depthwise_convolutions_have_no_four_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 4, groups=8))
    with pytest.raises(RecipeError, match=r"prune\[0\]\.pattern: 2 of 4: '0\.weight' must have a multiple of 4 inputs"):
        scheduled(model, {"start": 0, "pattern": "2:4", "parameters": ["0.weight"]})


# what is never called


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), nn.Linear(16, 4))


WANDA = {"start": 3, "amount": 0.5, "criterion": "wanda", "every": 2}


def test_wanda_leaves_out_the_projection_that_attention_does_not_call() -> None:
    model = encoder()
    scheduler, told = scheduled(model, WANDA)
    assert len([each for each in told if "leaves out 0.self_attn.out_proj.weight" in each]) == 1
    _, more = train(scheduler, model, torch.randn(8, 5, 16))
    assert list(scheduler.masks.of) == ["0.linear1.weight", "0.linear2.weight", "1.weight"]
    assert more == []
    assert scheduler.masks.sparsity == 0.5
    with pytest.raises(RecipeError, match=r"prune\[0\]\.criterion: wanda sees no input of 0\.self_attn\.out_proj"):
        scheduled(encoder(), {**WANDA, "parameters": ["*out_proj.weight"]})
    magnitude, _ = scheduled(encoder(), {"start": 0, "amount": 0.5})
    assert "0.self_attn.out_proj.weight" in magnitude.masks.of


class Functional(nn.Module):
    """Layers whose weights are used past their modules, and one that is called, if there is one."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.called = nn.Linear(16, 16) if called else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.used:
            assert isinstance(layer, nn.Linear)
            x = linear(x, layer.weight, layer.bias).tanh()
        y: Tensor = self.called(x)
        return y


def test_what_is_used_uncalled_is_told_in_the_first_step_and_left_out() -> None:
    model = Functional(called=True)
    scheduler, _ = scheduled(model, WANDA)
    _, told = train(scheduler, model, torch.randn(8, 16), 1)
    assert len(told) == 1
    assert "wanda has seen no input of used.0.weight, used.1.weight in training mode" in told[0]
    train(scheduler, model, torch.randn(8, 16))
    assert list(scheduler.masks.of) == ["called.weight"]
    assert bool((model.used[0].weight != 0).all())  # type: ignore[union-attr]


def test_where_nothing_is_called_the_first_step_is_an_error_and_moves_nothing() -> None:
    model = Functional(called=False)
    scheduler, _ = scheduled(model, WANDA)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RecipeError, match=r"prune\[0\]\.criterion: wanda has seen no input of used\.0\.weight"):
        train(scheduler, model, torch.randn(8, 16), 1)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_wanda_counts_the_inputs_of_all_layers_that_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    criterion = Wanda(model, {"0.weight": model[0].weight})
    x = torch.randn(5, 8)
    model(x)
    inputs = torch.cat([x, model[1](nn.functional.linear(x, model[0].weight, model[0].bias))])
    expected = model[0].weight.abs() * inputs.norm(dim=0)
    torch.testing.assert_close(criterion.scores()["0.weight"], expected.detach(), rtol=1e-5, atol=1e-7)


# compiled models


def teacher() -> nn.Module:
    return network(seed=1)


COMPILED: dict[str, dict[str, Any]] = {
    "prune": {"prune": [{"start": 2, "end": 6, "every": 2, "amount": 0.8}]},
    "wanda": {"prune": [{"start": 4, "amount": 0.5, "criterion": "wanda", "every": 2}]},
    "taylor": {"prune": [{"start": 4, "amount": 0.5, "criterion": "taylor", "every": 2}]},
    "int8": {"quantize": [{"start": 4}]},
    "hidden from the start": {"distil": {"hidden": {"1": "1"}}},
    "hidden from step 4": {"distil": {"start": 4, "hidden": {"1": "1"}}},
    "hidden until step 4": {"distil": {"end": 4, "hidden": {"1": "1"}}},
}


def losses(recipe: dict[str, Any], backend: str | None, way: str = "", late: bool = False) -> list[float]:
    torch._dynamo.reset()
    model: Any = network()
    called: Any = model
    if way == "block":
        model[2] = torch.compile(model[2], backend=backend)
    elif way == "in place":
        model.compile(backend=backend)
    elif backend is not None:
        called = torch.compile(model, backend=backend)
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    if late:
        called(x).sum().backward()
        model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = called if way == "given" else model
    distils = teacher() if "distil" in recipe else None
    scheduler = Scheduler(Recipe.of(recipe), given, optimizer, teacher=distils)
    found, _ = train(scheduler, called, x, 9)
    torch._dynamo.reset()
    assert all("_orig_mod" not in name for name in scheduler.masks.of)
    return found


@functools.cache
def plain_losses(recipe: str) -> list[float]:
    """The losses of a model that is not compiled."""
    return losses(COMPILED[recipe], None)


@pytest.mark.parametrize(("recipe", "backend", "way"), [
    *slowly(
        [(recipe, "eager", "around") for recipe in COMPILED],
        quick=[(recipe, "eager", "around") for recipe in ("prune", "hidden from step 4")],
    ),
    ("taylor", "aot_eager", "given"),
    *(slow(recipe, "aot_eager", "given") for recipe in ("prune", "int8", "hidden from step 4")),
    ("wanda", "eager", "block"),
    *(slow(recipe, "eager", "block") for recipe in ("int8", "hidden from the start")),
    ("hidden until step 4", "eager", "in place"),
    *(slow(recipe, "eager", "in place") for recipe in ("wanda", "taylor")),
])  # fmt: skip
def test_a_compiled_model_has_the_losses_of_a_plain_one(recipe: str, backend: str, way: str) -> None:
    assert losses(COMPILED[recipe], backend, way) == plain_losses(recipe)


@pytest.mark.parametrize("recipe", ["wanda", "hidden from step 4", "hidden from the start"])
def test_a_model_that_was_compiled_and_called_before_is_an_error_in_the_first_step(recipe: str) -> None:
    with pytest.raises(ValueError, match=r"compiled and called before.*torch\.compiler\.reset\(\)"):
        losses(COMPILED[recipe], "eager", late=True)


@pytest.mark.parametrize("recipe", ["prune", "taylor", "int8"])
def test_what_needs_no_forward_hooks_takes_a_model_that_was_compiled_and_called(recipe: str) -> None:
    assert losses(COMPILED[recipe], "eager", late=True) == plain_losses(recipe)


def test_a_run_that_goes_on_behind_the_phase_of_its_hooks_needs_none() -> None:
    recipe = Recipe.of({"prune": [{**WANDA, "parameters": ["*.weight"]}], "distil": {"end": 4, "hidden": {"1": "1"}}})
    states = []
    for _ in range(2):
        model: Any = network()
        called = torch.compile(model, backend="eager")
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
        if states:
            called(x)  # before the hooks
        scheduler = Scheduler(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1), teacher=teacher())
        if states:
            scheduler.load_state_dict(states[0])
        train(scheduler, called, x, 2 if states else 6)
        states.append(scheduler.state_dict())
        torch._dynamo.reset()
    assert [state["done"] for state in states] == [6, 8]


def test_globs_know_no_prefix_of_a_compiler() -> None:
    model = network()
    model[2] = torch.compile(model[2], backend="eager")  # type: ignore[assignment]
    scheduler, _ = scheduled(model, {"start": 0, "amount": 0.5, "parameters": ["2.weight"]})
    assert list(scheduler.masks.of) == ["2.weight"]


# what is reached, and what cannot be


def test_a_default_that_reaches_little_says_so_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    scheduler, told = scheduled(model, {"start": 0, "amount": 0.5})
    assert len(told) == 1
    assert "prunes among 64 of 516 parameters, 12.4% of the model; left out: 0.weight (of Conv2d" in told[0]
    assert scheduler.masks.sparsity == scheduler.reach.pruned == 0.5
    assert scheduler.reach.of_model == pytest.approx(32 / 516)
    assert "6.2% of the model" in str(scheduler.reach)
    _, told = scheduled(network(), {"start": 0, "amount": 0.5})
    assert told == []


def test_a_weight_that_an_embedding_shares_is_the_embeddings_in_any_order() -> None:
    for head_first in (False, True):
        parts = {"embedding": nn.Embedding(12, 8), "linear": nn.Linear(8, 8), "head": nn.Linear(8, 12, bias=False)}
        names = sorted(parts, reverse=not head_first, key=lambda name: name == "embedding")
        model = nn.ModuleDict({name: parts[name] for name in names})
        parts["head"].weight = parts["embedding"].weight
        scheduler, _ = scheduled(model, {"start": 0, "amount": 0.5})
        assert list(scheduler.masks.of) == ["linear.weight"]


def test_a_glob_finds_a_shared_weight_by_any_of_its_names() -> None:
    model = gpt2()
    scheduler, _ = scheduled(model, {"start": 0, "amount": 0.5, "parameters": ["lm_head.weight"]})
    assert list(scheduler.masks.of) == ["transformer.wte.weight"]


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_zeros_behind_a_norm_are_zeros_of_the_weight(kind: Any) -> None:
    model = nn.Sequential(kind(nn.Linear(16, 8)), nn.Linear(8, 4))
    names = [name for name, p in model.named_parameters() if "original" in name and p.shape == (8, 16)]
    scheduled(model, {"start": 0, "pattern": "2:4", "parameters": names})
    assert bool(((model[0].weight.reshape(-1, 4) != 0).sum(1) == 2).all())


def test_a_parametrization_that_keeps_no_zeros_is_refused() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)))
    with pytest.raises(RecipeError, match=r"has the parametrization _Orthogonal"):
        scheduled(model, {"start": 0, "amount": 0.5, "parameters": ["*original"]})


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (
            [{"start": 10, "end": 20, "amount": 0.9}, {"start": 0, "end": 5, "amount": 0.5}],
            r"prune\[1\]\.start: 0, before prune\[0\] of the same '0\.weight', which starts at 10",
        ),
        (
            [{"start": 0, "end": 10, "amount": 0.5}, {"start": 5, "amount": 0.6}],
            r"prune\[1\]\.start: 5, while prune\[0\]",
        ),
        (
            [{"start": 0, "amount": 0.8}, {"start": 5, "amount": 0.5}],
            r"prune\[1\]\.amount: 0\.5, less than the 0\.8 of the same weights that prune\[0\] has pruned",
        ),
        (
            [{"start": 0, "amount": 0.5, "parameters": ["*.norm"]}],
            r"prune\[0\]\.parameters: '\*\.norm' matches nothing",
        ),
        ([{"start": 0, "amount": 0.5, "scope": "row", "parameters": ["0.bias"]}], r"prune\[0\]\.scope: .* has no rows"),
        (
            [{"start": 1, "end": 90, "amount": 0.5, "schedule": "regrow"}],
            r"prune\[0\]\.every: 100, so no weight is exchanged from start 1 to end 90",
        ),
        ([{"start": 0, "amount": 1e-5}], r"prune\[0\]\.amount: 1e-05 of 6784 weights rounds to none"),
    ],
)
def test_entries_that_contradict_or_reach_nothing(entries: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        scheduled(network(), *entries)


def test_a_frozen_model_and_a_frozen_name() -> None:
    model = network().requires_grad_(False)
    model.append(nn.BatchNorm1d(10))
    with pytest.raises(RecipeError, match="no Linear layers that are trained"):
        scheduled(model, {"start": 0, "amount": 0.5})
    with pytest.raises(RecipeError, match=r"'2\.weight' is frozen, expected one that is trained"):
        scheduled(model, {"start": 0, "amount": 0.5, "parameters": ["2.weight"]})


@pytest.mark.parametrize(
    "how", [{"pattern": "2:4"}, {"amount": 0.5, "scope": "row"}, {"amount": 0.5}, {"threshold": 0.1}]
)
def test_parameters_without_values_and_in_bfloat16(how: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of such a layer
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 0), nn.Linear(0, 4)).bfloat16()
    scheduler, _ = scheduled(model, {"start": 0, **how})
    assert scheduler.masks.of["1.weight"].shape == (0, 8)
    assert 0 < scheduler.masks.sparsity <= 0.5


def test_a_layer_that_loses_all_its_weights_is_named() -> None:
    """Once, and not where a share of all layers leaves some in each."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight.mul_(1e-4)
    made, told = scheduled(model, {"start": 0, "amount": 0.5}, {"start": 2, "amount": 0.6})
    assert len([each for each in told if "step 0: all weights of 2.weight are pruned" in each]) == 1
    assert not [each for each in train(made, model, torch.randn(4, 8))[1] if "all weights of 2.weight" in each]
    kept = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert not [each for each in scheduled(kept, {"start": 0, "amount": 0.5, "scope": "local"})[1] if "all w" in each]


def test_a_threshold_below_all_scores_says_that_it_prunes_nothing() -> None:
    model = nn.Linear(8, 8)
    made, _ = scheduled(model, {"start": 1, "threshold": 1e-30})
    _, told = train(made, model, torch.randn(4, 8))
    assert "prune[0].threshold: no weight scores below 1e-30, none is pruned" in told


def test_a_teacher_that_the_recipe_does_not_ask_is_told() -> None:
    model, teacher = nn.Linear(8, 8), nn.Linear(8, 8)
    with pytest.warns(UserWarning, match=r"a teacher was given, and the recipe has no \[distil\]"):
        Scheduler(Recipe.of({}), model, torch.optim.SGD(model.parameters(), lr=0.1), teacher=teacher)
