"""Judgement: what a small model costs and brings against the dense one, measured on the user's own batches.

    judgement = judge(dense, small, data, folder="out/")
    judgement.sentences                               # what helps and what does not, of the measured figures
    judgement.write("out/")                           # judgement.json, model_card.md

Each form of a model (`forms.py`) is loaded by its runtime (`runtimes.py`) in a process of its own. Dense and small are called
in turns there (`measuring.py`), on one thread and on all, and what they compute is compared here (`quality.py`).
"""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from commpress.files import write_atomically
from commpress.kernels.cpu.slices import cores
from commpress.model.judgement import content, targets
from commpress.model.judgement.card import model_card
from commpress.model.judgement.forms import Batch, Form, Side, arrays_of, batches_of, known_runtimes, side_of
from commpress.model.judgement.measuring import FormError, Process, Speed, in_turns
from commpress.model.judgement.quality import Loss, Quality
from commpress.model.judgement.runtimes import RUNTIMES
from commpress.model.judgement.words import sentences
from commpress.processor import processor

__all__ = ["FormError", "Judgement", "Loss", "judge"]

RECORD, CARD = "judgement.json", "model_card.md"


@dataclass(frozen=True)
class Judgement:
    """All measurements, as judgement.json has them."""

    record: dict[str, Any]

    @property
    def sentences(self) -> list[str]:
        """Return sentences on what the small model brings and what it does not, each with its figures."""
        found: list[str] = self.record["sentences"]
        return found

    @property
    def card(self) -> str:
        """The model card, Markdown."""
        return model_card(self.record)

    def write(self, folder: str | Path) -> None:
        """Write judgement.json and model_card.md. Raises OSError if that cannot be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=1, allow_nan=False) + "\n"
        write_atomically(folder / RECORD, lambda file: file.write(text.encode()))
        write_atomically(folder / CARD, lambda file: file.write(self.card.encode()))


def judge(
    dense: nn.Module | str | Path,
    small: nn.Module | str | Path,
    data: Iterable[tuple[Any, Tensor]],
    *,
    loss: Loss | None = None,
    runtimes: Sequence[str] | None = None,
    folder: str | Path | None = None,
) -> Judgement:
    """Measure the small model against the dense one. Each is a module on the CPU, or a folder that `commpress.model.export`
    wrote.

    `data` are held-out batches (inputs, targets), read once; inputs are a tensor or a tuple of tensors. Calls are timed with
    the inputs of the first batch, so its number of rows counts: one row times a single answer. `loss` takes outputs and
    targets; the default is cross entropy for integer targets, where predictions are compared as well, and squared error for
    others. A module may be prepared, converted or plain; it is written to `folder`/dense or `folder`/small in the formats of
    the runtimes. Without `folder` these files are removed. `runtimes` are some of "torch", "onnxruntime", "pt2e",
    "executorch", "integer", "litert" (default: all; of a folder not "pt2e", since loading a .pt2 runs code that is in it). A
    dense model has no form of integers alone: the small one's is compared with another form of it.

    A runtime that is not installed, or in which one of the two has no form, is left out, and the record says why; by default
    so is one that cannot run its form. Raises ValueError if none is left, without batches, or for outputs and targets that do
    not go together; FormError, a ValueError, for a form that a runtime which is asked for cannot run; DamagedFileError, a
    ValueError, for a file that is not as the export.json beside it says.
    """
    chosen, batches = known_runtimes(runtimes), batches_of(data, "judge(data)")
    of_dense = [runtime for runtime in chosen if RUNTIMES[runtime].dense]
    of_dense = of_dense or [runtime for runtime in RUNTIMES if RUNTIMES[runtime].dense]
    with tempfile.TemporaryDirectory(prefix="commpress-judge-") as scratch:
        where = Path(scratch) / "files" if folder is None else Path(folder)
        inputs = batches[0][0]
        sides = [
            side_of(name, model, asked, inputs, where / name, Path(scratch) / name, by_name=runtimes is not None)
            for name, model, asked in (("dense", dense, of_dense), ("small", small, chosen))
        ]
        rows = []
        for runtime in chosen:
            if (pair := _pair(runtime, *sides)) is None:
                continue
            try:
                rows.append(_row(runtime, pair, batches, loss))
            except FormError as error:
                if runtimes is not None:
                    raise
                sides[1].left_out[runtime] = str(error)
        if not rows:
            raise ValueError(f"judge: no runtime has a form of both models: {'; '.join(_reasons(sides))}")
        here = processor()
        record: dict[str, Any] = {
            "what": "judgement",
            "machine": {"processor": str(here), "cores": cores(), "torch": torch.__version__, "lscpu": here.to_dict()},
            "inputs": [list(x.shape) for x in inputs],
            "batches": len(batches),
            "rows": rows,
            "dense": content.of_side(sides[0]),
            "small": content.of_side(sides[1]),
            "left_out": _reasons(sides),
            "targets": targets.kernels(content.kinds(sides[1])),
            "forms": targets.forms(sides[1]),
        }
    return Judgement({**record, "sentences": sentences(record)})


def _pair(runtime: str, dense: Side, small: Side) -> list[Form] | None:
    """The forms that a runtime compares; None if there are not both."""
    if runtime not in small.forms or (RUNTIMES[runtime].dense and runtime not in dense.forms) or not dense.forms:
        return None
    return [dense.forms.get(runtime) or next(iter(dense.forms.values())), small.forms[runtime]]


def _row(runtime: str, forms: Sequence[Form], batches: Sequence[Batch], loss: Loss | None) -> dict[str, Any]:
    """All figures of one runtime."""
    inputs, quality = arrays_of(batches[0][0]), Quality()
    speeds: list[list[Speed]] = []
    for threads in sorted({1, cores()}) if RUNTIMES[runtime].dense else [1]:
        with contextlib.ExitStack() as stack:
            pair = [stack.enter_context(Process(form, inputs, threads)) for form in forms]
            for each in pair:
                each.load()
            if RUNTIMES[runtime].dense:
                speeds.append(in_turns(pair, threads))
            if quality.rows:
                continue
            for given, target in batches:
                outputs = [each.ask("outputs", arrays_of(given)) for each in pair]
                if not all(outputs):
                    raise ValueError(f"judge: {runtime} returns no tensor for a batch, expected outputs")
                one, other = (torch.from_numpy(each[0]) for each in outputs)
                quality.add(one, other, target.detach().cpu(), loss)
    found = {
        name: {"file": form.file.name, "bytes": form.bytes, "speeds": [asdict(each[i]) for each in speeds]}
        for i, (name, form) in enumerate(zip(("dense", "small"), forms, strict=True))
    }
    return {"runtime": runtime, **found, "quality": quality.to_dict()}


def _reasons(sides: Sequence[Side]) -> list[str]:
    """Why runtimes are left out, a sentence each."""
    found: dict[str, dict[str, list[str]]] = {}
    for side in sides:
        for runtime, why in side.left_out.items():
            found.setdefault(runtime, {}).setdefault(why, []).append(side.name)
    return [f"{runtime}, {' and '.join(names)}: {why}" for runtime, by in found.items() for why, names in by.items()]
