"""What pruned weights that leave model.onnx save and cost: bytes, a call, and loading, against the same weights as zeros in it.

python benchmarks/pruned_onnx.py                # GPT of 3.3 M parameters, 70 % of its matrices pruned by magnitude
python benchmarks/pruned_onnx.py --amount 0.5

Both files run in processes of their own on one thread, loaded and called in turns. The outputs have to be equal, bit for bit.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from export import SHAPE, TEXT, WAYS, quantised
from rich.console import Console
from rich.table import Table
from torch import nn

from commpress.launch.model import GPT
from commpress.launch.run_record import machine
from commpress.model import export
from commpress.model.export import onnx_masks
from commpress.model.judgement.forms import Form
from commpress.model.judgement.measuring import Process, Speed, in_turns
from commpress.model.sensitivity import pruned_mask

CHOSEN = ("float32", "int8, static", "int8 weights", "int4 weights, groups of 32")
LOADS = 5


@dataclass(frozen=True)
class Row:
    """A file and what was measured of it."""

    bytes: int
    speed: Speed
    loading: float
    """Seconds, the median."""


def pruned(amount: float) -> nn.Module:
    """A GPT of random weights without the smallest of each matrix."""
    model = GPT(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(pruned_mask(p, amount))
    return model


def loading_seconds(path: Path) -> float:
    """Seconds until a session is there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    start = time.perf_counter()
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return time.perf_counter() - start


def measured(way: str, amount: float, folder: Path) -> tuple[Row, Row]:
    """The file with zeros, and that with masks."""
    model, files, least = quantised(lambda: pruned(amount), TEXT, WAYS[way]), [], onnx_masks.LEAST_SAVED
    for name, share in (("zeros", 1.0), ("masks", least)):
        onnx_masks.LEAST_SAVED = share  # nothing saves all of its bytes, so zeros stay
        files += export(model, folder / way / name, formats=("onnx",), example_inputs=(TEXT,))
    forms = [Form("onnxruntime", each.path, each.path) for each in files]
    times = [[loading_seconds(each.path) for each in files] for _ in range(LOADS)]
    with Process(forms[0], [TEXT.numpy()], 1) as one, Process(forms[1], [TEXT.numpy()], 1) as other:
        speeds = in_turns([one, other], 1)
        (y,), (z,) = (each.ask("outputs", [TEXT.numpy()]) for each in (one, other))
    if not np.array_equal(y, z):
        raise SystemExit(f"{way}: the outputs are not the same")
    loads = [statistics.median(each) for each in zip(*times, strict=True)]
    zeros, masks = (Row(*each) for each in zip((each.bytes for each in files), speeds, loads, strict=True))
    return zeros, masks


def main() -> None:
    """Export, time and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--amount", type=float, default=0.7)
    amount = options.parse_args().amount
    torch.set_num_threads(1)
    table = Table(
        title=f"{amount:.0%} pruned, zeros and masks in model.onnx, {machine(torch.device('cpu'))['processor']}"
    )
    for name in ("", "MB", "", "smaller", "ms a call", "", "s to load", "", "MB to load", ""):
        table.add_column(name, justify="right" if table.columns else "left")
    with tempfile.TemporaryDirectory() as folder:
        for way in CHOSEN:
            both = measured(way, amount, Path(folder))
            table.add_row(
                way,
                *(f"{each.bytes / 1e6:.2f}" for each in both),
                f"{both[0].bytes / both[1].bytes:.2f}x",
                *(f"{1e3 * each.speed.median:.2f}" for each in both),
                *(f"{each.loading:.2f}" for each in both),
                *(f"{(each.speed.loading_bytes or 0) / 1e6:.0f}" for each in both),
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
