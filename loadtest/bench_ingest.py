"""Events a second a core through `POST /v1/events`, in batches of 100: service and Redis on one core, wrk on another.

The batches are spread over 10,000 visitors who have histories, so that compaction takes its share. Every event has a
message id and a time of its own, properties of which two are kept, and a context of which the device is.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from loadtest import machine
from loadtest.bench_features import SPEC
from loadtest.population import RETENTION_MS, VISITORS, histories, matrix_of, write_bundle
from loadtest.servers import Server, free_port, running
from loadtest.wanted import Wanted
from loadtest.wrk import wrk
from service.core import features
from service.core.events import RECORD_BYTES
from service.history import History
from service.store import Store
from service.visitors import MOST_TRAIT_BYTES, Visitors
from training import specfile

BATCH: Final = 100
CONNECTIONS: Final = 4
SECONDS: Final = 10
WARM_UP_S: Final = 2
WANTED: Final = 20_000

SCRIPT: Final = """
local names = {"Product Viewed", "Product Added", "Product Viewed", "Home Viewed"}
local categories, devices = {"shoes", "coats", "hats"}, {"mobile", "desktop", "tablet"}
local heads, tails = {}, {}
for i = 1, VISITORS do
  heads[i] = ('{"type":"track","event":"%s","userId":"visitor-%d","messageId":"'):format(names[i % 4 + 1], i - 1)
  tails[i] = (
    '"properties":{"price":%.2f,"category":"%s","sku":"sku-%d","currency":"EUR"},' ..
    '"context":{"device":"%s","locale":"en-GB","page":{"path":"/products/%d","referrer":"https://www.example.org/"}}}'
  ):format(5 + i % 200 + 0.25, categories[i % 3 + 1], i % 500, devices[i % 3 + 1], i % 500)
end
local number, run = 0, os.time()
request = function()
  local events, now = {}, os.date("!%Y-%m-%dT%H:%M:%S")
  for i = 1, BATCH do
    number = number + 1
    local visitor = number * 7919 % VISITORS + 1
    events[i] = ('%s%08x-7a3c-4e1f-9b2d-%012x","timestamp":"%s.%03dZ",%s'):format(
      heads[visitor], run, number, now, number % 1000, tails[visitor])
  end
  local body = '{"batch":[' .. table.concat(events, ",") .. ']}'
  return wrk.format("POST", "/v1/events", {["Content-Type"] = "application/json"}, body)
end
"""


@dataclass(frozen=True)
class Ingested:
    """How fast events were taken, the processor microseconds that each cost, and what was not accepted."""

    events_s: float
    p50_ms: float  # of a batch
    p99_ms: float
    service_us: float
    redis_us: float
    wrong: int

    @property
    def a_core(self) -> float:
        """Events a second that a core of their own would take; other processes may have had a share of this one."""
        return 1e6 / (self.service_us + self.redis_us)


async def fill(url: str, kept: Mapping[str, History]) -> None:
    """Put histories into the feature cache, each with as many records of the device as visitors have on the way."""
    rng = np.random.default_rng(3)
    store = Store.open(url, namespace="p", retention_ms=RETENTION_MS, timeout_ms=10_000)
    grown = {
        name: history._replace(traits=history.traits * int(rng.integers(1, MOST_TRAIT_BYTES // RECORD_BYTES)))
        for name, history in kept.items()
    }
    names = list(grown)
    for first in range(0, len(names), 500):
        await Visitors(store).append(
            {name: grown[name] for name in names[first : first + 500]}, time.time_ns() // 1_000_000
        )
    await store.close()


def outcomes(service: Server) -> dict[str, int]:
    """How many events the service has accepted, ignored and refused so far."""
    text = urllib.request.urlopen(f"{service.url}/metrics", timeout=10).read().decode()
    found = re.findall(r'^propensity_events_total\{outcome="(\w+)"\} ([\d.e+]+)$', text, re.MULTILINE)
    return {outcome: int(float(number)) for outcome, number in found}


def measure(service: Server, redis: Server, script: Path) -> Ingested:
    """Send batches for SECONDS, after a warm-up of which the processor time counts too, as do its events."""
    used_s = [service.cpu_seconds(), redis.cpu_seconds()]
    seen = wrk(service.port, CONNECTIONS, script, seconds=SECONDS, warm_up_s=WARM_UP_S)
    service_s, redis_s = service.cpu_seconds() - used_s[0], redis.cpu_seconds() - used_s[1]
    counted = outcomes(service)
    taken = counted.pop("accepted")
    return Ingested(
        events_s=seen.requests_s * BATCH,
        p50_ms=seen.p50_ms,
        p99_ms=seen.p99_ms,
        service_us=service_s * 1e6 / taken,
        redis_us=redis_s * 1e6 / taken,
        wrong=int(seen.errors) + sum(counted.values()),
    )


def ingest(wanted: Wanted) -> None:
    """Measure with a service and a Redis of its own, and compare with what is wanted."""
    now_ms = time.time_ns() // 1_000_000
    plan, kept = features.compile(specfile.load(SPEC)), histories(now_ms)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        artifacts, script = directory / "artifacts", directory / "events.lua"
        write_bundle(artifacts / plan.spec.model / "bench", plan, matrix_of(plan, kept, now_ms))
        script.write_text(SCRIPT.replace("BATCH", str(BATCH)).replace("VISITORS", str(VISITORS)))
        cache_port, port = free_port(), free_port()
        cache = ["redis-server", "--port", str(cache_port), "--bind", "127.0.0.1", "--save", "", "--dir", name]
        serve = [sys.executable, "-m", "cli.main", "serve", "--port", str(port), "--artifacts", str(artifacts)]
        url = f"redis://127.0.0.1:{cache_port}/0"
        with running(cache, cache_port, None) as redis:
            asyncio.run(fill(url, kept))
            with running(serve, port, "/readyz", PROPENSITY_REDIS_URL=url) as service:
                found = measure(service, redis, script)
    print(
        f"\nbatches of {BATCH} events over {CONNECTIONS} connections: {found.events_s:,.0f} events/s; "
        f"a batch p50 {found.p50_ms:.2f} ms, p99 {found.p99_ms:.2f} ms; "
        f"CPU an event: service {found.service_us:.1f} us, Redis {found.redis_us:.1f} us"
    )
    wanted.least("ingest: events a second a core", found.a_core, WANTED)
    wanted.most("ingest: events not accepted", found.wrong, 0)


def main() -> int:
    """Print what was measured; 1 where it is too slow or an event was not accepted."""
    if shutil.which("wrk") is None or shutil.which("redis-server") is None:
        raise SystemExit("needs wrk and redis-server; on Debian: sudo apt-get install wrk redis-server")
    print(machine.describe())
    wanted = Wanted()
    ingest(wanted)
    return 1 if wanted.missed else 0


if __name__ == "__main__":
    sys.exit(main())
