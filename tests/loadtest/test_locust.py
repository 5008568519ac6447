"""Owns the promise that a load test by locust runs from one command, and that wrong answers fail it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from service.embedded import EmbeddedServer
from tests.conftest import SHOP, StartService, free_port

ROOT = Path(__file__).parents[2]
BUSY = ["--think", "0.2", "--audience-every", "1", "--scrape-every", "1", "--visitors", "1000"]


def locust(directory: Path, url: str, seconds: int, *options: str) -> subprocess.CompletedProcess[str]:
    """A headless run of 20 visitors; its numbers are in numbers.json."""
    spec = directory / "shop.yaml"
    spec.write_text(json.dumps(SHOP))
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"]
    given = ["--host", url, "--spec", str(spec), "--users", "20", "--run-time", str(seconds), *BUSY, *options]
    files = ["--json-file", str(directory / "numbers"), "--html", str(directory / "report.html")]
    return subprocess.run([*command, *given, *files], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_option_is_described_with_its_default_and_no_other() -> None:
    # In a process of its own, since locust replaces parts of the standard library when it is imported.
    program = """
import argparse, json
from loadtest import locustfile
parser = argparse.ArgumentParser(add_help=False)
locustfile.add_options(parser)
print(json.dumps({action.option_strings[0]: action.default for action in parser._actions}))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    options = json.loads(ran.stdout)
    assert options.pop("--shape") == "steady"  # SHAPE of `make load`
    options["--spec"] = str(Path(options["--spec"]).relative_to(ROOT))
    page = (ROOT / "docs" / "load-testing.md").read_text("utf-8")
    described: dict[str, str | None] = {}
    for names, defaults in re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|", page, re.MULTILINE):
        described |= dict(zip(re.findall("`(.*?)`", names), re.findall("`(.*?)`", defaults) or [None], strict=True))
    assert described == {name: value if value is None else str(value) for name, value in options.items()}


def numbers(directory: Path) -> dict[str, dict[str, Any]]:
    """Locust's statistics by method and name."""
    entries = json.loads((directory / "numbers.json").read_text())
    return {f"{entry['method']} {entry['name']}": entry for entry in entries}


def test_all_roles_load_a_real_service_in_several_processes_without_a_failure(
    tmp_path: Path, start_service: StartService, artifacts: Path, embedded_server: EmbeddedServer
) -> None:
    service = start_service(artifacts=artifacts, redis_url=embedded_server.url, namespace="locust")
    service.wait_until_ready()
    port = str(free_port())
    processes = ["--processes", "2", "--master-bind-host", "127.0.0.1", "--master-bind-port", port]
    ran = locust(tmp_path, service.url, 8, *processes, "--master-port", port)
    assert ran.returncode == 0, ran.stderr + service.log.read_text()
    found = numbers(tmp_path)
    scores = found["POST /v1/score"]["num_requests"]
    assert scores > 200
    # A visitor sends, then asks; those whom the end of the test found in between have sent alone.
    assert scores <= found["POST /v1/events"]["num_requests"] <= scores + 20
    for name in ("POST /v1/score/batch", "GET /metrics", "GET /readyz"):
        assert found[name]["num_requests"] >= 4, name
    assert [name for name, entry in found.items() if entry["num_failures"]] == []
    assert not any(name.startswith("DEGRADED") for name in found)
    report = (tmp_path / "report.html").read_text()
    for path in ("/v1/events", "/v1/score", "/v1/score/batch", "/metrics", "/readyz"):
        assert f'"name": "{path}"' in report


class WrongService(BaseHTTPRequestHandler):
    """Accepts events and forgets them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # noqa: N802 - the name that http.server wants
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/score/batch":
            self.answer(429, {"title": "Too many requests"})
        elif self.path == "/v1/score":
            score = {"score_id": "1", "visitor_id": asked["visitor_id"], "propensity": 0.5, "percentile": 50}
            rest = {"segment": "nurture", "model": "shop", "version": "1", "scored_at": "2026-01-01T00:00:00Z"}
            self.answer(200, {**score, **rest, "events": 0, "last_event_age_s": None, "degraded": []})
        else:
            count = len(asked.get("batch", [asked]))
            self.answer(200, {"accepted": count, "results": [{"status": "accepted"}] * count})

    def do_GET(self) -> None:  # noqa: N802
        self.answer(200, {"status": "ready"})

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Not on the tests' output."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_service_that_answers_wrongly_fails_the_test_with_every_reason_counted(tmp_path: Path) -> None:
    with serving(WrongService) as url:
        ran = locust(tmp_path, url, 3, "--csv", str(tmp_path / "all"))
    assert ran.returncode == 1, ran.stderr
    failures = (tmp_path / "all_failures.csv").read_text()
    for reason in (
        "POST,/v1/score,`events` does not count what was just sent",
        "POST,/v1/score/batch,status 429 Too many requests",
        "GET,/metrics,the metrics of the service are missing",
    ):
        assert reason in failures
    found = numbers(tmp_path)
    assert found["POST /v1/score"]["num_failures"] == found["POST /v1/score"]["num_requests"] > 0
    assert found["POST /v1/events"]["num_failures"] == found["GET /readyz"]["num_failures"] == 0


class DegradedService(WrongService):
    """Scores without the feature cache, and takes its time."""

    def answer(self, status: int, content: object) -> None:
        if isinstance(content, dict) and "degraded" in content:
            threading.Event().wait(0.03)
            content = {**content, "degraded": ["store"]}
        super().answer(status, content)


def test_missed_limits_of_latency_and_of_degraded_scores_fail_the_test(tmp_path: Path) -> None:
    with serving(DegradedService) as url:
        ran = locust(tmp_path, url, 2, "Website", "--max-p99", "10", "--max-degraded", "0.01")
    assert ran.returncode == 1, ran.stderr
    assert "wanted 10 ms" in ran.stderr
    assert "scores were degraded, wanted 1.0%" in ran.stderr


def test_degraded_scores_within_the_limits_are_counted_apart(tmp_path: Path) -> None:
    with serving(DegradedService) as url:
        ran = locust(tmp_path, url, 2, "Website", "--max-p99", "5000")
    assert ran.returncode == 0, ran.stderr
    found = numbers(tmp_path)
    assert set(found) == {"POST /v1/events", "POST /v1/score", "DEGRADED /v1/score without store"}
    assert found["DEGRADED /v1/score without store"]["num_requests"] == found["POST /v1/score"]["num_requests"] > 0


def test_a_service_that_is_not_there_fails_the_test(tmp_path: Path) -> None:
    ran = locust(tmp_path, f"http://127.0.0.1:{free_port()}", 2)
    assert ran.returncode == 1, ran.stderr
    assert "no score was asked for" in ran.stderr
    assert numbers(tmp_path)["POST /v1/events"]["num_failures"] > 0
