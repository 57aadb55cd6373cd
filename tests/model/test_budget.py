"""Budgets: the cheapest loss for each byte, held by the exported file, the same on all ranks and after a restart."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import same

import commpress
from commpress.model import Recipe, RecipeError, Scheduler, budget, export, prepare, sensitivity, stored
from commpress.model.budget import BudgetError, measured, shortfalls
from commpress.model.recipe import Budget
from commpress.model.sensitivity import Setting, Way

LIBRARIES = ("torchao.quantization",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")
WIDTH, CLASSES, STEPS = 32, 8, 12
DOCUMENT = Path(__file__).parents[2] / "docs" / "shrink.md"


class Tied(nn.Module):
    """An embedding whose table the head shares, and a layer between them that does nothing for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.between, self.useless = nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.zeros_(self.useless.bias)

    def forward(self, index: Tensor) -> Tensor:
        """int64 [batch, time] to [batch, time, 64]."""
        x = torch.tanh(self.between(self.tokens(index)))
        logits: Tensor = self.head(x + 0 * self.useless(x))
        return logits


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def batches(rank: int = 0, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7 + rank)
    return [
        (torch.randn(16, WIDTH, generator=generator), torch.randint(0, CLASSES, (16,), generator=generator))
        for _ in range(count)
    ]


def recipe(**limits: Any) -> Recipe:
    return Recipe.of({"budget": {"start": 2, "end": 6, "every": 2, "format": "safetensors", **limits}})


class Run:
    """A network under a budget, alone or by DDP on all ranks."""

    def __init__(self, of: Recipe, rank: int = 0) -> None:
        self.model, self.rank, self.session = network(), rank, None
        prepare(self.model, of)  # as a resumed one must be
        self.wrapped: nn.Module = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.wrapped = DistributedDataParallel(self.model)
            self.session = commpress.attach(self.wrapped, "none")
        self.scheduler = Scheduler(of, self.model, self.optimizer, session=self.session, held_out=batches(rank))

    def steps(self, count: int) -> None:
        for _ in range(count):
            x, y = batches(100 + 10 * self.scheduler.done + self.rank, 1)[0]
            nn.functional.cross_entropy(self.wrapped(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def bytes(self, tmp_path: Path) -> int:
        (file,) = export(self.model, tmp_path, formats=("safetensors",), example_inputs=(batches()[0][0],))
        return file.bytes


def test_a_budget_of_bytes_is_held_by_the_file_with_no_more_than_it_takes(tmp_path: Path) -> None:
    dense = Run(recipe(max_mb=1.0))
    dense.steps(STEPS)
    assert not dense.scheduler.recipe.prune  # the dense file fits
    assert not dense.scheduler.recipe.quantize
    whole = dense.bytes(tmp_path)
    sizes = []
    for share in (0.6, 0.2, 0.1):
        made = Run(recipe(max_mb=share * whole / 1e6))
        made.steps(STEPS)
        assert made.scheduler.recipe.budget is not None
        assert made.scheduler.recipe.budget.settled
        sizes.append(made.bytes(tmp_path))
        assert sizes[-1] <= share * whole
    assert sizes[0] > 0.3 * whole
    assert made.scheduler.masks.sparsity > 0.5
    assert {entry.bits for entry in made.scheduler.recipe.quantize} == {4}
    assert all(made.scheduler.phase.count(word) for word in ("pruned", "int4"))


def test_a_budget_that_cannot_be_met_says_which_and_how_near_it_came(tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"budget.max_mb: 0.001 MB cannot be met, the closest of model.safetensors is 0.0\d+ MB"
    ):
        Run(recipe(max_mb=0.001)).steps(STEPS)


def test_a_budget_of_loss_alone_goes_as_far_as_the_loss_is_expected_to_hold() -> None:
    entries = []
    for rise in (0.0, 0.02, 10.0):
        found = budget.settled(recipe(max_loss=rise), network(), batches())
        sizes = sorted(entry.amount for entry in found.prune)
        entries.append((sum(len(entry.parameters) for entry in found.prune), sizes, {e.bits for e in found.quantize}))
    assert entries[2] == (3, [0.9], {4})
    assert entries[0][0] <= entries[1][0] <= 3
    assert entries[0] != entries[2]


def test_what_matters_least_for_its_bytes_goes_first_and_shared_weights_are_one() -> None:
    torch.manual_seed(0)
    model = Tied()
    units = sensitivity.units_of(model)
    assert [(unit.parameter, unit.modules, unit.prunable) for unit in units] == [
        ("tokens.weight", ("tokens", "head"), False),
        ("between.weight", ("between",), True),
        ("useless.weight", ("useless",), True),
    ]
    index = torch.randint(0, 64, (4, 8))
    logits = model(index).detach().flatten(0, 1)
    said = logits.argmax(1).view(4, 8)  # so that any change of what counts costs something
    dense, rises = sensitivity.sensitivities(model, units, True, [((index,), said)], None, None)
    assert dense == pytest.approx(float(nn.functional.cross_entropy(logits, said.flatten())))
    assert all(rise == 0 for (i, _), rise in rises.items() if i == 2)
    assert rises[1, Setting(0.9)] > rises[1, Setting(0.5)] > 0
    path = sensitivity.greedy(units, rises, Way("safetensors", True, (8, 4)))
    assert path[1][0] == {2: Setting(0.9, 4, 32)}  # costs nothing, and saves the most of what costs nothing
    saved = [each[1] for each in path]
    assert saved == sorted(saved)
    assert len({tuple(sorted(each[0].items(), key=lambda item: item[0])) for each in path}) == len(path)
    assert dict(model.named_parameters())["between.weight"].count_nonzero() == 64 * 64  # it stays as it was


@pytest.mark.parametrize("setting", [Setting(), Setting(0.5), Setting(0.9, 8), Setting(0.0, 8), Setting(0.8, 4, 32)])
def test_bytes_of_a_setting_are_those_of_the_file(tmp_path: Path, setting: Setting) -> None:
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    units = sensitivity.units_of(model)
    made = budget.small(model, units, {0: setting}, Budget(max_mb=1.0, format="safetensors"), (torch.randn(2, 128),))
    from commpress.model.judgement.content import layer_bytes

    masks = {name: p != 0 for name, p in made.named_parameters()} if setting.amount else None
    stored.save(tmp_path / "model.safetensors", made, masks=masks)
    assert layer_bytes(tmp_path / "model.safetensors") == {"0": units[0].bytes(setting, "safetensors")}


@pytest.mark.parametrize(
    "setting", [Setting(0.5, 8), slow(Setting(0.7)), slow(Setting(0.0, 8)), slow(Setting(0.9, 4, 32))]
)
def test_bytes_of_a_setting_are_those_of_the_onnx_file(tmp_path: Path, setting: Setting) -> None:
    pytest.importorskip("onnxruntime")
    model, inputs = nn.Sequential(nn.Linear(256, 512), nn.ReLU()), (torch.randn(2, 256),)
    units, limits = sensitivity.units_of(model), Budget(max_mb=1.0)
    files = [budget.measured(model, units, choice, limits, inputs).bytes for choice in ({}, {0: setting})]
    saved = units[0].bytes(Setting(), "onnx") - units[0].bytes(setting, "onnx")
    assert files[0] - files[1] == pytest.approx(saved, rel=0.03)


@pytest.mark.slow
def test_zeros_count_in_onnx_for_megabytes_and_not_for_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    def found(**limits: Any) -> Recipe:
        return budget.settled(recipe(format="onnx", **limits), network(), batches())

    def timed(*given: Any) -> budget.Measured:
        bits = {setting.bits for setting in given[2].values()}
        return budget.Measured(measured(*given).bytes, 1.0 if bits == {8} and len(given[2]) == 3 else 2.0)

    dense = measured(network(), sensitivity.units_of(network()), {}, Budget(max_mb=1.0), batches()[0][0:1]).bytes / 1e6
    small = found(max_mb=0.15 * dense)  # less than int8 alone
    assert small.prune
    assert {entry.bits for entry in small.quantize} <= {8, 4}
    monkeypatch.setattr(budget, "measured", timed)
    fast = found(max_ms=1.0)
    assert not fast.prune
    assert {entry.bits for entry in fast.quantize} == {8}
    both = found(max_ms=1.0, max_mb=0.25 * dense)
    assert both.prune
    assert {entry.bits for entry in both.quantize} == {8}


def test_in_executorch_matrices_have_inputs_by_token_and_all_else_weights_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 8))
    held_out = [(torch.randn(16, 4, 8, 8), torch.randint(0, 8, (16,)))]
    found = budget.settled(recipe(format="executorch", max_loss=10.0), model, held_out)
    assert not found.prune
    assert [(e.layers, e.bits, e.group, e.activations) for e in found.quantize] == [
        (("0",), 8, None, None),
        (("2", "4"), 4, 32, "dynamic"),
    ]


