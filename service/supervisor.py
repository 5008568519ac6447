"""Several processes that serve one port: started together, replaced when they die, and ended together.

The supervisor serves nothing itself and loads none of what its workers load. A worker is a program of its own
(`service.worker`) and no fork: threads and locks of onnxruntime and numpy do not survive one, and nothing is inherited
by accident. On Linux each has its own listening socket on the same port, so that new connections go to the living
ones at once when one dies; elsewhere they share one socket.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

from prometheus_client.multiprocess import mark_process_dead

from service import embedded, logs, port
from service.core.errors import PropensityError
from service.settings import Settings, log_unknown

logger = logging.getLogger(__name__)

# What a worker is told after its orders, and what it answers if it can: that it serves, then each second that it does.
SERVE: Final = "serve"
REPLACE: Final = "replace"
READY: Final = "ready"
ALIVE: Final = "alive"
ALIVE_EVERY_S: Final = 1.0
# On this signal a worker writes to stderr what each of its threads is doing, and how long that may take.
SHOW_STACKS: Final = signal.SIGUSR1
_STACKS_S: Final = 0.5
# Beyond delay and drain: what a worker needs to close what it has opened, and to exit.
_MARGIN_S: Final = 3.0
# A worker that has served so long had an accident; one that dies sooner may do so again and again.
_STEADY_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
_METRICS: Final = "PROMETHEUS_MULTIPROC_DIR"


class Orders(TypedDict):
    """What a worker is told when it starts, as JSON."""

    name: str  # of its files of metrics
    listener: int | None  # descriptor of the socket that all share, where each cannot have its own
    temporary: str | None  # directory to remove if the supervisor does not live to do it
    limit_s: float  # how long its end may take
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Worker:
    """A process that was started, the number in its name, and the channel to it."""

    number: int
    process: Process
    answers: asyncio.StreamReader
    channel: asyncio.StreamWriter


def serve(settings: Settings) -> None:
    """Serve with several workers until interrupted. Raises PropensityError if they cannot be started."""
    logs.configure(settings.log_format, settings.log_level, with_process=True)
    log_unknown()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    port.require_free(settings.host, settings.port)
    with ExitStack() as stack:
        taken = stack.enter_context((port.claim if port.IS_SPREAD else port.bind)(settings.host, settings.port))
        if settings.redis_url is None:
            stack.callback(embedded.start(settings.data_dir).close)
        metrics = os.environ.get(_METRICS)
        temporary = None if metrics else stack.enter_context(_directory_in_memory())
        asyncio.run(Supervisor(settings, taken, metrics or temporary or "", temporary).run())


@contextmanager
def _directory_in_memory() -> Iterator[str]:
    """A directory for files of metrics; on a disk, its writing back can make those wait who count."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="propensity-", dir=place, ignore_cleanup_errors=True) as directory:
        yield directory


