"""Gathered parameters by what has changed, `delta|int4`: one version on all ranks, which follows the owners' values closely."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import outcome, run
from test_fsdp import ON_FOUR, VARIANTS, digest, sharded, shards_of, trained_as
from tiers import slow, slowly
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from training import WIDTH, Trained, finite, loss_of, network, same, sgd

import commpress
from commpress.comm import collectives
from commpress.comm.exchange import Transfer
from commpress.comm.exchange.all_gather_changes import all_gather_changes
from commpress.hooks.fsdp.comms import AGAIN

SPEC = "delta|int4"
LAYERS = (0, 2, 4)
Way = Callable[[int, bool], dict[str, Any]]


def watched(parameters: str = SPEC, seed: int = 0, **settings: Any) -> tuple[Any, Any, list[tuple[str, list[Tensor]]]]:
    """A network of layers that FSDP gathers one by one, its session, and what each pass will compute with: (pass, tensors)."""
    model = sharded(nn.Sequential(*(nn.Sequential(part) for part in network(seed))), **settings)
    session = commpress.attach(model, gradients="none", parameters=parameters)
    seen: list[tuple[str, list[Tensor]]] = []

    def note(phase: str) -> Callable[..., None]:
        return lambda module, *_: seen.append((phase, [p.detach().clone() for p in module.parameters()]))

    for place in LAYERS:
        model[place][0].register_forward_pre_hook(note("forward"))
        model[place][0].register_full_backward_pre_hook(note("backward"))
    return model, session, seen


def own_part(x: Tensor) -> Tensor:
    """This rank's rows of a gathered tensor."""
    parts = x.chunk(dist.get_world_size())
    return parts[dist.get_rank()] if dist.get_rank() < len(parts) else x[:0]


def unseen_changes(*arguments: Any) -> Iterator[Transfer]:
    """Gather changes by a collective, whatever carries the rest."""
    *given, wire, told, label = arguments
    wire = copy.copy(wire)
    wire.by_message = False
    return all_gather_changes(*given, wire, told, label)


def followed(steps: int, evaluates: bool) -> dict[str, Any]:
    """A training: hashes of all that was computed with, and how far the versions were from this rank's shards."""
    model, _, seen = watched()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    hashes, excess, far, alike = [], [], [], True
    before: list[list[Tensor]] = []
    for step in range(steps):
        shards = shards_of(model)
        if evaluates:
            with torch.no_grad():
                for other in range(3):
                    loss_of(model, 100 + other)
        seen.clear()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        passes = {phase: [of for which, of in seen if which == phase] for phase in ("forward", "backward")}
        passes["backward"].reverse()
        alike &= all(same(*pair) for pair in zip(passes["forward"], passes["backward"], strict=True))
        hashes.append([digest(x) for of in passes["forward"] for x in of])
        for layer, of in enumerate(passes["forward"]):
            x = torch.cat([part.flatten() for part in shards[2 * layer : 2 * layer + 2]])
            now = torch.cat([own_part(part).flatten() for part in of])
            last = torch.cat([own_part(part).flatten() for part in before[layer]]) if before else x
            # half a step of int4 for the largest change, and bfloat16's rounding
            bound = (x - last).abs().max() / 14 + x.abs() * 2**-8
            excess.append(float(((x - now).abs() - bound).max()))
            far.append(float((x - now).norm() / x.norm()))
        before = passes["forward"]
        optimizer.step()
    return {"hashes": hashes, "alike": alike, "excess": excess, "far": far, "shards": shards_of(model)}


def followed_unseen(steps: int, evaluates: bool) -> dict[str, Any]:
    """The same by gathers of which the host sees no value, as on an accelerator."""
    with mock.patch.object(collectives, "all_gather_changes", unseen_changes):
        return followed(steps, evaluates)


@pytest.mark.parametrize("way", [followed, slow(followed_unseen)])
@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_all_ranks_have_one_version_and_it_does_not_drift(world_size: int, way: Way) -> None:
    ranks = run(world_size, way, 40, False)
    for got in ranks:
        assert got["hashes"] == ranks[0]["hashes"]
        assert got["alike"]  # forward and backward
        assert max(got["excess"]) < 1e-6
        assert max(got["far"]) < 0.01  # int4 of the values themselves: 0.1


