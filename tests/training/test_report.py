"""Holds the training report to being one page that loads nothing, says what it was given, and can be read anywhere."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import lightgbm
import matplotlib
import numpy as np
import pytest

from service.core import segments
from training import evaluate, report
from training.evaluate import Bools, Floats, Matrix
from training.report import Importance, ReportData, Scored, Span, figures

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
VOID = {"meta", "link", "br", "img", "input", "hr"}
DAY_MS = 86_400_000
START_MS = 1_700_000_000_000


def scored(label: Bools, probability: Floats) -> Scored:
    return Scored(probability, evaluate.evaluate(label, probability))


def table(rows: int, features: int, rate: float, seed: int) -> tuple[Matrix, Bools]:
    """Skewed, missing, coded, constant and empty features; the label follows the first two."""
    random = np.random.default_rng(seed)
    matrix = random.lognormal(1, 1.5, (rows, features))
    matrix[random.random(matrix.shape) < 0.1] = np.nan
    matrix[:, 1] = random.integers(0, 3, rows)
    matrix[:, 2] = 7
    matrix[:, 3] = np.nan
    matrix[:, 4] = -random.random(rows)
    margin = np.nan_to_num(np.log(matrix[:, 0])) + 0.5 * matrix[:, 1]
    label = random.random(rows) < 1 / (1 + np.exp(np.quantile(margin, 1 - rate) - margin))
    return matrix.astype(np.float32), label


def trained(rows: int = 6000, features: int = 12, rate: float = 0.08, name: str = "feature") -> ReportData:
    matrix, label = table(rows, features, rate, seed=rows)
    names = [f"{name}_{place}" for place in range(features)]
    train, stop, test = np.split(np.arange(rows), [rows // 2, 3 * rows // 4])
    curve: dict[str, dict[str, list[float]]] = {}
    settings = {"objective": "binary", "verbose": -1, "num_threads": 1, "seed": 1, "learning_rate": 0.05}
    data = lightgbm.Dataset(matrix[train], label[train].astype(np.float32))
    held_out = lightgbm.Dataset(matrix[stop], label[stop].astype(np.float32), reference=data)
    booster = lightgbm.train(
        settings,
        data,
        num_boost_round=40,
        valid_sets=[data, held_out],
        valid_names=["learned from", "held out"],
        callbacks=[lightgbm.record_evaluation(curve)],
    )
    probability = np.asarray(booster.predict(matrix[test]), np.float64)
    baselines = {
        "class prior": evaluate.class_prior(label[train], len(test)),
        "logistic regression": evaluate.logistic_regression(matrix[train], label[train], matrix[test]),
    }
    parts = {"Learning": train, "Stopping": stop, "This report": test}
    return ReportData(
        model="purchase_7d",
        version="20240611-1a2b3c4d",
        created_at="2024-06-11T09:12:44+00:00",
        spec_hash="9f" * 32,
        label="Order Completed within 7 days",
        data={
            "files": ["events.parquet"],
            "events": 1234567,
            "from": "2024-01-02T03:04:05",
            "to": "2024-05-06T07:08:09",
        },
        splits=[
            Span(
                part,
                START_MS + DAY_MS * int(rows[0]),
                START_MS + DAY_MS * int(rows[-1]),
                len(rows),
                int(label[rows].sum()),
            )
            for part, rows in parts.items()
        ],
        test_label=label[test],
        scored=scored(label[test], probability),
        baselines={part: scored(label[test], scores) for part, scores in baselines.items()},
        segments=dict(zip(segments.SEGMENTS, segments.cutoffs(probability, {}), strict=False)),
        importance=Importance.measure(booster, matrix[test], names),
        sample=matrix[train],
        sample_label=label[train],
        learning_curve={part: losses["binary_logloss"] for part, losses in curve.items()},
        best_round=31,
        categories={names[1]: {"mobile": 0.0, "desktop": 1.0, "tablet": 2.0}},
    )


@pytest.fixture(scope="module")
def ordinary() -> ReportData:
    return trained()


@pytest.fixture(scope="module")
def wide() -> ReportData:
    """Few conversions, more features than are shown, names longer than a line, and something to warn of."""
    leak = evaluate.Leak("a", 0.9, 0.8, "'a' alone reaches a ROC-AUC of 0.900")
    made = trained(3000, 120, 0.01, "average_order_value_by_category_and_brand_since_the_last_visit_in_days")
    return dataclasses.replace(made, leaks=[leak], warnings=["Only a few rows convert"])


@pytest.fixture(scope="module")
def constant(ordinary: ReportData) -> ReportData:
    """A model that learned nothing, on a table without times, with a single conversion."""
    label = np.arange(len(ordinary.test_label)) == 5
    probability = np.full(len(label), 0.02)
    nothing = dataclasses.replace(ordinary.importance, gain=np.zeros(12), shap=np.zeros_like(ordinary.importance.shap))
    return dataclasses.replace(
        ordinary,
        data={"rows": 6000},
        splits=[Span("All", None, None, 6000, 480)],
        test_label=label,
        scored=scored(label, probability),
        baselines={"class prior": scored(label, probability)},
        segments=dict(zip(segments.SEGMENTS, segments.cutoffs(probability, {}), strict=False)),
        importance=nothing,
        learning_curve={"held out": [0.3]},
        best_round=1,
    )


@pytest.fixture(scope="module")
def pages(ordinary: ReportData, wide: ReportData, constant: ReportData) -> dict[str, str]:
    return {
        name: report.render(data) for name, data in (("ordinary", ordinary), ("wide", wide), ("constant", constant))
    }


class Page(HTMLParser):
    """What a page holds; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data + " "

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def test_a_page_is_well_formed_with_unique_ids(pages: dict[str, str]) -> None:
    for text in pages.values():
        ids = Page(text).values("id")
        assert len(ids) == len(set(ids))


