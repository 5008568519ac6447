"""Times `make run` as a newcomer sees it: from a fresh clone to the first score, then a second start.

Needs Python and git alone, like `make run` itself. Exits with 1 beyond two minutes, or five seconds the second time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
FIRST_LIMIT_S: Final = 120.0
SECOND_LIMIT_S: Final = 5.0


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_scored(port: int) -> bool:
    """Whether a score is answered with 200."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/score",
        json.dumps({"visitor_id": "newcomer"}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def seconds_to_first_score(checkout: Path, limit_s: float) -> float:
    """Seconds from `make run` to the first score; the service is stopped again."""
    port = free_port()
    begun = time.monotonic()
    process = subprocess.Popen(
        ["make", "run", f"PORT={port}"], cwd=checkout, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not is_scored(port):
            if process.poll() is not None or time.monotonic() - begun > 2 * limit_s:
                raise SystemExit("make run gave no score")
            time.sleep(0.05)
        return time.monotonic() - begun
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        while is_scored(port):
            time.sleep(0.1)


def main() -> int:
    """Print both times; 1 if either is beyond its limit."""
    with tempfile.TemporaryDirectory() as name:
        checkout = Path(name) / "propensity"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        first = seconds_to_first_score(checkout, FIRST_LIMIT_S)
        print(f"fresh clone to first score: {first:.1f} s (promised: under {FIRST_LIMIT_S:.0f} s)")
        second = seconds_to_first_score(checkout, SECOND_LIMIT_S)
        print(f"second start to first score: {second:.1f} s (promised: under {SECOND_LIMIT_S:.0f} s)")
        time.sleep(2)
    return 0 if first < FIRST_LIMIT_S and second < SECOND_LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
