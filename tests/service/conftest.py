"""Several servers that keep the feature cache together: a cluster, and a master with a replica and Sentinels."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from service.store import Store
from tests.conftest import DAY_MS, free_port, wait_until

SLOTS = 16384


class RedisProcess:
    """The system's redis-server with options of its own, on a port that leaves room for the bus of a cluster."""

    def __init__(self, directory: Path, *options: str, password: str | None = None) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not installed")
        self.port = free_port()
        self._password = password
        self._command = [binary, *options, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            return bool(self.run("PING"))
        except redis.ConnectionError:
            return False

    def run(self, *words: str | int) -> Any:
        """The server's reply to a command."""
        with redis.Redis(port=self.port, password=self._password, protocol=2, socket_timeout=5) as client:
            return client.execute_command(*words)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


class Cluster:
    """Three servers of a Redis Cluster, without replicas; it serves the slots whose server lives."""

    def __init__(self, directory: Path, timeout_ms: int = 2000) -> None:
        self.directory, self._timeout_ms = directory, timeout_ms
        self.nodes: list[RedisProcess] = []
        for place in range(3):
            self.add_node()
            first, end = place * SLOTS // 3, (place + 1) * SLOTS // 3
            self.nodes[place].run("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        self.meet(self.nodes)
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def add_node(self) -> RedisProcess:
        """Start a server without slots."""
        options = ["--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{len(self.nodes)}.conf"]
        options += [
            "--cluster-node-timeout",
            str(self._timeout_ms),
            "--cluster-require-full-coverage",
            "no",
            "--save",
            "",
        ]
        self.nodes.append(RedisProcess(self.directory, *options))
        return self.nodes[-1]

    def meet(self, nodes: Sequence[RedisProcess]) -> None:
        """Make servers known to each other, and wait until they agree on who has which slot."""
        for node, other in itertools.combinations(nodes, 2):
            node.run("CLUSTER", "MEET", "127.0.0.1", other.port)
        wait_until(lambda: all(self._is_whole(node) for node in nodes))

    def _is_whole(self, node: RedisProcess) -> bool:
        if b"cluster_state:ok" not in node.run("CLUSTER", "INFO"):
            return False
        return bool(sum(last - first + 1 for first, last, *_ in node.run("CLUSTER", "SLOTS")) == SLOTS)

    def owner_of(self, key: str) -> RedisProcess:
        """The server that has a key."""
        slot = self.nodes[0].run("CLUSTER", "KEYSLOT", key)
        ranges = self.nodes[0].run("CLUSTER", "SLOTS")
        (port,) = [port for first, last, (_, port, *_), *_ in ranges if first <= slot <= last]
        return next(node for node in self.nodes if node.port == port)

    def is_whole(self) -> bool:
        """Whether every server serves its slots, which one that was started again does only after two seconds."""
        return all(self._is_whole(node) for node in self.nodes)

    def mend(self) -> None:
        """Start the servers that were killed, and empty all."""
        for node in self.nodes:
            if node.process is None:
                node.start()
        wait_until(self.is_whole)
        for node in self.nodes:
            node.run("FLUSHALL")

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that no test changes."""
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.kill()


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.redis), "valkey", "cluster"])
def every_store_url(request: pytest.FixtureRequest) -> str:
    """The URL of a real feature cache: the system's Redis, the embedded Valkey, three servers of a Redis Cluster."""
    name = {"redis": "redis_server", "valkey": "embedded_server", "cluster": "cluster"}[request.param]
    url: str = request.getfixturevalue(name).url
    return url


@pytest.fixture
def direct(every_store_url: str) -> Iterator[redis.Redis]:
    """Another client of the same servers, to see and to spoil what is stored."""
    client = redis.Redis.from_url(every_store_url.replace("redis+cluster", "redis").partition(",")[0], protocol=2)
    if every_store_url.startswith("redis+cluster"):
        given = client.connection_pool.connection_kwargs
        client = cast(redis.Redis, redis.RedisCluster(host=given["host"], port=given["port"], protocol=2))
    yield client
    client.close()


@pytest.fixture(scope="module")
def module_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.kill()


@pytest.fixture
def broken_cluster(module_cluster: Cluster) -> Cluster:
    """A cluster whose servers the test may kill and whose slots it may move; empty."""
    module_cluster.mend()
    return module_cluster


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that only this test uses, and that soon sees when a server is gone."""
    started = Cluster(tmp_path, timeout_ms=1000)
    yield started
    started.kill()


class Watched:
    """A master, its replica, and a Sentinel that puts the one in the other's place half a second after it is gone."""

    def __init__(self, directory: Path, password: str | None = None) -> None:
        guarded = ["--requirepass", password, "--masterauth", password] if password else []
        plain = ["--save", "", "--repl-diskless-sync-delay", "0", *guarded]
        self.master = RedisProcess(directory, *plain, password=password)
        following = ["--replicaof", "127.0.0.1", str(self.master.port)]
        self.replica = RedisProcess(directory, *plain, *following, password=password)
        config = directory / "sentinel.conf"
        lines = [
            f"sentinel monitor shop 127.0.0.1 {self.master.port} 1",
            "sentinel down-after-milliseconds shop 500",
            "sentinel failover-timeout shop 3000",
            *([f"sentinel auth-pass shop {password}", f"requirepass {password}"] if password else []),
        ]
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.sentinel = RedisProcess(directory, str(config), "--sentinel", password=password)
        self.master.run("SET", "replicated", "yes", "PX", 60_000)
        wait_until(lambda: self.replica.run("EXISTS", "replicated") == 1)
        wait_until(lambda: len(self.sentinel.run("SENTINEL", "REPLICAS", "shop")) == 1)
        login = f":{password}@" if password else ""
        self.url = f"redis+sentinel://{login}127.0.0.1:{self.sentinel.port}/shop/0"

    def fail_over(self) -> None:
        """Have the Sentinel change the roles of two healthy servers, once it has seen enough of the replica."""
        wait_until(self._is_failing_over)

    def _is_failing_over(self) -> bool:
        try:
            return bool(self.sentinel.run("SENTINEL", "FAILOVER", "shop"))
        except redis.ResponseError:
            return False

    def kill(self) -> None:
        for process in (self.sentinel, self.replica, self.master):
            process.kill()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """A master with a replica and a Sentinel, which only this test uses."""
    started = Watched(tmp_path)
    yield started
    started.kill()


@pytest.fixture
async def store(every_store_url: str, direct: redis.Redis) -> AsyncIterator[Store]:
    """A feature cache, in which every key has an end when the test is over."""
    opened = Store.open(every_store_url, namespace=f"store-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    yield opened
    await opened.close()
    assert [key for key in direct.scan_iter(f"{opened.namespace}:*") if direct.pttl(key) < 89 * DAY_MS] == []
