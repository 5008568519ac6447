"""The command `audiences status`: what the ledger knows of each destination, and whether destinations let us in."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.markup import escape
from rich.table import Table

from cli.audiences.sync import (
    INCOMPLETE,
    Destinations,
    LedgerUrl,
    address,
    console_of_results,
    need_audiences,
    note_no_ledger,
)
from cli.progress import console, stages
from service import settings as service_settings
from service.core.errors import PropensityError

if TYPE_CHECKING:
    from audiences.status import Checked, Pile, Run, State

NUMBERS: Final = {"has", "refused", "members"}
MOMENTS: Final = {"last in step", "began", "took"}
UNITS: Final = (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def register(group: typer.Typer) -> None:
    """Add the command."""
    group.command()(status)


def status(
    name: Annotated[str | None, typer.Argument(help="Audience; all unless given.", show_default=False)] = None,
    to: Annotated[str | None, typer.Option(help="Destination; all unless given.", show_default=False)] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also ask each destination of the file whether it lets us in.")
    ] = False,
    destinations: Destinations = Path("destinations.yaml"),
    ledger: LedgerUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what destinations have of audiences, whom they refuse, and how the last runs ended. Nobody is sent.

    Exits with 1 if a destination that was checked does not let us in.
    """
    need_audiences()
    from audiences import ledger as ledgers
    from audiences import status as known
    from audiences import tables

    where, now_ms = address(ledger, service_settings.load()), time.time_ns() // 1_000_000
    checked = _checked(destinations, to) if check else []
    with ledgers.existing(where) as found:
        states = known.states(found, name, to) if found is not None else []
        runs = known.last_runs(found, now_ms, name, to) if found is not None else []
    if found is None:
        note_no_ledger(where)
    elif not states:
        asked = "".join([f" of {name}" if name else "", f" at {to}" if to else ""])
        console.print(f"Note: the ledger has no list{asked}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(_plain(None if found is None else tables.shown(where), states, runs, checked), indent=2))
    else:
        _print(states, runs, checked, now_ms)
    if any(one.works is False for one in checked):
        raise typer.Exit(INCOMPLETE)


def _checked(path: Path, to: str | None) -> list[Checked]:
    from audiences import status as known
    from audiences.destinations import registry

    file = registry.load(path)
    if not file.destinations:
        raise PropensityError(f"{path}: no destinations; write destinations: NAME: {{kind: ...}}, see docs/sync.md")
    names = list(file.destinations) if to is None else [to]
    with stages() as report:
        found = []
        for place, one in enumerate(names):
            report("Asking destinations", place / len(names))
            found.append(known.check(file, one))
    return found


def _plain(
    where: str | None, states: Sequence[State], runs: Sequence[Run], checked: Sequence[Checked]
) -> dict[str, Any]:
    return {
        "ledger": where,
        "lists": [one.plain() for one in states],
        "runs": [one._asdict() for one in runs],
        "checks": [one._asdict() for one in checked],
    }


def _print(states: Sequence[State], runs: Sequence[Run], checked: Sequence[Checked], now_ms: int) -> None:
    out = console_of_results()
    if states:
        out.print(_lists(states, now_ms))
    if any(one.refused for one in states):
        out.print(_refusals(states))
    if runs:
        out.print(_runs(runs))
    if checked:
        out.print(_checks(checked))


def _table(title: str, *headings: str) -> Table:
    """A table that breaks what is too long for its column, and cuts nothing; numbers and moments stay in one line."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading in NUMBERS else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading in NUMBERS | MOMENTS)
    return table


def _lists(states: Sequence[State], now_ms: int) -> Table:
    headings = ("destination", "audience", "has", "last in step", "refused", "under way")
    table = _table("What destinations have", *headings)
    for one in states:
        age = f"{_span(now_ms - one.synced_ms)} ago" if one.synced_ms is not None else "never"
        row = (one.destination, one.audience, f"{one.has:,}", age, f"{one.refused:,}", _under_way(one))
        table.add_row(*map(escape, row))
    return table


def _under_way(one: State) -> str:
    told = (("the platform works off", one.working), ("no answer yet for", one.unknown))
    return "\n".join(f"{words} {_pile(pile)}" for words, pile in told if pile.batches)


def _pile(pile: Pile) -> str:
    return f"{pile.members:,} in {pile.batches:,} {'batch' if pile.batches == 1 else 'batches'}"


def _refusals(states: Sequence[State]) -> Table:
    table = _table("Why members are refused", "destination", "audience", "members", "words")
    for one in states:
        for reason in one.reasons:
            table.add_row(*map(escape, (one.destination, one.audience, f"{reason.members:,}", reason.words)))
        if others := one.refused - sum(reason.members for reason in one.reasons):
            table.add_row(escape(one.destination), escape(one.audience), f"{others:,}", "for other reasons")
    return table


def _runs(runs: Sequence[Run]) -> Table:
    from audiences.refresh import iso

    table = _table("The last runs", "began", "took", "destination", "audience", "how it ended")
    for one in runs:
        took = _span(one.ended_ms - one.started_ms) if one.ended_ms is not None else ""
        row = (iso(one.started_ms), took, one.destination, one.audience or "all", _ended(one))
        table.add_row(*map(escape, row))
    return table


def _ended(one: Run) -> str:
    if one.ended_ms is not None:
        return one.result or ""
    return f"under way: {one.holder}" if one.under_way else f"interrupted: {one.holder}; the next run goes on"


def _checks(checked: Sequence[Checked]) -> Table:
    table = _table("Whether destinations let us in", "destination", "answer", "in its words")
    answers = {True: "yes", False: "no", None: "not known"}
    for one in checked:
        table.add_row(escape(one.destination), answers[one.works], escape(one.words))
    return table


def _span(ms: int) -> str:
    """A time in its largest unit of which there are two at least."""
    seconds = max(0, ms) / 1000
    unit, size = next((one for one in UNITS if seconds >= 2 * one[1]), UNITS[-1])
    return f"{seconds / size:.0f} {unit}" if seconds >= 2 else f"{seconds:.1f} s"
