"""The command `drift`: how far what was scored has moved from the training population, feature by feature.

From Prometheus, whose recording rules have the numbers, or from files of scores, from which they are computed.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.installed import need
from cli.offline import ARTIFACTS, ARTIFACTS_SET
from service.core.errors import PropensityError

if TYPE_CHECKING:  # what starts `propensity serve` need not wait for these
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

    from service.core.bundle import Bundle

PROPENSITY: Final = "propensity"
_DIGITS: Final = 4

Labels = tuple[str, str, str]  # model, version, feature


@dataclass(frozen=True)
class Line:
    """One feature of one version; NaN where a number is not known."""

    model: str
    version: str
    feature: str
    psi: float
    chance: float
    floor: float
    missing: float
    reference_missing: float
    population: float

    @property
    def threshold(self) -> float:
        """What PSI stays below as long as nothing that matters has changed."""
        return self.chance + self.floor

    @property
    def drifts(self) -> bool:
        """Whether an alarm is due."""
        return self.psi > self.threshold

    @property
    def verdict(self) -> str:
        """What a person wants to read."""
        if math.isinf(self.chance):
            return "clock, not judged"
        return "drifts" if self.drifts else "as in training"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(drift)


def drift(
    prometheus: Annotated[
        str | None, typer.Option(help="Where Prometheus runs that has the rules of deploy/prometheus.")
    ] = None,
    offline: Annotated[
        list[str] | None,
        typer.Option(help="Instead: files or URLs of features and scores, Parquet or NDJSON. Repeatable."),
    ] = None,
    window: Annotated[str, typer.Option(help="1h or 24h: what to look at in Prometheus, and the floor.")] = "1h",
    model: Annotated[str | None, typer.Option(help="Model; needed with --offline where there are several.")] = None,
    version: Annotated[str | None, typer.Option(help="Version; with --offline: the one served unless given.")] = None,
    artifacts: Annotated[
        Path, typer.Option(envvar=ARTIFACTS_SET, help="Directory of bundles, for --offline.")
    ] = ARTIFACTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say which features have drifted, and how sure that is. Exits with 1 if one has."""
    from service.core import drift as numbers

    if window not in numbers.WINDOWS:
        raise PropensityError(f"--window {window} is unknown; write --window {' or --window '.join(numbers.WINDOWS)}")
    if (prometheus is None) == (not offline):
        raise PropensityError("give either --prometheus URL or --offline FILES")
    if prometheus is not None:
        lines = recorded(prometheus, window, model, version)
    else:
        need("duckdb", "pyarrow")
        lines = computed(offline or [], window, chosen(artifacts, model, version))
    if as_json:
        print(json.dumps([_plain(line) for line in lines], indent=2))
    else:
        _print(lines, window)
    if any(line.drifts for line in lines):
        raise typer.Exit(1)


# --- from Prometheus ---


def recorded(url: str, window: str, model: str | None = None, version: str | None = None) -> list[Line]:
    """What the recording rules of a Prometheus have now, in the order of model, version and feature."""
    given = {"model": model, "version": version}
    matchers = ", ".join(f"{label}={json.dumps(value)}" for label, value in given.items() if value is not None)

    def ask(series: str) -> dict[Labels, float]:
        return _series(url, f"{series}{{{matchers}}}")

    psi = ask(f"propensity:psi:{window}")
    if not psi:
        raise PropensityError(
            f"{url} has no propensity:psi:{window}{{{matchers}}}: either nothing was scored in the last {window}, "
            "or it does not scrape the service, or it was started without the rules of deploy/prometheus/rules"
        )
    threshold = ask(f"propensity:drift_threshold:{window}")
    missing, expected = ask(f"propensity:missing_share:{window}"), ask("propensity:reference_missing_share")
    population = ask(f"propensity:feature_population:{window}")
    floor = next(iter(_series(url, f"propensity:threshold:drift_floor_{window}").values()), math.nan)
    return [
        Line(
            *labels,
            psi=psi[labels],
            chance=threshold.get(labels, math.nan) - floor,
            floor=floor,
            missing=missing.get(labels, math.nan),
            reference_missing=expected.get(labels, math.nan),
            population=population.get(labels, math.nan),
        )
        for labels in sorted(psi)
    ]


def _series(url: str, query: str) -> dict[Labels, float]:
    """An instant query's values by model, version and feature."""
    address = f"{url.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    if not address.startswith(("http://", "https://")):
        raise PropensityError(f"{url} is no address; write --prometheus http://127.0.0.1:9090")
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        error.close()
        raise PropensityError(f"{url} answers {error.code} {error.reason} to the query {query}") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PropensityError(f"{url} cannot be reached ({reason}); write --prometheus http://127.0.0.1:9090") from None
    except (ValueError, KeyError, TypeError):
        raise PropensityError(f"{url} is no Prometheus; write --prometheus http://127.0.0.1:9090") from None
    return {_labels(one["metric"]): float(one["value"][1]) for one in result}


def _labels(metric: Mapping[str, str]) -> Labels:
    return metric.get("model", ""), metric.get("version", ""), metric.get("feature", "")


# --- from files ---


def chosen(artifacts: Path, model: str | None, version: str | None) -> Bundle:
    """The bundle of a model: of the version, else the one that would be served."""
    from service import models
    from service.core import bundle

    names = sorted(path.name for path in artifacts.iterdir() if path.is_dir()) if artifacts.is_dir() else []
    if model is None and len(names) == 1:
        model = names[0]
    if model is None or model not in names:
        listed = f"it has {', '.join(names)}" if names else "it has none"
        raise PropensityError(f"{artifacts}: which model? Write --model NAME; {listed}")
    return bundle.load(artifacts / model / (version or models.served_version(artifacts / model)))


def computed(files: Sequence[str], window: str, bundle: Bundle) -> list[Line]:
    """The same from files that have a column for each feature, and `propensity`."""
    import numpy as np

    from service.core import drift as numbers

    bins = numbers.described(bundle.spec, bundle.reference)
    counts = {name: np.zeros(len(own.shares), np.int64) for name, own in bins.items()}
    for column, values in _columns(files, bundle.spec.names):
        counts[column] += numbers.counts_of(values, bins[column])
    critical = numbers.critical_values(bundle.spec, bundle.reference)
    floor, per_visitor = numbers.WINDOWS[window]
    rows = int(counts[numbers.SCORE].sum())
    if not rows:
        raise PropensityError(f"{' '.join(files)}: no rows, so there is nothing to compare")
    return [
        Line(
            bundle.name,
            bundle.version,
            name,
            psi=numbers.psi(counts[name], bins[name].shares),
            chance=numbers.chance_level(critical[name], rows, bins[name].rows, per_visitor),
            floor=floor,
            missing=counts[name][0] / rows,
            reference_missing=bins[name].shares[0],
            population=rows,
        )
        for name in sorted(bins)
    ]


def _columns(files: Sequence[str], features: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Every feature's values, and the scores under "(score)", as float32[n], some rows at a time."""
    import duckdb
    import numpy as np

    from service.core import drift as numbers

    wanted = {**{name: name for name in features}, numbers.SCORE: PROPENSITY}
    selected = ", ".join(f"CAST({_quoted(column)} AS FLOAT) AS {_quoted(column)}" for column in wanted.values())
    for file, relation in _tables(duckdb.connect(), files):
        lacking = [column for column in wanted.values() if column not in relation.columns]
        if lacking:
            raise PropensityError(
                f"{file}: has no column {', '.join(lacking)}; "
                f"it takes one for each feature of the model, and {PROPENSITY}"
            )
        with _told(file):
            for batch in relation.select(selected).to_arrow_reader(100_000):
                for name, column in wanted.items():
                    values = batch.column(column).fill_null(math.nan)
                    yield name, values.to_numpy(zero_copy_only=False).astype(np.float32)


def _tables(connection: DuckDBPyConnection, files: Sequence[str]) -> Iterator[tuple[str, DuckDBPyRelation]]:
    """What is read: the files of paths one by one, and the snapshots at URLs."""
    from pyarrow import dataset

    from files import snapshots
    from training.eventfiles import find_files, reader_of

    paths = [file for file in files if "://" not in file]
    for path in find_files(paths) if paths else ():
        reader = {"parquet": "read_parquet", "json": "read_json"}.get(reader_of(path) or "")
        if reader is None:
            raise PropensityError(f"{path}: give Parquet or NDJSON")
        with _told(str(path)):
            relation = connection.from_query(f"FROM {reader}(?)", params=[str(path)])
        yield str(path), relation
    for url in files:
        if url not in paths:
            found = snapshots.find(url)
            if not found.parts:
                raise PropensityError(f"{url}: holds no part-*.parquet; give what propensity score --out URL wrote")
            with _told(url):
                relation = connection.from_arrow(dataset.dataset(list(found.parts), filesystem=found.filesystem))
            yield url, relation


@contextmanager
def _told(file: str) -> Iterator[None]:
    import duckdb
    from pyarrow import ArrowException

    try:
        yield
    except (duckdb.Error, ArrowException, OSError) as error:
        raise PropensityError(f"{file}: {str(error).splitlines()[0]}") from None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# --- printing ---


def _plain(line: Line) -> dict[str, Any]:
    """A line as JSON has it: null for what is not known or has no bound."""
    values = {**asdict(line), "threshold": line.threshold, "drifts": line.drifts}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _print(lines: Sequence[Line], window: str) -> None:
    console = Console()
    for (model, version), own in groupby(lines, lambda line: (line.model, line.version)):
        shown = list(own)
        scores = max(line.population for line in shown)
        table = Table(title=f"{escape(model)} {escape(version)}: {scores:,.0f} scores, window {window}")
        table.add_column("feature")
        for heading in ("PSI", "chance", "floor"):
            table.add_column(heading, justify="right")
        table.add_column("verdict")
        for heading in ("missing", "in training"):
            table.add_column(heading, justify="right")
        for line in sorted(shown, key=lambda line: (not line.drifts, -line.psi)):
            style = "bold red" if line.drifts else "dim" if math.isinf(line.chance) else None
            table.add_row(*_cells(line), style=style)
        table.caption = "PSI above chance + floor drifts."
        console.print(table)


def _cells(line: Line) -> list[str]:
    chance = "" if math.isinf(line.chance) else f"{line.chance:.{_DIGITS}f}"
    missing, expected = (f"{100 * share:.1f} %" for share in (line.missing, line.reference_missing))
    return [
        escape(line.feature), f"{line.psi:.{_DIGITS}f}", chance, f"{line.floor:g}", line.verdict, missing, expected,
    ]  # fmt: skip