@pytest.mark.slow
def test_a_budget_of_executorch_is_held_by_its_file_in_its_runtime(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    from commpress.model import judge

    dense = network()
    made = Run(recipe(format="executorch", max_mb=0.04, max_ms=20.0))
    made.steps(STEPS)
    assert {entry.activations for entry in made.scheduler.recipe.quantize} == {"dynamic"}
    judgement = judge(dense, made.model, batches(), runtimes=("executorch",), folder=tmp_path)
    assert made.scheduler.recipe.budget is not None
    assert not shortfalls(made.scheduler.recipe.budget, judgement.record)
    assert (
        (tmp_path / "small" / "model.pte").stat().st_size <= 40_000 < (tmp_path / "dense" / "model.pte").stat().st_size
    )


def test_convolutions_are_rounded_and_modules_of_several_weights_are_left_alone(tmp_path: Path) -> None:
    from commpress.model.judgement.content import layer_bytes

    model = nn.ModuleDict({"conv": nn.Conv2d(8, 16, 3, bias=False), "lstm": nn.LSTM(8, 8), "flat": nn.Linear(8, 8)})
    units = sensitivity.units_of(model)
    assert [(unit.parameter, unit.bits) for unit in units] == [
        ("conv.weight", ((8, None),)),  # rows of 72 weights have no groups of 32
        ("flat.weight", ((8, None),)),
    ]
    alone = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False))
    (conv,), setting = sensitivity.units_of(alone), Setting(0.0, 8)
    made = budget.small(
        alone, [conv], {0: setting}, Budget(max_mb=1.0, format="safetensors"), (torch.randn(2, 8, 8, 8),)
    )
    stored.save(tmp_path / "model.safetensors", made)
    assert layer_bytes(tmp_path / "model.safetensors") == {"0": conv.bytes(setting, "safetensors")}


def on_a_rank() -> tuple[dict[str, Any], list[Tensor]]:
    made = Run(recipe(max_mb=0.02), dist.get_rank())
    made.steps(STEPS)
    return made.scheduler.recipe.to_dict(), [p.detach() for p in made.model.parameters()]


def test_all_ranks_choose_the_same_of_different_batches() -> None:
    (first, weights), (second, others) = run(2, on_a_rank)
    assert first == second
    assert first["prune"]
    assert same(weights, others)


def test_sensitivities_are_means_over_the_ranks_batches() -> None:
    found = run(2, measured_on_a_rank)
    alone = sensitivity.sensitivities(
        network(),
        sensitivity.units_of(network()),
        True,
        [((x,), y) for rank in (0, 1) for x, y in batches(rank)],
        None,
        None,
    )
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(alone[0], rel=1e-6)
    assert list(found[0][1].values()) == pytest.approx(list(alone[1].values()), abs=1e-6)


def measured_on_a_rank() -> tuple[float, dict[tuple[int, Setting], float]]:
    model, own = network(), [((x,), y) for x, y in batches(dist.get_rank())]
    return sensitivity.sensitivities(model, sensitivity.units_of(model), True, own, None, None)


