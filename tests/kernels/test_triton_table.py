"""Kernels for CUDA are found when they are first asked for; where Triton is missing, a warning says what that costs."""

import sys
from collections.abc import Iterator

import pytest

from commpress.kernels import table


@pytest.fixture(autouse=True)
def table_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    none_yet = {key: kernel for key, kernel in table.KERNELS.items() if key[2] != "cuda"}  # another test may have asked
    monkeypatch.setattr(table, "KERNELS", none_yet)
    table._add_triton.cache_clear()
    yield
    table._add_triton.cache_clear()


def test_without_triton_one_warning_says_that_codecs_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "commpress.kernels.triton", None)
    with pytest.warns(RuntimeWarning, match=r"no kernels for CUDA .* Install commpress\[cuda\]") as said:
        found = [table.lookup(op, "int8", "cuda") for op in ("encode", "mean")]
    assert found == [None, None]
    assert len(said) == 1


def test_each_codec_has_kernels_for_cuda() -> None:
    pytest.importorskip("triton")
    words = {str(word) for op, word, device in table.KERNELS if op == "encode" and device == "cpu"}
    assert words
    assert not {word for word in words if table.lookup("encode", word, "cuda") is None}
