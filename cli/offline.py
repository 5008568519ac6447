"""Commands that make data and models: simulate, train, export, features."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cli.installed import need
from cli.progress import console, stages
from service.core.errors import PropensityError

if TYPE_CHECKING:
    from training.distributed import Dask

Events = Annotated[
    list[str],
    typer.Option("--events", help="Event files: CSV, Parquet or NDJSON (also .gz), a glob or a directory. Repeatable."),
]
MoreEvents = Annotated[list[str] | None, typer.Argument(help="More event files.", show_default=False)]
Spec = Annotated[Path, typer.Option("--spec", help="Feature spec (YAML); see examples/ and docs/feature-spec.md.")]
MaxBadRows = Annotated[int, typer.Option(min=0, help="Rows without visitor or readable timestamp to put up with.")]
MemoryLimit = Annotated[str, typer.Option(help="Memory DuckDB may use before it spills to disk, e.g. 1GB.")]
EngineName = Annotated[str, typer.Option("--engine", help="local: this machine; dask: Dask workers.")]
Scheduler = Annotated[
    str | None, typer.Option(help="With --engine dask: address of its scheduler (own processes unless given).")
]
# The setting of the service: who has set it means the same directory in every command.
ARTIFACTS_SET: Final = "PROPENSITY_ARTIFACTS"
ARTIFACTS: Final = Path("artifacts")
MAX_SEED = 2**31 - 1  # LightGBM takes 32 bits


def register(app: typer.Typer) -> None:
    """Add the offline commands."""
    for command in (simulate, train, export, features):
        app.command()(command)


def simulate(
    out: Annotated[Path, typer.Option(help="Directory to write events.parquet (and truth.parquet) to.")],
    events: Annotated[int, typer.Option(min=100, help="About how many events.")] = 200_000,
    days: Annotated[int, typer.Option(help="Days of history.")] = 60,
    seed: Annotated[int, typer.Option(help="The same seed and end give the same shop.")] = 0,
    end: Annotated[str, typer.Option(help="Last moment, ISO 8601; `now` for a shop that is open.")] = "now",
    format: Annotated[str, typer.Option(help="parquet, ndjson, ndjson.gz, csv or csv.gz.")] = "parquet",  # noqa: A002
    truth: Annotated[bool, typer.Option(help="Also write the true propensity after every event.")] = False,
) -> None:
    """Make up a believable shop: visitors, sessions, carts, purchases, bots, late and duplicate events."""
    need("training.simulate")
    from training import simulate as simulation

    shop = simulation.sized(simulation.Shop(days=days, seed=seed, end=moment(end)), events)
    path = out / f"events.{format}"
    with stages() as report:
        summary = simulation.simulate(
            shop,
            path,
            out / "truth.parquet" if truth else None,
            lambda done, total: report("Simulating", done / total),
        )
    console.print(
        f"{summary.rows:,} events of {summary.visitors:,} visitors in {path}: {summary.orders:,} purchases, "
        f"{summary.bot_events:,} events of bots, {summary.late:,} late, {summary.duplicates:,} twice.",
        markup=False,
    )


def train(
    spec: Spec,
    events: Events = [],  # noqa: B006 - typer reads the default, nobody changes it
    more: MoreEvents = None,
    table: Annotated[str | None, typer.Option(help="Instead of events: a file with one row a visitor.")] = None,
    artifacts: Annotated[
        Path, typer.Option(envvar=ARTIFACTS_SET, help="Where bundles go: MODEL/VERSION/.")
    ] = ARTIFACTS,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of sampling, splitting and fitting.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of LightGBM (half the cores unless given).")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1000, help="Training rows to sample at most.")] = 1_000_000,
    max_bad_rows: MaxBadRows = 1000,
    memory_limit: MemoryLimit = "1GB",
    promote: Annotated[bool, typer.Option(help="Serve this version from now on.")] = True,
    predictions: Annotated[Path | None, typer.Option(help="Also write the test rows' scores (Parquet).")] = None,
    engine: EngineName = "local",
    scheduler: Scheduler = None,
) -> None:
    """Train a model from raw events (or a table), calibrate it, judge it and write a bundle with a report."""
    paths = [*events, *(more or [])]
    if bool(paths) == (table is not None):
        raise PropensityError("give either --events FILES or --table FILE")
    need("training.train")
    from cli.summary import print_trained
    from training import train as training

    options = training.Options(
        artifacts=artifacts,
        seed=seed,
        threads=threads or training.THREADS,
        max_rows=max_rows,
        max_bad_rows=max_bad_rows,
        memory_limit=memory_limit,
        promote=promote,
        predictions=predictions,
    )
    with cluster(engine, scheduler, None) as found, stages() as report:
        if table is not None:
            if found is not None:
                raise PropensityError("--engine dask is for --events; a table is trained on here")
            trained = training.from_table(table, spec, options, report)
        else:
            trained = training.from_events(paths, spec, options, report, found)
    print_trained(trained)


def export(
    model: Annotated[Path, typer.Argument(help="LightGBM text model, as booster.save_model writes it.")],
    out: Annotated[Path, typer.Option(help="Directory for model.onnx and parity.json.")],
) -> None:
    """Turn any LightGBM binary booster into ONNX that scores exactly the same; nothing is written unless it does."""
    need("training.export")
    from training import export as exporting

    with stages() as report:
        result = exporting.export_file(model, out, progress=lambda share: report("Checking every split", share))
    console.print(
        f"{out / 'model.onnx'}: scores as LightGBM does. {result.trees:,} trees with {result.splits:,} splits, "
        f"{result.rows:,} rows on and beside them: no row routed differently, largest difference of a probability "
        f"{result.max_difference:.1e}.",
        markup=False,
        soft_wrap=True,
    )


def features(
    spec: Spec,
    at: Annotated[Path, typer.Option(help="File with the columns visitor_id and at; also the request's fields.")],
    out: Annotated[Path, typer.Option(help="File to write, .parquet or .csv.")],
    events: Events = [],  # noqa: B006 - typer reads the default, nobody changes it
    more: MoreEvents = None,
    max_bad_rows: MaxBadRows = 1000,
    memory_limit: MemoryLimit = "1GB",
    engine: EngineName = "local",
    scheduler: Scheduler = None,
) -> None:
    """Compute the features of visitors at given moments: what the service would have seen then."""
    paths = [*events, *(more or [])]
    if not paths:
        raise PropensityError("give the event files with --events FILES")
    need("training.point_in_time")
    from training import point_in_time

    with cluster(engine, scheduler, None) as found, stages() as report:
        rows = point_in_time.write(
            paths,
            spec,
            at,
            out,
            max_bad_rows=max_bad_rows,
            memory_limit=memory_limit,
            engine=found,
            on_progress=report,
        )
    console.print(f"{rows:,} rows in {out}", markup=False)


@contextmanager
def cluster(engine: str, scheduler: str | None, processes: int | None) -> Iterator[Dask | None]:
    """The Dask workers that --engine and --scheduler ask for; None for this machine alone."""
    if engine not in ("local", "dask"):
        raise PropensityError(f"--engine {engine} is unknown; write --engine local or --engine dask")
    if engine == "local":
        if scheduler is not None:
            raise PropensityError("--scheduler is for --engine dask; give both")
        yield None
        return
    from training.distributed import connected

    with connected(scheduler, processes) as found:
        yield found


def moment(text: str) -> datetime.datetime:
    """A moment as ISO 8601 writes it, in UTC unless it says, or `now`."""
    if text == "now":
        return datetime.datetime.now(datetime.UTC)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise PropensityError(f"{text!r} is no moment; write ISO 8601, as 2026-07-01T00:00:00Z, or now") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
