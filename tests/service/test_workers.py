"""Several workers: they share a port, their metrics and their end, and one that dies is replaced."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families

from service.embedded import EmbeddedServer
from tests.conftest import ServiceProcess, StartService, free_port, wait_until
from tests.service.callers import Callers, ask, get

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.anyio
Counts = dict[tuple[str, str], float]


def wait_for_line(service: ServiceProcess, pattern: str, timeout_s: float = 60) -> re.Match[str]:
    """The first match in the log, which must come in time."""
    wait_until(
        lambda: bool(re.search(pattern, service.log.read_text())) or service.process.poll() is not None, timeout_s
    )
    found = re.search(pattern, service.log.read_text())
    assert found, service.log.read_text()
    return found


def wait_for_workers(service: ServiceProcess) -> list[int]:
    """The pids of both workers, once they serve."""
    return [int(pid) for pid in wait_for_line(service, r"2 workers serve .*: (\d+), (\d+)").groups()]


def children(pid: int) -> dict[int, str]:
    """The processes that this one has started, and theirs, with their command lines."""
    found: dict[int, str] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                child = int(status.parent.name)
                found |= {child: (status.parent / "cmdline").read_text().replace("\0", " "), **children(child)}
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def served(directory: Path) -> dict[str, float]:
    """How many answers the workers of each name have counted, by their files of metrics."""
    counted = {}
    for path in directory.glob("histogram_*-*.db"):
        entries = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
        counted[path.stem] = sum(value for key, value, *_ in entries if '"propensity_request_seconds_bucket"' in key)
    return counted


async def scrape(port: int) -> Counts:
    """What has been counted so far: counters, buckets, sums and numbers."""
    text = (await ask(port, get("/metrics"))).body.decode()
    return {
        (sample.name, str(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


async def watch(port: int, fallen: list[str], silent_at: list[float]) -> None:
    """Scrape for ever; note what has fallen since the last time, and when there was no answer."""
    known: Counts = {}
    while True:
        try:
            now = await scrape(port)
            fallen += [f"{name} from {value} to {now.get(name)}" for name, value in known.items() if now[name] < value]
            known = now
        except (OSError, asyncio.IncompleteReadError):
            silent_at.append(time.monotonic())
        await asyncio.sleep(0.05)


@pytest.mark.alone
async def test_a_killed_worker_is_replaced_while_the_other_answers_and_no_counter_falls(
    start_service: StartService,
    embedded_server: EmbeddedServer,
    artifacts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    service = start_service(workers=2, redis_url=embedded_server.url, artifacts=artifacts, namespace="workers")
    pids = wait_for_workers(service)
    callers = Callers(service.port)
    fallen: list[str] = []
    silent_at: list[float] = []
    calling = asyncio.create_task(callers.call())
    watching = asyncio.create_task(watch(service.port, fallen, silent_at))
    await asyncio.to_thread(wait_until, lambda: sorted(count > 10 for count in served(tmp_path).values()) == [0, 1, 1])
    await asyncio.sleep(2)  # so that there is something that no worker can lose any more

    killed_at = time.monotonic()
    os.kill(pids[0], signal.SIGKILL)
    replaced = await asyncio.to_thread(wait_for_line, service, r"worker (\d+) serves in its place", 3)
    # While a killed process is put away, connections to it are still taken for some milliseconds.
    assert [moment for moment in (*silent_at, *(at for at, _ in callers.lost)) if moment > killed_at + 0.5] == []
    # The next one dies at once, and the one to spare with it.
    await asyncio.to_thread(wait_until, lambda: len(children(service.process.pid)) == 3)
    (spare,) = set(children(service.process.pid)) - {int(replaced[1]), pids[1]}
    killed_again_at = time.monotonic()
    for pid in (spare, int(replaced[1])):
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(wait_for_line, service, r"(?s)serves in its place.*serves in its place")
    pauses = re.findall(r"ended with SIGKILL; it is replaced(?: in (\S+) s)?\n", service.log.read_text())
    assert pauses == ["", "0.5"]

    counts = await scrape(service.port)
    assert counts["propensity_worker_restarts_total", "[]"] == 2
    # What a worker counted in its last second is lost with it, and these are busy; what came before is not.
    told = [
        moment
        for moment in callers.answered_at
        if not any(at - 2 < moment < at + 0.5 for at in (killed_at, killed_again_at, time.monotonic()))
    ]
    answered = sum(value for (name, _), value in counts.items() if name == "propensity_request_seconds_count")
    assert answered >= len(told) > 0
    assert set(callers.statuses) == {200}
    assert len(served(tmp_path)) == 3
    assert watching.cancel()
    service.process.send_signal(signal.SIGINT)
    await calling
    assert fallen == []
    assert await asyncio.to_thread(service.process.wait, 20) == 0


async def test_a_worker_that_hangs_is_killed_and_replaced(
    start_service: StartService, embedded_server: EmbeddedServer, artifacts: Path
) -> None:
    service = start_service(
        workers=2, worker_silence_s=2, redis_url=embedded_server.url, artifacts=artifacts, namespace="hangs"
    )
    pids = wait_for_workers(service)
    await asyncio.sleep(4)  # nobody asks anything, which is no silence
    assert set(pids) <= set(children(service.process.pid))
    os.kill(pids[0], signal.SIGSTOP)
    replaced = await asyncio.to_thread(wait_for_line, service, r"worker (\d+) serves in its place")
    log = service.log.read_text()
    assert f"worker {pids[0]} has done nothing for 2 s" in log
    assert f"worker {pids[0]} hung and was killed; it is replaced\n" in log
    assert not Path(f"/proc/{pids[0]}").exists()
    assert int(replaced[1]) in children(service.process.pid)
    assert (await scrape(service.port))["propensity_worker_restarts_total", "[]"] == 1
    os.kill(pids[1], signal.SIGUSR1)
    await asyncio.to_thread(wait_for_line, service, r"most recent call first(.|\n)*service/worker.py")
    assert pids[1] in children(service.process.pid)
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 20) == 0


async def test_when_the_supervisor_is_killed_nothing_is_left(
    start_service: StartService, artifacts: Path, tmp_path: Path
) -> None:
    service = start_service(workers=2, artifacts=artifacts, data_dir=tmp_path / "data")
    workers = wait_for_workers(service)
    wait_until(lambda: len(children(service.process.pid)) == 5)  # one to spare, the keeper, the embedded server
    started = children(service.process.pid)
    environment = Path(f"/proc/{workers[0]}/environ").read_text().split("\0")
    (metrics,) = [Path(line.partition("=")[2]) for line in environment if line.startswith("PROMETHEUS_MULTIPROC_DIR=")]
    assert list(metrics.glob("counter_*.db"))
    command = [sys.executable, "-m", "cli.main", "serve", "--workers", "2", "--port", str(service.port)]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (second.returncode, second.stderr.count("\n")) == (2, 1), second.stderr
    assert f"port {service.port} of 127.0.0.1: Address already in use" in second.stderr
    service.end(signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, started)))
    assert not metrics.exists()
    with pytest.raises(ConnectionRefusedError):
        await ask(service.port, get("/livez"))


async def test_workers_that_cannot_start_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('broken')")
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    command = [sys.executable, "-P", "-m", "cli.main", "serve", "--workers", "2", "--port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": path, "PROPENSITY_REDIS_URL": "redis://127.0.0.1:1/0"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    last = r"propensity: worker \d+ ended with exit code 1 before it could serve; its log above says why"
    assert ended.returncode == 2
    assert re.fullmatch(last, ended.stderr.splitlines()[-1]), ended.stderr


SHARED = """
from service import port
port.IS_SPREAD = False
from service.app import serve
from service.settings import load
serve(load())
"""


def listens(port: int) -> bool:
    """Whether connections are taken."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


async def test_where_a_port_cannot_be_spread_the_workers_share_a_socket(
    artifacts: Path, embedded_server: EmbeddedServer, tmp_path: Path
) -> None:
    port = free_port()
    given = {"port": port, "workers": 2, "artifacts": artifacts, "redis_url": embedded_server.url}
    environment = {f"PROPENSITY_{name.upper()}": str(value) for name, value in given.items()}
    environment |= {"PYTHONPATH": str(ROOT), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", SHARED], cwd=tmp_path, env={**os.environ, **environment})
    try:
        wait_until(lambda: len(list(tmp_path.glob("gauge_livemax_*.db"))) >= 2)
        wait_until(lambda: listens(port))
        callers = Callers(port)
        calling = asyncio.create_task(callers.call())
        await asyncio.to_thread(wait_until, lambda: sum(served(tmp_path).values()) > 50)
        process.send_signal(signal.SIGTERM)
        await calling
        assert callers.lost == []
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
        process.wait()
