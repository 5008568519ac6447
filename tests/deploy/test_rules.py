"""The rules of Prometheus: sound, tested, of metrics that exist, and every alarm with a page that says what to do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from service import metrics
from service.core import drift
from tests.deploy.prometheus import DEPLOY, program, watched

ROOT = DEPLOY.parents[1]
RUNBOOKS = ROOT / "docs" / "runbooks"
TESTS = sorted((DEPLOY / "tests").glob("*.yml"))
WAITS_FOR_ITS_METRIC = {"propensity_calibration_ratio"}


@cache
def rules(file: str) -> list[dict[str, Any]]:
    """All rules of a file of deploy/prometheus/rules."""
    document = yaml.safe_load((DEPLOY / "rules" / f"{file}.yml").read_text("utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def thresholds() -> dict[str, float]:
    found = {}
    for rule in rules("thresholds"):
        constant = re.fullmatch(r"vector\(([0-9.]+)\)", rule["expr"])
        assert constant, rule
        found[rule["record"].removeprefix("propensity:threshold:")] = float(constant[1])
    return found


def alarms() -> dict[str, list[dict[str, Any]]]:
    """Every alarm by its name: one rule a window."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rule in rules("alerts"):
        found.setdefault(rule["alert"], []).append(rule)
    return found


def slug(alarm: str) -> str:
    """PropensityModelStale -> model-stale"""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", alarm.removeprefix("Propensity")).lower()


