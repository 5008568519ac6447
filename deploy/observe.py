"""Owns `make observe`: Prometheus, and Grafana where there is one, beside a service, without a container engine.

Everything that it writes is below .run/. It ends on Ctrl-C, and what it started ends with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.request import urlopen

import yaml

ROOT: Final = Path(__file__).parents[1]
SHIPPED: Final = ROOT / "deploy" / "prometheus" / "prometheus.yml"
PROVISIONING: Final = ROOT / "deploy" / "grafana" / "provisioning"
DASHBOARDS: Final = ROOT / "deploy" / "grafana" / "dashboards"
RETENTION: Final = ("--storage.tsdb.retention.time=40d", "--storage.tsdb.retention.size=1GB")
HOMES: Final = ("share/grafana", "../share/grafana")
END_S: Final = 10


class NotStarted(RuntimeError):
    """A program is missing or did not start; the message says what to do."""


def configuration(targets: Sequence[str], alertmanagers: Sequence[str], shipped: Path = SHIPPED) -> dict[str, Any]:
    """The shipped configuration of Prometheus with other addresses, and with its rules where they are."""
    document: dict[str, Any] = yaml.safe_load(shipped.read_text("utf-8"))
    document["rule_files"] = [str(shipped.parent / pattern) for pattern in document["rule_files"]]
    for job in document["scrape_configs"]:
        job["static_configs"] = [{"targets": list(targets)}]
    document.pop("alerting", None)
    if alertmanagers:
        document["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": list(alertmanagers)}]}]}
    return document


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a program whose output goes into a log."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment}
        )


def prometheus(directory: Path, document: Mapping[str, Any], port: int) -> subprocess.Popen[bytes]:
    """Start Prometheus on a port of the loopback, with its configuration and data in a directory.

    Raises NotStarted where it is not installed.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise NotStarted("prometheus is not on the PATH. On Debian: sudo apt-get install prometheus")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(dict(document), sort_keys=False), "utf-8")
    return start(
        [
            program,
            f"--config.file={file}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            *RETENTION,
        ],
        directory / "prometheus.log",
    )


def grafana(directory: Path, prometheus_url: str, port: int) -> subprocess.Popen[bytes] | None:
    """Start Grafana with data source and dashboards provisioned; None where it is not installed."""
    program = shutil.which("grafana")
    if program is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    prefix = Path(program).resolve().parents[1]
    homes = [home for home in (prefix / part for part in HOMES) if home.is_dir()]
    return start(
        [program, "server", *(["--homepath", str(homes[0])] if homes else [])],
        directory / "grafana.log",
        GF_PATHS_DATA=str(directory),
        GF_PATHS_LOGS=str(directory),
        GF_PATHS_PROVISIONING=str(PROVISIONING),
        GF_SERVER_HTTP_ADDR="127.0.0.1",
        GF_SERVER_HTTP_PORT=str(port),
        GF_AUTH_ANONYMOUS_ENABLED="true",
        GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION="true",
        GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH=str(DASHBOARDS / "serving.json"),
        PROPENSITY_DASHBOARDS=str(DASHBOARDS),
        PROPENSITY_PROMETHEUS_URL=prometheus_url,
    )


def answers(url: str) -> bool:
    """Whether somebody answers 200 at a URL."""
    try:
        with urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 60) -> None:
    """Return once a program answers at `url`. Raises NotStarted with the end of its log if it does not."""
    deadline = time.monotonic() + seconds
    while not answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text("utf-8", errors="replace").splitlines()[-5:]
            raise NotStarted("\n".join([f"{Path(str(log)).stem} did not start:", *lines]))
        time.sleep(0.1)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what was started: ask, and after ten seconds insist."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(arguments: Sequence[str]) -> int:
    """Run until Ctrl-C, or until one of the programs ends."""
    parser = argparse.ArgumentParser(prog="make observe", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="port of the service on this machine")
    parser.add_argument("--prometheus-port", type=int, default=9090)
    parser.add_argument("--grafana-port", type=int, default=3000)
    parser.add_argument("--directory", type=Path, default=ROOT / ".run", help="where data and logs go")
    given = parser.parse_args(arguments)
    # Ctrl-C too: a script starts what runs in its background with it ignored, and Prometheus ends on it all the same.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)
    started: list[subprocess.Popen[bytes]] = []
    try:
        _start(started, given)
        while all(process.poll() is None for process in started):
            time.sleep(0.2)
        print("A program ended by itself; its log is in .run/.", file=sys.stderr)
        return 1
    except NotStarted as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)
        end(started)


def _start(started: list[subprocess.Popen[bytes]], given: argparse.Namespace) -> None:
    address, directory = f"127.0.0.1:{given.port}", given.directory.absolute()
    url = f"http://127.0.0.1:{given.prometheus_port}"
    if answers(f"{url}/-/ready"):
        raise NotStarted(f"Something answers at {url} already. Take another port: make observe PROMETHEUS_PORT=9091")
    started.append(prometheus(directory / "prometheus", configuration([address], []), given.prometheus_port))
    wait(started[0], f"{url}/-/ready", directory / "prometheus" / "prometheus.log")
    print(f"Prometheus  {url}/alerts   alarms; {url}/graph for queries")
    if not answers(f"http://{address}/livez"):
        print(f"Service     nothing answers at http://{address} yet; make run in another terminal starts it")
    print(f"Drift       .venv/bin/propensity drift --prometheus {url}")
    shown = grafana(directory / "grafana", url, given.grafana_port)
    if shown is None:
        print("Grafana     grafana is not on the PATH; deploy/grafana/dashboards/*.json can be imported into any")
    else:
        started.append(shown)
        wait(shown, f"http://127.0.0.1:{given.grafana_port}/api/health", directory / "grafana" / "grafana.log")
        print(f"Grafana     http://127.0.0.1:{given.grafana_port}")
    print("Ctrl-C ends it.", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
