"""Recipes that prune at ZeRO 1 to 3: pruned weights are 0 in the module, in what is stepped and in the optimizer's state."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import RANKS, engine, same_on_all_ranks, weights
from ranks import outcome, run
from torch import Tensor, nn
from training import batch, same

import commpress
from commpress.model import Average, Recipe, Scheduler
from commpress.optim import OneBitAdamW

LIBRARIES = ("engines",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

STEPS = 9
CUBIC = {"start": 2, "end": 6, "every": 2, "amount": 0.8}
NAMES = ["0.weight", "2.weight", "4.weight"]


class Run:
    """An engine under a recipe."""

    def __init__(
        self, stage: int, prune: dict[str, Any], spec: str = "none", parameters: str = "none", **settings: Any
    ):
        self.engine = engine(stage, **settings)
        given = None if stage == 0 or parameters == "none" else parameters
        self.session = commpress.attach(self.engine, spec, parameters=given)
        recipe = Recipe.of({"prune": [prune]})
        optimizer = self.engine.basic_optimizer
        self.scheduler = Scheduler(recipe, self.engine.module, optimizer, session=self.session)
        self.losses: list[float] = []

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            done, last = self.scheduler.done, self.engine.gradient_accumulation_steps()
            for part in range(last):
                x, y = batch(done * last + part, dist.get_rank())
                x = x.bfloat16() if self.engine.bfloat16_enabled() else x
                output = self.engine(x)
                loss = self.scheduler.loss(nn.functional.cross_entropy(output.float(), y), output, x)
                self.engine.backward(loss)
                self.engine.step()
            self.scheduler.step()
            self.losses.append(float(loss.detach()))
        return self

    def stepped(self) -> list[tuple[str, slice, Tensor, list[Tensor]]]:
        """This rank's parts, by DeepSpeed's own account: name, which values, these, and what the optimizer remembers."""
        zero, rank, found = self.engine.optimizer, dist.get_rank(), []
        for name, p in self.engine.module.named_parameters():
            if hasattr(p, "ds_id"):
                group, at, n = zero.grad_position[p.ds_id]
                flat, begins = zero.fp32_partitioned_groups_flat[group], rank * n
                values = slice(min(begins, p.ds_numel), min(begins + n, p.ds_numel))
            else:
                group = next(i for i, ps in enumerate(zero.round_robin_bit16_groups) if any(p is q for q in ps))
                first = next(i for i, q in enumerate(zero.round_robin_bit16_groups[group]) if p is q)
                flat, begins = zero.single_partition_of_fp32_groups[group], zero.round_robin_bit16_offsets[group][first]
                start, stop = rank * flat.numel() - begins, (rank + 1) * flat.numel() - begins
                values = slice(max(0, min(start, p.numel())), max(0, min(stop, p.numel())))
                at = begins + values.start - rank * flat.numel()
            if values.start == values.stop:
                continue
            own = slice(at, at + values.stop - values.start)
            state = [x[own] for x in zero.optimizer.state[flat].values() if x.shape == flat.shape]
            assert state
            found.append((name, values, flat.detach()[own], state))
        return found


def survivors(made: Run) -> list[str]:
    """Where a pruned weight is not 0; collective."""
    masks, wrong = made.scheduler.masks.of, []
    for (name, _), p in zip(made.engine.module.named_parameters(), weights(made.engine), strict=True):
        if name in masks and bool(p[~masks[name]].any()):
            wrong.append(f"{name} in the module")
    for name, values, part, remembered in made.stepped():
        if name in masks:
            pruned = ~masks[name].view(-1)[values]
            wrong += [f"{name} in a part" for x in (part, *remembered) if bool(x[pruned].any())]
    return wrong


def beside_zero_0(stage: int, ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train by each way at this stage, and by the same at ZeRO 0."""
    found = []
    for way in ways:
        prune, settings = way["prune"], {key: value for key, value in way.items() if key != "prune"}
        made = Run(stage, prune, **settings).train(STEPS)
        whole = weights(made.engine)
        found.append(
            {
                "survivors": survivors(made),
                "same": same_on_all_ranks([*made.scheduler.masks.of.values(), *whole]),
                "sparsity": made.scheduler.masks.sparsity,
                "masks": made.scheduler.masks.of,
                "weights": whole,
                "losses": made.losses,
            }
        )
        if not settings.get("bf16"):
            other = Run(0, prune, **{**settings, "zero": None}).train(STEPS)
            found[-1] |= {"masks at 0": other.scheduler.masks.of, "weights at 0": weights(other.engine)}
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_pruned_is_0_everywhere_and_stays_so_and_all_is_as_at_zero_0(stage: int) -> None:
    ways = [{"prune": CUBIC}, {"prune": CUBIC, "spec": "int4", "parameters": "int4"}]
    for ranks in run(RANKS, beside_zero_0, stage, ways):
        exact, coded = ranks
        for found in ranks:
            assert found["survivors"] == []
            assert found["same"]
            assert found["sparsity"] == pytest.approx(0.8, abs=1e-3)
        assert all(torch.equal(mask, exact["masks at 0"][name]) for name, mask in exact["masks"].items())
        for one, other in zip(exact["weights"], exact["weights at 0"], strict=True):
            assert torch.allclose(one, other, atol=1e-6)
        assert coded["losses"][-1] < coded["losses"][0]


