"""How much each weight matters to a model that trains, by four criteria; the larger a score, the longer the weight stays.

    Magnitude   |w|                                             Han et al., arXiv:1506.02626
    Taylor      the mean over steps of |g w|                    Molchanov et al., arXiv:1906.10771
    Movement    the sum over steps of -g w                      Sanh et al., arXiv:2005.07683
    Wanda       |w_ij| ||x_j||_2, x_j the layer's input j       Sun et al., arXiv:2306.11695

A weight that is pruned is 0, and by all four its score no longer grows: what is to come back needs another criterion than
these, its gradient for one (`pruning.regrow`).
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from commpress.model.held import Held, Holding, local, whole
from commpress.model.layers import input_dim, is_linear, module_of

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

    def observe(self, scale: float = 1.0, only: Container[str] | None = None) -> None:
        """Call it in every step after backward, gradients reduced, and before the optimizer's step.

        `scale` is by what a GradScaler has multiplied them. `only` are the names of those that this optimizer moves, where
        there are several; None for all.
        """

    def scores(self) -> dict[str, Tensor]:
        """A float32 score for every weight, of the whole parameters' shapes and the same on all ranks; collective."""
        return {name: whole(p).abs().float() for name, p in self._parameters.items()}

    def state_dict(self) -> State:
        """Return what this rank has seen; each rank keeps its own, and goes on from it bit for bit."""
        return {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what `state_dict` returned on this rank. Raises ValueError if it is of other parameters or shapes."""
        _require_names("Magnitude", state, ())

    def close(self) -> None:
        """Leave the model as it was."""


class _OfGradients:
    """Adds up something of a weight and its gradient, in float32 beside each rank's part of the parameter.

    `holding` says where parameters are stepped if that is elsewhere; they must be whole when this is made.
    """

    _add: Callable[[Tensor, Tensor, float], None]
    """(total, g w, share): add a step's part to the total, times `share`."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        group: dist.ProcessGroup | None = None,
        holding: Holding | None = None,
    ) -> None:
        self._group = group
        self._held = {name: Held(p, holding) for name, p in parameters.items()}
        self._sums = {name: self._zeros(held) for name, held in self._held.items()}
        """The sums so far, by the parameter: one tensor for each that the optimizer steps."""
        self._steps = dict.fromkeys(parameters, 0)

    @torch.no_grad()
    def observe(self, scale: float = 1.0, only: Container[str] | None = None) -> None:
        """Do as `Magnitude.observe`; a parameter without a gradient is passed over."""
        for name, held in self._held.items():
            if only is not None and name not in only:
                continue
            found = list(zip(self._sums[name], held.gradients(), held.values(), strict=False))
            for total, g, values in found:
                if g is not None:
                    g = g.to_dense() if g.is_sparse else g
                    self._add(local(total), _product(local(g), values), 1 / scale)
            self._steps[name] += any(g is not None for _, g, _ in found)

    def state_dict(self) -> State:
        """Return what `Magnitude.state_dict` returns."""
        return {name: {"sum": self._row(name).clone(), "steps": self._steps[name]} for name in self._sums}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Do as `Magnitude.load_state_dict`."""
        _require_names(type(self).__name__, state, self._sums)
        for name, saved in state.items():
            row = self._row(name)
            _copy(f"{type(self).__name__} of {name!r}", saved["sum"], row)
            if self._held[name].is_flat:
                self._sums[name] = list(row.split([total.numel() for total in self._sums[name]]))
            self._steps[name] = saved["steps"]

    def close(self) -> None:
        """Do as `Magnitude.close`."""

    def _zeros(self, held: Held) -> list[Tensor]:
        if not held.is_flat:
            return [torch.zeros_like(held.p.detach(), dtype=torch.float32)]
        return [torch.zeros_like(x, dtype=torch.float32) for x, _ in zip(held.values(), held.gradients(), strict=False)]

    def _row(self, name: str) -> Tensor:
        """Return this rank's sums of a parameter, in one tensor."""
        if not self._held[name].is_flat:
            return local(self._sums[name][0])
        return torch.cat([torch.zeros(0, dtype=torch.float32, device=self._held[name].p.device), *self._sums[name]])

    def _totals(self) -> dict[str, tuple[Tensor, int]]:
        """The sums of the whole parameters, copies, and over how many steps. Collective where they are sharded."""
        steps, found = [*self._steps.values()], {}
        if flat := [held for held in self._held.values() if held.is_flat]:
            most = torch.tensor(steps, dtype=torch.int64, device=flat[0].p.device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)  # a rank may step no part of one
            steps = most.tolist()
        for (name, held), count in zip(self._held.items(), steps, strict=True):
            if not count:
                raise ValueError(f"{type(self).__name__} of {name!r}: it has had no gradient yet")
            if held.is_flat:
                total = held.placed(self._sums[name])
                dist.all_reduce(total, group=self._group)  # each value is on one rank, and 0 on the others
            else:
                total = whole(self._sums[name][0]).clone()
            found[name] = total, count
        return found


class Taylor(_OfGradients):
    """The mean of |g w| over the steps observed: by how much the loss would change without the weight, to first order.

    Arguments as of `Magnitude`.
    """

    @staticmethod
    def _add(total: Tensor, product: Tensor, share: float) -> None:
        total.add_(product.abs_(), alpha=share)

    def scores(self) -> dict[str, Tensor]:
        """Return what `Magnitude.scores` returns. Raises ValueError, naming the parameter, where there has been no gradient."""
        return {name: total / steps for name, (total, steps) in self._totals().items()}


