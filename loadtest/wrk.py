"""wrk, the generator that costs next to nothing: each connection sends the next request when the last is answered."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Final

from loadtest import machine
from loadtest.servers import GENERATOR_CORE

SECONDS: Final = 5
WARM_UP_S: Final = 1

# wrk's own table has no p99.9.
_DONE: Final = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\nMEASURED {"requests":%d,"us":%d,"errors":%d,"p50":%d,"p99":%d,"p999":%d}\\n',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"""


@dataclass(frozen=True)
class Measured:
    """What wrk saw. `errors` are failed connections, reads, writes, timeouts and statuses from 400 on."""

    requests_s: float
    p50_ms: float
    p99_ms: float
    errors: float
    wrk_cpu: float  # processor seconds that wrk used a second
    p999_ms: float


def median(measured: Sequence[Measured]) -> Measured:
    """The median of each number, and all errors."""
    columns = [statistics.median(column) for column in zip(*map(astuple, measured), strict=True)]
    return replace(Measured(*columns), errors=sum(one.errors for one in measured))


def wrk(
    port: int,
    connections: int,
    script: Path,
    *,
    seconds: int = SECONDS,
    warm_up_s: int = WARM_UP_S,
    cores: tuple[int, ...] = (GENERATOR_CORE,),
) -> Measured:
    """Drive a server with a number of connections, for whole seconds; `script` is Lua that makes the requests."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script.read_text() + _DONE)
        file.flush()
        # A thread a core: one alone that shares two busy cores waits so often that it leaves them idle.
        command = ["wrk", f"-t{len(cores)}", f"-c{connections}", "-s", file.name, f"http://127.0.0.1:{port}"]
        if warm_up_s:
            _run([*command, f"-d{warm_up_s}s"], cores)
        before = os.times()
        output = _run([*command, f"-d{seconds}s"], cores)
        after = os.times()
    found = json.loads(output.rpartition("MEASURED ")[2])
    taken_s = found["us"] / 1e6
    used_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(
        requests_s=found["requests"] / taken_s,
        p50_ms=found["p50"] / 1000,
        p99_ms=found["p99"] / 1000,
        errors=found["errors"],
        wrk_cpu=used_s / taken_s,
        p999_ms=found["p999"] / 1000,
    )


def latency(output: str, percentile: str) -> float:
    """Milliseconds of a percentile in wrk's own table, for scripts that print their own `done`."""
    found = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s)\b", output)
    assert found is not None
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def _run(command: list[str], cores: tuple[int, ...]) -> str:
    ran = subprocess.run(command, check=True, capture_output=True, text=True, preexec_fn=lambda: machine.pin(*cores))
    return ran.stdout
