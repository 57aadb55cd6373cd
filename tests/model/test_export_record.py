"""export.json: what a folder has of exports, and that a file which is damaged since is noticed and named."""

import json
from pathlib import Path

import pytest
import torch
from tiers import slow
from torch import nn

from commpress.files import DamagedFileError
from commpress.model import export, judge
from commpress.model.export import FORMATS, Exported, record
from commpress.model.judgement.runtimes import RUNTIMES

X, Y = torch.randn(4, 16), torch.randint(0, 8, (4,))


def made(folder: Path, *formats: str) -> Path:
    torch.manual_seed(0)
    export(nn.Sequential(nn.Linear(16, 8)), folder, formats=formats, example_inputs=(X,))
    return folder


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "one bit"])
@pytest.mark.parametrize("runtime", ["onnxruntime", slow("pt2e"), slow("executorch")])
def test_a_damaged_file_is_named_and_not_loaded(tmp_path: Path, runtime: str, how: str) -> None:
    name = RUNTIMES[runtime].format
    pytest.importorskip(RUNTIMES[runtime].needs[0])
    folder = made(tmp_path / "out", name)
    file = folder / FORMATS[name].FILE
    record.check(file)
    damage(file, how)
    with pytest.raises(
        DamagedFileError, match=rf"out/{file.name}: damaged, or not the file that was exported: its SHA-256"
    ):
        judge(folder, folder, [(X, Y)], runtimes=(runtime,))


@pytest.mark.parametrize("runtime", ["onnxruntime", "pt2e", "executorch", "integer"])
def test_every_runtime_is_given_the_file_that_was_recorded(tmp_path: Path, runtime: str) -> None:
    for package in RUNTIMES[runtime].needs:
        pytest.importorskip(package)
    name = RUNTIMES[runtime].format
    file = tmp_path / FORMATS[name].FILE
    file.write_bytes(bytes(1000))
    record.keep(tmp_path, "a test", [Exported(name, file, 1000, 0.0, record.sums(file))])
    damage(file, "one bit")
    with pytest.raises(DamagedFileError, match=rf"{file.name}: damaged"):
        judge(tmp_path, tmp_path, [(X, Y)], runtimes=(runtime,))


def test_the_record_has_a_row_for_each_file_that_is_there_by_whatever_call(tmp_path: Path) -> None:
    made(tmp_path, "safetensors")
    made(tmp_path, "pt2e")
    found = json.loads((tmp_path / record.RECORD).read_text())
    assert [row["format"] for row in found["rows"]] == ["safetensors", "pt2e"]
    for row in found["rows"]:
        assert row["sha256"] == record.sums(tmp_path / row["path"])
        assert list(row["sha256"]) == [row["path"]]
        assert row["of"] == "Sequential"
    (tmp_path / "model.pt2").unlink()
    made(tmp_path, "safetensors")
    assert [row["format"] for row in json.loads((tmp_path / record.RECORD).read_text())["rows"]] == ["safetensors"]


def test_a_format_that_cannot_be_written_anew_is_no_longer_in_the_record(tmp_path: Path) -> None:
    made(tmp_path, "safetensors")
    file = tmp_path / "integer.safetensors"
    file.write_bytes(b"of another model")
    record.keep(tmp_path, "another", [Exported("integer", file, 16, 0.0, record.sums(file))])
    with pytest.raises(ValueError, match="has no integer form"):
        made(tmp_path, "integer")
    assert [row["format"] for row in json.loads((tmp_path / record.RECORD).read_text())["rows"]] == ["safetensors"]


def test_files_of_a_folder_are_compared_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "transformers"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    record.keep(tmp_path, "a test", [Exported("torchao", folder, 28, 0.0, record.sums(folder))])
    record.check(folder)
    (folder / "more.py").write_text("print()")
    with pytest.raises(DamagedFileError, match=r"transformers/more.py: .* its SHA-256 is [0-9a-f]{16}, in .* missing"):
        record.check(folder)
    (folder / "more.py").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(DamagedFileError, match=r"transformers/config.json: .* its SHA-256 is missing, in"):
        record.check(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [3]}', '{"rows": [{"path": "model.onnx", "sha256": 3}]}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.onnx").write_text("a model")
    (tmp_path / record.RECORD).write_text(text)
    with pytest.raises(DamagedFileError, match=r"export.json: damaged, expected the record of an export"):
        record.check(tmp_path / "model.onnx")


def test_a_file_without_a_record_or_a_row_of_it_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("a model")
    record.check(tmp_path / "model.onnx")
    row = {"format": "onnx", "path": "model.onnx", "bytes": 7, "difference": 0.0}  # of a version that had no hashes
    (tmp_path / record.RECORD).write_text(json.dumps({"what": "export", "of": "a run", "rows": [row]}))
    record.check(tmp_path / "model.onnx")
    record.check(tmp_path / "model.pte")
