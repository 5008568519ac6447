"""The proof of `make sync-kills`, in short."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.audiences import kills
from tests.audiences.forks import Forks
from tests.audiences.postgres import both


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks") / "out") as started:
        yield started


@both
def test_killed_at_random_points_the_command_ends_with_what_should_be_there(forks: Forks, ledger_url: str) -> None:
    proof = kills.prove(forks, ledger_url, points=3, seed=7, visitors=30)
    assert proof.kills == 3
    assert proof.completed >= 3
    assert proof.members_sent > proof.members_sent_again
