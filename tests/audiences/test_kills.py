"""The proof of `make sync-kills`, in short."""

from __future__ import annotations

import pytest

from tests.audiences import kills


@pytest.mark.parametrize("ledger", ["sqlite", "postgresql"])
def test_killed_at_random_points_the_command_ends_with_what_should_be_there(
    ledger: str, request: pytest.FixtureRequest
) -> None:
    address = str(request.getfixturevalue("postgres_url")) if ledger == "postgresql" else None
    proof = kills.prove(address, points=4, seed=7, visitors=40)
    assert proof.kills == 4
    assert proof.completed >= 4
    assert proof.members_sent > proof.members_sent_again