class Supervisor:
    """Keeps the workers of a service, and one to spare that has everything imported.

    A program of this size takes more than a second to start, and longer on a busy machine; the spare one takes a dead
    worker's place in a fraction of that. There is one more name than workers. A dead worker's name goes to the process
    that is started next, which counts on from what it finds in the files of that name: counters never fall, and files
    never grow in number.

    `taken` is what keeps the port, `metrics` the directory of those files, `temporary` the same if it is to be removed.
    """

    def __init__(self, settings: Settings, taken: socket.socket, metrics: str, temporary: str | None) -> None:
        self._settings, self._taken, self._metrics, self._temporary = settings, taken, metrics, temporary
        self._limit_s = settings.shutdown_delay_ms / 1000 + settings.shutdown_timeout_s + _MARGIN_S
        self._free_numbers = set(range(settings.workers + 1))
        self._workers: set[Worker] = set()
        self._serving: set[Worker] = set()
        self._spare: asyncio.Task[Worker] | None = None
        self._ending = asyncio.Event()

    async def run(self) -> None:
        """Keep the workers until a signal comes and they have ended. Raises PropensityError if one cannot begin."""
        for each in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(each, self._pass_on, each)
        asyncio.get_running_loop().set_exception_handler(logs.log_loop_error)
        reason = None
        try:
            async with asyncio.TaskGroup() as places:
                for _ in range(self._settings.workers):
                    places.create_task(self._keep_one())
        except* PropensityError as failed:
            reason = str(failed.exceptions[0])
        finally:
            if self._spare is not None:
                await asyncio.wait([self._spare])
            for worker in list(self._workers):
                await self._end(worker)
        if reason is not None:
            raise PropensityError(reason)

    async def _keep_one(self) -> None:
        """Have one worker serve after the other, until the service ends."""
        order, pause_s = SERVE, 0.0
        while not self._ending.is_set():
            served_s, why = await self._serve(order)
            if self._ending.is_set():
                return
            if order == SERVE and served_s is None:
                raise PropensityError(why)
            is_accident = order == SERVE or (served_s or 0) > _STEADY_S
            pause_s = 0.0 if is_accident else min(max(_FIRST_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
            logger.error("%s; it is replaced%s", why, f" in {pause_s:g} s" if pause_s else "")
            order = REPLACE
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause_s)

    async def _serve(self, order: str) -> tuple[float | None, str]:
        """Have one worker serve until it ends: for how long it did, None if it never began, and what became of it."""
        try:
            worker = await self._next()
        except OSError as error:
            return None, f"a worker cannot be started: {error}"
        worker.channel.write(f"{order}\n".encode())
        answer = (await worker.answers.readline()).decode().strip()
        began = time.monotonic() if answer == READY else None
        if began is not None:
            self._note_ready(worker, order)
        if began is not None and await self._falls_silent(worker):
            await self._end(worker)
            return time.monotonic() - began, f"worker {worker.process.pid} hung and was killed"
        code = await worker.process.wait()
        await self._end(worker)
        if answer not in (READY, ""):
            return None, answer
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        why = f"worker {worker.process.pid} ended with {how}"
        if began is None:
            return None, f"{why} before it could serve; its log above says why"
        return time.monotonic() - began, why

    async def _falls_silent(self, worker: Worker) -> bool:
        """Wait until a worker ends, or has been silent for so long that it hangs: whether it does.

        Silence is counted in seconds that the supervisor was awake: none pass while the whole machine stands still.
        """
        limit_s, silent_s = self._settings.worker_silence_s, 0.0
        while silent_s < limit_s or self._ending.is_set():
            try:
                said = await asyncio.wait_for(worker.answers.readline(), ALIVE_EVERY_S)
            except TimeoutError:
                silent_s += ALIVE_EVERY_S
                continue
            if not said:
                return False
            silent_s = 0.0
        logger.error("worker %d has done nothing for %g s; this is what it is at", worker.process.pid, limit_s)
        with suppress(ProcessLookupError):
            worker.process.send_signal(SHOW_STACKS)
        await asyncio.sleep(_STACKS_S)
        return True

    async def _next(self) -> Worker:
        """The spare process, or a new one."""
        spare, self._spare = self._spare, None
        worker = await (spare or self._start())
        if worker.process.returncode is None:
            return worker
        await self._end(worker)
        return await self._start()

    async def _start(self) -> Worker:
        """A process that has its orders and waits to be told to serve."""
        number = min(self._free_numbers)
        self._free_numbers.remove(number)
        listener = None if port.IS_SPREAD else self._taken.fileno()
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "service.worker"),
                stdin=theirs.fileno(),
                pass_fds=[] if listener is None else [listener],
                env={**os.environ, _METRICS: self._metrics, "PYTHONPATH": _import_path()},
                start_new_session=True,  # Ctrl-C reaches it through the supervisor alone
            )
        except OSError:
            self._free_numbers.add(number)
            ours.close()
            raise
        finally:
            theirs.close()
        answers, channel = await asyncio.open_connection(sock=ours)
        worker = Worker(number, process, answers, channel)
        self._workers.add(worker)
        if self._ending.is_set():
            process.terminate()
        orders = Orders(
            name=self._name(number),
            listener=listener,
            temporary=self._temporary,
            limit_s=self._limit_s,
            settings=self._settings.model_dump(mode="json"),
        )
        channel.write(f"{json.dumps(orders)}\n".encode())
        return worker

    async def _end(self, worker: Worker) -> None:
        """Put away what is left of a worker; one that still runs is not needed."""
        if worker.process.returncode is None:
            worker.process.kill()
            await worker.process.wait()
        worker.channel.close()
        mark_process_dead(self._name(worker.number), self._metrics)  # type: ignore[no-untyped-call]
        self._serving.discard(worker)
        self._workers.remove(worker)
        self._free_numbers.add(worker.number)

    def _name(self, number: int) -> str:
        return f"{os.getpid()}-{number}"

    def _note_ready(self, worker: Worker, order: str) -> None:
        self._serving.add(worker)
        if order == REPLACE:
            logger.info("worker %d serves in its place", worker.process.pid)
        if len(self._serving) < self._settings.workers or self._ending.is_set():
            return
        if order == SERVE:
            pids = ", ".join(str(one.process.pid) for one in self._serving)
            url = f"http://{self._settings.host}:{self._settings.port}"
            logger.info("%d workers serve %s (Ctrl-C to quit): %s", len(self._serving), url, pids)
        if self._spare is None:
            self._spare = asyncio.create_task(self._start())

    def _pass_on(self, sig: signal.Signals) -> None:
        if not self._ending.is_set():
            self._ending.set()
            self._taken.close()  # once the workers have closed theirs, nothing listens any more
            asyncio.get_running_loop().call_later(self._limit_s, self._kill)
        for worker in self._workers:
            with suppress(ProcessLookupError):
                # Python that is still starting tells of a SIGINT at length.
                worker.process.send_signal(sig if worker in self._serving else signal.SIGTERM)

    def _kill(self) -> None:
        for worker in self._workers:
            logger.error("worker %d does not end and is killed", worker.process.pid)
            with suppress(ProcessLookupError):
                worker.process.kill()


def _import_path() -> str:
    """What makes a new process find the same modules, whatever directory it runs in."""
    return os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
