"""Scores a second and their latency: this service, the plain one, and bare uvicorn, in one run on pinned cores.

Server and Redis share one core, wrk has the other. 24 features from the events of 10,000 visitors with 1 to 60 events,
300 trees of 31 leaves; the service runs as shipped. The plain service reads a ready-made vector instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lightgbm as lgb
import numpy as np
import yaml

from loadtest import machine
from loadtest.bench_features import NOW_MS, shop_plan
from service.core import bundle, events, features, segments
from service.core.features import Plan
from service.store import History, Store
from training import export, packing, reference
from training.dataset import GoldenRow
from training.export import Calibration
from training.fit import Fitted

ROOT: Final = Path(__file__).parents[1]
VISITORS: Final = 10_000
TREES: Final = 300
LEAVES: Final = 31
SECONDS: Final = 10
SERVER_CORE, WRK_CORE = 0, 1


def histories(now_ms: int) -> dict[str, History]:
    """Visitors of 1 to 60 events in the last month, and a device."""
    rng = np.random.default_rng(1)
    made = {}
    for number in range(VISITORS):
        count = int(rng.integers(1, 61))
        ages = np.sort(rng.exponential(5 * 86_400_000, count).astype(np.int64))[::-1]
        kinds, ids = rng.choice([1, 1, 1, 1, 2, 3, 4, 5], count), rng.integers(1, 2**32, count)
        records = events.records(now_ms - ages, kinds, ids, rng.integers(1, 30, count), rng.exponential(40, count))
        device = events.pack(now_ms - 1, events.TRAIT_TEXT, events.hash32("device"), events.hash32("mobile"), np.nan)
        made[f"visitor-{number}"] = History(records.tobytes(), device)
    return made


def matrix_of(
    plan: Plan, kept: Mapping[str, History], now_ms: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """float32[n, F] of the visitors now."""
    parts = [events.from_bytes(history.events) for history in kept.values()]
    starts = np.cumsum([0, *map(len, parts)])
    found = features.matrix(plan, np.concatenate(parts), starts, np.full(len(parts), now_ms))
    return found.astype(np.float32)


def write_bundle(directory: Path, plan: Plan, matrix: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    """A sealed bundle of TREES trees of LEAVES leaves that were fitted to noise: as slow as a real one, as useless."""
    rng = np.random.default_rng(2)
    label = rng.random(len(matrix)) < 0.1 + 0.2 * (matrix[:, 0] > np.median(matrix[:, 0]))
    settings = {"objective": "binary", "num_leaves": LEAVES, "min_data_in_leaf": 5, "num_threads": 1, "verbosity": -1}
    booster = lgb.train(settings, lgb.Dataset(matrix, label, feature_name=list(plan.spec.names)), TREES)
    fitted = Fitted(booster, Calibration(1.0, 0.0), {})
    directory.mkdir(parents=True)
    export.write(booster, directory, feature_names=plan.spec.names, calibration=fitted.calibration)
    (directory / "features.yaml").write_text(yaml.safe_dump(plan.spec.model_dump(mode="json")))
    scores = fitted.predict(matrix).astype(np.float32)
    (directory / "reference.json").write_text(reference.describe(plan.spec, matrix, scores).model_dump_json())
    nothing = np.empty(0, events.RECORD)
    golden = packing.golden_cases(
        [GoldenRow(nothing, nothing, np.full(len(plan.spec.requests), np.nan, np.float32), NOW_MS)], plan, fitted
    )
    (directory / "golden.json").write_text(f"[{golden[0].model_dump_json()}]")
    bundle.seal(
        directory,
        {
            "model": plan.spec.model,
            "version": "bench",
            "created_at": "2026-01-01T00:00:00+00:00",
            "spec": plan.spec.model_dump(mode="json"),
            "spec_hash": plan.spec.hash,
            "names": plan.spec.names,
            "dtype": "float32",
            "segments": dict(zip(segments.SEGMENTS, segments.cutoffs(scores, {}), strict=False)),
            "calibration": {"slope": 1.0, "intercept": 0.0},
            "data": {},
            "metrics": {},
            "libraries": {},
        },
    )


@dataclass(frozen=True)
class Measured:
    """What wrk saw, and the processor seconds it used a second."""

    requests_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    wrk_cpu: float


def wrk(port: int, connections: int, script: Path) -> Measured:
    """Drive a server for SECONDS with a number of connections, after a warm-up."""
    command = ["wrk", "-t1", f"-c{connections}", "--latency", "-s", str(script), f"http://127.0.0.1:{port}"]
    subprocess.run([*command, "-d2s"], check=True, capture_output=True, preexec_fn=lambda: machine.pin(WRK_CORE))
    before = os.times()
    ran = subprocess.run(
        [*command, f"-d{SECONDS}s"],
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: machine.pin(WRK_CORE),
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", ran.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", ran.stdout)
    assert rate is not None
    return Measured(
        float(rate[1]),
        latency(ran.stdout, "50%"),
        latency(ran.stdout, "99%"),
        int(bad[1]) if bad else 0,
        used / SECONDS,
    )


def latency(output: str, percentile: str) -> float:
    """Milliseconds of a percentile in wrk's table."""
    found = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s)\b", output)
    assert found is not None
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], port: int, path: str | None, **environment: str) -> Iterator[int]:
    """A server on the server core, once its port listens and `path` answers."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: machine.pin(SERVER_CORE),
    )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if path is None:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                else:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1).close()
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(30)


async def fill(
    url: str, kept: Mapping[str, History], matrix: np.ndarray[tuple[int, int], np.dtype[np.float32]]
) -> None:
    """Put histories under the service's keys, and vectors under those of the plain service."""
    store = Store.open(url, namespace="p", retention_ms=86_400_000, timeout_ms=10_000)
    names = list(kept)
    for first in range(0, len(names), 500):
        await store.append({name: kept[name] for name in names[first : first + 500]}, NOW_MS)
    await store.close()
    import redis.asyncio as redis

    client = redis.from_url(url)
    await client.mset({f"vector:{name}": row.tobytes() for name, row in zip(names, matrix, strict=True)})
    await client.aclose()


