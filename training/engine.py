"""Where partitions of visitors are worked on: here, or by several processes of this machine.

An engine reads events into partitions, and calls a function with a job and the number of each partition. The third
one, for many machines, is in `training.distributed`.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path
from typing import Final, Protocol, TypeVar

from service.core.errors import PropensityError
from service.core.spec import FeatureSpec
from training import source
from training.connection import Progress
from training.source import EventLog

Job = TypeVar("Job")
Done = TypeVar("Done")

# Of mallopt(3), and the largest threshold that it takes.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 32 << 20


class Engine(Protocol):
    """What every engine does."""

    def workdir(self, beside: Path) -> AbstractContextManager[str]:
        """A temporary directory that all who work reach; `beside` is a directory that they reach, too."""

    def read(
        self,
        paths: Sequence[str],
        spec: FeatureSpec,
        workdir: Path,
        *,
        max_bad_rows: int = 1000,
        memory_limit: str = "1GB",
        on_progress: Progress | None = None,
    ) -> EventLog:
        """What `source.read` gives."""

    def run(self, function: Callable[[Job, int], Done], job: Job, count: int) -> Iterator[tuple[int, Done]]:
        """Call function(job, 0 ... count - 1); the number and the result of each, in no order."""


class Here:
    """One partition after the other, in this process."""

    def read(
        self,
        paths: Sequence[str],
        spec: FeatureSpec,
        workdir: Path,
        *,
        max_bad_rows: int = 1000,
        memory_limit: str = "1GB",
        on_progress: Progress | None = None,
    ) -> EventLog:
        """By DuckDB, which uses all cores."""
        workdir.mkdir(exist_ok=True)
        return source.read(
            paths,
            spec,
            workdir,
            max_bad_rows=max_bad_rows,
            memory_limit=memory_limit,
            on_progress=on_progress,
        )

    def workdir(self, beside: Path) -> AbstractContextManager[str]:
        """In the directory for temporary files."""
        return tempfile.TemporaryDirectory(prefix="propensity-")

    def run(self, function: Callable[[Job, int], Done], job: Job, count: int) -> Iterator[tuple[int, Done]]:
        """In order."""
        for index in range(count):
            yield index, function(job, index)


class Processes(Here):
    """So many processes of this machine; what they work on has to be picklable."""

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or cores()

    def run(self, function: Callable[[Job, int], Done], job: Job, count: int) -> Iterator[tuple[int, Done]]:
        """As they are done. A single partition or process is worked on here."""
        if min(self.processes, count) < 2:
            yield from super().run(function, job, count)
            return
        # Fresh processes: a fork of one that has threads, as DuckDB and ONNX Runtime start them, may hang.
        pool = ProcessPoolExecutor(min(self.processes, count), get_context("spawn"), keep_memory)
        try:
            waiting = {pool.submit(function, job, index): index for index in range(count)}
            for done in as_completed(waiting):
                yield waiting.pop(done), done.result()
        except BrokenProcessPool:
            raise PropensityError(
                "a process ended before its work was done, most likely for want of memory; give fewer --threads"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory(gigabytes: int = 1) -> None:
    """Have this process keep so much of the memory that it frees, where the C library is glibc, for its next partition.

    To get it anew took a tenth of the time (docs/adr/0017-freed-memory-is-kept.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, gigabytes << 30)
