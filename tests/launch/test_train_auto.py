"""`train --compress auto`, on two ranks: the run ends with its receipt."""

from pathlib import Path

import pytest
from commands import Ended, ended, run_command
from ranks import run

from commpress.launch import train

MODEL = {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 2, "eval_every": 0, "threads": 1}


def trained(folder: Path) -> Ended:
    settings = train.Settings(**MODEL, steps=45, compress="auto", data=folder / "text.txt", out=folder / "run")
    return ended(lambda: train.train(settings))


def test_a_run_with_auto_ends_with_its_receipt(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 100)
    said = run(2, trained, tmp_path)[0]
    assert said.code == 0
    last = [line for line in said.out.splitlines() if line.startswith(("commpress auto", "commpress: ", "commpress "))][
        -1
    ]
    assert "both measured in this run" in last or "compression does not pay here, it is off" in last
    assert said.out.rstrip().splitlines()[-1].startswith(("sent ", "not compressed: "))


@pytest.mark.parametrize("flags", [("--parallel", "fsdp"), ("--optimizer", "OneBitAdamW")], ids=" ".join)
def test_auto_is_for_ddp_with_a_plain_optimizer(tmp_path: Path, flags: tuple[str, str]) -> None:
    refused = run_command("train", "--compress", "auto", *flags, "--out", tmp_path / "refused")
    assert refused.code == 1
    assert "--compress auto: expected --parallel ddp and --optimizer AdamW or SGD" in refused.err
