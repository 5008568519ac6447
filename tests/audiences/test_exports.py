"""Owns the promise that exported files are what the platforms take: strict readers of their documented formats."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiences import exports, stage
from audiences.destinations.protocol import Person, Purpose
from audiences.wanted import Candidate
from service.core.errors import PropensityError
from service.core.segments import SEGMENTS

MEANS = dict(zip(SEGMENTS, (0.4, 0.12, 0.05, 0.03, 0.012, 0.0005), strict=True))


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A snapshot of 30,000 visitors in three parts, float32 as it is stored."""
    random = np.random.default_rng(3)
    directory = tmp_path / "scores"
    directory.mkdir()
    for part in range(3):
        segments = random.choice(SEGMENTS, 10_000, p=(0.05, 0.10, 0.15, 0.20, 0.25, 0.25))
        means = np.array([MEANS[name] for name in segments])
        propensity = (means * random.uniform(0.5, 1.5, 10_000)).astype(np.float32)
        columns = {"visitor_id": [f"v{part}-{number}" for number in range(10_000)], "propensity": propensity}
        pq.write_table(pa.table({**columns, "segment": segments}), directory / f"part-{part:05d}.parquet")
    return directory


def snapshot(directory: Path, **columns: object) -> Path:
    directory.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), directory / "part-00000.parquet")
    return directory


# --- readers as strict as the platforms ---


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    """UTF-8 without a mark, one row a line, all rows as long as the head."""
    raw = path.read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert raw.endswith(b"\n")
    assert b"\r" not in raw
    head, *rows = csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), strict=True)
    assert rows
    assert {len(row) for row in rows} == {len(head)}
    return head, rows


def read_google_bids(path: Path) -> list[tuple[str, str, str, int]]:
    """Google Ads Editor: headers in English, an audience once in an ad group, adjustments from -90 through 900."""
    head, rows = read(path)
    assert [name.lower().replace(" ", "") for name in head] == ["campaign", "adgroup", "audience", "bidmodifier"]
    found = [(campaign, group, audience, int(said)) for campaign, group, audience, said in rows]
    assert all(campaign and audience for campaign, _, audience, _ in found)
    assert len({row[:3] for row in found}) == len(found)
    assert all(-90 <= one <= 900 for *_, one in found)
    return found


def read_people(path: Path, names: Sequence[str], most: int | None) -> list[list[tuple[str, str]]]:
    """A customer list: known headers, repeated where somebody has several, hashes of SHA-256 in small letters."""
    head, rows = read(path)
    assert set(head) <= set(names)
    assert most is None or all(head.count(name) <= most for name in names)
    people = [[(name, value) for name, value in zip(head, row, strict=True) if value] for row in rows]
    assert all(people), "no row is empty"
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for row in people for _, value in row)
    return people


def read_google_people(path: Path) -> list[list[tuple[str, str]]]:
    return read_people(path, ("Email", "Phone", "First Name", "Last Name", "Country", "Zip"), None)


def read_meta_people(path: Path) -> list[list[tuple[str, str]]]:
    return read_people(path, ("email", "phone", "madid", "fn", "ln", "zip", "ct", "st", "country", "uid"), 3)


# --- bids ---


def test_a_bid_is_the_rate_of_the_segment_by_that_of_all(scores: Path) -> None:
    table = pa.concat_tables([pq.read_table(file) for file in sorted(scores.iterdir())])
    propensity, segment = np.asarray(table["propensity"], np.float64), np.asarray(table["segment"])
    found = exports.bids(scores)
    assert [one.segment for one in found] == list(SEGMENTS)
    for one in found:
        own = propensity[segment == one.segment]
        assert one.visitors == len(own)
        assert one.rate == pytest.approx(own.mean(), rel=1e-12)
        assert one.adjustment == max(-90, round(100 * (own.mean() / propensity.mean() - 1)))
    assert found[0].adjustment > 500
    assert found[-1].adjustment == -90


