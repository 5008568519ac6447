"""What the dashboards promise without a Prometheus: they are what the code makes, whole, and explained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana import documents, variables

ROOT: Final = Path(__file__).parents[2]
PATHS: Final = sorted(documents.DIRECTORY.glob("*.json"))
CORE: Final = {"row", "stat", "timeseries", "heatmap", "table", "bargauge", "barchart"}
DASHBOARDS: Final = [pytest.param(json.loads(path.read_text("utf-8")), id=path.stem) for path in PATHS]
Json = dict[str, Any]


def panels(dashboard: Json) -> list[Json]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_the_checked_in_dashboards_are_what_the_code_makes() -> None:
    generated = documents.generated()
    assert set(generated) == set(PATHS)
    for path, text in generated.items():
        assert path.read_text("utf-8") == text, f"{path.name} is not what the code makes; run make dashboards"


def test_there_are_three_dashboards() -> None:
    assert [path.stem for path in PATHS] == ["data", "model", "serving"]


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_grafanas_library_reads_a_dashboard_and_loses_nothing(dashboard: Json) -> None:
    register_default_plugins()
    read = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    assert documents.in_sight(read) == dashboard


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_a_dashboard_needs_no_plugin(dashboard: Json) -> None:
    assert {panel["type"] for panel in dashboard["panels"]} <= CORE
    text = json.dumps(dashboard)
    assert set(re.findall(r'"datasource": \{"type": "([^"]+)"', text)) == {"prometheus"}
    assert set(re.findall(r'"uid": "(\$[^"]+)"', text)) == {"${datasource}"}


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_panels_lie_beside_each_other_and_have_numbers_of_their_own(dashboard: Json) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_a_dashboard_leads_to_the_others_with_what_is_chosen(dashboard: Json) -> None:
    uids = {f"/d/{json.loads(path.read_text('utf-8'))['uid']}" for path in PATHS}
    assert {link["url"] for link in dashboard["links"]} == uids - {f"/d/{dashboard['uid']}"}
    assert all(link["keepTime"] and link["includeVars"] for link in dashboard["links"])


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_every_panel_says_what_it_shows_in_words_and_with_a_unit(dashboard: Json) -> None:
    known = {value for value in vars(units).values() if isinstance(value, str)}
    for panel in panels(dashboard):
        assert len(panel["description"].split()) >= 4, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in known, panel["title"]


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_no_two_panels_have_one_title(dashboard: Json) -> None:
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles)


def test_every_runbook_is_linked_from_a_panel_and_every_link_leads_to_one() -> None:
    pages = {path.name for path in (ROOT / "docs" / "runbooks").glob("*.md")} - {"README.md"}
    linked = {
        link["url"].removeprefix("${docs}/runbooks/")
        for path in PATHS
        for panel in panels(json.loads(path.read_text("utf-8")))
        for link in panel.get("links", [])
    }
    assert linked - pages == set()
    assert pages - linked == {"calibration-off.md"}  # its metric is not exported yet


def test_colours_of_numbers_change_at_the_thresholds_of_the_alerts() -> None:
    found = {
        panel["title"]: {step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]}
        for path in PATHS
        for panel in panels(json.loads(path.read_text("utf-8")))
        if panel["type"] == "stat"
    }
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "thresholds.yml").read_text("utf-8"))
    alarmed = {rule["record"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    for title, threshold in {
        "Degraded": "degraded_share",
        "Refused, last hour": "refused_share",
        "Late, last hour": "late_share",
        "Error budget left, 30 days": "error_budget_left",
    }.items():
        assert f"vector({max(filter(None, found[title])):g})" == alarmed[f"propensity:threshold:{threshold}"], title


# --- variables ---

WINDOW: Final = variables.Window(start_s=1_000_000, end_s=1_003_600, scrape_s=15)


def test_built_in_variables_are_what_grafana_makes_of_time_and_scrapes() -> None:
    values = variables.built_in(WINDOW)
    assert (values["__interval"], values["__rate_interval"], values["__range"]) == ("15s", "60s", "3600s")
    day = variables.built_in(variables.Window(0, 7 * 86_400, 15))
    assert (day["__interval"], day["__rate_interval"]) == ("605s", "620s")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('x{job=~"$job"}', 'x{job=~"a|b"}'),
        ('x{job=~"${job}"}', 'x{job=~"a|b"}'),
        ('x{job=~"[[job]]"}', 'x{job=~"a|b"}'),
        ("x[$__rate_interval]", "x[60s]"),
        ('label_replace(x, "a", "$1", "b", "(.*)")', 'label_replace(x, "a", "$1", "b", "(.*)")'),
    ],
)
def test_a_variable_is_replaced_however_it_is_written(text: str, wanted: str) -> None:
    assert variables.substituted(text, {"job": "a|b", **variables.built_in(WINDOW)}) == wanted


@pytest.mark.parametrize("text", ['x{job=~"$jobs"}', "x[${__rate}]", "[[nothing]]", "${job:csv}"])
def test_a_variable_that_the_dashboard_does_not_have_is_an_error(text: str) -> None:
    with pytest.raises(variables.UnknownVariable):
        variables.substituted(text, {"job": ".*"})


def test_chosen_values_are_escaped_as_for_a_regular_expression_in_a_string() -> None:
    assert variables.regex(["127.0.0.1:8000"]) == r"127\\.0\\.0\\.1:8000"
    assert variables.regex(["a", "b"]) == "(a|b)"


def test_a_choice_that_the_dashboard_does_not_offer_is_an_error() -> None:
    with pytest.raises(variables.UnknownVariable):
        variables.chosen({"templating": {"list": []}}, {"model": ["shop"]})