REGROW = {"start": 2, "end": 8, "every": 2, "amount": 0.7, "schedule": "regrow", "scope": "local"}


def momentum(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def in_groups(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    matrices, vectors = [], []
    for p in parameters:
        (matrices if p.dim() > 1 else vectors).append(p)
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.01)


SMALL = {"reduce_bucket_size": 3000, "sub_group_size": 3000}
EXACT: dict[str, dict[str, Any]] = {
    "threshold": {"prune": {"start": 3, "threshold": 0.05}},
    "2:4": {"prune": {"start": 3, "pattern": "2:4", "parameters": ["0.weight", "2.weight"]}},
    "rows by wanda": {"prune": {**CUBIC, "scope": "row", "criterion": "wanda"}},
    "taylor": {"prune": {**CUBIC, "scope": "local", "criterion": "taylor"}},
    "movement": {"prune": {**CUBIC, "criterion": "movement"}, "zero": SMALL},
    "regrow": {"prune": REGROW},
    "regrow, accumulated, in small buckets": {"prune": REGROW, "zero": SMALL, "gradient_accumulation_steps": 2},
    "regrow, coded": {"prune": REGROW, "spec": "int4", "parameters": "int8"},
    "accumulated": {"prune": CUBIC, "gradient_accumulation_steps": 2},
    "clipped": {"prune": CUBIC, "gradient_clipping": 0.1},
    "momentum": {"prune": CUBIC, "optimizer": momentum},
    "biases, in groups": {
        "prune": {**CUBIC, "parameters": ["*"], "scope": "local", "criterion": "taylor"},
        "optimizer": in_groups,
    },
    "overlapped": {"prune": CUBIC, "zero": {**SMALL, "overlap_comm": True}},
    "not scattered": {"prune": CUBIC, "zero": {"reduce_scatter": False}},
    "apart": {"prune": CUBIC, "spec": "int8", "zero": {**SMALL, "contiguous_gradients": False}},
    "aligned": {"prune": CUBIC, "spec": "int4", "zero": {"parameter_alignment": True}},
    "round robin": {"prune": CUBIC, "spec": "sign", "zero": {"round_robin_gradients": True}},
    "small are kept": {"prune": CUBIC, "zero": {"stage3_param_persistence_threshold": 100_000}},
    "bf16": {"prune": CUBIC, "spec": "int4", "parameters": "int8", "bf16": {"enabled": True}},
    "bf16 by taylor": {"prune": {**CUBIC, "criterion": "taylor"}, "bf16": {"enabled": True}},
    "bf16 into float32": {
        "prune": {**REGROW, "criterion": "movement"},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
"""Engines and entries; where nothing is coded, and not in bf16, weights are compared with those at ZeRO 0."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_entries_work_however_the_engine_is_set_up(stage: int) -> None:
    ways = {name: way for name, way in EXACT.items() if stage > 1 or "bf16 into" not in name}
    for ranks in run(RANKS, beside_zero_0, stage, [*ways.values()], timeout=240):
        for (name, way), found in zip(ways.items(), ranks, strict=True):
            assert found["survivors"] == [], name
            assert found["same"], name
            assert found["sparsity"] > 0.05, name
            if "bf16" not in way and way.get("spec", "none") == "none":
                for one, other in zip(found["weights"], found["weights at 0"], strict=True):
                    assert torch.allclose(one, other, atol=1e-4), (name, float((one - other).abs().max()))


def one_bit(parameters: Iterable[Tensor]) -> OneBitAdamW:
    return OneBitAdamW(parameters, lr=0.01, warmup_steps=3)


def behind_one_bit(stage: int) -> list[Any]:
    """What is left in the module, and whether the masks are those of ZeRO 0."""
    made, other = (Run(at, CUBIC, "sign", optimizer=one_bit).train(STEPS) for at in (stage, 0))
    masks = made.scheduler.masks
    return [masks.moved(), masks.sparsity, same(weights(made.engine), weights(other.engine))]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_compressed_optimizer_that_is_not_sharded_prunes_as_at_zero_0(stage: int) -> None:
    for moved, sparsity, alike in run(RANKS, behind_one_bit, stage):
        assert moved == {}
        assert sparsity == pytest.approx(0.8, abs=1e-3)
        assert alike


def refused() -> list[str]:
    """What is said of masks where a sharded momentum is sent, and of an optimizer that is not the engine's."""
    coded = engine(2, optimizer=one_bit)
    session = commpress.attach(coded, "sign", parameters="int4")
    recipe = Recipe.of({"prune": [CUBIC]})
    told = [outcome(lambda: Scheduler(recipe, coded.module, coded.basic_optimizer, session=session))]
    whole = engine(2)
    session, another = commpress.attach(whole, "int4"), torch.optim.SGD(whole.module.parameters(), lr=0.1)
    told.append(outcome(lambda: Scheduler(recipe, whole.module, another, session=session)))
    third = engine(3)
    scheduler = Scheduler(recipe, third.module, third.basic_optimizer, session=commpress.attach(third, "int4"))
    return [*told, outcome(lambda: Average(scheduler))]


def test_what_cannot_be_done_is_said_on_all_ranks() -> None:
    for coded, another, average in run(RANKS, refused):
        assert "Average: under ZeRO 3 no rank has the parameters between two steps" in average
        assert "masks: OneBitAdamW sends a momentum of all values where it is sharded" in coded
        assert "no optimizer that was given has '0.weight'" in another
