"""A real cluster of two Dask worker processes: the same results as on one machine."""

from __future__ import annotations

import platform
import re
import resource
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.core import bundle, features, spec
from service.core.errors import PropensityError
from tests.conftest import Shop
from tests.test_layers import ROOT, imports
from tests.training import test_joins
from training import batch, dataset, distributed, evaluate, fit, point_in_time, source
from training.batch import Options
from training.distributed import Dask
from training.engine import Here


@pytest.fixture(scope="module")
def cluster() -> Iterator[Dask]:
    with distributed.connected(None, 2) as engine:
        assert len(engine.client.scheduler_info()["workers"]) == 2
        yield engine


@pytest.fixture(scope="module")
def files(open_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return in_two(open_shop.events, tmp_path_factory.mktemp("two"))


def in_two(events: Path, directory: Path) -> list[str]:
    """Events in two files of other columns, one of which also has a bad row: workers read them apart."""
    table = pq.read_table(events)
    half = len(table) // 2
    pq.write_table(table[:half], directory / "a.parquet")
    bad = pa.table({"event": ["Product Viewed"], "timestamp": [None]}).cast(
        pa.schema([table.schema.field("event"), table.schema.field("timestamp")])
    )
    rest = pa.concat_tables([table[half:].drop_columns(["traits"]), bad], promote_options="default")
    pq.write_table(rest, directory / "b.parquet")
    return [str(directory)]


def test_events_read_in_slices_are_those_read_at_once(
    open_shop: Shop, files: list[str], cluster: Dask, tmp_path: Path
) -> None:
    spec = bundle.load(open_shop.model).spec
    here = source.read(files, spec, tmp_path)
    apart = cluster.read(files, spec, tmp_path / "apart")
    assert apart.summary == here.summary
    assert apart.summary.bad == 1
    assert apart.partitions > here.partitions == 1
    seen = np.concatenate([partition.visitor_hash for partition in apart])
    assert np.array_equal(np.sort(seen), here.partition(0).visitor_hash)


def test_more_bad_rows_than_allowed_are_told_as_on_one_machine(
    open_shop: Shop, files: list[str], cluster: Dask, tmp_path: Path
) -> None:
    spec = bundle.load(open_shop.model).spec
    with pytest.raises(PropensityError, match="more than --max-bad-rows 0") as told:
        cluster.read(files, spec, tmp_path / "apart", max_bad_rows=0)
    (tmp_path / "here").mkdir()
    with pytest.raises(PropensityError) as here:
        source.read(files, spec, tmp_path / "here", max_bad_rows=0)
    assert str(told.value) == str(here.value)


def test_text_files_go_to_workers_whole_with_the_types_of_all(open_shop: Shop, cluster: Dask, tmp_path: Path) -> None:
    """`price` is whole in one file alone: its text as an attribute must not depend on who reads it."""
    spec = bundle.load(open_shop.model).spec
    for name, price in (("a", "7"), ("b", "7.5"), ("c", "8")):
        lines = [f"Product Viewed,{name}{row},2026-03-0{row}T10:00:00Z,{price},shoes" for row in range(1, 9)]
        (tmp_path / f"{name}.csv").write_text(
            "\n".join(["event,userId,timestamp,price,category", *lines]) + "\n", encoding="utf-8"
        )
    (tmp_path / "log").mkdir()
    here = source.read([str(tmp_path / "*.csv")], spec, tmp_path / "log")
    apart = cluster.read([str(tmp_path / "*.csv")], spec, tmp_path / "apart")
    assert apart.summary == here.summary
    assert apart.summary.events == 24


def test_scores_are_the_same_to_the_bit(open_shop: Shop, files: list[str], cluster: Dask, tmp_path: Path) -> None:
    found = []
    for name, engine in (("here", Here()), ("apart", cluster)):
        made = batch.score(
            *(files, open_shop.model, 1_790_000_000_000, tmp_path / name),
            *(Options(columns=("all",), context={"referrer": "ads"}), engine),
        )
        table = pq.read_table(tmp_path / name).sort_by("visitor_id")
        assert made.rows == len(table) > 1000
        found.append(table)
    names = found[0].schema.names
    assert all(bits(found[0], name) == bits(found[1], name) for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart", "here"]
    assert len(list((tmp_path / "apart").iterdir())) > 1


def bits(table: pa.Table, name: str) -> list[object]:
    column = table[name].combine_chunks()
    values: list[object] = (
        column.to_numpy().view(np.uint32).tolist() if column.type == pa.float32() else column.to_pylist()
    )
    return values


def test_features_at_moments_of_the_past_are_the_same_file(
    open_shop: Shop, files: list[str], cluster: Dask, tmp_path: Path
) -> None:
    table = pq.read_table(open_shop.events)[::97]
    visitor = [
        one or other
        for one, other in zip(*(table[name].to_pylist() for name in ("userId", "anonymousId")), strict=True)
    ]
    referrer = [context["referrer"] for context in table["context"].to_pylist()]
    at = tmp_path / "at.parquet"
    pq.write_table(pa.table({"visitor_id": visitor, "at": table["timestamp"], "referrer": referrer}), at)
    for name, engine in (("here", None), ("apart", cluster)):
        rows = point_in_time.write(files, open_shop.spec, at, tmp_path / f"{name}.parquet", engine=engine)
        assert rows == len(table)
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "apart.parquet").read_bytes()


def test_training_rows_are_the_same_and_the_model_is_as_good(
    open_shop: Shop, cluster: Dask, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = bundle.load(open_shop.model).plan
    # Of one moment: which rows are drawn depends on it, and of the few that are judged some tell nothing apart.
    files = in_two(open_shop.events.with_name("simulated.parquet"), tmp_path_factory.mktemp("two"))
    read = source.read(files, plan.spec, tmp_path)
    here = dataset.build(read, plan, seed=1, max_rows=3000)
    log = cluster.read(files, plan.spec, tmp_path / "apart")
    apart = dataset.build_apart(log, plan, cluster.run, seed=1, max_rows=3000)
    assert len(here) == len(apart) == 3000
    assert np.array_equal(here.matrix.view(np.uint32), apart.matrix.view(np.uint32))
    assert np.array_equal(here.visitor, apart.visitor)
    assert np.array_equal(here.label, apart.label)
    assert len(apart.golden) == len(here.golden)
    assert here.population is not None and apart.population is not None
    order, other = (np.lexsort((one.matrix[:, 1], one.visitor)) for one in (here.population, apart.population))
    assert np.array_equal(here.population.visitor[order], apart.population.visitor[other])
    here, apart = dataset.build(read, plan, seed=1), dataset.build_apart(log, plan, cluster.run, seed=1)
    split = dataset.split(here, 5 * 86_400_000, 1)
    settings = {"learning_rate": 0.3, "num_leaves": 5}
    alone = fit.fit(here, split, plan.spec.names, seed=1, parameters=settings)
    together = cluster.fit(apart, split, plan.spec.names, seed=1, parameters=settings)
    assert together.booster.feature_name() == list(plan.spec.names)
    assert together.booster.best_iteration == int(np.argmin(together.learning_curve["stop"])) + 1
    truth, visitor = here.label[split.test], here.visitor[split.test].view(np.int64)
    judged = [evaluate.evaluate(truth, one.predict(here.matrix[split.test]), visitor) for one in (alone, together)]
    for mine, theirs in (judged, judged[::-1]):
        assert mine.roc_auc > 0.55
        assert mine.roc_auc_interval[0] < theirs.roc_auc < mine.roc_auc_interval[1]


def test_joins_are_the_same_too(cluster: Dask, tmp_path: Path) -> None:
    """Logins are in other files than visits, so that one worker has what another one's rows need."""
    shop = spec.parse(test_joins.DOCUMENT)
    sent = [event for seed in range(4) for event in test_joins.random_visits(seed, people=40)]
    for number in range(5):
        test_joins.write(tmp_path / f"{number}.ndjson", sent[number::5])
    files = [str(tmp_path / "*.ndjson")]
    (tmp_path / "here").mkdir()
    here, apart = source.read(files, shop, tmp_path / "here"), cluster.read(files, shop, tmp_path / "apart")
    assert apart.summary == here.summary
    assert apart.summary.joined > 20
    assert apart.partitions > here.partitions == 1
    plan = features.compile(shop)
    rows = [test_joins.rows_of(dataset.build(log, plan)) for log in (here, apart)]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 2000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to keep memory")
def test_workers_keep_the_memory_that_they_free(cluster: Dask) -> None:
    for worker in cluster.client.scheduler_info()["workers"]:
        faults = cluster.client.submit(faults_of_arrays, workers=[worker], pure=False).result()
        assert faults < 5_000  # of 16,000 where every array is new to the process


def faults_of_arrays() -> int:
    """Pages that the system gave to this process while it made and freed an array of 800 of them twenty times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(400_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_without_dask_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = re.escape(
        "distributed is not installed; install what --engine dask needs with pip install 'propensity[dask]'"
    )
    with pytest.raises(PropensityError, match=said), distributed.connected():
        pass


def test_dask_is_imported_only_when_it_is_asked_for() -> None:
    found = [one for one in imports(ROOT) if one.library in ("dask", "distributed")]
    assert {one.importer for one in found if not one.at_start} == {"training.distributed"}
    assert [one for one in found if one.at_start] == []


def refused(monkeypatch: pytest.MonkeyPatch, address: str, answer_s: float) -> str:
    """What is said of an address at which there is no scheduler."""
    monkeypatch.setattr(distributed, "CONNECT_S", 0.2)
    monkeypatch.setattr(distributed, "ANSWER_S", answer_s)
    with pytest.raises(PropensityError) as told, distributed.connected(address):
        pass
    said = str(told.value)
    assert said.startswith(f"no Dask scheduler answers at {address} (")
    assert "write the address that it prints, as tcp://10.0.0.5:8786" in said
    return said


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "http://127.0.0.1:9", "scheduler"])
def test_an_address_without_a_scheduler_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    refused(monkeypatch, address, 60)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_at_which_something_else_answers_is_told(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    class Greets(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(answer)
            self.request.recv(1 << 16)

    with socketserver.TCPServer(("127.0.0.1", 0), Greets) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        said = refused(monkeypatch, f"tcp://127.0.0.1:{server.server_address[1]}", 60)
        server.shutdown()
        thread.join()
    assert "(something else does)" in said


def test_an_address_at_which_nothing_is_ever_answered_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said = refused(monkeypatch, f"tcp://127.0.0.1:{silent.getsockname()[1]}", 0.5)
    assert "(nothing of Dask in 0.5 s)" in said


def test_the_address_of_a_worker_is_told(cluster: Dask, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(monkeypatch, min(cluster.client.scheduler_info()["workers"]), 60)


def test_workers_of_another_file_system_are_told(
    cluster: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_ask", lambda function, path: {"tcp://elsewhere:1": (False, "0.1.0")})
    said = "tcp://elsewhere:1 does not see .*; all workers need one file system"
    with pytest.raises(PropensityError, match=said), cluster.workdir(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
