"""The benchmark of the codecs, on few values: a cell for each action, others beside them, and what it was taken on."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(FOLDER))
FEW = ("int4", "topk(0.1)|int4")


def benchmark() -> ModuleType:
    """`benchmarks/codecs.py`, whose name is one of Python's own modules."""
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location("benchmark_of_codecs", FOLDER / "codecs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_short_run_has_all_tables_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codecs, out = benchmark(), tmp_path / "codecs.json"
    monkeypatch.setattr(codecs, "SPECS", FEW)
    monkeypatch.setattr(sys, "argv", ["codecs.py", "--mb", "0.02", "--repeat", "1", "--json", str(out)])
    threads = torch.get_num_threads()
    codecs.main()
    torch.set_num_threads(threads)
    said, record = capsys.readouterr().out, json.loads(out.read_text())
    for words in (
        "memory copies",
        "GB/s of what must move",
        "others, one thread",
        "torch.quantize_per_tensor",
        "torch.topk",
    ):
        assert words in said
    assert said.splitlines()[-1].startswith("slowest dense codec, encode with feedback + decode: int4 ")
    assert (record["device"], record["values"]) == ("cpu", 5000)
    assert record["machine"].startswith(record["lscpu"]["name"])
    assert [row["spec"] for row in record["rows"]] == list(FEW)
    assert all(row[action] > 0 for row in record["rows"] for action in ("encode", "feedback", "momentum", "decode"))
    assert all(rate > 0 for row in record["rows"] for rate in row["bytes_per_second"].values())
