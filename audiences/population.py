"""Everyone, as columns: what snapshots of one model or several say of each visitor, in one order for all.

A snapshot is a directory of Parquet files that `propensity score --events` writes: one model at one moment. A million
visitors take about 100 MB, and 4 MB more for each feature that some condition looks at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audiences.definitions import categories
from files.snapshots import Found, find
from service.core import bundle
from service.core.bundle import Bundle
from service.core.errors import PropensityError
from service.core.spec import FeatureSpec

Floats = npt.NDArray[np.float32]
Times = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_REQUIRED: Final = {
    "visitor_id": pa.large_string(),
    "propensity": pa.float32(),
    "model": pa.string(),
    "version": pa.string(),
    "at": pa.timestamp("ms", "UTC"),
    "last_event_ms": pa.int64(),
}


class UnreadableScores(PropensityError):
    """A directory that is no snapshot of scores, or snapshots that do not go together."""


@dataclass(frozen=True)
class Snapshot:
    """A directory of scores: of which version of which model, and of when."""

    path: str | Path
    model: str
    version: str
    at_ms: int
    rows: int
    found: Found
    features: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """What a model says of V visitors; NaN, and segment -1, of whom it knows nothing."""

    propensity: Floats
    features: Mapping[str, Floats] = field(default_factory=dict)
    codes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by feature, category -> number
    segment: npt.NDArray[np.int8] | None = None  # places in SEGMENTS
    micro: npt.NDArray[np.int16] | None = None  # places in micro_names; -1 for segments that are not divided
    micro_names: tuple[tuple[str, str], ...] = ()  # segment and name

    @property
    def known(self) -> Flags:
        """Whom the model scored."""
        return ~np.isnan(self.propensity)

    def at(self, kept: Flags) -> Said:
        """What it says of some of the visitors, none of whom is in a segment yet."""
        return replace(
            self,
            propensity=self.propensity[kept],
            features={name: values[kept] for name, values in self.features.items()},
        )


@dataclass(frozen=True)
class Population:
    """V visitors in one order. `drawn` are evenly spread numbers uint64[V] that depend on the visitor's id alone."""

    ids: Any  # pyarrow.StringArray
    drawn: npt.NDArray[np.uint64]
    last_event_ms: Times  # 0 without any
    models: Mapping[str, Said]
    qualified: Mapping[str, Flags] = field(default_factory=dict)  # by audience, of those decided before

    def __len__(self) -> int:
        return len(self.drawn)

    def at(self, kept: Flags) -> Population:
        """Some of the visitors, before anything is decided of them."""
        models = {name: said.at(kept) for name, said in self.models.items()}
        return Population(self.ids.filter(pa.array(kept)), self.drawn[kept], self.last_event_ms[kept], models)

    def with_model(self, name: str, said: Said) -> Population:
        """The same, with something else of one model."""
        return replace(self, models={**self.models, name: said})

    def with_audience(self, name: str, qualified: Flags) -> Population:
        """The same, with one audience more that others may exclude."""
        return replace(self, qualified={**self.qualified, name: qualified})

    def places(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Where visitors are in the order, int64[n]; -1 for who is not in it."""
        # As bytes, since an id that came as JSON may have half a surrogate pair, which no Arrow string can hold.
        wanted = pa.array([one.encode("utf-8", "surrogatepass") for one in ids], pa.large_binary())
        found = pc.index_in(wanted, value_set=self.ids.cast(pa.large_binary())).fill_null(-1)
        return np.asarray(found, np.int64)


def open_snapshot(path: str | Path) -> Snapshot:
    """What a directory of scores, by its path or URL, is of. Raises PropensityError."""
    found = find(path)
    if not found.parts:
        raise UnreadableScores(
            f"{path}: holds no part-*.parquet; give a directory that propensity score --events FILES --out DIR wrote"
        )
    try:
        names = pq.read_schema(found.parts[0], filesystem=found.filesystem).names
        missing = [name for name in _REQUIRED if name not in names]
        if missing:
            raise UnreadableScores(f"{path}: has no column {missing[0]}; write it with propensity score --events")
        table = _read(found, ["model", "version", "at"])
    except (pa.ArrowException, OSError) as error:
        raise UnreadableScores(f"{path}: cannot be read ({error}); write it anew with propensity score") from None
    said = {name: pc.unique(_cast(path, name, table[name])) for name in table.column_names}
    if any(len(values) != 1 or values.null_count for values in said.values()):
        raise UnreadableScores(
            f"{path}: mixes models, versions or moments, or is empty; write each to its own directory"
        )
    at_ms = said["at"].cast(pa.int64())[0].as_py()
    if at_ms <= 0:
        raise UnreadableScores(f"{path}: is of a moment before 1970; write it anew")
    features = tuple(name for name in names if name not in (*_REQUIRED, "percentile", "segment"))
    return Snapshot(path, said["model"][0].as_py(), said["version"][0].as_py(), at_ms, len(table), found, features)


def load(
    snapshots: Sequence[Snapshot], specs: Mapping[str, FeatureSpec], features: Mapping[str, Sequence[str]]
) -> Population:
    """Everyone of all snapshots; a visitor that a model does not know is NaN there.

    specs and features (those that conditions look at) are by model. Raises UnreadableScores.
    """
    tables = [_table(one, features.get(one.model, ())) for one in snapshots]
    ids = tables[0]["visitor_id"]
    for table in tables[1:]:
        strangers = pc.is_null(pc.index_in(table["visitor_id"], value_set=ids))
        ids = pa.concat_arrays([ids, table["visitor_id"].filter(strangers)])
    last_event_ms = np.zeros(len(ids), np.int64)
    models: dict[str, Said] = {}
    for one, table in zip(snapshots, tables, strict=True):
        places = pc.index_in(table["visitor_id"], value_set=ids).to_numpy()
        own = table["last_event_ms"].fill_null(0).to_numpy(zero_copy_only=False)
        last_event_ms[places] = np.maximum(last_event_ms[places], own)
        spec = specs[one.model]
        columns = {name: _spread(table[name], places, len(ids)) for name in features.get(one.model, ())}
        propensity = _spread(table["propensity"], places, len(ids))
        models[one.model] = Said(propensity, columns, {name: categories(spec, name) for name in columns})
    return Population(ids, drawn(ids.to_pylist()), last_event_ms, models)


def _table(snapshot: Snapshot, features: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in features if name not in snapshot.features]
    if missing:
        wanted = ",".join(features)
        raise UnreadableScores(
            f"{snapshot.path}: has no feature {missing[0]}, which a condition looks at; "
            f"write it with propensity score --events FILES --features {wanted}"
        )
    names = ["visitor_id", "propensity", "last_event_ms", *features]
    try:
        table = _read(snapshot.found, names)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableScores(
            f"{snapshot.path}: cannot be read ({error}); write it anew with propensity score"
        ) from None
    found = {name: _whole(_cast(snapshot.path, name, table[name])) for name in names}
    ids = found["visitor_id"]
    if pc.count_distinct(ids, mode="all").as_py() != len(table) or ids.null_count or pc.any(pc.equal(ids, "")).as_py():
        raise UnreadableScores(f"{snapshot.path}: has a visitor twice, or one without id; write it anew")
    scores = found["propensity"].to_numpy(zero_copy_only=False)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise UnreadableScores(f"{snapshot.path}: has a propensity that is no probability; write it anew")
    return found


def _cast(path: str | Path, name: str, column: Any) -> Any:
    """A column in its type; that of a feature is a number."""
    wanted = _REQUIRED.get(name, pa.float32())
    try:
        return column.cast(wanted)
    except pa.ArrowException as error:
        raise UnreadableScores(f"{path}: {name} is no {wanted} ({error}); write it anew") from None


def _read(found: Found, columns: Sequence[str]) -> Any:
    return pq.ParquetDataset(list(found.parts), filesystem=found.filesystem).read(columns=list(columns))


def _whole(column: Any) -> Any:
    found = column.combine_chunks()
    return pa.concat_arrays(found.chunks) if isinstance(found, pa.ChunkedArray) else found


def _spread(column: Any, places: npt.NDArray[np.int64], count: int) -> Floats:
    spread = np.full(count, np.nan, np.float32)
    spread[places] = column.to_numpy(zero_copy_only=False)
    return spread


def drawn(ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    """A number uint64[n] for each visitor: the first 8 bytes, little-endian, of BLAKE2b-64 of the id in UTF-8."""
    blake = hashlib.blake2b
    digests = b"".join([blake(one.encode("utf-8", "surrogatepass"), digest_size=8).digest() for one in ids])
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def require_apart(snapshots: Sequence[Snapshot]) -> None:
    """Raise UnreadableScores where two directories are of one model."""
    seen: dict[str, str | Path] = {}
    for one in snapshots:
        if one.model in seen:
            raise UnreadableScores(
                f"{seen[one.model]} and {one.path} are both of {one.model}; give the newer one alone"
            )
        seen[one.model] = one.path


def bundles_of(snapshots: Sequence[Snapshot], artifacts: Path) -> dict[str, Bundle]:
    """The bundle of each snapshot's version, by model. Raises PropensityError."""
    found: dict[str, Bundle] = {}
    for one in snapshots:
        path = artifacts / one.model / one.version
        if not path.is_dir():
            raise UnreadableScores(
                f"{one.path}: was scored by {one.model} {one.version}, and {path} is not there; "
                "name the directory of bundles with --artifacts"
            )
        found[one.model] = bundle.load(path)
    return found
