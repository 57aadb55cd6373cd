"""Ranks that search for a spec on a clock of the test's own."""

import random
from collections.abc import Callable, Mapping

from commpress.comm.said import Said
from commpress.comm.search import PLAIN, Search

SPECS = (PLAIN, "bf16", "int8", "int4")
Seconds = Callable[[str, int], float]
"""What a step of a spec takes, by the number of the step."""
Errors = Callable[[str, int], float]
"""How far the means of a spec are off, by the number of the step."""
Losses = Callable[[str, int, int], float | None]
"""The loss of a step by a spec, by the number of the step and the rank; None if the rank does not tell it."""


class World:
    """Ranks that search together; each has its own clock, on which a step may last a little longer or shorter."""

    def __init__(
        self,
        seconds: Seconds,
        ranks: int = 3,
        noise: float = 0.0,
        predicted: Mapping[str, float] | None = None,
        asked: float = 0.0,
        errors: Errors | None = None,
        period: Callable[[str], int] = lambda spec: 1,
        residuals: Errors | None = None,
        losses: Losses | None = None,
        codec: Callable[[str], str] = lambda spec: spec,
        exchanges: Seconds | None = None,
    ) -> None:
        self.seconds, self.noise, self.asked = seconds, noise, asked
        self.errors, self.residuals, self.losses, self.exchanges = errors, residuals, losses, exchanges
        said = dict.fromkeys(SPECS, 0.5) if predicted is None else predicted
        self.searches = [
            Search(lambda everyone, plain: {s: f * plain for s, f in said.items()}, period=period, codec=codec)
            for _ in range(ranks)
        ]
        self.random = random.Random(0)
        self.time = 0.0
        self.specs: list[str] = []
        self.asks = 0
        self.everyone: list[Said] | None = None
        """What the ranks say in the step that goes on."""

    def run(self, steps: int) -> "World":
        for _ in range(steps):
            specs = {search.spec for search in self.searches}
            assert len(specs) == 1  # or ranks would wait for each other for ever
            spec = specs.pop()
            took = self.seconds(spec, len(self.specs))
            self.specs.append(spec)
            self.time += took
            checked, step = self.searches[0].checks, len(self.specs)
            figures = [of(spec, step) if of and checked else None for of in (self.errors, self.residuals)]
            figures.append(self.exchanges(spec, step) if self.exchanges else None)
            for rank, search in enumerate(self.searches):
                if self.losses is not None and (loss := self.losses(spec, step, rank)) is not None:
                    search.note_loss(loss)
            if self.everyone is not None:
                everyone, self.everyone = self.everyone, None
                for search in self.searches:
                    search.compare(everyone)
                continue
            due = {search.note(took * self.random.uniform(1, 1 + self.noise), *figures) for search in self.searches}
            assert len(due) == 1
            if due.pop():
                self.asks += 1
                self.everyone = [{**search.said(), "asked": self.asked} for search in self.searches]
        return self

    @property
    def chosen(self) -> str:
        found = {search.choices[-1].spec for search in self.searches}
        assert len(found) == 1
        return found.pop()


def link(**seconds: float) -> Seconds:
    """Steps that take always the same, by spec."""
    return lambda spec, step: seconds[spec]


PAYS = link(none=0.7, bf16=0.45, int8=0.32, int4=0.3)
DOES_NOT = link(none=0.2, bf16=0.21, int8=0.22, int4=0.23)


def predicted(seconds: Seconds) -> dict[str, float]:
    return {spec: seconds(spec, 0) / seconds(PLAIN, 0) for spec in SPECS}


def hurts(since: int, until: int = 10**9) -> Errors:
    return lambda spec, step: 0.9 if spec == "int4" and since <= step < until else 0.1