class Movement(_OfGradients):
    """The sum of -g w over the steps observed: positive where training moves the weight away from 0, negative towards.

    The paper prunes a copy of weights that go on training underneath. Here a pruned weight is 0: it moves no more, and its
    score stays what it was. Arguments as of `Magnitude`.
    """

    @staticmethod
    def _add(total: Tensor, product: Tensor, share: float) -> None:
        total.sub_(product, alpha=share)

    def scores(self) -> dict[str, Tensor]:
        """Return scores as `Magnitude.scores` does, of either sign. Raises ValueError for a parameter without a gradient."""
        return {name: total for name, (total, _) in self._totals().items()}


class Wanda:
    """|w_ij| ||x_j||_2 over all inputs of training so far: a weight counts as much as what comes in by it.

    The paper ranks within an output row (`pruning.by_amount(..., scope="row")`). Inputs are seen by forward hooks, in
    training mode only; one that activation checkpointing computes again counts once, and those of all layers that share
    a weight count. Sums of squares stay with their rank, and `scores` adds them up over the ranks. A copy of the model is
    not watched. Arguments as of `Magnitude`. Raises ValueError for a parameter that is not the weight of an `nn.Linear`
    or of Transformers' Conv1D.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None = None
    ) -> None:
        self._parameters = dict(parameters)
        self._group = group
        layers = {name: _linear_of(model, name) for name in parameters}
        self._dims = {name: input_dim(layer) for name, layer in layers.items()}
        self._inputs = {
            name: _Inputs(torch.zeros(p.shape[self._dims[name]], dtype=torch.float64, device=local(p).device))
            for name, p in parameters.items()
        }
        names = {id(p): name for name, p in parameters.items()}
        self._hooks: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._inputs[name], with_kwargs=True)
            for layer in model.modules()
            if is_linear(layer) and (name := names.get(id(layer.weight)))
        ]

    def watch(self, on: bool) -> None:
        """See inputs, or see none and forget those that were seen. The hooks stay: what torch.compile compiles has them."""
        for inputs in self._inputs.values():
            if not on:
                inputs.squares.zero_()
            inputs.on = on

    @property
    def not_called(self) -> list[str]:
        """The parameters whose layers nobody has called in training mode so far, watched or not."""
        return [name for name, inputs in self._inputs.items() if not inputs.called]

    def observe(self, scale: float = 1.0, only: Container[str] | None = None) -> None:
        """Do as `Magnitude.observe`."""

    def scores(self) -> dict[str, Tensor]:
        """Return what `Magnitude.scores` returns, of those layers that had inputs on any rank.

        Layers without (the weight is used past its module), and those whose inputs all were 0, have no scores. Raises
        ValueError, naming the first, if none has any.
        """
        if not self._inputs:
            return {}
        squares = torch.cat([inputs.squares for inputs in self._inputs.values()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(squares, group=self._group)
        norms = squares.sqrt().float().split([inputs.squares.numel() for inputs in self._inputs.values()])
        found = {name: norm for name, norm in zip(self._inputs, norms, strict=True) if bool(norm.any())}
        if not found:
            first = next(iter(self._inputs))
            raise ValueError(f"Wanda of {first!r}: its layer has had no input in training mode")
        scores = {}
        for name, norm in found.items():
            size = whole(self._parameters[name]).abs().float()
            scores[name] = size * (norm.unsqueeze(1) if self._dims[name] == 0 else norm)
        return scores

    def state_dict(self) -> State:
        """Return what `Magnitude.state_dict` returns."""
        return {name: {"squares": inputs.squares.clone()} for name, inputs in self._inputs.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Do as `Magnitude.load_state_dict`."""
        _require_names("Wanda", state, self._inputs)
        for name, saved in state.items():
            _copy(f"Wanda of {name!r}", saved["squares"], self._inputs[name].squares)

    def close(self) -> None:
        """Do as `Magnitude.close`: no more inputs are seen."""
        for inputs in self._inputs.values():
            inputs.on = False  # compiled code goes on calling a hook that is gone
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


class _Inputs:
    """A forward pre-hook that adds up the squares of what comes into a layer. Copied or pickled with it, it does nothing."""

    def __init__(self, squares: Tensor) -> None:
        self.squares = squares
        self.on = True
        self.called = False

    @torch.no_grad()
    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        computed_again = torch._C._current_graph_task_id() != -1  # a forward in the middle of a backward
        if layer.training and not computed_again:
            self.called = True
            if self.on:
                x = inputs[0] if inputs else next(iter(named.values()))
                x = x.detach().reshape(-1, x.shape[-1])
                self.squares.add_((x.abs() if x.is_complex() else x).float().square().sum(0))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unwatched, ()


class _Unwatched:
    """Stands in for a hook in a copy of a model."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


def _linear_of(model: nn.Module, name: str) -> nn.Module:
    owner, _, leaf = name.rpartition(".")
    module = module_of(model, owner)
    if not is_linear(module) or leaf != "weight":
        raise ValueError(
            f"Wanda of {name!r}: expected the weight of an nn.Linear, got a {leaf} of {type(module).__name__}"
        )
    return module


def _product(g: Tensor, w: Tensor) -> Tensor:
    """g w in float32; of complex ones Re(conj(g) w), which is what the loss loses by the weight, to first order."""
    return (g.conj() * w).real.float() if g.is_complex() else g.float() * w.float()


def _require_names(what: str, state: Mapping[str, Any], expected: Mapping[str, Any] | tuple[()]) -> None:
    if state.keys() != set(expected):
        raise ValueError(f"{what}: the state is of {sorted(state)}, expected {sorted(expected)}")


def _copy(what: str, saved: Tensor, to: Tensor) -> None:
    if saved.shape != to.shape:
        raise ValueError(f"{what}: expected a saved tensor of shape {tuple(to.shape)}, got {tuple(saved.shape)}")
    to.copy_(saved)
