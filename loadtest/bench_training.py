"""Time and memory of the offline side: simulating a million events, and training on twenty million.

Each command is a process of its own; its peak is that of the whole process. Exits with 1 beyond what is promised:
20 s for the million, 3 GB for the training.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest import machine

ROOT: Final = Path(__file__).parents[1]
MILLION: Final = 1_000_000


@dataclass(frozen=True)
class Used:
    """Wall seconds, processor seconds and gigabytes at the peak of one command."""

    seconds: float
    cpu_seconds: float
    gigabytes: float


def run(arguments: Sequence[str]) -> Used:
    """Run `propensity` with arguments and measure it."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "cli.main", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"propensity {' '.join(arguments)} failed")
    return Used(time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024**2)


def main() -> int:
    """Print a line a command."""
    print(machine.describe())
    print(f"{'':32} {'seconds':>8} {'cpu s':>8} {'peak GB':>8} {'events/s':>10}")
    kept = True
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for millions in (1, 20):
            events, shop = millions * MILLION, directory / str(millions)
            made = run(["simulate", "--out", str(shop), "--events", str(events), "--end", "2026-07-01T00:00:00Z"])
            show(f"simulate, {millions} M events", made, events)
            files = ["--events", str(shop / "events.parquet"), "--spec", str(ROOT / "examples" / "shop.yaml")]
            trained = run(["train", *files, "--artifacts", str(directory / "artifacts")])
            show(f"train, {millions} M events", trained, events)
            kept = kept and (made.seconds < 20 or millions > 1) and trained.gigabytes < 3
    return 0 if kept else 1


def show(what: str, used: Used, events: int) -> None:
    """Print one line of the table."""
    rate = events / used.seconds
    print(f"{what:32} {used.seconds:>8.1f} {used.cpu_seconds:>8.1f} {used.gigabytes:>8.2f} {rate:>10,.0f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
