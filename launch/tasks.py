"""The task of a run: the byte-level GPT on text, or your own model and batches.

    commpress train --data FILE|DIR
    commpress train --model my_project.models:build --data my_project.data:batches

The model's factory returns a torch.nn.Module, trained already or not; the data's function returns (training, held_out), each
batches of (inputs, targets), as for `commpress shrink`.
"""

import contextlib
import copy
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from commpress.launch import data
from commpress.launch.evaluation import cross_entropy
from commpress.launch.exported import bytes_of
from commpress.launch.model import GPT
from commpress.launch.model_size import called
from commpress.launch.predictions import require
from commpress.launch.settings import Settings

if TYPE_CHECKING:
    from commpress.model.search.spaces import Choice

Batch = tuple[tuple[Tensor, ...], Tensor]
"""Inputs, as the model takes them, and targets."""


class Task(Protocol):
    """A model and the data that it learns."""

    unit: str
    """The unit of the data: "tokens"."""

    @property
    def amount(self) -> int:
        """Return the number of units in a rank's backward."""

    @property
    def fingerprint(self) -> tuple[int, int]:
        """Return bytes and CRC-32 of all data."""

    @property
    def parameters(self) -> int:
        """Return the number of values of the whole model."""

    def model(self) -> nn.Module:
        """Return a fresh model on the CPU, with the first values of training."""

    def dense(self) -> nn.Module:
        """Return a model of the sizes that it had before a budget removed structure."""

    def begun(self, state: Mapping[str, Tensor]) -> "Task":
        """Return the task whose model begins with these values."""

    def sample(self, source: torch.Generator) -> Batch:
        """Return the next batch of a rank, from its own generator."""

    def held_out(self, rank: int, world_size: int) -> Iterator[tuple[Batch, int]]:
        """Return a rank's held-out batches and how many rows of each count; the same number of batches on every rank."""

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """Return the mean loss."""

    def example(self) -> tuple[Tensor, ...]:
        """Return the inputs to trace an export with."""

    def record(self) -> dict[str, Any]:
        """Return record.json's entry for the data."""

    def told(self) -> str:
        """Return the data in one line."""


def read(settings: Settings) -> Task:
    """Return the task of --model and --data. Raises ValueError that names the flag."""
    if settings.model is not None:
        return Own.read(settings.model, str(settings.data), settings.seed)
    text = data.load(settings.data)
    data.require_context(text, settings.context)
    return Text(settings, text)


