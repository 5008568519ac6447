"""Shared fixtures: real servers for the feature cache, a small real model, and the application as it is shipped."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx2
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from hypothesis import settings as hypothesis_settings
from onnx import TensorProto, helper, numpy_helper

from audiences.ledger import Ledger
from service import embedded
from service.app import create_app
from service.core import bundle, events, features, spec
from service.members import Members
from service.propensities import Propensities
from service.settings import Settings
from service.store import Store

pytest_plugins = ["tests.alone"]

# The same examples in every run, however long one takes: what fails is what was changed.
hypothesis_settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis_settings.load_profile("repeatable")

DAY_MS = 86_400_000

SHOP: dict[str, Any] = {
    "model": "shop",
    "events": {
        "view": {"code": 1, "event": "Product Viewed", "value": "price", "attribute": "category"},
        "cart": {"code": 2, "event": "Product Added", "value": "price", "attribute": "category"},
        "page": {"code": 3, "event": "Page Viewed"},
    },
    "features": {
        "views_1d": {"count": "view", "window": "1d"},
        "views_90d": {"count": "view"},
        "carts_7d": {"count": "cart", "window": "7d"},
        "spend_7d": {"sum": "cart", "window": "7d"},
        "categories": {"distinct": "view"},
        "since_view": {"recency": "view"},
        "cart_rate": {"ratio": ["carts_7d", "views_90d"], "prior": [1, 20]},
        "device": {"trait": "device", "categories": ["mobile", "desktop"]},
        "loyalty": {"trait": "loyalty"},
        "referrer": {"request": "referrer", "categories": ["search", "ads"]},
    },
}

WriteBundle = Callable[..., Path]


@pytest.fixture(autouse=True)
def without_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PROPENSITY_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def write_bundle() -> WriteBundle:
    """A function that writes a sealed bundle for a spec into an artifacts directory and returns its path.

    Its model is a logistic regression over the features with small weights, missing values taken as 0. Parts of
    `reference` go before the usual ones, which are an old bundle's: they do not say how many rows there were.
    """
    return _write_bundle


def _write_bundle(
    artifacts: Path,
    document: dict[str, Any] = SHOP,
    version: str = "1",
    created_at: str = "2026-01-01T00:00:00Z",
    weight: float = 0.1,
    reference: Mapping[str, Any] | None = None,
) -> Path:
    feature_spec = spec.parse(document)
    directory = artifacts / feature_spec.model / version
    directory.mkdir(parents=True)
    width = len(feature_spec.names)
    (directory / "model.onnx").write_bytes(_logistic(width, weight))
    (directory / "features.yaml").write_text("# a spec for tests\n", encoding="utf-8")
    bins = {"edges": [1.0], "shares": [0.2, 0.3, 0.5]}
    quantiles = [place / 100 for place in range(101)]
    usual = {"features": dict.fromkeys(feature_spec.names, bins), "score": bins, "quantiles": quantiles}
    reference = {**usual, **(reference or {})}
    (directory / "reference.json").write_text(json.dumps(reference), encoding="utf-8")
    (directory / "golden.json").write_text(json.dumps([_golden(feature_spec, weight)]), encoding="utf-8")
    bundle.seal(
        directory,
        {
            "model": feature_spec.model,
            "version": version,
            "created_at": created_at,
            "spec": document,
            "spec_hash": feature_spec.hash,
            "names": list(feature_spec.names),
            "dtype": "float32",
            "segments": dict(
                zip(
                    ("champions", "high_intent", "potential_buyers", "warm_prospects", "nurture"),
                    (0.9, 0.8, 0.7, 0.6, 0.4),
                    strict=True,
                )
            ),
            "calibration": {},
            "data": {},
            "metrics": {},
            "libraries": {},
        },
    )
    return directory


def _logistic(width: int, weight: float) -> bytes:
    graph = helper.make_graph(
        [
            helper.make_node("IsNaN", ["features"], ["missing"]),
            helper.make_node("Where", ["missing", "zero", "features"], ["known"]),
            helper.make_node("MatMul", ["known", "weights"], ["margin"]),
            helper.make_node("Sigmoid", ["margin"], ["propensity"]),
        ],
        "logistic",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("propensity", TensorProto.FLOAT, [None])],
        [
            numpy_helper.from_array(np.zeros((), np.float32), "zero"),
            numpy_helper.from_array(_weights(width, weight), "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def _weights(width: int, weight: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.linspace(weight, weight / 10, width).astype(np.float32)


def _golden(feature_spec: spec.FeatureSpec, weight: float) -> dict[str, Any]:
    now_ms = 1_767_225_600_000
    record = events.pack(now_ms - 1000, next(iter(feature_spec.events.values())).code, 7, 7, 2.5)
    plan = features.compile(feature_spec)
    plain = {"records": base64.b64encode(record).decode(), "traits": "", "request": {}, "now_ms": now_ms}
    case = bundle.Golden.model_validate({**plain, "vector": [], "score": 0})
    vector = bundle.golden_vectors(plan, [case])[0]
    margin = float(np.nan_to_num(vector) @ _weights(len(vector), weight))
    return {
        **plain,
        "vector": [None if np.isnan(value) else float(value) for value in vector],
        "score": 1 / (1 + np.exp(-margin)),
    }


def _ports() -> Iterator[int]:
    """Ports below those that a system gives to clients, other ones for each process of tests, round and round."""
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + process % 4 * 2_500
    begin = random.SystemRandom().randrange(2_500)  # two runs on one machine
    return (first + (begin + step) % 2_500 for step in itertools.count())


_PORTS: Final = _ports()


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on, nor on the one 10,000 above it, the bus of a cluster.

    One that the system picks may be somebody else's before a server has started that listens on it.
    """
    return next(port for port in _PORTS if _is_free(port) and _is_free(port + 10_000))


