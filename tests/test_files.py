"""Files on disk: written whole or not at all, and any damage is one error with the file's name."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from commpress.files import DamagedFileError, load_state, pack_state, save_state, unpack_state, write_atomically
from commpress.launch import checkpoint

STATE = {
    "step": 7,
    "weights": torch.arange(600.0).view(20, 30),
    "nested": {"bits": torch.ones(5, dtype=torch.uint8), "texts": ["a", "b"], "nothing": None, "share": 0.5},
}


def damages(whole: bytes, count: int) -> Iterator[bytes]:
    """Bit flips from the first to the last byte, then cuts, zeros, exchanged parts and bytes too many."""
    draw = random.Random(0)
    size = len(whole)
    for i in range(count):
        place = i * (size - 1) // (count - 1)
        yield whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]
    for _ in range(20):
        start, end = sorted(draw.sample(range(size), 2))
        yield whole[:start]
        yield whole[:start] + whole[end:]
        if any(whole[start:end]):
            yield whole[:start] + bytes(end - start) + whole[end:]
        yield whole[:start] + draw.randbytes(end - start) + whole[end:]
        yield whole + draw.randbytes(end)
    yield b""


def test_a_state_comes_back_and_torch_reads_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    for loaded in (load_state(path), torch.load(path, weights_only=True), unpack_state(pack_state(STATE), path)):
        assert loaded.keys() == STATE.keys()
        assert torch.equal(loaded["weights"], STATE["weights"])
        assert loaded["nested"]["texts"] == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_any_damage_to_a_state_is_noticed_and_the_file_named(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    for number, damaged in enumerate(damages(path.read_bytes(), 600)):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError) as error:
            load_state(path)
        assert str(error.value).startswith(f"{path}: "), number
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "nowhere")


def test_any_damage_to_a_state_within_another_file_is_noticed() -> None:
    whole = pack_state(STATE)
    for damaged in damages(whole.numpy().tobytes(), 200):
        with pytest.raises(DamagedFileError, match=r"^other: "):
            unpack_state(torch.frombuffer(bytearray(damaged), dtype=torch.uint8) if damaged else torch.ones(0), "other")
    for no_bytes in (None, whole.int(), whole.view(1, -1), b"text"):
        with pytest.raises(DamagedFileError, match=r"^other: "):
            unpack_state(no_bytes, "other")


def test_what_torch_refuses_to_load_is_damage_too(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    for state in (Path, print):  # no weights: it would run code
        save_state(path, state)
        with pytest.raises(DamagedFileError, match="damaged: Weights only load failed"):
            load_state(path)
    torch.save(STATE, path)
    with pytest.raises(DamagedFileError, match="no checksum at its end"):
        load_state(path)


def test_any_damage_to_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    shared_part = dict.fromkeys(checkpoint.NEEDED[checkpoint.SHARED], STATE) | {"step": 7}
    checkpoint.write(tmp_path, 7, 0, shared_part, dict.fromkeys(checkpoint.NEEDED["session"], STATE) | {"step": 7})
    checkpoint.publish(tmp_path, 7)
    folder = tmp_path / "step-00000007"

    def shared() -> dict[str, Any]:
        return checkpoint.load_shared(tmp_path)

    for path in (tmp_path / "latest", folder / "checkpoint.pt", folder / "session-rank0.pt"):
        whole = path.read_bytes()
        assert checkpoint.load_shared(tmp_path)["step"] == checkpoint.load_own(tmp_path, 7, 0)["step"] == 7
        for damaged in damages(whole, min(200, len(whole))):
            path.write_bytes(damaged)
            load = (lambda: checkpoint.load_own(tmp_path, 7, 0)) if "rank0" in path.name else shared
            with pytest.raises(ValueError, match=rf"{path}|step-\d*/checkpoint.pt is missing"):
                load()
        path.write_bytes(whole)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_state(path, {"what": io.BytesIO().getbuffer()})  # cannot be pickled
    assert load_state(path)["step"] == 7

    def torn(f: BinaryIO) -> None:
        f.write(b"half of it")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, torn)
    assert load_state(path)["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_an_error_names_the_file_that_was_to_be_written_and_not_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken", tmp_path / "absent" / "state.pt"):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            save_state(path, STATE)
        assert caught.value.filename == str(path)
        assert ".part" not in str(caught.value)
