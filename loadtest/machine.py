"""The machine a benchmark runs on: what it is, which of its cores a process may use, and who else keeps them busy."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path


def describe() -> str:
    """Processor, cores this process may use, load before the run, Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load, python = os.getloadavg()[0], platform.python_version()
    return f"{models[0]}, {cores} of {os.cpu_count()} cores, load {load:.1f}, Python {python}"


def pin(*cores: int, pid: int = 0) -> None:
    """Keep a process (0: this one), and those it starts from now on, on some cores, where the platform can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, cores)


def cpu_seconds(pid: int) -> float:
    """Processor seconds that a process and those it started have used; 0 if it is gone or the platform does not say."""
    process = Path(f"/proc/{pid}")
    try:
        # The name stands in brackets and may hold spaces; then state is field 3, and utime, stime and those of
        # children that have ended are fields 14 to 17 (proc(5)).
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        children = [child for file in process.glob("task/*/children") for child in file.read_text().split()]
    except OSError:
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


def busy_seconds(*cores: int) -> float:
    """Seconds that cores (none given: all of them together) have not been idle; 0 where the platform does not say."""
    stat = Path("/proc/stat")
    wanted = {f"cpu{core}" for core in cores} or {"cpu"}
    found = 0.0
    for line in stat.read_text().splitlines() if stat.exists() else ():
        name, *rest = line.split()
        if name in wanted:
            # user, nice, system, idle, iowait, irq, softirq, steal (proc(5))
            fields = list(map(int, rest[:8]))
            found += (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return found


class Others:
    """How much of the machine is taken by processes that this one did not start, from now on."""

    def __init__(self) -> None:
        self._since = self._now()

    def cores(self) -> float:
        """Cores that they kept busy on average; 0 where the platform does not say."""
        busy_s, own_s, at = (now - then for now, then in zip(self._now(), self._since, strict=True))
        return max((busy_s - own_s) / at, 0.0)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return busy_seconds(), cpu_seconds(os.getpid()), time.monotonic()
