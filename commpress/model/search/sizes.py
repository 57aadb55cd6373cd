"""How large a model is, for g: parameters, or bytes of the file that it leaves."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from commpress.model import stored


def parameters(model: nn.Module) -> int:
    """The number of parameters; one that is shared counts once."""
    return sum(p.numel() for p in model.parameters())


def stored_bytes(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> int:
    """The length of the file that `commpress.model.stored.save` writes, in bytes. Raises as that does."""
    with tempfile.TemporaryDirectory(prefix="commpress-size-") as folder:
        path = Path(folder) / "model.safetensors"
        stored.save(path, model, masks=masks)
        return path.stat().st_size
