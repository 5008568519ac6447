"""Scores a second and their latency: this service, a plain one, and bare uvicorn, in one run on pinned cores.

Server and Redis share one core, the generator has the other. 24 features from the events of 10,000 visitors, 300 trees
of 31 leaves; the service runs as shipped. The plain service reads a ready-made vector instead. Five parts:

compare   wrk with 64 connections and with one, against each server in turn, several rounds; ratios within a round.
constant  requests at fixed times at 60 % of the peak, whatever the answers do.
workers   two workers on both cores against one on one core.
metrics   the service against itself with nothing of a score counted, both with files for several processes.
ingest    events in batches of 100, see `bench_ingest`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from loadtest import machine, population
from loadtest.bench_features import shop_plan
from loadtest.bench_ingest import ingest
from loadtest.open_loop import LAG_LIMIT_MS
from loadtest.population import VISITORS, histories, matrix_of, write_bundle
from loadtest.servers import GENERATOR_CORE, ROOT, SERVER_CORE, Server, free_port, running, running_on
from loadtest.wanted import Wanted
from loadtest.wrk import Measured, latency, median, wrk

WRK_CORE: Final = GENERATOR_CORE
__all__ = [  # what other benchmarks build on
    "SERVER_CORE",
    "VISITORS",
    "WRK_CORE",
    "free_port",
    "histories",
    "latency",
    "matrix_of",
    "running",
    "write_bundle",
    "wrk",
]

ROUNDS: Final = 5
METRICS_ROUNDS: Final = 5  # the difference is small
PEAK_SHARE: Final = 0.6
MOST_OTHERS: Final = 0.2
OURS, PLAIN, BARE = "propensity", "plain service", "bare uvicorn"
AS_SHIPPED: Final = ("cli.main", "serve")
LEAST_WITH_METRICS: Final = 0.9

SCRIPT: Final = """
local n = 0
request = function()
  n = n + 1
  local body = '{"visitor_id":"visitor-' .. (n * 7919) % VISITORS .. '"}'
  return wrk.format("POST", "/v1/score", {["Content-Type"] = "application/json"}, body)
end
"""


class Part(StrEnum):
    """What can be measured on its own."""

    COMPARE = "compare"
    CONSTANT = "constant"
    WORKERS = "workers"
    METRICS = "metrics"
    INGEST = "ingest"


@dataclass
class Bench:
    """The shop on disk and in Redis, how long to measure, and what came of it."""

    artifacts: Path
    script: Path
    redis: Server
    seconds: int
    constant_s: int
    wanted: Wanted = field(default_factory=Wanted)

    @property
    def redis_url(self) -> str:
        """Of the feature cache."""
        return f"redis://127.0.0.1:{self.redis.port}/0"

    @contextlib.contextmanager
    def service(
        self, workers: int = 1, cores: tuple[int, ...] = (SERVER_CORE,), how: Sequence[str] = AS_SHIPPED, **more: str
    ) -> Iterator[Server]:
        """This service as shipped, or started otherwise."""
        port = free_port()
        settings = {"PORT": port, "REDIS_URL": self.redis_url, "ARTIFACTS": self.artifacts, "WORKERS": workers}
        environment = {f"PROPENSITY_{name}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-m", *how]
        with running_on(cores, command, port, "/readyz", **environment, **more) as server:
            yield server

    @contextlib.contextmanager
    def plain(self) -> Iterator[Server]:
        """The service of `plain_service.py`."""
        port = free_port()
        [model] = self.artifacts.glob("*/bench/model.onnx")
        command = [sys.executable, "-m", "loadtest.plain_service"]
        with running(command, port, "/docs", PORT=str(port), REDIS_URL=self.redis_url, MODEL=str(model)) as server:
            yield server

    @contextlib.contextmanager
    def bare(self) -> Iterator[Server]:
        """The service of `bare_service.py`."""
        port = free_port()
        with running([sys.executable, "-m", "loadtest.bare_service"], port, "/", PORT=str(port)) as server:
            yield server


@contextlib.contextmanager
def prepared(seconds: int, constant_s: int) -> Iterator[Bench]:
    """A bench with a filled Redis on the servers' core, gone afterwards."""
    now_ms = time.time_ns() // 1_000_000
    plan, kept = shop_plan(), histories(now_ms)
    matrix = matrix_of(plan, kept, now_ms)
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), free_port()
        write_bundle(directory / "artifacts" / plan.spec.model / "bench", plan, matrix)
        script = directory / "score.lua"
        script.write_text(SCRIPT.replace("VISITORS", str(VISITORS)))
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", name]
        with running(command, port, None) as redis:
            bench = Bench(directory / "artifacts", script, redis, seconds, constant_s)
            asyncio.run(population.fill(bench.redis_url, kept, matrix))
            yield bench


