"""Owns what stand-ins for Google's APIs have in common: gRPC over TLS on loopback, OAuth, faults, and who is on lists.

A broken rule is answered as Google does and written down in `broken`; the fixture that starts a stand-in fails the test
that left anything there. A fault is what Google may do of itself.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from google.auth import jwt
from pydantic import SecretStr

Identifier = tuple[str, str]  # the API's field of it, and the hash
Trailing = list[tuple[str, str | bytes]]


class Wrong(Exception):
    """What is answered in the place of a result. A subclass knows how its API puts it into the trailing metadata."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    def trailing(self, request_id: str) -> Trailing:
        """The details."""
        return []


@dataclass
class Fault:
    """What the next request to a method gets."""

    method: str
    code: grpc.StatusCode
    kind: str | None = None  # of errors of Google Ads
    name: str = ""  # none: an error of the network, without words of the API
    delay_s: float = 0
    after: bool = False  # the request is carried out, and its answer lost
    sleep_s: float = 0


class Certificate(NamedTuple):
    """One authority and one server, made for this process."""

    authority: bytes
    chain: bytes
    key: bytes


@cache
def certificate() -> Certificate:
    """A certificate for localhost, and its authority: one a process, since gRPC reads authorities once a process."""
    now = dt.datetime.now(dt.UTC)

    def signed(
        subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, by: ec.EllipticCurvePrivateKey, authority: bool
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(by, hashes.SHA256())

    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = signed("stub authority", root, "stub authority", root, True)
    chain = signed("localhost", leaf, "stub authority", root, False)
    pem = serialization.Encoding.PEM
    return Certificate(
        authority.public_bytes(pem),
        chain.public_bytes(pem),
        leaf.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


class GoogleApi:
    """One account. Everything that a test may look at or set is an attribute."""

    package: str  # of the services
    client: str  # how the official client calls itself

    def __init__(self) -> None:
        self.customer_id = "1234567890"
        self.login_customer_id = "9876543210"
        self.client_id = "client-" + secrets.token_hex(4)
        self.client_secret = "secret-" + secrets.token_hex(8)
        self.refresh_token = "refresh-" + secrets.token_hex(8)
        self.tokens_s: dict[str, float] = {}  # given, and until when they hold
        self.scopes: dict[str, str] = {}  # of tokens
        self.service_account: bytes | None = None  # its public key
        self.token_life_s = 3600.0
        self.broken: list[str] = []
        self.faults: deque[Fault] = deque()
        self.calls: list[str] = []
        self.asked_s: defaultdict[str, deque[float]] = defaultdict(deque)  # by quota
        self.requests_a_minute: int | None = 300
        self.members: dict[str, set[Identifier]] = {}
        self.day = 0.0  # of the account's clock
        self.added: dict[tuple[str, Identifier], float] = {}  # the day on which somebody was added last
        self.before: dict[str, Callable[[], Any]] = {}  # what happens once, right before a method is answered
        self.hold = False  # what is worked off later stays under way until `finish`
        self.page = 2  # lists in an answer
        self.endpoint = ""
        self.token_url = ""
        self._lock = threading.RLock()

    # --- what tests do ---

    @property
    def options(self) -> dict[str, Any]:
        """How a destination reaches it."""
        return {
            "customer_id": self.customer_id,
            "login_customer_id": self.login_customer_id,
            "client_id": self.client_id,
            "client_secret": SecretStr(self.client_secret),
            "refresh_token": SecretStr(self.refresh_token),
            "endpoint": self.endpoint,
            "token_url": self.token_url,
        }

    def write_key(self, path: Path) -> None:
        """Write the key of a service account, as Google gives it."""
        key = rsa.generate_private_key(65537, 2048)
        pem = serialization.Encoding.PEM
        self.service_account = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        given = {"type": "service_account", "client_email": "ours@example.com", "token_uri": self.token_url}
        path.write_text(json.dumps(given | {"private_key_id": "1", "private_key": secret.decode()}))

    def names(self) -> Mapping[str, str]:
        """How `members` knows lists, by their names."""
        raise NotImplementedError

    def list_named(self, name: str) -> str:
        """The same of a list that is there."""
        return self.names()[name]

    def held(self, name: str) -> set[Identifier]:
        """Who is on a list, nobody where it is not there yet."""
        return self.members[self.list_named(name)] if name in self.names() else set()

    def pass_days(self, days: float) -> None:
        """Let time pass: who was not added again stays no longer than the list says."""
        with self._lock:
            self.day += days
            for name, held in self.members.items():
                held -= {one for one in held if self.day - self.added[name, one] >= self.stay_days(name)}

    def stay_days(self, name: str) -> float:
        """How long a member of a list stays after being added last."""
        raise NotImplementedError

    def change(self, list_id: str, removing: bool, people: Sequence[Sequence[Identifier]]) -> None:
        """Add or remove the identifiers of people."""
        held = self.members[list_id]
        for identifiers in people:
            (held.difference_update if removing else held.update)(identifiers)
            self.added.update({(list_id, one): self.day for one in identifiers})

    # --- rules ---

    def admit(self, method: str, context: grpc.ServicerContext) -> None:
        """Raise Wrong where the request's metadata breaks a rule."""
        metadata = dict(context.invocation_metadata())
        if self.client not in str(metadata.get("x-goog-api-client", "")):
            self.broken.append(f"{method}: not asked by the official client")
        left_s = context.time_remaining()
        if left_s is None or left_s > 3600:
            self.broken.append(f"{method}: asked without a deadline")

    def token_of(self, context: grpc.ServicerContext) -> str | None:
        """The access token of a request, if it holds."""
        metadata = dict(context.invocation_metadata())
        token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        if self.service_account and token not in self.tokens_s:
            self._signed(token)
        return token if self.tokens_s.get(token, 0) >= time.monotonic() else None

    def _signed(self, token: str) -> None:
        """Take what the service account signed, which Google takes in the place of a token. Raises ValueError."""
        claims = jwt.decode(token, certs=self.service_account)
        self.tokens_s[token] = time.monotonic() + self.token_life_s
        self.scopes[token] = claims["scope"]

    def is_too_many(self, method: str, quota: str = "") -> bool:
        """Whether this request is one more than a quota has in a minute."""
        now_s = time.monotonic()
        asked_s = self.asked_s[quota]
        asked_s.append(now_s)
        while asked_s[0] < now_s - 60:
            asked_s.popleft()
        if self.requests_a_minute and len(asked_s) > self.requests_a_minute:
            self.broken.append(f"{method}: {len(asked_s)} requests in a minute")
            return True
        return False

    # --- serving ---

    def methods(self) -> Mapping[str, Mapping[str, tuple[Callable[[Any], Any], type[Any]]]]:
        """By service and name: what answers, and the message that it takes."""
        raise NotImplementedError

    def wrong_of(self, fault: Fault) -> Wrong:
        """The error that a fault is."""
        raise NotImplementedError

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """The services, for gRPC."""
        return [
            grpc.method_handlers_generic_handler(
                f"{self.package}.{service}",
                {name: self._handler(name, answer, kind) for name, (answer, kind) in named.items()},
            )
            for service, named in self.methods().items()
        ]

    def _handler(self, method: str, answer: Callable[[Any], Any], kind: type[Any]) -> grpc.RpcMethodHandler:
        def refuse(context: grpc.ServicerContext, wrong: Wrong) -> None:
            request_id = f"request-{len(self.calls)}"
            context.set_trailing_metadata((("request-id", request_id), *wrong.trailing(request_id)))
            context.abort(wrong.code, str(wrong))

        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            with self._lock:
                self.calls.append(method)
                fault = self.faults[0] if self.faults and self.faults[0].method == method else None
                if fault:
                    self.faults.popleft()
                try:
                    self.admit(method, context)
                    self.before.pop(method, lambda: None)()
                    response = None if fault and not fault.after else answer(request)
                except Wrong as wrong:
                    refuse(context, wrong)
                except Exception as error:  # a bug of the stub must not look like one of Google's errors
                    self.broken.append(f"{method}: the stub failed: {error!r}")
                    raise
            if fault:
                time.sleep(fault.sleep_s)
                if fault.code != grpc.StatusCode.OK:
                    refuse(context, self.wrong_of(fault))
                response = response if response is not None else answer(request)
            return response

        def serialize(message: Any) -> bytes:
            return bytes(
                type(message).serialize(message) if hasattr(type(message), "pb") else message.SerializeToString()
            )

        return grpc.unary_unary_rpc_method_handler(handle, kind.deserialize, serialize)

    def token(self, form: Mapping[str, list[str]]) -> tuple[int, dict[str, Any]]:
        """What OAuth's address for tokens answers."""
        if form.get("grant_type") == ["urn:ietf:params:oauth:grant-type:jwt-bearer"] and self.service_account:
            self._signed(form["assertion"][0])
            return self._new_token(self.scopes[form["assertion"][0]])
        wanted = {
            "grant_type": "refresh_token",
            "client_id": self.client_id,
            "client_secret": self.client_secret,
            "refresh_token": self.refresh_token,
        }
        wrong = [name for name, value in wanted.items() if form.get(name) != [value]]
        if wrong:
            return 400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
        return self._new_token(" ".join(form.get("scope", ())))

    def _new_token(self, scope: str) -> tuple[int, dict[str, Any]]:
        token = "access-" + secrets.token_hex(8)
        self.tokens_s[token] = time.monotonic() + self.token_life_s
        self.scopes[token] = scope
        return 200, {"access_token": token, "expires_in": int(self.token_life_s), "token_type": "Bearer"}

    @contextmanager
    def serving(self) -> Iterator[Self]:
        """Serve on two ports of loopback: the API by gRPC over TLS, and OAuth by HTTP."""
        stub = self

        class Tokens(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802  the name that http.server looks for
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                status, answer = stub.token(parse_qs(body))
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        made = certificate()
        pool = ThreadPoolExecutor(4)
        server = grpc.server(pool, options=[("grpc.max_receive_message_length", 64 * 1024 * 1024)])
        server.add_generic_rpc_handlers(self.handlers())
        credentials = grpc.ssl_server_credentials([(made.key, made.chain)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        tokens = ThreadingHTTPServer(("127.0.0.1", 0), Tokens)
        thread = threading.Thread(target=tokens.serve_forever, args=(0.02,), daemon=True)
        self.endpoint = f"localhost:{port}"
        self.token_url = f"http://127.0.0.1:{tokens.server_address[1]}/token"
        server.start()
        thread.start()
        try:
            yield self
        finally:
            server.stop(0).wait()
            pool.shutdown()
            tokens.shutdown()
            tokens.server_close()
            thread.join()


def write_authority(directory: Path) -> Path:
    """The authority as a file: the clients have no argument for it, but their gRPC reads one the environment names."""
    path = directory / "authority.pem"
    path.write_bytes(certificate().authority)
    return path
