"""Tables: one row a visitor with a label column, for specs whose features are traits and request fields alone."""

from __future__ import annotations

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
from service.core.spec import Aggregate, FeatureSpec, Session, Source
from training import source
from training.dataset import GOLDEN_CASES, Dataset, GoldenRow, Split, TooLittleData
from training.source import UnreadableEvents

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
        self.files = source.find_files([path])
        self.connection = source.connect(Path())
        ((mapping, reader, group),) = source.groups(self.files, spec)
        self.relation = source.Relation(self.connection, spec, mapping, reader, group)
        self.mapping: Source = mapping

    def chunks(self, *, labelled: bool) -> Iterator[Chunk]:
        """The rows in order, CHUNK_ROWS at a time; without `labelled` the label column need not exist."""
        keys = source.trait_keys(self.spec)
        columns = [f"{self._visitor()} AS visitor", f"{self._timestamp()} AS now_ms"]
        columns += [
            f"{self.relation.trait(key, is_text)} AS t{place}" for place, (key, is_text) in enumerate(keys.items())
        ]
        columns += [
            f"{self.relation.request(kind)} AS r{place}" for place, kind in enumerate(self.spec.requests.values())
        ]
        columns += [f"{self._label() if labelled else 'NULL'} AS label"]
        where = f"WHERE {self.mapping.where}" if self.mapping.where else ""
        self.connection.execute("SET preserve_insertion_order = true")
        try:
            query = self.connection.sql(f"SELECT {', '.join(columns)} FROM {self.relation.scan} {where}")
            reader = query.to_arrow_reader(CHUNK_ROWS)
            for batch in reader:
                loaded = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
                yield self._chunk(loaded, keys)
        except duckdb.Error as error:
            raise UnreadableEvents(f"{self.path}: {source.first_line(error)}") from None

    def _chunk(self, loaded: Mapping[str, npt.NDArray[Any]], keys: Mapping[str, bool]) -> Chunk:
        rows = len(loaded["visitor"])
        now_ms = loaded["now_ms"].astype(np.int64)
        made = np.empty((rows, len(keys)), events.RECORD)
        known = np.empty((rows, len(keys)), np.bool_)
        for place, (key, is_text) in enumerate(keys.items()):
            values = loaded[f"t{place}"].astype(np.float64)  # float64 holds a 32-bit hash exactly
            known[:, place] = ~np.isnan(values)
            whole = np.where(known[:, place], values, 0).astype(np.uint32) if is_text else 0
            kind = events.TRAIT_TEXT if is_text else events.TRAIT_NUMBER
            made[:, place] = events.records(now_ms, kind, events.hash32(key), whole, np.nan if is_text else values)
        request = np.empty((rows, len(self.spec.requests)), np.float32)
        for place in range(request.shape[1]):
            request[:, place] = loaded[f"r{place}"].astype(np.float32)
        starts = np.concatenate(([0], np.cumsum(known.sum(axis=1))))
        label = loaded["label"] == True  # noqa: E712 - an object array where NULL stands for no label
        return Chunk(
            tuple(map(str, loaded["visitor"])), made[known], starts, request, np.asarray(label, np.bool_), now_ms
        )

    def _visitor(self) -> str:
        if self.mapping.visitor_id is None:
            return "(row_number() OVER ())::VARCHAR"
        return source.text_sql(*self.relation.expression(self.mapping.visitor_id, "source.visitor_id"))

    def _timestamp(self) -> str:
        if self.mapping.timestamp is None:
            return "0::BIGINT"
        field = self.relation.expression(self.mapping.timestamp, "source.timestamp")
        return f"coalesce({source.timestamp_sql(*field, self.mapping.timestamp_format)}, 0)"

    def _label(self) -> str:
        label = self.spec.label
        if label is None or label.column is None:
            raise TooLittleData("the spec has no label column; write label: {column: NAME, positive: VALUE}")
        text = source.text_sql(*self.relation.expression(label.column, "label.column"))
        accepted = ", ".join(source.quoted(value.lower()) for value in label.positive)
        return f"lower({text}) IN ({accepted})"


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
