"""EF21-Muon under masks: what is pruned stays 0 although Newton-Schulz mixes a matrix's values, on all ranks alike."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from references import gradients
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, exact_products, network, parameters_of, same, train

import commpress
from commpress.optim import EF21Muon

LR, DECAY, MOMENTUM = 0.01, 0.1, 0.95
MASKED, AGAIN, STEPS = 3, 6, 10
"""Steps behind which the masks change, and all steps."""
Masks = dict[str, Tensor]


def masks_of(model: nn.Module, keeps: float, seed: int) -> Masks:
    """Masks of two of the three matrices, one of them wholly at random, the other without its first rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    masks = {name: torch.rand(shapes[name], generator=generator) < keeps for name in ("0.weight", "2.weight")}
    masks["2.weight"][: 8 * (1 + seed)] = False
    return masks


def attached(spec: str) -> tuple[DistributedDataParallel, EF21Muon, commpress.Session]:
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    optimizer = EF21Muon(ddp, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, nesterov=True, others_spec="none")
    return ddp, optimizer, commpress.attach(ddp, spec, optimizer=optimizer)


def prune(model: nn.Module, masks: Masks) -> None:
    """Set pruned weights to 0, as who sets masks has to."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def masked(spec: str) -> dict[str, Any]:
    """A training whose masks change twice: parameters after each step, and how many pruned values are not 0."""
    ddp, optimizer, session = attached(spec)
    model, masks, history, wrong = ddp.module, Masks(), list[list[Tensor]](), {"weights": 0, "estimates": 0}
    dropped = 0
    for step in range(STEPS):
        if step in (MASKED, AGAIN):
            masks = masks_of(model, 0.4 if step == MASKED else 0.2, seed=step // AGAIN)
            for name, mask in masks.items():
                dropped += int((optimizer.state[model.get_parameter(name)]["momentum_buffer"][~mask] != 0).sum())
            session.set_masks(masks)
            prune(model, masks)
        history.append(train(ddp, [step], optimizer=optimizer).parameters)
        for name, mask in masks.items():
            p = model.get_parameter(name)
            wrong["weights"] += int((p[~mask] != 0).sum())
            wrong["estimates"] += int((optimizer.state[p]["momentum_buffer"][~mask] != 0).sum())
    travels = sum(int(mask.sum()) for mask in masks.values()) + model[4].weight.numel()
    kept = [memory.momentum.numel() for memory in session.collectives[0].feedback.memories.values() if memory.current
            and memory.momentum is not None]  # fmt: skip
    return {"history": history, "wrong": wrong, "dropped": dropped, "momenta": (sum(kept), travels)}


@pytest.mark.parametrize(("spec", "world_size"), [("int4", 3), slow("none", 2), ("sign", 2), slow("topk(0.1)|sign", 4)])
def test_what_masks_prune_stays_0_and_replicas_hold_the_same_bits(spec: str, world_size: int) -> None:
    results = run(world_size, masked, spec)
    for found in results:
        assert found["wrong"] == {"weights": 0, "estimates": 0}
        assert found["dropped"] > 1000
        assert found["momenta"][0] == found["momenta"][1]
        assert all(same(one, other) for one, other in zip(found["history"], results[0]["history"], strict=True))
        assert not same(found["history"][-1], found["history"][-2])


@exact_products
def against_torch() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters of a masked training by `none`, those of masked Muon in plain torch, and those of it without masks."""
    return masked("none")["history"][-1], in_torch(True), in_torch(False)


def in_torch(prunes: bool) -> list[Tensor]:
    """Masked Muon of all ranks at once, its masks changed as in `masked`."""
    model, masks = network(), Masks()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1], LR, (0.9, 0.95), weight_decay=DECAY)
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    for step in range(STEPS):
        if prunes and step in (MASKED, AGAIN):
            masks = masks_of(model, 0.4 if step == MASKED else 0.2, seed=step // AGAIN)
            prune(model, masks)
            for name, mask in masks.items():
                momenta[name] *= mask
        own = [gradients(model, step, rank) for rank in range(dist.get_world_size())]
        means = {name: torch.stack([g[name] for g in own]).mean(dim=0) for name in own[0]}
        for name, p in model.named_parameters():
            p.grad = means[name]
        with torch.no_grad():
            for name, p in matrices.items():
                mask, m = masks.get(name, torch.tensor(True)), momenta[name]
                g = means[name] * mask
                m.lerp_(g, 1 - MOMENTUM)
                x = g.lerp(m, MOMENTUM).double()  # Nesterov's, as torch.optim.Muon has it
                x /= x.norm()
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - LR * DECAY).sub_(x.float() * mask, alpha=0.2 * LR * max(p.shape) ** 0.5)
        adamw.step()
    return parameters_of(model)


@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_exact_it_is_masked_muon_in_plain_torch(world_size: int) -> None:
    for mine, theirs, dense in run(world_size, against_torch):
        start = torch.cat([p.reshape(-1) for p in parameters_of(network())])
        a, b, c = (torch.cat([p.reshape(-1) for p in each]) for each in (mine, theirs, dense))
        assert float((a - b).norm() / (b - start).norm()) < 1e-3
        assert float((a - c).norm() / (c - start).norm()) > 0.1


def attached_anew() -> tuple[list[list[Tensor]], float]:
    """Parameters behind masks, a new wrapper and a new session, which has no masks; and how far the estimate is from the mean
    momentum after an exact step."""
    ddp, optimizer, session = attached("int4")
    masks = masks_of(ddp.module, 0.4, 0)
    session.set_masks(masks)
    prune(ddp.module, masks)
    train(ddp, range(3), optimizer=optimizer)
    again = DistributedDataParallel(ddp.module, bucket_cap_mb=25)
    following = commpress.attach(again, "none", optimizer=optimizer)
    history = [train(again, [step], optimizer=optimizer).parameters for step in range(3)]
    found = []
    for segments, memory in following.collectives[0].feedback.memories.items():
        if memory.current and memory.momentum is not None:
            mean = memory.momentum.clone()
            dist.all_reduce(mean)
            names = [segment.name for segment in segments]
            estimates = [optimizer.state[ddp.module.get_parameter(name)]["momentum_buffer"].view(-1) for name in names]
            found.append(float((torch.cat(estimates) - mean / dist.get_world_size()).norm() / mean.norm()))
    return history, max(found)


def test_estimates_start_anew_where_the_momenta_do() -> None:
    (history, off), (other, _) = run(2, attached_anew)
    assert all(same(one, two) for one, two in zip(history, other, strict=True))
    assert off < 1e-4
