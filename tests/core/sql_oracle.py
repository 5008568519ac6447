"""Features in DuckDB SQL, for the kinds that SQL can say: a second independent answer for the kernel."""

from __future__ import annotations

from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from service.core.events import Records
from service.core.spec import Aggregate, FeatureSpec, Ratio

KINDS: Final = ("count", "sum", "mean", "min", "max", "latest", "distinct", "recency", "tenure", "ratio")

# What `events.hash32` gives for the text `{0}`, NULL for NULL. Not with greatest(), which takes NULL for the least.
HASH32: Final = (
    "CASE md5_number_upper({0}) & 4294967295 WHEN 0 THEN 1 ELSE md5_number_upper({0}) & 4294967295 END::UINTEGER"
)

_ROWS: Final = """
WITH known AS (
    SELECT events.*, now_ms, now_ms - ts_ms AS age_ms,
        row_number() OVER (PARTITION BY row, ts_ms, kind, id ORDER BY attribute, bits) AS copy
    FROM events JOIN moments USING (row)
    WHERE age_ms >= 0 AND age_ms < {history} AND kind IN ({codes})
), ranked AS (
    SELECT *, row_number() OVER (PARTITION BY row ORDER BY ts_ms DESC, kind DESC, id DESC) AS place
    FROM known WHERE copy = 1
), kept AS (
    SELECT * FROM ranked WHERE place <= {records}
)
SELECT {columns} FROM moments LEFT JOIN kept USING (row) GROUP BY moments.row ORDER BY moments.row
"""

_STATISTICS: Final = {
    "count": "count(kept.kind) FILTER ({chosen})",
    "sum": "coalesce(sum(value) FILTER ({chosen}), 0)",
    "mean": "avg(value) FILTER ({chosen})",
    "min": "min(value) FILTER ({chosen})",
    "max": "max(value) FILTER ({chosen})",
    "latest": "arg_min(value, place) FILTER ({chosen} AND value IS NOT NULL)",
    "distinct": "count(DISTINCT attribute) FILTER ({chosen} AND attribute <> 0)",
    "recency": "min(age_ms) FILTER ({chosen}) / 1000",
    "tenure": "max(age_ms) FILTER ({chosen}) / 1000",
}


def features(
    connection: duckdb.DuckDBPyConnection,
    spec: FeatureSpec,
    records: Records,
    starts: npt.NDArray[np.int64],
    now_ms: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """float64[n, F] of float32 values; `records` hold no broken one, windows are durations, NULL is NaN."""
    value = records["value"].astype(np.float64)
    columns = {name: pa.array(records[name].copy()) for name in ("ts_ms", "id", "attribute", "kind")}
    columns["value"] = pa.array(value, mask=np.isnan(value))
    columns["bits"] = pa.array(records["value"].copy().view(np.uint32))
    columns["row"] = pa.array(np.repeat(np.arange(len(now_ms)), np.diff(starts)))
    connection.register("events", pa.table(columns))
    connection.register("moments", pa.table({"row": np.arange(len(now_ms)), "now_ms": now_ms}))
    query = _ROWS.format(
        history=spec.limits.history,
        codes=", ".join(str(kind.code) for kind in spec.events.values()),
        records=spec.limits.records,
        columns=", ".join(_expression(spec, name) for name in spec.features),
    )
    rows = connection.execute(query).fetchall()
    return np.array(rows, np.float64)  # None becomes NaN


def _expression(spec: FeatureSpec, name: str) -> str:
    feature: Any = spec.features[name]
    if isinstance(feature, Ratio):
        above, below = (_expression(spec, operand) for operand in feature.ratio)
        above, below = f"({above}::DOUBLE + {feature.prior[0]!r})", f"({below}::DOUBLE + {feature.prior[1]!r})"
        nothing = f"WHEN {below} = 0 AND {above} <> 0 THEN {above} * 'inf'::DOUBLE"
        return f"CAST(CASE WHEN {below} <> 0 THEN {above} / {below} {nothing} END AS FLOAT)"
    assert isinstance(feature, Aggregate)
    names = spec.events if "any" in feature.kinds else feature.kinds
    chosen = f"kept.kind IN ({', '.join(str(spec.events[kind].code) for kind in names)})"
    if isinstance(feature.window, int):
        chosen += f" AND age_ms < {feature.window}"
    return f"CAST({_STATISTICS[feature.operation].format(chosen=chosen)} AS FLOAT)"
