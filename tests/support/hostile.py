"""Files that run code where they are read as pickles, for tests of what reads files from untrusted places."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Payload:
    """What a hostile pickle has in it: unpickled, it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made.absolute()),)


def hostile_pt2(path: Path, made: Path) -> None:
    """Write what torch.export.save writes, with a payload in the place of the example inputs."""
    program, pickled = io.BytesIO(), io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(32, 8), (torch.zeros(2, 32),)), program)
    torch.save(Payload(made), pickled)
    with zipfile.ZipFile(program) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, pickled.getvalue() if "sample_inputs" in name else good.read(name))
