"""A receiver of triggers, which checks signatures with the library and answers as it is told to."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

from tests.audiences.receiving import SECRET


@dataclass
class Hook:
    """A receiver: what it was told in order, and for whom it answers what."""

    port: int = 0
    told: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    forged: int = 0
    answers: dict[str, int] = field(default_factory=dict)  # status by visitor; others get 204
    attempts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def of(self, visitor: str) -> list[str]:
        """Segments that it was told a visitor entered."""
        return [one["data"]["segment"] for one in self.told if one["data"]["visitor_id"] == visitor]


@contextmanager
def hooked() -> Iterator[Hook]:
    """A receiver that runs."""
    found, lock = Hook(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802 - the library's name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                try:
                    event = Webhook(SECRET).verify(body, dict(self.headers.items()))
                except WebhookVerificationError:
                    found.forged += 1
                    event = {"data": {"visitor_id": ""}}
                visitor = event["data"]["visitor_id"]
                found.attempts[str(visitor)] += 1
                status = found.answers.get(str(visitor), 204)
                if status == 204:
                    found.told.append(event)
                    found.ids.append(str(self.headers["webhook-id"]))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
