"""Packing: a bundle that loads, says what it is made from, and can be checked again wherever it is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
from scipy.special import expit

from service.core import bundle, events, features, segments
from service.core.bundle import Bundle
from service.core.errors import PropensityError
from training import dataset, evaluate, export, fit, packing, specfile
from training.dataset import Dataset, GoldenRow
from training.packing import Contents, Judgement

NOW_MS = 1_767_225_600_000
SPEC = """
# kept as it was written
model: shop
events:
  view: {code: 1, event: Product Viewed, value: price, attribute: category}
  order: {code: 2, event: Order Completed, value: revenue}
label: {event: order, horizon: 7d}
features:
  views: {count: view}
  last_price: {latest: view}
  rate: {ratio: [views, since_view], prior: [1, 0]}
  since_view: {recency: view}
  device: {trait: device, categories: [mobile, desktop]}
  referrer: {request: referrer, categories: [ads, mail]}
  amount: {request: amount}
  grade: {request: grade, categories: {a: 0.1, b: 7}}
"""


def golden_row(seed: int) -> GoldenRow:
    chance = np.random.default_rng(seed)
    count = int(chance.integers(0, 5))
    records = events.records(
        np.sort(NOW_MS - chance.integers(1, 10**7, count)), 1, chance.integers(1, 99, count), 3, chance.random(count)
    )
    device = events.records([NOW_MS - 5], events.TRAIT_TEXT, events.hash32("device"), events.hash32("mobile"), np.nan)
    codes = [(0, 2.5, np.float32(0.1)), (1, np.nan, 7), (2, -3.0, np.nan), (np.nan, 0.0, np.nan)]
    return GoldenRow(records, device[: seed % 2], np.array(codes[seed % 4], np.float32), NOW_MS)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """A small model, fitted and judged."""
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(SPEC, encoding="utf-8")
    spec = specfile.load(path)
    chance = np.random.default_rng(0)
    matrix = chance.normal(size=(3000, len(spec.names))).astype(np.float32)
    matrix[chance.random(matrix.shape) < 0.2] = np.nan
    label = chance.random(3000) < expit(np.nan_to_num(2 * matrix[:, 0]) - 1)
    cutoff = NOW_MS - np.arange(3000)[::-1] * 3_600_000
    rows = Dataset(
        matrix, label, chance.integers(0, 900, 3000).astype(np.uint64), cutoff, tuple(map(golden_row, range(8)))
    )
    split = dataset.split(rows, 7 * 86_400_000)
    fitted = fit.fit(rows, split, spec.names, parameters={"num_leaves": 4})
    truth = rows.label[split.test]
    prior = evaluate.class_prior(rows.label[split.train], len(split.test))
    judgement = Judgement(
        evaluate.evaluate(truth, fitted.predict(rows.matrix[split.test])),
        {"class prior": evaluate.evaluate(truth, prior)},
        {"class prior": prior},
        [evaluate.Leak("views", 0.99, 0.9, "'views' gives the label away")],
    )
    data: dict[str, Any] = {"files": ["events.csv"], "events": 12_345}
    return Contents(features.compile(spec), rows, split, fitted, judgement, path, data)


def packed(contents: Contents, directory: Path) -> Bundle:
    export.write(
        contents.fitted.booster,
        directory,
        feature_names=contents.spec.names,
        calibration=contents.fitted.calibration,
        rows=contents.rows.matrix,
    )
    packing.pack(directory, contents)
    return bundle.load(directory)


@pytest.fixture(scope="module")
def made(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return packed(contents, tmp_path_factory.mktemp("bundles") / "bundle")


def test_the_bundle_loads_and_scores_as_lightgbm_does(contents: Contents, made: Bundle) -> None:
    scores = made.predict(contents.rows.matrix)
    np.testing.assert_allclose(scores, contents.fitted.predict(contents.rows.matrix), atol=1e-6)


def test_it_holds_every_file_of_the_design(contents: Contents, made: Bundle) -> None:
    names = {path.name for path in made.path.iterdir()}
    assert names == {
        *("model.onnx", "manifest.json", "features.yaml", "reference.json", "golden.json", "model.txt"),
        *("report.html", "parity.json"),
    }
    assert set(made.manifest.files) == names - {"manifest.json"}
    assert (made.path / "features.yaml").read_text(encoding="utf-8") == SPEC
    booster = lightgbm.Booster(model_file=made.path / "model.txt")
    margin = contents.fitted.booster.predict(contents.rows.matrix, raw_score=True)
    np.testing.assert_allclose(booster.predict(contents.rows.matrix, raw_score=True), margin, atol=1e-9)


def test_the_manifest_says_what_the_model_is_and_how_good(contents: Contents, made: Bundle) -> None:
    manifest = made.manifest
    assert (manifest.model, manifest.names, manifest.dtype) == ("shop", contents.spec.names, "float32")
    assert manifest.spec_hash == contents.spec.hash
    assert manifest.version == f"{manifest.created_at[:10].replace('-', '')}-{manifest.files['model.onnx'][:8]}"
    assert manifest.calibration == pytest.approx(
        {"slope": contents.fitted.calibration.slope, "intercept": contents.fitted.calibration.intercept}
    )
    assert manifest.metrics["model"]["roc_auc"] == contents.judgement.metrics.roc_auc
    assert set(manifest.metrics) == {"model", "class prior"}
    assert manifest.data == {
        "files": ["events.csv"],
        "events": 12_345,
        "training_rows": 3000,
        "split": "by time, with gaps of one horizon",
        "leaks": ["views"],
    }
    assert set(manifest.libraries) == set(packing.LIBRARIES)


def test_the_segments_are_cut_by_the_scores_of_rows_that_the_trees_never_saw(contents: Contents, made: Bundle) -> None:
    scores = made.predict(contents.rows.matrix[contents.split.test])
    named = [made.segment(float(score)) for score in scores]
    assert set(made.manifest.segments) == set(segments.SEGMENTS[:-1])
    shares = [named.count(segment) / len(named) for segment in segments.SEGMENTS]
    assert all(share > 0 for share in shares)
    assert made.percentile(float(np.median(scores))) == pytest.approx(50, abs=2)


def test_golden_cases_hold_the_records_and_requests_of_their_rows(contents: Contents, made: Bundle) -> None:
    cases = bundle.golden_cases(made.path)
    assert len(cases) >= 5
    by_records = {case.records: case for case in cases}
    for row in contents.rows.golden:
        case = by_records.get(row.records.tobytes())
        if case is not None and len(row.records):
            assert case.now_ms == row.now_ms
            assert case.traits == row.traits.tobytes()
            coded = np.array(contents.plan.encode_request(case.request), np.float32)
            np.testing.assert_array_equal(coded, row.request)
    assert any(None in case.vector for case in cases)
    assert any(len(case.records) for case in cases)


def test_a_golden_case_with_an_infinite_feature_is_left_out(contents: Contents, made: Bundle) -> None:
    vectors = [case.vector for case in bundle.golden_cases(made.path)]
    assert all(value is None or math.isfinite(value) for vector in vectors for value in vector)
    at_once = events.records([NOW_MS], 1, [1], 0, 1.0)  # since_view is 0, so the rate is infinite
    row = replace(contents.rows.golden[0], records=at_once)
    few = packing.golden_cases([*contents.rows.golden, row], contents.plan, contents.fitted)
    assert len(few) == len(vectors)
    with pytest.raises(PropensityError, match=r"features\.rate is infinite on every row; give the ratio a prior"):
        packing.golden_cases([row], contents.plan, contents.fitted)


def test_the_reference_describes_rows_that_the_trees_have_not_seen_where_nothing_else_is_known(
    contents: Contents, made: Bundle
) -> None:
    assert set(made.reference.features) == set(contents.spec.names)
    unseen = contents.rows.matrix[contents.split.test]
    assert made.reference.features["views"].shares[0] == pytest.approx(float(np.isnan(unseen[:, 0]).mean()))
    scores = made.predict(unseen)
    assert made.reference.quantiles[0] == pytest.approx(float(scores.min()), abs=1e-6)


def test_the_reference_and_the_segments_are_of_whom_the_service_scores(contents: Contents, tmp_path: Path) -> None:
    matrix = contents.rows.matrix[:200].copy()
    matrix[:, 0] = 7.0
    scored = dataset.Population(matrix, np.repeat(np.arange(50), 4).astype(np.uint64))
    given = replace(contents, rows=replace(contents.rows, population=scored))
    made = packed(given, tmp_path / "bundle")
    assert made.reference.features["views"].shares[0] == 0
    assert {bins.rows for bins in made.reference.features.values()} == {made.reference.score.rows} == {50}
    scores = made.predict(matrix)
    assert made.reference.quantiles[-1] == pytest.approx(float(scores.max()), abs=1e-6)
    assert made.cutoffs == pytest.approx(segments.cutoffs(scores, contents.spec.segments), abs=1e-6)


def test_the_report_stands_alone_and_names_model_data_and_leaks(made: Bundle) -> None:
    page = (made.path / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    for text in ("shop", made.version, "12,345", "Order Completed within 7d", "gives the label away", "early stopping"):
        assert text in page, text
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page


@pytest.mark.parametrize(("key", "told"), [("event", "any event within 7d"), ("absent", "no event within 7d")])
def test_the_report_says_that_any_event_is_the_label(contents: Contents, tmp_path: Path, key: str, told: str) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(SPEC.replace("event: order, horizon", f"{key}: any, horizon"), encoding="utf-8")
    made = packed(replace(contents, plan=features.compile(specfile.load(path)), spec_path=path), tmp_path / "bundle")
    assert told in (made.path / "report.html").read_text(encoding="utf-8")


def test_a_model_of_rows_without_time_is_packed_too(contents: Contents, tmp_path: Path) -> None:
    rows = replace(contents.rows, cutoff_ms=np.zeros(3000, np.int64))
    split = dataset.split(rows, None)
    timeless = replace(contents, rows=rows, split=split)
    truth = rows.label[split.test]
    judged = evaluate.evaluate(truth, contents.fitted.predict(rows.matrix[split.test]))
    prior = np.full(len(split.test), 0.3)
    judgement = Judgement(judged, {"class prior": evaluate.evaluate(truth, prior)}, {"class prior": prior}, [])
    made = packed(replace(timeless, judgement=judgement), tmp_path / "bundle")
    assert made.manifest.data["split"] == "at random"
    assert made.manifest.data["leaks"] == []


def test_every_file_is_plain_json_without_numbers_that_json_has_not(made: Bundle) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    for name in ("manifest.json", "reference.json", "golden.json", "parity.json"):
        json.loads((made.path / name).read_text(encoding="utf-8"), parse_constant=refuse)
