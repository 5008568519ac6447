"""Owns a strict stand-in for Meta's Graph API: the edges of custom audiences over HTTP on loopback.

It holds audiences and their entries. It answers a broken rule as Meta does and writes it down in `broken`; the fixture
that starts it fails the test that left anything there. A fault is what Meta may do of itself.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl, urlsplit

VERSION: Final = "v26.0"
MEMBERS: Final = 10_000
LONGEST_URL: Final = 20_000  # a longer one is closed without an answer: issue 717 of the SDK, 300 hashes
HASHED: Final = {"EMAIL", "PHONE", "EXTERN_ID"}  # the first two must be, and the third is by our own rule
SOURCES: Final = {"USER_PROVIDED_ONLY", "PARTNER_PROVIDED_ONLY", "BOTH_USER_AND_PARTNER_PROVIDED"}
FIELDS: Final = {"id", "name", "subtype", "operation_status", "description", "customer_file_source", "account_id"}
INVALID: Final = 100

Entry = frozenset[tuple[str, str]]  # key and hash, of one row


class Wrong(Exception):
    """What is answered in the place of a result."""

    def __init__(self, status: int, code: int, message: str, **further: Any) -> None:
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": "OAuthException", "code": code, "fbtrace_id": "trace1"}
        self.body = {"error": error | further}


@dataclass
class Fault:
    """What the next request to an edge gets."""

    edge: str  # as `POST users`
    status: int = 200
    body: Any = None  # JSON, or text as it is
    headers: Mapping[str, str] = field(default_factory=dict)
    after: bool = False  # the request is carried out, and its answer lost
    sleep_s: float = 0
    close: bool = False


def throttled(code: int, minutes: int | None = None, **further: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Body and headers of an answer to one who asked too often."""
    error = {"message": "There have been too many calls", "type": "OAuthException", "code": code, "is_transient": False}
    case = {"type": "custom_audience", "call_count": 100, "total_cputime": 25, "total_time": 25}
    usage = {"42": [case | {"estimated_time_to_regain_access": minutes}]}
    headers = {"X-Business-Use-Case-Usage": json.dumps(usage)} if minutes is not None else {}
    return {"error": error | further}, headers


