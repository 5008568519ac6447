"""An audience that is removed: nobody is in it, everybody is told to have left, and its lists are emptied."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from audiences import definitions, removal
from service.core.errors import PropensityError
from service.members import Members
from service.store import Store

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000
NOW_MS = 1_790_000_000_000
READ = definitions.read("audiences: {best: {last_event: {within: 1d}}}", "test.yaml")


class Interrupted(Exception):
    """The process that removes ends here."""


class Interrupting(Members):
    """Takes some changes, and then the process ends."""

    allowance = 2

    async def change(
        self, audience: str, entered: Mapping[str, int], left: Sequence[str], at_ms: int, why: str
    ) -> None:
        if not self.allowance:
            raise Interrupted
        self.allowance -= 1
        await super().change(audience, entered, left, at_ms, why)


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    found = Store.open(store_url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    yield found
    await found.close()


@pytest.fixture
async def members(store: Store) -> Members:
    """`old` with its hold-out, which the definitions do not name, and `best`, which they do."""
    found = Members(store)
    for name, count in {"old": 25, "old.control": 5, "best": 3}.items():
        await found.change(name, {f"{name} {place}": NOW_MS for place in range(count)}, [], NOW_MS, "qualifies")
        await found.describe(name, '{"destinations": ["ours", "theirs"]}', NOW_MS)
    return found


async def is_over(members: Members) -> None:
    """Nothing is left of `old` but its changes, and all is left of `best`."""
    assert [(one.name, one.size, one.described_ms, one.definition) for one in await members.names()] == [
        ("best", 3, NOW_MS, '{"destinations": ["ours", "theirs"]}'),
        ("old", 0, 0, ""),
        ("old.control", 0, 0, ""),
    ]
    for name, count in {"old": 25, "old.control": 5}.items():
        changes = (await members.changes(name, "", 1000)).items
        assert [one.entered for one in changes] == [True] * count + [False] * count
        assert {one.visitor_id for one in changes[count:]} == {f"{name} {place}" for place in range(count)}
        assert {(one.why, one.at_ms) for one in changes[count:]} == {("removed", NOW_MS + 1)}
    assert not [one for one in (await members.changes("best", "", 1000)).items if not one.entered]


async def test_everybody_leaves_and_only_the_changes_are_left(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "PAGE", 10)
    assert await removal.remove(members, "old", NOW_MS + 1) == 30
    await is_over(members)
    assert await removal.remove(members, "old", NOW_MS + 2) == 0
    await is_over(members)


async def test_a_removal_that_was_cut_off_is_ended_by_another_one(
    members: Members, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "PAGE", 10)
    with pytest.raises(Interrupted):
        await removal.remove(Interrupting(store), "old", NOW_MS + 1)
    assert removal.chosen(await members.names(), READ, ["old"])[0].size == 15
    await removal.remove(members, "old", NOW_MS + 1)
    await is_over(members)


async def test_no_key_of_a_removed_audience_is_kept_for_good(members: Members, store: Store) -> None:
    await removal.remove(members, "old", NOW_MS + 1)
    keys = await store.run(("KEYS", f"{store.namespace}:a:*{{old*"))
    assert not [key for key in keys[0] if b":a:s:" in key], "no set of members"
    lives = await store.run(*(("PTTL", key) for key in keys[0]))
    assert lives
    assert all(0 < life <= 90 * DAY_MS for life in lives)


async def test_who_comes_back_under_the_name_is_new(members: Members) -> None:
    await removal.remove(members, "old", NOW_MS + 1)
    await members.change("old", {"old 1": NOW_MS + 2}, [], NOW_MS + 2, "qualifies")
    await members.describe("old", "{}", NOW_MS + 2)
    found = await members.find("old")
    assert found is not None
    assert (found.size, found.described_ms, found.definition) == (1, NOW_MS + 2, "{}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("best", "best is in the definitions, and the next refresh would make it again; take it out of the file first"),
        ("odl", "there is no audience 'odl' to remove; did you mean 'old'?"),
        ("old.control", "there is no audience 'old.control' to remove; write one of old"),
    ],
)
async def test_what_cannot_be_removed_is_told(members: Members, name: str, said: str) -> None:
    with pytest.raises(PropensityError) as told:
        removal.chosen(await members.names(), READ, [name])
    assert str(told.value) == said


async def test_what_was_removed_is_there_no_more(members: Members) -> None:
    assert [one.name for one in removal.chosen(await members.names(), READ, ["old", "old"])] == ["old"]
    assert removal.destinations((await members.names())[1]) == ["ours", "theirs"]
    await removal.remove(members, "old", NOW_MS + 1)
    with pytest.raises(PropensityError, match="there is no audience 'old' to remove$"):
        removal.chosen(await members.names(), READ, ["old"])
