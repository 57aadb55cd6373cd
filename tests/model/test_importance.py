"""Scores against their definitions, on one rank, on two, and sharded; what is observed survives a checkpoint."""

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from training import WIDTH, loss_of, network, same

from commpress.model.held import whole
from commpress.model.importance import CRITERIA, Criterion, Magnitude, Movement, Taylor, Wanda
from commpress.model.masks import Masks


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("weight")}


def step(
    model: nn.Module, criterion: Criterion, number: int, rank: int = 0, lr: float = 0.1
) -> dict[str, tuple[Tensor, Tensor]]:
    """A step of SGD that the criterion observes; weights and gradients as they were."""
    model.zero_grad()
    loss_of(model, number, rank).backward()
    criterion.observe()
    seen = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.grad is not None:
                seen[name] = (whole(p).clone(), whole(p.grad).clone())
                p -= lr * p.grad
    return seen


def test_magnitude_is_the_absolute_value() -> None:
    model = network()
    scores = Magnitude(model, weights_of(model)).scores()
    assert list(scores) == ["0.weight", "2.weight", "4.weight"]
    for name, p in weights_of(model).items():
        assert torch.equal(scores[name], p.detach().abs())


def test_scores_are_float32_and_leave_the_weights_alone() -> None:
    model = network().to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in weights_of(model).items()}
    for kind in CRITERIA.values():
        criterion = kind(model, weights_of(model))
        model(torch.randn(4, 32, dtype=torch.bfloat16)).sum().backward()
        criterion.observe()
        for s in criterion.scores().values():
            assert s.dtype == torch.float32
            s.fill_(7)
        assert all(torch.equal(p, before[name]) for name, p in weights_of(model).items())
        assert all(float(s.max()) < 7 for s in criterion.scores().values())
        criterion.close()


def test_taylor_is_the_mean_of_gradient_times_weight() -> None:
    model = network()
    criterion = Taylor(model, weights_of(model))
    with pytest.raises(ValueError, match=r"Taylor of '0\.weight': it has had no gradient yet"):
        criterion.scores()
    seen = [step(model, criterion, number) for number in range(3)]
    for name, s in criterion.scores().items():
        expected = sum((g * w).abs() for w, g in (each[name] for each in seen)) / 3
        torch.testing.assert_close(s, expected, rtol=1e-6, atol=0)


def test_movement_is_the_sum_of_minus_gradient_times_weight() -> None:
    model = network()
    criterion = Movement(model, weights_of(model))
    seen = [step(model, criterion, number) for number in range(3)]
    for name, s in criterion.scores().items():
        expected = sum(-g * w for w, g in (each[name] for each in seen))
        torch.testing.assert_close(s, expected, rtol=1e-6, atol=1e-9)
    assert any(bool((s > 0).any()) and bool((s < 0).any()) for s in criterion.scores().values())


@pytest.mark.parametrize("kind", [Taylor, Movement])
def test_a_parameter_without_a_gradient_is_passed_over(kind: type[Taylor] | type[Movement]) -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    criterion = kind(model, weights_of(model))
    once = step(model, criterion, 0)
    model[0].weight.requires_grad_(True)
    again = step(model, criterion, 1)
    scores = criterion.scores()
    w, g = again["0.weight"]
    assert torch.equal(scores["0.weight"], (g * w).abs() if kind is Taylor else -g * w)  # a mean over one step, not two
    assert "0.weight" not in once
    assert scores["2.weight"].any()


@pytest.mark.parametrize("kind", CRITERIA.values())
def test_what_is_pruned_earns_no_score(kind: type[Criterion]) -> None:
    model = network()
    mask = torch.rand(WIDTH, WIDTH) < 0.5
    masks = Masks(weights_of(model))
    masks.replace({"2.weight": mask})
    criterion = kind(model, weights_of(model))
    for number in range(2):
        step(model, criterion, number)
        masks.apply()
    score = criterion.scores()["2.weight"]
    assert not score[~mask].any()
    assert score[mask].count_nonzero() > 0.9 * int(mask.sum())


