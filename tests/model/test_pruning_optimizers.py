"""What is pruned stays 0, and its gradients count nowhere, whoever takes the steps: closures, several optimizers, wrappers."""

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, prune
from training import batch, network, parameters_of, same

import commpress
from commpress.model import Recipe, RecipeError, Scheduler
from commpress.model.masks import Masks

LIBRARIES = ("torchao.quantization",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

REGROW = {"start": 1, "end": 9, "every": 2, "amount": 0.5, "schedule": "regrow"}
RECIPES: dict[str, dict[str, Any]] = {
    "magnitude": {"start": 2, "amount": 0.8},
    "taylor": {"start": 2, "end": 6, "every": 2, "amount": 0.8, "criterion": "taylor"},
    "movement": {"start": 2, "end": 6, "every": 2, "amount": 0.8, "criterion": "movement"},
    "wanda": {"start": 2, "amount": 0.8, "every": 2, "criterion": "wanda"},
    "regrow": REGROW,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "LBFGS with a line search": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def moved(scheduler: Scheduler) -> int:
    """How many pruned weights are not 0."""
    of = scheduler.masks.of
    return sum(int((scheduler.model.get_parameter(name)[~mask] != 0).sum()) for name, mask in of.items())


def loss_at(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, dist.get_rank() if dist.is_initialized() else 0)
    return cross_entropy(model(x), y)


def by_closure(recipe: dict[str, Any], make: Callable[[Any], torch.optim.Optimizer], how: str) -> tuple[Any, Any, int]:
    """Parameters, masks and what has moved after ten steps: "loop", "closure" or "named" closure."""
    model = network()
    optimizer = make(model.parameters())
    scheduler = Scheduler(Recipe.of({"prune": [recipe]}), model, optimizer)
    wrong = 0
    for step in range(10):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            return loss

        if how == "loop":
            closure()
            optimizer.step()
        elif how == "named":
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)
        wrong += moved(scheduler)
        for p in scheduler.model.parameters():
            for value in optimizer.state[p].values():
                name = next(n for n, q in model.named_parameters() if q is p)
                if isinstance(value, Tensor) and value.shape == p.shape and name in scheduler.masks.of:
                    wrong += int((value[~scheduler.masks.of[name]] != 0).sum())
        scheduler.step()
    scheduler.close()
    return parameters_of(model), scheduler.masks.of, wrong


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_closure_gives_the_bits_of_a_plain_loop(recipe: str, optimizer: str) -> None:
    plain, masks, _ = by_closure(RECIPES[recipe], OPTIMIZERS[optimizer], "loop")
    for how in ("closure", "named"):
        other, other_masks, wrong = by_closure(RECIPES[recipe], OPTIMIZERS[optimizer], how)
        assert wrong == 0
        assert all(torch.equal(mask, other_masks[name]) for name, mask in masks.items())
        assert same(plain, other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recipe", ["magnitude", "taylor", "regrow"])
def test_what_is_pruned_stays_0_behind_a_closure(optimizer: str, recipe: str) -> None:
    _, masks, wrong = by_closure(RECIPES[recipe], OPTIMIZERS[optimizer], "closure")
    assert masks
    assert wrong == 0


def test_scores_of_lbfgs_are_of_the_first_gradients_of_a_step() -> None:
    """Those behind it are at weights that the step itself has moved to."""
    for lr in (0.1, 0.2):  # at another rate the later evaluations are elsewhere
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=4)
        scheduler = Scheduler(
            Recipe.of({"prune": [{"start": 1, "amount": 0.5, "criterion": "taylor"}]}), model, optimizer
        )
        reference = network()
        loss_at(reference, 0).backward()

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_at(model, 0)
            loss.backward()
            return loss

        optimizer.step(closure)
        criterion = scheduler._pruner.criteria[0]
        assert criterion is not None
        for name, score in criterion.scores().items():
            p = reference.get_parameter(name)
            assert p.grad is not None
            torch.testing.assert_close(score, (p * p.grad).abs().detach())


# two optimizers and more


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]


