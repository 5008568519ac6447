"""What HubSpot and Klaviyo have in common: people are records that your own ids tell apart, and so are their clients.

Both clients are made from a description of the API: a call takes `_request_timeout`, raises an exception with status,
headers and body where it is refused, and one of urllib3's where no answer comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import urllib3

from audiences.destinations.protocol import Busy, Outcome, Person, Rejected

FORM: Final = "external_id"
LISTS: Final = "propensity_lists"  # the property with the lists of ours that a record is on
TOLD: Final = 200  # characters of a platform's words
CONNECT_S: Final = 10.0
NOBODY: Final = Person("0" * 64, {FORM: ("propensity-asks-for-nobody",)})  # whom to look for where nobody is meant


class Record(Protocol):
    """A contact or a profile."""

    @property
    def id(self) -> str:
        """The platform's id of it."""


@dataclass(frozen=True)
class Client:
    """How requests are made of a platform."""

    platform: str
    timeout_s: float
    refusals: tuple[type[Exception], ...]
    mapped: Callable[[str, Any], Busy | Rejected]  # what a refusal of a request means

    def ask(self, what: str, call: Callable[..., Any], *arguments: Any, missing: bool = False, **named: Any) -> Any:
        """The answer to a request, None where nothing is found and that may be. Raises Busy and Rejected."""
        timeouts = (min(CONNECT_S, self.timeout_s), float(self.timeout_s))  # Klaviyo's takes no integers
        try:
            return call(*arguments, **named, _request_timeout=timeouts)
        except self.refusals as error:
            if missing and getattr(error, "status", None) == 404:
                return None
            raise self.mapped(what, error) from None
        except urllib3.exceptions.HTTPError as error:
            raise Busy(f"{self.platform} gave no answer when {what}: {type(error).__name__}") from None


def after_s(headers: Mapping[str, str] | None) -> float | None:
    """The seconds of Retry-After, where it is there."""
    try:
        return max(0.0, float((headers or {})["Retry-After"]))
    except (KeyError, ValueError):
        return None


def added(noun: str, own: Sequence[Record], refused: Mapping[str, str]) -> Outcome:
    """Of who was to be added and has these records; a record that is not there may be made tomorrow."""
    return _outcome(noun, own, refused) if own else Outcome(False, f"no {noun} has this {FORM}", final=False)


def removed(noun: str, own: Sequence[Record], refused: Mapping[str, str]) -> Outcome:
    """Of who was to be removed and has these records."""
    return _outcome(noun, own, refused) if own else Outcome(True, f"no {noun} has this {FORM}, so none is on the list")


def _outcome(noun: str, own: Sequence[Record], refused: Mapping[str, str]) -> Outcome:
    reasons = [refused[record.id] for record in own if record.id in refused]
    return Outcome(False, reasons[0]) if reasons else Outcome(True, f"{noun} {', '.join(one.id for one in own)}")


def property_of(field: str) -> str:
    """The name of the property that keeps a field."""
    return field if field.startswith("propensity") else f"propensity_{field}"
