"""`propensity score --events`: everybody in the files gets what the running service says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow.parquet as pq
import pytest

from files import snapshots
from service.embedded import EmbeddedServer
from tests.cli.test_commands import Done, propensity
from tests.conftest import ServiceProcess, Shop

ASKED = 400


@pytest.fixture(scope="module")
def hardly_known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More event files: visitors of whom little is known."""
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    lines: list[dict[str, Any]] = [
        {"type": "identify", "userId": "told", "traits": {"device": "tablet"}, "timestamp": now_ms - 1000},
        {"event": "Product Viewed", "userId": "later", "timestamp": now_ms + 3_600_000, "properties": {"price": 9}},
        {"event": "Something Else", "userId": "ignored", "timestamp": now_ms - 1000},
    ]
    path = tmp_path_factory.mktemp("more") / "more.ndjson"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def served(
    open_shop: Shop, hardly_known: Path, embedded_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """A service that knows the shop and those visitors by `propensity replay`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROPENSITY_REDIS_URL", embedded_server.url)
        patch.setenv("PROPENSITY_NAMESPACE", "everybody")
        files = ("--events", open_shop.events, "--events", hardly_known)
        assert propensity("replay", *files, "--spec", open_shop.spec).status == 0
    process = ServiceProcess(
        tmp_path_factory.mktemp("service"),
        redis_url=embedded_server.url,
        namespace="everybody",
        artifacts=open_shop.artifacts,
    )
    process.wait_until_ready()
    yield process
    process.end()


def score(shop: Shop, out: Path, *arguments: object) -> Done:
    return propensity("score", "--events", shop.events, "--artifacts", shop.artifacts, "--out", out, *arguments)


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["visitor_id"]: row for row in pq.read_table(out).to_pylist()}


def test_everybody_gets_the_score_of_the_running_service(
    open_shop: Shop, hardly_known: Path, served: ServiceProcess, tmp_path: Path
) -> None:
    """To the bit, as of the moment of each answer: the service writes six digits of the propensity, files all."""
    done = score(open_shop, tmp_path / "now", hardly_known)
    assert (done.status, done.out) == (0, "")
    everybody = sorted(rows(tmp_path / "now"))
    assert f"{len(everybody):,} visitors scored by purchase_5d " in done.err
    asked = [*everybody[:: -(-len(everybody) // ASKED)], "told", "later", "ignored"]
    body = {"visitors": [{"visitor_id": one, "context": {"referrer": "email"}} for one in asked]}
    answers = httpx2.post(f"{served.url}/v1/score/batch", json=body, timeout=30).json()["results"]
    assert [answer["visitor_id"] for answer in answers] == asked
    assert all(answer["degraded"] == [] for answer in answers)
    found = {}
    for moment in {answer["scored_at"] for answer in answers}:  # one a group, and a busy machine scores in small groups
        arguments = (hardly_known, "--at", moment, "--context", "referrer=email")
        assert score(open_shop, tmp_path / "then", *arguments).status == 0
        found[moment] = rows(tmp_path / "then")
    counted = 0
    for answer in answers:
        row = found[answer["scored_at"]][answer["visitor_id"]]
        assert float(f"{row['propensity']:.6g}") == answer["propensity"]
        assert row["percentile"] == np.float32(answer["percentile"])
        assert (row["segment"], row["model"], row["version"]) == (
            *(answer["segment"], answer["model"]),
            answer["version"],
        )
        at_ms = round(datetime.fromisoformat(answer["scored_at"]).timestamp() * 1000)
        age_s = answer["last_event_age_s"]
        assert row["last_event_ms"] == (0 if age_s is None else at_ms - round(age_s * 1000))
        counted += age_s is not None
    assert counted > 100
    assert len({answer["segment"] for answer in answers}) >= 4


@pytest.mark.parametrize("at", ["2200-01-01", "1990-01-01"])
def test_a_moment_at_which_no_event_counts_is_pointed_out(open_shop: Shop, tmp_path: Path, at: str) -> None:
    done = score(open_shop, tmp_path / "scores", "--at", at)
    assert done.status == 0
    assert "Note: everybody is scored as somebody new: the events are of 20" in done.err
    assert f"none of them counts at {at}; name the moment with --at" in done.err
    assert {row["last_event_ms"] for row in rows(tmp_path / "scores").values()} == {0}
    assert "Note:" not in score(open_shop, tmp_path / "scores").err


def test_bundles_are_looked_for_where_the_service_looks(
    open_shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROPENSITY_ARTIFACTS", str(open_shop.artifacts))
    scored = propensity("score", "--events", open_shop.events, "--features", "all", "--out", "scores")
    assert scored.status == 0, scored
    assert "PSI" in propensity("drift", "--offline", "scores").out
    given = propensity("drift", "--offline", "scores", "--artifacts", "elsewhere")
    assert given.complaint.startswith("elsewhere: ")


def test_scores_go_to_a_url_as_to_a_path(open_shop: Shop, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/scores"
    done = propensity("score", "--events", open_shop.events, "--artifacts", open_shop.artifacts, "--out", url)
    assert (done.status, f" into {url}: " in done.err) == (0, True), done
    assert len(snapshots.find(url).parts) >= 1


def test_a_version_and_features_are_chosen_and_wrong_names_told(open_shop: Shop, tmp_path: Path) -> None:
    version = open_shop.model.name
    done = score(open_shop, tmp_path / "out", "--version", version, "--features", "views, device", "--threads", 1)
    assert done.status == 0
    assert pq.read_schema(next((tmp_path / "out").iterdir())).names[-2:] == ["views", "device"]
    for arguments, said in (
        (("--version", "none"), f"holds no version 'none'; there is {version}"),
        (("--model", "none"), "holds no model 'none'; there is purchase_5d"),
        (("--features", "none"), "--features none: model purchase_5d has no such feature; there are views_1d"),
    ):
        assert said in score(open_shop, tmp_path / "out", *arguments).complaint


def test_of_several_models_one_has_to_be_named(open_shop: Shop, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    for name in ("one", "two"):
        shutil.copytree(open_shop.artifacts / "purchase_5d", artifacts / name)
    done = propensity("score", "--events", open_shop.events, "--artifacts", artifacts, "--out", tmp_path / "out")
    assert done.complaint.endswith("holds one, two; name one with --model")


def test_a_cluster_of_own_processes_is_started_where_dask_is_asked_for(open_shop: Shop, tmp_path: Path) -> None:
    done = score(open_shop, tmp_path / "out", "--engine", "dask", "--threads", 1, "--at", "2026-07-01")
    assert (done.status, done.out) == (0, "")
    assert "visitors scored by purchase_5d" in done.err
