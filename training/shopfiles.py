"""Files of the simulated shop: its events as rows of codes and numbers, and how these are written."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from service.core.errors import PropensityError

Codes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.void]

TRACKED: Final = ("Product Viewed", "Products Searched", "Home Viewed", "Product Added", "Order Completed")
VIEW, SEARCH, HOME, CART, ORDER, IDENTIFY = range(6)
DEVICES: Final = ("mobile", "desktop", "tablet")
REFERRERS: Final = ("search", "ads", "direct", "email")
CATEGORIES: Final = ("shoes", "shirts", "jackets", "bags", "kitchen", "garden", "games", "books")
TIERS: Final = ("none", "bronze", "silver", "gold")

ROW: Final = np.dtype(
    [
        ("received", "<i8"),
        ("at", "<i8"),
        ("message", "<u4"),
        ("visitor", "<u4"),
        ("value", "<i4"),  # price or revenue in cents; past orders for an identify
        ("attribute", "u1"),  # category; loyalty tier for an identify
        ("kind", "u1"),
        ("known", "?"),
        ("device", "u1"),
        ("referrer", "u1"),
        ("campaign", "u1"),
    ]
)

ENDINGS: Final = (".parquet", ".ndjson", ".ndjson.gz", ".csv", ".csv.gz")


class Origin(NamedTuple):
    """What rows do not say: the moment that `at` counts from, the seed of their ids, and the names of campaigns."""

    at_ms: int
    seed: int
    campaigns: tuple[str, ...]


def ending_of(out: Path, truth: Path | None) -> str:
    """How the name of a file of events ends. Raises PropensityError where neither it nor that of the truth can be."""
    if truth is not None and (truth == out or truth.suffix != ".parquet"):
        raise PropensityError(f"cannot write the truth to {truth}; name another file that ends in .parquet")
    for ending in ENDINGS:
        if out.name.endswith(ending):
            return ending
    raise PropensityError(f"cannot write events to {out}; let its name end in {', '.join(ENDINGS)}")


@contextmanager
def event_writer(ending: str, path: Path, origin: Origin) -> Iterator[Callable[[Rows], None]]:
    """What writes rows to a file of events, in parts."""
    if ending == ".parquet":
        schema = _table(np.zeros(0, ROW), origin).schema
        with _parquet(path, schema) as writer:
            yield lambda rows: writer.write_table(_table(rows, origin))
        return
    with path.open("wb") as plain, ExitStack() as stack:
        file: IO[bytes] | gzip.GzipFile = plain
        if ending.endswith(".gz"):
            # No name and no time in the header, so that the same shop gives the same bytes.
            file = stack.enter_context(gzip.GzipFile("", "wb", 3, plain, mtime=0))
        if ending.startswith(".ndjson"):
            yield lambda rows: _write_lines(file, rows, origin)
        else:
            schema = _flat_table(np.zeros(0, ROW), origin).schema
            writer = stack.enter_context(pyarrow.csv.CSVWriter(pa.PythonFile(file, "w"), schema))
            yield lambda rows: writer.write_table(_flat_table(rows, origin))


@contextmanager
def truth_writer(path: Path | None, origin: Origin) -> Iterator[Callable[[Rows, Floats], None]]:
    """What writes rows and their propensities to a file of the truth, in parts; without a file, nothing."""
    if path is None:
        yield lambda rows, propensity: None
        return
    schema = pa.schema([("visitor_id", pa.string()), ("at_ms", pa.int64()), ("propensity", pa.float64())])
    with _parquet(path, schema) as writer:
        yield lambda rows, propensity: writer.write_table(
            pa.table([_visitor_ids(rows, origin), rows["at"] + origin.at_ms, propensity], schema=schema)
        )


def _parquet(path: Path, schema: Any) -> Any:
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=1)


def _table(rows: Rows, origin: Origin) -> Any:
    """Arrow table of events: properties, context and traits are structs, null where the event has none."""
    column = _columns(rows, origin)
    login = rows["kind"] == IDENTIFY

    def struct(names: tuple[str, ...], absent: Flags) -> Any:
        return pa.StructArray.from_arrays([column.pop(name) for name in names], names, mask=pa.array(absent))

    properties = struct(("price", "category", "query", "revenue"), login | (rows["kind"] == HOME))
    context = struct(("device", "referrer", "campaign"), np.zeros(len(rows), bool))
    traits = struct(("loyalty_tier", "past_orders"), ~login)
    return pa.table(column | {"properties": properties, "context": context, "traits": traits})


def _flat_table(rows: Rows, origin: Origin) -> Any:
    """Arrow table of events without structs and with ISO 8601 times, for CSV."""
    column = _columns(rows, origin)
    return pa.table(column | {"timestamp": _iso(column["timestamp"])})


def _columns(rows: Rows, origin: Origin) -> dict[str, Any]:
    kind, known = rows["kind"], rows["known"]
    visitor_ids = _visitor_ids(rows, origin)
    priced, login = (kind == VIEW) | (kind == CART), kind == IDENTIFY
    return {
        "type": _named(["track"] * IDENTIFY + ["identify"], kind),
        "event": _named([*TRACKED, None], kind),
        "userId": _only(known, visitor_ids),
        "anonymousId": _only(~known, visitor_ids),
        "messageId": _hex(b"", rows["message"], origin.seed, 3),
        "timestamp": pa.array(rows["at"] + origin.at_ms).cast(pa.timestamp("ms", tz="UTC")),
        "price": pa.array(rows["value"] / 100, mask=~priced),
        "category": _named(CATEGORIES, rows["attribute"], priced),
        "query": _named(CATEGORIES, rows["attribute"], kind == SEARCH),
        "revenue": pa.array(rows["value"] / 100, mask=kind != ORDER),
        "device": _named(DEVICES, rows["device"]),
        "referrer": _named(REFERRERS, rows["referrer"]),
        "campaign": _named([None, *origin.campaigns], rows["campaign"]),
        "loyalty_tier": _named(TIERS, rows["attribute"], login),
        "past_orders": pa.array(rows["value"].astype(np.int64), mask=~login),
    }


def _named(names: Sequence[str | None], code: Codes, where: Flags | None = None) -> Any:
    index = pa.array(code, mask=None if where is None else ~where)
    return pa.array(names, pa.string()).take(index)


def _only(where: Flags, text: Any) -> Any:
    return pc.if_else(pa.array(where), text, pa.scalar(None, pa.string()))


def _write_lines(file: IO[bytes] | gzip.GzipFile, rows: Rows, origin: Origin) -> None:
    """One JSON object a line. Every text in it is plain ASCII from this module: nothing needs escaping."""
    column = _columns(rows, origin)
    parts = (
        _member('{"type":"', column["type"], '"'),
        _member(',"event":"', column["event"], '"'),
        _member(',"userId":"', column["userId"], '"'),
        _member(',"anonymousId":"', column["anonymousId"], '"'),
        _member(',"messageId":"', column["messageId"], '"'),
        _member(',"timestamp":"', _iso(column["timestamp"]), '"'),
        _member(',"properties":{"price":', column["price"]),
        _member(',"category":"', column["category"], '"}'),
        _member(',"properties":{"query":"', column["query"], '"}'),
        _member(',"properties":{"revenue":', column["revenue"], "}"),
        _member(',"context":{"device":"', column["device"], '"'),
        _member(',"referrer":"', column["referrer"], '"'),
        _member(',"campaign":"', column["campaign"], '"'),
        _member('},"traits":{"loyalty_tier":"', column["loyalty_tier"], '"'),
        _member(',"past_orders":', column["past_orders"]),
    )
    lines = pc.binary_join_element_wise(*parts, "}}\n", "")
    _, bounds, data = lines.buffers()
    file.write(memoryview(data)[: np.frombuffer(bounds, np.int32)[len(lines)]])


def _member(before: str, value: Any, after: str = "") -> Any:
    """The value between two texts; nothing at all where it is null."""
    return pc.fill_null(pc.binary_join_element_wise(before, value.cast(pa.string()), after, ""), "")


def _iso(timestamp: Any) -> Any:
    plain = timestamp.cast(pa.timestamp("ms")).cast(pa.string())
    return pc.binary_join_element_wise(pc.replace_substring(plain, " ", "T"), "Z", "")


def _visitor_ids(rows: Rows, origin: Origin) -> Any:
    return _hex(b"v-", rows["visitor"], origin.seed, 4)


def _hex(prefix: bytes, number: npt.NDArray[np.uint32], seed: int, purpose: int) -> Any:
    """16 hex digits, distinct for distinct numbers: SplitMix64 (Steele, Lea, Flood, 2014) is a bijection."""
    salt = np.random.default_rng([seed, purpose]).integers(2**63, dtype=np.uint64)
    mixed = number.astype(np.uint64) ^ salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    octets = mixed.astype(">u8").view(np.uint8).reshape(len(number), 8)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.empty((len(number), len(prefix) + 16), np.uint8)
    text[:, : len(prefix)] = np.frombuffer(prefix, np.uint8)
    text[:, len(prefix) :: 2] = digits[octets >> 4]
    text[:, len(prefix) + 1 :: 2] = digits[octets & 15]
    offsets = np.arange(len(number) + 1, dtype=np.int32) * text.shape[1]
    return pa.StringArray.from_buffers(len(number), pa.py_buffer(offsets), pa.py_buffer(text.tobytes()))
