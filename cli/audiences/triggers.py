"""The commands `audiences triggers`: tell webhooks of movements, list what nobody took, and send it again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.audiences.sync import ANOTHER_RUNS, INCOMPLETE, Destinations, LedgerUrl, address, need_audiences
from cli.progress import console
from service import settings as service_settings
from service.core.errors import PropensityError

if TYPE_CHECKING:
    from audiences.triggers import Trigger

POLL_S: Final = 1.0

Name = Annotated[str | None, typer.Argument(help="Trigger; all of the file unless given.", show_default=False)]

group = typer.Typer(
    name="triggers",
    help="Webhooks that are told who moves between segments and audiences.",
    invoke_without_command=True,
)


@group.callback()
def alone(context: typer.Context) -> None:
    """Show the help where no command is named."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def register(above: typer.Typer) -> None:
    """Add the group with its commands."""
    for command in (run, dead, replay):
        group.command()(command)
    above.add_typer(group)


def run(
    name: Name = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until it is stopped, instead of until nothing is due.")
    ] = False,
    destinations: Destinations = Path("destinations.yaml"),
    ledger: LedgerUrl = None,
) -> None:
    """Tell what happened since the last run. Exits with 1 if events wait or died, 3 if another run is at it."""
    need_audiences()
    from audiences import triggers
    from audiences.live import Journals, Live

    with Live(service_settings.load()) as live, _opened(name, destinations, ledger) as (found, _), _held(found):
        told = triggers.run(found, Journals(live), _now_ms, _forever if follow else lambda: True)
    for one, counts in told.items():
        console.print(
            f"{one}: {counts.taken:,} events taken, {counts.delivered:,} delivered, {counts.failed:,} attempts failed, "
            f"{counts.died:,} died, {counts.erased:,} of erased visitors dropped, {counts.waiting:,} wait.",
            markup=False,
            soft_wrap=True,
        )
        if counts.lost:
            console.print(f"{one}: some changes were not kept until they were read", markup=False)
    if not all(counts.complete for counts in told.values()):
        raise typer.Exit(INCOMPLETE)


def dead(
    name: Name = None,
    destinations: Destinations = Path("destinations.yaml"),
    ledger: LedgerUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with the bodies instead of a table.")] = False,
) -> None:
    """List events that were given up, with what the receiver answered."""
    need_audiences()
    with _opened(name, destinations, ledger) as (found, _):
        rows = [(trigger.name, one) for trigger in found for one in trigger.dead()]
    if as_json:
        print(json.dumps([{"trigger": own, **one._asdict(), "body": json.loads(one.body)} for own, one in rows]))
        return
    table = Table(title=f"{len(rows):,} dead events")
    for heading in ("trigger", "event", "what", "when", "attempts", "answer"):
        table.add_column(heading)
    for own, one in rows:
        body = json.loads(one.body)
        cells = (own, one.event, body["type"], body["timestamp"], str(one.attempts), one.answer or "")
        table.add_row(*map(escape, cells))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def replay(
    name: Name = None,
    event: Annotated[list[str] | None, typer.Option(help="Id of a dead event; all unless given. Repeatable.")] = None,
    destinations: Destinations = Path("destinations.yaml"),
    ledger: LedgerUrl = None,
) -> None:
    """Let dead events be delivered by the next run, in the order they had."""
    need_audiences()
    with _opened(name, destinations, ledger) as (found, _):
        count = sum(trigger.replay(event, _now_ms()) for trigger in found)
    if event and count < len(event):
        raise PropensityError(
            f"{len(event) - count} of these are no dead events; see propensity audiences triggers dead"
        )
    console.print(f"{count:,} events wait again; propensity audiences triggers run delivers them.")


@contextmanager
def _opened(name: str | None, destinations: Path, ledger: str | None) -> Iterator[tuple[list[Trigger], str]]:
    from audiences import leases, triggers
    from audiences import ledger as ledgers
    from audiences.destinations import registry

    options = triggers.load(registry.load(destinations), name)
    holder = leases.holder()
    with ledgers.opened(address(ledger, service_settings.load())) as opened:
        yield [triggers.Trigger(one, given, opened, holder) for one, given in options.items()], holder


@contextmanager
def _held(found: list[Trigger]) -> Iterator[None]:
    """Hold the lease of each, or end with the status that says who does."""
    from audiences.leases import described

    with ExitStack() as stack:
        for trigger in found:
            other = trigger.hold(_now_ms())
            if other is not None:
                print(f"propensity: {described(other)} is running the trigger {trigger.name}", file=sys.stderr)
                raise typer.Exit(ANOTHER_RUNS)
            stack.callback(trigger.let_go)
        yield


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _forever() -> bool:
    time.sleep(POLL_S)
    return False