def _is_free(port: int) -> bool:
    with socket.socket() as found:
        try:
            found.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class RedisServer:
    """The system's redis-server on a TCP port of the loopback, which can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not installed")
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.directory)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Return once `condition` holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def own_redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that only this test uses, and may kill."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def embedded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.EmbeddedServer]:
    server = embedded.start(tmp_path_factory.mktemp("valkey"))
    yield server
    server.close()


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.redis), "valkey"])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of a real feature cache: the system's Redis, then the embedded Valkey."""
    name = {"redis": "redis_server", "valkey": "embedded_server"}[request.param]
    url: str = request.getfixturevalue(name).url
    return url


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifacts directory with the model `shop`. Tests that change it copy it first."""
    directory = tmp_path_factory.mktemp("artifacts")
    _write_bundle(directory)
    return directory


MakeSettings = Callable[..., Settings]


@pytest.fixture
def make_settings(artifacts: Path) -> MakeSettings:
    """A function that makes settings with a namespace of their own; what it is given goes before."""

    def make(**given: Any) -> Settings:
        usual: dict[str, Any] = {
            "artifacts": artifacts,
            "namespace": f"test-{uuid.uuid4().hex[:12]}",
            "deadline_ms": 2000,
        }
        return Settings(_env_file=None, **{**usual, **given})

    return make


@pytest.fixture
def settings(make_settings: MakeSettings, store_url: str) -> Settings:
    return make_settings(redis_url=store_url)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """The application as shipped, with its lifespan, over each feature cache."""
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


class ServiceProcess:
    """`service.app.serve` in a process of its own, as it is started in production."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"service-{self.port}.log"
        given = {"port": self.port, "deadline_ms": 2000, "shutdown_delay_ms": 0, **settings}
        environment = {f"PROPENSITY_{name.upper()}": str(value) for name, value in given.items()}
        command = "from service.app import serve; from service.settings import Settings; serve(Settings())"
        path = filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", command],
                cwd=directory,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
                stdout=log,
                stderr=log,
            )

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.process.poll() is not None or self.is_ready())
        assert self.process.poll() is None, self.log.read_text()

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


def fill_propensity_database(url: str, namespace: str) -> None:
    """Have a visitor with a score be in an audience, so that a service that starts has something to count."""

    async def fill() -> None:
        store = Store.open(url, namespace=namespace, retention_ms=90 * DAY_MS)
        now_ms = time.time_ns() // 1_000_000
        await Propensities(store).put("shop", "1", ["first"], [0.5], now_ms)
        await Members(store).describe("everybody", "{}", now_ms)
        await Members(store).change("everybody", {"first": now_ms}, [], now_ms, "score")
        await store.close()

    asyncio.run(fill())