class MetaStub:
    """One ad account. Everything that a test may look at or set is an attribute."""

    def __init__(self) -> None:
        self.account = "1010"
        self.access_token = "token-" + secrets.token_hex(8)
        self.app_secret: str | None = "app-" + secrets.token_hex(8)
        self.broken: list[str] = []
        self.faults: deque[Fault] = deque()
        self.calls: list[str] = []
        self.asked_s: deque[float] = deque()
        self.requests_an_hour: int | None = 5000
        self.page = 2
        self.audiences: dict[str, dict[str, Any]] = {}
        self.members: dict[str, set[Entry]] = {}
        self.sessions: dict[int, list[int]] = {}  # the numbers of its batches, and 0 when it ended
        self.refuse: set[str] = set()  # hashes whose entry is invalid
        self.name_samples = True
        self.endpoint = ""
        self._lock = threading.RLock()

    # --- what tests do ---

    def put(self, name: str, **changes: Any) -> str:
        """An audience that is there already."""
        with self._lock:
            number = str(23_850_000_000 + len(self.audiences))
            status = {"code": 200, "description": "Normal"}
            self.audiences[number] = {"id": number, "name": name, "subtype": "CUSTOM", "operation_status": status}
            self.audiences[number] |= changes
            self.members[number] = set()
            return number

    def named(self, name: str) -> str:
        (found,) = [number for number, one in self.audiences.items() if one["name"] == name]
        return found

    # --- rules ---

    def _break(self, message: str, code: int = INVALID, status: int = 400, **further: Any) -> NoReturn:
        self.broken.append(message)
        raise Wrong(status, code, f"(#{code}) {message}", **further)

    def _admit(self, agent: str, query: Mapping[str, str], path: str) -> list[str]:
        if not agent.startswith("fbbizsdk-python"):
            self._break("not asked by the official SDK")
        if query.get("access_token") != self.access_token:
            self._break("Invalid OAuth access token", 190, 401)
        if self.app_secret is not None:
            proof = hmac.new(self.app_secret.encode(), self.access_token.encode(), hashlib.sha256).hexdigest()
            if query.get("appsecret_proof") != proof:
                self._break("API calls from the server require an appsecret_proof argument")
        version, *parts = path.strip("/").split("/")
        if version != VERSION:
            self._break(f"an address of another version: {version}", 2635)
        now_s = time.monotonic()
        self.asked_s.append(now_s)
        while self.asked_s[0] < now_s - 3600:
            self.asked_s.popleft()
        if self.requests_an_hour and len(self.asked_s) > self.requests_an_hour:
            self._break(f"{len(self.asked_s)} requests in an hour", 80003)
        return parts

    def answer(self, method: str, parts: list[str], params: Mapping[str, str]) -> Any:
        match method, parts:
            case "GET", [account] if account == f"act_{self.account}":
                return self._shown(params)
            case "GET", [account, "customaudiences"] if account == f"act_{self.account}":
                return self._listing(params)
            case "POST", [account, "customaudiences"] if account == f"act_{self.account}":
                return self._make(params)
            case "POST" | "DELETE", [number, "users"]:
                removing = method == "DELETE" or params.get("method", "").lower() == "delete"
                return self._change(number, params, removing=removing)
        return self._break(f"Unsupported {method.lower()} request: {'/'.join(parts)}", INVALID, error_subcode=33)

    def _shown(self, params: Mapping[str, str]) -> Any:
        fields = params.get("fields", "id").split(",")
        known = {"id": f"act_{self.account}", "name": "Our shop", "account_status": 1, "currency": "EUR"}
        if unknown := set(fields) - set(known):
            self._break(f"Tried accessing nonexisting field {sorted(unknown)}")
        return {key: known[key] for key in {"id", *fields}}

    def _listing(self, params: Mapping[str, str]) -> Any:
        fields = params.get("fields", "id").split(",")
        if unknown := set(fields) - FIELDS:
            self._break(f"Tried accessing nonexisting field {sorted(unknown)}")
        if not 1 <= int(params.get("limit", 25)) <= 1000:
            self._break("a limit that is none")
        every = list(self.audiences.values())
        start = int(params.get("after", 0))
        size = min(self.page, int(params.get("limit", 25)))
        shown = [{key: one[key] for key in {"id", *fields} if key in one} for one in every[start : start + size]]
        end = start + len(shown)
        paging: dict[str, Any] = {"cursors": {"before": str(start), "after": str(end)}}
        if end < len(every):
            paging["next"] = f"{self.endpoint}/{VERSION}/act_{self.account}/customaudiences?after={end}"
        return {"data": shown, "paging": paging}

    def _make(self, params: Mapping[str, str]) -> Any:
        if not params.get("name"):
            self._break("an audience without a name")
        if params.get("subtype") != "CUSTOM":
            self._break("an audience of another subtype than CUSTOM")
        if params.get("customer_file_source") not in SOURCES:
            self._break("customer_file_source is required")
        return {"id": self.put(params["name"], customer_file_source=params["customer_file_source"])}

    def _change(self, number: str, params: Mapping[str, str], *, removing: bool) -> Any:
        if number not in self.audiences:
            self._break(f"Object with ID {number!r} does not exist", INVALID, error_subcode=33)
        audience = self.audiences[number]
        if audience["operation_status"]["code"] == 471:
            raise Wrong(400, INVALID, "Invalid parameter", error_subcode=1713230, error_user_msg="Upload Blocked")
        session = self._object(params, "session")
        payload = self._object(params, "payload")
        keys, rows = payload.get("schema"), payload.get("data")
        if not isinstance(keys, list) or not keys or set(keys) - HASHED or len(set(keys)) != len(keys):
            self._break(f"a schema that is none: {keys}")
        if payload.get("is_raw") is not True:
            self._break("is_raw is to be true for several keys")
        if not isinstance(rows, list) or not rows:
            self._break("a payload without data")
        if len(rows) > MEMBERS:
            self._break(f"{len(rows)} users in a request, of {MEMBERS}")
        entries = [self._entry(keys, row) for row in rows]
        self._follow(session, len(rows))
        invalid = [entry for entry in entries if self.refuse & {value for _, value in entry}]
        held = self.members[number]
        for entry in entries:
            if entry in invalid:
                continue
            if removing:  # whom one of the hashes finds
                held.difference_update([one for one in held if one & entry])
            else:
                held.add(entry)
        samples = [json.dumps([value for _, value in sorted(entry)]) for entry in invalid] if self.name_samples else []
        return {
            "audience_id": number,
            "session_id": str(session["session_id"]),
            "num_received": len(rows),
            "num_invalid_entries": len(invalid),
            "invalid_entry_samples": {str(place): sample for place, sample in enumerate(samples)},
        }

    def _object(self, params: Mapping[str, str], name: str) -> dict[str, Any]:
        try:
            found = json.loads(params[name])
        except (KeyError, ValueError):
            self._break(f"Missing required parameter: {name}")
        if not isinstance(found, dict):
            self._break(f"{name} is no object")
        return found

    def _entry(self, keys: list[str], row: Any) -> Entry:
        if not isinstance(row, list) or len(row) != len(keys):
            self._break("Data is missing or does not match schema")
        for value in row:
            if value and not re.fullmatch("[0-9a-f]{64}", str(value)):
                self._break("a value that is not 64 lower-case hex digits")
        entry = frozenset((key, value) for key, value in zip(keys, row, strict=True) if value)
        if not entry:
            self._break("a row without any key")
        return entry

    def _follow(self, session: dict[str, Any], count: int) -> None:
        """Batches of a session come in order, from 1 on, and none after the last."""
        number, sequence, last = (session.get(key) for key in ("session_id", "batch_seq", "last_batch_flag"))
        if type(number) is not int or not 0 < number < 2**63:
            self._break(f"session_id is no number of 63 bits: {number!r}")
        if type(sequence) is not int or type(last) is not bool:
            self._break("batch_seq is a number and last_batch_flag true or false")
        if session.get("estimated_num_total", count) < count:
            self._break("estimated_num_total is less than what came")
        seen = self.sessions.setdefault(number, [])
        if sequence != len(seen) + 1 or 0 in seen:
            self._break(f"batch {sequence} of a session that had {seen}")
        seen.append(sequence)
        if last:
            seen.append(0)


