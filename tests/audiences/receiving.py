"""Starts a `stubs.receiver` and asks it what it got."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
SECRET: Final = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"


class Receiving:
    """A receiver that runs."""

    def __init__(self, **options: object) -> None:
        words = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.audiences.stubs.receiver", "--secret", SECRET, *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def __enter__(self) -> Receiving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()

    def report(self) -> dict[str, Any]:
        """Lists, requests and violations."""
        with urllib.request.urlopen(f"{self.url}/", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def fail(self, share: float) -> None:
        """Let a share of the requests fail from now on."""
        body = json.dumps({"share": share}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/control", body), timeout=10):
            pass