def test_a_page_loads_and_runs_nothing(pages: dict[str, str]) -> None:
    for text in pages.values():
        page = Page(text)
        linked = [*page.values("src"), *page.values("href"), *page.values("xlink:href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in linked)
        assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe", "object", "base"}
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert re.findall(r"https?:|@import|url\((?!#)", text) == []
        assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text


def test_the_same_data_gives_the_same_bytes(ordinary: ReportData, pages: dict[str, str]) -> None:
    assert report.render(ordinary) == pages["ordinary"]


def test_rendering_leaves_the_settings_of_matplotlib_alone(constant: ReportData) -> None:
    before = dict(matplotlib.rcParams)
    report.render(constant)
    assert dict(matplotlib.rcParams) == before


def test_a_page_stays_small(pages: dict[str, str]) -> None:
    assert max(len(text) for text in pages.values()) < 1_500_000


def test_every_figure_shows_something_and_says_what(pages: dict[str, str]) -> None:
    for text in pages.values():
        drawn = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
        assert len(drawn) > 15
        for figure in drawn:
            assert "always missing" in figure or len(re.findall(r"<(?:path|use|image) ", figure)) >= 3
            assert "<h3" in figure
        assert len(Page(text).values("aria-label")) >= text.count("<svg") > 15


def test_the_numbers_of_model_and_baselines_are_shown(ordinary: ReportData, pages: dict[str, str]) -> None:
    words = Page(pages["ordinary"]).words
    for one in (ordinary.scored, *ordinary.baselines.values()):
        for value in (one.metrics.roc_auc, one.metrics.average_precision, one.metrics.log_loss, one.metrics.brier):
            assert f"{value:.3f}" in words
    low, high = ordinary.scored.metrics.roc_auc_interval
    assert f"95%: {low:.3f} to {high:.3f}" in words
    for fact in ("purchase_7d", "20240611-1a2b3c4d", "9f" * 32, "2024-01-02 to 2024-05-06", "1,234,567", "6,000"):
        assert fact in words


def test_segments_are_counted_as_the_service_assigns_them(ordinary: ReportData, pages: dict[str, str]) -> None:
    cuts = list(ordinary.segments.values())
    assigned = [segments.assign(score, cuts) for score in ordinary.scored.probability]
    for name in segments.SEGMENTS:
        shown = name.replace("_", " ").capitalize()
        row = re.search(rf"{shown}</td><td>[^<]*</td><td>([\d,]+)</td>", pages["ordinary"])
        assert row is not None and int(row[1].replace(",", "")) == assigned.count(name)


def test_codes_are_shown_by_name(pages: dict[str, str]) -> None:
    assert ">desktop</text>" in pages["ordinary"]


def test_leaks_and_warnings_come_first(pages: dict[str, str]) -> None:
    words = Page(pages["wide"]).words
    assert words.index("Possible leaks") < words.index("alone reaches a ROC-AUC of 0.900.") < words.index("Base rate")
    assert "Only a few rows convert." in words
    assert "Possible leaks" not in Page(pages["ordinary"]).words


def test_of_many_features_the_most_used_are_shown(wide: ReportData, pages: dict[str, str]) -> None:
    assert pages["wide"].count("Shown are the top 30 of 120.") == 2
    used = np.abs(wide.importance.shap).mean(axis=0)
    names = re.findall(r'<h3 class="code">([^<]*)</h3>', pages["wide"])
    assert len(names) == 30
    assert names[0] == wide.importance.names[int(np.argmax(used))]


def test_names_are_escaped(ordinary: ReportData) -> None:
    nasty = "<b>&\"'</b><script>"
    names = [nasty, *ordinary.importance.names[1:]]
    changed = dataclasses.replace(
        ordinary,
        model=nasty,
        label=nasty,
        warnings=[nasty],
        data={nasty: nasty},
        baselines={nasty: ordinary.baselines["class prior"]},
        learning_curve={nasty: [0.5, 0.4]},
        importance=dataclasses.replace(ordinary.importance, names=names),
        categories={names[1]: {nasty: 0.0}},
    )
    text = report.render(changed)
    assert "<script" not in text and "<b>&" not in text
    assert Page(text).words.count(nasty) >= 6


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0%"), (1, "100%"), (0.12, "12%"), (0.1254, "13%"), (0.0431, "4.3%"), (0.0052, "0.52%"), (0.00041, "0.041%")],
)
def test_percentages_keep_two_digits(share: float, shown: str) -> None:
    assert figures.percent(share) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.25, "0.25"), (12, "12"), (1234, "1.23k"), (999_999, "1M"), (5e6, "5M"), (-2e9, "-2G")],
)
def test_numbers_are_compact(value: float, shown: str) -> None:
    assert figures.compact(value) == shown


