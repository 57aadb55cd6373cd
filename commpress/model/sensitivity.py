"""Sensitivities: how much a model's loss rises with one layer pruned or rounded alone, and the path that follows from it.

The path begins at the dense model and always takes the change that costs the least loss for each byte that it saves. Losses of
several changes are taken for the sum of each alone, and only weights are rounded here, no inputs.
"""

import copy
import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from commpress.model import layers, pruning, quantization, reach
from commpress.model.export.onnx_masks import masked_bytes
from commpress.model.judgement.forms import Batch
from commpress.model.judgement.quality import Loss, usual_loss
from commpress.model.quantization import Quantization

AMOUNTS = (0.5, 0.7, 0.8, 0.9)
"""Shares of a layer's weights; tried where pruned weights leave the file."""
BITS: tuple[tuple[int, int | None], ...] = ((8, None), (4, 32))
"""Bits, and how many weights share a scale."""


@dataclass(frozen=True)
class Setting:
    """A way to prune and round a layer."""

    amount: float = 0.0
    bits: int | None = None
    group: int | None = None


@dataclass(frozen=True)
class Way:
    """A kind of change that may be made to all units together, and the format of the file that it is for."""

    format: str
    """A name in `commpress.model.export.FORMATS`, whose bytes count."""
    prunes: bool
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """A weight [rows, width] that one setting is chosen for, with all modules that share it."""

    parameter: str
    modules: tuple[str, ...]
    rows: int
    width: int
    prunable: bool
    """Whether it is the weight of a Linear or Conv1D layer alone."""
    bits: tuple[tuple[int, int | None], ...]

    def settings(self, way: Way) -> list[Setting]:
        """All that can be done to it, the dense one first."""
        amounts = (0.0, *AMOUNTS) if way.prunes and self.prunable else (0.0,)
        rounded = [(None, None), *(each for each in self.bits if each[0] in way.bits)]
        return [Setting(amount, *each) for each in rounded for amount in amounts]

    def bytes(self, setting: Setting, format: str) -> float:
        """Return the bytes that it takes in the file, about."""
        n = self.rows * self.width
        bits = setting.bits or 32
        scales = 0 if setting.bits is None else self.rows * self.width / (setting.group or self.width)
        left = n - round(setting.amount * n)
        if format == "onnx":
            return masked_bytes(n, left, bits) + 4 * scales
        masked = left * bits / 8 + n / 8 if setting.amount else n * bits / 8
        return min(masked, n * bits / 8) + scales * (2 if setting.bits == 4 else 4)


Choice = dict[int, Setting]
"""By the index of a unit; what is not there is dense."""


