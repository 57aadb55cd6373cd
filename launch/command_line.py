"""The command line, made by tyro from dataclasses: the fields are the flags, and the text below each field is its help.

A field without a default is a positional argument. tyro itself prints help (exit code 0) and the flags that it cannot read
(code 2, the flag and its value in a box); no flag can be abbreviated.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, PositionalMetavarFromFieldName, PositionalRequiredArgs
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")
EXPECTED: dict[type, str] = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
"""The types of single values, and what an error calls them."""
STYLE = (FlagCreatePairsOff, OmitArgPrefixes, PositionalMetavarFromFieldName, PositionalRequiredArgs)


class Command(Protocol):
    """A command with its flags."""

    def run(self) -> None:
        """Do the command. Ends the program (SystemExit) with a code other than 0 if it fails."""


def read(flags: type[T], prog: str, args: Sequence[str] | None = None) -> T:
    """Return the flags in `args` (None: the program's arguments). Ends the program if they cannot be read."""
    return tyro.cli(flags, prog=prog, args=args, config=STYLE, registry=_registry())


def read_command(
    commands: Mapping[str, type[Command]], about: str, prog: str, args: Sequence[str] | None = None
) -> Command:
    """Return the command that `args` names, with its flags."""
    read: Command = tyro.extras.subcommand_cli_from_dict(
        dict(commands), prog=prog, description=about, args=args, config=STYLE, registry=_registry()
    )
    return read


def _registry() -> ConstructorRegistry:
    """Return rules for single values: errors say what was expected, and no text is read as Python's None."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def single(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        optional = info.type_origin in (typing.Union, types.UnionType)
        kinds = [kind for kind in typing.get_args(info.type) if kind is not type(None)] if optional else [info.type]
        if len(kinds) != 1 or kinds[0] not in EXPECTED:
            return None
        kind = kinds[0]

        def value(words: list[str]) -> Any:
            try:
                return kind(words[0])
            except ValueError:
                raise ValueError(f"expected {EXPECTED[kind]}, got {words[0]!r}") from None

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=value,
            is_instance=lambda given: isinstance(given, kind) or (given is None and optional),
            str_from_instance=lambda given: [str(given)],
        )

    return registry
