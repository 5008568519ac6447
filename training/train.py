"""Training from end to end: events or a table in, a verified and versioned bundle out."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from service.core import bundle, features
from service.core.bundle import Bundle
from service.core.errors import PropensityError
from service.core.features import Plan
from service.core.spec import Count, FeatureSpec, Recency, Sum
from training import dataset, evaluate, export, fit, packing, source, specfile, table
from training.dataset import Dataset, Split
from training.engine import Engine
from training.evaluate import Leak
from training.fit import Fitted
from training.packing import Judgement
from training.summary import Summary

ALIASES: Final = "aliases.json"
PRODUCTION: Final = "production"

# One thread a pair of cores: LightGBM's threads wait for each other actively and crawl on a busy machine.
THREADS: Final = max(1, (os.cpu_count() or 2) // 2)

# Told the stage that begins, then its share done, 0 to 1.
Progress = Callable[[str, float], None]


Fitting = Callable[..., Fitted]


class Cluster(Engine, Protocol):
    """Many machines, which also fit together: `training.distributed`."""

    def fit(
        self,
        dataset: Dataset,
        split: Split,
        names: Sequence[str],
        *,
        seed: int = 0,
        threads: int = 1,
        parameters: Mapping[str, Any] | None = None,
        on_round: Callable[[int, int], None] | None = None,
    ) -> Fitted:
        """What `fit.fit` does."""


@dataclass(frozen=True)
class Options:
    """What `propensity train` lets one choose."""

    artifacts: Path = Path("artifacts")
    seed: int = 0
    threads: int = THREADS
    max_rows: int = 1_000_000
    max_bad_rows: int = 1000
    memory_limit: str = "1GB"
    promote: bool = True
    predictions: Path | None = None


@dataclass(frozen=True)
class Trained:
    """What training made."""

    bundle: Bundle
    judgement: Judgement
    split: Split
    rows: int
    data: Mapping[str, Any]
    notes: tuple[str, ...]


def from_events(
    events: Sequence[str],
    spec_path: Path,
    options: Options,
    on_progress: Progress = lambda stage, share: None,
    cluster: Cluster | None = None,
) -> Trained:
    """Train on event files, on a cluster if one is given. Raises a PropensityError that says what to mend."""
    spec = specfile.load(spec_path)
    plan = features.compile(spec)
    _make_directories(options)
    if cluster is None:
        rows, summary = _read_here(events, plan, options, on_progress)
    else:
        rows, summary = _read_apart(events, plan, options, on_progress, cluster)
    label = plan.spec.label
    horizon_ms = dataset.horizon_of(label) if label is not None else None
    split = dataset.split(rows, horizon_ms, options.seed)
    fitting = fit.fit if cluster is None else cluster.fit
    return _train(rows, split, plan, spec_path, _event_data(summary), options, on_progress, fitting)


def _read_here(events: Sequence[str], plan: Plan, options: Options, on_progress: Progress) -> tuple[Dataset, Summary]:
    with tempfile.TemporaryDirectory(prefix="propensity-") as workdir:
        log = source.read(
            events,
            plan.spec,
            Path(workdir),
            max_bad_rows=options.max_bad_rows,
            memory_limit=options.memory_limit,
            on_progress=lambda share: on_progress("Reading events", share),
        )
        rows = dataset.build(
            log,
            plan,
            seed=options.seed,
            max_rows=options.max_rows,
            on_progress=lambda done, total: on_progress("Building rows", done / total),
        )
    return rows, log.summary


def _read_apart(
    events: Sequence[str], plan: Plan, options: Options, on_progress: Progress, cluster: Cluster
) -> tuple[Dataset, Summary]:
    with cluster.workdir(options.artifacts) as workdir:
        log = cluster.read(
            events,
            plan.spec,
            Path(workdir) / "log",
            max_bad_rows=options.max_bad_rows,
            memory_limit=options.memory_limit,
            on_progress=lambda share: on_progress("Reading events", share),
        )
        rows = dataset.build_apart(
            log,
            plan,
            cluster.run,
            seed=options.seed,
            max_rows=options.max_rows,
            memory_limit=options.memory_limit,
            on_progress=lambda done, total: on_progress("Building rows", done / total),
        )
        log.connection.close()
    return rows, log.summary


def from_table(
    path: str, spec_path: Path, options: Options, on_progress: Progress = lambda stage, share: None
) -> Trained:
    """Train on a table with a label column. Raises a PropensityError that says what to mend."""
    spec = specfile.load(spec_path)
    plan = features.compile(spec)
    _make_directories(options)
    on_progress("Reading the table", 0)
    read = table.Table(path, spec)
    rows = table.build(read, plan)
    bad, examples = read.bad(options.max_bad_rows, labelled=True)
    split = dataset.split(rows, None, options.seed)
    if spec.rows.cold_start:
        rows, split = table.with_strangers(rows, split, plan)
    data = {
        "files": [file.name for file in read.files],
        "rows": len(rows),
        "sha256": bundle.sha256(read.files[0]),
        "bad": bad,
        "examples": examples,
        "missing": sorted(read.relation.missing),
    }
    return _train(rows, split, plan, spec_path, data, options, on_progress)


def _train(
    rows: Dataset,
    split: Split,
    plan: Plan,
    spec_path: Path,
    data: Mapping[str, Any],
    options: Options,
    on_progress: Progress,
    fitting: Fitting = fit.fit,
) -> Trained:
    spec = plan.spec
    on_progress("Looking for leaks", 0)
    leaks = evaluate.leaks(rows.matrix[split.train], spec.names, rows.label[split.train])
    fitted = fitting(
        rows,
        split,
        spec.names,
        seed=options.seed,
        threads=options.threads,
        parameters=spec.fit.model_dump(exclude_none=True),
        on_round=lambda done, most: on_progress("Fitting trees", done / most),
    )
    on_progress("Judging", 0)
    judgement = _judge(rows, split, fitted, spec, leaks)
    with _assembling(options.artifacts / spec.model) as directory:
        export.write(
            fitted.booster,
            directory,
            feature_names=spec.names,
            calibration=fitted.calibration,
            rows=rows.matrix[split.test[:20_000]],
            progress=lambda share: on_progress("Checking the export", share),
        )
        on_progress("Writing the bundle", 0)
        packing.pack(directory, packing.Contents(plan, rows, split, fitted, judgement, spec_path, data))
        made = bundle.load(directory)
        final = options.artifacts / spec.model / made.version
        if final.exists():
            final.rename(directory.with_name(f"{directory.name}-old"))
        directory.rename(final)
    if options.predictions is not None:
        _write_predictions(options.predictions, rows, split, fitted)
    if options.promote:
        promote(options.artifacts, spec.model, made.version)
    return Trained(replace(made, path=final), judgement, split, len(rows), data, split.notes)


def _make_directories(options: Options) -> None:
    """So that a path that cannot be written to is found before the work is done, not after."""
    options.artifacts.mkdir(parents=True, exist_ok=True)
    if options.predictions is not None:
        options.predictions.parent.mkdir(parents=True, exist_ok=True)


def _judge(rows: Dataset, split: Split, fitted: Fitted, spec: FeatureSpec, leaks: Sequence[Leak]) -> Judgement:
    train, test = rows.matrix[split.train], rows.matrix[split.test]
    label = rows.label[split.train]
    codes = [column for column, feature in enumerate(spec.features.values()) if getattr(feature, "categories", None)]
    baselines = {
        "class prior": evaluate.class_prior(label, len(test)),
        "logistic regression": evaluate.logistic_regression(train, label, test, codes),
    }
    rfm = _recency_frequency_monetary(spec)
    if rfm is not None:
        baselines["recency, frequency, monetary"] = evaluate.logistic_regression(train[:, rfm], label, test[:, rfm])
    truth, visitor = rows.label[split.test], rows.visitor[split.test].view(np.int64)
    return Judgement(
        metrics=evaluate.evaluate(truth, fitted.predict(test), visitor),
        baselines={name: evaluate.evaluate(truth, scores, visitor) for name, scores in baselines.items()},
        baseline_probabilities=baselines,
        leaks=leaks,
    )


def _recency_frequency_monetary(spec: FeatureSpec) -> list[int] | None:
    """Columns of the marketer's classic: recency, count and sum of the label's event; None where one is lacking."""
    event = spec.label.kind if spec.label is not None else None
    columns = []
    for kind in (Recency, Count, Sum):
        found = [
            (feature.window or spec.limits.history, column)
            for column, feature in enumerate(spec.features.values())
            if isinstance(feature, kind) and feature.kinds == (event,) and feature.window != "session"
        ]
        if not found:
            return None
        columns.append(max(found)[1])
    return columns


@contextlib.contextmanager
def _assembling(model_directory: Path) -> Iterator[Path]:
    """A directory beside the versions, so that a finished bundle appears by one rename and a failed one never."""
    model_directory.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=".making-", dir=model_directory))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        for left in model_directory.glob(f"{directory.name}*"):
            shutil.rmtree(left, ignore_errors=True)


def promote(artifacts: Path, model: str, version: str) -> None:
    """Make `version` the one that is served when a request names no other."""
    path = artifacts / model / ALIASES
    try:
        aliases = dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (ValueError, TypeError):
        raise PropensityError(f'{path}: is damaged; write {{"{PRODUCTION}": "{version}"}} into it') from None
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({**aliases, PRODUCTION: version}) + "\n", encoding="utf-8")
    fresh.replace(path)


def _write_predictions(path: Path, rows: Dataset, split: Split, fitted: Fitted) -> None:
    """Parquet of the rows of the last split: visitor_hash, cutoff_ms, label, propensity."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "visitor_hash": rows.visitor[split.test],
        "cutoff_ms": rows.cutoff_ms[split.test],
        "label": rows.label[split.test],
        "propensity": fitted.predict(rows.matrix[split.test]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _event_data(summary: Summary) -> dict[str, Any]:
    return {
        "files": list(summary.files),
        "fingerprint": summary.fingerprint,
        "rows": summary.rows,
        "events": summary.events,
        "ignored": summary.ignored,
        "bad": summary.bad,
        "visitors": summary.visitors,
        "joined": summary.joined,
        "examples": list(summary.examples),
        "missing": list(summary.missing_properties),
        "from": _iso(summary.first_ms),
        "to": _iso(summary.last_ms),
    }


def _iso(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).isoformat(timespec="seconds")
