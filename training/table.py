"""Tables: one row a visitor with a label column, for specs whose features are traits and request fields alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt

from service.core import events, features
from service.core.events import Records
from service.core.features import Plan
from service.core.spec import Aggregate, FeatureSpec, Session
from training import eventfiles, sql
from training.columns import trait_keys
from training.connection import connect, first_line
from training.dataset import GOLDEN_CASES, Dataset, GoldenRow, Split, TooLittleData
from training.eventfiles import UnreadableEvents
from training.relation import Relation, rejects

CHUNK_ROWS: Final = 20_000
STRANGERS: Final = 20


@dataclass(frozen=True)
class Chunk:
    """Some rows of a table: whose they are, what is known of them as trait records, and their label."""

    visitor_ids: tuple[str, ...]
    traits: Records  # [rows * T], those of row 0 first
    trait_starts: npt.NDArray[np.int64]  # [rows + 1]
    request: npt.NDArray[np.float32]  # [rows, R]
    label: npt.NDArray[np.bool_]  # [rows]
    now_ms: npt.NDArray[np.int64]  # [rows]


class Table:
    """A CSV, Parquet or NDJSON file read through a spec. Raises UnreadableEvents where a column is not there."""

    def __init__(self, path: str, spec: FeatureSpec) -> None:
        windowed = [name for name, kind in spec.features.items() if isinstance(kind, (Aggregate, Session))]
        if windowed:
            raise UnreadableEvents(f"--table has no events for the feature {windowed[0]!r}; train it with --events")
        self.path, self.spec = path, spec
        self.files = eventfiles.find_files([path])
        self.connection = connect(Path(tempfile.gettempdir()))
        groups = list(eventfiles.groups(self.files, spec))
        if len(groups) > 1:
            raise UnreadableEvents(
                f"{path}: holds files of {len(groups)} layouts; a table has one, give its files alone"
            )
        ((self.mapping, reader, group),) = groups
        self.relation = Relation(self.connection, spec, self.mapping, reader, group)
        self.rejected: tuple[int, list[str]] = (0, [])

    def chunks(self, *, labelled: bool) -> Iterator[Chunk]:
        """The sound rows in order, CHUNK_ROWS at a time; without `labelled` the label column need not exist."""
        keys = trait_keys(self.spec)
        columns = [f"{self._visitor()} AS visitor", f"{self._timestamp(labelled)} AS now_ms"]
        for place, key in enumerate(keys):
            text, number = self.relation.trait(key)
            columns += [f"{sql.hash32(text)} AS hash{place}", f"{number} AS trait{place}"]
        columns += [
            f"{self.relation.request(kind)} AS request{place}" for place, kind in enumerate(self.spec.requests.values())
        ]
        columns += [f"{self._label() if labelled else 'false'} AS label", f"{self._flaw(labelled)} AS flaw"]
        self.connection.execute("SET preserve_insertion_order = true")
        try:
            query = self.connection.sql(
                f"SELECT * FROM (SELECT {', '.join(columns)} FROM {self.relation.scan} {self.relation.where}) "
                "WHERE flaw IS NULL"
            )
            for batch in query.to_arrow_reader(CHUNK_ROWS):
                loaded = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
                yield self._chunk(loaded, keys)
            self.rejected = rejects(self.connection)
        except duckdb.Error as error:
            raise UnreadableEvents(f"{self.path}: {first_line(error)}") from None

    def bad(self, most: int, *, labelled: bool) -> tuple[int, list[str]]:
        """How many rows `chunks`, which has to be read to its end before, left out, and some of them.

        Raises UnreadableEvents where there are more than `most`.
        """
        count, examples = self.rejected
        flaws = self.connection.execute(
            f"SELECT {self._flaw(labelled)} AS flaw, count(*) FROM {self.relation.scan} {self.relation.where} "
            "GROUP BY flaw HAVING flaw IS NOT NULL ORDER BY flaw"
        ).fetchall()
        count += sum(rows for _, rows in flaws)
        examples = [*(flaw for flaw, _ in flaws[:5]), *examples]
        if count > most:
            raise UnreadableEvents(
                f"{self.path}: {count} rows are bad, more than --max-bad-rows {most}; for example "
                f"{'; '.join(examples)}. Correct them, leave them out with source.where, or raise --max-bad-rows"
            )
        return count, examples

    def _chunk(self, loaded: Mapping[str, npt.NDArray[Any]], keys: Mapping[str, bool]) -> Chunk:
        rows = len(loaded["visitor"])
        now_ms = loaded["now_ms"].astype(np.int64)
        made = np.empty((rows, len(keys)), events.RECORD)
        known = np.empty((rows, len(keys)), np.bool_)
        for place, (key, is_text) in enumerate(keys.items()):
            value = loaded[f"trait{place}"].astype(np.float64)
            text = loaded[f"hash{place}"].astype(np.float64)  # float64 holds a 32-bit hash exactly
            known[:, place] = np.isfinite(text if is_text else value)
            attribute = np.where(known[:, place] & is_text, text, 0).astype(np.uint32)
            kind = events.TRAIT_TEXT if is_text else events.TRAIT_NUMBER
            made[:, place] = events.records(now_ms, kind, events.hash32(key), attribute, value)
        request = np.empty((rows, len(self.spec.requests)), np.float32)
        for place in range(request.shape[1]):
            request[:, place] = loaded[f"request{place}"].astype(np.float32)
        starts = np.concatenate(([0], np.cumsum(known.sum(axis=1))))
        label = np.asarray(loaded["label"], np.bool_)
        return Chunk(tuple(map(str, loaded["visitor"])), made[known], starts, request, label, now_ms)

    def _visitor(self) -> str:
        if self.mapping.visitor_id is None:
            return "(row_number() OVER ())::VARCHAR"
        return sql.name_of(self.relation.expression(self.mapping.visitor_id, "source.visitor_id"))

    def _timestamp(self, labelled: bool) -> str:
        """SQL for the moment of a row. What a table says without a time was known when it was written."""
        if self.mapping.timestamp is not None:
            field = self.relation.expression(self.mapping.timestamp, "source.timestamp")
            return sql.milliseconds(field, self.mapping.timestamp_format)
        written_ms = max(file.stat().st_mtime_ns for file in self.files) // 1_000_000
        return f"{0 if labelled else written_ms}::BIGINT"

    def _label(self) -> str:
        label = self.spec.label
        if label is None or label.column is None:
            raise TooLittleData("the spec has no label column; write label: {column: NAME, positive: VALUE}")
        text = sql.text(self.relation.expression(label.column, "label.column"))
        accepted = ", ".join(sql.literal(value.lower()) for value in label.positive)
        return f"nullif(lower(trim({text})), '') IN ({accepted})"

    def _flaw(self, labelled: bool) -> str:
        """SQL for why a row is left out; NULL for a sound one."""
        flaws = {"a row without a readable timestamp": self._timestamp(labelled)}
        if self.mapping.visitor_id is not None:
            flaws["a row without a visitor"] = self._visitor()
        if labelled:
            flaws["a row without a label"] = self._label()
        return f"CASE {' '.join(f'WHEN {value} IS NULL THEN {sql.literal(flaw)}' for flaw, value in flaws.items())} END"


def build(table: Table, plan: Plan) -> Dataset:
    """All rows of a labelled table, through the same kernel as events; time and visitor only tell rows apart."""
    matrices, labels, times = [], [], []
    golden: list[GoldenRow] = []
    for chunk in table.chunks(labelled=True):
        rows = len(chunk.label)
        nothing = np.empty(0, events.RECORD), np.zeros(rows + 1, np.int64)
        matrices.append(features.matrix(plan, *nothing, chunk.now_ms, chunk.traits, chunk.trait_starts, chunk.request))
        labels.append(chunk.label)
        times.append(chunk.now_ms)
        golden += list(_golden(chunk))[: GOLDEN_CASES - len(golden)]
    if not labels:
        raise TooLittleData(f"{table.path}: holds no rows")
    label = np.concatenate(labels)
    numbers = np.arange(len(label), dtype=np.uint64)
    return Dataset(np.concatenate(matrices), label, numbers, np.concatenate(times), tuple(golden))


def _golden(chunk: Chunk) -> Iterator[GoldenRow]:
    for row in range(0, len(chunk.label), max(1, len(chunk.label) // GOLDEN_CASES)):
        traits = chunk.traits[chunk.trait_starts[row] : chunk.trait_starts[row + 1]]
        yield GoldenRow(np.empty(0, events.RECORD), traits, chunk.request[row], int(chunk.now_ms[row]))


def with_strangers(dataset: Dataset, split: Split, plan: Plan) -> tuple[Dataset, Split]:
    """Add rows of which nothing is known, so that a stranger scores as the average and not as all zeros.

    Every STRANGERS-th row of each part but the last is added once more without its traits, with its label.
    """
    copied = [rows[::STRANGERS] for rows in (split.train, split.stop, split.calibrate)]
    sources = np.concatenate(copied)
    nothing = np.empty(0, events.RECORD), np.zeros(len(sources) + 1, np.int64)
    unknown = np.full((len(sources), len(plan.request_columns)), np.nan, np.float32)
    blank = features.matrix(plan, *nothing, dataset.cutoff_ms[sources], *nothing, unknown)
    ends = len(dataset) + np.cumsum([len(rows) for rows in copied])
    train, stop, calibrate = np.split(np.arange(len(dataset), ends[-1]), ends[:2] - len(dataset))
    grown = Dataset(
        np.concatenate((dataset.matrix, blank)),
        np.concatenate((dataset.label, dataset.label[sources])),
        np.concatenate((dataset.visitor, dataset.visitor[sources])),
        np.concatenate((dataset.cutoff_ms, dataset.cutoff_ms[sources])),
        dataset.golden,
    )
    return grown, replace(
        split,
        train=np.concatenate((split.train, train)),
        stop=np.concatenate((split.stop, stop)),
        calibrate=np.concatenate((split.calibrate, calibrate)),
    )