@dataclass(frozen=True)
class Load:
    """What wrk saw, and the processor seconds a second of the server, of Redis, and of all others on their cores."""

    seen: Measured
    server_cpu: float
    redis_cpu: float
    other_cpu: float
    cores: int

    @property
    def cpu_us(self) -> float:
        """Processor microseconds a request; others on the machine hardly change it."""
        return (self.server_cpu + self.redis_cpu) * 1e6 / self.seen.requests_s

    @property
    def undivided(self) -> float:
        """Requests a second, had the server and Redis had their cores to themselves. What they left idle stays idle."""
        return self.seen.requests_s * self.cores / (self.cores - self.other_cpu)


def loaded(
    bench: Bench,
    server: Server,
    connections: int,
    cores: tuple[int, ...] = (SERVER_CORE,),
    wrk_cores: tuple[int, ...] = (GENERATOR_CORE,),
) -> Load:
    """Drive a server that runs with Redis on some cores by wrk, after a warm-up."""

    def used() -> tuple[float, float, float]:
        return server.cpu_seconds(), bench.redis.cpu_seconds(), machine.busy_seconds(*cores)

    bench.redis.move(*cores)
    wrk(server.port, connections, bench.script, seconds=1, warm_up_s=0, cores=wrk_cores)
    before, begun = used(), time.monotonic()
    seen = wrk(server.port, connections, bench.script, seconds=bench.seconds, warm_up_s=0, cores=wrk_cores)
    taken_s = time.monotonic() - begun
    own, redis, busy = ((now - then) / taken_s for now, then in zip(used(), before, strict=True))
    return Load(seen, own, redis, max(busy - own - redis, 0.0), len(cores))


def compare(bench: Bench) -> float:
    """Measure every server with 64 connections and with one, in turn; returns this service's peak."""
    loads: dict[tuple[str, int], list[Load]] = {}
    with bench.bare() as bare, bench.plain() as plain, bench.service() as ours:
        for turn in range(ROUNDS):
            for who, server in ((BARE, bare), (PLAIN, plain), (OURS, ours)):
                for connections in (64, 1):
                    _tell(f"round {turn + 1} of {ROUNDS}: {who}, {connections} connections")
                    loads.setdefault((who, connections), []).append(loaded(bench, server, connections))
    print(
        f"\n{'':15} connections {'req/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'p99.9':>8} {'errors':>7} {'wrk CPU':>8} "
        f"{'CPU us a request':>17}"
    )
    for (who, connections), all_of in loads.items():
        one = median([load.seen for load in all_of])
        print(
            f"{who:15} {connections:>11} {one.requests_s:>8,.0f} {one.p50_ms:>8.2f} {one.p99_ms:>8.2f} "
            f"{one.p999_ms:>8.2f} {one.errors:>7.0f} {one.wrk_cpu:>8.0%} "
            f"{statistics.median(load.cpu_us for load in all_of):>17.0f}"
        )

    def ratio(number: Callable[[Load], float], connections: int, other: str) -> float:
        pairs = zip(loads[OURS, connections], loads[other, connections], strict=True)
        return statistics.median(number(mine) / number(theirs) for mine, theirs in pairs)

    print("\nmedian over the rounds of the ratio within a round")
    wanted = bench.wanted
    wanted.least("64 connections: req/s to the plain service's", ratio(lambda load: load.seen.requests_s, 64, PLAIN), 5)
    wanted.least("64 connections: req/s to bare uvicorn's", ratio(lambda load: load.seen.requests_s, 64, BARE), 0.5)
    wanted.most("64 connections: p99 to the plain service's", ratio(lambda load: load.seen.p99_ms, 64, PLAIN), 0.2)
    wanted.most(" 1 connection:  p50 to the plain service's", ratio(lambda load: load.seen.p50_ms, 1, PLAIN), 1)
    wanted.most("errors of all servers", sum(load.seen.errors for all_of in loads.values() for load in all_of), 0)
    plain_us, bare_us = (ratio(lambda load: load.cpu_us, 64, other) for other in (PLAIN, BARE))
    print(f"64 connections: {1 / plain_us:.2f} x plain, {1 / bare_us:.2f} x bare by requests a processor second")
    return median([load.seen for load in loads[OURS, 64]]).requests_s


