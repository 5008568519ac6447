"""What the service counts, read without the weight of a parser: these tests run beside the visitors that they time."""

from __future__ import annotations

import asyncio
import http.client
import re

from tests.conftest import ServiceProcess


def scraped(service: ServiceProcess, *series: str) -> float:
    """The sum of series, each written as in /metrics: `name` (every label), or `name{label="value"}`."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    lines = [line.rpartition(" ") for line in text.splitlines()]
    wanted = [re.compile(re.escape(one) + ("" if "{" in one else r"(\{.*\})?")) for one in series]
    return sum(float(value) for name, _, value in lines if any(one.fullmatch(name) for one in wanted))


async def reads(service: ServiceProcess) -> float:
    """How many reads of the feature cache were begun for scores."""
    series = [f'propensity_store_reads_total{{outcome="{outcome}"}}' for outcome in ("ok", "late", "failed")]
    return await asyncio.to_thread(scraped, service, *series)


async def until_breaker_is(service: ServiceProcess, state: str) -> None:
    """Wait, for five seconds at most, until the breaker is in a state."""
    async with asyncio.timeout(5):
        while await asyncio.to_thread(scraped, service, f'propensity_breaker_state{{state="{state}"}}') != 1:
            await asyncio.sleep(0.05)
