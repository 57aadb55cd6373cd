"""The text: what is read, what is held out, which windows are drawn."""

from pathlib import Path

import pytest
import torch

from commpress.launch import data


def test_the_standard_library_is_there_by_default() -> None:
    text = data.load(None)
    assert len(text.train) > 4e6
    assert len(text.validation) / len(text.train) == pytest.approx(1 / 19, rel=0.1)
    assert b"import " in bytes(text.train[:100_000].numpy())
    assert data.load(None).fingerprint == text.fingerprint


@pytest.mark.parametrize("n", [20, 1000, 20 * data.BLOCK, 3_000_001])
def test_the_parts_are_disjoint_and_make_up_the_whole(n: int) -> None:
    whole = torch.arange(n, dtype=torch.int32)  # each position its own value, so that parts can be told apart
    train, validation = data.split(whole)
    assert torch.equal(torch.cat([train, validation]).sort().values, whole)
    assert len(validation) == pytest.approx(n / 20, abs=data.BLOCK)
    assert len(validation) >= 1
    assert all(torch.equal(a, b) for a, b in zip(data.split(whole), (train, validation), strict=True))


def test_held_out_blocks_are_spread_over_the_text() -> None:
    _, validation = data.split(torch.arange(60 * data.BLOCK, dtype=torch.int32))
    assert (validation[:: data.BLOCK] // data.BLOCK).tolist() == [19, 39, 59]


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in (("c.txt", b"third"), ("b/x.md", b"second"), ("a.txt", b"first " * 5)):
        (tmp_path / name).write_bytes(content)
    for name, content in (("latin.txt", b"\xe9t\xe9"), ("zeros.bin", b"\0" * 9), ("none.txt", b""), (".git/x", b"no")):
        (tmp_path / name).write_bytes(content)
    text = data.load(tmp_path)
    whole = b"first " * 5 + b"\nsecond\nthird"
    assert (text.files, text.skipped, text.fingerprint[0]) == (3, 2, len(whole))
    assert sorted(bytes(torch.cat([text.train, text.validation]).numpy())) == sorted(whole)


def test_a_text_too_short_for_the_context(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 1000)
    text = data.load(path)
    data.require_context(text, 49)
    with pytest.raises(ValueError, match="the validation part has 50 bytes, --context 50 needs at least 51"):
        data.require_context(text, 50)


def test_windows_are_the_rank_s_own_and_the_same_every_time() -> None:
    text = torch.randint(256, (10_000,), dtype=torch.uint8)
    a, b, again = (data.sample(text, 4, 32, data.generator(1, rank)) for rank in (0, 1, 0))
    assert all(torch.equal(p, q) for p, q in zip(a, again, strict=True))
    assert not torch.equal(a[0], b[0])
    x, y = a
    assert x.shape == y.shape == (4, 32)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_a_sample_reaches_the_first_and_the_last_byte() -> None:
    x, y = data.sample(torch.arange(5, dtype=torch.uint8), 200, 3, data.generator(0, 0))
    assert x.min() == 0
    assert y.max() == 4


def test_validation_windows_cover_the_text() -> None:
    starts = data.validation_starts(torch.zeros(1000, dtype=torch.uint8), 10, 99)
    assert (len(starts), starts[0], starts[-1]) == (10, 0, 900)
    assert len(data.validation_starts(torch.zeros(100, dtype=torch.uint8), 10, 99).unique()) == 1
