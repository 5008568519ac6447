"""`make observe`: it scrapes the service that it is told of, says what is missing, and leaves no process behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from deploy import observe
from deploy.grafana import prometheus as api
from tests.conftest import ServiceProcess, free_port, wait_until

ROOT: Final = Path(__file__).parents[2]


class Observer:
    """`make observe` as a person starts it, in a process group of its own as a terminal gives it."""

    def __init__(self, directory: Path, service_port: int, path: str | None = None) -> None:
        self.port, self.grafana_port = free_port(), free_port()
        self.log = directory / "observe.log"
        ports = {"--port": service_port, "--prometheus-port": self.port, "--grafana-port": self.grafana_port}
        arguments = [str(word) for pair in ports.items() for word in pair]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.observe", *arguments, "--directory", str(directory / "run")],
                cwd=ROOT,
                env={**os.environ, "PATH": path or os.environ["PATH"]},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self, text: str) -> bool:
        return text in self.log.read_text("utf-8") or self.process.poll() is not None

    def wait(self) -> str:
        wait_until(lambda: self.said("Ctrl-C ends it."))
        return self.log.read_text("utf-8")

    def members(self) -> list[int]:
        """Processes of the group that live."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group, *_ = status.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == self.process.pid and state != "Z":
                found.append(int(status.parent.name))
        return found


@pytest.fixture
def observers() -> Iterator[list[Observer]]:
    started: list[Observer] = []
    yield started
    for observer in started:
        for pid in observer.members():
            os.kill(pid, signal.SIGKILL)
        observer.process.wait()


pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc"),
]


def test_it_scrapes_the_service_and_ends_with_all_that_it_started(
    tmp_path: Path, service: ServiceProcess, observers: list[Observer]
) -> None:
    observer = Observer(tmp_path, service.port)
    observers.append(observer)
    said = observer.wait()
    url = f"http://127.0.0.1:{observer.port}"
    assert url in said
    assert "propensity drift" in said
    assert "grafana is not on the PATH" in said or shutil.which("grafana")
    rules = {rule["name"] for group in api.ask(url, "rules")["groups"] for rule in group["rules"]}
    assert {"propensity:psi:1h", "PropensityFeatureDrift"} <= rules
    wait_until(lambda: bool(api.ask(url, "targets")["activeTargets"]))  # five seconds after the start
    (target,) = api.ask(url, "targets")["activeTargets"]
    assert target["scrapeUrl"] == f"http://127.0.0.1:{service.port}/metrics"
    assert len(observer.members()) == 2
    os.killpg(observer.process.pid, signal.SIGINT)
    assert observer.process.wait(15) == 0
    assert observer.members() == []
    assert not observe.answers(f"{url}/-/ready")


def test_it_ends_with_prometheus_and_says_so(tmp_path: Path, observers: list[Observer]) -> None:
    observer = Observer(tmp_path, free_port())
    observers.append(observer)
    assert "nothing answers" in observer.wait()
    (child,) = [pid for pid in observer.members() if pid != observer.process.pid]
    os.kill(child, signal.SIGKILL)
    assert observer.process.wait(15) == 1
    assert "ended by itself" in observer.log.read_text("utf-8")


def test_without_prometheus_it_says_what_to_install(tmp_path: Path, observers: list[Observer]) -> None:
    (tmp_path / "bin").mkdir()
    observer = Observer(tmp_path, free_port(), path=str(tmp_path / "bin"))
    observers.append(observer)
    assert observer.process.wait(15) == 1
    assert "apt-get install prometheus" in observer.log.read_text("utf-8")


def test_a_grafana_on_the_path_is_started_provisioned_and_ended_too(tmp_path: Path, observers: list[Observer]) -> None:
    """Grafana itself cannot be had from a package of Python or Debian: a stand-in notes how it is called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "share" / "grafana").mkdir(parents=True)
    stand_in = tmp_path / "bin" / "grafana"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import http.server, json, os, pathlib, sys\n"
        f"noted = {{'arguments': sys.argv[1:], 'environment': dict(os.environ)}}\n"
        f"pathlib.Path({str(tmp_path / 'noted.json')!r}).write_text(json.dumps(noted))\n"
        "class Health(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(os.environ['GF_SERVER_HTTP_PORT'])), Health).serve_forever()\n",
        "utf-8",
    )
    stand_in.chmod(0o755)
    observer = Observer(tmp_path, free_port(), path=f"{stand_in.parent}:{os.environ['PATH']}")
    observers.append(observer)
    assert f"Grafana     http://127.0.0.1:{observer.grafana_port}" in observer.wait()
    noted = json.loads((tmp_path / "noted.json").read_text("utf-8"))
    assert noted["arguments"] == ["server", "--homepath", str(tmp_path / "share" / "grafana")]
    assert noted["environment"]["PROPENSITY_PROMETHEUS_URL"] == f"http://127.0.0.1:{observer.port}"
    assert Path(noted["environment"]["PROPENSITY_DASHBOARDS"], "serving.json").is_file()
    assert Path(noted["environment"]["GF_PATHS_PROVISIONING"], "datasources").is_dir()
    observer.process.send_signal(signal.SIGTERM)
    assert observer.process.wait(15) == 0
    assert observer.members() == []
