"""A real Prometheus with the rules of this repository, and a small server of metrics for it to scrape."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conftest import free_port, wait_until

DEPLOY: Final = Path(__file__).parents[2] / "deploy" / "prometheus"
CONFIG: Final = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: propensity
    static_configs: [{{targets: {targets}}}]
"""


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
    """A Prometheus on a port of the loopback that scrapes every second and computes all rules as often."""

    def __init__(self, directory: Path, targets: Sequence[str]) -> None:
        binary = program("prometheus")
        rules = directory / "rules"
        rules.mkdir()
        for path in (DEPLOY / "rules").glob("*.yml"):
            fast = re.sub(r"^    interval: .*$", "    interval: 1s", path.read_text("utf-8"), flags=re.MULTILINE)
            (rules / path.name).write_text(fast, "utf-8")
        config = directory / "prometheus.yml"
        config.write_text(CONFIG.format(rules=rules / "*.yml", targets=json.dumps(list(targets))), "utf-8")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self.is_ready)
        except BaseException:
            self.end()
            raise

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text("utf-8")
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1):
                return True
        except OSError:
            return False

    def query(self, query: str, at_s: float | None = None) -> list[dict[str, Any]]:
        """The result of an instant query, as of a moment; an error of Prometheus fails the test with its text."""
        asked = {"query": query} if at_s is None else {"query": query, "time": str(at_s)}
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/query?{urllib.parse.urlencode(asked)}", timeout=10
            ) as answer:
                result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return result
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{query}: {error.read().decode()}") from None

    def values(self, query: str, *labels: str, at_s: float | None = None) -> dict[tuple[str, ...], float]:
        """The values of an instant query by some labels."""
        return {
            tuple(one["metric"].get(label, "") for label in labels): float(one["value"][1])
            for one in self.query(query, at_s)
        }

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)


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
