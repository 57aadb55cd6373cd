"""The cache of compiled loops: kept where it can be, believed where it is whole, and never the reason why a run ends."""

import contextlib
import importlib.util
import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile
from tiers import slowly

from commpress.kernels import compiled

SOURCE = '''
from commpress.kernels.compiled import loop

@loop
def times(x, factor):
    """x <- factor * x."""
    for i in range(x.size):
        x[i] *= factor
'''

_names = (f"loops_{i}" for i in itertools.count())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, of which nothing has been said."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "_said", set())
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with one loop. Python keeps no bytecode of it: on a full disk it would keep a part, and fail on that."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "source" / "looped.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def loaded(source: Path) -> ModuleType:
    """The module as a new process sees it: nothing is compiled."""
    spec = importlib.util.spec_from_file_location(next(_names), source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_loop(source: Path, factor: float = 3.0) -> tuple[bool, list[str]]:
    """Run the loop as a new process does, see that it computes right: was it in the cache, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        times = loaded(source).times
        x = np.arange(5, dtype=np.float32)
        times(x, np.float32(factor))
    assert x.tolist() == [factor * i for i in range(5)]
    return bool(times.stats.cache_hits), [str(w.message) for w in caught]


def files(folder: Path) -> list[Path]:
    """What is in the cache; no file is left half written."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    assert not [path for path in found if ".tmp." in path.name]
    return found


def shorten(path: Path) -> None:
    """Cut half of a file off."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, bit: int | None = None) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    place = 4 * len(content) if bit is None else bit
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def swap_for_folder(path: Path) -> None:
    """Put a folder in the place of a file: root may read any file, but not that."""
    path.unlink()
    path.mkdir()


def another_format(path: Path) -> None:
    """What another version of Numba would have written itself."""
    path.write_bytes(pickle.dumps("0.99.0") + b"a format of which nothing is known")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": shorten,
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(1000)),
    "one bit": flip,
    "a pickle that fails": lambda path: path.write_bytes(pickle.dumps(1)[:-1]),
    "another format": another_format,
}


def test_a_loop_is_compiled_once_and_found_by_the_next_process(folder: Path, source: Path) -> None:
    assert run_loop(source) == (False, [])
    assert [path.suffix for path in files(folder)] == [".nbc", ".nbi"]
    assert run_loop(source) == (True, [])


@pytest.mark.parametrize("damage", slowly(DAMAGE, quick=("truncated", "one bit", "a pickle that fails")))
def test_a_damaged_cache_is_made_anew_with_one_warning_that_names_the_folder(
    folder: Path, source: Path, damage: str
) -> None:
    run_loop(source)
    for which in (".nbi", ".nbc", ".nb"):
        for path in files(folder):
            if path.suffix.startswith(which):
                DAMAGE[damage](path)
        compiled._said.clear()
        hit, said = run_loop(source)
        assert not hit, which
        assert len(said) == 1, which
        assert str(folder) in said[0]
        assert "damaged" in said[0]
        assert run_loop(source) == (True, []), which


def test_a_flipped_bit_anywhere_is_found(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_loop(source)
    index, data = sorted(files(folder), key=lambda path: path.suffix, reverse=True)
    whole = {path: path.read_bytes() for path in (index, data)}
    draw = random.Random(1)
    for path, content in whole.items():
        places = [*range(8 * 8), *(draw.randrange(8 * len(content)) for _ in range(200))]
        cache = compiled.CheckedFiles(path.parent, path.name.split(".checked")[0], None)
        for place in places:
            monkeypatch.setattr(compiled, "_said", set())
            flip(path, place)
            in_versions = len(compiled.KIND) <= place // 8 < len(compiled.VERSIONS)  # then it is taken for an older one
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert cache._read(path.name) is None
            assert in_versions or len(caught) == 1, place
            path.write_bytes(content)
    assert run_loop(source) == (True, [])


def test_code_for_another_key_is_not_run(folder: Path, source: Path) -> None:
    # two ranks that compile for different signatures at the same time may choose one name
    run_loop(source)
    _, data = sorted(files(folder), key=lambda path: path.suffix, reverse=True)
    other = loaded(source).times
    x = np.arange(3, dtype=np.float64)
    other(x, 2.0)
    _, first, second = sorted(files(folder), key=lambda path: (path.suffix == ".nbc", path.name))
    assert data == first
    shutil.copy(second, first)
    assert run_loop(source) == (False, [])
    assert run_loop(source) == (True, [])


def test_another_version_or_another_source_is_compiled_anew_in_silence(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_loop(source)
    with monkeypatch.context() as older:
        older.setattr(compiled, "VERSIONS", compiled.KIND + b"numba 0.99.0, llvmlite 0.99.0, numpy 9.0.0\n")
        assert run_loop(source) == (False, [])
    assert run_loop(source) == (False, [])
    assert run_loop(source) == (True, [])
    source.write_text(SOURCE.replace("factor * x.", "f * x."))
    assert run_loop(source) == (False, [])
    assert run_loop(source) == (True, [])


def test_files_of_numbas_own_format_are_left_alone(folder: Path, source: Path) -> None:
    stock = numba.njit(cache=True)(loaded(source).times.py_func)
    stock(np.arange(5, dtype=np.float32), np.float32(2))
    before = {path: path.read_bytes() for path in files(folder)}
    assert run_loop(source) == (False, [])
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("which", [".nbi", ".nbc"])
def test_a_file_that_can_neither_be_read_nor_replaced_costs_a_warning_each(
    folder: Path, source: Path, which: str
) -> None:
    run_loop(source)
    for path in files(folder):
        if path.suffix == which:
            swap_for_folder(path)
    hit, said = run_loop(source)
    assert not hit
    assert len(said) == 2
    assert "cannot be read" in said[0]
    assert "compiled in every run" in said[1]
    assert all(str(folder) in text for text in said)
    assert run_loop(source) == (False, [])  # it has been said


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_costs_one_warning(folder: Path, source: Path) -> None:
    with full_disk():
        hit, said = run_loop(source)
        again = run_loop(source)
    assert not hit
    assert len(said) == 1
    assert str(folder) in said[0]
    assert "NUMBA_CACHE_DIR" in said[0]
    assert files(folder) == []
    assert again == (False, [])


def test_no_folder_that_can_be_written_costs_one_warning(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nobody, root neither, can make a folder below a file
    (source.parent / "__pycache__").write_text("")
    (source.parent / "file").write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(source.parent / "file" / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "file"))
    hit, said = run_loop(source)
    assert not hit
    assert len(said) == 1
    assert str(source.parent / "file" / "cache") in said[0]
    assert str(source.parent / "__pycache__") in said[0]
    assert run_loop(source) == (False, [])


def test_loops_run_without_the_compiler(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    x = np.arange(3, dtype=np.float32)
    loaded(source).times(x, np.float32(2))
    assert x.tolist() == [0, 2, 4]


def test_the_check_replaces_what_numba_uses(folder: Path, source: Path) -> None:
    cache = loaded(source).times._cache
    assert isinstance(cache._cache_file, compiled.CheckedFiles)
    assert {"load", "save", "flush"} <= set(vars(IndexDataCacheFile)) & set(vars(compiled.CheckedFiles))
