"""What a recipe's [export] names, written when its run is over."""

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from commpress.model import layers
from commpress.model.distillation import PROJECTIONS
from commpress.model.export import FORMATS, Exported, export, record
from commpress.model.recipe import Export


def export_by(
    section: Export, model: nn.Module, folder: Path, example_inputs: tuple[Any, ...]
) -> tuple[list[Exported], list[str]]:
    """Write the formats of `section`, each by itself, and export.json last: the files, and a sentence for each that cannot be.

    `model` is whole, on any device, `folder` that of the run. A single row of inputs is doubled. What an earlier run left of a
    format is removed first, and the projections of a distillation are left out.

    Raises OSError, with all sentences, in the end, if one format met an OSError or had no memory: once more it may be written.
    """
    out, written, failed, for_now = folder / section.folder, list[Exported](), list[str](), False
    plain = whole_copy(model)
    inputs = tree_map_only(Tensor, lambda x: x.detach().cpu(), example_inputs)
    for name in dict.fromkeys(section.formats):
        try:
            record.forget(out, name)
            _remove(out / FORMATS[name].FILE)
            written += export(plain, out, formats=(name,), example_inputs=two_rows(inputs))
        except Exception as error:  # torch.export raises what it likes
            said = f"{error}".strip().splitlines() or [""]
            failed.append(f"{name} cannot be written: {type(error).__name__}: {said[0][:200]}")
            for_now = for_now or isinstance(error, (OSError, MemoryError))
    record.keep(out, str(folder), written, failed=failed)
    if for_now:
        raise OSError("; ".join(failed))
    return written, failed


def whole_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU, not compiled, without the projections of a distillation."""
    made = copy.deepcopy(layers.uncompiled(model)).cpu()
    if hasattr(made, PROJECTIONS):
        delattr(made, PROJECTIONS)
    return made


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def two_rows(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, a single row doubled: tracing takes a size of 1 for one that never changes."""
    first = next((x for x in inputs if isinstance(x, Tensor)), None)
    if first is None or not first.dim() or first.shape[0] != 1:
        return inputs
    return tree_map_only(Tensor, lambda x: x.repeat(2, *[1] * (x.dim() - 1)) if x.dim() and len(x) == 1 else x, inputs)  # type: ignore[no-any-return]