def test_bids_by_hand(tmp_path: Path) -> None:
    directory = snapshot(
        tmp_path / "scores",
        propensity=pa.array([0.4, 0.2, 0.1, 0.1, 0.0, 0.1], pa.float64()),
        segment=["champions", "champions", "nurture", "nurture", "odd", "odd"],
    )
    assert [tuple(one) for one in exports.bids(directory)] == [
        ("champions", 2, pytest.approx(0.3), 100),
        ("nurture", 2, pytest.approx(0.1), -33),
        ("odd", 2, pytest.approx(0.05), -67),
    ]
    assert [one.adjustment for one in exports.bids(directory, -50, 30)] == [30, -33, -50]


def test_bids_bring_the_cost_of_a_conversion_together(scores: Path) -> None:
    found = [one for one in exports.bids(scores) if one.adjustment > -90]
    cost = [(1 + one.adjustment / 100) / one.rate for one in found]
    before = [1 / one.rate for one in found]
    assert max(before) / min(before) > 10
    assert max(cost) / min(cost) < 1.02


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"propensity": [0.1]}, "has no column segment"),
        ({"segment": ["nurture"]}, "has no column propensity"),
        ({"propensity": [math.nan], "segment": ["nurture"]}, "not in 0 to 1"),
        ({"propensity": [1.5], "segment": ["nurture"]}, "not in 0 to 1"),
        ({"propensity": [0.1], "segment": pa.array([None], pa.string())}, "a segment is missing"),
        ({"propensity": [0.0], "segment": ["nurture"]}, "no conversion is expected"),
        ({"propensity": pa.array([], pa.float32()), "segment": pa.array([], pa.string())}, "no conversion is expected"),
    ],
)
def test_a_snapshot_that_cannot_be_used_says_why(tmp_path: Path, columns: Mapping[str, object], said: str) -> None:
    with pytest.raises(PropensityError, match=said):
        exports.bids(snapshot(tmp_path / "scores", **columns))


def test_a_directory_without_scores_and_bounds_of_no_platform_say_what_to_write(tmp_path: Path, scores: Path) -> None:
    with pytest.raises(PropensityError, match="name the directory that propensity score --out wrote"):
        exports.bids(tmp_path)
    (tmp_path / "part-00000.parquet").write_text("no parquet")
    with pytest.raises(PropensityError, match="part-00000.parquet: "):
        exports.bids(tmp_path)
    for lowest, highest in ((-100, 0), (10, 20), (-20, -10), (0, 1000)):
        with pytest.raises(PropensityError, match="write two of -90 to 0, and of 0 to 900"):
            exports.bids(scores, lowest, highest)


def test_google_ads_editor_takes_the_bids_of_a_campaign_and_of_ad_groups(tmp_path: Path, scores: Path) -> None:
    found, path = exports.bids(scores), tmp_path / "bids.csv"
    exports.write_bids(found, "google-ads", path, campaign='Shoes, "new"')
    assert read_google_bids(path) == [
        ('Shoes, "new"', "", f"Propensity {one.segment}", one.adjustment) for one in found
    ]
    exports.write_bids(found, "google-ads", path, "", "Shoes", ["Boots", "Sandals"])
    rows = read_google_bids(path)
    assert len(rows) == 12
    assert rows[6] == ("Shoes", "Sandals", "champions", found[0].adjustment)


