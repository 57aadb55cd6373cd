"""How much each weight matters to a model that trains, by four criteria; the larger a score, the longer the weight stays.

    Magnitude   |w|                                             Han et al., arXiv:1506.02626
    Taylor      the mean over steps of |g w|                    Molchanov et al., arXiv:1906.10771
    Movement    the sum over steps of -g w                      Sanh et al., arXiv:2005.07683
    Wanda       |w_ij| ||x_j||_2, x_j the layer's input j       Sun et al., arXiv:2306.11695

A weight that is pruned is 0, and by all four its score no longer grows: what is to come back needs another criterion than
these, its gradient for one (`pruning.regrow`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from commpress.model.masks import local, whole

State = dict[str, dict[str, Any]]


class Magnitude:
    """|w|: nothing to observe and nothing to remember.

    `parameters` are those to score, as `model.named_parameters()` has them, DTensors of FSDP2 among them; `group` is that
    of the ranks which train the model together, None for the default one.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None = None
    ) -> None:
        self._parameters = dict(parameters)

    def observe(self, scale: float = 1.0) -> None:
        """Call it in every step after backward, gradients reduced, and before the optimizer's step.

        `scale` is by what a GradScaler has multiplied them.
        """

    def scores(self) -> dict[str, Tensor]:
        """A float32 score for every weight, of the whole parameters' shapes and the same on all ranks; collective."""
        return {name: whole(p).abs().float() for name, p in self._parameters.items()}

    def state_dict(self) -> State:
        """What this rank has seen; each rank keeps its own, and goes on from it bit for bit."""
        return {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what `state_dict` returned on this rank. Raises ValueError if it is of other parameters or shapes."""
        _require_names("Magnitude", state, ())

    def close(self) -> None:
        """Leave the model as it was."""


class _OfGradients:
    """Adds up something of a weight and its gradient, in float32 beside each rank's part of the parameter."""

    _add: Callable[[Tensor, Tensor, Tensor, float], None]
    """(total, w, g, share): add a step's part to the total, of the gradient `g` times `share`."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None = None
    ) -> None:
        self._parameters = dict(parameters)
        self._sums = {name: torch.zeros_like(p.detach(), dtype=torch.float32) for name, p in parameters.items()}
        self._steps = dict.fromkeys(parameters, 0)

    @torch.no_grad()
    def observe(self, scale: float = 1.0) -> None:
        """As `Magnitude.observe`; a parameter without a gradient is passed over."""
        for name, p in self._parameters.items():
            if p.grad is not None:
                w, g = local(p.detach()), local(p.grad)
                if p.is_complex():  # the loss changes by the product as of pairs of reals
                    w = (g.conj() * w).real
                    g = torch.ones_like(w)
                self._add(local(self._sums[name]), w.float(), g.float(), 1 / scale)
                self._steps[name] += 1

    def state_dict(self) -> State:
        """As `Magnitude.state_dict`."""
        return {name: {"sum": local(total).clone(), "steps": self._steps[name]} for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """As `Magnitude.load_state_dict`."""
        _require_names(type(self).__name__, state, self._sums)
        for name, saved in state.items():
            _copy(f"{type(self).__name__} of {name!r}", saved["sum"], local(self._sums[name]))
            self._steps[name] = saved["steps"]

    def close(self) -> None:
        """As `Magnitude.close`."""

    def _seen(self) -> None:
        for name, steps in self._steps.items():
            if not steps:
                raise ValueError(f"{type(self).__name__} of {name!r}: there has been no gradient of it")


class Taylor(_OfGradients):
    """The mean of |g w| over the steps observed: by how much the loss would change without the weight, to first order.

    Arguments as of `Magnitude`.
    """

    @staticmethod
    def _add(total: Tensor, w: Tensor, g: Tensor, share: float) -> None:
        total.add_((g * w).abs_(), alpha=share)

    def scores(self) -> dict[str, Tensor]:
        """As `Magnitude.scores`. Raises ValueError, naming the parameter, where there has been no gradient."""
        self._seen()
        return {name: whole(total) / self._steps[name] for name, total in self._sums.items()}


class Movement(_OfGradients):
    """The sum of -g w over the steps observed: positive where training moves the weight away from 0, negative towards.

    The paper prunes a copy of weights that go on training underneath. Here a pruned weight is 0: it moves no more, and its
    score stays what it was. Arguments as of `Magnitude`.
    """

    @staticmethod
    def _add(total: Tensor, w: Tensor, g: Tensor, share: float) -> None:
        total.addcmul_(g, w, value=-share)

    def scores(self) -> dict[str, Tensor]:
        """As `Magnitude.scores`, of either sign. Raises ValueError, naming the parameter, where there has been no gradient."""
        self._seen()
        return {name: whole(total).clone() for name, total in self._sums.items()}


class Wanda:
    """|w_ij| ||x_j||_2 over all inputs of training so far: a weight counts as much as what comes in by it.

    The paper ranks within an output row (`pruning.by_amount(..., scope="row")`). Inputs are seen by forward hooks, in
    training mode only; one that activation checkpointing computes again counts once. Sums of squares stay with their rank,
    and `scores` adds them up over the ranks. Arguments as of `Magnitude`. Raises ValueError for a parameter that is not the
    weight of an `nn.Linear`.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None = None
    ) -> None:
        self._parameters = dict(parameters)
        self._group = group
        layers = {name: _linear_of(model, name) for name in parameters}
        self._squares = {
            name: torch.zeros(layer.in_features, dtype=torch.float64, device=local(layer.weight).device)
            for name, layer in layers.items()
        }
        self._hooks: list[RemovableHandle] = [
            layer.register_forward_pre_hook(_adder_to(self._squares[name]), with_kwargs=True)
            for name, layer in layers.items()
        ]

    def observe(self, scale: float = 1.0) -> None:
        """As `Magnitude.observe`."""

    def scores(self) -> dict[str, Tensor]:
        """As `Magnitude.scores`. Raises ValueError, naming the parameter, where all inputs were 0 or there were none."""
        if not self._squares:
            return {}
        squares = torch.cat(list(self._squares.values()))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(squares, group=self._group)
        norms = squares.sqrt().float().split([s.numel() for s in self._squares.values()])
        for name, norm in zip(self._squares, norms, strict=True):
            if not bool(norm.any()):
                raise ValueError(f"Wanda of {name!r}: no input has come by its layer in training mode")
        weights = self._parameters.items()
        return {name: whole(p).abs().float() * norm for (name, p), norm in zip(weights, norms, strict=True)}

    def state_dict(self) -> State:
        """As `Magnitude.state_dict`."""
        return {name: {"squares": squares.clone()} for name, squares in self._squares.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """As `Magnitude.load_state_dict`."""
        _require_names("Wanda", state, self._squares)
        for name, saved in state.items():
            _copy(f"Wanda of {name!r}", saved["squares"], self._squares[name])

    def close(self) -> None:
        """As `Magnitude.close`: no more inputs are seen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


Criterion = Magnitude | Taylor | Movement | Wanda

CRITERIA: dict[str, type[Criterion]] = {
    "magnitude": Magnitude,
    "taylor": Taylor,
    "movement": Movement,
    "wanda": Wanda,
}
"""The criteria by name."""


def _linear_of(model: nn.Module, name: str) -> nn.Linear:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, nn.Linear) or leaf != "weight":
        raise ValueError(
            f"Wanda of {name!r}: expected the weight of an nn.Linear, got a {leaf} of {type(module).__name__}"
        )
    return module


def _adder_to(squares: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    @torch.no_grad()
    def add(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        computed_again = torch._C._current_graph_task_id() != -1  # a forward in the middle of a backward
        if layer.training and not computed_again:
            x = inputs[0] if inputs else named["input"]
            squares.add_(x.detach().reshape(-1, x.shape[-1]).abs().float().square().sum(0))

    return add


def _require_names(what: str, state: Mapping[str, Any], expected: Mapping[str, Any] | tuple[()]) -> None:
    if state.keys() != set(expected):
        raise ValueError(f"{what}: the state is of {sorted(state)}, expected {sorted(expected)}")


def _copy(what: str, saved: Tensor, to: Tensor) -> None:
    if saved.shape != to.shape:
        raise ValueError(f"{what}: expected a saved tensor of shape {tuple(to.shape)}, got {tuple(saved.shape)}")
    to.copy_(saved)
