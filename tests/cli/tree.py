"""Owns the list of all commands, those of groups too, by what a person types: `train`, `audiences list`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer.main

from cli.main import app


def groups_and_commands(above: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every group and command below one, with the words that lead to it."""
    for name, one in getattr(above, "commands", {}).items():
        yield (*path, name), one
        yield from groups_and_commands(one, (*path, name))


def commands_of(app: typer.Typer) -> dict[str, Any]:
    """Every command that does something, by its full name; groups are none."""
    found = groups_and_commands(typer.main.get_command(app))
    return {" ".join(path): one for path, one in found if not hasattr(one, "commands")}


def groups_of(app: typer.Typer) -> dict[str, Any]:
    """Every group by its full name."""
    found = groups_and_commands(typer.main.get_command(app))
    return {" ".join(path): one for path, one in found if hasattr(one, "commands")}


def split(words: Sequence[str], commands: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """The command that a line begins with, and its arguments; None where it begins with none."""
    for length in range(len(words), 0, -1):
        name = " ".join(words[:length])
        if name in commands:
            return name, list(words[length:])
    return None


COMMANDS = commands_of(app)
GROUPS = groups_of(app)