def test_plain_bids_have_every_number(tmp_path: Path, scores: Path) -> None:
    found, path = exports.bids(scores, -50, 50), tmp_path / "bids.csv"
    exports.write_bids(found, "csv", path)
    head, rows = read(path)
    assert head == ["segment", "visitors", "conversion_rate", "adjustment_percent", "modifier"]
    for one, (segment, visitors, rate, adjustment, modifier) in zip(found, rows, strict=True):
        assert (segment, int(visitors), int(adjustment)) == (one.segment, one.visitors, one.adjustment)
        assert float(rate) == pytest.approx(one.rate, rel=1e-5)
        assert float(modifier) == 1 + one.adjustment / 100


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path, scores: Path) -> None:
    pipe, plain = tmp_path / "pipe", tmp_path / "bids.csv"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text("utf-8")))
    reader.start()
    found = exports.bids(scores)
    exports.write_bids(found, "csv", pipe)
    reader.join(10)
    exports.write_bids(found, "csv", plain)
    assert got == [plain.read_text("utf-8")]
    assert pipe.is_fifo()


def test_what_takes_no_bids_says_so(tmp_path: Path, scores: Path) -> None:
    with pytest.raises(PropensityError, match="Meta has no bid adjustments of audiences"):
        exports.write_bids(exports.bids(scores), "meta", tmp_path / "bids.csv")
    with pytest.raises(PropensityError, match="write --campaign NAME"):
        exports.write_bids(exports.bids(scores), "google-ads", tmp_path / "bids.csv")
    assert not (tmp_path / "bids.csv").exists()


# --- lists to exclude ---


@dataclass
class Members:
    """One audience in memory; asked for anything but advertising, it has nobody."""

    people: Sequence[tuple[str, Mapping[str, tuple[str, ...]], bool]] = ()
    least: int = 1
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def audiences(self) -> Mapping[str, Sequence[str]]:
        return {"low": ()}

    def minimum(self, audience: str) -> int:
        return self.least

    def candidates(
        self, audience: str, purpose: Purpose, forms: Sequence[str], fields: Sequence[str]
    ) -> Iterator[Candidate]:
        self.asked.append(tuple(forms))
        assert purpose is Purpose.ADS
        for name, identifiers, allowed in self.people:
            yield Candidate(Person(hashed(name), identifiers, {}), "1", allowed)

    def erased(self, keys: Sequence[str]) -> Collection[str]:
        return ()


def known(name: str, *, emails: int = 1, phones: int = 1) -> Mapping[str, tuple[str, ...]]:
    """Each platform's own forms of so many addresses and numbers."""
    return {
        f"{platform}.{kind}": tuple(hashed(f"{platform} {name} {kind} {number}") for number in range(many))
        for platform in ("google", "meta")
        for kind, many in (("email", emails), ("phone", phones))
        if many
    } | {"external_id": (name,)}


def two_dozen() -> Members:
    people = [(f"p{number}", known(f"p{number}", emails=number % 3, phones=number % 2), True) for number in range(24)]
    people[5] = ("p5", known("p5"), False)
    people[7] = ("p7", known("p7", emails=7, phones=4), True)
    return Members(people)


@pytest.mark.parametrize(
    ("format", "reader", "platform"),
    [("google-ads", read_google_people, "google"), ("meta", read_meta_people, "meta")],
)
def test_a_platform_takes_the_list_with_everybody_who_agreed_in_its_own_form(
    tmp_path: Path, format: exports.Format, reader: object, platform: str
) -> None:
    wanted, path = two_dozen(), tmp_path / "exclude.csv"
    written = exports.write_exclusions(wanted, "low", format, path)
    assert wanted.asked == [(f"{platform}.email", f"{platform}.phone")]
    rows = reader(path)  # type: ignore[operator]
    found = {(name.lower(), value) for row in rows for name, value in row}
    assert found == {
        (kind, value)
        for _, identifiers, allowed in wanted.people
        if allowed
        for kind in ("email", "phone")
        for value in identifiers.get(f"{platform}.{kind}", ())
    }
    nameless = sum(allowed and set(identifiers) == {"external_id"} for _, identifiers, allowed in wanted.people)
    assert nameless == 4
    assert written == (24 - 1 - nameless, 1, nameless)
    assert len(rows) == written.people + 2, "seven addresses are three rows of three columns"
    assert len({tuple(row) for row in rows}) == len(rows)