@pytest.mark.parametrize("way", [followed, followed_unseen])
def test_an_evaluation_changes_no_bit_of_the_training(way: Way) -> None:
    for alone, evaluated in zip(run(2, way, 4, False), run(2, way, 4, True), strict=True):
        assert alone["hashes"] == evaluated["hashes"]
        assert same(alone["shards"], evaluated["shards"])


def counted() -> dict[str, Any]:
    """The report of three steps of two backwards each, and of an evaluation; values of a unit's shard."""
    model, session, _ = watched()
    optimizer = sgd(model)
    for step in range(3):
        for part in range(2):
            model.set_requires_gradient_sync(part == 1)
            loss_of(model, 2 * step + part).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss_of(model, 0)
    sizes = [sum(p.numel() for p in model[place].parameters()) // dist.get_world_size() for place in LAYERS]
    return {"report": session.report().to_dict(), "sizes": sizes}


def test_what_was_not_stepped_is_not_sent_again() -> None:
    for got in run(2, counted):
        report = got["report"]
        assert report["spec"] == "gradients none, parameters delta|int4"
        rows = [row for row in report["rows"] if row["role"] == "parameters"]
        assert [row["exchange"] for row in rows] == ["all_gather_changes"] * 3
        for row, m in zip(rows, got["sizes"], strict=True):
            assert row["steps"] == 3 * 4 + 1  # two forwards and two backwards a step
            assert row["dense_bytes"] == 13 * 4 * m
            assert row["sent_bytes"] == 13 + 2 * m + 3 * commpress.parse("int4").nbytes(m)


def loaded(how: str) -> dict[str, Any]:
    """What is computed with before and behind the arrival of other values; what this rank's shards are then."""
    model, _, seen = watched()
    optimizer = sgd(model)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
    other = shards_of(sharded(nn.Sequential(*(nn.Sequential(part) for part in network(9)))))
    me = dist.get_rank()
    with torch.no_grad():
        for p, values in zip(model.parameters(), other, strict=True):
            if how == "all" or (how == "one rank" and me == 1):
                p.to_local().copy_(values)
        if how == "not finite" and me == 1:
            list(model.parameters())[2].to_local()[0, 0] = torch.nan
    seen.clear()
    loss_of(model, 5).backward()
    then = [of for phase, of in seen if phase == "forward"]
    after = shards_of(model)
    if how == "not finite":
        with torch.no_grad():
            if me == 1:
                list(model.parameters())[2].to_local()[0, 0] = 0.5
        seen.clear()
        loss_of(model, 6)
    return {
        "hashes": [digest(x) for of in then for x in of],
        "rounded": [torch.equal(own_part(x), mine.bfloat16().float())
                    for x, mine in zip([x for of in then for x in of], after, strict=True)],
        "nan": [int(x.isnan().sum()) for of in then for x in of],
        "mended": [float((own_part(x) - mine).abs().max())
                   for x, mine in zip([x for _, of in seen for x in of], shards_of(model), strict=False)],
    }  # fmt: skip


@pytest.mark.parametrize("how", ["all", "one rank"])
def test_weights_that_were_loaded_are_noticed(how: str) -> None:
    ranks = run(2, loaded, how)
    assert ranks[0]["hashes"] == ranks[1]["hashes"]
    for got in ranks:
        assert all(got["rounded"])  # no difference of theirs was coded


def test_what_is_not_finite_is_there_on_all_ranks_and_goes_again() -> None:
    ranks = run(2, loaded, "not finite")
    for got in ranks:
        assert got["nan"] == [0, 0, 1, 0, 0, 0]
        assert max(got["mended"]) < 0.1


def by_both(name: str) -> tuple[Trained, Trained]:
    """A training by plain FSDP, and by changes."""
    way = (VARIANTS | ON_FOUR)[name]
    return trained_as(way, None), trained_as(way, ("none", SPEC))


@pytest.mark.parametrize(
    "name", slowly(VARIANTS | ON_FOUR, quick=("one unit", "bf16", "frozen", "unused", "by columns", "checkpointed"))
)
def test_every_way_of_using_fsdp(name: str) -> None:
    for plain, ours in run(4 if name in ON_FOUR else 2, by_both, name, timeout=120):
        assert finite(ours.parameters)
        distance = sum(float((a - b).norm()) for a, b in zip(ours.parameters, plain.parameters, strict=True))
        assert distance < 0.02 * sum(float(p.norm()) for p in plain.parameters)
        rows = [row for row in ours.extra["rows"] if row["role"] == "parameters"]
        few = "fewer than 256 values"
        exact = {"mixed dtypes": {"uint8 is no float"}, "sharded anew": {"", AGAIN, few}}
        assert {row["reason"] for row in rows} == exact.get(name, {""})


def pruned() -> list[dict[str, Any]]:
    """What the middle layer is, before and behind masks in mid-training, and one step later."""
    model, session, seen = watched()
    optimizer = sgd(model)
    mask = torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH) % 3 > 0
    found = []
    for step in range(3):
        if step == 1:
            session.set_masks({"2.0.weight": mask})
        seen.clear()
        shards = shards_of(model)
        loss_of(model, step).backward()
        optimizer.step()
        weight = seen[1][1][0]
        kept = own_part(mask)
        far = float((own_part(weight) - shards[2])[kept].abs().max())
        found.append({"zeros": bool((weight[~mask] == 0).all()), "far": far, "hash": digest(weight)})
    return found