def units_of(model: nn.Module) -> list[Unit]:
    """The weights that can be pruned or rounded, in the model's order. Modules of several weights are not rounded here."""
    prepared = _single_weights(model)
    tried = {each: copy.deepcopy(model) for each in BITS}
    prunable = set(reach.linear_weights(model))
    modules = dict(model.named_modules())
    found = []
    for name, p in layers.named_parameters(model).items():
        own = tuple(each for each in modules if each in prepared and getattr(modules[each], prepared[each]) is p)
        if (own or name in prunable) and p.dim() > 1:
            rows = layers.layout_of(model, name).turned(p.detach()).shape[0]
            bits = tuple(each for each in BITS if own and _takes(tried[each], own, *each))
            found.append(Unit(name, own, rows, p.numel() // rows, name in prunable, bits))
    return found


def _single_weights(model: nn.Module) -> dict[str, str]:
    """The modules that can be rounded and have one weight, as attention and recurrent ones have not, and its name."""
    whole = copy.deepcopy(model)
    quantization.prepare(whole, Quantization())
    names: dict[str, list[str]] = {}
    for name, _, its, _ in quantization.quantized_weights(whole):
        names.setdefault(name, []).append(its)
    return {name: its[0] for name, its in names.items() if len(its) == 1}


def sensitivities(
    model: nn.Module,
    units: Sequence[Unit],
    prunes: bool,
    batches: Sequence[Batch],
    loss: Loss | None,
    group: dist.ProcessGroup | None,
) -> tuple[float, dict[tuple[int, Setting], float]]:
    """The loss, and its rise with one unit pruned or rounded alone, 0 where it falls. Collective: one all-reduce."""
    singles: list[tuple[int, Setting]] = []
    losses = [loss_of(copy.deepcopy(model), batches, loss)]
    for bits, width in BITS:
        having = [i for i, unit in enumerate(units) if (bits, width) in unit.bits]
        if not having:
            continue
        rounded = copy.deepcopy(model)
        quantization.prepare(
            rounded, Quantization(bits, width, layers=globs(m for i in having for m in units[i].modules))
        )
        for i in having:
            quantization.switch(rounded, dict.fromkeys(units[i].modules, True))
            losses.append(loss_of(rounded, batches, loss))
            quantization.switch(rounded, dict.fromkeys(units[i].modules, False))
            singles.append((i, Setting(0.0, bits, width)))
    pruned = copy.deepcopy(model)
    for i, unit in enumerate(units if prunes else ()):
        p = layers.named_parameters(pruned)[unit.parameter]
        dense = p.detach().clone()
        for amount in AMOUNTS if unit.prunable else ():
            p.data.copy_(dense * pruned_mask(dense, amount))
            losses.append(loss_of(pruned, batches, loss))
            singles.append((i, Setting(amount)))
        p.data.copy_(dense)
    rows = float(sum(len(y) for _, y in batches))
    summed = torch.tensor([rows, *(rows * each for each in losses)], dtype=torch.float64, device=_device(model))
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(summed, group=group)
    base, *others = (summed[1:] / summed[0]).tolist()
    return base, {single: max(each - base, 0.0) for single, each in zip(singles, others, strict=True)}


def greedy(
    units: Sequence[Unit], rises: Mapping[tuple[int, Setting], float], way: Way
) -> list[tuple[Choice, float, float]]:
    """The path: choices, with the bytes saved and the rise of the loss so far, from the dense model to the smallest one.

    Each step changes one unit: the least loss for each byte saved, of equal ones that which saves more, then the first.
    """

    def cost(i: int, setting: Setting) -> float:
        rounded = rises[i, Setting(0.0, setting.bits, setting.group)] if setting.bits else 0.0
        return rounded + (rises[i, Setting(setting.amount)] if setting.amount else 0.0)

    choice: Choice = {}
    saved, rise = 0.0, 0.0
    path = [(dict(choice), saved, rise)]
    while True:
        moves = []
        for i, unit in enumerate(units):
            now = choice.get(i, Setting())
            for order, to in enumerate(unit.settings(way)):
                less = unit.bytes(now, way.format) - unit.bytes(to, way.format)
                if less > 0:
                    more = cost(i, to) - cost(i, now)
                    moves.append((more / less, -less, i, order, to, more))
        if not moves:
            return path
        _, less, i, _, to, more = min(moves, key=lambda move: move[:4])
        choice[i] = to
        saved, rise = saved - less, rise + more
        path.append((dict(choice), saved, rise))


def smallest(units: Sequence[Unit], way: Way) -> Choice:
    """The choice at the end of each path, whatever the losses: all units in their fewest bytes."""
    found = {i: min(unit.settings(way), key=lambda to: unit.bytes(to, way.format)) for i, unit in enumerate(units)}
    return {i: setting for i, setting in found.items() if setting != Setting()}


def _takes(model: nn.Module, modules: Sequence[str], bits: int, group: int | None) -> bool:
    try:
        quantization.prepare(model, Quantization(bits, group, layers=globs(modules)))
    except ValueError:
        return False
    return True


def globs(names: Iterable[str]) -> tuple[str, ...]:
    """Names as patterns that match them alone."""
    return tuple(glob.escape(name) for name in names)


def pruned_mask(w: Tensor, amount: float) -> Tensor:
    """Return the mask, bool of the shape of w, that keeps all but the `amount` of its values that are smallest."""
    return pruning.by_amount({"": w.abs()}, amount)[""]


@torch.no_grad()
def loss_of(model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> float:
    """The mean loss of a model over all rows, in evaluation, in which it stays."""
    model.eval()
    total, rows, device = 0.0, 0, _device(model)
    for inputs, targets in batches:
        outputs = model(*(x.to(device) for x in inputs))
        y = next(each for each in tree_leaves(outputs) if isinstance(each, Tensor))
        targets = targets.to(device)
        function = loss or usual_loss(y, targets)
        total += len(targets) * float(function(y, targets))
        rows += len(targets)
    return total / rows


def _device(model: nn.Module) -> torch.device:
    return next(iter(model.parameters())).device
