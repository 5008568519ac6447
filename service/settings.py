"""Every setting of the service, read once from `PROPENSITY_*` variables and a `.env` file, then passed along."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service import consent, identity, location
from service.core.advice import nearest
from service.core.errors import PropensityError
from service.logs import Format, Level

logger = logging.getLogger(__name__)

_PREFIX: Final = "PROPENSITY_"
OBJECTIVES_MS: Final = (5, 10, 25, 50)
Positive = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """Settings of one process. Each says its unit and why to change it."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    host: str = Field(
        "127.0.0.1", description="Address to listen on; 0.0.0.0 in a container, where others must reach it."
    )
    port: int = Field(8000, ge=1, le=65535, description="TCP port to listen on.")
    redis_url: str | None = Field(
        None,
        repr=False,
        description="Feature cache, Redis 7.0 or Valkey, or newer: redis://, unix://, redis+sentinel:// or "
        "redis+cluster:// URL, with rediss for TLS. Without it an embedded server keeps its data in data_dir; set it "
        "as soon as there are two machines.",
    )
    data_dir: Path = Field(
        Path(".propensity"),
        description="Directory of the embedded server's data; a disk that is backed up, one directory a service.",
    )
    ledger_url: str | None = Field(
        None,
        description="SQLite or PostgreSQL with what was sent to which destination: sqlite:////var/lib/ledger.db, "
        "postgresql://user:password@host/database. ledger.db in data_dir without it; set it where two hosts send.",
    )
    artifacts: Path = Field(
        Path("artifacts"), description="Directory of trained models: MODEL/VERSION/ and MODEL/aliases.json."
    )
    default_model: str | None = Field(
        None, description="Model of requests that name none; needed as soon as two models are loaded."
    )
    namespace: str = Field(
        "p",
        pattern=r"^[A-Za-z0-9_.-]{1,32}$",
        description="Prefix of every key, so that two deployments can share one Redis.",
    )
    deadline_ms: Positive = Field(
        50,
        description="Milliseconds a score waits for the feature cache before it is made without it. "
        "Raise it where the cache is in another zone; lower it where a page waits.",
    )
    max_deadline_ms: Positive = Field(
        1000, description="Most milliseconds that the header X-Request-Timeout-Ms can ask for instead of deadline_ms."
    )
    latency_objective_ms: int = Field(
        25,
        description="Milliseconds within which scores should be answered, the tighter of the two objectives that "
        "alarms watch: 5, 10, 25 or 50. Lower it where a page waits; it changes alarms, not answers.",
    )
    request_timeout_s: Positive = Field(
        10,
        description="Seconds a client may take to send a request, or may not read on, before its connection is closed.",
    )
    shutdown_delay_ms: int = Field(
        1000,
        ge=0,
        description="Milliseconds between SIGTERM, when /readyz turns 503, and refusing connections; as long as the "
        "load balancer needs to notice.",
    )
    shutdown_timeout_s: Positive = Field(
        10, description="Seconds that requests in flight have to end after that; a client may never finish its own."
    )
    redis_timeout_ms: Positive = Field(
        1000,
        description="Milliseconds one command may take when events are written or a visitor is looked up.",
    )
    redis_connect_timeout_ms: Positive = Field(
        200, description="Milliseconds to open a connection; raise it for a cache that is far away."
    )
    redis_connections: Positive = Field(
        32, description="Connections a process opens at most; requests beyond them wait in their deadline."
    )
    breaker_failures: Positive = Field(
        5, description="Reads of the feature cache that fail in a row before scores are made without asking it."
    )
    breaker_pause_ms: Positive = Field(
        1000, description="Milliseconds until one read tries whether it is back; the longest that it goes unnoticed."
    )
    workers: Positive = Field(
        1,
        description="Processes that serve, each with a listening socket of its own; one a core, where the feature "
        "cache has a core of its own.",
    )
    worker_silence_s: Positive = Field(
        10,
        description="Seconds that one of several workers may do nothing, not even take a connection, before it is "
        "killed and replaced.",
    )
    queue_length: Positive = Field(
        1024,
        description="Scores that may wait in a worker; beyond them 429, and sooner where the last ones would be late.",
    )
    in_flight: Positive = Field(
        256, description="Other requests that a worker handles at once; beyond them 429. Each may hold a body_bytes."
    )
    event_bytes: Positive = Field(
        32 * 1024, description="Bytes of JSON one event may have; larger ones are refused one by one."
    )
    body_bytes: Positive = Field(
        500 * 1024, description="Bytes one request body may have; larger ones are answered 413."
    )
    batch_events: Positive = Field(
        2000, description="Events one batch may hold; larger ones are answered 413, since others wait meanwhile."
    )
    batch_visitors: Positive = Field(1000, description="Visitors one batch may ask for; raise body_bytes with it.")
    quarantine_length: Positive = Field(
        1000, description="Refused events kept, about, for a look and a replay; each may have event_bytes."
    )
    score_log_length: int = Field(
        1000,
        ge=0,
        description="Entries of the stream of served scores, of up to 100 scores each; 0 where nobody reads it.",
    )
    score_log_buffer: Positive = Field(
        10_000, description="Served scores a worker holds until they are in the stream; beyond them they are dropped."
    )
    live_scores_buffer: int = Field(
        20_000,
        ge=0,
        description="Visitors whose latest score a worker holds until it is in the propensity database; beyond them "
        "scores are dropped. 0 where only batch scores belong there.",
    )
    kept_changes: Positive = Field(
        200_000,
        description="Changes of each audience, and moves between segments of each model, that are kept for who follows "
        "them; more for followers that are away for longer, at 50 bytes each and the id.",
    )
    retention_slack_days: int = Field(
        7,
        ge=0,
        description="Days a silent visitor is kept beyond the longest history of the models; the time that a "
        "model with a longer history may take to arrive.",
    )

    phone_region: str | None = Field(
        None,
        description="Country of phone numbers that name none, two letters as DE. Without it such numbers are refused; "
        "set it where nearly all customers are of one country.",
    )
    consent_categories: dict[str, list[str]] | None = Field(
        None,
        description="Purposes (ads, email, crm, analytics) that each category of your consent tool stands for, as "
        'JSON: {"Targeting": ["ads", "email"]}. Without it Advertising stands for ads, and each purpose for itself.',
    )

    log_format: Format = Field(
        "text", description="How the log on stderr looks: text for people, json with one object a line for collectors."
    )
    log_level: Level = Field(
        "info", description="The least important lines that are logged: debug, info, warning or error."
    )

    @field_validator("latency_objective_ms")
    @classmethod
    def _is_measured(cls, milliseconds: int) -> int:
        if milliseconds not in OBJECTIVES_MS:
            raise ValueError(f"write one of {', '.join(map(str, OBJECTIVES_MS))}, which are bounds of buckets")
        return milliseconds

    @field_validator("phone_region")
    @classmethod
    def _is_region(cls, country: str | None) -> str | None:
        if country is None:
            return None
        region = identity.region_of(country)
        if region is None:
            raise ValueError("write a country as two letters of ISO 3166-1, as DE or US")
        return region

    @field_validator("consent_categories")
    @classmethod
    def _are_purposes(cls, categories: dict[str, list[str]] | None) -> dict[str, list[str]] | None:
        if categories is None:
            return None
        if wrong := {purpose for purposes in categories.values() for purpose in purposes} - set(consent.PURPOSES):
            raise ValueError(f"{min(wrong)!r} is no purpose; write some of {', '.join(consent.PURPOSES)}")
        return categories

    @field_validator("redis_url")
    @classmethod
    def _is_readable(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                location.parse(url)
            except PropensityError as error:
                raise ValueError(str(error)) from None
        return url


def load(**given: object) -> Settings:
    """Settings from the environment, with what is `given` before it. Raises PropensityError naming what is wrong."""
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        wrong = [
            f"{_PREFIX}{str(item['loc'][0]).upper()}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_input=False)
        ]
        raise PropensityError("; ".join(wrong)) from None


def log_unknown() -> None:
    """Warn of variables that are named as settings are and are none: what they were to change stays as it is."""
    known = [f"{_PREFIX}{name.upper()}" for name in Settings.model_fields]
    for name in sorted(one for one in os.environ if one.startswith(_PREFIX) and one not in known):
        logger.warning("%s is no setting%s", name, nearest(name, known))
