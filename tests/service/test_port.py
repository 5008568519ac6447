"""The port: had by one service, shared by its workers, and given up without a reset connection."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from service import port
from service.core.errors import PropensityError
from tests.conftest import free_port

linux = pytest.mark.skipif(not port.IS_SPREAD, reason="the kernel spreads connections on Linux only")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_is_free_until_somebody_listens(stack: ExitStack, host: str) -> None:
    number = free_port()
    port.require_free(host, number)
    stack.enter_context(port.bind(host, number)).listen()
    with pytest.raises(PropensityError, match=f"port {number} of {host}: Address already in use; choose another"):
        port.require_free(host, number)


def test_an_address_of_another_machine_is_named(stack: ExitStack) -> None:
    with pytest.raises(PropensityError, match="port 80 of 192.0.2.1: Cannot assign requested address"):
        port.require_free("192.0.2.1", 80)


@linux
def test_a_port_that_workers_share_is_not_free_for_others(stack: ExitStack) -> None:
    number = free_port()
    for _ in range(2):
        stack.enter_context(port.bind("127.0.0.1", number, shared=True)).listen()
    with pytest.raises(PropensityError, match="already in use"):
        port.require_free("127.0.0.1", number)


@linux
def test_of_two_services_that_start_at_once_one_has_the_port(stack: ExitStack) -> None:
    number = free_port()
    with port.claim("127.0.0.1", number):
        stack.enter_context(port.claim("127.0.0.1", number + 1))
        stack.enter_context(port.claim("127.0.0.2", number))
        with pytest.raises(PropensityError, match=f"port {number} of 127.0.0.1: Address already in use"):
            port.claim("127.0.0.1", number)
    stack.enter_context(port.claim("127.0.0.1", number))


@linux
def test_a_listener_that_refuses_handshakes_still_has_the_connections_that_were_made(stack: ExitStack) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    early = stack.enter_context(socket.create_connection(listener.getsockname()))
    port.refuse_handshakes(listener.fileno())
    late = stack.enter_context(socket.socket())
    late.settimeout(0.2)
    with pytest.raises(TimeoutError):
        late.connect(listener.getsockname())
    early.sendall(b"request")
    accepted = stack.enter_context(listener.accept()[0])
    assert accepted.recv(16) == b"request"
    accepted.sendall(b"answer")
    assert early.recv(16) == b"answer"
