"""Owns traffic that looks like the shop's last week, to see the dashboards with: its moments are scored again.

With `--drift FEATURE` one feature moves by two standard deviations in the second half of the time, and its alarm fires.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.core import features
from training import dataset, source, specfile

ROOT: Final = Path(__file__).parents[2]
PAUSE_S: Final = 0.05
FRACTION: Final = 1 / 200
"""Of the events, how many are late, from the future, unknown or cannot be read: each kind."""


def main(arguments: Sequence[str]) -> int:
    """Send scores and events for some time."""
    parser = argparse.ArgumentParser(prog="make traffic", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="port of the service on this machine")
    parser.add_argument("--events", default=str(ROOT / ".run" / "shop" / "events.parquet"), help="as for training")
    parser.add_argument("--spec", type=Path, default=ROOT / "examples" / "shop.yaml", help="as for training")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--drift", metavar="FEATURE", help="feature that moves in the second half of the time")
    given = parser.parse_args(arguments)
    names, matrix = rows(given.events, given.spec)
    if given.drift and given.drift not in names:
        print(f"{given.drift} is no feature of {given.spec}; there are {', '.join(names)}", file=sys.stderr)
        return 1
    print(f"Scoring {len(matrix):,} moments of the shop's last week again, for {given.seconds} s", flush=True)
    try:
        send(given.port, names, matrix, given.seconds, given.drift)
    except ConnectionRefusedError:
        print(f"Nothing answers at port {given.port}; make run in another terminal starts the service", file=sys.stderr)
        return 1
    return 0


def rows(events: str, spec_path: Path) -> tuple[tuple[str, ...], npt.NDArray[np.float32]]:
    """Names of the features, and rows float32[n, F] of whom the service would have scored, in random order."""
    spec = specfile.load(spec_path)
    with tempfile.TemporaryDirectory() as directory:
        built = dataset.build(source.read([events], spec, Path(directory)), features.compile(spec), max_rows=20_000)
    matrix = built.matrix if built.population is None else built.population.matrix
    np.random.default_rng(1).shuffle(matrix)
    return spec.names, matrix


def send(
    port: int, names: Sequence[str], matrix: npt.NDArray[np.float32], seconds: float, drift: str | None = None
) -> None:
    """Score rows one after the other, several at once now and then, with events between them."""
    random = np.random.default_rng(2)
    began = time.monotonic()
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        for turn in itertools.count():
            passed = time.monotonic() - began
            if passed > seconds:
                return
            chosen = matrix[random.integers(0, len(matrix), 24)]
            if drift and passed > seconds / 2:
                column = list(names).index(drift)
                chosen[:, column] += 2 * np.float32(np.nanstd(matrix[:, column]))
            visitors = [visitor(names, row, int(random.integers(0, 5000))) for row in chosen]
            for one in visitors[:8]:
                _post(connection, "/v1/score", one)
            _post(connection, "/v1/score/batch", {"visitors": visitors[8:]})
            if turn % 4 == 0:
                _post(connection, "/v1/events", {"batch": [event(random) for _ in range(12)]})
            time.sleep(PAUSE_S)


def visitor(names: Sequence[str], row: npt.NDArray[np.float32], number: int) -> dict[str, Any]:
    """A request for the score of a row of features."""
    values = (None if math.isnan(value) else value for value in row.tolist())
    return {"visitor_id": f"visitor-{number}", "features": dict(zip(names, values, strict=True))}


def event(random: np.random.Generator) -> dict[str, Any]:
    """An event of the shop; now and then one that is late, early, unknown or broken."""
    now = datetime.now(UTC)
    fate = random.choice(["late", "future", "unknown", "broken", "sound"], p=[FRACTION] * 4 + [1 - 4 * FRACTION])
    moment = now + {"late": -timedelta(hours=5), "future": timedelta(hours=2)}.get(str(fate), timedelta())
    name = random.choice(["Product Viewed", "Product Added", "Order Completed"], p=[0.8, 0.15, 0.05])
    properties = {"price": round(float(random.lognormal(3.5, 0.6)), 2), "category": "shoes"}
    return {
        "userId": f"visitor-{random.integers(0, 5000)}",
        "event": "Newsletter Read" if fate == "unknown" else str(name),
        "timestamp": "yesterday" if fate == "broken" else moment.isoformat(),
        "properties": {**properties, "revenue": properties["price"]} if name == "Order Completed" else properties,
    }


def _post(connection: http.client.HTTPConnection, path: str, document: dict[str, Any]) -> None:
    connection.request("POST", path, json.dumps(document), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status not in (200, 429):  # 429: more than the service can take, which the dashboards show
        raise http.client.HTTPException(f"POST {path} was answered {answer.status}: {body.decode(errors='replace')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