@dataclass(frozen=True)
class Text:
    """The GPT of the settings, and the text that it learns."""

    settings: Settings
    text: data.Text
    values: Mapping[str, Tensor] | None = None
    """The first values of the model; None: random ones."""
    unit = "tokens"

    @property
    def amount(self) -> int:
        return self.settings.batch * self.settings.context

    @property
    def fingerprint(self) -> tuple[int, int]:
        return self.text.fingerprint

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in GPT(self.settings.shape).parameters())

    def model(self) -> GPT:
        model = GPT(self.settings.shape)
        if self.values is not None:
            model.load_state_dict(self.values)
        return model

    def dense(self) -> GPT:
        return self.model()

    def begun(self, state: Mapping[str, Tensor]) -> "Text":
        return replace(self, values=state)

    def sample(self, source: torch.Generator) -> Batch:
        x, y = data.sample(self.text.train, self.settings.batch, self.settings.context, source)
        return (x,), y

    def held_out(self, rank: int, world_size: int) -> Iterator[tuple[Batch, int]]:
        """Return --eval-batches times --batch fixed windows, split over the ranks."""
        batch, context = self.settings.batch, self.settings.context
        starts = data.validation_starts(self.text.validation, self.settings.eval_batches * batch, context)
        mine = starts[rank::world_size]
        for first in range(0, -(-len(starts) // world_size), batch):
            part = mine[first : first + batch]
            x, y = data.windows(self.text.validation, part if len(part) else starts[:1], context)
            yield ((x,), y), len(part)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        return cross_entropy(output, targets)

    def example(self) -> tuple[Tensor, ...]:
        with torch.device("meta"):
            model = GPT(self.settings.shape)
        return bytes_of(model)

    def record(self) -> dict[str, Any]:
        text = self.text
        return {
            "source": text.source,
            "bytes": text.fingerprint[0],
            "files": text.files,
            "skipped": text.skipped,
        }

    def told(self) -> str:
        skipped = f", {self.text.skipped} files skipped that are not text" if self.text.skipped else ""
        return f"{len(self.text.train) / 1e6:.1f} MB of text from {self.text.source}{skipped}"


@dataclass(frozen=True)
class Own:
    """Your own model and batches. The loss is cross entropy for whole targets, else squared error."""

    made: nn.Module
    """The factory's model, or the one that a search or a budget made of it; copied, never trained."""
    source: str
    training: Sequence[Batch]
    validation: Sequence[Batch]
    fingerprint: tuple[int, int]
    whole: nn.Module | None = None
    """The model that a budget removed structure of."""
    unit = "rows"

    @classmethod
    def read(cls, factory: str, function: str, seed: int) -> "Own":
        """Call both. Their random numbers follow from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = module_of(factory)
            training, validation = batches(function)
        return cls(made, function, training, validation, _fingerprint([*training, *validation]))

    @property
    def amount(self) -> int:
        return len(self.training[0][1])

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.made.parameters())

    def model(self) -> nn.Module:
        return copy.deepcopy(self.made)

    def dense(self) -> nn.Module:
        return copy.deepcopy(self.made if self.whole is None else self.whole)

    def begun(self, state: Mapping[str, Tensor]) -> "Own":
        made = self.model()
        made.load_state_dict(state)
        return replace(self, made=made)

    def sample(self, source: torch.Generator) -> Batch:
        drawn = torch.randint(len(self.training), (1,), generator=source, dtype=torch.int64, device="cpu")
        return self.training[int(drawn)]

    def held_out(self, rank: int, world_size: int) -> Iterator[tuple[Batch, int]]:
        mine = self.validation[rank::world_size]
        for i in range(-(-len(self.validation) // world_size)):
            yield (mine[i], len(mine[i][1])) if i < len(mine) else (self.validation[0], 0)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        from commpress.model.judgement.quality import usual_loss

        y = next(each for each in torch.utils._pytree.tree_leaves(output) if isinstance(each, Tensor))
        return usual_loss(y, targets)(y, targets)

    def example(self) -> tuple[Tensor, ...]:
        return self.validation[0][0]

    def record(self) -> dict[str, Any]:
        counts = {"training": len(self.training), "held_out": len(self.validation)}
        return {"source": self.source, "bytes": self.fingerprint[0], "batches": counts}

    def told(self) -> str:
        return f"{len(self.training)} batches of {self.source}"

    def chosen(self, choice: "Choice") -> "Own":
        """Return the task with the plain model that a choice makes of this one's, which has choices."""
        from commpress.model.search import fixed

        return replace(self, made=fixed(self.made, choice))

    def narrowed(self, made: nn.Module) -> "Own":
        """The task whose model is what a budget left of this one's."""
        return replace(self, made=made, whole=self.made)


def module_of(factory: str) -> nn.Module:
    """Return the model of --model, on the CPU. Raises ValueError that names the flag."""
    found = called(factory, "--model")
    kind = type(found).__name__
    require(isinstance(found, nn.Module), f"--model {factory}: returns a {kind}, expected a torch.nn.Module")
    assert isinstance(found, nn.Module)
    return found.cpu()


def batches(function: str) -> tuple[list[Batch], list[Batch]]:
    """Return the training batches and the held-out ones of --data's function. Raises ValueError that names the flag."""
    from commpress.model.judgement.forms import batches_of

    found = called(function, "--data")
    require(
        isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(part, Iterable) for part in found),
        f"--data {function}: expected (training, held_out), batches (inputs, targets) both, got a {type(found).__name__}",
    )
    training, held_out = (batches_of(part, f"--data {function}") for part in found)
    return training, held_out


def require_named(folder: Path, what: str, said: str | None, given: str | None, flag: str) -> None:
    """Raise ValueError, with the flag, unless the caller names the function that a run's folder names: its code would run."""
    if said == given:
        return
    if said is None:
        raise ValueError(f"{flag} {given}: the {what} of the run in {folder} is commpress's own, expected no {flag}")
    got = "" if given is None else f", got {given}"
    raise ValueError(
        f"{flag}: the {what} of the run in {folder} is made by {said}, a function whose code runs; if you trust it, expected "
        f"{flag} {said}{got}"
    )


def data_named_by(folder: Path) -> str | None:
    """The module:function that made a run's batches; None for text, or if the run does not say it."""
    with contextlib.suppress(ValueError):
        found = _recorded(folder)
        return None if found["model"] is None else str(found["data"])
    return None


def held_out_of(folder: Path, given: str | None) -> Iterator[Batch]:
    """The held-out batches on which a run says its loss, or those of another text.

    `given` is the caller's --data: a text, or the function that the run names, which is called only then. Raises ValueError
    that names the file or the flag.
    """
    settings = _recorded(folder)
    said = settings["data"]
    if settings["model"] is not None:
        require_named(folder, "data", str(said), given, "--data")
        return iter(batches(str(said))[1])
    text = given if given is not None else said
    of_text = {name: settings[name] for name in ("context", "batch", "eval_batches")}
    task = read(Settings(data=None if text in (None, "None") else Path(text), **of_text))
    return (batch for batch, rows in task.held_out(0, 1) if rows)


def _recorded(folder: Path) -> dict[str, Any]:
    path = folder / "record.json"
    try:
        found = json.loads(path.read_text())["settings"]
        return {
            "model": found.get("model"),
            **{name: found[name] for name in ("data", "context", "batch", "eval_batches")},
        }
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a run's record.json: {type(error).__name__}: {error}") from None


def _fingerprint(found: Sequence[Batch]) -> tuple[int, int]:
    size, crc = 0, 0
    for inputs, targets in found:
        for x in (*inputs, targets):
            raw = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            size, crc = size + raw.nbytes, zlib.crc32(raw.data, crc)
    return size, crc
