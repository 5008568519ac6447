"""TLS to the feature cache: a certificate that the machine trusts is taken, any other is refused."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from service.core import events
from service.errors import StoreError
from service.history import History, unfold
from service.store import Store
from service.visitors import Visitors
from tests.conftest import StartService, free_port
from tests.service.conftest import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

NOW_MS = 1_767_225_600_000
DAY_MS = 86_400_000
KNOWN = History(events.pack(NOW_MS, 1, 7, 7, 2.5))


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1 that signed itself, in PEM, and its key beside it."""
    binary = shutil.which("openssl")
    if binary is None:
        pytest.skip("openssl is not installed")
    command = [binary, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=cache"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "cert.pem"


@pytest.fixture
def url(certificate: Path) -> Iterator[str]:
    """The URL of a server that also takes TLS."""
    port, key = free_port(), certificate.with_name("key.pem")
    options = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    server = RedisProcess(certificate.parent, *options, "--tls-auth-clients", "no", "--save", "")
    yield f"rediss://127.0.0.1:{port}/0"
    server.kill()


async def test_a_certificate_that_is_trusted_is_taken(
    url: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    store = Store.open(url, namespace="p", retention_ms=DAY_MS)
    assert await Visitors(store).append({"a": KNOWN}, NOW_MS) == {}
    assert await store.read(["a"]) == [KNOWN]
    assert unfold(*await store.ask(["a"])) == KNOWN
    await store.close()


async def test_any_other_certificate_is_refused(url: str) -> None:
    store = Store.open(url, namespace="p", retention_ms=DAY_MS)
    with pytest.raises(StoreError) as caught:
        await store.read(["a"])
    assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value.__cause__)
    with pytest.raises(StoreError):
        await store.ask(["a"])
    await store.close()


async def test_a_certificate_of_another_host_is_refused(
    url: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    store = Store.open(url.replace("127.0.0.1", "localhost"), namespace="p", retention_ms=DAY_MS)
    with pytest.raises(StoreError) as caught:
        await store.read(["a"])
    assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value.__cause__)
    with pytest.raises(StoreError):
        await store.ask(["a"])
    await store.close()


def test_the_service_runs_over_tls(
    url: str, certificate: Path, start_service: StartService, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    service = start_service(redis_url=url, artifacts=artifacts, namespace="p")
    service.wait_until_ready()
    event = {"event": "Product Viewed", "userId": "anna", "messageId": "1"}
    assert httpx2.post(f"{service.url}/v1/events", json=event).status_code == 200
    told = httpx2.post(f"{service.url}/v1/score", json={"visitor_id": "anna"}).json()
    assert (told["events"], told["degraded"]) == (1, [])
