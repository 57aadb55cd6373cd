"""The size of a model, for g: parameters, or bytes of its stored file."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from commpress.model import stored


def parameters(model: nn.Module) -> int:
    """Return the number of parameters; a shared one counts once."""
    return sum(p.numel() for p in model.parameters())


def stored_bytes(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> int:
    """Return the length of the file that `commpress.model.stored.save` writes, in bytes. Raises the errors of `save`."""
    with tempfile.TemporaryDirectory(prefix="commpress-size-") as folder:
        path = Path(folder) / "model.safetensors"
        stored.save(path, model, masks=masks)
        return path.stat().st_size
