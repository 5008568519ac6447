"""Snapshots of scores as `propensity score --events` writes them, and the bundles that they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SHOP, WriteBundle

AT_MS = 1_790_000_000_000

WriteScores = Callable[..., Path]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let gRPC trust stand-ins of Google: it reads the variable once a process, when its first channel is made."""
    from tests.audiences.stubs import googleapis

    with pytest.MonkeyPatch.context() as patch:
        path = googleapis.write_authority(tmp_path_factory.mktemp("authority"))
        patch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(path))
        yield


@pytest.fixture(scope="session")
def two_models(tmp_path_factory: pytest.TempPathFactory, write_bundle: WriteBundle) -> Path:
    """Artifacts with a model `shop` and a model `churn`."""
    directory = tmp_path_factory.mktemp("models")
    write_bundle(directory)
    write_bundle(directory, {**SHOP, "model": "churn"})
    return directory


@pytest.fixture
def write_scores(tmp_path: Path) -> WriteScores:
    """A function that writes a snapshot into a directory of this name, in several parts, and returns its path."""

    def write(
        name: str,
        scores: Mapping[str, float],
        *,
        model: str = "shop",
        version: str = "1",
        at_ms: int = AT_MS,
        last_event_ms: int | Sequence[int] = AT_MS,
        features: Mapping[str, Sequence[float]] | None = None,
        parts: int = 2,
    ) -> Path:
        rows = len(scores)
        columns: dict[str, Any] = {
            "visitor_id": pa.array(list(scores), pa.string()),
            "propensity": pa.array(list(scores.values()), pa.float32()),
            "percentile": pa.array(np.zeros(rows, np.float32)),
            "segment": pa.array(["nurture"] * rows),
            "model": pa.array([model] * rows),
            "version": pa.array([version] * rows),
            "at": pa.array([at_ms] * rows, pa.timestamp("ms", "UTC")),
            "last_event_ms": pa.array(
                [last_event_ms] * rows if isinstance(last_event_ms, int) else last_event_ms, pa.int64()
            ),
            **{feature: pa.array(values, pa.float32()) for feature, values in (features or {}).items()},
        }
        directory = tmp_path / name
        directory.mkdir()
        table = pa.table(columns)
        cuts = np.linspace(0, rows, parts + 1).astype(int)
        for part in range(parts):
            slice_ = table.slice(cuts[part], cuts[part + 1] - cuts[part])
            pq.write_table(slice_, directory / f"part-{part:05}.parquet")
        return directory

    return write
