"""The TCP port of the service: whether it can be had, and the sockets that are bound to it."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import struct
import sys
from typing import Final

from service.core.errors import PropensityError

logger = logging.getLogger(__name__)

# Whether several sockets can be bound to one port such that the kernel spreads connections over them.
IS_SPREAD: Final = sys.platform == "linux"

_SO_ATTACH_FILTER: Final = 26
# A classic BPF program over a TCP header: take the flags; if SYN is not among them take the packet, else drop it.
_DROP_SYN: Final = struct.pack("=" + "HBBI" * 4, 0x30, 0, 0, 13, 0x45, 0, 1, 2, 0x06, 0, 0, 0, 0x06, 0, 0, 0x40000)


def require_free(host: str, port: int) -> None:
    """Raise PropensityError if the port cannot be had for oneself."""
    with bind(host, port) as bound:
        try:
            bound.listen()
        except OSError as error:
            raise _unavailable(host, port, error) from None


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that is bound and does not listen yet; `shared` with others of this user. Raises PropensityError."""
    is_ipv6 = ":" in host
    bound = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET)
    try:
        if is_ipv6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _unavailable(host, port, error) from None
    return bound


def claim(host: str, port: int) -> socket.socket:
    """Keep the port from other services that would share it, as long as the result is open. Raises PropensityError.

    Whoever starts two services at once would have them share the port without a word: that it is free is seen before
    the other one listens. Names of abstract sockets are as private to a network namespace as ports are.
    """
    claimed = socket.socket(socket.AF_UNIX)
    try:
        claimed.bind(f"\0propensity {host} {port}")
    except OSError as error:
        claimed.close()
        raise _unavailable(host, port, error) from None
    return claimed


def refuse_handshakes(listener: int) -> bool:
    """Let the socket of this descriptor finish the handshakes under way and begin no other; whether the kernel can.

    Closing it resets what the kernel has taken and nobody accepted yet, the requests of clients that were told they
    are connected. One whose first packet is dropped sends it again after a second, and then is refused or gets to
    somebody else.
    """
    if sys.platform != "linux":
        return False
    program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    with socket.socket(fileno=os.dup(listener)) as same:
        try:
            same.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 4, ctypes.addressof(program)))
        except OSError as error:
            logger.warning("connections that come at the last moment may be reset: %s", error)
            return False
    return True


def _unavailable(host: str, port: int, error: OSError) -> PropensityError:
    reason = (error.strerror or "").partition(" (")[0]
    return PropensityError(f"port {port} of {host}: {reason}; choose another with --port")
