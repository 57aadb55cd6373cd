"""A search of `auto` whose outcome a test writes down."""

from commpress.comm.guard import Guard
from commpress.comm.search import Search


class Scripted:
    """Has each step take the spec that stands at its place, and decides nothing."""

    checks, state, choices, holds = False, "chosen", (), False

    def __init__(self, *specs: str) -> None:
        self.specs, self.steps, self.guard = specs, 0, Guard(1.0)

    @property
    def spec(self) -> str:
        return self.specs[self.steps]

    @property
    def named(self) -> str:
        return self.specs[min(self.steps, len(self.specs) - 1)]

    choice = None
    kept = Search.kept

    def note(self, seconds: float, *figures: float | None, exchange: float | None = None) -> bool:
        self.steps += 1
        return False
