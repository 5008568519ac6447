"""Many machines: partitions of visitors worked on by Dask workers, and LightGBM's own trainer on them.

Scheduler and workers carry tasks and small results; events, features and scores go by files. So every worker has to
see the same file system under the same paths, and to have this package installed. Needs the extra `dask`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from service.core.errors import PropensityError
from service.core.spec import FeatureSpec
from training import slices
from training.connection import Progress, connect
from training.engine import cores, keep_memory
from training.source import EventLog

if TYPE_CHECKING:
    from distributed import Client

    from training.dataset import Dataset, Split
    from training.fit import Fitted

Job = TypeVar("Job")
Done = TypeVar("Done")

CONNECT_S: Final = 10
ANSWER_S: Final = 15
# Slices of the events a worker: so that the last ones are done at about the same time.
SLICES: Final = 4
# Rounds that are fitted before it is looked whether the best one lies far enough behind.
ROUNDS: Final = 100
# Rows that the loss of each round is taken from.
MOST_JUDGED: Final = 100_000
# A worker's profiler looks at its thread a hundred times a second, for a dashboard that a cluster of our own has not.
_UNWATCHED: Final = {"distributed.worker.profile.enabled": False}
# What the trainer's own names are, so that its defaults do not stand beside the values.
_NAMES: Final = {
    "min_data_in_leaf": "min_child_samples",
    "lambda_l1": "reg_alpha",
    "lambda_l2": "reg_lambda",
    "feature_fraction": "colsample_bytree",
    "bagging_fraction": "subsample",
    "bagging_freq": "subsample_freq",
    "min_gain_to_split": "min_split_gain",
    "min_sum_hessian_in_leaf": "min_child_weight",
}


@contextmanager
def connected(scheduler: str | None = None, processes: int | None = None) -> Iterator[Dask]:
    """The cluster of a scheduler; without its address one of so many processes of this machine."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise PropensityError(
            f"{error.name} is not installed; install what --engine dask needs with pip install 'propensity[dask]'"
        ) from None
    with ExitStack() as stack:
        if scheduler is None:
            stack.enter_context(dask.config.set(_UNWATCHED))
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=processes or cores(),
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address=None,
                    # Without a dashboard there is still a server of HTTP, on port 8787 unless told otherwise.
                    scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
                    local_directory=stack.enter_context(tempfile.TemporaryDirectory(prefix="propensity-dask-")),
                )
            )
            client = stack.enter_context(Client(cluster))
            client.run(_mute)
            client.run(keep_memory)
        else:
            asyncio.run(_knock(scheduler))
            client = stack.enter_context(Client(scheduler, timeout=CONNECT_S))
        yield Dask(client)


async def _knock(scheduler: str) -> None:
    """Raise PropensityError unless a Dask scheduler answers in time."""
    from distributed import Client

    client = Client(scheduler, asynchronous=True, timeout=CONNECT_S)
    try:
        async with asyncio.timeout(ANSWER_S):
            await client
    # Dask takes what anything else answers for lengths and messages, so it may fail in any way, and waits for silence.
    except Exception as error:
        said = str(error) if isinstance(error, (OSError, ValueError)) else "something else does"
        raise PropensityError(
            f"no Dask scheduler answers at {scheduler} ({said or f'nothing of Dask in {ANSWER_S} s'}); start one with "
            "`dask scheduler` and write the address that it prints, as tcp://10.0.0.5:8786, and start workers with "
            "`dask worker ADDRESS`; or leave --scheduler out for processes of this machine"
        ) from None
    finally:
        await client.close()


