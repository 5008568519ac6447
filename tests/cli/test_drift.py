"""The command `drift` on files, and what it says where it cannot answer. Its Prometheus is in tests/deploy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from files import snapshots
from service.core import bundle
from tests.cli.test_commands import Run, propensity, run
from tests.conftest import ServiceProcess, WriteBundle

__all__ = ["run"]  # a fixture


@pytest.fixture
def as_trained(tmp_path: Path, artifacts: Path) -> Path:
    """A file of 1,000 scores that are spread as the reference says: a fifth missing, three tenths below 1."""
    model = bundle.load(artifacts / "shop" / "1")
    values = np.repeat(np.array([np.nan, 0.5, 1], np.float32), [200, 300, 500])
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table(dict.fromkeys((*model.spec.names, "propensity"), values)), path)
    return path


def test_nothing_drifts_where_scores_are_spread_as_in_training(as_trained: Path, artifacts: Path) -> None:
    done = propensity("drift", "--offline", as_trained, "--artifacts", artifacts)
    assert done.status == 0, done.err
    assert "1,000 scores" in done.out
    lines = json.loads(propensity("drift", "--offline", as_trained, "--artifacts", artifacts, "--json").out)
    assert max(line["psi"] for line in lines) < 1e-6
    assert {line["missing"] for line in lines} == {0.2}


def test_a_feature_that_moved_is_named_and_ends_the_command_with_1(as_trained: Path, artifacts: Path) -> None:
    table = pq.read_table(as_trained)
    pq.write_table(table.set_column(0, table.column_names[0], pa.array(np.zeros(1000, np.float32))), as_trained)
    done = propensity("drift", "--offline", as_trained, "--artifacts", artifacts, "--json")
    assert done.status == 1
    assert [line["feature"] for line in json.loads(done.out) if line["drifts"]] == [table.column_names[0]]


def test_a_snapshot_is_read_from_an_object_store(run: Run, as_trained: Path, tmp_path: Path, artifacts: Path) -> None:
    scored = pq.read_table(as_trained)
    url, asked = f"memory://{tmp_path.name}/scores", ("--artifacts", artifacts, "--json")
    for part in (scored.slice(0, 100), scored):  # the snapshot that was here before does not count
        with snapshots.assembling(url) as directory:
            pq.write_table(part.slice(0, 600), directory / "part-00000.parquet")
            pq.write_table(part.slice(600), directory / "part-00001.parquet")
    at_url = run("drift", "--offline", url, *asked)
    assert at_url.status == 0, at_url.err
    assert at_url.out == run("drift", "--offline", as_trained, *asked).out
    both = json.loads(run("drift", "--offline", url, "--offline", as_trained, *asked).out)
    assert {line["population"] for line in both} == {2000}
    told = run("drift", "--offline", f"{url}/none", *asked).complaint
    assert told == f"{url}/none: holds no part-*.parquet; give what propensity score --out URL wrote"
    assert "Protocol not known: nosuch" in run("drift", "--offline", "nosuch://bucket/x", *asked).complaint


def test_what_is_no_parquet_at_a_url_is_told(run: Run, tmp_path: Path, artifacts: Path) -> None:
    (tmp_path / "part-00000.parquet").write_text("nothing")
    told = run("drift", "--offline", f"file://{tmp_path}", "--artifacts", artifacts).complaint
    assert told.startswith(f"file://{tmp_path}: ")
    assert "Could not read schema" in told


def test_of_several_models_one_has_to_be_named(as_trained: Path, tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path / "artifacts")
    (tmp_path / "artifacts" / "other").mkdir()
    done = propensity("drift", "--offline", as_trained, "--artifacts", tmp_path / "artifacts")
    assert "Write --model NAME; it has other, shop" in done.complaint
    asked = ("drift", "--offline", as_trained, "--artifacts", tmp_path / "artifacts", "--model", "shop")
    assert propensity(*asked).status == 0
    assert propensity(*asked, "--version", "1").status == 0


def test_a_file_without_a_feature_says_which(as_trained: Path, artifacts: Path) -> None:
    table = pq.read_table(as_trained)
    pq.write_table(table.drop_columns(["propensity", table.column_names[0]]), as_trained)
    complaint = propensity("drift", "--offline", as_trained, "--artifacts", artifacts).complaint
    assert f"has no column {table.column_names[0]}, propensity" in complaint


def test_a_file_without_rows_has_nothing_to_compare(as_trained: Path, artifacts: Path) -> None:
    pq.write_table(pq.read_table(as_trained).slice(0, 0), as_trained)
    assert "no rows" in propensity("drift", "--offline", as_trained, "--artifacts", artifacts).complaint


def test_text_where_numbers_belong_is_refused(as_trained: Path, artifacts: Path) -> None:
    table = pq.read_table(as_trained)
    pq.write_table(table.set_column(0, table.column_names[0], pa.array(["mobile"] * 1000)), as_trained)
    assert "mobile" in propensity("drift", "--offline", as_trained, "--artifacts", artifacts).complaint


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ((), "give either --prometheus URL or --offline FILES"),
        (("--prometheus", "http://127.0.0.1:1", "--offline", "x"), "give either --prometheus URL or --offline FILES"),
        (("--prometheus", "http://127.0.0.1:1", "--window", "2h"), "write --window 1h or --window 24h"),
        (("--prometheus", "http://127.0.0.1:1"), "cannot be reached"),
        (("--prometheus", "localhost:9090"), "write --prometheus http://127.0.0.1:9090"),
        (("--offline", "nowhere.parquet"), "no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: tuple[str, ...], answer: str, artifacts: Path) -> None:
    assert answer in propensity("drift", *arguments, "--artifacts", artifacts).complaint


def test_a_service_is_no_prometheus(service: ServiceProcess) -> None:
    assert "answers 404" in propensity("drift", "--prometheus", service.url).complaint