MEASURE = """
<body style="margin: 0"><iframe width="WIDTH" height="900" style="border: 0" srcdoc="PAGE"></iframe>
<pre id="measured"></pre>
<script>
const boxes = (root, what) => [...root.querySelectorAll(what)].map(one => one.getBoundingClientRect())
onload = () => {
  const page = document.querySelector("iframe").contentDocument
  const figures = [...page.querySelectorAll("figure svg")].map(svg => {
    const [whole, words] = [svg.getBoundingClientRect(), [...svg.querySelectorAll("text")]]
    const texts = words.map(one => [one.textContent, one.getBoundingClientRect()])
    const clipped = texts.filter(([, box]) => box.left < whole.left - 3 || box.right > whole.right + 3)
    const overlapping = texts.filter(([, a], i) => texts.slice(i + 1).some(([, b]) =>
      Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
      Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4))
    return {
      name: svg.getAttribute("aria-label"), width: whole.width, height: whole.height,
      clipped: clipped.map(([text]) => text), overlapping: overlapping.map(([text]) => text),
    }
  })
  const root = page.documentElement
  document.querySelector("#measured").textContent = JSON.stringify({width: root.scrollWidth, figures})
}
</script>
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None and os.environ.get("CI") != "true", reason="needs headless Chromium")
@pytest.mark.parametrize("name", ["ordinary", "wide", "constant"])
@pytest.mark.parametrize("width", [375, 1200])
def test_a_browser_shows_every_figure_and_no_text_collides(
    name: str, width: int, pages: dict[str, str], tmp_path: Path
) -> None:
    page = MEASURE.replace("WIDTH", str(width)).replace("PAGE", html.escape(pages[name], quote=True))
    dumped, said = browse(page, tmp_path)
    assert "CONSOLE" not in said
    measured = re.search(r'<pre id="measured">(.*?)</pre>', dumped, flags=re.DOTALL)
    assert measured is not None
    found = json.loads(html.unescape(measured[1]))
    assert found["width"] <= width
    assert len(found["figures"]) == pages[name].count("<svg")
    assert [one for one in found["figures"] if one["width"] < 100 or one["height"] < 50] == []
    assert [one for one in found["figures"] if one["clipped"] or one["overlapping"]] == []


def browse(page: str, directory: Path) -> tuple[str, str]:
    """The document after loading and what the browser logged, its console included."""
    file = directory / "page.html"
    file.write_text(page, encoding="utf-8")
    assert CHROMIUM is not None, "CI needs headless Chromium; install it"
    quiet = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            *(f"--{flag}" for flag in quiet.split()),
            "--disable-sync",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--window-size=1300,1000",
            f"--user-data-dir={directory / 'profile'}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr
