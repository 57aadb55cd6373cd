"""Outputs of chosen modules, captured by forward hooks: hidden states and attention probabilities of a model's last forward."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Captures:
    """Outputs of some modules in a model's last forward, by (kind, module name), until they are taken.

    It is open from the model's start to its end: what a checkpoint computes again in backward is not kept.
    """

    def __init__(
        self,
        model: nn.Module,
        who: str,
        modules: Mapping[str, nn.Module],
        wanted: Sequence[tuple[str, str]],
        projections: Mapping[str, nn.Module],
    ) -> None:
        self._who, self._wanted = who, wanted
        self._of: dict[tuple[str, str], Tensor] = {}
        self._open = False
        self._on = True
        self._called: dict[tuple[str, str], bool] = {}
        self._handles: list[RemovableHandle] = []
        if not wanted:
            return

        # closures, and each knows its module: deepcopy of the model copies neither them nor what they hold
        def opens(module: nn.Module, args: Any) -> None:
            if module is model:
                self._of.clear()
                self._open = self._on

        def closes(module: nn.Module, args: Any, output: Any) -> None:
            if module is model:
                self._open = False

        self._handles.append(model.register_forward_pre_hook(opens))
        for kind, name in wanted:
            self._watch(kind, name, modules[name], projections.get(name) if kind == "hidden" else None)
        self._handles.append(model.register_forward_hook(closes))

    def _watch(self, kind: str, name: str, watched: nn.Module, projection: nn.Module | None) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if module is not watched:
                return
            self._called[kind, name] = True
            if not self._on:
                return
            x = _hidden(output, name) if kind == "hidden" else _attention(output, name)
            if projection is not None:
                # here, inside the forward: FSDP2 has gathered the weights, and a checkpoint must find the same operations
                x = projection(x)
            if self._open:
                self._of[kind, name] = x

        self._handles.append(watched.register_forward_hook(hook))

    def watch(self, on: bool) -> None:
        """Set whether the next forwards are captured."""
        if not on:
            self._of.clear()
        self._on = on

    @property
    def not_called(self) -> list[tuple[str, str]]:
        """The wanted modules that no forward has called so far, watched or not."""
        return [each for each in self._wanted if each not in self._called]

    def take(self) -> dict[tuple[str, str], Tensor]:
        """Return all of them, once. Raises ValueError for a module that was not called since the last time."""
        for kind, name in self._wanted:
            if (kind, name) not in self._of:
                raise ValueError(
                    f"{kind} of the {self._who}'s {name!r}: no output since the last loss: expected one forward of the model "
                    "before each loss, with this module in it, and not replaced since the Distiller was made, nor compiled "
                    "and called before (torch.compiler.reset() helps)"
                )
        taken, self._of = self._of, {}
        return taken

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._of.clear()


def modules_of(model: nn.Module, who: str, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return modules by name. Raises ValueError, with names that are close, for one that the model does not have."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or list(known)[1:4]
            raise ValueError(f"the {who} has no module {name!r}; close to it: {', '.join(map(repr, close))}")
    return {name: known[name] for name in names}


def _hidden(output: Any, name: str) -> Tensor:
    values = output if isinstance(output, tuple | list) else [output]
    if first := [value for value in values if isinstance(value, Tensor)][:1]:
        return first[0]
    raise TypeError(f"hidden of {name!r}: expected a tensor or a tuple with one, got {type(output).__name__}")


def _attention(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor) and output.dim() == 4:
        return output
    if isinstance(output, tuple | list) and len(output) > 1 and isinstance(output[1], Tensor):
        return output[1]
    got = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    if isinstance(output, tuple | list):
        got = "(" + ", ".join(type(value).__name__ for value in output) + ")"
    raise TypeError(
        f"attention of {name!r}: expected (output, probabilities), or probabilities [batch, heads, queries, keys], got "
        f'{got}; Transformers\' attention modules return them under attn_implementation="eager"'
    )
