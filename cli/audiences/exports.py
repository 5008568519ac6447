"""The command `audiences export`: files that people upload by hand, in the platforms' own formats."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cli.audiences.sync import console_of_results
from cli.installed import need
from cli.progress import console
from service import settings as service_settings
from service.core.errors import PropensityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from audiences.exports import Bid


def register(group: typer.Typer) -> None:
    """Add the command."""
    group.command()(export)


def export(
    out: Annotated[Path, typer.Option(help="File to write, CSV; one that is there is replaced.")],
    bids: Annotated[
        str | None,
        typer.Option(
            help="Snapshot of scores, path or URL: write the bid adjustment of each segment.", show_default=False
        ),
    ] = None,
    exclusions: Annotated[
        str | None, typer.Option(help="Audience: write its members as a list to exclude.", show_default=False)
    ] = None,
    format: Annotated[str, typer.Option(help="google-ads, meta or csv.")] = "csv",  # noqa: A002
    campaign: Annotated[
        str | None, typer.Option(help="Campaign whose bids are adjusted; needed for google-ads.", show_default=False)
    ] = None,
    ad_group: Annotated[
        list[str] | None, typer.Option(help="Ad group of it; the whole campaign unless given. Repeatable.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Put before a segment's name to name its list.")] = "Propensity ",
    lowest: Annotated[int, typer.Option(min=-90, max=0, help="Lowest adjustment in percent.")] = -90,
    highest: Annotated[int, typer.Option(min=0, max=900, help="Highest adjustment in percent.")] = 900,
) -> None:
    """Write bid adjustments of segments, or a list to exclude, in the format that a platform takes as an upload."""
    need("audiences.exports", extra="audiences")
    from audiences import exports

    if (bids is None) == (exclusions is None):
        raise PropensityError("give either --bids SCORES or --exclusions AUDIENCE")
    if format not in exports.FORMATS:
        raise PropensityError(f"--format {format} is unknown; write --format {' or --format '.join(exports.FORMATS)}")
    if bids is not None:
        found = exports.bids(bids, lowest, highest)
        exports.write_bids(found, format, out, prefix, campaign, ad_group or ())
        _print(found, out)
        return
    from audiences.live import Live

    assert exclusions is not None
    with Live(service_settings.load()) as wanted:
        written = exports.write_exclusions(wanted, exclusions, format, out)
    console.print(
        f"{written.people:,} people in {out}. Not in it: {written.without_consent:,} who did not agree to advertising, "
        f"{written.without_identifier:,} without an identifier that counts.",
        markup=False,
        soft_wrap=True,
    )


def _print(found: Sequence[Bid], out: Path) -> None:
    table = Table(title=f"Bid adjustments in {escape(str(out))}")
    table.add_column("segment")
    for heading in ("visitors", "expected to convert", "adjustment"):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(escape(one.segment), f"{one.visitors:,}", f"{100 * one.rate:.2f} %", f"{one.adjustment:+d} %")
    console_of_results().print(table, soft_wrap=not sys.stdout.isatty())