StartService = Callable[..., ServiceProcess]


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[StartService]:
    """A function that starts a service with the given settings; what still runs when the test ends is killed."""
    started: list[ServiceProcess] = []

    def start(**settings: object) -> ServiceProcess:
        started.append(ServiceProcess(tmp_path, **settings))
        return started[-1]

    yield start
    for process in started:
        process.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, embedded_server: embedded.EmbeddedServer, artifacts: Path
) -> Iterator[ServiceProcess]:
    """A running service over the embedded feature cache."""
    directory = tmp_path_factory.mktemp("service")
    fill_propensity_database(embedded_server.url, "service")
    process = ServiceProcess(directory, redis_url=embedded_server.url, artifacts=artifacts, namespace="service")
    process.wait_until_ready()
    yield process
    process.end()


class Shop(NamedTuple):
    """A small shop that is open now: its events, the spec, and the model trained on it."""

    events: Path
    spec: Path
    artifacts: Path
    model: Path

    @property
    def files(self) -> list[str]:
        """What to give to whatever reads event files."""
        return [str(self.events)]


SMALL_SHOP = """
model: purchase_5d
events:
  view:     {code: 1, event: Product Viewed,  value: price, attribute: category}
  cart:     {code: 2, event: Product Added,   value: price, attribute: category}
  purchase: {code: 3, event: Order Completed, value: revenue}
label: {event: purchase, horizon: 5d}
rows: {per_visitor: 5}
fit: {learning_rate: 0.3, num_leaves: 5}
features:
  views_1d:   {count: view, window: 1d}
  views:      {count: view}
  carts_7d:   {count: cart, window: 7d}
  spent:      {sum: purchase}
  mean_7d:    {mean: view, window: 7d}
  categories: {distinct: view, window: 7d}
  since_view: {recency: view}
  interest:   {decay: view, half_life: 1d}
  session:    {session: duration}
  cart_rate:  {ratio: [carts_7d, views], prior: [1, 20]}
  device:     {trait: device, categories: [mobile, desktop, tablet]}
  referrer:   {request: referrer, categories: [direct, search, email, ads]}
"""

SMALL_SHOP_END = datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def open_shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Simulated and trained once; tests only read it.

    Simulated as of one moment and moved in time until its events end now: what is drawn and what is learned depend
    on the moment, and some shops of this size have a model that tells few visitors apart.
    """
    from training import simulate, train

    directory = tmp_path_factory.mktemp("open-shop")
    events_path, spec_path = directory / "events.parquet", directory / "spec.yaml"
    spec_path.write_text(SMALL_SHOP, encoding="utf-8")
    simulated = directory / "simulated.parquet"
    simulate.simulate(simulate.Shop(visitors=2000, days=30, seed=2, end=SMALL_SHOP_END), simulated)
    options = train.Options(artifacts=directory / "artifacts", seed=7, threads=1)
    trained = train.from_events([str(simulated)], spec_path, options)
    _moved(simulated, datetime.now(UTC).replace(microsecond=0) - SMALL_SHOP_END, events_path)
    return Shop(events_path, spec_path, options.artifacts, trained.bundle.path)


def _moved(events: Path, by: timedelta, out: Path) -> None:
    """Write the same events, each later by `by`."""
    table = pq.read_table(events)
    moments = table["timestamp"]
    later = pc.add(moments, pa.scalar(by, pa.duration(moments.type.unit)))
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", later), out)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL of the tests' own; skipped where the system has none."""
    from tests.audiences.postgres import postgres

    with postgres() as url:
        yield url


@pytest.fixture
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty ledger: SQLite, or with the mark `postgres.both` each kind."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    from tests.audiences.postgres import emptied

    return emptied(request.getfixturevalue("postgres_url"))


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """An empty ledger."""
    from audiences import ledger as ledgers

    with ledgers.opened(ledger_url) as opened:
        yield opened
