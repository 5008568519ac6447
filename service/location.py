"""Where the feature cache is: what its URL says. Pure; `service.store` connects."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from service.core.errors import PropensityError

Address = tuple[str, int]

FORMS: Final = (
    "write redis://HOST:6379/0, unix:///PATH/TO/SOCKET, redis+sentinel://HOST:26379,HOST:26379/NAME/0 or "
    "redis+cluster://HOST:6379,HOST:6379, with rediss in place of redis for TLS and USER:PASSWORD@ before the hosts"
)


class Kind(StrEnum):
    """Who says which server has a key: nobody, there is one; Sentinels; the servers of a cluster."""

    SERVER = "server"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


_SCHEMES: Final = {
    "redis": (Kind.SERVER, False),
    "rediss": (Kind.SERVER, True),
    "unix": (Kind.SERVER, False),
    "redis+sentinel": (Kind.SENTINEL, False),
    "rediss+sentinel": (Kind.SENTINEL, True),
    "redis+cluster": (Kind.CLUSTER, False),
    "rediss+cluster": (Kind.CLUSTER, True),
}
_PORTS: Final = {Kind.SERVER: 6379, Kind.SENTINEL: 26379, Kind.CLUSTER: 6379}


class Location(NamedTuple):
    """A server, the Sentinels that know its master as `service`, or some servers of a cluster."""

    kind: Kind
    addresses: tuple[Address, ...]  # of servers or Sentinels; none where there is a path
    path: str | None = None  # of a Unix socket
    tls: bool = False
    username: str | None = None
    password: str | None = None
    database: int = 0
    service: str = ""

    def __str__(self) -> str:
        """The URL without user and password, to be shown."""
        if self.path is not None:
            return f"unix://{self.path}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.addresses)
        scheme = ("rediss" if self.tls else "redis") + ("" if self.kind is Kind.SERVER else f"+{self.kind}")
        rest = [self.service] if self.kind is Kind.SENTINEL else []
        return "/".join([f"{scheme}://{hosts}", *rest, *([] if self.kind is Kind.CLUSTER else [str(self.database)])])


def parse(url: str) -> Location:
    """What a URL says. Raises PropensityError, which says what to write and does not repeat the URL."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise PropensityError(FORMS) from None
    if parts.scheme not in _SCHEMES:
        raise PropensityError(FORMS)
    if parts.query or parts.fragment:
        raise PropensityError("leave out what follows ? or #; timeouts and connections are settings of their own")
    kind, tls = _SCHEMES[parts.scheme]
    user, _, hosts = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    known = Location(kind, (), None, tls, unquote(name) or None, unquote(password) or None)
    if parts.scheme == "unix":
        if hosts or len(parts.path) < 2:
            raise PropensityError("write the path of the socket after three slashes: unix:///PATH/TO/SOCKET")
        return known._replace(path=unquote(parts.path))
    known = known._replace(addresses=tuple(_address(host, kind) for host in hosts.split(",")))
    if kind is Kind.SERVER and len(known.addresses) > 1:
        raise PropensityError(f"several hosts are Sentinels or a cluster; {FORMS}")
    return _with_path(known, [unquote(part) for part in parts.path.split("/") if part])


def _address(text: str, kind: Kind) -> Address:
    """Host and port of `host`, `host:port`, `[::1]` or `[::1]:port`."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(_PORTS[kind])
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise PropensityError(f"a port is a number from 1 to 65535; {FORMS}")
    host = host.removeprefix("[").removesuffix("]")
    if not host and kind is not Kind.SERVER:
        raise PropensityError(f"a host is missing; {FORMS}")
    return host or "localhost", int(port)


def _with_path(known: Location, path: list[str]) -> Location:
    """The location with the name and the database that stand behind its hosts."""
    if known.kind is Kind.SENTINEL:
        if not path:
            raise PropensityError(
                "the name of the master is missing; write redis+sentinel://HOST:26379,HOST:26379/NAME/0"
            )
        known, path = known._replace(service=path[0]), path[1:]
    if known.kind is Kind.CLUSTER and path not in ([], ["0"]):
        raise PropensityError("a cluster has the database 0 alone; write redis+cluster://HOST:6379,HOST:6379")
    if len(path) > 1 or not all(part.isascii() and part.isdigit() for part in path):
        raise PropensityError(f"the database, at the end, is a number; {FORMS}")
    return known._replace(database=int(path[0])) if path else known
