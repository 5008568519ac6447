"""Commands around the running service: serve, replay, models, compact; and how it is asked."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.installed import need
from cli.offline import Events, MaxBadRows, MemoryLimit, MoreEvents, Spec
from cli.progress import Report, console, stages
from service.core.errors import PropensityError


def register(app: typer.Typer) -> None:
    """Add the online commands."""
    for command in (serve, replay, models, compact):
        app.command()(command)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1 unless set).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (8000 unless set).")] = None,
    artifacts: Annotated[Path | None, typer.Option(help="Directory of bundles (artifacts unless set).")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that serve (1 unless set); one a core.")] = None,
    first_answer: Annotated[bool, typer.Option(help="Show an answer once the service is ready.")] = False,
) -> None:
    """Run the scoring service. Every setting: PROPENSITY_* variables, see docs/settings.md."""
    from service import settings as service_settings

    given = {"host": host, "port": port, "artifacts": artifacts, "workers": workers}
    settings = service_settings.load(**{name: value for name, value in given.items() if value is not None})
    _require_directory_of_metrics()
    if first_answer:
        _answer_when_ready(f"http://{settings.host}:{settings.port}")
    if settings.workers > 1:  # the supervisor needs none of what its workers load
        from service.supervisor import serve as run
    else:
        from service.app import serve as run
    run(settings)


def _require_directory_of_metrics() -> None:
    # The client library opens its files while it is imported, and fails with the name of one of them.
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if directory and not (Path(directory).is_dir() and os.access(directory, os.W_OK)):
        raise PropensityError(f"PROMETHEUS_MULTIPROC_DIR: {directory} is no directory to write to; make it, empty")


def replay(
    spec: Spec,
    events: Events = [],  # noqa: B006 - typer reads the default, nobody changes it
    more: MoreEvents = None,
    table: Annotated[str | None, typer.Option(help="Instead of events: a table whose columns are traits.")] = None,
    max_bad_rows: MaxBadRows = 1000,
    memory_limit: MemoryLimit = "1GB",
) -> None:
    """Load history into the feature cache. Resumes where it was cut off; running it twice changes nothing."""
    paths = [*events, *(more or [])]
    if bool(paths) == (table is not None):
        raise PropensityError("give either --events FILES or --table FILE")
    need("training.specfile", "training.table")
    from cli import history
    from service import settings

    with stages() as report:
        if table is not None:
            loaded = asyncio.run(history.replay_table(table, spec, settings.load(), max_bad_rows, report))
        else:
            loaded = asyncio.run(
                history.replay_events(paths, spec, settings.load(), max_bad_rows, memory_limit, report)
            )
    if loaded.visitors:
        console.print(f"{loaded.visitors:,} visitors, {loaded.added:,} records added to the feature cache.")
    else:
        console.print("Nothing to do: all of this history was replayed before.")
    if loaded.joined:
        console.print(f"{loaded.joined:,} anonymous visitors joined into whom they logged in as.")
    if loaded.said:
        console.print(f"{loaded.said:,} events kept that say something of a person.")


def models(url: Annotated[str, typer.Option(help="Where the service runs.")] = "http://127.0.0.1:8000") -> None:
    """List the models that the running service has loaded."""
    print(json.dumps(ask(f"{url}/v1/models"), indent=2))


def compact() -> None:
    """Store visitors anew in as little memory as they need, now. The service does so by itself, slowly."""
    from service import settings
    from service.app import open_store
    from service.scoring import unix_ms
    from service.workers.compaction import Compactor

    async def run(report: Report) -> tuple[int, int, int]:
        given = settings.load()
        async with open_store(given.model_copy(update={"redis_timeout_ms": 10_000}), 0) as store:
            before, total = await store.used_bytes(), max(1, await store.count_keys())
            looked_at = stored_anew = 0
            async for page in Compactor(store).pages(500, 0, unix_ms):
                looked_at, stored_anew = looked_at + page.looked_at, stored_anew + page.stored_anew
                report("Compacting visitors", looked_at / total)
            return stored_anew, before, await store.used_bytes()

    with stages() as report:
        visitors, before, after = asyncio.run(run(report))
    console.print(
        f"{visitors:,} visitors stored anew; memory used: {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now."
    )


def pair(text: str) -> tuple[str, str | float]:
    """Name and value of a field of a request, written as referrer=ads."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise PropensityError(f"{text!r} is no field; write NAME=VALUE, as referrer=ads")
    try:
        number = json.loads(value)
    except ValueError:
        number = None
    return name, number if type(number) in (int, float) else value


def ask(url: str, body: Any = None) -> Any:
    """What the service answers to a body, or to a GET without one. Raises PropensityError."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise PropensityError(f"{url} answers {error.code}: {_detail(error)}") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PropensityError(f"{url} cannot be reached ({reason}); start it with propensity serve") from None
    except ValueError as error:
        raise PropensityError(f"{url} is no propensity service ({error}); write --url http://127.0.0.1:8000") from None


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        problem = json.loads(error.read())
        hint = "; here: --model NAME" if str(problem.get("type")).endswith("model-not-named") else ""
        return f"{problem['detail']}{hint}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return error.reason


def _answer_when_ready(url: str) -> None:
    """Wait in the background until the service is ready, then show one of its answers."""
    import threading

    def show() -> None:
        from cli import history
        from service import settings

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{url}/readyz", timeout=1):
                    break
            except OSError:
                time.sleep(0.05)
        try:
            visitor = asyncio.run(history.some_visitor(settings.load())) or "somebody-new"
            body = json.dumps({"visitor_id": visitor, "context": {"referrer": "email"}})
            answer = json.dumps(ask(f"{url}/v1/score", json.loads(body)), indent=2)
        except PropensityError as error:
            print(f"propensity: no first answer: {error}", file=sys.stderr)
            return
        print(f"\n$ curl -s {url}/v1/score -H 'Content-Type: application/json' -d '{body}'\n{answer}\n", flush=True)
        print(f"Documentation: {url}/docs    Metrics: {url}/metrics    Stop with Ctrl-C.", flush=True)

    threading.Thread(target=show, daemon=True).start()
