"""Training from end to end: files in, a verified and promoted bundle out, or nothing at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from service.core import bundle
from service.core.errors import PropensityError
from service.core.spec import InvalidSpec
from training import dataset, simulate, source, train
from training.dataset import TooLittleData
from training.eventfiles import UnreadableEvents
from training.train import Options, Trained

END = datetime(2026, 7, 1, tzinfo=UTC)
END_MS = int(END.timestamp() * 1000)
DAY_MS = 86_400_000
SPEC = """
model: purchase_5d
events:
  view:     {code: 1, event: Product Viewed,  value: price, attribute: category}
  cart:     {code: 2, event: Product Added,   value: price, attribute: category}
  purchase: {code: 3, event: Order Completed, value: revenue}
label: {event: purchase, horizon: 5d}
rows: {per_visitor: 5}
fit: {learning_rate: 0.3, num_leaves: 5}
features:
  views_1d:   {count: view, window: 1d}
  views:      {count: view}
  carts_7d:   {count: cart, window: 7d}
  bought:     {count: purchase}
  spent:      {sum: purchase}
  since_view: {recency: view}
  since_buy:  {recency: purchase}
  device:     {trait: device, categories: [mobile, desktop, tablet]}
  referrer:   {request: referrer, categories: [direct, search, email, ads]}
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the events of a small shop and a spec."""
    directory = tmp_path_factory.mktemp("shop")
    simulate.simulate(simulate.Shop(visitors=2500, days=40, seed=2, end=END), directory / "events.parquet")
    (directory / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def first(shop: Path) -> Trained:
    """A first model in shop/artifacts."""
    options = Options(artifacts=shop / "artifacts", seed=7, threads=1, predictions=shop / "made" / "scores.parquet")
    return train.from_events([str(shop / "events.parquet")], shop / "spec.yaml", options)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_bundle_is_verified_promoted_and_says_what_it_is_from(shop: Path, first: Trained) -> None:
    aliases = json.loads((shop / "artifacts" / "purchase_5d" / "aliases.json").read_text())
    assert aliases == {"production": first.bundle.version}
    path = shop / "artifacts" / "purchase_5d" / first.bundle.version
    assert first.bundle.path == path
    loaded = bundle.load(path)
    assert loaded.manifest == first.bundle.manifest
    assert len(bundle.golden_cases(path)) > 5
    assert (path / "report.html").stat().st_size > 50_000
    data = loaded.manifest.data
    counted = duckdb.execute(f"SELECT count(*) FROM '{shop / 'events.parquet'}'").fetchall()[0][0]
    assert (data["files"], data["rows"], data["bad"]) == (["events.parquet"], counted, 0)
    assert data["training_rows"] == first.rows > 5000
    assert data["from"] < data["to"] <= "2026-07-01T00:00:00+00:00"
    assert sorted(item.name for item in path.parent.iterdir()) == [first.bundle.version, "aliases.json"]


def test_it_is_judged_beside_its_baselines_and_better_than_chance(first: Trained) -> None:
    judged = first.judgement
    assert set(judged.baselines) == {"class prior", "logistic regression", "recency, frequency, monetary"}
    assert judged.metrics.roc_auc > 0.6
    assert judged.metrics.log_loss < judged.baselines["class prior"].log_loss
    assert judged.leaks == []


def test_predictions_are_those_of_the_last_split_and_of_the_bundle(shop: Path, first: Trained) -> None:
    table = pq.read_table(shop / "made" / "scores.parquet")
    assert table.column_names == ["visitor_hash", "cutoff_ms", "label", "propensity"]
    assert table.num_rows == len(first.split.test) == first.judgement.metrics.rows
    assert sum(table.column("label").to_pylist()) == first.judgement.metrics.positives
    assert min(table.column("cutoff_ms").to_pylist()) > END_MS - 25 * DAY_MS
    scores, label = table.column("propensity").to_numpy(), np.array(table.column("label").to_pylist())
    assert np.mean((scores - label) ** 2) == pytest.approx(first.judgement.metrics.brier, abs=1e-9)


def test_the_same_events_and_seed_give_the_same_model_to_the_byte_whatever_the_files(
    shop: Path, first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for half in (0, 1):
        duckdb.execute(
            f"""COPY (SELECT * EXCLUDE (properties, context, traits), properties.price, properties.category,
                properties.revenue, context.device, context.referrer FROM '{shop / "events.parquet"}'
                WHERE hash("messageId") % 2 = {half} ORDER BY "messageId") TO '{tmp_path}/{1 - half}.csv'"""
        )
    monkeypatch.setattr(source, "_PARTITION_ROWS", 3000)
    options = Options(artifacts=tmp_path / "artifacts", seed=7, threads=1)
    again = train.from_events([str(tmp_path / "*.csv")], shop / "spec.yaml", options)
    for name in ("model.onnx", "model.txt", "reference.json"):
        assert (again.bundle.path / name).read_bytes() == (first.bundle.path / name).read_bytes(), name
    assert again.bundle.manifest.metrics == first.bundle.manifest.metrics
    assert again.bundle.manifest.data["fingerprint"] == first.bundle.manifest.data["fingerprint"]
    again.bundle.predict(np.zeros((1, 9), np.float32))


def test_training_again_replaces_the_version_whole_and_keeps_other_aliases(
    shop: Path, first: Trained, tmp_path: Path
) -> None:
    artifacts = tmp_path / "artifacts"
    shutil.copytree(shop / "artifacts", artifacts)
    home = artifacts / "purchase_5d"
    (home / "aliases.json").write_text('{"production": "0", "shadow": "1"}')
    (home / first.bundle.version / "left over").write_text("of the old bundle")
    options = Options(artifacts=artifacts, seed=7, threads=1, promote=False)
    made = train.from_events([str(shop / "events.parquet")], shop / "spec.yaml", options)
    assert made.bundle.version == first.bundle.version
    bundle.load(home / first.bundle.version)
    assert not (home / first.bundle.version / "left over").exists()
    assert sorted(item.name for item in home.iterdir()) == [first.bundle.version, "aliases.json"]
    assert json.loads((home / "aliases.json").read_text()) == {"production": "0", "shadow": "1"}, "not promoted"
    train.promote(artifacts, "purchase_5d", first.bundle.version)
    assert json.loads((home / "aliases.json").read_text()) == {"production": first.bundle.version, "shadow": "1"}


@pytest.mark.parametrize("stage", ["Fitting trees", "Checking the export", "Writing the bundle"])
@pytest.mark.parametrize("how", [KeyboardInterrupt, PropensityError], ids=["Ctrl-C", "an error"])
def test_a_run_that_is_cut_off_leaves_everything_as_it_was(
    shop: Path, first: Trained, tmp_path: Path, stage: str, how: Callable[[str], BaseException]
) -> None:
    artifacts = tmp_path / "artifacts"
    shutil.copytree(shop / "artifacts", artifacts)
    before = files_of(artifacts)

    def stop(begun: str, share: float) -> None:
        if begun == stage:
            raise how("stopped")

    options = Options(artifacts=artifacts, seed=8, threads=1, max_rows=3000)
    with pytest.raises((KeyboardInterrupt, PropensityError), match="stopped"):
        train.from_events([str(shop / "events.parquet")], shop / "spec.yaml", options, stop)
    assert files_of(artifacts) == before
    assert [item.name for item in (artifacts / "purchase_5d").iterdir() if item.name.startswith(".")] == []


def test_a_bundle_that_does_not_verify_is_neither_kept_nor_promoted(
    shop: Path, first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "SCORE_TOLERANCE", -1.0)
    options = Options(artifacts=tmp_path, seed=7, threads=1, max_rows=3000)
    with pytest.raises(bundle.InvalidBundle):
        train.from_events([str(shop / "events.parquet")], shop / "spec.yaml", options)
    assert list((tmp_path / "purchase_5d").iterdir()) == []


def test_every_stage_is_told_with_the_share_that_is_done(shop: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    options = Options(artifacts=tmp_path, threads=1, max_rows=2000)
    train.from_events(
        [str(shop / "events.parquet")], shop / "spec.yaml", options, lambda stage, share: told.append((stage, share))
    )
    assert list(dict.fromkeys(stage for stage, _ in told if stage != "Reading events")) == [
        *("Building rows", "Looking for leaks", "Fitting trees", "Judging", "Checking the export"),
        "Writing the bundle",
    ]
    assert all(0 <= share <= 1 for _, share in told)


# --- leaks ---


def leaky_events(path: Path) -> None:
    """Visits of a month; what `hint` says was written by somebody who knew what would come."""
    chance = np.random.default_rng(0)
    rows: list[tuple[str, str, int, int | None]] = []
    for visitor in range(700):
        at_ms = END_MS - 40 * DAY_MS + chance.integers(0, 10 * DAY_MS)
        for _ in range(4):
            at_ms += chance.integers(1, 7 * DAY_MS)
            buys = chance.random() < 0.3
            rows.append(
                (f"v{visitor}", "Product Viewed", int(at_ms), int(buys if chance.random() < 0.98 else not buys))
            )
            if buys:
                rows.append((f"v{visitor}", "Order Completed", int(at_ms + chance.integers(1, DAY_MS)), None))
    lines = [f"{who},{what},{at},{'' if hint is None else hint}" for who, what, at, hint in rows]
    path.write_text("userId,event,timestamp,hint\n" + "\n".join(lines) + "\n")


def test_a_feature_that_gives_the_label_away_is_named(tmp_path: Path) -> None:
    leaky_events(tmp_path / "events.csv")
    leaking = SPEC.replace("horizon: 5d", "horizon: 1d").replace("per_visitor: 5", "after: view, cold_start: false")
    (tmp_path / "spec.yaml").write_text(f"{leaking}  hint: {{request: hint}}\n")
    made = train.from_events(
        [str(tmp_path / "events.csv")], tmp_path / "spec.yaml", Options(artifacts=tmp_path / "artifacts", threads=1)
    )
    assert [leak.feature for leak in made.judgement.leaks] == ["hint"]
    assert made.bundle.manifest.data["leaks"] == ["hint"]
    assert "hint" in made.judgement.leaks[0].message
    assert "hint" in (made.bundle.path / "report.html").read_text()


# --- tables ---

TABLE_SPEC = """
model: subscribes
label: {column: y, positive: yes}
features:
  age: {trait: age}
  job: {trait: job, categories: [clerk, cook]}
  channel: {request: channel, categories: [web, shop]}
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table with three bad rows among 1,500."""
    chance = np.random.default_rng(3)
    age = chance.integers(18, 80, 1500)
    job = chance.choice(["clerk", "cook", "pilot", ""], 1500)
    yes = chance.random(1500) < 1 / (1 + np.exp(-(age - 60) / 8)) * np.where(job == "cook", 1, 0.6)
    lines = [
        f"{a},{j},{'web' if a % 2 else 'shop'},{'yes' if y else 'no'}" for a, j, y in zip(age, job, yes, strict=True)
    ]
    lines[100:100] = ["40,clerk,web", "40,clerk,web,", "40,clerk,web,yes,more"]
    (tmp_path / "spec.yaml").write_text(TABLE_SPEC)
    (tmp_path / "table.csv").write_text("age,job,channel,y\n" + "\n".join(lines) + "\n")
    return tmp_path


def test_a_table_trains_a_model_that_gives_a_stranger_about_the_average(table: Path) -> None:
    options = Options(artifacts=table / "artifacts", threads=1)
    made = train.from_table(str(table / "table.csv"), table / "spec.yaml", options)
    data = made.bundle.manifest.data
    assert (data["bad"], data["split"]) == (3, "at random")
    assert data["examples"][0] == "a row without a label"
    assert made.judgement.metrics.roc_auc > 0.7
    stranger = float(made.bundle.predict(np.full((1, 3), np.nan, np.float32))[0])
    assert stranger == pytest.approx(made.judgement.metrics.base_rate, abs=0.12)
    ages = made.bundle.predict(np.array([[25, 1, 0], [75, 1, 0]], np.float32))
    assert ages[0] < 0.2 < ages[1]


def test_a_table_with_too_many_bad_rows_is_refused(table: Path) -> None:
    options = Options(artifacts=table / "artifacts", max_bad_rows=2)
    with pytest.raises(PropensityError, match=r"table\.csv: 3 rows are bad, more than --max-bad-rows 2"):
        train.from_table(str(table / "table.csv"), table / "spec.yaml", options)
    assert list((table / "artifacts").iterdir()) == []


# --- what cannot be trained ---


def test_too_little_data_is_refused_and_leaves_nothing(shop: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.parquet"
    duckdb.execute(f"COPY (FROM '{shop / 'events.parquet'}' LIMIT 3000) TO '{few}'")
    cases: list[tuple[str, str]] = [
        (SPEC.replace("horizon: 5d", "horizon: 30d"), r"less than 1\.5 horizons of 30"),
        (SPEC.replace("horizon: 5d", "horizon: 1h"), r"\d+ positive and \d+ negative rows; at least 100 of each"),
    ]
    for text, said in cases:
        (tmp_path / "spec.yaml").write_text(text)
        with pytest.raises(TooLittleData, match=said):
            train.from_events([str(few)], tmp_path / "spec.yaml", Options(artifacts=tmp_path / "artifacts"))
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_wrong_input_is_refused_before_any_work(shop: Path, tmp_path: Path) -> None:
    events, options = [str(shop / "events.parquet")], Options(artifacts=tmp_path / "artifacts")
    with pytest.raises(InvalidSpec, match="no such file"):
        train.from_events(events, tmp_path / "none.yaml", options)
    with pytest.raises(UnreadableEvents, match="no such file"):
        train.from_events([str(tmp_path / "none.csv")], shop / "spec.yaml", options)
    with pytest.raises(UnreadableEvents, match="has no events for the feature 'views_1d'"):
        train.from_table(events[0], shop / "spec.yaml", options)
    (tmp_path / "file").write_text("in the way")
    for blocked in (
        replace(options, artifacts=tmp_path / "file"),
        replace(options, predictions=tmp_path / "file" / "p"),
    ):
        with pytest.raises(OSError, match="file"):
            train.from_events(["never read"], shop / "spec.yaml", blocked)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"text"'])
def test_a_damaged_file_of_aliases_is_told_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "aliases.json").write_text(content)
    with pytest.raises(PropensityError, match=r'aliases\.json: is damaged; write \{"production": "v1"\} into it'):
        train.promote(tmp_path, "m", "v1")
    assert (tmp_path / "m" / "aliases.json").read_text() == content


def test_the_baseline_of_marketers_needs_recency_count_and_sum_of_the_labels_event(first: Trained) -> None:
    spec: Any = first.bundle.spec
    names = list(spec.names)
    columns = train._recency_frequency_monetary(spec)
    assert columns == [names.index(name) for name in ("since_buy", "bought", "spent")]
    features = {name: feature for name, feature in spec.features.items() if name != "spent"}
    assert train._recency_frequency_monetary(spec.model_copy(update={"features": features})) is None
    assert dataset.MIN_OF_EACH_CLASS == 100
