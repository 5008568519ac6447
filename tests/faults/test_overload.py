"""Three times as many visitors as the service can score."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
import uvloop
from onnx import helper, numpy_helper

from loadtest.open_loop import Result, drive, post
from service.core import bundle
from tests.conftest import RedisServer, ServiceProcess, WriteBundle
from tests.faults import visitors
from tests.faults.conftest import Note, Serve, Span
from tests.faults.scrape import scraped
from tests.faults.traffic import exchange
from tests.faults.verdict import DEADLINE_MS, LATENESS_MS

pytestmark = pytest.mark.redis

TIMES: Final = 3
GOODPUT: Final = 0.8
REFUSAL_MS: Final = 10
RETURN_S: Final = 5.0
# Who ask without a pause where the peak is measured: enough to keep it busy, and no more than it answers in time.
VISITORS: Final = 24
# Sizes the model so that one core scores one to two thousand visitors a second, which a generator in Python can triple.
WIDTH: Final = 4096
LAYERS: Final = 400


@pytest.fixture
def expensive(tmp_path: Path, write_bundle: WriteBundle) -> Path:
    """Artifacts with the same model, which takes its time: it adds nothing, computed in many layers."""
    written = write_bundle(tmp_path / "artifacts", visitors.SPEC, weight=visitors.WEIGHT)
    model = onnx.load(written / "model.onnx")
    graph = model.graph
    last = graph.node[-1]
    width = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    spread = np.full((width, WIDTH), 0.001, np.float32)
    nodes = [helper.make_node("MatMul", ["known", "spread"], ["layer0"])]
    nodes += [helper.make_node("Tanh", [f"layer{number}"], [f"layer{number + 1}"]) for number in range(LAYERS)]
    nodes += [
        helper.make_node("ReduceMax", [f"layer{LAYERS}"], ["most"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["most", "zero"], ["nothing"]),
        helper.make_node("Add", ["margin", "nothing"], ["whole"]),
        helper.make_node("Sigmoid", ["whole"], list(last.output)),
    ]
    del graph.node[-1]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(spread, "spread"))
    onnx.checker.check_model(model)
    (written / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((written / "manifest.json").read_text())
    bundle.seal(written, {name: manifest[name] for name in manifest if name not in ("format", "files", "seal")})
    return tmp_path / "artifacts"


@pytest.fixture
def two_cores() -> Iterator[tuple[int, int]]:
    """One for the service and one for this process, which is on it meanwhile."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("the generator needs a core of its own")
    os.sched_setaffinity(0, allowed[1:2])
    yield allowed[0], allowed[1]
    os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("full")
def test_of_three_times_what_it_can_do_the_service_does_most_and_refuses_the_rest_at_once(
    serve: Serve,
    filled_redis: RedisServer,
    expensive: Path,
    two_cores: tuple[int, int],
    span: Span,
    note: Note,
) -> None:
    service = serve(filled_redis.url, artifacts=expensive)
    for task in Path(f"/proc/{service.process.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {two_cores[0]})
    uvloop.run(_overload(service, span, note))


async def _overload(service: ServiceProcess, span: Span, note: Note) -> None:
    url = f"{service.url}/v1/score"
    questions = [post(url, json.dumps({"visitor_id": visitors.name(number)}).encode()) for number in range(1000)]
    peak = await _closed_loop(service.port, questions, span(3, 10))
    degraded = scraped(service, "propensity_degraded_total")
    lives: list[float] = []
    living = asyncio.create_task(_ask_whether_it_lives(service.port, lives))
    flood = await drive(url, questions, TIMES * peak, span(5, 30), connections=512, poisson_seed=5)
    living.cancel()
    await asyncio.wait([living])
    degraded = scraped(service, "propensity_degraded_total") - degraded
    await asyncio.sleep(RETURN_S - 2)
    after = await drive(url, questions, peak / 2, 2, connections=64, poisson_seed=6)
    in_time = _shares(flood, 200, DEADLINE_MS + LATENESS_MS)
    goodput = (flood.outcome == 200).sum() * in_time / flood.scheduled_s[-1]
    note(
        f"{TIMES} times capacity",
        peak_a_second=round(peak),
        goodput=f"{goodput / peak:.0%}",
        share_200=f"{(flood.outcome == 200).mean():.0%}",
        p99_of_200_ms=round(flood.percentile_ms(99), 1),
        longest_of_200_ms=round(flood.percentile_ms(100), 1),
        p99_of_429_ms=round(flood.percentile_ms(99, 429), 1),
        longest_of_429_ms=round(flood.percentile_ms(100, 429), 1),
        degraded=int(degraded),
        longest_livez_ms=round(max(lives), 1),
        p99_after_ms=round(after.percentile_ms(99), 1),
        lag=round(float(np.percentile(flood.lag_ms, 99)), 2),
    )
    assert set(flood.counts) == {"200", "429"}, flood.counts
    assert not living.exception() if not living.cancelled() else True
    assert goodput >= GOODPUT * peak
    assert in_time >= 0.98
    assert flood.percentile_ms(99, 429) < REFUSAL_MS
    assert set(after.counts) == {"200"}
    assert after.percentile_ms(99) < DEADLINE_MS


def _shares(result: Result, status: int, limit_ms: float) -> float:
    """The share of the answers of a status that came in time."""
    return float((result.latency_ms[result.outcome == status] <= limit_ms).mean())


async def _closed_loop(port: int, questions: list[bytes], seconds: float) -> float:
    """Scores a second for VISITORS of whom each asks again as soon as it has its answer."""
    loop = asyncio.get_running_loop()
    until, given = loop.time() + seconds, 0

    async def ask_on(first: int) -> None:
        nonlocal given
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number = first
        while loop.time() < until:
            status, raw = await exchange(reader, writer, questions[number % len(questions)])
            assert status in (200, 429), raw
            given, number = given + (status == 200), number + VISITORS
            if status == 429:
                await asyncio.sleep(0.01)
        writer.close()

    await asyncio.gather(*(ask_on(first) for first in range(VISITORS)))
    return given / seconds


async def _ask_whether_it_lives(port: int, found_ms: list[float]) -> None:
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            asked = loop.time()
            status, raw = await exchange(reader, writer, b"GET /livez HTTP/1.1\r\nHost: shop\r\n\r\n")
            assert status == 200, raw
            found_ms.append((loop.time() - asked) * 1000)
            await asyncio.sleep(0.1)
    finally:
        writer.close()
