"""A strict receiver of audiences in a process of its own: checks every request, holds memberships, and fails at will.

It checks signatures with its own arithmetic, by the text of Standard Webhooks. What breaks a rule is a violation, which
stays in its report. Faults come at random: an answer that never comes, refusals before and after the members are taken.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import random
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

KINDS: Final = ("audience.members_added", "audience.members_removed")
HASHED: Final = ("google.email", "google.phone", "meta.email", "meta.phone", "meta.external_id")
FAULTS: Final = ("429", "500", "500 after", "503 later", "no answer")


@dataclass
class Receiver:
    """What was received."""

    secret: bytes
    most: int
    share: float  # of requests that fail
    late_share: float
    late_s: float
    random: random.Random
    lists: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    bodies: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def report(self) -> dict[str, Any]:
        with self.lock:
            return {"lists": self.lists, "requests": self.requests, "violations": self.violations}

    def check(self, headers: Mapping[str, str], body: bytes) -> str | None:
        """What is wrong with a request."""
        name, stamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
        if headers.get("content-type") != "application/json":
            return "the content is not declared to be JSON"
        if not stamp.isdigit() or abs(int(stamp) - time.time()) > 300:
            return f"the timestamp {stamp!r} is not of now"
        digest = hmac.new(self.secret, f"{name}.{stamp}.".encode() + body, hashlib.sha256).digest()
        if f"v1,{base64.b64encode(digest).decode()}" not in headers.get("webhook-signature", "").split(" "):
            return "the signature is wrong"
        if b"@" in body:
            return "there is an @ in the body"
        return self._check_body(name, json.loads(body))

    def _check_body(self, name: str, event: dict[str, Any]) -> str | None:
        if set(event) != {"type", "timestamp", "data"} or event["type"] not in KINDS:
            return f"the event has the keys {sorted(event)} and the type {event.get('type')}"
        data = event["data"]
        if set(data) != {"audience", "batch", "members"} or data["batch"] != name:
            return f"the data has the keys {sorted(data)}, and the batch is not the id of the message"
        members = data["members"]
        keys = [one["key"] for one in members]
        if not 1 <= len(members) <= self.most or len(set(keys)) != len(keys):
            return f"{len(members)} members of {len(set(keys))} people"
        content = [event["type"], data["audience"], members]
        if self.bodies.setdefault(name, content) != content:
            return f"the batch {name} came again with other members"
        return next((wrong for one in members if (wrong := _wrong(one))), None)

    def take(self, event: dict[str, Any], applied: bool) -> dict[str, str]:
        """Change the membership; who is refused, and why."""
        data = event["data"]
        own = self.lists.setdefault(data["audience"], {})
        if event["type"] == KINDS[1]:
            if applied:
                for one in data["members"]:
                    own.pop(one["key"], None)
            return {}
        refused = {one["key"]: "of no use here" for one in data["members"] if one["key"].startswith("f")}
        if applied:
            own.update({one["key"]: one for one in data["members"] if one["key"] not in refused})
        return refused

    def answer(self, headers: Mapping[str, str], body: bytes) -> tuple[int | None, bytes, dict[str, str]]:
        """Status (None: close without an answer), body and headers."""
        with self.lock:
            wrong = self.check(headers, body)
            if wrong:
                self.violations.append(wrong)
                return 400, wrong.encode(), {}
            event = json.loads(body)
            fault = self.random.choice(FAULTS) if self.random.random() < self.share else ""
            fault = "late answer" if self.random.random() < self.late_share else fault
            applied = fault not in ("429", "500", "503 later")
            refused = self.take(event, applied)
            self.requests.append(_logged(event, fault, applied, refused))
            print(len(self.requests), flush=True)  # whoever waits for a moment to kill the sender reads this
        if fault == "late answer":  # the sender has given up meanwhile
            time.sleep(self.late_s)
        if fault == "no answer":
            return None, b"", {}
        if fault and fault != "late answer":
            return int(fault.split()[0]), b"not now", {"Retry-After": "0"} if fault == "429" else {}
        return 200, json.dumps({"rejected": refused}).encode() if refused else b"", {}


def _wrong(member: dict[str, Any]) -> str | None:
    if set(member) != {"key", "identifiers", "fields"} or not re.fullmatch("[0-9a-f]{64}", member["key"]):
        return f"a member has the keys {sorted(member)}"
    for form, values in member["identifiers"].items():
        if form in HASHED and not all(re.fullmatch("[0-9a-f]{64}", value) for value in values):
            return f"{form} is not hashed"
    return None


def _logged(event: dict[str, Any], fault: str, applied: bool, refused: dict[str, str]) -> dict[str, Any]:
    return {
        "added": event["type"] == KINDS[0],
        "audience": event["data"]["audience"],
        "batch": event["data"]["batch"],
        "members": {one["key"]: one for one in event["data"]["members"]},
        "fault": fault,
        "applied": applied,
        "refused": sorted(refused),
    }


def handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    """The HTTP side of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802 - the library's name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/control":
                given = json.loads(body)
                receiver.share = given["share"]
                self.reply(200, b"", {})
                return
            status, answer, headers = receiver.answer({k.lower(): v for k, v in self.headers.items()}, body)
            if status is None:
                self.close_connection = True
                return
            self.reply(status, answer, headers)

        def do_GET(self) -> None:  # noqa: N802 - the library's name
            self.reply(200, json.dumps(receiver.report()).encode(), {})

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # the sender was killed
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main() -> None:
    """Print the port, then a line for each request that was taken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--secret", required=True)
    parser.add_argument("--most", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--late-share", type=float, default=0.0)
    parser.add_argument("--late-s", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    secret = base64.b64decode(given.secret.removeprefix("whsec_"))
    receiver = Receiver(secret, given.most, given.share, given.late_share, given.late_s, random.Random(given.seed))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(receiver))
    server.daemon_threads = True
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until whoever started it closes the pipe, or is no more


if __name__ == "__main__":
    main()
