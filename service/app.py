"""The application: what it is made of, how it starts and how it ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service import embedded, errors, location, logs, metrics, models, port, supervisor, tracing
from service.api import audiences, events, health, inference, ranking, scores, visitors
from service.api import models as models_api
from service.api.admission import Admission
from service.api.express import ExpressLane
from service.api.state import State
from service.api.tensors import InferIn
from service.door import Door
from service.http import KEEP_ALIVE_S, Protocol, close_stalled
from service.lifecycle import Lifecycle, Server, cancel
from service.live_scores import LiveScores
from service.logs import RequestId
from service.members import Members
from service.metrics import RequestTimer
from service.propensities import Propensities
from service.score_log import ScoreLog
from service.scorer import Scorer
from service.settings import Settings, log_unknown
from service.store import Store
from service.tracing import Traced, Tracing
from service.workers import compaction, keeping, telling

logger = logging.getLogger(__name__)

_DAY_MS = 86_400_000

DESCRIPTION = """
How likely is this visitor to buy, to churn, to sign up? Send **events** as they happen and ask for a **score** when a
page needs one; what was just sent is in the next score. Errors are `application/problem+json` (RFC 9457).
"""


def create_app(settings: Settings, lifecycle: Lifecycle | None = None, traces: Tracing | None = None) -> FastAPI:
    """The ASGI application. Its lifespan loads the models, and starts the embedded server if no Redis is given.

    Whoever runs it says by `lifecycle` when it is about to end. Its end closes `traces`.
    """
    lifecycle = lifecycle or Lifecycle()
    app = FastAPI(
        title="Propensity",
        version=_version(),
        summary="Real-time propensity scores",
        description=DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lambda _: open_state(settings, lifecycle, traces),
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        # Ours are in `service.tracing`: these have paths, and with them ids of visitors, in their spans.
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    for noun in (scores, events, visitors, audiences, models_api, ranking, inference, health):
        app.include_router(noun.router)
    app.add_middleware(Admission, most=settings.in_flight)
    app.add_middleware(RequestTimer)
    app.add_middleware(Traced)
    app.add_middleware(RequestId)
    errors.install(app)
    app.openapi = _openapi(app)  # type: ignore[method-assign]
    return app


def serve(settings: Settings) -> None:
    """Serve until interrupted. Raises PropensityError if what it needs cannot be started."""
    if settings.workers > 1:
        supervisor.serve(settings)
        return
    logs.configure(settings.log_format, settings.log_level)
    log_unknown()
    # Before there is a server that handles it, it is to end in order too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    port.require_free(settings.host, settings.port)
    server = None if settings.redis_url else embedded.start(settings.data_dir)
    try:
        run(settings)
    finally:
        metrics.retire(str(os.getpid()))
        if server is not None:
            server.close()


def run(settings: Settings, bound: socket.socket | None = None, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve in this process, on the port of the settings or on a socket that is bound to it, until a signal comes.

    Raises PropensityError for variables of tracing that cannot be followed.
    """
    lifecycle = Lifecycle()
    config = uvicorn.Config(
        create_app(settings, lifecycle, tracing.start(_version())),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=Protocol,
        # There is no route for websockets; another protocol would take the connection over, and log its path.
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
        log_config=None,
    )
    server = Server(config, lifecycle, delay_s=settings.shutdown_delay_ms / 1000, on_ready=on_ready)
    server.run(None if bound is None else [bound])


def _version() -> str:
    try:
        return version("propensity")
    except PackageNotFoundError:  # a source tree that nobody installed
        return "0"


@asynccontextmanager
async def open_store(settings: Settings, history_ms: int) -> AsyncIterator[Store]:
    """The feature cache of the settings, embedded or not; visitors are kept for `history_ms` and the slack."""
    async with AsyncExitStack() as stack:
        url = settings.redis_url
        if url is None:
            server = embedded.start(settings.data_dir)
            stack.callback(server.close)
            url = server.url
        logger.info("feature cache: %s", location.parse(url))
        store = Store.open(
            url,
            namespace=settings.namespace,
            retention_ms=history_ms + settings.retention_slack_days * _DAY_MS,
            timeout_ms=settings.redis_timeout_ms,
            connect_timeout_ms=settings.redis_connect_timeout_ms,
            connections=settings.redis_connections,
        )
        stack.push_async_callback(store.close)
        yield store


@asynccontextmanager
async def open_state(settings: Settings, lifecycle: Lifecycle, traces: Tracing | None = None) -> AsyncIterator[State]:
    """The resources of one process: the models, the feature cache, and the scorer that has both."""
    asyncio.get_running_loop().set_exception_handler(logs.log_loop_error)
    metrics.set_service(_version(), settings.latency_objective_ms)
    loaded = models.load(settings.artifacts, settings.default_model)
    async with open_store(settings, loaded.history_ms) as store:
        propensities = Propensities(store, kept_moves=settings.kept_changes)
        members = Members(store, kept_changes=settings.kept_changes)
        live_scores = LiveScores(propensities, buffer=settings.live_scores_buffer)
        scorer = Scorer(
            store,
            loaded,
            live_scores.add,
            deadline_ms=settings.deadline_ms,
            max_deadline_ms=settings.max_deadline_ms,
            queue_length=settings.queue_length,
            breaker_failures=settings.breaker_failures,
            breaker_pause_ms=settings.breaker_pause_ms,
        )
        log = ScoreLog(store, length=settings.score_log_length, buffer=settings.score_log_buffer)
        lane = ExpressLane(scorer, log, settings.body_bytes, traces)
        chores = [
            asyncio.create_task(close_stalled(lane.connections, settings.request_timeout_s)),
            asyncio.create_task(compaction.run(store)),
            asyncio.create_task(keeping.run(store, propensities, members)),
            asyncio.create_task(telling.run(loaded, scorer)),
        ]
        # What lives as long as the process need not be looked at in every collection.
        gc.collect()
        gc.freeze()
        try:
            yield State(
                settings=settings,
                models=loaded,
                door=Door.of(settings.phone_region, settings.consent_categories),
                store=store,
                scorer=scorer,
                score_log=log,
                propensities=propensities,
                members=members,
                lane=lane,
                tracing=traces,
                lifecycle=lifecycle,
            )
        finally:
            await cancel(*chores)
            scorer.close()
            await log.close()
            await live_scores.close()
            telling.tell(loaded, scorer)
            if traces is not None:
                traces.close()
            gc.unfreeze()


def _openapi(app: FastAPI) -> Callable[[], dict[str, Any]]:
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                license_info=app.license_info,
                routes=app.routes,
            )
            # Schemas that no route declares as its model, since they go beyond application/json.
            _, extra = models_json_schema(
                [(InferIn, "validation"), (errors.Problem, "validation")], ref_template="#/components/schemas/{model}"
            )
            app.openapi_schema["components"]["schemas"] |= extra["$defs"]
        return app.openapi_schema

    return openapi
