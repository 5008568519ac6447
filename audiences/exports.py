"""Exports: what people upload by hand, in the platforms' own formats: bid adjustments of segments, lists to exclude.

Bids come from a snapshot of scores, lists from wanted people; both are read in bounded memory, and a file is there
whole or not at all.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audiences.destinations.protocol import Person, Purpose
from audiences.stage import Stage
from audiences.wanted import Candidate, Wanted
from files import snapshots
from service.core.errors import PropensityError
from service.core.segments import SEGMENTS
from service.spreadsheets import cell

Format = Literal["google-ads", "meta", "csv"]
FORMATS: Final[tuple[Format, ...]] = ("google-ads", "meta", "csv")

ROWS_AT_ONCE: Final = 100_000
LOWEST, HIGHEST = -90, 900  # Google Ads Editor Help, "Assign audiences"
TIMES: Final = 3  # columns of one kind that Meta takes at most; of who has more, the others come in rows of their own

# The columns of a file of people, and the form of identifier that stands in each.
COLUMNS: Final[Mapping[Format, Mapping[str, str]]] = {
    "google-ads": {"Email": "google.email", "Phone": "google.phone"},
    "meta": {"email": "meta.email", "phone": "meta.phone"},
}
PLAIN: Final = ("google.email", "google.phone", "meta.email", "meta.phone", "external_id")


class Bid(NamedTuple):
    """What a segment is worth: expected conversions a visitor, and the change of a bid in percent, rounded."""

    segment: str
    visitors: int
    rate: float
    adjustment: int


class Written(NamedTuple):
    """How many people are in a file, and why the other members are not."""

    people: int
    without_consent: int
    without_identifier: int


# --- bid adjustments ---


def bids(scores: str | Path, lowest: int = LOWEST, highest: int = HIGHEST) -> list[Bid]:
    """The bid adjustment of each segment of a snapshot, best segment first.

    With the mean propensity r of all visitors and r(s) of the segment's, both in (0, 1], the adjustment in percent is
    100 (r(s) / r - 1), rounded to an integer and put into [lowest, highest]. A click on an ad is worth its conversion
    rate times the value of a conversion, so bids in proportion to the rate let a conversion cost the same in every
    segment, which is what Google's "A guide to bid adjustments" asks of them.

    Raises PropensityError where the snapshot or the bounds cannot be used.
    """
    if not LOWEST <= lowest <= 0 <= highest <= HIGHEST:
        raise PropensityError(f"bounds of {lowest} and {highest} %: write two of {LOWEST} to 0, and of 0 to {HIGHEST}")
    visitors, sums = _sums(scores)
    total = sum(visitors.values())
    overall = math.fsum(sums.values()) / total if total else 0.0
    if overall <= 0:
        raise PropensityError(
            f"{scores}: of {total:,} visitors no conversion is expected, so there is no rate to bid by"
        )
    order = [*(name for name in SEGMENTS if name in visitors), *sorted(set(visitors) - set(SEGMENTS))]
    return [_bid(name, visitors[name], sums[name], overall, lowest, highest) for name in order]


def _bid(name: str, visitors: int, sum_: float, overall: float, lowest: int, highest: int) -> Bid:
    rate = sum_ / visitors
    return Bid(name, visitors, rate, min(max(round(100 * (rate / overall - 1)), lowest), highest))


def _sums(scores: str | Path) -> tuple[dict[str, int], dict[str, float]]:
    """Visitors and expected conversions of each segment."""
    found = snapshots.find(scores)
    if not found.parts:
        raise PropensityError(f"{scores}: no part-*.parquet; name the directory that propensity score --out wrote")
    visitors: dict[str, int] = {}
    sums: dict[str, float] = {}
    for part in found.parts:
        for batch in _batches(part, found.filesystem):
            groups = pa.Table.from_batches([batch]).group_by("segment")
            for row in groups.aggregate([("propensity", "sum"), ("propensity", "count")]).to_pylist():
                name = row["segment"]
                visitors[name] = visitors.get(name, 0) + row["propensity_count"]
                sums[name] = math.fsum((sums.get(name, 0.0), row["propensity_sum"]))
    return visitors, sums


def _batches(file: str, filesystem: Any) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(file, filesystem=filesystem) as read:
            lacking = {"propensity", "segment"} - set(read.schema_arrow.names)
            if lacking:
                raise PropensityError(f"{file}: has no column {', '.join(sorted(lacking))}; name a snapshot of scores")
            for batch in read.iter_batches(ROWS_AT_ONCE, columns=["propensity", "segment"]):
                propensity = pc.cast(batch.column("propensity"), pa.float64())
                values = propensity.to_numpy(zero_copy_only=False)
                if not ((values >= 0) & (values <= 1)).all() or batch.column("segment").null_count:
                    raise PropensityError(f"{file}: a propensity is not in 0 to 1, or a segment is missing")
                segment = pc.cast(batch.column("segment"), pa.string())
                yield pa.record_batch({"propensity": propensity, "segment": segment})
    except pa.ArrowException as error:
        raise PropensityError(f"{file}: {str(error).splitlines()[0]}") from None


def write_bids(
    found: Sequence[Bid],
    format: Format,  # noqa: A002 - the option's name
    path: Path,
    prefix: str = "Propensity ",
    campaign: str | None = None,
    ad_groups: Sequence[str] = (),
) -> None:
    """Write a file for Google Ads Editor (campaign by ad group by list), or plain CSV with every number.

    Raises PropensityError for a platform that takes no bid adjustments, and where a campaign is not named.
    """
    if format == "meta":
        raise PropensityError("Meta has no bid adjustments of audiences; write --format google-ads, or --format csv")
    if format == "csv":
        rows: list[list[Any]] = [
            [one.segment, one.visitors, f"{one.rate:.6g}", one.adjustment, f"{1 + one.adjustment / 100:g}"]
            for one in found
        ]
        with _whole(path) as writer:
            writer.writerows([["segment", "visitors", "conversion_rate", "adjustment_percent", "modifier"], *rows])
        return
    if not campaign:
        raise PropensityError(
            "bids are adjusted in a campaign; write --campaign NAME, and --ad-group NAME for one of it"
        )
    with _whole(path) as writer:
        writer.writerow(["Campaign", "Ad group", "Audience", "Bid modifier"])
        for group in ad_groups or [""]:
            writer.writerows([campaign, group, f"{prefix}{one.segment}", one.adjustment] for one in found)


# --- lists to exclude ---


def write_exclusions(wanted: Wanted, audience: str, format: Format, path: Path) -> Written:  # noqa: A002
    """Write the members of an audience as a customer list: hashed identifiers of those who agreed to advertising.

    The order is that of the keys, which says nothing of the people. Raises PropensityError for an audience that is not
    there, and where fewer people are left than the audience's minimum.
    """
    if audience not in wanted.audiences():
        known = ", ".join(sorted(wanted.audiences())) or "none"
        raise PropensityError(f"no audience {audience!r}; there is {known}: refresh audiences first")
    forms = tuple(COLUMNS[format].values()) if format in COLUMNS else PLAIN
    counted = _Counted(wanted.candidates(audience, Purpose.ADS, forms, ()), forms)
    with Stage() as stage:
        stage.fill(counted, forms, ())
        least = max(wanted.minimum(audience), 1)
        if stage.allowed < least:
            raise PropensityError(
                f"{audience}: {stage.allowed:,} members agreed to advertising and have one of {', '.join(forms)}; its "
                f"list needs {least:,} (min_size), so nothing is written"
            )
        # Ids may hold a carriage return, which Python before 3.13 quotes only where all is quoted.
        with _whole(path, csv.QUOTE_ALL if format == "csv" else csv.QUOTE_MINIMAL) as writer:
            if format == "csv":
                writer.writerow(["key", "form", "identifier"])
                writer.writerows(_plain(stage))
            else:
                writer.writerows(_platform(stage, COLUMNS[format]))
        return Written(stage.allowed, stage.refusing, counted.nameless)


class _Counted:
    """Candidates, and how many who agreed have no identifier that counts."""

    def __init__(self, candidates: Iterable[Candidate], forms: Sequence[str]) -> None:
        self._candidates, self._forms = candidates, forms
        self.nameless = 0

    def __iter__(self) -> Iterator[Candidate]:
        for one in self._candidates:
            if one.allowed and not any(one.person.identifiers.get(form) for form in self._forms):
                self.nameless += 1
            yield one


def _people(stage: Stage) -> Iterator[Person]:
    return (one.person for one in stage.members_in_order() if one.person is not None)


def _plain(stage: Stage) -> Iterator[list[str]]:
    for person in _people(stage):
        for form, values in sorted(person.identifiers.items()):
            yield from ([person.key, form, cell(value)] for value in values)


def _platform(stage: Stage, columns: Mapping[str, str]) -> Iterator[list[str]]:
    """A head with as many columns of each kind as somebody needs, then rows; no column that nobody needs."""
    widths = dict.fromkeys(columns.values(), 0)
    for person in _people(stage):
        for form in widths:
            widths[form] = min(max(widths[form], len(person.identifiers.get(form, ()))), TIMES)
    yield [column for column, form in columns.items() for _ in range(widths[form])]
    for person in _people(stage):
        left = {form: list(person.identifiers.get(form, ())) for form in widths}
        while any(left.values()):
            row: list[str] = []
            for form, width in widths.items():
                row += [*left[form][:width], *[""] * (width - len(left[form]))]
                del left[form][:width]
            yield row


# --- files ---


@contextmanager
def _whole(path: Path, quoting: Literal[0, 1] = csv.QUOTE_MINIMAL) -> Iterator[Any]:
    """A writer of CSV in UTF-8, whose file takes its name once it is whole; into a pipe or device it writes at once."""
    if path.exists() and not path.is_file():  # a file would take the place of /dev/stdout
        with path.open("w", encoding="utf-8", newline="") as file:
            yield csv.writer(file, lineterminator="\n", quoting=quoting)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            yield csv.writer(file, lineterminator="\n", quoting=quoting)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
