"""A real Prometheus with the rules of this repository, and a small server of metrics for it to scrape."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from deploy import observe
from deploy.grafana import prometheus as api
from tests.conftest import free_port

DEPLOY: Final = Path(__file__).parents[2] / "deploy" / "prometheus"
SCRAPE_S: Final = 1


def program(name: str) -> str:
    """Where Debian's package prometheus has put a program; the test is skipped without it."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed; Debian's package is prometheus")


class Exposition:
    """Serves what it is given as the metrics of a replica."""

    def __init__(self) -> None:
        self.text = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802 - the library's name
                body = outer.text.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.target = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Prometheus:
    """A Prometheus on a port of the loopback, configured as shipped but that it scrapes and computes every second.

    It waits a second instead of what `for` says before an alarm fires.
    """

    def __init__(self, directory: Path, targets: Sequence[str]) -> None:
        program("prometheus")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        document = observe.configuration(targets, [], shortened(directory / "shipped"))
        document["global"] |= {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
        self.process = observe.prometheus(directory, document, port)
        try:
            observe.wait(self.process, f"{self.url}/-/ready", directory / "prometheus.log")
        except BaseException:
            self.end()
            raise

    def query(self, query: str, at_s: float | None = None) -> list[api.Series]:
        """The result of an instant query, as of a moment; an error of Prometheus fails the test with its text."""
        return api.instant(self.url, query, time.time() if at_s is None else at_s)

    def values(self, query: str, *labels: str, at_s: float | None = None) -> dict[tuple[str, ...], float]:
        """The values of an instant query by some labels."""
        return {
            tuple(one.labels.get(label, "") for label in labels): one.points[0][1] for one in self.query(query, at_s)
        }

    def alerts(self, name: str) -> list[dict[str, str]]:
        """Labels of the alerts of a rule that fire."""
        return [one.labels for one in self.query(f'ALERTS{{alertstate="firing", alertname="{name}"}}')]

    def states(self, name: str) -> set[str]:
        """States of the rules of an alert: inactive, pending, firing."""
        groups = api.ask(self.url, "rules", type="alert")["groups"]
        return {rule["state"] for group in groups for rule in group["rules"] if rule["name"] == name}

    def end(self) -> None:
        """End it, and wait for that."""
        observe.end([self.process])


def shortened(copied: Path) -> Path:
    """A copy of the shipped configuration and rules that differs in `interval` and `for` alone."""
    shutil.copytree(DEPLOY, copied)
    for path in (copied / "rules").glob("*.yml"):
        document = yaml.safe_load(path.read_text("utf-8"))
        for group in document["groups"]:
            group["interval"] = f"{SCRAPE_S}s"
            for rule in group["rules"]:
                if "for" in rule:
                    rule["for"] = "1s"
        path.write_text(yaml.safe_dump(document, sort_keys=False, width=10_000), "utf-8")
    return copied / "prometheus.yml"


@contextmanager
def scraping(directory: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """A Prometheus that runs for a while."""
    prometheus = Prometheus(directory, targets)
    try:
        yield prometheus
    finally:
        prometheus.end()


@contextmanager
def watched(directory: Path, replicas: int) -> Iterator[tuple[Prometheus, list[Exposition]]]:
    """A Prometheus, and the expositions that it scrapes."""
    program("prometheus")
    expositions = [Exposition() for _ in range(replicas)]
    try:
        with scraping(directory, [exposition.target for exposition in expositions]) as prometheus:
            yield prometheus, expositions
    finally:
        for exposition in expositions:
            exposition.close()


def line(metric: str, value: float, **labels: str) -> str:
    """One line of an exposition."""
    return f"{metric}{{{', '.join(f'{name}={json.dumps(text)}' for name, text in labels.items())}}} {value}\n"


def counters(metric: str, counts: Mapping[Any, float], *names: str) -> str:
    """The lines of one metric by the values of its labels."""
    return "".join(line(metric, value, **dict(zip(names, labels, strict=True))) for labels, value in counts.items())
