"""The commands `audiences sync` and `audiences triggers`, over a real feature cache."""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from rich.console import Console

from audiences import ledger as ledgers
from audiences import tables
from audiences.status import Checked, Pile, Reason, State
from audiences.status import Run as LastRun
from audiences.sync import Counts
from cli import main as command_line
from cli.audiences import status as showing
from cli.audiences.sync import _print
from service import identity
from service.embedded import EmbeddedServer
from service.persons import Persons
from tests.audiences.hooks import hooked
from tests.audiences.kills import AUDIENCES, MODEL, Visitor, World
from tests.audiences.receiving import SECRET, Receiving


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(
    embedded_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    world: World,
) -> Run:
    """Runs `propensity audiences ...` in a directory of its own, with the cache that the world is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROPENSITY_REDIS_URL", embedded_server.url)
    monkeypatch.setenv("PROPENSITY_NAMESPACE", world.store.namespace)
    monkeypatch.setenv("HOOK", SECRET)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["propensity", "audiences", *arguments])
        try:
            command_line.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture
def world(embedded_server: EmbeddedServer, request: pytest.FixtureRequest) -> Iterator[World]:
    """Visitors in a namespace of their own."""
    found = World(embedded_server.url, 12, random.Random(3), namespace=f"t{zlib.crc32(request.node.name.encode())}")
    yield found
    found.close()


def destinations(path: Path, **given: dict[str, Any]) -> None:
    (path / "destinations.yaml").write_text(yaml.safe_dump({"destinations": given}))


def lists(url: str = "lists") -> dict[str, Any]:
    fields = ["segment", "model"]
    return {"kind": "files", "url": url, "purpose": "ads", "format": "ndjson", "fields": fields, "changes": False}


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_who_wonders_why_a_list_is_empty_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    _print([Counts("vip", wanted=80, below=100), Counts("all", wanted=3)], "ours", dry_run=False)
    assert capsys.readouterr().err.splitlines() == [
        "Note: the list of vip is empty: 80 people may be sent, fewer than its min_size, 100"
    ]


def test_what_became_of_earlier_batches_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counts("vip", working=1200, notes=["job 5000: FAILED: 3 were not added after all; 3 are sent again"])
    _print([counts], "ours", dry_run=False)
    assert capsys.readouterr().err.splitlines() == [
        "Note: vip: job 5000: FAILED: 3 were not added after all; 3 are sent again",
        "Note: vip: the platform still works off 1,200 members; the next run asks what became of them",
    ]
    assert counts.plain()["notes"] == counts.notes


def test_a_list_goes_from_the_feature_cache_into_a_file(run: Run, world: World, tmp_path: Path) -> None:
    destinations(tmp_path, ours=lists())
    assert run("sync", "--to", "ours", "--dry-run", "--json").status == 0
    assert not (tmp_path / "lists").exists()
    done = run("sync", "--to", "ours", "--json")
    assert (done.status, done.err) == (0, "")
    should = world.lists()
    for counts in json.loads(done.out):
        assert counts["added"] == counts["wanted"] == len(should[counts["audience"]]) > 0
    for audience in AUDIENCES:
        found = rows(tmp_path / "lists" / f"{audience}.ndjson")
        assert set(found) == set(should[audience])
        for key, row in found.items():
            assert row["google.email"] == should[audience][key]["identifiers"]["google.email"]
            assert (row["segment"], row["model"]) == (should[audience][key]["fields"]["segment"], MODEL)
    table = run("sync", "first", "--to", "ours")
    assert (table.status, "ours: what was sent" in table.out) == (0, True)


def test_a_dry_run_makes_no_ledger_and_says_that_there_is_none(run: Run, world: World, tmp_path: Path) -> None:
    destinations(tmp_path, ours=lists())
    ledger = ("--ledger", f"sqlite:///{tmp_path / 'ledgers' / 'one.db'}")
    before = run("sync", "--to", "ours", "--dry-run", *ledger)
    assert (before.status, "so nothing is known to have been sent" in before.err) == (0, True)
    assert not (tmp_path / "ledgers").exists()
    assert run("sync", "--to", "ours", *ledger).status == 0
    assert run("sync", "--to", "ours", "--dry-run", *ledger).err == ""


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "the ledger sqlite:// would be gone with this command; write sqlite:///ledger.db"),
        ("sqlite:///:memory:", "would be gone with this command"),
        ("postgresql://host:port/ledger", "the ledger's address is neither SQLite nor PostgreSQL; write sqlite:///"),
    ],
)
def test_an_address_that_is_no_ledgers_is_refused_before_anything_is_sent(
    run: Run, world: World, tmp_path: Path, url: str, said: str
) -> None:
    destinations(tmp_path, ours=lists())
    done = run("sync", "--to", "ours", "--ledger", url)
    assert (done.status, said in done.err) == (2, True)
    assert not (tmp_path / "lists").exists()


def test_who_is_erased_or_withdraws_is_gone_from_everything_after_the_next_run(
    run: Run, world: World, tmp_path: Path
) -> None:
    destinations(tmp_path, ours=lists())
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    assert run("sync", "--to", "ours", "--ledger", url).status == 0
    erased, withdrawn = [one for one in world.visitors if one.allowed and one.audiences == set(AUDIENCES)][:2]
    world.runner.run(Persons(world.store).erase(erased.name))
    withdrawn.allowed = False
    world.write(withdrawn)
    done = run("sync", "--to", "ours", "--ledger", url, "--json")
    assert [one["why"] for one in json.loads(done.out)] == [{"remove: consent": 1, "remove: erased": 1}] * 2
    for audience in AUDIENCES:
        assert not {erased.key, withdrawn.key} & set(rows(tmp_path / "lists" / f"{audience}.ndjson"))
    with ledgers.opened(url) as ledger, ledger.reading.connect() as connection:
        text = "".join(
            str(row) for table in tables.all_tables.sorted_tables for row in connection.execute(table.select())
        )
    assert hash_of(erased) not in text
    assert hash_of(withdrawn) not in text


def test_an_audience_that_is_removed_is_gone_from_its_list_after_the_next_run(
    run: Run, world: World, tmp_path: Path
) -> None:
    destinations(tmp_path, ours=lists())
    (tmp_path / "audiences.yaml").write_text("audiences: {first: {last_event: {within: 1d}}}")
    ledger = ("--ledger", f"sqlite:///{tmp_path / 'ledger.db'}")
    without = run("remove", "second", *ledger)
    assert (without.status, "so it is not known who is on the lists of ours" in without.err) == (2, True)
    assert run("sync", "--to", "ours", *ledger).status == 0
    held = rows(tmp_path / "lists" / "second.ndjson")
    inside = sum("second" in one.audiences for one in world.visitors)
    for arguments, status in (("--dry-run",), 0), ((), 2):
        shown = run("remove", "second", *arguments, *ledger)
        assert shown.status == status
        line = next(line for line in shown.out.splitlines() if "second" in line)
        assert [cell.strip() for cell in line.strip("│").split("│")] == [
            "second",
            f"{inside}",
            "0",
            f"ours {len(held)}",
        ]
        assert ("would empty lists at ours; say --yes if that is meant" in shown.err) == bool(status)
        assert world.runner.run(world.members.size("second")) == inside
    done = run("remove", "second", "--yes", *ledger)
    assert done.status == 0
    assert done.err.splitlines() == [
        f"{inside} left, those held out among them.",
        "To empty its lists: propensity audiences sync --to ours",
    ]
    assert world.runner.run(world.members.size("second")) == 0
    synced = run("sync", "--to", "ours", "--json", *ledger)
    why = {one["audience"]: one["why"] for one in json.loads(synced.out)}
    assert why == {"first": {}, "second": {"remove: deleted": len(held)}}
    assert rows(tmp_path / "lists" / "second.ndjson") == {}
    assert "there is no audience 'second' to remove" in run("remove", "second", *ledger).err


def test_where_no_audience_is_left_it_is_said_how_the_lists_are_emptied(run: Run, world: World, tmp_path: Path) -> None:
    destinations(tmp_path, ours=lists())
    (tmp_path / "audiences.yaml").write_text("audiences: {third: {last_event: {within: 1d}}}")
    ledger = ("--ledger", f"sqlite:///{tmp_path / 'ledger.db'}")
    assert run("sync", "--to", "ours", *ledger).status == 0
    told = run("remove", "first", "second", "--yes", *ledger).err.splitlines()[-1]
    assert told == "To empty its lists: propensity audiences sync --to ours --remove-all"
    assert run("sync", "--to", "ours", *ledger).status == 2
    assert run(*told.partition("propensity audiences ")[2].split(), *ledger).status == 0
    assert rows(tmp_path / "lists" / "first.ndjson") == {}


def test_a_destination_that_is_not_in_the_file_any_more_and_has_members_is_told(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    destinations(tmp_path, ours=lists(), theirs=lists("more"))
    assert run("sync", "--to", "ours", "--ledger", url).err == ""
    destinations(tmp_path, theirs=lists("more"))
    said = run("sync", "--to", "theirs", "--ledger", url).err
    assert said.startswith("Note: ours still has members and is not in destinations.yaml, so nobody who withdraws is")


def want_somebody_refused(world: World) -> None:
    """Somebody whom the receiver does not take: it refuses keys that begin with f."""
    while not any(key.startswith("f") for key in world.lists()["first"]):
        one = world.new()
        one.allowed, one.audiences = True, {"first"}
        world.visitors.append(one)
        world.write(one)


# --- status ---


def test_the_status_of_lists_and_runs_is_shown_without_ids_or_keys(run: Run, world: World, tmp_path: Path) -> None:
    with Receiving() as receiver:
        webhook = {"kind": "webhook", "url": receiver.url, "secret": "${HOOK}", "purpose": "ads"}
        destinations(tmp_path, ours=webhook)
        want_somebody_refused(world)
        ledger = ("--ledger", f"sqlite:///{tmp_path / 'ledger.db'}")
        assert run("sync", "--to", "ours", *ledger).status == 1
        assert run("sync", "second", "--to", "ours", *ledger).status == 0
    done = run("status", *ledger, "--json")
    assert (done.status, done.err) == (0, "")
    told = json.loads(done.out)
    should = world.lists()
    bad = sum(key.startswith("f") for key in should["first"])
    states = {(one["destination"], one["audience"]): one for one in told["lists"]}
    assert set(states) == {("ours", "first"), ("ours", "second")}
    first = states["ours", "first"]
    assert (first["has"], first["refused"]) == (len(should["first"]) - bad, bad)
    assert first["reasons"] == [{"words": "of no use here", "members": bad}]
    assert [(one["destination"], one["audience"]) for one in told["runs"]] == [("ours", "second"), ("ours", None)]
    assert told["checks"] == []
    table = run("status", *ledger)
    assert (table.status, table.err) == (0, "")
    for heading in ("What destinations have", "Why members are refused", "The last runs"):
        assert heading in table.out
    assert f"{len(should['first'])} of first sent" in table.out
    for visitor in world.visitors:
        assert visitor.name not in done.out + table.out
        assert visitor.key not in done.out + table.out
    assert "first" not in run("status", "second", "--to", "ours", *ledger).out.partition("The last runs")[0]
    none = run("status", "third", "--to", "theirs", *ledger)
    assert none == Done(0, "", "Note: the ledger has no list of third at theirs\n")


def test_in_eighty_columns_nothing_of_a_status_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = State(
        destination="a_destination_with_a_long_name",
        audience="an_audience_whose_name_is_as_long_as_it_may_be_56_letters",
        has=1_234_567,
        synced_ms=0,
        refused=20_000,
        reasons=[Reason("a reason " + 19 * "word " + "end", 20_000)],
        unknown=Pile(3, 30_000),
        working=Pile(12, 120_000),
    )
    last = LastRun(state.destination, state.audience, "process 77 of elsewhere", 0, None, None, False)
    monkeypatch.setattr(showing, "console_of_results", lambda: Console(width=80))
    showing._print([state], [last], [Checked(state.destination, False, "x" * 200)], 5 * 86_400_000)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert all(whole in out for whole in ("1,234,567", "5 days ago", "20,000", "1970-01-01T00:00:00Z"))
    assert sum(line.count("x") for line in out.splitlines() if line.startswith("│")) >= 200


def test_where_there_is_no_ledger_a_status_says_so_and_makes_none(run: Run, tmp_path: Path) -> None:
    done = run("status", "--ledger", f"sqlite:///{tmp_path / 'none.db'}")
    assert (done.status, done.out) == (0, "")
    assert done.err.startswith(f"Note: there is no ledger at sqlite:///{tmp_path / 'none.db'}, so nothing is known")
    assert not (tmp_path / "none.db").exists()


def test_a_check_asks_every_destination_and_fails_with_the_one_that_does_not_let_us_in(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("is no directory")
    hook = {"kind": "webhook", "url": "https://hooks.example.com/", "secret": "${HOOK}", "purpose": "ads"}
    destinations(tmp_path, hook=hook, good=lists(), bad=lists("taken/lists"), wrong={"kind": "filse"})
    ledger = ("--ledger", f"sqlite:///{tmp_path / 'ledger.db'}")
    done = run("status", "--check", "--json", *ledger)
    assert done.status == 1
    answers = {one["destination"]: one["works"] for one in json.loads(done.out)["checks"]}
    assert answers == {"hook": None, "good": True, "bad": False, "wrong": False}
    assert not (tmp_path / "ledger.db").exists()
    assert run("status", "--check", "--to", "good", *ledger).status == 0
    shown = run("status", "--check", "--to", "wrong", *ledger)
    assert shown.status == 1
    assert "did you mean 'files'?" in shown.out
    (tmp_path / "destinations.yaml").write_text("triggers: {}")
    assert "no destinations; write destinations: NAME:" in run("status", "--check", *ledger).err


def hash_of(one: Visitor) -> str:
    return identity.hashed("google.email", one.email)


def test_exit_codes_tell_refusals_other_runs_and_mistakes(run: Run, world: World, tmp_path: Path) -> None:
    with Receiving() as receiver:
        webhook = {"kind": "webhook", "url": receiver.url, "secret": "${HOOK}", "purpose": "ads", "members": 50}
        destinations(tmp_path, ours=webhook)
        want_somebody_refused(world)
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        assert run("sync", "--to", "ours", "--ledger", url).status == 1
        with ledgers.opened(url) as ledger:
            assert ledger.leases.take("ours", "elsewhere/1/77/x", time.time_ns() // 10**6, 60_000) is None
        held = run("sync", "--to", "ours", "--ledger", url)
        assert held.status == 3
        assert held.err.startswith("propensity: process 77 of elsewhere is synchronising ours; wait for it with --wait")
    for arguments, said in [
        (("sync", "--to", "theirs"), "destinations.yaml: no destination 'theirs'; it has ours"),
        (("sync", "third", "--to", "ours"), "no audience 'third'; there is first, second"),
        (("sync", "--to", "ours", "--ledger", "mysql://x"), "the ledger's address is neither SQLite nor PostgreSQL"),
        (("sync", "--to", "ours", "--destinations", "none.yaml"), "none.yaml: no such file; name the"),
        (("triggers", "run"), "destinations.yaml: no triggers; write triggers: NAME:"),
    ]:
        done = run(*arguments)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith(f"propensity: {said}")


def test_a_ledger_that_does_not_answer_is_told_in_one_line_without_its_password(run: Run, tmp_path: Path) -> None:
    destinations(tmp_path, ours=lists())
    done = run("sync", "--to", "ours", "--ledger", "postgresql://me:hidden@127.0.0.1:1/none")
    assert done.status == 2
    assert done.err.startswith("propensity: the ledger postgresql://me:***@127.0.0.1:1/none failed: ")
    assert done.err.count("\n") == 1
    assert "hidden" not in done.err


def test_moves_are_told_by_triggers_and_the_dead_are_listed_and_replayed(
    run: Run, world: World, tmp_path: Path
) -> None:
    with hooked() as hook:
        sales = {"url": hook.url, "secret": "${HOOK}", "start": "kept", "attempts": 1, "events": ["segment_entered"]}
        (tmp_path / "destinations.yaml").write_text(yaml.safe_dump({"triggers": {"sales": sales}}))
        unlucky = world.visitors[0]
        hook.answers[unlucky.name] = 500
        done = run("triggers", "run")
        assert (done.status, done.out) == (1, "")
        assert "sales: 12 events taken, 11 delivered, 1 attempts failed, 1 died" in done.err
        assert {one["data"]["visitor_id"] for one in hook.told} == {one.name for one in world.visitors[1:]}
        [dead] = json.loads(run("triggers", "dead", "--json").out)
        assert dead["body"]["data"]["visitor_id"] == unlucky.name
        assert "answers 500: Internal Server Error" in run("triggers", "dead").out
        assert run("triggers", "replay", "--event", "evt_none").status == 2
        hook.answers.clear()
        assert "1 events wait again" in run("triggers", "replay").err
        assert run("triggers", "run").status == 0
        assert hook.of(unlucky.name) == [unlucky.segment]
        assert len(set(hook.ids)) == len(hook.ids) == 12


def test_erased_visitors_are_told_of_by_key_alone(run: Run, world: World, tmp_path: Path) -> None:
    with hooked() as hook:
        moves = {"url": hook.url, "secret": "${HOOK}", "events": ["audience_left"]}
        (tmp_path / "destinations.yaml").write_text(yaml.safe_dump({"triggers": {"moves": moves}}))
        assert run("triggers", "run").status == 0
        erased = next(one for one in world.visitors if one.audiences == {"first"})
        world.runner.run(Persons(world.store).erase(erased.name))
        assert run("triggers", "run").status == 0
        [event] = hook.told
        assert event["data"] == {
            "visitor_id": None,
            "visitor_key": erased.key,
            "audience": "first",
            "why": "erased",
        }
