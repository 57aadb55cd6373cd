"""The store of finished trials: an Optuna journal in a folder that all workers share, or this process's memory.

    journal.log      Optuna's journal of one study, "search": also `optuna-dashboard` reads it
    claims/          a file per trial; the worker that holds its lock runs it

Locks are the system's (flock): they end with the process that held them, however it ended. An interrupted trial has
written nothing, and is run again. If a file system locks on one machine only, several may run the same trial; the first
result counts.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from commpress.model.search.spaces import Space
from commpress.model.search.strategies import library
from commpress.model.search.trial import Tried

STUDY = "search"
KEY = "commpress"
"""The name of commpress's data among the attributes of trials and of the study."""


class Journal(Protocol):
    """The finished trials, and the claims of running ones."""

    def trials(self) -> dict[int, Tried]:
        """Return the trials by number, also those of other workers."""

    def add(self, tried: Tried) -> None:
        """Store a trial, unless there is one with its number."""

    def finals(self) -> dict[int, float]:
        """Return the qualities of finalists that were trained on their own, by number."""

    def add_final(self, number: int, quality: float) -> None:
        """Store the quality of a finalist."""

    def claim(self, what: str) -> contextlib.AbstractContextManager[bool]:
        """Return whether this worker may run a trial; no other may until the context ends."""


class Memory:
    """A journal without a folder: in one process, and lost at its end."""

    def __init__(self) -> None:
        self._trials: dict[int, Tried] = {}
        self._finals: dict[int, float] = {}

    def trials(self) -> dict[int, Tried]:
        return dict(self._trials)

    def add(self, tried: Tried) -> None:
        self._trials.setdefault(tried.number, tried)

    def finals(self) -> dict[int, float]:
        return dict(self._finals)

    def add_final(self, number: int, quality: float) -> None:
        self._finals.setdefault(number, quality)

    def claim(self, what: str) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)


class Folder:
    """A journal in a folder, made if necessary. Raises ValueError if a search with other settings began there."""

    def __init__(self, path: Path, space: Space, settings: Mapping[str, Any]) -> None:
        self._optuna = library()
        self._claims = path / "claims"
        self._claims.mkdir(parents=True, exist_ok=True)
        storages, file = self._optuna.storages, str(path / "journal.log")
        directions = ["maximize", "minimize"] if settings["weights"] is None else ["maximize"]
        self._objectives = len(directions)
        self._distributions = {
            name: self._optuna.distributions.CategoricalDistribution(of) for name, of in space.items()
        }
        level = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        try:
            with _locked(path / "study.lock", wait=True):
                lock = _JournalLock(path / "journal.log")
                lock.acquire()  # mend what a cut-off write has left before anybody reads
                lock.release()
                backend = storages.journal.JournalFileBackend(file, lock_obj=lock)
                storage = storages.JournalStorage(backend)
                known = STUDY in {study.study_name for study in storage.get_all_studies()}
                if known:
                    self._study = self._optuna.load_study(study_name=STUDY, storage=storage)
                    _require_same(path, self._study.user_attrs.get(KEY), settings)
                else:
                    self._study = self._optuna.create_study(study_name=STUDY, storage=storage, directions=directions)
                if self._study.user_attrs.get(KEY) is None:
                    self._study.set_user_attr(KEY, dict(settings))
        finally:
            self._optuna.logging.set_verbosity(level)

    def trials(self) -> dict[int, Tried]:
        found: dict[int, Tried] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if KEY in trial.user_attrs:
                tried = Tried.from_dict(trial.user_attrs[KEY])
                found.setdefault(tried.number, tried)
        return found

    def add(self, tried: Tried) -> None:
        if tried.number in self.trials():
            return
        states = self._optuna.trial.TrialState
        state = {"done": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[tried.state]
        weights = self._study.user_attrs[KEY]["weights"]
        values = None
        if tried.quality is not None:
            h = None if weights is None else weights["alpha"] * tried.quality - weights["beta"] * tried.size
            values = [tried.quality, tried.size] if h is None else [h]
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state,
                params=tried.choice,
                distributions=self._distributions,
                values=values,
                user_attrs={KEY: tried.to_dict()},
            )
        )

    def finals(self) -> dict[int, float]:
        found = self._study.user_attrs.items()
        return {int(key.split()[1]): float(value) for key, value in found if key.startswith("final ")}

    def add_final(self, number: int, quality: float) -> None:
        self._study.set_user_attr(f"final {number}", quality)

    def claim(self, what: str) -> contextlib.AbstractContextManager[bool]:
        return _locked(self._claims / what, wait=False)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a file's lock; False if another holds it and `wait` is false."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


class _JournalLock:
    """The lock of Optuna's journal: a killed process leaves no stale lock, and no half line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        self._handle = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        if self._path.exists() and (whole := _whole_lines(self._path)) < self._path.stat().st_size:
            os.truncate(self._path, whole)
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _whole_lines(path: Path) -> int:
    """Return the length of a file up to the end of its last whole line, in bytes."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _require_same(path: Path, there: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        here = json.loads(json.dumps(value))
        if there is not None and there.get(key) != here:
            raise ValueError(
                f"{path}: the search there has {key} {there.get(key)!r}, this one {here!r}: expected the same, "
                "or another folder"
            )
