"""Signed requests: JSON posted to a webhook as Standard Webhooks describes it, and what its answer means.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import datetime
import email.utils
import http.client
import time
import urllib.error
import urllib.request
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from pydantic import AnyHttpUrl, Field, SecretStr, field_validator
from standardwebhooks import Webhook

from audiences.destinations.options import Options, Secret
from audiences.destinations.protocol import Busy, Rejected

MOST_READ: Final = 4_000_000
LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
BUSY: Final = (408, 425, 429)


class Endpoint(Options):
    """Where a webhook is, and what its requests are signed with."""

    url: AnyHttpUrl = Field(description="Where requests are posted to: https, or http on the loopback.")
    secret: Secret = Field(description="The key of the signature, as Standard Webhooks writes it: whsec_BASE64.")
    timeout_s: float = Field(30, gt=0, le=60, description="Seconds that one request may take.")

    @field_validator("url")
    @classmethod
    def _is_private(cls, url: AnyHttpUrl) -> AnyHttpUrl:
        if url.scheme != "https" and url.host not in LOOPBACK:
            raise ValueError("write an address that begins with https://, since people are sent to it")
        return url

    @field_validator("secret")
    @classmethod
    def _is_a_key(cls, secret: SecretStr) -> SecretStr:
        # The library takes any text: a word would be a key of a few bytes, which receivers decode in other ways.
        try:
            key = base64.b64decode(secret.get_secret_value().removeprefix("whsec_"), validate=True)
        except ValueError:
            key = b""
        if not 24 <= len(key) <= 64:
            raise ValueError(
                "is no key; write whsec_ and 24 to 64 random bytes in base64, as from: openssl rand -base64 32"
            )
        return secret


class Answer(NamedTuple):
    """What an endpoint said to a request that it took."""

    status: int
    body: bytes


class _Staying(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, nor looks where it leads: a signed request is for the address that was given."""

    def http_error_302(self, *_: object) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302  # type: ignore[assignment]


_open: Final = urllib.request.build_opener(_Staying).open


def post(endpoint: Endpoint, name: str, body: bytes, at: datetime.datetime) -> Answer:
    """Post a body, `name` being the id by which a receiver tells what it has had already; `at` has a time zone.

    Raises Busy for what may be tried again, with the seconds of Retry-After, and Rejected for all other refusals.
    """
    key = Webhook(endpoint.secret.get_secret_value())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "propensity",
        "webhook-id": name,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": key.sign(name, at.astimezone(datetime.UTC), body.decode("utf-8")),
    }
    request = urllib.request.Request(str(endpoint.url), body, headers, method="POST")
    host = urlsplit(str(endpoint.url)).netloc.rpartition("@")[2]
    until_s = time.monotonic() + endpoint.timeout_s
    try:
        with _open(request, timeout=endpoint.timeout_s) as answer:
            return Answer(answer.status, _read(answer, until_s))
    except urllib.error.HTTPError as error:
        with error:
            said = f"{host} answers {error.code}: {_shortened(error)}"
        if error.code in BUSY or error.code >= 500:
            raise Busy(said, _seconds(error.headers.get("Retry-After"), at)) from None
        raise Rejected(said) from None
    except (OSError, http.client.HTTPException) as error:
        raise Busy(f"{host} does not answer ({getattr(error, 'reason', None) or type(error).__name__})") from None


def _read(answer: http.client.HTTPResponse, until_s: float) -> bytes:
    """The body, up to MOST_READ of it. Raises TimeoutError where it goes on, byte by byte, beyond a moment."""
    body = bytearray()
    while len(body) < MOST_READ and (part := answer.read1(MOST_READ - len(body))):
        body += part
        if time.monotonic() > until_s:
            raise TimeoutError
    return bytes(body)


def _shortened(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read1(300).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        text = ""
    return " ".join(text.split())[:200] or error.reason


def _seconds(text: str | None, now: datetime.datetime) -> float | None:
    """Seconds that Retry-After asks for, which is a number or a date."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(text) - now).total_seconds())
    except (ValueError, TypeError):
        return None