def constant(bench: Bench, peak: float | None) -> None:
    """Send requests at fixed times, at a share of the peak (None: measure it first)."""
    with bench.service() as ours:
        if peak is None:
            _tell("the peak")
            peak = wrk(ours.port, 64, bench.script, seconds=bench.seconds).requests_s
        rate = round(PEAK_SHARE * peak)
        _tell(f"{rate:,} requests a second for {bench.constant_s} s")
        open_loop(ours, rate, 2)
        found = open_loop(ours, rate, bench.constant_s)
    took_ms = found["latency_ms"].get("200", dict.fromkeys(("p50", "p99", "p99.9"), float("nan")))
    print(
        f"\n{rate:,} requests a second at fixed times ({PEAK_SHARE:.0%} of {peak:,.0f}) for {bench.constant_s} s: "
        f"p50 {took_ms['p50']:.2f} ms; answers {found['counts']}"
    )
    bench.wanted.most("fixed arrivals: p99 ms", took_ms["p99"], 10)
    bench.wanted.most("fixed arrivals: p99.9 ms", took_ms["p99.9"], 25)
    bench.wanted.most("fixed arrivals: errors", found["requests"] - found["counts"].get("200", 0), 0)
    bench.wanted.most("fixed arrivals: lag of the generator itself, p99 ms", found["lag_ms"]["p99"], LAG_LIMIT_MS)


