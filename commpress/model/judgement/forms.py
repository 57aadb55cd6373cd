"""Forms of a model: the files that a folder has, or that are written of a module, and which runtime runs each."""

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from commpress.model import quantization
from commpress.model.export import FORMATS, export, record
from commpress.model.export.by_recipe import two_rows
from commpress.model.export.parts import layers_of
from commpress.model.judgement.runtimes import CODE, RUNTIMES
from commpress.model.ranges import quantizer_of
from commpress.model.stored import Stored, load

Batch = tuple[tuple[Tensor, ...], Tensor]
"""Inputs and targets."""
PICKLED = "module.pt"
"""What eager torch loads, in a folder that does not stay."""


@dataclass(frozen=True)
class Form:
    """A model as one runtime takes it."""

    runtime: str
    file: Path
    """What is on the disk, a file or a folder, whose bytes count."""
    runs: Path
    """What the runtime loads: `file`, or for eager torch the module with the values of it."""

    @property
    def bytes(self) -> int:
        """The size of the file, or of all files in the folder."""
        return size_of(self.file)


@dataclass
class Side:
    """The dense or the small model."""

    name: str
    forms: dict[str, Form] = field(default_factory=dict)
    """By runtime."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a runtime has no form."""
    stored: Path | None = None
    """The model.safetensors, if there is one."""
    content: Stored | None = None
    """The content of model.safetensors."""
    dynamic: frozenset[str] = frozenset()
    """Weights whose layers round their inputs by token; known of a module alone, no file tells it."""


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())


def known_runtimes(runtimes: Sequence[str] | None) -> list[str]:
    """Return the runtimes that are asked for, or all. Raises ValueError for an unknown one."""
    if isinstance(runtimes, str) or (runtimes is not None and (not runtimes or set(runtimes) - RUNTIMES.keys())):
        raise ValueError(f"judge(runtimes={runtimes!r}): expected some of {', '.join(RUNTIMES)}, as in ('torch',)")
    return list(dict.fromkeys(runtimes or RUNTIMES))


def missing_package(runtime: str) -> str | None:
    """The first package that a runtime needs and that is not installed."""
    return next((name for name in RUNTIMES[runtime].needs if importlib.util.find_spec(name) is None), None)


def side_of(
    name: str,
    model: nn.Module | str | Path,
    runtimes: Sequence[str],
    inputs: tuple[Tensor, ...],
    folder: Path,
    scratch: Path,
    by_name: bool = True,
) -> Side:
    """The forms of a module, written to `folder`, or of a folder of exported files. `scratch` does not stay.

    If the caller has named the runtimes, `by_name`, then files whose loading runs code are forms, too. Raises ValueError for a
    folder without such files; DamagedFileError, a ValueError, for a file that is not as export.json beside it says; and what
    export raises for a model that no format takes.
    """
    side = Side(name)
    usable = []
    for runtime in runtimes:
        if package := missing_package(runtime):
            side.left_out[runtime] = f"{package} is not installed"
        else:
            usable.append(runtime)
    if isinstance(model, nn.Module):
        _export(side, model, usable, inputs, folder, scratch)
    else:
        _find(side, Path(model), usable, by_name)
    return side


def _find(side: Side, folder: Path, runtimes: Sequence[str], by_name: bool) -> None:
    """The forms that are in a folder."""
    if not folder.is_dir():
        raise ValueError(f"judge({side.name}): {folder} is not a folder, expected one with the files of an export")
    files = {name: folder / form.FILE for name, form in FORMATS.items() if (folder / form.FILE).exists()}
    if not files:
        some = ", ".join(form.FILE for form in FORMATS.values())
        raise ValueError(f"judge({side.name}): found no exported model in {folder}, expected some of {some}")
    if "safetensors" in files:
        side.stored = files["safetensors"]
        record.check(side.stored)
        side.content = load(side.stored)
    for name in () if by_name else files.keys() - {each.format for each in RUNTIMES.values()}:
        side.left_out[name] = f"no runtime here takes {files[name].name}"
    for runtime in runtimes:
        file = files.get(RUNTIMES[runtime].format)
        if runtime == "torch":
            side.left_out[runtime] = "a folder of files has no module, expected the module itself"
        elif file is None:
            side.left_out[runtime] = f"no {FORMATS[RUNTIMES[runtime].format].FILE} in {folder}"
        elif RUNTIMES[runtime].runs_code and not by_name:
            side.left_out[runtime] = (
                f"loading {file.name} runs code of whoever wrote it; if you trust them ask for it by name, --runtimes {runtime}"
            )
        else:
            record.check(file)
            side.forms[runtime] = Form(runtime, file, file)