def trained(scheduler: Scheduler, model: nn.Module, optimizers: list[Any], steps: int = 8) -> list[int]:
    """In each step, how many pruned weights are not 0 behind the optimizers and ahead of the scheduler."""
    wrong = []
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_at(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
        wrong.append(moved(scheduler))
        scheduler.step()
    return wrong


@pytest.mark.parametrize("recipe", RECIPES)
def test_muon_for_matrices_and_adamw_for_the_rest(recipe: str) -> None:
    model = network()
    matrices, rest = halves(model)
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]
    scheduler = Scheduler(Recipe.of({"prune": [RECIPES[recipe]]}), model, optimizers)
    assert trained(scheduler, model, optimizers) == [0] * 8
    amount = RECIPES[recipe]["amount"]
    assert scheduler.masks.sparsity == pytest.approx(amount, abs=1e-3)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_matrices_in_two_optimizers_are_scored_as_in_one(order: tuple[int, int]) -> None:
    masks = []
    for split in (False, True):
        model = network()
        first, second = [*model[0].parameters()], [*model[2].parameters(), *model[4].parameters()]
        groups = [first, second] if split else [[*model.parameters()]]
        optimizers = [torch.optim.SGD(group, lr=0.1) for group in groups]
        scheduler = Scheduler(Recipe.of({"prune": [RECIPES["movement"]]}), model, optimizers)
        trained(scheduler, model, [optimizers[i] for i in order] if split else optimizers)
        masks.append(scheduler.masks.of)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("known", [0, 1])
def test_an_optimizer_that_is_not_given_is_an_error_with_the_names(known: int) -> None:
    model = network()
    layers = [[*model[0].parameters()], [*model[2].parameters(), *model[4].parameters()]]
    optimizers = [torch.optim.SGD(each, lr=0.1) for each in layers]
    names = ["'2.weight', '4.weight'", "'0.weight'"][known]
    with pytest.raises(ValueError, match=f"no optimizer that was given has {names}, which the recipe prunes"):
        Scheduler(Recipe.of({"prune": [{"start": 3, "amount": 0.8}]}), model, optimizers[known])
    Scheduler(Recipe.of({"prune": [{"start": 3, "amount": 0.8}]}), model, optimizers)


def test_frozen_layers_need_no_optimizer() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = Scheduler(Recipe.of({"prune": [{"start": 1, "amount": 0.8}]}), model, optimizer)
    assert trained(scheduler, model, [optimizer]) == [0] * 8
    assert scheduler.reach.left_out == {"0.weight": "frozen"}


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer or a list of them, got Linear"):
        Scheduler(Recipe.of({}), network(), nn.Linear(2, 2))  # type: ignore[arg-type]


def test_what_something_else_moves_is_told_once_and_stays_0() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = Scheduler(Recipe.of({"prune": [{"start": 1, "amount": 0.8}]}), model, optimizer)
    told = []
    for step in range(6):
        loss_at(model, step).backward()
        optimizer.step()
        with torch.no_grad():
            model[2].weight.add_(0.1)
        if step:
            assert scheduler.masks.sparsity < 0.5  # it counts what is 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        told += [text for each in caught if "moved them" in (text := str(each.message))]
        assert moved(scheduler) == 0
        assert scheduler.masks.sparsity == pytest.approx(0.8 if scheduler.masks.of else 0.0, abs=1e-3)
    assert len(told) == 1
    assert "pruned weights of '2.weight' were not 0" in told[0]