def open_loop(server: Server, rate: float, seconds: float) -> dict[str, Any]:
    """What `loadtest.open_loop` says of scores at a fixed rate, from the generator's core."""
    options = ["--rate", str(rate), "--seconds", str(seconds), "--visitors", str(VISITORS), "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "loadtest.open_loop", f"{server.url}/v1/score", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: machine.pin(GENERATOR_CORE),
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def workers(bench: Bench) -> None:
    """Compare two workers on both cores with one worker on one core, Redis beside them each time.

    wrk has to share the cores of the two. What it and anybody else takes of them is taken out: with c cores, of which
    others use o, a service that had all of them would answer c / (c - o) times as many requests.
    """
    both = (SERVER_CORE, GENERATOR_CORE)
    loads: dict[tuple[int, int], list[Load]] = {}
    print(
        f"\n{'':10} connections {'req/s':>8} {'p99 ms':>8} {'wrk CPU':>8} {'service CPU':>12} {'redis CPU':>10} "
        f"{'others CPU':>11} {'req/s undivided':>16}"
    )
    with bench.service(1) as one, bench.service(2, both) as two:
        for turn in range(ROUNDS):
            _tell(f"round {turn + 1} of {ROUNDS}: one worker, two workers")
            for server, count, connections in ((one, 1, 64), (two, 2, 64), (two, 2, 128)):
                cores = both if count == 2 else (SERVER_CORE,)
                load = loaded(bench, server, connections, cores, cores if count == 2 else (GENERATOR_CORE,))
                loads.setdefault((count, connections), []).append(load)
                print(
                    f"{count} worker{'s' * (count > 1):2} {connections:>11} {load.seen.requests_s:>8,.0f} "
                    f"{load.seen.p99_ms:>8.2f} {load.seen.wrk_cpu:>8.0%} {load.server_cpu:>12.0%} "
                    f"{load.redis_cpu:>10.0%} {load.other_cpu:>11.0%} {load.undivided:>16,.0f}",
                    flush=True,
                )
    bench.redis.move(SERVER_CORE)
    few, same = (
        statistics.median(
            pair.undivided / one.undivided for one, pair in zip(loads[1, 64], loads[2, count], strict=True)
        )
        for count in (64, 128)
    )
    print("others: on the service's cores, wrk among them where it shares these; undivided: with their share taken out")
    print(f"two workers to one with 64 connections together: {few:.2f} x, since half as many wait for each batch")
    bench.wanted.least("two workers to one, 64 connections each", same, 1.7)
    bench.wanted.most("two workers and one: errors", sum(load.seen.errors for row in loads.values() for load in row), 0)


def metrics(bench: Bench) -> None:
    """Compare the service, in turn, with one that counts nothing of a score.

    Both have files for metrics, as with several workers: the dearest way to count.
    """
    loads: dict[tuple[str, int], list[Load]] = {}
    quiet = ("loadtest.quiet_service",)
    with contextlib.ExitStack() as stack:
        servers = []
        for who, how in (("counting", AS_SHIPPED), ("quiet", quiet)):
            files = stack.enter_context(tempfile.TemporaryDirectory())
            servers.append((who, stack.enter_context(bench.service(how=how, PROMETHEUS_MULTIPROC_DIR=files))))
        for turn in range(METRICS_ROUNDS):
            for who, server in servers if turn % 2 else reversed(servers):
                for connections in (64, 1):
                    _tell(f"round {turn + 1} of {METRICS_ROUNDS}: {who}, {connections} connections")
                    loads.setdefault((who, connections), []).append(loaded(bench, server, connections))
    for connections in (64, 1):
        pairs = list(zip(loads["counting", connections], loads["quiet", connections], strict=True))
        cost_us = statistics.median(counting.cpu_us - quiet.cpu_us for counting, quiet in pairs)
        print(f"{connections:>2} connections: metrics cost {cost_us:.1f} us of processor a request")
        ratio = statistics.median(counting.seen.requests_s / quiet.seen.requests_s for counting, quiet in pairs)
        label = f"{connections:>2} connections: req/s with metrics to those without"
        bench.wanted.least(label, ratio, LEAST_WITH_METRICS)


def _tell(doing: str) -> None:
    print(f"  {doing} ...", file=sys.stderr, flush=True)


def main(
    parts: Annotated[list[Part] | None, typer.Argument(help="What to measure; everything if left out.")] = None,
    quick: Annotated[bool, typer.Option(help="2 s instead of 5 a measurement, 10 s instead of 60.")] = False,
) -> None:
    """Measure, and exit with 1 where a wanted figure is missed or a request failed."""
    if shutil.which("wrk") is None or shutil.which("redis-server") is None:
        raise SystemExit("needs wrk and redis-server; on Debian: sudo apt-get install wrk redis-server")
    print(machine.describe())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception it ends the servers too
    with prepared(2 if quick else 5, 10 if quick else 60) as bench:
        chosen, peak, others = parts or list(Part), None, machine.Others()
        if Part.COMPARE in chosen:
            peak = compare(bench)
        if Part.CONSTANT in chosen:
            constant(bench, peak)
        if Part.WORKERS in chosen:
            workers(bench)
        if Part.METRICS in chosen:
            metrics(bench)
        if Part.INGEST in chosen:
            ingest(bench.wanted)
        bench.wanted.most("cores that other processes kept busy meanwhile", others.cores(), MOST_OTHERS)
    raise typer.Exit(1 if bench.wanted.missed else 0)


if __name__ == "__main__":
    typer.run(main)
