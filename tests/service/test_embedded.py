"""The embedded server: shared, durable, and gone when nobody needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import redis

from service import embedded
from service.core.errors import PropensityError
from service.embedded import EmbeddedServer
from tests.conftest import wait_until

ROOT = Path(__file__).parents[2]
USE_IT = """
import sys, time
from pathlib import Path
from service import embedded
server = embedded.start(Path(sys.argv[1]))
print(server.url, flush=True)
sys.stdin.read()
server.close()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    started = embedded.start(tmp_path / "data")
    yield started
    started.close()


def connect(server: EmbeddedServer) -> redis.Redis:
    return redis.Redis.from_url(server.url, protocol=2)


def address_of(url: str) -> Path:
    return Path(unquote(url.removeprefix("unix://")))


def answers(url: str) -> bool:
    return embedded._ask(address_of(url), b"PING").startswith(b"+PONG")


def user_of(directory: Path) -> tuple[subprocess.Popen[str], str]:
    """Another process that uses the server of `directory`, and the URL it was given."""
    process = subprocess.Popen(
        [sys.executable, "-c", USE_IT, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str], how: signal.Signals | None = None) -> None:
    """End a process by its closed input, or by a signal."""
    if how is not None:
        process.send_signal(how)
    process.communicate(timeout=30)


def test_it_listens_on_a_private_socket_and_on_no_port(server: EmbeddedServer) -> None:
    with connect(server) as client:
        assert client.config_get("port") == {"port": "0"}
    assert address_of(server.url).stat().st_mode & 0o077 == 0


def test_data_is_there_after_an_orderly_end(tmp_path: Path) -> None:
    for expected in (None, b"kept"):
        server = embedded.start(tmp_path)
        with connect(server) as client:
            assert client.get("key") == expected
            client.set("key", "kept")
        server.close()
        assert not answers(server.url)


def pids_of(server: EmbeddedServer) -> tuple[int, int]:
    """The server and its keeper."""
    with connect(server) as client:
        pid: int = client.info("server")["process_id"]
    return pid, int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.alone
@pytest.mark.parametrize("whom", ["server", "server and keeper"])
def test_a_killed_server_is_there_again_within_two_seconds_with_its_data(server: EmbeddedServer, whom: str) -> None:
    with connect(server) as client:
        client.set("key", "kept")
    pid, keeper = pids_of(server)
    for victim in (pid, keeper) if "keeper" in whom else (pid,):
        os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    wait_until(lambda: answers(server.url), 2)
    with connect(server) as client:
        assert client.get("key") == b"kept"
    assert pids_of(server)[0] != pid


@pytest.mark.alone
def test_of_two_users_one_starts_it_again(server: EmbeddedServer) -> None:
    other, _ = user_of(address_of(server.url).parent)
    os.kill(pids_of(server)[0], signal.SIGKILL)
    wait_until(lambda: answers(server.url), 2)
    pid = pids_of(server)[0]
    time.sleep(0.6)  # both have looked
    assert pids_of(server)[0] == pid
    end(other)
    assert answers(server.url)


def test_a_server_that_cannot_be_started_again_is_told_and_tried_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = embedded.start(tmp_path)
    (manifest,) = (tmp_path / "appendonlydir").glob("*.manifest")
    whole = manifest.read_text()
    manifest.write_text("rubbish\n")
    os.kill(pids_of(server)[0], signal.SIGKILL)
    wait_until(lambda: "cannot be started again: the embedded server ended at once" in caplog.text)
    manifest.write_text(whole)
    wait_until(lambda: answers(server.url))
    server.close()


def test_its_last_user_ends_it_also_when_its_keeper_was_killed(tmp_path: Path) -> None:
    server = embedded.start(tmp_path)
    os.kill(pids_of(server)[1], signal.SIGKILL)
    assert answers(server.url)
    server.close()
    assert not answers(server.url)


def test_two_users_in_one_process_share_it_until_the_last_has_ended(tmp_path: Path) -> None:
    first, second = embedded.start(tmp_path), embedded.start(tmp_path)
    assert first.url == second.url
    second.close()
    assert answers(first.url)
    first.close()
    assert not answers(first.url)


def test_another_process_shares_it_and_it_outlives_its_starter(tmp_path: Path) -> None:
    starter, url = user_of(tmp_path)
    server = embedded.start(tmp_path)
    assert server.url == url
    end(starter)
    assert answers(url)
    server.close()
    wait_until(lambda: not answers(url))


@pytest.mark.parametrize("how", [None, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_only_user_however_that_ends(tmp_path: Path, how: signal.Signals | None) -> None:
    process, url = user_of(tmp_path)
    assert answers(url)
    end(process, how)
    wait_until(lambda: not answers(url))


def test_there_are_never_two_servers_on_the_same_data(server: EmbeddedServer) -> None:
    with connect(server) as client:
        process_id = client.info("server")["process_id"]
    os.kill(process_id, signal.SIGSTOP)
    try:
        with pytest.raises(PropensityError, match="already runs on the data"):
            embedded.start(address_of(server.url).parent)
    finally:
        os.kill(process_id, signal.SIGCONT)
    assert answers(server.url)


@pytest.mark.parametrize("name", ["x" * 150, "with space", "ünïcode", 'quote"quote'])
def test_the_name_of_the_directory_may_be_long_and_odd(tmp_path: Path, name: str) -> None:
    server = embedded.start(tmp_path / name)
    with connect(server) as client:
        assert client.ping()
    server.close()
    assert (tmp_path / name / "appendonlydir").is_dir()


def test_a_directory_that_cannot_be_written_is_named_with_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PropensityError, match="PROPENSITY_DATA_DIR"):
        embedded.start(tmp_path / "file")


def test_damaged_data_is_told_with_the_last_line_of_the_log(tmp_path: Path) -> None:
    server = embedded.start(tmp_path)
    server.close()
    (manifest,) = (tmp_path / "appendonlydir").glob("*.manifest")
    manifest.write_text("rubbish\n")
    with pytest.raises(PropensityError, match="manifest"):
        embedded.start(tmp_path)


def test_a_machine_without_the_server_is_told_to_run_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PropensityError, match="PROPENSITY_REDIS_URL"):
        embedded.start(tmp_path)
