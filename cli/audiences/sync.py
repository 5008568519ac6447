"""The command `audiences sync`: brings the lists at a destination in step with who should be on them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.installed import need
from cli.progress import console, stages
from service import settings as service_settings
from service.core.errors import PropensityError

if TYPE_CHECKING:
    from audiences.ledger import Ledger
    from audiences.sync import Counts
    from service.settings import Settings

INCOMPLETE: Final = 1
ANOTHER_RUNS: Final = 3

Destinations = Annotated[Path, typer.Option(help="File of destinations and triggers; see docs/sync.md.")]
LedgerUrl = Annotated[
    str | None, typer.Option("--ledger", help="Ledger's address, instead of PROPENSITY_LEDGER_URL.", show_default=False)
]


def register(group: typer.Typer) -> None:
    """Add the command."""
    group.command()(sync)


def sync(
    to: Annotated[str, typer.Option(help="Destination, by its name in the file of destinations.")],
    name: Annotated[
        str | None, typer.Argument(help="Audience; all that go there unless given.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    destinations: Destinations = Path("destinations.yaml"),
    ledger: LedgerUrl = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for another run to end.")] = 0,
    keep_days: Annotated[int, typer.Option(min=1, help="Days until what was sent becomes counts a day.")] = 90,
    remove_all: Annotated[
        bool, typer.Option("--remove-all", help="Empty all lists although no audience is defined.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Send a destination the difference between what it has and what it should have. Resumes after any end.

    Exits with 0 if the destination has what it should, 1 if it refused members, 2 if the run was not carried out or not
    to its end, and 3 if another run is at the same destination.
    """
    need_audiences()
    import stamina.instrumentation

    from audiences import leases
    from audiences import ledger as ledgers
    from audiences import sync as syncing
    from audiences.destinations import registry
    from audiences.live import Live

    settings = service_settings.load()
    file = registry.load(destinations)
    entry = file.destination(to)
    built = entry.build()
    options = syncing.Options(
        dry_run=dry_run, wait_s=wait, retention_ms=keep_days * ledgers.DAY_MS, remove_all=remove_all
    )
    stamina.instrumentation.set_on_retry_hooks([lambda retry: told(retry.caused_by, retry.wait_for)])
    try:
        opening = (read if dry_run else ledgers.opened)(address(ledger, settings))
        with opening as opened, stages() as report, Live(settings) as wanted:
            counts = syncing.run(opened, built, wanted, entry.sending, name, options, report)
            unnamed = opened.destinations() - set(file.destinations)
    except leases.Held as error:
        print(f"propensity: {error}", file=sys.stderr)
        raise typer.Exit(ANOTHER_RUNS) from None
    for other in sorted(unnamed):
        said = f"still has members and is not in {destinations}, so nobody who withdraws is removed there"
        console.print(f"Note: {other} {said}; name it until its lists are empty", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps([one.plain() for one in counts], indent=2))
    else:
        _print(counts, to, dry_run)
    if not dry_run and not all(one.complete for one in counts):
        raise typer.Exit(INCOMPLETE)


def need_audiences() -> None:
    """Raise an error that says what to install where that is missing."""
    need("audiences.sync", "audiences.signed", "audiences.destinations.registry", extra="audiences")


def address(given: str | None, settings: Settings) -> str:
    """Where the ledger is: as the option says, or the setting, else beside the embedded server's data."""
    where = given or settings.ledger_url or f"sqlite:///{settings.data_dir / 'ledger.db'}"
    if where == "sqlite://" or where.startswith("sqlite:///:memory:"):
        raise PropensityError(f"the ledger {where} would be gone with this command; write sqlite:///ledger.db")
    return where


@contextmanager
def read(where: str) -> Iterator[Ledger]:
    """The ledger at an address, to be read; an empty one where there is none, and a note that says so."""
    from audiences import ledger as ledgers

    with ledgers.existing(where) as found, ledgers.opened("sqlite://") as nothing:
        if found is None:
            note_no_ledger(where)
        yield found or nothing


def note_no_ledger(where: str) -> None:
    """Say on stderr that there is none yet."""
    from audiences.tables import shown

    console.print(
        f"Note: there is no ledger at {shown(where)}, so nothing is known to have been sent; name one with --ledger, "
        "or begin one with propensity audiences sync",
        markup=False,
        soft_wrap=True,
    )


def told(error: BaseException, wait_s: float) -> None:
    """Say on stderr that something is tried again."""
    console.print(f"{error}; again in {wait_s:.1f} s", markup=False, soft_wrap=True)


def _print(counts: Sequence[Counts], destination: str, dry_run: bool) -> None:
    table = Table(title=f"{escape(destination)}: what {'would be' if dry_run else 'was'} sent")
    table.add_column("audience")
    for heading in ("wanted", "without consent", "unchanged", "added", "removed", "refused"):
        table.add_column(heading, justify="right")
    table.add_column("why")
    for one in counts:
        numbers = (one.wanted, one.without_consent, one.unchanged, one.added, one.removed, one.all_refused)
        table.add_row(escape(one.audience), *(f"{number:,}" for number in numbers), _why(one.why))
    console_of_results().print(table)
    for one in counts:
        for note in one.notes:
            console.print(f"Note: {one.audience}: {note}", markup=False, soft_wrap=True)
        if one.working:
            said = f"the platform still works off {one.working:,} members; the next run asks what became of them"
            console.print(f"Note: {one.audience}: {said}", markup=False, soft_wrap=True)
        if one.below:
            few = f"{one.wanted:,} people may be sent, fewer than its min_size, {one.below:,}"
            console.print(f"Note: the list of {one.audience} is empty: {few}", markup=False, soft_wrap=True)


def _why(why: Counter[str]) -> str:
    return ", ".join(f"{number:,} {cause.partition(': ')[2]}" for cause, number in sorted(why.items()))


def console_of_results() -> Console:
    """Results go to stdout, as wide as a table needs where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)