class Dask:
    """An engine: what `training.engine` asks of one, and `fit`."""

    def __init__(self, client: Client) -> None:
        self.client = client
        if not self.client.scheduler_info()["workers"]:
            raise PropensityError("the Dask scheduler has no workers; start some with `dask worker ADDRESS`")

    @contextmanager
    def workdir(self, beside: Path) -> Iterator[str]:
        """In the directory `beside`. Raises PropensityError unless every worker sees it."""
        with tempfile.TemporaryDirectory(prefix=".propensity-", dir=beside.absolute()) as made:
            mark = Path(made) / uuid.uuid4().hex
            mark.touch()
            for worker, (sees, version) in self._ask(_look, str(mark)).items():
                if not sees:
                    raise PropensityError(
                        f"the Dask worker {worker} does not see {beside.absolute()}; all workers need one file system"
                    )
                if version != importlib.metadata.version("propensity"):
                    raise PropensityError(f"the Dask worker {worker} has propensity {version}; install the same there")
            yield made

    def _ask(self, function: Callable[..., Done], *arguments: object) -> Mapping[str, Done]:
        try:
            found: Mapping[str, Done] = self.client.run(function, *arguments)
        except ModuleNotFoundError as error:
            raise PropensityError(
                f"a Dask worker cannot import {error.name}; install propensity[training,dask] where workers run"
            ) from None
        return found

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
        """Each worker reads slices of the files."""
        workdir.mkdir(exist_ok=True)
        workers = sum(self.client.ncores().values())
        connection = connect(workdir, memory_limit)
        job = slices.sliced(connection, paths, spec, workdir, SLICES * workers, memory_limit)
        steps = len(job.slices) + job.partitions
        found, counts = [], []
        for _, one in self.run(slices.read_slice, job, len(job.slices)):
            found.append(one)
            if on_progress is not None:
                on_progress(len(found) / steps)
        for _, counted in self.run(slices.count_partition, job, job.partitions):
            counts.append(counted)
            if on_progress is not None:
                on_progress((len(found) + len(counts)) / steps)
        summary = job.joined(connection, job.summarise(found, counts, max_bad_rows))
        if summary.joined:
            for _ in self.run(slices.move_slice, job, len(job.slices)):
                pass
        return EventLog(spec, workdir.absolute(), job.partitions, summary, connection)

    def run(self, function: Callable[[Job, int], Done], job: Job, count: int) -> Iterator[tuple[int, Done]]:
        """As they are done; a task whose worker is lost is worked on by another one."""
        from distributed import KilledWorker, as_completed

        (shared,) = self.client.scatter([job], broadcast=True, hash=False)
        numbers = {self.client.submit(function, shared, index, pure=False): index for index in range(count)}
        try:
            for future in as_completed(list(numbers)):
                yield numbers.pop(future), future.result()
        except KilledWorker as error:
            raise PropensityError(
                f"Dask workers ended while they worked ({error}), most likely for want of memory; give them more"
            ) from None
        finally:
            self.client.cancel(list(numbers))

    def fit(
        self,
        dataset: Dataset,
        split: Split,
        names: Sequence[str],
        *,
        seed: int = 0,
        threads: int = 1,
        parameters: Mapping[str, Any] | None = None,
        on_round: Callable[[int, int], None] | None = None,
    ) -> Fitted:
        """What `fit.fit` does, with the rows to fit on spread over the workers; each uses as many threads as it has.

        LightGBM's trainer for Dask does not stop early, so rounds are fitted some at a time, until the best one on
        split.stop lies far enough behind.
        """
        import lightgbm

        from training import fit

        self._ask(_quieten)
        _quieten()
        settings = {_NAMES.get(name, name): value for name, value in {**fit.DEFAULTS, **(parameters or {})}.items()}
        matrix, label = self._spread(dataset, split)
        stopping = _Stopping(dataset, split)
        booster: Any = None
        while not stopping.is_over:
            trainer = lightgbm.DaskLGBMRegressor(  # the one for classes has each worker look at its own labels alone
                client=self.client, n_estimators=ROUNDS, random_state=seed + stopping.rounds, **settings
            )
            trainer.fit(matrix, label, feature_name=list(names), init_model=booster)
            booster = trainer.to_local().booster_
            stopping.look(booster)
            if on_round is not None:
                on_round(stopping.rounds, fit.MAX_ROUNDS)
        booster.best_iteration = stopping.best_round
        margin = np.asarray(booster.predict(dataset.matrix[split.calibrate], raw_score=True), np.float64)
        return fit.Fitted(booster, fit.calibrate(margin, dataset.label[split.calibrate]), stopping.curve)

    def _spread(self, dataset: Dataset, split: Split) -> tuple[Any, Any]:
        """The rows to fit on and their labels as Dask arrays, a chunk of each on every worker."""
        from dask import array
        from dask.delayed import delayed

        workers = sorted(self.client.scheduler_info()["workers"])
        matrices, labels = [], []
        for worker, rows in zip(workers, np.array_split(split.train, len(workers)), strict=True):
            matrix, label = self.client.scatter(
                [dataset.matrix[rows], dataset.label[rows].astype(np.float32)], workers=[worker], hash=False
            )
            matrices.append(array.from_delayed(delayed(matrix), (len(rows), dataset.matrix.shape[1]), dtype=np.float32))
            labels.append(array.from_delayed(delayed(label), (len(rows),), dtype=np.float32))
        return array.concatenate(matrices), array.concatenate(labels)


class _Stopping:
    """The log loss after each round, and whether the best one lies so far behind that it stays the best."""

    def __init__(self, dataset: Dataset, split: Split) -> None:
        self._parts = {}
        for name, rows in (("train", split.train), ("stop", split.stop)):
            some = rows[:: -(-len(rows) // MOST_JUDGED)]
            self._parts[name] = (dataset.matrix[some], dataset.label[some], np.zeros(len(some)))
        self.curve: dict[str, list[float]] = {name: [] for name in self._parts}
        self.is_over = False

    @property
    def rounds(self) -> int:
        return len(self.curve["stop"])

    @property
    def best_round(self) -> int:
        return int(np.argmin(self.curve["stop"])) + 1

    def look(self, booster: Any) -> None:
        """Judge the rounds that came to it."""
        from training import fit

        before, after = self.rounds, booster.num_trees()
        for place in range(before, after):
            for name, (matrix, label, margin) in self._parts.items():
                margin += booster.predict(matrix, raw_score=True, start_iteration=place, num_iteration=1)
                self.curve[name].append(float(np.mean(np.logaddexp(0, margin) - label * margin)))
        is_done = after < before + ROUNDS or after >= fit.MAX_ROUNDS
        self.is_over = is_done or self.best_round + fit.PATIENCE <= after


def _mute() -> None:
    """Say nothing on stdout, which a worker has from the command that started it, and LightGBM's threads write to."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - no path of ours
        os.dup2(nowhere.fileno(), 1)


def _quieten() -> None:
    """Have LightGBM tell errors alone: it says of each worker how it finds the others."""
    import lightgbm

    logger = logging.getLogger("propensity.lightgbm")
    logger.setLevel(logging.ERROR)
    lightgbm.register_logger(logger)


def _look(path: str) -> tuple[bool, str]:
    return Path(path).exists(), importlib.metadata.version("propensity")