def test_a_column_that_nobody_needs_is_not_there(tmp_path: Path) -> None:
    wanted = Members([(name, known(name, phones=0), True) for name in ("a", "b")])
    exports.write_exclusions(wanted, "low", "meta", tmp_path / "exclude.csv")
    assert read(tmp_path / "exclude.csv")[0] == ["email"]


def test_the_plain_list_has_one_identifier_a_line_with_its_form(tmp_path: Path) -> None:
    wanted, path = two_dozen(), tmp_path / "exclude.csv"
    written = exports.write_exclusions(wanted, "low", "csv", path)
    head, rows = read(path)
    assert head == ["key", "form", "identifier"]
    assert sorted(map(tuple, rows)) == sorted(
        (hashed(name), form, value)
        for name, identifiers, allowed in wanted.people
        if allowed
        for form, values in identifiers.items()
        for value in values
    )
    assert written == (23, 1, 0)


STRANGE = ["=HYPERLINK(1)", "+1", "-1", "@x", "\tx", "\rx", 'a"b', "a,b", "a\nb", "a\r\n=b", "é", "a;b"]


@pytest.mark.parametrize("name", STRANGE)
def test_an_id_is_one_cell_and_no_formula_whatever_it_holds(tmp_path: Path, name: str) -> None:
    path = tmp_path / "exclude.csv"
    exports.write_exclusions(Members([("a", {"external_id": (name,)}, True)]), "low", "csv", path)
    _, row = csv.reader(io.StringIO(path.read_bytes().decode(), newline=""))
    assert row == [hashed("a"), "external_id", f"'{name}" if name[0] in "=+-@\t\r" else name]


def test_somebody_who_comes_twice_is_there_as_they_came_last(tmp_path: Path) -> None:
    people = [("a", known("a"), True), ("b", known("b"), True), ("a", known("a"), False), ("b", known("b2"), True)]
    exports.write_exclusions(Members(people), "low", "google-ads", tmp_path / "exclude.csv")
    assert [value for row in read_google_people(tmp_path / "exclude.csv") for _, value in row] == [
        known("b2")["google.email"][0],
        known("b2")["google.phone"][0],
    ]


def test_fewer_than_the_minimum_and_unknown_audiences_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "exclude.csv"
    with pytest.raises(PropensityError, match="19 members agreed .* its list needs 20"):
        exports.write_exclusions(Members(two_dozen().people, least=20), "low", "meta", path)
    with pytest.raises(PropensityError, match="0 members agreed .* its list needs 1"):
        exports.write_exclusions(Members(), "low", "meta", path)
    with pytest.raises(PropensityError, match="no audience 'high'; there is low"):
        exports.write_exclusions(Members(), "high", "meta", path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "exclude.csv"
    path.write_text("before")
    wanted = two_dozen()

    def torn(rows: object, columns: object) -> Iterator[list[str]]:
        yield ["Email"]
        raise RuntimeError("cut off")

    monkeypatch.setattr(exports, "_platform", torn)
    with pytest.raises(RuntimeError, match="cut off"):
        exports.write_exclusions(wanted, "low", "google-ads", path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_only_some_members_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Person] = weakref.WeakSet()
    most = 0

    class Watched(Person):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            alive.add(self)

        __hash__ = object.__hash__

    class Many(Members):
        def candidates(
            self, audience: str, purpose: Purpose, forms: Sequence[str], fields: Sequence[str]
        ) -> Iterator[Candidate]:
            nonlocal most
            for number in range(30_000):
                own = f"{number:064x}"
                yield Candidate(Watched(own, {"google.email": (own,)}, {}), "1", True)
                most = max(most, len(alive)) if number % 1000 == 0 else most

    monkeypatch.setattr(stage, "Person", Watched)
    assert exports.write_exclusions(Many(), "low", "google-ads", tmp_path / "exclude.csv").people == 30_000
    assert 1_000 < most <= 20_000
    assert len(alive) < 10
