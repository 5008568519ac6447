"""Owns the promise that a benchmark measures the server it started, knows its processor time, and misses no error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtest import machine
from loadtest.servers import ROOT, free_port, running
from loadtest.wanted import Wanted
from loadtest.wrk import Measured, latency, median, wrk

BUSY = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
TEAPOT = """
from http.server import *
import sys
class Teapot(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(418)
        self.send_header("Content-Length", "0")
        self.end_headers()
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Teapot).serve_forever()
"""
SCRIPT = 'request = function() return wrk.format("POST", "/", {}, "x") end'


def measured(requests_s: float, errors: int = 0) -> Measured:
    return Measured(requests_s, 1, 2, errors, 0.5, 3)


def test_processor_time_is_that_of_a_process_and_of_those_it_started() -> None:
    parent = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {BUSY + 'time.sleep(60)'!r}])\n"
    process = subprocess.Popen([sys.executable, "-c", parent + "child.wait()"])
    try:
        deadline = time.monotonic() + 20
        while machine.cpu_seconds(process.pid) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0.3 <= machine.cpu_seconds(process.pid) < 5
    finally:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            subprocess.run(["kill", child], check=True)
        process.wait(20)


def test_processor_time_of_a_process_that_is_gone_is_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert machine.cpu_seconds(process.pid) == 0


def test_what_others_keep_busy_is_what_is_busy_without_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 4.0, 100.0), (14.0, 6.0, 104.0)])  # busy, our own, clock
    monkeypatch.setattr(machine.Others, "_now", staticmethod(lambda: next(readings)))
    assert machine.Others().cores() == 0.5


def test_the_machine_is_not_busier_than_it_has_cores() -> None:
    others = machine.Others()
    time.sleep(0.5)
    assert 0 <= others.cores() <= (os.cpu_count() or 1) + 0.1


def test_a_server_that_does_not_start_is_an_error_with_its_log() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no model here')"]
    with pytest.raises(RuntimeError, match="no model here"), running(command, free_port(), "/"):
        pass


def test_a_server_is_ended_with_its_block() -> None:
    port = free_port()
    with running([sys.executable, "-c", TEAPOT, str(port)], port, "/") as server:
        assert machine.cpu_seconds(server.pid) > 0
        assert server.url == f"http://127.0.0.1:{port}"
    assert machine.cpu_seconds(server.pid) == 0


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk_counts_errors_and_sees_the_tail(tmp_path: Path) -> None:
    port, script = free_port(), tmp_path / "post.lua"
    script.write_text(SCRIPT)
    with running([sys.executable, "-c", TEAPOT, str(port)], port, "/"):
        found = wrk(port, 2, script, seconds=1, warm_up_s=1)
    assert found.errors == pytest.approx(found.requests_s, rel=0.5)
    assert 0 < found.p50_ms <= found.p99_ms <= found.p999_ms
    assert 0 < found.wrk_cpu < 1


@pytest.mark.parametrize(("text", "ms"), [("99%   110.00us", 0.11), ("99%    1.20ms", 1.2), ("99%    1.20s", 1200)])
def test_latencies_of_wrks_table_are_read_in_milliseconds(text: str, ms: float) -> None:
    assert latency(f"  50%   1.00us\n  {text}\n", "99%") == pytest.approx(ms)


def test_the_median_run_keeps_the_errors_of_all() -> None:
    found = median([measured(1, 1), measured(10), measured(4, 2)])
    assert (found.requests_s, found.p999_ms, found.errors) == (4, 3, 3)


def test_a_figure_beyond_its_bound_is_marked_and_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = Wanted()
    wanted.least("fast enough", 5.1, 5)
    wanted.most("soon enough", 9, 10)
    assert wanted.missed == 0
    wanted.least("too slow", 4.9, 5)
    wanted.most("not a number", float("nan"), 10)
    assert wanted.missed == 2
    lines = capsys.readouterr().out.splitlines()
    assert ["MISSED" in line for line in lines] == [False, False, True, True]
    assert "4.90" in lines[2]
    assert "wanted >= 5" in lines[2]


QUIET = """
from loadtest import quiet_service
from service import metrics
quiet_service.be_quiet()
metrics.stage("model").add(1.0)
metrics.scores("m", "1", "nurture").add(1)
metrics.tell()
text = metrics.exposition().decode()
assert 'propensity_stage_seconds_count{stage="model"} 0.0' in text, text
assert 'propensity_scores_total{model="m",segment="nurture",version="1"} 0.0' in text, text
"""


def test_the_quiet_service_counts_nothing_of_a_score() -> None:
    ended = subprocess.run([sys.executable, "-c", QUIET], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
