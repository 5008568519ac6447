"""What traces cost: processor time a score of the service, off and on, with marks in the head and without.

The servers run side by side on one core with Redis and are driven in turn by wrk from the other core; medians over the
rounds of the ratios within a round. The collector takes what is sent and forgets it, in a process of its own on the
generator's core, or hangs.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import statistics
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from loadtest import machine
from loadtest.bench_serving import SCRIPT, Bench, loaded, prepared
from loadtest.population import VISITORS
from loadtest.servers import GENERATOR_CORE, SERVER_CORE, Server, free_port, running_on

ROUNDS: Final = 3
_PLAIN: Final = '{["Content-Type"] = "application/json"}'
_MARKED: Final = (
    '{["Content-Type"] = "application/json", ["X-Request-ID"] = string.format("%016x", n), '
    '["traceparent"] = string.format("00-%032x-%016x-00", n, n)}'
)


class Case(NamedTuple):
    """One way to run the service, and whether its requests have a head of their own each."""

    name: str
    ratio: float | None = None
    hangs: bool = False
    is_marked: bool = False
    tree: Path | None = None


class _Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # noqa: N802 - the name that http.server wants
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def _collect(port: int) -> None:
    machine.pin(GENERATOR_CORE)
    ThreadingHTTPServer(("127.0.0.1", port), _Sink).serve_forever()


@contextlib.contextmanager
def collectors() -> Iterator[tuple[int, int]]:
    """Ports of a collector that takes everything, and of one that takes connections and never answers."""
    port = free_port()
    sink = get_context("spawn").Process(target=_collect, args=[port], daemon=True)
    sink.start()
    with socket.create_server(("127.0.0.1", 0)) as hole:
        try:
            yield port, hole.getsockname()[1]
        finally:
            sink.terminate()
            sink.join()


@contextlib.contextmanager
def service(bench: Bench, case: Case, sink: int, hole: int) -> Iterator[Server]:
    """The service as shipped, from this tree or another one."""
    port = free_port()
    settings = {"PORT": port, "REDIS_URL": bench.redis_url, "ARTIFACTS": bench.artifacts}
    environment = {f"PROPENSITY_{name}": str(value) for name, value in settings.items()}
    if case.ratio is not None:
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{hole if case.hangs else sink}"
        environment["OTEL_TRACES_SAMPLER"] = "parentbased_traceidratio"
        environment["OTEL_TRACES_SAMPLER_ARG"] = str(case.ratio)
    place = "" if case.tree is None else f"import sys; sys.path.insert(0, {str(case.tree)!r}); "
    run = f"{place}from service.app import serve; from service.settings import load; serve(load())"
    with running_on((SERVER_CORE,), [sys.executable, "-c", run], port, "/readyz", **environment) as server:
        yield server


def main(
    seconds: Annotated[int, typer.Option(help="Of each measurement.")] = 1,
    before: Annotated[Path | None, typer.Option(help="Another checkout, to compare with this one.")] = None,
) -> None:
    """Measure, and print the processor time of the service and Redis for a score, in microseconds."""
    if shutil.which("wrk") is None or shutil.which("redis-server") is None:
        raise SystemExit("needs wrk and redis-server; on Debian: sudo apt-get install wrk redis-server")
    cases = [Case("off")]
    if before is not None:
        cases += [Case("another checkout", tree=before), Case("another checkout, marks", is_marked=True, tree=before)]
    cases += [
        Case("off, marks", is_marked=True),
        Case("on, 1 of 100", ratio=0.01),
        Case("on, all", ratio=1.0),
        Case("on, all, collector hangs", ratio=1.0, hangs=True),
    ]
    print(machine.describe())
    with contextlib.ExitStack() as stack:
        bench = stack.enter_context(prepared(seconds, 0))
        ports = stack.enter_context(collectors())
        marked = bench.script.with_name("marked.lua")
        marked.write_text(SCRIPT.replace("VISITORS", str(VISITORS)).replace(_PLAIN, _MARKED))
        plain = bench.script
        servers = {case: stack.enter_context(service(bench, case, *ports)) for case in cases}
        took_us: dict[Case, list[float]] = {case: [] for case in cases}
        p99_ms: dict[Case, list[float]] = {case: [] for case in cases}
        for _ in range(ROUNDS):
            for case in cases:
                bench.script = marked if case.is_marked else plain
                load = loaded(bench, servers[case], 64)
                took_us[case].append(load.cpu_us)
                p99_ms[case].append(load.seen.p99_ms)
    print(f"{'':26} {'CPU us a score':>14} {'to off':>8} {'p99 ms':>8}")
    for case in cases:
        ratio = statistics.median(one / off for one, off in zip(took_us[case], took_us[cases[0]], strict=True))
        own, late = statistics.median(took_us[case]), statistics.median(p99_ms[case])
        print(f"{case.name:26} {own:>14.1f} {ratio:>8.3f} {late:>8.2f}")


if __name__ == "__main__":
    typer.run(main)
