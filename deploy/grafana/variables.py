"""Owns what stands for the variables in queries: what Grafana puts there, or an error where it would put nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

POINTS: Final = 1000
"""Points that Grafana asks of a query at most unless its panel says how many; it is the width of the panel."""

_VARIABLE: Final = re.compile(r"\$(\w+)|\$\{(\w+)(?::(\w+))?\}|\[\[(\w+)(?::(\w+))?\]\]")
_REGEX: Final = re.compile(r"([$^*{}\[\]'+?.()|\\])")
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class UnknownVariable(ValueError):
    """A query names a variable that the dashboard does not have."""


@dataclass(frozen=True)
class Window:
    """The chosen time, and how often Prometheus scrapes; all in seconds, ends in Unix time."""

    start_s: float
    end_s: float
    scrape_s: int

    @property
    def range_s(self) -> int:
        """Length of the chosen time."""
        return round(self.end_s - self.start_s)

    def interval_s(self, points: int = POINTS) -> int:
        """$__interval: the time divided by the points, but not less than one scrape."""
        return max(round(self.range_s / points), self.scrape_s, 1)

    def rate_interval_s(self, points: int = POINTS) -> int:
        """$__rate_interval: long enough that every window of a rate has scrapes enough."""
        return max(self.interval_s(points) + self.scrape_s, 4 * self.scrape_s)


def built_in(window: Window, points: int = POINTS) -> dict[str, str]:
    """Variables that Grafana knows without being told."""
    interval_s = window.interval_s(points)
    return {
        "__interval": f"{interval_s}s",
        "__interval_ms": str(interval_s * 1000),
        "__rate_interval": f"{window.rate_interval_s(points)}s",
        "__range": f"{window.range_s}s",
        "__range_s": str(window.range_s),
        "__range_ms": str(window.range_s * 1000),
        "__from": str(round(window.start_s * 1000)),
        "__to": str(round(window.end_s * 1000)),
    }


def chosen(dashboard: Mapping[str, Any], choices: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """What stands for each variable of a dashboard: what is chosen, as a regular expression, or everything."""
    choices = choices or {}
    values = {}
    for variable in dashboard["templating"]["list"]:
        name = variable["name"]
        if variable["type"] == "query":
            values[name] = regex(choices[name]) if name in choices else variable["allValue"]
        else:
            values[name] = variable["query"]
    unknown = set(choices) - set(values)
    if unknown:
        raise UnknownVariable(f"the dashboard has no variable {', '.join(sorted(unknown))}")
    return values


def regex(values: Sequence[str]) -> str:
    """Values of a variable as the data source Prometheus writes them: escaped for a regular expression in a string."""
    escaped = [_REGEX.sub(r"\\\\\1", value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def substituted(text: str, values: Mapping[str, str]) -> str:
    """A query with every variable replaced. Raises UnknownVariable naming one that has no value, or a format."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2] or found[4]
        if name not in values:
            raise UnknownVariable(
                f"{found[0]} in {text!r} is no variable of this dashboard: {', '.join(sorted(values))}"
            )
        if found[3] or found[5]:
            raise UnknownVariable(f"{found[0]} in {text!r} asks for a format; write {name} without one")
        return values[name]

    # label_replace refers to the groups of its regular expression as $1: no variable of Grafana begins with a digit
    return _VARIABLE.sub(lambda found: found[0] if (found[1] or "").isdigit() else value(found), text)


def seconds(text: str) -> int:
    """Seconds of a duration such as `now-6h` or `30s`."""
    found = re.fullmatch(r"(?:now-)?(\d+)([smhd])", text)
    if not found:
        raise ValueError(f"{text!r} is no duration; write one as 30s, 15m, 6h, 2d")
    return int(found[1]) * _UNITS_S[found[2]]
