"""The synchronisation itself against stand-ins of Google and Meta: changes, faults and kills, then lists as wanted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import SecretStr

from audiences import ledger, sync
from audiences.destinations import data_manager, google, meta
from audiences.destinations.protocol import Busy, Destination, Limits, Outcome, Person, Purpose
from audiences.destinations.registry import Sending
from audiences.wanted import Candidate
from tests.audiences.stubs import googleapis
from tests.audiences.stubs import meta as meta_stub
from tests.audiences.stubs.data_manager import DataManagerStub
from tests.audiences.stubs.google import GoogleStub
from tests.audiences.stubs.googleapis import GoogleApi, Identifier
from tests.audiences.stubs.meta import MetaStub

pytestmark = pytest.mark.usefixtures("trusted")

FORMS = (*google.FIELDS, *meta.KEYS)
AUDIENCES = ("champions", "nurture")
KILLS = 30  # at each platform; each costs fifty milliseconds, most of them the disk's


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Killed(BaseException):
    """What nothing catches."""


@dataclass
class World:
    """Visitors by name: their addresses, consent and audiences; some share an address with another."""

    dice: random.Random
    visitors: dict[str, tuple[Mapping[str, tuple[str, ...]], bool, frozenset[str]]] = field(default_factory=dict)

    def change(self, count: int) -> None:
        for _ in range(count):
            name = f"visitor-{self.dice.randrange(40)}"
            number = self.dice.randrange(1000)
            household = self.dice.randrange(3)
            values = {
                form: tuple(sorted({sha(f"{form} {name} {number + one}") for one in range(self.dice.randrange(3))}))
                for form in FORMS
                if form != "meta.external_id"
            }
            if household == 0:
                values["google.phone"] = values["meta.phone"] = (sha(f"household {number % 5}"),)
            values["meta.external_id"] = (sha(name),) if self.dice.random() < 0.5 else ()
            held = frozenset(one for one in AUDIENCES if self.dice.random() < 0.6)
            self.visitors[name] = (values, self.dice.random() < 0.75, held)

    # --- what the synchronisation asks ---

    def audiences(self) -> Mapping[str, Sequence[str]]:
        return dict.fromkeys(AUDIENCES, ("platform",))

    def minimum(self, audience: str) -> int:
        return 1

    def candidates(
        self, audience: str, purpose: Purpose, forms: Sequence[str], fields: Sequence[str]
    ) -> Iterator[Candidate]:
        assert purpose is Purpose.ADS
        for name, (values, allowed, held) in self.visitors.items():
            wanted = {form: values[form] for form in forms if values[form]}
            if audience in held and wanted:
                yield Candidate(Person(sha(name), wanted), "1", allowed)

    def erased(self, keys: Sequence[str]) -> Collection[str]:
        return ()

    # --- what should be ---

    def agreed(self, key: str) -> bool:
        return any(allowed for name, (_, allowed, _) in self.visitors.items() if sha(name) == key)

    def wanted(self, audience: str, names: Mapping[str, str]) -> set[Identifier]:
        """Everything that a list should hold, as (the platform's name of the form, hash)."""
        return {
            (names[form], value)
            for values, allowed, held in self.visitors.values()
            if allowed and audience in held
            for form in names
            for value in values[form]
        }


class Fragile:
    """A destination in a process that may be killed before and after each request."""

    def __init__(self, destination: Any, world: World, share: float) -> None:
        self.inner, self.world, self.dice, self.share = destination, world, world.dice, share
        self.name, self.purpose = destination.name, destination.purpose
        self.forms, self.fields = destination.forms, destination.fields
        self.limits = Limits(7, 10_000, 1.0)
        if hasattr(destination, "review"):
            self.review = lambda answers: self._at_risk(partial(destination.review, answers))

    def _at_risk(self, call: Callable[[], Any]) -> Any:
        if self.dice.random() < self.share:
            raise Killed
        answer = call()
        if self.dice.random() < self.share:
            raise Killed
        return answer

    def open(self, audience: str) -> str:
        return str(self._at_risk(partial(self.inner.open, audience)))

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        assert all(self.world.agreed(one.key) for one in people)
        found: Sequence[Outcome] = self._at_risk(partial(self.inner.add, list_id, people, batch))
        return found

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        found: Sequence[Outcome] = self._at_risk(partial(self.inner.remove, list_id, people, batch))
        return found


class Platform:
    """A stand-in, the destination that talks to it, and what is on its lists."""

    names: Mapping[str, str]

    def fail(self, dice: random.Random) -> None:
        raise NotImplementedError

    def build(self) -> Any:
        raise NotImplementedError

    def held(self, audience: str) -> set[Identifier]:
        raise NotImplementedError


class Google(Platform):
    names = google.FIELDS
    methods: tuple[str, ...] = (
        "CreateOfflineUserDataJob",
        "AddOfflineUserDataJobOperations",
        "RunOfflineUserDataJob",
    )

    def __init__(self, stub: GoogleApi) -> None:
        self.stub = stub
        stub.requests_a_minute = None  # the test is faster than its clock

    def fail(self, dice: random.Random) -> None:
        code = dice.choice([grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED])
        self.stub.faults.append(googleapis.Fault(dice.choice(self.methods), code, after=dice.random() < 0.5))

    def build(self) -> Any:
        return google.build("platform", google.Options.model_validate(self.stub.options))

    def held(self, audience: str) -> set[Identifier]:
        return self.stub.held(f"Propensity {audience}")


class DataManager(Google):
    names = data_manager.FIELDS
    methods = ("IngestAudienceMembers", "RemoveAudienceMembers", "RetrieveRequestStatus")

    def build(self) -> Any:
        given = self.stub.options | {"customer_match_terms": "accepted"}
        return data_manager.build("platform", data_manager.Options.model_validate(given))


class Facebook(Platform):
    names = meta.KEYS

    def __init__(self, stub: MetaStub) -> None:
        self.stub = stub

    def fail(self, dice: random.Random) -> None:
        after = dice.random() < 0.5
        fault = dice.choice(
            [
                meta_stub.Fault("POST users", 502, "<html>Bad Gateway</html>", after=after),
                meta_stub.Fault("POST users", close=True, after=after),
                meta_stub.Fault("POST users", 400, meta_stub.throttled(80003)[0]),
            ]
        )
        self.stub.faults.append(fault)

    def build(self) -> Any:
        given = {
            "ad_account_id": self.stub.account,
            "access_token": SecretStr(self.stub.access_token),
            "app_secret": SecretStr(str(self.stub.app_secret)),
            "endpoint": self.stub.endpoint,
        }
        return meta.build("platform", meta.Options.model_validate(given))

    def held(self, audience: str) -> set[Identifier]:
        named = [key for key, one in self.stub.audiences.items() if one["name"] == f"Propensity {audience}"]
        return {pair for key in named for entry in self.stub.members[key] for pair in entry}


@pytest.fixture(params=["google", "data manager", "meta"])
def platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    with ExitStack() as stack:
        stub: Any
        if request.param == "google":
            stub = stack.enter_context(GoogleStub().serving())
            yield Google(stub)
        elif request.param == "data manager":
            stub = stack.enter_context(DataManagerStub().serving())
            yield DataManager(stub)
        else:
            stub = stack.enter_context(meta_stub.serving(MetaStub()))
            yield Facebook(stub)
        assert stub.broken == []


SENDING = Sending(patience_s=5, first_wait_s=0.001, longest_wait_s=0.005)


def synchronise(books: ledger.Ledger, destination: Destination, world: World, **options: Any) -> list[sync.Counts]:
    return sync.run(books, destination, world, SENDING, options=sync.Options(**options))


def test_lists_are_as_wanted_whatever_fails_and_at_whichever_point_it_is_killed(
    platform: Platform, tmp_path: Path
) -> None:
    dice = random.Random(20_261_124)
    world = World(dice)
    killed = 0
    with ledger.opened(f"sqlite:///{tmp_path}/ledger.db") as books:
        while killed < KILLS:
            world.change(15)
            for _ in range(dice.randrange(3)):
                platform.fail(dice)
            for share in (0.4,) * 9 + (0.0,):
                try:
                    synchronise(books, Fragile(platform.build(), world, share), world)
                    break
                except Killed:
                    killed += 1
            for audience in AUDIENCES:
                assert platform.held(audience) == world.wanted(audience, platform.names)
        quiet = synchronise(books, Fragile(platform.build(), world, 0.0), world)
        assert [one.added + one.removed for one in quiet] == [0, 0]


def test_members_whom_a_platform_refuses_are_told_and_not_sent_again(platform: Platform, tmp_path: Path) -> None:
    world = World(random.Random(1))
    form = next(iter(platform.names))
    nobody: dict[str, tuple[str, ...]] = dict.fromkeys(FORMS, ())
    for name in ("a", "b", "c"):
        world.visitors[name] = ({**nobody, form: (sha(name),)}, True, frozenset({"champions"}))
    stub: Any = platform.stub  # type: ignore[attr-defined]
    stub.refuse = {sha("b")}
    with ledger.opened(f"sqlite:///{tmp_path}/ledger.db") as books:
        first, _ = synchronise(books, platform.build(), world)
        assert (first.wanted, first.refused) == (3, 1)
        again, _ = synchronise(books, platform.build(), world)
        assert (again.added, again.refused_before, again.unchanged) == (0, 1, 2)
    assert platform.held("champions") == {(platform.names[form], sha(name)) for name in ("a", "c")}


def test_a_withdrawal_waits_until_google_worked_off_the_additions(tmp_path: Path) -> None:
    world = World(random.Random(2))
    nobody: dict[str, tuple[str, ...]] = dict.fromkeys(FORMS, ())
    world.visitors["a"] = ({**nobody, "google.email": (sha("a"),)}, True, frozenset({"champions"}))
    world.visitors["b"] = ({**nobody, "google.email": (sha("b"),)}, True, frozenset({"champions"}))
    patient = Sending(patience_s=0.2, first_wait_s=0.05, longest_wait_s=0.05)
    with (
        GoogleStub().serving() as stub,
        ledger.opened(f"sqlite:///{tmp_path}/ledger.db") as books,
    ):
        platform = Google(stub)
        stub.hold = True
        synchronise(books, platform.build(), world)
        world.visitors["a"] = (world.visitors["a"][0], False, frozenset({"champions"}))
        with pytest.raises(Busy, match="in job 5000"):
            sync.run(books, platform.build(), world, patient)
        stub.finish()
        assert platform.held("champions") == {("hashed_email", sha("a")), ("hashed_email", sha("b"))}
        stub.hold = False
        synchronise(books, platform.build(), world)
        assert platform.held("champions") == {("hashed_email", sha("b"))}
        assert stub.broken == []