def run(*arguments: object) -> None:
    done = subprocess.run([program("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# --- promtool ---


def test_promtool_finds_nothing_wrong_with_rules_and_configuration() -> None:
    run("check", "rules", *sorted((DEPLOY / "rules").glob("*.yml")))
    run("check", "config", DEPLOY / "prometheus.yml")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alarms_fire_and_stay_quiet_as_their_tests_say(path: Path) -> None:
    run("test", "rules", path)


def expectations() -> Iterator[tuple[str, bool]]:
    """(alarm, whether it is to fire) of every expectation of the tests of rules."""
    names = set(alarms())
    for path in TESTS:
        for case in yaml.safe_load(path.read_text("utf-8"))["tests"]:
            for one in case.get("alert_rule_test", []):
                yield one["alertname"], bool(one.get("exp_alerts"))
            for one in case.get("promql_expr_test", []):
                asked = re.search(r'ALERTS\{alertname=~?"([^"]*)"', one["expr"])
                if asked is None:
                    continue
                fired = {
                    name for sample in one.get("exp_samples", []) for name in names if f'"{name}"' in sample["labels"]
                }
                for name in names:
                    if name in fired or (not fired and re.fullmatch(asked[1], name)):
                        yield name, name in fired


def test_every_alarm_is_shown_firing_and_not_firing() -> None:
    shown = set(expectations())
    assert shown == {(name, fires) for name in alarms() for fires in (True, False)}


# --- names ---


def metric_names() -> set[str]:
    ours = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {metric._name + ending for metric in ours for ending in endings.get(str(metric._type), ("",))}


def recorded() -> set[str]:
    return {rule["record"] for file in ("thresholds", "recording") for rule in rules(file)}


def named(expression: str) -> set[str]:
    """The metrics and recorded series that an expression names."""
    return set(re.findall(r"\bpropensity[_:][a-zA-Z0-9_:]*", expression))


def test_rules_name_only_metrics_of_the_service_and_recorded_series() -> None:
    known = metric_names() | recorded()
    for rule in (*rules("recording"), *rules("alerts")):
        unknown = named(rule["expr"]) - known
        assert unknown <= WAITS_FOR_ITS_METRIC, rule
    assert not WAITS_FOR_ITS_METRIC & known, "it exists now: take it out of this list"


def test_every_threshold_is_used_and_has_its_reason_above_it() -> None:
    used = {name for file in ("recording", "alerts") for rule in rules(file) for name in named(rule["expr"])}
    text = (DEPLOY / "rules" / "thresholds.yml").read_text("utf-8")
    for name in thresholds():
        assert f"propensity:threshold:{name}" in used, name
    for block in re.split(r"\n\n", text.split("rules:\n", 1)[1]):
        assert re.match(r"\s*#", block), f"no reason above:\n{block}"


def test_the_command_drift_has_the_thresholds_of_the_rules() -> None:
    given = thresholds()
    assert {
        window: (given[f"drift_floor_{window}"], given[f"scores_per_visitor_{window}"]) for window in ("1h", "24h")
    } == drift.WINDOWS
    assert given["missing_rise"] == drift.MISSING_RISE
    assert given["missing_deviations"] == drift.MISSING_DEVIATIONS


# --- runbooks ---


def test_every_alarm_has_a_page_and_every_page_an_alarm() -> None:
    pages = {path.stem: path.read_text("utf-8") for path in RUNBOOKS.glob("*.md") if path.name != "README.md"}
    assert set(pages) == {slug(name) for name in alarms()}
    for name in alarms():
        assert pages[slug(name)].startswith(f"# {name}\n")
        headings = re.findall(r"^## (.*)$", pages[slug(name)], re.MULTILINE)
        assert headings == ["What visitors notice", "How to look", "What to do", "When to ignore it"], name


def test_every_alarm_says_how_bad_what_and_where_to_read_on() -> None:
    for name, variants in alarms().items():
        for rule in variants:
            assert rule["labels"]["severity"] in ("critical", "warning"), name
            assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
            page = f"docs/runbooks/{slug(name)}.md"
            assert rule["annotations"]["runbook_url"] == "{{ $externalLabels.runbooks }}" + page
            assert "\n" not in rule["annotations"]["summary"].strip()


@pytest.mark.parametrize(
    ("alarm", "labels"),
    [
        ("FeatureDrift", "feature model"),
        ("FeatureMissing", "feature model"),
        ("ScoreDrift", "model"),
        ("ModelStale", "model version"),
        ("CalibrationOff", "model version"),
        ("ScoresDegraded", "reason"),
        ("BreakerOpen", "instance"),
        ("WorkersRestart", "instance"),
        ("ModelsRefused", "instance"),
        ("ScoreLogDropped", "instance"),
        ("ServiceDown", "instance"),
        ("EventsRefused", "reason"),
        ("PropertyMissing", "kind property"),
        ("ScoresOfBots", "model"),
    ],
)
def test_the_summary_names_what_is_at_fault(alarm: str, labels: str) -> None:
    for rule in alarms()[f"Propensity{alarm}"]:
        for label in labels.split():
            assert f"$labels.{label} " in rule["annotations"]["summary"], rule


def test_the_list_of_runbooks_has_every_alarm_with_its_severity_and_every_threshold_with_its_value() -> None:
    text = (RUNBOOKS / "README.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| \[(\w+)\]\([\w-]+\.md\) \| ([\w, ]+) \|", text, re.MULTILINE))
    severities = {
        name: ", ".join(sorted({rule["labels"]["severity"] for rule in variants}))
        for name, variants in alarms().items()
    }
    assert listed == severities
    values = {name: float(value) for name, value in re.findall(r"^\| `(\w+)` \| ([0-9.]+) \|", text, re.MULTILINE)}
    assert values == thresholds()


def queries() -> list[tuple[str, str]]:
    """(page, query) of all runbooks."""
    found = []
    for path in sorted(RUNBOOKS.glob("*.md")):
        text = path.read_text("utf-8")
        if "## How to look" in text:
            table = text.split("## How to look")[1].split("## What to do")[0]
            found += [(path.name, query) for query in re.findall(r"\| `([^`]+)` \|$", table, re.MULTILINE)]
    return found


def test_every_query_of_a_runbook_is_understood_by_prometheus(tmp_path: Path) -> None:
    known = metric_names() | recorded()
    asked = queries()
    assert len(asked) > 3 * len(alarms())
    with watched(tmp_path, 0) as (prometheus, _):
        for page, query in asked:
            assert named(query) <= known, f"{page}: {query}"
            prometheus.query(query)
