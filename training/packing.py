"""Packing: everything a bundle holds beside the exported graph, made from a fitted and judged model."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.core import bundle, segments
from service.core.bundle import Golden, Manifest
from service.core.errors import PropensityError
from service.core.features import Plan
from service.core.spec import ANY, FeatureSpec, Request, Trait, format_duration
from training import reference, report
from training.dataset import Dataset, GoldenRow, Population, Split
from training.evaluate import Leak, Metrics
from training.fit import Fitted

LIBRARIES: Final = ("lightgbm", "numpy", "onnx", "onnxruntime", "duckdb", "scikit-learn", "propensity")
SHAP_ROWS: Final = 2_000
SAMPLE_ROWS: Final = 20_000


@dataclass(frozen=True)
class Judgement:
    """How the model and its baselines did on the last split, and which features look like leaks."""

    metrics: Metrics
    baselines: Mapping[str, Metrics]
    baseline_probabilities: Mapping[str, npt.NDArray[np.float64]]
    leaks: Sequence[Leak]


@dataclass(frozen=True)
class Contents:
    """What a bundle is packed from. `data` are facts about the data that the manifest and the report show."""

    plan: Plan
    rows: Dataset
    split: Split
    fitted: Fitted
    judgement: Judgement
    spec_path: Path
    data: Mapping[str, Any]

    @property
    def population(self) -> Population:
        """Whom the service scores; where too few are known, and of a table, rows that the trees have not seen."""
        test = self.split.test
        return self.rows.population or Population(self.rows.matrix[test], self.rows.visitor[test])

    @property
    def spec(self) -> FeatureSpec:
        """The feature spec."""
        return self.plan.spec


def pack(directory: Path, contents: Contents) -> Manifest:
    """Complete the bundle in `directory`, which holds model.onnx, and seal it."""
    spec, fitted, rows, split = contents.spec, contents.fitted, contents.rows, contents.split
    now = datetime.datetime.now(datetime.UTC)
    fitted.booster.save_model(directory / "model.txt")
    shutil.copyfile(contents.spec_path, directory / "features.yaml")
    probability = fitted.predict(rows.matrix[split.test])
    population = contents.population
    scores = fitted.predict(population.matrix).astype(np.float32)
    described = reference.describe(spec, population.matrix, scores, reference.scores_per_visitor(population.visitor))
    _write_json(directory / "reference.json", described.model_dump(mode="json"))
    golden = golden_cases(rows.golden, contents.plan, fitted)
    _write_json(directory / "golden.json", [case.model_dump(mode="json") for case in golden])
    cuts = dict(zip(segments.SEGMENTS, segments.cutoffs(scores, spec.segments), strict=False))
    version = f"{now:%Y%m%d}-{bundle.sha256(directory / 'model.onnx')[:8]}"
    page = report.render(_report(contents, probability, cuts, version, now))
    (directory / "report.html").write_text(page, encoding="utf-8")
    manifest = {
        "model": spec.model,
        "version": version,
        "created_at": now.isoformat(timespec="seconds"),
        "spec": spec.model_dump(mode="json"),
        "spec_hash": spec.hash,
        "names": spec.names,
        "dtype": "float32",
        "segments": cuts,
        "calibration": asdict(fitted.calibration),
        "data": {
            **contents.data,
            "training_rows": len(rows),
            "split": split.how,
            "leaks": [leak.feature for leak in contents.judgement.leaks],
        },
        "metrics": {
            "model": asdict(contents.judgement.metrics),
            **{name: asdict(metrics) for name, metrics in contents.judgement.baselines.items()},
        },
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    return bundle.seal(directory, json.loads(json.dumps(manifest, allow_nan=False)))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def golden_cases(rows: Sequence[GoldenRow], plan: Plan, fitted: Fitted) -> list[Golden]:
    """What each row is made from, with its vector and score, as `golden.json` has it; JSON has no infinite values."""
    cases = [
        Golden(
            records=base64.b64encode(row.records.tobytes()),
            traits=base64.b64encode(row.traits.tobytes()),
            request=_context(plan, row.request),
            now_ms=row.now_ms,
            vector=(0.0,),
            score=0.0,
        )
        for row in rows
    ]
    vectors = bundle.golden_vectors(plan, cases)
    finite = [not np.isinf(vector).any() for vector in vectors]
    if not any(finite):
        column = int(np.isinf(vectors).any(axis=0).argmax())
        raise PropensityError(f"features.{plan.spec.names[column]} is infinite on every row; give the ratio a prior")
    scores = fitted.predict(vectors)
    plain = [tuple(None if math.isnan(x) else float(x) for x in vector) for vector in vectors]
    return [
        case.model_copy(update={"vector": vector, "score": float(score)})
        for case, vector, score, kept in zip(cases, plain, scores, finite, strict=True)
        if kept
    ]


def _context(plan: Plan, codes: npt.NDArray[np.float32]) -> dict[str, Any]:
    """A request context that is coded as `codes`."""
    context: dict[str, Any] = {}
    for feature, code in zip(plan.spec.requests.values(), codes, strict=True):
        if not math.isnan(code):
            named = {np.float32(number): name for name, number in feature.codes.items()}
            context[feature.request] = float(code) if feature.categories is None else named.get(code, "(other)")
    return context


def _report(
    contents: Contents,
    probability: npt.NDArray[np.float64],
    cuts: Mapping[str, float],
    version: str,
    now: datetime.datetime,
) -> report.ReportData:
    rows, split, fitted, judgement = contents.rows, contents.split, contents.fitted, contents.judgement
    some = np.linspace(0, len(split.test) - 1, min(len(split.test), SHAP_ROWS)).astype(np.int64)
    explained = rows.matrix[split.test[some]]
    contributions = np.asarray(fitted.booster.predict(explained, pred_contrib=True))[:, :-1]
    sample = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_ROWS)).astype(np.int64)
    scored = {
        name: report.Scored(scores, judgement.baselines[name])
        for name, scores in judgement.baseline_probabilities.items()
    }
    return report.ReportData(
        model=contents.spec.model,
        version=version,
        created_at=now.isoformat(timespec="seconds"),
        spec_hash=contents.spec.hash,
        label=_label(contents.spec),
        data=contents.data,
        splits=_spans(contents),
        test_label=rows.label[split.test],
        scored=report.Scored(probability, judgement.metrics),
        baselines=scored,
        segments=cuts,
        importance=report.Importance(
            contents.spec.names,
            np.asarray(fitted.booster.feature_importance("gain"), np.float64),
            contributions,
            explained,
        ),
        sample=rows.matrix[sample],
        sample_label=rows.label[sample],
        learning_curve=fitted.learning_curve,
        best_round=fitted.booster.best_iteration,
        leaks=judgement.leaks,
        warnings=split.notes,
        categories={
            name: feature.codes
            for name, feature in contents.spec.features.items()
            if isinstance(feature, (Trait, Request)) and feature.categories is not None
        },
    )


def _label(spec: FeatureSpec) -> str:
    label = spec.label
    if label is None:
        return ""
    if label.column is not None:
        return f"{label.column} is {' or '.join(label.positive)}"
    event = "event" if label.kind == ANY else spec.events[str(label.kind)].event
    quantity = "no " if label.absent else "any " if label.kind == ANY else ""
    return f"{quantity}{event} within {format_duration(label.horizon or 0)}"


def _spans(contents: Contents) -> list[report.Span]:
    spans = []
    by_time = contents.rows.cutoff_ms.any()
    parts = {"train": "train", "stop": "early stopping", "calibrate": "calibration", "test": "test"}
    for field, name in parts.items():
        chosen = getattr(contents.split, field)
        cutoff = contents.rows.cutoff_ms[chosen]
        first, last = (int(cutoff.min()), int(cutoff.max())) if by_time else (None, None)
        spans.append(report.Span(name, first, last, len(chosen), int(contents.rows.label[chosen].sum())))
    return spans