@pytest.mark.parametrize("broken", [1, 4, 8], ids=["before", "pruning", "rounding"])
def test_a_run_goes_on_bit_for_bit(broken: int) -> None:
    whole = Run(recipe(max_mb=0.02))
    whole.steps(STEPS)
    part = Run(recipe(max_mb=0.02))
    part.steps(broken)
    state = copy.deepcopy([part.model.state_dict(), part.optimizer.state_dict(), part.scheduler.state_dict()])
    for again in (recipe(max_mb=0.02), Recipe.of(state[2]["recipe"])):
        rest, own = Run(again), copy.deepcopy(state)
        rest.model.load_state_dict(own[0])
        rest.optimizer.load_state_dict(own[1])
        rest.scheduler.load_state_dict(own[2])
        rest.steps(STEPS - broken)
        assert rest.scheduler.recipe == whole.scheduler.recipe
        assert same([*rest.model.parameters()], [*whole.model.parameters()])


def test_another_budget_does_not_go_on_from_what_one_has_chosen() -> None:
    part = Run(recipe(max_mb=0.02))
    part.steps(4)
    with pytest.raises(ValueError, match=r"cannot restore: by step 4 prune\[0\] has begun"):
        Run(recipe(max_mb=0.03)).scheduler.load_state_dict(part.scheduler.state_dict())


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"budget": {}}, "budget: expected some of max_mb, max_ms, max_loss, got none"),
        ({"budget": {"max_mb": 0.0}}, "budget.max_mb: expected greater than 0, got 0.0"),
        ({"budget": {"max_loss": "1%"}}, "budget.max_loss: expected a number, got '1%': write a share, 0.8 for 80%"),
        ({"budget": {"max_mb": 1.0, "end": 3, "start": 4}}, "budget.end: expected at least start, 4, got 3"),
        ({"budget": {"max_mb": 1.0, "every": 3}, "quantize": [{}]}, "budget.every: is of what a budget chooses"),
        ({"budget": {"max_los": 1.0}}, "budget.max_los: unknown key, did you mean 'max_loss'?"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(found: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.of(found)
    assert told in str(error.value)


def test_a_budget_needs_batches_and_a_run_that_is_long_enough() -> None:
    model = network()
    with pytest.raises(TypeError, match="expected held_out="):
        Scheduler(recipe(max_mb=1.0), model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RecipeError, match=r"budget.end: 6, but the run has 6 steps"):
        recipe(max_mb=1.0).require_within(6)


def test_each_limit_that_the_file_misses_is_told_with_its_value() -> None:
    side = {"file": "model.onnx", "bytes": 6_000_000, "speeds": [{"threads": 1, "median": 0.02}]}
    row = {"runtime": "onnxruntime", "small": side, "quality": {"dense_loss": 2.0, "small_loss": 2.1}}
    found = shortfalls(Budget(max_mb=5.0, max_ms=14.0, max_loss=0.01), {"rows": [row]})
    assert found == [
        "max_mb 5: model.onnx has 6.000 MB",
        "max_ms 14: a call takes 20 ms in onnxruntime on one thread",
        "max_loss 0.01: the loss of model.onnx is 2.1000, 5.00% above the dense model's 2.0000",
    ]
    assert not shortfalls(Budget(max_mb=6.0, max_ms=20.0, max_loss=0.05 + 1e-9), {"rows": [row]})


@pytest.mark.slow
def test_the_documents_block_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text("[budget]\nmax_mb = 0.06\nmax_loss = 0.0\nend = 2\n")
    (block,) = re.findall(
        r"test: by=tests/model/test_budget.py -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
    )
    model = network()
    names: dict[str, Any] = {"model": model, "dense": copy.deepcopy(model), "held_out": batches()}
    names |= {"optimizer": torch.optim.AdamW(model.parameters(), lr=1.0), "train": train_badly}
    exec(compile(block, "<block>", "exec"), names)
    assert capsys.readouterr().out.startswith("max_loss 0: the loss of model.onnx is ")
    assert (tmp_path / "out" / "small" / "model.onnx").stat().st_size <= 60_000


def train_badly(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Scheduler) -> None:
    for step in range(4):
        x, y = batches(step, 1)[0]
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def failing_on_the_first() -> str:
    model = network()
    files = budget._Files(model, sensitivity.units_of(model), Budget(max_mb=1.0), (torch.zeros(3, 5),), None)
    return outcome(lambda: files.measured({}))


def test_what_the_first_rank_cannot_measure_ends_all_of_them() -> None:
    for said in run(2, failing_on_the_first):
        assert "BudgetError" in said
        assert "model.onnx cannot be measured" in said
