"""A search space: options by name, and choices that count only with others.

    Space({"bits": (None, 8, 4), "group": (None, 32)}, {"group": {"bits": (8, 4)}})     # a group counts if there are bits

A choice gives every name one of its options. Two choices that differ only in names that do not count are the same:
`canonical` gives such a name its first option.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

Option = str | int | float | bool | None
PLAIN = (str, int, float, bool, type(None))
"""Types of options: a file must return them unchanged."""
Choice = dict[str, Option]
"""The chosen option of each choice, by name."""


class Space(Mapping[str, tuple[Option, ...]]):
    """Options by name, in a fixed order, and for each name the options of earlier names under which it counts.

    Raises ValueError for a space or a name without options, options that appear twice or are not plain text, number, truth
    value or None (one of NumPy's, say, or NaN), and for a condition that no choice can meet.
    """

    def __init__(
        self,
        options: Mapping[str, Sequence[Option]],
        conditions: Mapping[str, Mapping[str, Sequence[Option]]] | None = None,
    ) -> None:
        self._options = {name: tuple(of) for name, of in options.items()}
        self.conditions = {
            name: {other: tuple(of) for other, of in (conditions or {}).get(name, {}).items()} for name in self._options
        }
        if not self._options:
            raise ValueError("space: there is nothing to choose, expected options by name")
        for name, of in self._options.items():
            if not of or isinstance(options[name], str):
                raise ValueError(f"space {name!r}: expected a list of options, got {options[name]!r}")
            if bad := [option for option in of if type(option) not in PLAIN or option != option]:
                raise ValueError(
                    f"space {name!r}: the option {bad[0]!r} is a {type(bad[0]).__name__}, expected a plain str, int, float or "
                    "bool, or None, and no NaN"
                )
            if len({(type(option), option) for option in of}) < len(of):
                raise ValueError(f"space {name!r}: an option appears twice in {_listed(of)}")
        before: set[str] = set()
        for name, needed in self.conditions.items():
            for other, of in needed.items():
                if other not in before:
                    raise ValueError(f"space {name!r}: depends on {other!r}, expected the name of an earlier choice")
                if not of or not all(_among(option, self._options[other]) for option in of):
                    raise ValueError(
                        f"space {name!r}: depends on {other!r} being one of {_listed(of)}, expected some of "
                        f"{_listed(self._options[other])}"
                    )
            before.add(name)
        for name in (conditions or {}).keys() - self._options.keys():
            raise ValueError(f"space: a condition for {name!r}, which is not one of its names: {_listed(tuple(self))}")

    def __getitem__(self, name: str) -> tuple[Option, ...]:
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def __or__(self, other: "Space") -> "Space":
        """Return both spaces together. Raises ValueError for a name that both have."""
        if both := [name for name in self if name in other]:
            raise ValueError(f"space {both[0]!r}: is in both spaces, expected names of their own")
        return Space({**self, **other}, {**self.conditions, **other.conditions})

    def __repr__(self) -> str:
        return f"Space({self._options!r})"

    def check(self, choice: Mapping[str, Option], whole: bool = True) -> None:
        """Raise ValueError for an unknown name or option, and with `whole` for a name that has none."""
        for name, option in choice.items():
            if name not in self:
                raise ValueError(f"choice {name!r}: unknown name, expected one of {_listed(tuple(self))}")
            if not _among(option, self[name]):
                raise ValueError(f"choice {name!r}: expected one of {_listed(self[name])}, got {option!r}")
        if whole and (missing := [name for name in self if name not in choice]):
            raise ValueError(f"choice {missing[0]!r}: missing, expected one of {_listed(self[missing[0]])}")

    def counting(self, choice: Mapping[str, Option]) -> list[str]:
        """Return the names that count in a whole choice."""
        found: dict[str, None] = {}
        for name in self:
            needed = self.conditions[name]
            if all(other in found and _among(choice[other], of) for other, of in needed.items()):
                found[name] = None
        return list(found)

    def canonical(self, choice: Mapping[str, Option]) -> Choice:
        """Return a choice in the space's order, with the first option for names that do not count. Raises as `check` does."""
        self.check(choice)
        counting = set(self.counting(choice))
        return {name: choice[name] if name in counting else self[name][0] for name in self}

    def draw(self, source: random.Random) -> Choice:
        """Return a random choice; all options of a name are equally likely."""
        return self.canonical({name: source.choice(of) for name, of in self.items()})


def _among(option: Option, options: Sequence[Option]) -> bool:
    """Return whether it is one of them; True is not 1."""
    return any(type(option) is type(other) and option == other for other in options)


def _listed(options: Sequence[Option]) -> str:
    shown = ", ".join(map(repr, options[:8]))
    return f"{shown}, ..." if len(options) > 8 else shown or "none"