def inputs_of(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """What comes into each Linear of `network()`."""
    inputs = {}
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            inputs[f"{index}.weight"] = x
        x = layer(x)
    return inputs


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    model = network()
    criterion = Wanda(model, weights_of(model))
    x = torch.randn(3, 5, 32)
    model(x[:1])
    model(x[1:])
    for name, inputs in inputs_of(model, x).items():  # seen by the hooks as well: all squares are there twice
        expected = dict(model.named_parameters())[name].abs() * inputs.flatten(0, 1).norm(dim=0) * 2**0.5
        torch.testing.assert_close(criterion.scores()[name], expected.detach(), rtol=1e-5, atol=1e-7)


def test_wanda_sees_training_alone_and_nothing_once_closed() -> None:
    model = network()
    criterion = Wanda(model, weights_of(model))
    model.eval()
    model(torch.randn(4, 32))
    with pytest.raises(ValueError, match=r"Wanda of '0\.weight': its layer has had no input in training mode"):
        criterion.scores()
    model.train()
    model(torch.randn(4, 32))
    seen = criterion.scores()
    criterion.close()
    model(torch.randn(4, 32))
    assert all(s.any() for s in seen.values())
    assert same(list(criterion.scores().values()), list(seen.values()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_wanda_counts_an_input_once_that_is_computed_again(reentrant: bool) -> None:
    plain, saving = network(), network()
    seen = [Wanda(model, weights_of(model)) for model in (plain, saving)]
    x = torch.randn(4, 32, requires_grad=True)
    plain(x).sum().backward()
    checkpoint(saving, x, use_reentrant=reentrant).sum().backward()
    assert same(*(list(each.scores().values()) for each in seen))


def test_wanda_takes_linear_weights_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(4, 4))
    for name, found in {
        "0.bias": "a bias of Linear",
        "1.weight": "a weight of LayerNorm",
        "2.weight": "Embedding",
    }.items():
        with pytest.raises(ValueError, match=rf"Wanda of '{name}': expected the weight of an nn.Linear, got .*{found}"):
            Wanda(model, {name: dict(model.named_parameters())[name]})


@pytest.mark.parametrize("kind", CRITERIA.values())
def test_a_checkpoint_goes_on_bit_for_bit(kind: type[Criterion]) -> None:
    model = network()
    criterion = kind(model, weights_of(model))
    step(model, criterion, 0)
    saved = criterion.state_dict()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    step(model, criterion, 1)
    expected = criterion.scores()

    resumed = network(seed=1)
    resumed.load_state_dict(weights)
    again = kind(resumed, weights_of(resumed))
    again.load_state_dict(saved)
    step(resumed, again, 1)
    assert same(list(again.scores().values()), list(expected.values()))


@pytest.mark.parametrize("kind", [Taylor, Movement, Wanda])
def test_a_state_of_another_model_is_refused(kind: type[Criterion]) -> None:
    model = network()
    state = kind(model, weights_of(model)).state_dict()
    criterion = kind(model, {"0.weight": model[0].weight})
    with pytest.raises(ValueError, match=rf"{kind.__name__}: the state is of \['0.weight', '2.weight', '4.weight'\]"):
        criterion.load_state_dict(state)
    other = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"of '0.weight': expected a saved tensor of shape \(.*\), got \(8"):
        criterion.load_state_dict(kind(other, weights_of(other)).state_dict())


def wanda_of_ranks() -> tuple[list[Tensor], list[Tensor]]:
    """Scores by the criterion, and by the definition from the data of all ranks."""
    model = network()
    criterion = Wanda(model, weights_of(model), dist.group.WORLD)
    parts = [torch.randn(6, 32, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    model(parts[dist.get_rank()])
    scores = criterion.scores()
    assert same(list(scores.values()), list(criterion.scores().values()))  # asking changes nothing
    criterion.close()
    inputs = inputs_of(model, torch.cat(parts))
    expected = [p.detach().abs() * inputs[name].detach().norm(dim=0) for name, p in weights_of(model).items()]
    return list(scores.values()), expected


def test_wanda_is_the_same_on_ranks_with_different_data() -> None:
    (one, expected), (other, _) = run(2, wanda_of_ranks)
    assert same(one, other)
    for s, e in zip(one, expected, strict=True):
        torch.testing.assert_close(s, e, rtol=1e-5, atol=1e-7)


def sharded(name: str) -> list[Tensor]:
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    criterion = CRITERIA[name](model, weights_of(model))
    seen = [step(model, criterion, number, dist.get_rank()) for number in range(2)]
    saved, scores = criterion.state_dict(), list(criterion.scores().values())
    again = CRITERIA[name](model, weights_of(model))
    again.load_state_dict(saved)
    assert same(list(again.scores().values()), scores)
    for at, key in enumerate(weights_of(model)):
        observed = [each[key] for each in seen]
        if name == "taylor":
            torch.testing.assert_close(scores[at], sum((g * w).abs() for w, g in observed) / 2, rtol=1e-6, atol=0)
        if name == "movement":
            torch.testing.assert_close(scores[at], sum(-g * w for w, g in observed), rtol=1e-6, atol=1e-9)
        if name == "magnitude":
            assert torch.equal(scores[at], whole(dict(model.named_parameters())[key]).abs())
    return scores


@pytest.mark.parametrize("name", CRITERIA)
def test_sharded_parameters_have_whole_scores(name: str) -> None:
    one, other = run(2, sharded, name)
    assert same(one, other)
    assert [s.shape for s in one] == [p.shape for p in weights_of(network()).values()]
    assert all(s.any() for s in one)


def test_scores_of_a_complex_weight_are_those_of_its_pair_of_reals() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4, bias=False, dtype=torch.complex64), torch.randn(9, 6, dtype=torch.complex64)
    weights = {"weight": layer.weight}
    criteria = {kind: kind(layer, weights) for kind in CRITERIA.values()}
    layer(x).abs().square().sum().backward()
    for criterion in criteria.values():
        criterion.observe()
    w = layer.weight.detach()
    assert layer.weight.grad is not None
    moved = (torch.view_as_real(layer.weight.grad) * torch.view_as_real(w)).sum(-1)  # by how much the loss would change
    expected = {
        Magnitude: w.abs(),
        Movement: -moved,
        Taylor: moved.abs(),
        Wanda: w.abs() * x.abs().square().sum(0).sqrt(),
    }
    for kind, criterion in criteria.items():
        torch.testing.assert_close(criterion.scores()["weight"], expected[kind])
        criterion.close()
