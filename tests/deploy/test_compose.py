"""The compose file and what it mounts: pinned, on the loopback, checked for health, and with nothing left to click."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from deploy import observe

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
COMPOSE: Final = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]


def test_compose_starts_the_service_and_all_that_watches_it() -> None:
    assert set(SERVICES) == {"service", "redis", "prometheus", "alertmanager", "grafana"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_of_compose_is_pinned_healthy_and_on_the_loopback(name: str) -> None:
    service = SERVICES[name]
    if name == "service":
        assert service["build"] == ".."  # its health check is in the Dockerfile
    else:
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+(-alpine)?", service["image"])
        assert service["healthcheck"]["test"][0] == "CMD"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_of_compose_mounts_is_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
        if source.startswith(".") and source != "../.run/artifacts":  # that is made by make run
            assert (DEPLOY / source).exists(), volume
        elif not source.startswith("."):
            assert source in COMPOSE["volumes"], volume


def test_prometheus_of_compose_differs_from_the_shipped_one_by_its_addresses_alone() -> None:
    ours = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text("utf-8"))
    wanted = observe.configuration(["service:8000"], ["alertmanager:9093"])
    wanted["rule_files"] = [f"rules/{Path(pattern).name}" for pattern in wanted["rule_files"]]
    wanted["global"]["external_labels"] = {"runbooks": "http://127.0.0.1:3000/public/propensity/"}
    assert ours == wanted


def test_prometheus_keeps_what_the_error_budget_looks_back_on() -> None:
    kept = [word for word in SERVICES["prometheus"]["command"] if "retention.time" in word]
    assert kept == ["--storage.tsdb.retention.time=40d"]
    assert kept[0] in observe.RETENTION


def test_grafana_is_told_of_everything_that_its_provisioning_names() -> None:
    files = (DEPLOY / "grafana" / "provisioning").rglob("*.yml")
    named = {name for path in files for name in re.findall(r"\$\{(\w+)\}", path.read_text("utf-8"))}
    assert named == {"PROPENSITY_DASHBOARDS", "PROPENSITY_PROMETHEUS_URL"}
    assert named <= set(SERVICES["grafana"]["environment"])


def test_the_data_source_knows_how_often_prometheus_scrapes() -> None:
    path = DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (source,) = yaml.safe_load(path.read_text("utf-8"))["datasources"]
    shipped = yaml.safe_load(observe.SHIPPED.read_text("utf-8"))
    assert source["jsonData"]["timeInterval"] == shipped["global"]["scrape_interval"]


# --- Alertmanager ---

ALERTMANAGER: Final = DEPLOY / "alertmanager" / "alertmanager.yml"


def test_every_severity_of_the_alerts_has_a_route_and_every_route_a_receiver() -> None:
    document = yaml.safe_load(ALERTMANAGER.read_text("utf-8"))
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules" / "alerts.yml").read_text("utf-8"))
    severities = {rule["labels"]["severity"] for group in rules["groups"] for rule in group["rules"]}
    routes = document["route"]["routes"]
    assert {f'severity = "{severity}"' for severity in severities} == {route["matchers"][0] for route in routes}
    named = {document["route"]["receiver"], *(route["receiver"] for route in routes)}
    assert named == {receiver["name"] for receiver in document["receivers"]}


def test_what_inhibits_and_what_is_inhibited_exists() -> None:
    document = yaml.safe_load(ALERTMANAGER.read_text("utf-8"))
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules" / "alerts.yml").read_text("utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    named = set(re.findall(r'alertname = "(\w+)"', str(document["inhibit_rules"])))
    assert len(named) >= 4
    assert named <= alerts


def test_alertmanagers_own_tool_takes_the_configuration() -> None:
    tool = shutil.which("amtool") or pytest.skip("amtool is not installed")
    for arguments, said in (
        (["check-config", str(ALERTMANAGER)], "SUCCESS"),
        (["config", "routes", "test", f"--config.file={ALERTMANAGER}", "severity=critical"], "on-call"),
        (["config", "routes", "test", f"--config.file={ALERTMANAGER}", "severity=warning"], "team"),
    ):
        result = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout
