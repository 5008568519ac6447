"""What the propensity database costs a score: the service with and without live scores in it, side by side.

As in `loadtest.bench_tracing`: the servers share one core with Redis and are driven in turn by wrk from the other core.
The processor time is that of the service and Redis together, so that writing in the background counts.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
from typing import Annotated, Final

import typer

from loadtest import machine
from loadtest.bench_serving import Load, loaded, prepared
from loadtest.servers import SERVER_CORE, free_port, running_on

BUFFERS: Final = {"without live scores": 0, "with": 20_000}


def main(
    seconds: Annotated[int, typer.Option(help="Of each measurement.")] = 3,
    rounds: Annotated[int, typer.Option(help="Of measurements of each.")] = 5,
) -> None:
    """Measure, and print the processor time of a score in microseconds, and p99 in milliseconds."""
    if shutil.which("wrk") is None or shutil.which("redis-server") is None:
        raise SystemExit("needs wrk and redis-server; on Debian: sudo apt-get install wrk redis-server")
    print(machine.describe())
    run = "from service.app import serve; from service.settings import load; serve(load())"
    with contextlib.ExitStack() as stack:
        bench = stack.enter_context(prepared(seconds, 0))
        servers = {}
        for name, buffer in BUFFERS.items():
            port = free_port()
            given = {"PORT": port, "REDIS_URL": bench.redis_url, "ARTIFACTS": bench.artifacts}
            environment = {f"PROPENSITY_{key}": str(value) for key, value in given.items()}
            environment |= {"PROPENSITY_LIVE_SCORES_BUFFER": str(buffer), "PROPENSITY_NAMESPACE": "p"}
            command = [sys.executable, "-c", run]
            servers[name] = stack.enter_context(running_on((SERVER_CORE,), command, port, "/readyz", **environment))
        loads: dict[str, list[Load]] = {name: [] for name in BUFFERS}
        for _ in range(rounds):
            for name, server in servers.items():
                loads[name].append(loaded(bench, server, 64))
    print(f"{'':22} {'CPU us a score':>14} {'scores/s':>10} {'p99 ms':>8}")
    for name, each in loads.items():
        took, rate, p99 = (
            statistics.median(values)
            for values in zip(*((one.cpu_us, one.seen.requests_s, one.seen.p99_ms) for one in each), strict=True)
        )
        print(f"{name:22} {took:>14.1f} {rate:>10,.0f} {p99:>8.2f}")
    without, kept = loads.values()
    ratio = statistics.median(one.cpu_us / other.cpu_us for one, other in zip(kept, without, strict=True))
    print(f"live scores take {ratio - 1:.1%} more processor time a score, of service and Redis together")


if __name__ == "__main__":
    typer.run(main)