def test_steps_in_the_backward_see_masked_gradients() -> None:
    """Whose hooks are there before the scheduler's."""
    model = network()
    optimizers = {p: torch.optim.AdamW([p], lr=0.01) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for recipe in ("taylor", "regrow"):
        made = Recipe.of({"prune": [RECIPES[recipe]]})
        scheduler = Scheduler(made, model, list(optimizers.values()))
        for number in range(8):
            loss_at(model, number).backward()
            assert moved(scheduler) == 0
            scheduler.step()
        assert scheduler.masks.sparsity == pytest.approx(RECIPES[recipe]["amount"], abs=1e-3)
        scheduler.close()


class Lookahead(torch.optim.Optimizer):
    """A wrapper of a user's: it interpolates with slow weights behind the inner step (arXiv:1907.08610)."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.clone())
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


def accelerated(model: nn.Module) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters(), lr=0.01))


def scheduled(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return optimizer


@pytest.mark.parametrize(
    "wrap",
    [
        accelerated,
        scheduled,
        lambda model: Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
    ],
)
def test_wrapped_optimizers(wrap: Callable[[nn.Module], Any]) -> None:
    model = network()
    optimizer = wrap(model)
    scheduler = Scheduler(Recipe.of({"prune": [{"start": 2, "amount": 0.8}]}), model, optimizer)
    assert trained(scheduler, model, [optimizer]) == [0] * 8


@pytest.mark.parametrize("late", [False, True])
def test_other_hooks_of_a_step_see_what_is_pruned_as_0(late: bool) -> None:
    """A moving average of the weights, hooked behind the step of an optimizer that mixes them; noise, ahead of it."""
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 10, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
    seen: list[int] = []

    def noise(*_: Any) -> None:
        for p in model.parameters():
            assert p.grad is not None
            p.grad.add_(torch.randn_like(p))

    def hook() -> None:
        optimizer.register_step_pre_hook(noise)
        optimizer.register_step_post_hook(lambda *_: seen.append(moved(scheduler)))

    if not late:
        hook()
    scheduler = Scheduler(Recipe.of({"prune": [{"start": 2, "amount": 0.8}]}), model, optimizer)
    if late:
        hook()
    trained(scheduler, model, [optimizer])
    assert seen == [0] * 8
    for name, mask in scheduler.masks.of.items():
        buffer = optimizer.state[model.get_parameter(name)]["momentum_buffer"]
        assert not bool(buffer[~mask].any())


def of_zero(kind: str) -> list[int]:
    model = network()
    if kind == "zero":
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    else:
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        averager = PeriodicModelAverager(period=100, warmup_steps=0)
        optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), averager)
    wrapped = DistributedDataParallel(model)
    session = commpress.attach(wrapped, "none")
    recipe = Recipe.of({"prune": [{"start": 2, "amount": 0.8, "criterion": "taylor", "every": 2}]})
    return trained(Scheduler(recipe, model, optimizer, session=session), wrapped, [optimizer], 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero", "local sgd"])
def test_optimizers_of_torch_distributed(kind: str) -> None:
    assert run(2, of_zero, kind) == [[0] * 5] * 2


@pytest.mark.slow
def test_lightning_steps_by_closures() -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.wrong = network(), 0

        def training_step(self, xy: Any, index: int) -> Tensor:
            return cross_entropy(self.net(xy[0]), xy[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

        def on_fit_start(self) -> None:
            recipe = Recipe.of({"prune": [RECIPES["wanda"]]})
            self.scheduler = Scheduler(recipe, self.net, self.optimizers())  # type: ignore[arg-type]

        def optimizer_step(self, *args: Any, **named: Any) -> None:
            super().optimizer_step(*args, **named)
            self.wrong += moved(self.scheduler)
            self.scheduler.step()

    module = Module()
    data = torch.utils.data.TensorDataset(*batch(0, 0, 64))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(max_steps=6, accelerator="cpu", gradient_clip_val=1.0, **off)  # type: ignore[arg-type]
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    assert module.wrong == 0
    assert module.scheduler.masks.sparsity == pytest.approx(0.8, abs=1e-3)


# clipping


def torch_pruned(masks: dict[str, Tensor]) -> nn.Module:
    model = network()
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask)
    return model


@pytest.mark.parametrize("parts", [1, 3])
def test_a_clipped_norm_is_that_of_torchs_pruning(parts: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = Scheduler(Recipe.of({"prune": [{"start": 0, "amount": 0.9, "scope": "local"}]}), model, optimizer)
    reference = torch_pruned(scheduler.masks.of)
    for each in (model, reference):
        for part in range(parts):
            loss_at(each, part).backward()
    assert float(clip_grad_norm_(model.parameters(), 1e9)) == float(clip_grad_norm_(reference.parameters(), 1e9))
    clip_grad_value_(model.parameters(), 1e-3)
    assert all(not bool(model.get_parameter(name).grad[~mask].any()) for name, mask in scheduler.masks.of.items())


def test_a_norm_that_a_closure_clips_counts_what_is_kept() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = Scheduler(Recipe.of({"prune": [{"start": 0, "amount": 0.9}]}), model, optimizer)
    reference = torch_pruned(scheduler.masks.of)
    loss_at(reference, 0).backward()
    norms = []

    def closure() -> Tensor:
        loss = loss_at(model, 0)
        loss.backward()
        norms.append(float(clip_grad_norm_(model.parameters(), 1e9)))
        return loss

    optimizer.step(closure)
    assert norms == [float(clip_grad_norm_(reference.parameters(), 1e9))]


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_changes_no_weight_and_stops_no_regrowth(fused: bool) -> None:
    """A GradScaler skips a step that regrowth was to look at."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scheduler = Scheduler(Recipe.of({"prune": [REGROW]}), model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    masks = []
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_at(model, step) * (float("inf") if step == 4 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert moved(scheduler) == 0
        scheduler.step()
        masks.append(
            torch.cat([mask.flatten() for mask in scheduler.masks.of.values()]) if scheduler.masks.of else None
        )
    changed = [int((a != b).sum()) for a, b in zip(masks[1:], masks[:-1], strict=True)]  # type: ignore[operator]
    assert changed[1] > 0 == changed[3]
    assert changed[5] > 0


def looks(parts: int, buckets: bool) -> list[Any]:
    """Norms and regrown masks under DDP, against the gradients of a copy, over the parts of a step."""
    made = network()
    wrapped = DistributedDataParallel(made, gradient_as_bucket_view=buckets)
    session = commpress.attach(wrapped, "none")
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    recipe = Recipe.of({"prune": [{**REGROW, "scope": "local"}]})
    scheduler = Scheduler(recipe, made, optimizer, session=session)
    wrong: list[Any] = []
    for step in range(8):
        masks = {name: mask.clone() for name, mask in scheduler.masks.of.items()}
        dense = copy.deepcopy(made)
        for part in range(parts):
            loss_at(dense, step * parts + part).backward()
            with wrapped.no_sync() if part < parts - 1 else contextlib.nullcontext():
                loss_at(wrapped, step * parts + part).backward()
        for p in dense.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        means = {name: p.grad.clone() for name, p in dense.named_parameters()}
        kept = Masks(dict(dense.named_parameters()))
        kept.replace(masks)
        kept.apply_to_gradients()
        expected, got = (clip_grad_norm_(m.parameters(), 1e9) for m in (dense, made))
        if not torch.allclose(expected, got, rtol=1e-5):
            wrong.append((step, float(expected), float(got)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step in (2, 4, 6):
            for name, mask in scheduler.masks.of.items():
                size, came = means[name].abs(), mask & ~masks[name]
                if not bool(came.any()) or size[came].min() < size[~masks[name] & ~came].max() * (1 - 1e-5):
                    wrong.append((step, name))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("buckets", [False, True])
def test_a_step_that_looks_at_all_gradients_clips_those_of_what_is_kept(parts: int, buckets: bool) -> None:
    assert run(2, looks, parts, buckets) == [[], []]


# copies


def test_a_model_that_is_pruned_pickles_and_copies() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = {"prune": [{"start": 3, "amount": 0.5, "criterion": "wanda", "every": 3}]}
    scheduler = Scheduler(Recipe.of(recipe), model, optimizer)
    loss_at(model, 0).backward()
    state = copy.deepcopy(scheduler.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_at(copied, 1).backward()
        assert same(parameters_of(copied), parameters_of(model))
    for name, of in scheduler.state_dict()["criteria"][0].items():
        assert torch.equal(of["squares"], state["criteria"][0][name]["squares"])  # copies add nothing


def test_gradients_of_a_sparse_embedding() -> None:
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
    recipe = {"prune": [{"start": 1, "end": 5, "every": 2, "amount": 0.5, "criterion": "taylor", "parameters": ["*"]}]}
    scheduler = Scheduler(Recipe.of(recipe), model, optimizer)
    for _ in range(7):
        optimizer.zero_grad()
        (model(torch.randint(0, 20, (50,))) - 1).square().sum().backward()
        optimizer.step()
        assert moved(scheduler) == 0
        scheduler.step()
    assert scheduler.masks.sparsity == 0.5


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "movement", "wanda"])
def test_complex_weights(criterion: str) -> None:
    model = nn.Sequential(nn.Linear(32, 8, dtype=torch.complex64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    recipe = {"prune": [{"start": 1, "amount": 0.5, "criterion": criterion}]}
    scheduler = Scheduler(Recipe.of(recipe), model, optimizer)
    w = model[0].weight.detach().clone()
    x = batch(0, 0)[0].to(torch.complex64) * (1 + 1j)
    model(x).abs().square().mean().backward()
    g = model[0].weight.grad.clone()
    optimizer.step()
    scheduler.step()
    after = model[0].weight.detach().abs() + 0
    product = (g.conj() * w).real
    scores = {"taylor": product.abs(), "movement": -product}
    mask = scheduler.masks.of["0.weight"]
    if criterion in scores:
        assert float(scores[criterion][mask].min()) >= float(scores[criterion][~mask].max())
    assert not bool(after[~mask].any())
    assert scheduler.masks.sparsity == 0.5


def test_a_share_of_no_weight_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    recipe = Recipe.of({"prune": [{"start": 0, "amount": 0.1, "scope": "row"}]})
    with pytest.raises(RecipeError, match=r"prune\[0\]\.amount: 0\.1 of 4 weights rounds to none"):
        Scheduler(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1))
