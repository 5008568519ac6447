"""What the tests of faults share: how long they take, the service as it is set by default, the figures they found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import httpx2
import pytest

from tests.conftest import RedisServer, ServiceProcess, StartService, WriteBundle
from tests.faults import visitors
from tests.faults.verdict import DEADLINE_MS

Span = Callable[[float, float], float]
Note = Callable[..., None]
Serve = Callable[..., ServiceProcess]

_FIGURES: Final = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="give every fault its full time, as `make faults` does")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("full", default=False) and (figures := config.stash.get(_FIGURES, [])):
        terminalreporter.section("what was measured")
        for line in figures:
            terminalreporter.write_line(line)


@pytest.fixture
def span(request: pytest.FixtureRequest) -> Span:
    """A function of two times that gives the first, or the second with --full."""
    full = request.config.getoption("full", default=False)
    return lambda short, long: long if full else short


@pytest.fixture
def full(request: pytest.FixtureRequest) -> None:
    """Skips a test that takes long, or does not hold yet, unless --full is given."""
    if not request.config.getoption("full", default=False):
        pytest.skip("runs in make faults")


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """A function that keeps figures for the end of a full run."""
    lines = request.config.stash.setdefault(_FIGURES, [])

    def keep(what: str, **figures: object) -> None:
        lines.append(f"{what}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items()))

    return keep


@pytest.fixture(scope="session")
def known_prices(tmp_path_factory: pytest.TempPathFactory, write_bundle: WriteBundle) -> Path:
    """Artifacts with the model whose score tells whose it is."""
    directory = tmp_path_factory.mktemp("known-prices")
    write_bundle(directory, visitors.SPEC, weight=visitors.WEIGHT)
    return directory


@pytest.fixture
def serve(start_service: StartService, known_prices: Path) -> Serve:
    """A function that starts a service as it is set by default, and returns when it is ready and warm."""

    def start(redis_url: str, **settings: object) -> ServiceProcess:
        given = {"artifacts": known_prices, "namespace": visitors.NAMESPACE, "deadline_ms": DEADLINE_MS, **settings}
        process = start_service(redis_url=redis_url, **given)
        process.wait_until_ready()
        with httpx2.Client(base_url=process.url) as client:
            for _ in range(200):
                client.post("/v1/score", json={"visitor_id": "nobody"})
        return process

    return start


@pytest.fixture
def filled_redis(own_redis_server: RedisServer) -> Iterator[RedisServer]:
    """A server of this test alone that knows 1,000 visitors."""
    visitors.fill(own_redis_server.url, range(1000), visitors.now_ms())
    yield own_redis_server
