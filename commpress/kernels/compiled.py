"""Loops in Numba, compiled on first use and kept on disk. A file found there is checked before its code is run.

Numba's own cache unpickles, links and runs whatever its files hold: an empty file ends the program with an EOFError, a
flipped bit may change a result. Here a file is

    [ versions, a line of text ][ SHA-256 of the rest ][ pickle ]

and the pickle holds the code with the key (signature, processor, bytes of the function) that it was compiled for. A damaged
file is compiled and written again. If nothing can be written, every run compiles. Both give one warning that names the folder.
Files are replaced as a whole, so ranks may compile at the same time.
"""

import contextlib
import hashlib
import os
import pickle
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import llvmlite  # type: ignore[import-untyped]
import numba
import numpy as np
from numba import njit
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps
from numba.extending import intrinsic, overload

F = TypeVar("F", bound=Callable[..., Any])

KIND = b"loops of commpress, "
VERSIONS = KIND + f"numba {numba.__version__}, llvmlite {llvmlite.__version__}, numpy {np.__version__}\n".encode()
ELSEWHERE = "Make room there, or set NUMBA_CACHE_DIR to a folder that can be written"
DIGEST = hashlib.sha256().digest_size

_said: set[tuple[str, str]] = set()
"""The warnings given so far: a folder and the kind of warning."""


def loop(function: F) -> F:
    """Compile on first call, GIL released; kept on disk where that can be written, else compiled in every run."""
    compiled: Any = njit(nogil=True, error_model="numpy")(function)
    if hasattr(compiled, "_cache"):  # under NUMBA_DISABLE_JIT it is the function itself
        compiled._cache = _cache_of(function)
    return compiled  # type: ignore[no-any-return]


def summing_loop(function: F) -> F:
    """Compile a loop as `loop` does, but allow its sums to be reordered, so that they are vectorised."""
    compiled: Any = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(function)
    if hasattr(compiled, "_cache"):
        compiled._cache = _cache_of(function)
    return compiled  # type: ignore[no-any-return]


def part(function: F) -> F:
    """Compile a function that is inlined into every loop that calls it."""
    return njit(nogil=True, error_model="numpy", forceinline=True)(function)  # type: ignore[no-any-return]


def by_type(function: F) -> F:
    """Make an inlined function that depends on its argument types: `function` gets the types and returns the code for them."""

    def generic(*arguments: Any) -> Any:
        raise TypeError(f"{function.__name__} runs in compiled loops only")

    function.__annotations__ = {}  # Numba compares the signatures of both
    generic.__name__, generic.__doc__ = function.__name__, function.__doc__
    options = {"nogil": True, "error_model": "numpy", "forceinline": True}
    overload(generic, jit_options=options)(function)
    return generic  # type: ignore[return-value]


def instruction(function: F) -> F:
    """Make an inlined function in LLVM's IR: `function` gets types, and returns a signature and a code generator."""
    return intrinsic(function)  # type: ignore[no-any-return]


class CheckedCache(FunctionCache):  # type: ignore[misc]  # Numba has no types
    """Numba's cache of one function, on files that are checked. A damaged file never raises an error."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = CheckedFiles(Path(self.cache_path), self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function for a signature; None if it must be compiled."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn_damaged(Path(self.cache_path), self._impl.filename_base, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a compiled function, if its folder can be written."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            why = f"cannot be written ({_named(error)})"
            _warn(self.cache_path, "written", f"{why}: the loops are compiled in every run. {ELSEWHERE}")


class CheckedFiles:
    """The files of one function's cache: an index, and one for each signature.

    `stamp` says which source was compiled: any value that can be pickled and compared.
    """

    def __init__(self, folder: Path, base: str, stamp: object) -> None:
        self._folder, self._base, self._stamp = folder, base, stamp

    def load(self, key: object) -> Any:
        """Return the data that `save` got for this key; None if there is none, or if its file is damaged."""
        name = self._index().get(key)
        found = None if name is None else self._read(name)
        # two ranks that compile different signatures at the same time may both have used one name
        return None if found is None or found[:2] != (self._stamp, key) else found[2]

    def save(self, key: object, data: object) -> None:
        """Write `data`. Raises OSError if it cannot be written."""
        index = self._index()
        if key not in index:
            taken = set(index.values())
            index[key] = next(name for i in range(1, len(taken) + 2) if (name := self._name(i)) not in taken)
            self._write(self._name(), (self._stamp, index))
        self._write(index[key], (self._stamp, key, data))

    def flush(self) -> None:
        """Remove all entries from the index."""
        self._write(self._name(), (self._stamp, {}))

    def _name(self, number: int | None = None) -> str:
        return f"{self._base}.checked.nbi" if number is None else f"{self._base}.checked.{number}.nbc"

    def _index(self) -> dict[object, str]:
        """Return the names of the data files by key; empty if the source has changed."""
        found = self._read(self._name())
        return dict(found[1]) if found is not None and found[0] == self._stamp else {}

    def _read(self, name: str) -> Any:
        """Return the object in a file; None if the file is missing, of other versions, or damaged, which gives a warning."""
        try:
            content = (self._folder / name).read_bytes()
            if not content.startswith(VERSIONS):
                if content.startswith(KIND):
                    return None
                raise ValueError(f"{len(content)} bytes without the line that it must begin with")
            body = content[len(VERSIONS) + DIGEST :]
            if hashlib.sha256(body).digest() != content[len(VERSIONS) :][:DIGEST]:
                raise ValueError("its checksum does not fit")
            return pickle.loads(body)
        except FileNotFoundError:
            return None
        except Exception as error:
            _warn_damaged(self._folder, name, error)
            return None

    def _write(self, name: str, what: object) -> None:
        body = dumps(what)
        path = self._folder / name
        beside = path.with_name(f"{name}.tmp.{uuid.uuid4().hex[:16]}")
        try:
            beside.write_bytes(VERSIONS + hashlib.sha256(body).digest() + body)
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


class NoCache(NullCache):  # type: ignore[misc]
    """The cache of a function if no folder can be written: it keeps nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        folder = Path(function.__code__.co_filename).with_name("__pycache__")
        self._tried = ", ".join(filter(None, [numba.config.CACHE_DIR, str(folder), "the user's cache folder"]))

    def save_overload(self, sig: Any, data: Any) -> None:
        """Warn, once, that nothing is kept."""
        _warn(self._tried, "written", f"cannot be written: the loops are compiled in every run. {ELSEWHERE}")


def _cache_of(function: Callable[..., Any]) -> Any:
    try:
        return CheckedCache(function)
    except (RuntimeError, OSError):  # Numba found no folder that it may write
        return NoCache(function)


def _warn_damaged(folder: Path, name: str, error: Exception) -> None:
    _warn(str(folder), "damaged", f"{name} is damaged or cannot be read ({_named(error)}): compiled anew")


def _warn(folder: str, kind: str, text: str) -> None:
    if (folder, kind) not in _said:
        _said.add((folder, kind))
        warnings.warn(f"commpress: the cache of compiled loops in {folder}: {text}", RuntimeWarning, stacklevel=2)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