def _export(
    side: Side,
    model: nn.Module,
    runtimes: Sequence[str],
    inputs: tuple[Tensor, ...],
    folder: Path,
    scratch: Path,
) -> None:
    """Write a module in the format of each runtime. What cannot be written leaves a reason."""
    rounds = {module: layer for module, layer in layers_of(model).items() if layer.activations == "dynamic"}
    side.dynamic = frozenset(
        f"{name}.{its}" for name, module in model.named_modules() if module in rounds for its in rounds[module].weights
    )
    examples = two_rows(inputs)
    (file,) = export(model, folder, formats=("safetensors",), example_inputs=examples)
    side.stored, side.content = file.path, load(file.path)
    for runtime in runtimes:
        if runtime == "torch":
            try:
                scratch.mkdir(parents=True, exist_ok=True)
                made = plain(model, side.content)
                torch.save(made, scratch / PICKLED)
                torch.save(made.to("meta"), scratch / (PICKLED + CODE))
            except Exception as error:  # pickle raises what it likes
                side.left_out[runtime] = f"the module cannot be sent to another process: {_first_line(error)}"
                continue
            side.forms[runtime] = Form(runtime, file.path, scratch / PICKLED)
            continue
        try:
            (written,) = export(model, folder, formats=(RUNTIMES[runtime].format,), example_inputs=examples)
        except Exception as error:  # so does torch.export
            side.left_out[runtime] = f"{RUNTIMES[runtime].format} cannot be written: {_first_line(error)}"
            continue
        side.forms[runtime] = Form(runtime, written.path, written.path)


@torch.no_grad()
def plain(model: nn.Module, content: Stored) -> nn.Module:
    """A copy in evaluation that computes with the values of its file, in floats, and does not round inputs."""
    made = copy.deepcopy(model).eval()
    modules = dict(made.named_modules())
    new: dict[int, nn.Parameter] = {}
    for name, value in content.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if leaf in module._parameters:
            setattr(module, leaf, new.setdefault(id(value), nn.Parameter(value, requires_grad=False)))
        elif leaf in module._buffers:
            module._buffers[leaf] = value
    for module in modules.values():
        for quantizer in (getattr(module, "weight_fake_quantizer", None), quantizer_of(module)):
            if quantizer is not None:
                quantizer.enabled = False
    quantization.switch(made, dict.fromkeys(quantization.state_dict(made), False))
    return made


def arrays_of(inputs: Sequence[Tensor]) -> list[Any]:
    """The tensors as numpy has them."""
    return [x.detach().cpu().contiguous().numpy() for x in inputs]


def batches_of(data: Any, which: str) -> list[Batch]:
    """Batches (inputs, targets), inputs as a tuple. Raises ValueError that begins with `which` for anything else, or none."""
    found: list[Batch] = []
    for i, each in enumerate(data):
        if not isinstance(each, (tuple, list)) or len(each) != 2 or not isinstance(each[1], Tensor):
            raise ValueError(f"{which}: batch {i}: expected (inputs, targets), got a {type(each).__name__}")
        inputs = tuple(each[0]) if isinstance(each[0], (tuple, list)) else (each[0],)
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            kinds = ", ".join(type(x).__name__ for x in inputs) or "nothing"
            raise ValueError(f"{which}: batch {i}: expected inputs as a tensor or a tuple of tensors, got {kinds}")
        found.append((inputs, each[1]))
    if not found:
        raise ValueError(f"{which}: expected batches (inputs, targets), got none")
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
