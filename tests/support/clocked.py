"""Seconds of steps that a test writes down, in the place of those that ranks measure."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from commpress.comm.auto import Auto
from commpress.comm.said import Said
from commpress.comm.search import Search


@contextlib.contextmanager
def by_clock(seconds: Callable[[str], float], kind: type = Auto) -> Iterator[None]:
    """While the block runs, the steps of a candidate take these seconds, and the model of a `kind` of auto predicts so."""
    predict = kind._predicted  # type: ignore[attr-defined]

    def predicted(auto: Any, everyone: Sequence[Said], plain: float) -> Mapping[str, float]:
        return {name: seconds(name) for name in predict(auto, everyone, plain)}  # it keeps its model, for the receipt

    with (
        mock.patch.object(Search, "medians", lambda self: {spec: seconds(spec) for spec in self._seconds}),
        mock.patch.object(
            Search, "turns", lambda self: {spec: [seconds(spec)] * (self._round + 1) for spec in self._seconds}
        ),
        mock.patch.object(kind, "_predicted", predicted),
    ):
        yield