def test_masks_in_mid_training() -> None:
    one, other = run(2, pruned)
    assert [found["hash"] for found in one] == [found["hash"] for found in other]
    for found in one, other:
        assert [at["zeros"] for at in found] == [False, True, True]
        assert max(at["far"] for at in found) < 0.01


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    """This rank's shards after these steps."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return shards_of(model)


def saved(folder: str) -> None:
    """Three steps, and a distributed checkpoint of model, optimizer and session."""
    model, session, _ = watched()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optimizer, range(3))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "commpress": session}, checkpoint_id=folder)


def resumed(folder: str, keeps: bool = True) -> dict[str, Any]:
    """Three more steps by new objects; what the first one computed with, and the shards before it."""
    model, session, seen = watched(seed=99)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments} | ({"commpress": session} if keeps else {}), checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    start = shards_of(model)
    shards = train(model, optimizer, range(3, 6))
    first = [x for _, of in seen[:3] for x in of]
    rounded = [torch.equal(own_part(x), mine.bfloat16().float()) for x, mine in zip(first, start, strict=True)]
    return {"shards": shards, "rounded": all(rounded), "hashes": [digest(x) for x in first]}


def unbroken() -> list[Tensor]:
    """Six steps in one go."""
    model, _, _ = watched()
    return train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), range(6))


def test_a_distributed_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run(2, saved, str(tmp_path))
    whole = run(2, unbroken)
    for shards, got, without in zip(
        whole, run(2, resumed, str(tmp_path)), run(2, resumed, str(tmp_path), False), strict=True
    ):
        assert same(shards, got["shards"])
        assert not got["rounded"]  # the version went on, and was not sent anew
        assert without["rounded"]
        assert not same(shards, without["shards"])


@pytest.mark.parametrize(("old", "new"), [(2, 3), slow(3, 2)])
def test_another_number_of_ranks_starts_with_the_owners_values(old: int, new: int, tmp_path: Path) -> None:
    run(old, saved, str(tmp_path))
    ranks = run(new, resumed, str(tmp_path))
    for got in ranks:
        assert got["rounded"]
        assert got["hashes"] == ranks[0]["hashes"]


def refusals() -> dict[str, str]:
    """What attach says to specs that make none."""
    model = sharded()
    second = dist.get_rank() == 1

    def attach(**settings: Any) -> str:
        return outcome(lambda: commpress.attach(model, **settings))

    return {
        "alone": attach(gradients="none", parameters="delta"),
        "none": attach(gradients="none", parameters="delta|none"),
        "sparse": attach(gradients="none", parameters="delta|topk(0.1)"),
        "unknown": attach(gradients="none", parameters="delta|int5"),
        "gradients": attach(gradients="delta|int4"),
        "differ": attach(gradients="none", parameters=SPEC if second else "int4"),
    }


def test_refusals_are_sentences() -> None:
    for said in run(2, refusals):
        for case in ("alone", "none"):
            assert said[case].startswith("ValueError: parameters: spec 'delta"), case
            assert "delta needs the codec of the changes after it, as in delta|int4" in said[case]
        assert "parameters: delta|topk(0.1) would make most of them 0" in said["sparse"]
        assert "parameters: spec 'int5': unknown codec 'int5'" in said["unknown"]
        assert "gradients: spec 'delta|int4': unknown codec 'delta'" in said["gradients"]
        assert "rank 1 has parameters' plan" in said["differ"]
        assert "'codec': 'delta|int4'" in said["differ"]
