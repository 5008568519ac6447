"""The command `score`: asks the running service for some visitors, or scores everybody in event files."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.installed import need
from cli.offline import ARTIFACTS, ARTIFACTS_SET, EngineName, MemoryLimit, Scheduler, cluster, moment
from cli.online import ask, pair
from cli.progress import console, stages
from service.core.errors import PropensityError

if TYPE_CHECKING:
    from training.batch import Snapshot


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(score)


def score(
    visitors: Annotated[
        list[str] | None, typer.Argument(help="Ids of visitors; with --events more event files.", show_default=False)
    ] = None,
    url: Annotated[str, typer.Option(help="Where the service runs.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model to ask; needed where there are several.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="Field of the request, as referrer=ads. Repeatable.")
    ] = None,
    events: Annotated[
        list[str] | None,
        typer.Option(help="Score all visitors of these files, without a service: a file, glob or directory."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="With --events: directory of Parquet files to write, a path or a URL of fsspec.")
    ] = None,
    at: Annotated[str, typer.Option(help="With --events: the moment to score at, ISO 8601, or now.")] = "now",
    features: Annotated[
        str | None, typer.Option(help="With --events: features to write too, as views_7d,device; or all.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="With --events: version (the one served unless given).")] = None,
    artifacts: Annotated[
        Path, typer.Option(envvar=ARTIFACTS_SET, help="With --events: directory of bundles.")
    ] = ARTIFACTS,
    threads: Annotated[
        int | None, typer.Option(min=1, help="With --events: processes that score (one a core unless given).")
    ] = None,
    memory_limit: MemoryLimit = "1GB",
    max_bad_rows: Annotated[int, typer.Option(min=0, help="With --events: bad rows to put up with.")] = 1000,
    engine: EngineName = "local",
    scheduler: Scheduler = None,
) -> None:
    """Ask the running service for scores; or, with --events, score everybody in event files into Parquet."""
    fields = dict(pair(text) for text in context or [])
    if not events:
        for name, value in {"out": out, "features": features, "version": version, "scheduler": scheduler}.items():
            if value is not None:
                raise PropensityError(f"--{name} is for event files; give them with --events FILES")
        if not visitors:
            raise PropensityError("give ids of visitors, or event files with --events FILES and --out DIR")
        for visitor in visitors:
            body = {"visitor_id": visitor, "context": fields, **({"model": model} if model else {})}
            print(json.dumps(ask(f"{url}/v1/score", body)))
        return
    if out is None:
        raise PropensityError("give the directory to write scores to with --out DIR")
    need("training.batch")
    from training import batch
    from training.engine import Processes

    options = batch.Options(
        columns=tuple(filter(None, (name.strip() for name in (features or "").split(",")))),
        context=fields,
        max_bad_rows=max_bad_rows,
        memory_limit=memory_limit,
    )
    at_ms = int(moment(at).timestamp() * 1000)
    bundle = bundle_of(artifacts, model, version)
    with cluster(engine, scheduler, threads) as found, stages() as report:
        made = batch.score(
            [*events, *(visitors or [])], bundle, at_ms, out, options, found or Processes(threads), report
        )
    _print(made)


def _print(made: Snapshot) -> None:
    shares = ", ".join(f"{name} {count:,}" for name, count in made.segments.items())
    console.print(
        f"{made.rows:,} visitors scored by {made.model} {made.version} into {made.path}: {shares}.",
        markup=False,
        soft_wrap=True,
    )
    if made.summary.joined:
        console.print(f"{made.summary.joined:,} anonymous visitors were joined into whom they logged in as")
    if made.summary.bad:
        examples = "; ".join(made.summary.examples)
        console.print(f"{made.summary.bad:,} bad rows were left out, for example {examples}", markup=False)
    if made.rows and not made.known:
        first, last, at = map(_day, (made.summary.first_ms, made.summary.last_ms, made.at_ms))
        console.print(
            f"Note: everybody is scored as somebody new: the events are of {first} to {last}, and none of them counts "
            f"at {at}; name the moment with --at",
            markup=False,
            soft_wrap=True,
        )


def _day(at_ms: int) -> str:
    return datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC).date().isoformat()


def bundle_of(artifacts: Path, model: str | None, version: str | None) -> Path:
    """The directory of a version of a model: the only one, and the one served, unless they are named."""
    from service.core.bundle import MANIFEST
    from service.models import served_version

    names = sorted(path.name for path in artifacts.glob("*/") if any(path.glob(f"*/{MANIFEST}")))
    if not names:
        raise PropensityError(f"{artifacts}: holds no model; propensity train writes one, --artifacts names another")
    if model is None and len(names) > 1:
        raise PropensityError(f"{artifacts}: holds {', '.join(names)}; name one with --model")
    model = model or names[0]
    if model not in names:
        raise PropensityError(f"{artifacts}: holds no model {model!r}; there is {', '.join(names)}")
    version = version or served_version(artifacts / model)
    if not (artifacts / model / version / MANIFEST).is_file():
        versions = sorted(path.parent.name for path in (artifacts / model).glob(f"*/{MANIFEST}"))
        raise PropensityError(f"{artifacts / model}: holds no version {version!r}; there is {', '.join(versions)}")
    return artifacts / model / version
