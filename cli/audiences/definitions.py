"""The commands `audiences list`, `refresh` and `preview`: from definitions and scores to who belongs where."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.audiences.sync import Destinations, LedgerUrl, address, console_of_results, note_no_ledger
from cli.installed import need
from cli.offline import ARTIFACTS, ARTIFACTS_SET
from cli.progress import console, stages
from service.core.errors import PropensityError

if TYPE_CHECKING:  # the serving image has no audiences
    from audiences.definitions import Audience
    from audiences.ledger import Copy
    from audiences.population import Snapshot
    from audiences.preview import Preview
    from audiences.refresh import Outcome, Scores
    from audiences.sent import Sent
    from service.core.bundle import Bundle
    from service.members import Members

FILE: Final = Path("audiences.yaml")
_BAR: Final = " ▏▎▍▌▋▊▉█"
_BAR_CELLS: Final = 24

DefinitionsFile = Annotated[Path, typer.Option("--definitions", help="Definitions (YAML); see docs/audiences.md.")]
ScoreDirectories = Annotated[
    list[str],
    typer.Option(
        "--scores", help="What `propensity score --events --out` wrote, path or URL; one a model. Repeatable."
    ),
]
Artifacts = Annotated[
    Path,
    typer.Option(envvar=ARTIFACTS_SET, help="Directory of bundles, for cut-offs and the names of categories."),
]


def register(group: typer.Typer) -> None:
    """Add the commands."""
    group.command("list")(list_)
    group.command()(refresh)
    group.command()(preview)
    group.command()(remove)


def list_(
    definitions: DefinitionsFile = FILE,
    sizes: Annotated[bool, typer.Option(help="Also ask the feature cache how many members there are.")] = True,
) -> None:
    """Check the definitions and list the audiences, in the order in which they are decided."""
    need("audiences.refresh", extra="audiences")
    from audiences import definitions as reading

    read = reading.load(definitions)
    known = {one.name: f"{one.size:,}" for one in asyncio.run(_known())} if sizes else {}
    table = Table(title=escape(str(definitions)))
    table.add_column("audience", no_wrap=True)
    for heading in ("chosen by", "but", "sent to"):
        table.add_column(heading)
    if sizes:
        table.add_column("members", justify="right")
    for audience in read.ordered:
        row = [audience.name, chosen_by(audience), _limits(audience), _destinations(audience)]
        table.add_row(*map(escape, row), *([known.get(audience.name, "")] if sizes else []))
    Console().print(table)
    for model in read.models:
        columns = read.features(model)
        asked = f" --features {','.join(columns)}" if columns else ""
        console.print(f"Needs propensity score --events FILES --model {model}{asked}", soft_wrap=True, markup=False)


def refresh(
    scores: ScoreDirectories,
    definitions: DefinitionsFile = FILE,
    artifacts: Artifacts = ARTIFACTS,
) -> None:
    """Decide who belongs where by scores of everyone, and write what changed into the feature cache."""
    need("audiences.refresh", extra="audiences")
    from audiences import definitions as reading
    from audiences import refresh as refreshing

    read = reading.load(definitions)
    snapshots, bundles = _scored(scores, artifacts)
    now_ms = refreshing.moment(snapshots)
    refreshing.require_begun(now_ms, time.time_ns() // 1_000_000)

    async def run() -> Outcome:
        with stages() as report:
            async with _lists(bundles, is_alone=True) as (members, propensities):
                return await refreshing.refresh(read, snapshots, bundles, members, propensities, now_ms, report)

    _print_outcome(asyncio.run(run()))


def preview(
    name: Annotated[str, typer.Argument(help="Name of the audience.")],
    scores: ScoreDirectories,
    definitions: DefinitionsFile = FILE,
    artifacts: Artifacts = ARTIFACTS,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, into a .png, .svg or .pdf.")] = None,
    destinations: Destinations = Path("destinations.yaml"),
    ledger: LedgerUrl = None,
) -> None:
    """Show what an audience would be with these scores, and what that changes. Nothing is written, nothing is sent."""
    need("audiences.preview", "matplotlib", extra="audiences")
    from audiences import definitions as reading
    from audiences import preview as previewing
    from audiences import refresh as refreshing

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise PropensityError(f"{plot}: cannot draw that; let its name end in .png, .svg or .pdf")
    read = reading.load(definitions)
    snapshots, bundles = _scored(scores, artifacts)
    now_ms = refreshing.moment(snapshots)

    async def run() -> Preview:
        with stages() as report:
            async with _lists(bundles) as (members, propensities):
                return await previewing.preview(read, name, snapshots, bundles, members, propensities, now_ms, report)

    found = asyncio.run(run())
    found = replace(found, sent=_sent(found, destinations, ledger))
    _print_preview(found)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        previewing.plot(found, plot)
        console.print(f"Plot: {escape(str(plot))}", soft_wrap=True)


def remove(
    names: Annotated[list[str], typer.Argument(help="Audiences that the definitions do not name any more.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also where people are on lists of it at destinations.")] = False,
    definitions: DefinitionsFile = FILE,
    ledger: LedgerUrl = None,
) -> None:
    """End audiences that were taken out of the definitions. The next synchronisation empties their lists elsewhere."""
    need("audiences.removal", "audiences.ledger", extra="audiences")
    from audiences import definitions as reading
    from audiences import ledger as ledgers
    from audiences import removal, tables
    from service.settings import load

    read = reading.load(definitions)
    where = address(ledger, load())
    known = asyncio.run(_known())
    chosen = removal.chosen(known, read, names)
    with ledgers.existing(where) as found:
        copies = {one.name: found.copies(one.name) if found is not None else [] for one in chosen}
        unknown = sorted({name for one in chosen for name in removal.destinations(one)}) if found is None else []
    _print_removal(known, chosen, copies)
    held = sorted({copy.destination for own in copies.values() for copy in own if copy.size})
    if dry_run:
        return
    if unknown and not yes:
        raise PropensityError(
            f"there is no ledger at {tables.shown(where)}, so it is not known who is on the lists of "
            f"{', '.join(unknown)}; name it with --ledger URL, or say --yes"
        )
    if held and not yes:
        raise PropensityError(
            f"the next synchronisation would empty lists at {', '.join(held)}; say --yes if that is meant"
        )

    async def run() -> int:
        now_ms = time.time_ns() // 1_000_000
        with stages() as report:
            async with _lists({}, is_alone=True) as (members, _):
                return sum([await removal.remove(members, one.name, now_ms, report) for one in chosen])

    console.print(f"{asyncio.run(run()):,} left, those held out among them.", markup=False)
    ended = {own for one in chosen for own in (one.name, f"{one.name}{reading.CONTROL}")}
    last = "" if any(one.definition for one in known if one.name not in ended) else " --remove-all"
    for name in held:
        console.print(f"To empty its lists: propensity audiences sync --to {name}{last}", markup=False, soft_wrap=True)


# --- what the commands read ---


def _scored(directories: Sequence[str], artifacts: Path) -> tuple[list[Snapshot], Mapping[str, Bundle]]:
    from audiences import population

    snapshots = [population.open_snapshot(directory) for directory in directories]
    population.require_apart(snapshots)
    return snapshots, population.bundles_of(snapshots, artifacts)


@asynccontextmanager
async def _lists(bundles: Mapping[str, Bundle], is_alone: bool = False) -> AsyncIterator[tuple[Members, Scores]]:
    """Where members and scores are kept: the feature cache of the service with the same settings."""
    from audiences.turns import alone
    from service.app import open_store
    from service.members import Members
    from service.propensities import Propensities
    from service.settings import load

    settings = load()
    history_ms = max((bundle.spec.limits.history for bundle in bundles.values()), default=0)
    # A page of ten thousand visitors may take it longer than a score may.
    patient = settings.model_copy(update={"redis_timeout_ms": 30_000})
    async with open_store(patient, history_ms) as store, alone(store) if is_alone else nullcontext():
        yield Members(store), Propensities(store)


def _sent(found: Preview, destinations: Path, url: str | None) -> list[Sent]:
    """What each destination of an audience was sent, by the ledger, and would be sent."""
    from audiences import ledger as ledgers
    from audiences import sent
    from audiences.destinations import registry
    from audiences.live import Live
    from service.settings import load

    settings = load()
    where = address(url, settings)
    with ledgers.existing(where) as known, ledgers.opened("sqlite://") as nothing:
        if known is None and found.audience.destinations:
            note_no_ledger(where)
        with stages() as report, Live(settings) as live:
            wanted = sent.Foreseen(live, found.audience, found.chosen)
            file = cache(lambda: registry.load(destinations))  # not before a destination wants it
            return sent.compare(
                known or nothing, wanted, found.audience.name, lambda name: file().destination(name), report
            )


async def _known() -> Sequence[Any]:
    async with _lists({}) as (members, _):
        return await members.names()


# --- how an audience is told ---


def chosen_by(audience: Audience) -> str:
    """What decides who belongs, in a few words."""
    words = []
    if audience.segment is not None:
        of = f" ({' or '.join(audience.micro)})" if audience.micro is not None else ""
        words.append(f"{' or '.join(audience.segment)}{of}")
    if audience.cut is not None:
        leave, enter = audience.cut.thresholds(audience.margin or 0.0)
        words.append(f"{audience.model} from {enter:.3g}, until below {leave:.3g}")
    if audience.top is not None:
        top = f"{audience.top:,}" if isinstance(audience.top, int) else f"{100 * audience.top:g} %"
        words.append(f"top {top} of {audience.model}")
    if audience.budget is not None:
        words.append(f"budget for {audience.budget.contacts:,} of {audience.model}")
    for model, scores in audience.scores.items():
        if scores.at_least is not None:
            words.append(f"{model} from {scores.at_least:g}")
        if scores.below is not None:
            words.append(f"{model} below {scores.below:g}")
        if scores.segment is not None:
            words.append(f"{model} {' or '.join(scores.segment)}")
    words += [f"{feature}" for feature in audience.where]
    if audience.last_event is not None:
        words.append("last event")
    return ", ".join(words) or "everyone"


def _limits(audience: Audience) -> str:
    """Who is kept out, and how many it takes."""
    words = [f"without {' and '.join(audience.exclude)}"] if audience.exclude else []
    if audience.holdout is not None:
        words.append(f"{100 * audience.holdout.share:g} % held out")
    words.append(f"at least {audience.min_size:,}")
    return ", ".join(words)


def _destinations(audience: Audience) -> str:
    named = ", ".join(audience.destinations) or "nowhere"
    return f"{named} for {audience.purpose}" if audience.purpose is not None and audience.destinations else named


def _print_outcome(outcome: Outcome) -> None:
    from audiences.refresh import iso

    out = Console()
    for model, moved in outcome.segments.items():
        table = Table(
            title=f"{model}: {sum(moved.sizes.values()):,} visitors, {moved.moved:,} moved, {moved.new:,} new"
        )
        for segment in moved.sizes:
            table.add_column(segment, justify="right")
        table.add_row(*(f"{size:,}" for size in moved.sizes.values()))
        out.print(table)
    noun = "audience" if len(outcome.audiences) == 1 else "audiences"
    table = Table(title=f"{len(outcome.audiences):,} {noun} as of {iso(outcome.at_ms)}")
    for heading in ("audience", "members", "held out", "entered", "left", "why they left"):
        table.add_column(heading, justify="left" if heading in ("audience", "why they left") else "right")
    for found in outcome.audiences:
        why = ", ".join(f"{reason} {count:,}" for reason, count in found.left.items())
        table.add_row(
            escape(found.audience.name),
            f"{found.members:,}",
            f"{found.control:,}" if found.audience.holdout is not None else "",
            f"{found.entered:,}",
            f"{sum(found.left.values()):,}",
            why,
        )
    out.print(table)
    for found in outcome.audiences:
        if found.too_small:
            smallest = found.audience.min_size
            console.print(
                f"[yellow]Note:[/] {escape(found.audience.name)} is empty: fewer than min_size, {smallest:,}, qualify",
                soft_wrap=True,
            )
    if outcome.unknown:
        console.print(
            f"[yellow]Note:[/] not in the definitions, and left as they are: {escape(', '.join(outcome.unknown))}; "
            "see propensity audiences remove",
            soft_wrap=True,
        )


def _print_removal(known: Sequence[Any], chosen: Sequence[Any], copies: Mapping[str, Sequence[Copy]]) -> None:
    from audiences.definitions import CONTROL

    sizes = {one.name: one.size for one in known}
    table = Table(title="What would be removed")
    for heading in ("audience", "members", "held out", "people on its lists"):
        table.add_column(heading, justify="right" if heading in ("members", "held out") else "left")
    for one in chosen:
        held = ", ".join(f"{copy.destination} {copy.size:,}" for copy in copies[one.name] if copy.size)
        table.add_row(escape(one.name), f"{one.size:,}", f"{sizes.get(f'{one.name}{CONTROL}', 0):,}", escape(held))
    console_of_results().print(table)


def _print_preview(found: Preview) -> None:
    from audiences.refresh import iso

    out, audience = console_of_results(), found.audience
    table = Table(title=f"{audience.name}, as of {iso(found.at_ms)}", show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("how much")
    for what, how_much in _facts(found):
        table.add_row(what, escape(how_much))
    out.print(table)
    if found.histogram is not None:
        out.print(_histogram(found))
    if found.overlaps:
        other = Table(title="Overlap", title_justify="left")
        for heading in ("with", "its size", "in both", "of this", "of the other"):
            other.add_column(heading, justify="left" if heading == "with" else "right")
        for one in found.overlaps:
            shares = (one.both / size if size else 0.0 for size in (found.found.members, one.size))
            other.add_row(escape(one.name), f"{one.size:,}", f"{one.both:,}", *(f"{share:.1%}" for share in shares))
        out.print(other)
    if found.sent:
        out.print(_since_sent(found.sent))
    for problem in dict.fromkeys(one.problem for one in found.sent if one.problem):
        names = ", ".join(one.destination for one in found.sent if one.problem == problem)
        console.print(
            f"[yellow]Note:[/] what would be sent to {escape(names)} is not known: {escape(problem)}", soft_wrap=True
        )


def _since_sent(sent: Sequence[Sent]) -> Table:
    from audiences.ledger import ADD, REMOVE
    from audiences.plan import ENTERED
    from audiences.refresh import iso

    table = Table(title="Since the last synchronisation, if refreshed and synchronised now", title_justify="left")
    for heading in ("destination", "last in step", "has", "unchanged", "changed", "new", "to remove", "refused"):
        table.add_column(heading, justify="left" if heading in ("destination", "last in step") else "right")
    table.add_column("without consent", justify="right")
    for one in sent:
        counts = one.next
        numbers: tuple[str, ...] = ("?",) * 6
        if counts is not None:
            changed = {why: count for why, count in counts.causes(ADD).items() if why != ENTERED}
            sizes = (counts.refused_before, counts.without_consent)
            sums = (_sum(changed), f"{counts.entering:,}", _sum(counts.causes(REMOVE)))
            numbers = (f"{counts.unchanged:,}", *sums, *(f"{size:,}" for size in sizes))
        moment = iso(one.synced_ms) if one.synced_ms is not None else "never"
        table.add_row(escape(one.destination), moment, f"{one.has:,}", *numbers)
    return table


def _sum(why: Mapping[str, int]) -> str:
    """How many, and of which causes: `12 (consent 3, left 9)`."""
    told = ", ".join(f"{cause} {count:,}" for cause, count in why.items())
    return f"{sum(why.values()):,}{f' ({told})' if told else ''}"


def _facts(found: Preview) -> list[tuple[str, str]]:
    audience, result = found.audience, found.found
    of = f" ({result.members / found.visitors:.1%} of {found.visitors:,} visitors)" if found.visitors else ""
    facts = [("what it is", audience.description)] if audience.description else []
    facts += [("chosen by", chosen_by(audience)), ("members", f"{result.members:,}{of}")]
    smallest = f"{audience.min_size:,}"
    if result.too_small:
        smallest += f": only {result.qualified:,} qualify, so nobody is a member"
    facts.append(("minimum size", smallest))
    if audience.holdout is not None:
        control = f"{100 * audience.holdout.share:g} %, {result.control:,} visitors"
        if found.control_expected is not None:
            control += f", of whom {found.control_expected.conversions:,.1f} are expected to convert"
        facts.append(("held out", control))
    if found.thresholds is not None:
        facts.append(("cut", "enter from {1:.4f}, leave below {0:.4f}".format(*found.thresholds)))
    elif result.cut_off == result.cut_off:
        facts.append(("lowest score", f"{result.cut_off:.4f}"))
    if found.expected is not None and found.expected.people:
        one = found.expected
        horizon = f" within {found.horizon}" if found.horizon is not None else ""
        facts.append(
            (
                "expected",
                f"{one.conversions:,.1f} conversions{horizon} ({one.low:,.1f} to {one.high:,.1f}), {one.rate:.2%} each",
            )
        )
    if audience.budget is not None:
        cost = result.members * audience.budget.per_contact
        each = f", {cost / found.expected.conversions:,.2f} a conversion" if found.expected and result.members else ""
        facts.append(("cost", f"{cost:,.2f} of {audience.budget.spend:,.2f}{each}"))
    left = ", ".join(f"{reason} {count:,}" for reason, count in result.left.items())
    since = f"{result.entered:,} enter, {sum(result.left.values()):,} leave"
    facts.append(("since the last refresh", f"{since}{f' ({left})' if left else ''}; it had {found.before:,}"))
    facts.append(("sent to", _destinations(audience)))
    return facts


def _histogram(found: Preview) -> Table:
    histogram = found.histogram
    assert histogram is not None
    table = Table(title="Scores", title_justify="left")
    for heading in ("propensity", "everyone", "members", "share that is a member"):
        table.add_column(heading, justify="left" if heading.startswith("share") else "right")
    edges, everyone, members = histogram
    for place in range(len(everyone)):
        if everyone[place]:
            share = members[place] / everyone[place]
            table.add_row(
                f"{edges[place]:.3f} - {edges[place + 1]:.3f}",
                f"{everyone[place]:,}",
                f"{members[place]:,}",
                f"{_bar(share)} {share:.0%}",
            )
    return table


def _bar(share: float) -> str:
    eighths = round(share * _BAR_CELLS * 8)
    rest = _BAR[eighths % 8] if eighths % 8 else ""
    return ("█" * (eighths // 8) + rest).ljust(_BAR_CELLS)