SCRIPT: Final = """
local n = 0
request = function()
  n = n + 1
  local body = '{"visitor_id":"visitor-' .. (n * 7919) % VISITORS .. '"}'
  return wrk.format("POST", "/v1/score", {["Content-Type"] = "application/json"}, body)
end
"""


def main() -> int:
    """Print the table; 1 where a server gave errors."""
    if shutil.which("wrk") is None or shutil.which("redis-server") is None:
        raise SystemExit("needs wrk and redis-server; on Debian: sudo apt-get install wrk redis-server")
    print(machine.describe())
    now_ms = time.time_ns() // 1_000_000
    plan, kept = shop_plan(), histories(now_ms)
    matrix = matrix_of(plan, kept, now_ms)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_bundle(directory / "artifacts" / plan.spec.model / "bench", plan, matrix)
        script = directory / "score.lua"
        script.write_text(SCRIPT.replace("VISITORS", str(VISITORS)))
        port = free_port()
        cache = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", name]
        with running(cache, port, None):
            url = f"redis://127.0.0.1:{port}/0"
            asyncio.run(fill(url, kept, matrix))
            return compare(directory, plan, url, script)


def compare(directory: Path, plan: Plan, url: str, script: Path) -> int:
    """Measure every server with 64 connections and with one, and print the rows."""
    artifacts = directory / "artifacts"
    model = str(artifacts / plan.spec.model / "bench" / "model.onnx")
    python, errors = sys.executable, 0
    servers: dict[str, tuple[list[str], str | None, dict[str, str]]] = {
        "bare uvicorn": ([python, "-m", "loadtest.bare_service"], "/", {}),
        "plain service": ([python, "-m", "loadtest.plain_service"], "/docs", {"REDIS_URL": url, "MODEL": model}),
        "propensity": (
            [python, "-m", "cli.main", "serve"],
            "/readyz",
            {"PROPENSITY_REDIS_URL": url, "PROPENSITY_ARTIFACTS": str(artifacts)},
        ),
    }
    print(f"{'':15} {'connections':>11} {'req/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'errors':>7} {'wrk CPU':>8}")
    seen: dict[tuple[str, int], Measured] = {}
    for who, (command, path, environment) in servers.items():
        port = free_port()
        with running(command, port, path, PORT=str(port), PROPENSITY_PORT=str(port), **environment):
            for connections in (64, 1):
                found = seen[who, connections] = wrk(port, connections, script)
                errors += found.errors
                print(
                    f"{who:15} {connections:>11} {found.requests_s:>8,.0f} {found.p50_ms:>8.2f} {found.p99_ms:>8.2f} "
                    f"{found.errors:>7} {found.wrk_cpu:>8.0%}",
                    flush=True,
                )
    many, plain, bare = (seen[who, 64] for who in ("propensity", "plain service", "bare uvicorn"))
    print(f"64 connections: {many.requests_s / plain.requests_s:.1f} x the plain service, ", end="")
    print(
        f"{many.requests_s / bare.requests_s:.2f} x bare uvicorn, p99 {many.p99_ms / plain.p99_ms:.2f} x the plain one"
    )
    one = seen["propensity", 1].p50_ms / seen["plain service", 1].p50_ms
    print(f"1 connection: p50 {one:.2f} x the plain service")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