@contextmanager
def serving(stub: MetaStub) -> Iterator[MetaStub]:
    """Serve a stub on a port of loopback."""

    class Graph(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65_536  # head and body in one segment, or the client waits 40 ms for the second

        def _handle(self) -> None:
            if len(self.path) > LONGEST_URL:
                stub.broken.append(f"an address of {len(self.path)} characters")
                self.close_connection = True
                return
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query, keep_blank_values=True))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            params = query | dict(parse_qsl(body, keep_blank_values=True))
            edge = f"{self.command} {url.path.rstrip('/').rpartition('/')[2]}"
            with stub._lock:
                stub.calls.append(edge)
                fault = stub.faults.popleft() if stub.faults and stub.faults[0].edge == edge else None
                status, answer = 200, {}
                try:
                    parts = stub._admit(self.headers.get("User-Agent", ""), query, url.path)
                    if not fault or fault.after:
                        answer = stub.answer(self.command, parts, params)
                except Wrong as wrong:
                    status, answer = wrong.status, wrong.body
                except Exception as error:  # a bug of the stub must not look like one of Meta's errors
                    stub.broken.append(f"{edge}: the stub failed: {error!r}")
                    raise
            if fault:
                time.sleep(fault.sleep_s)
                if fault.close:
                    self.close_connection = True
                    return
                status, answer = fault.status, fault.body if fault.body is not None else answer
            self._send(status, answer, fault.headers if fault else {})

        def _send(self, status: int, answer: Any, headers: Mapping[str, str]) -> None:
            raw = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(raw)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(raw)
            except (BrokenPipeError, ConnectionResetError):  # who asked did not wait
                self.close_connection = True

        do_GET = do_POST = do_DELETE = _handle  # noqa: N815  the names that http.server looks for

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Graph)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    stub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
