"""Asks a Prometheus over HTTP what a panel asks it, as Grafana's data source does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

from deploy.grafana import variables
from deploy.grafana.variables import Window

TIMEOUT_S: Final = 30
Point = tuple[float, float]


class QueryFailed(RuntimeError):
    """Prometheus did not answer a query; the message is its own."""


@dataclass(frozen=True)
class Series:
    """Labels, and points as (Unix time in seconds, value)."""

    labels: dict[str, str]
    points: list[Point]


def ask(url: str, path: str, **parameters: object) -> Any:
    """The `data` of an answer of the HTTP API. Raises QueryFailed with what Prometheus says."""
    try:
        with urlopen(f"{url}/api/v1/{path}?{urlencode(parameters)}", timeout=TIMEOUT_S) as answer:
            document = json.load(answer)
    except HTTPError as error:
        raise QueryFailed(json.load(error).get("error", str(error))) from None
    return document["data"]


def instant(url: str, query: str, at_s: float) -> list[Series]:
    """The values of a query at a moment, one point a series."""
    found = ask(url, "query", query=query, time=at_s)
    if found["resultType"] == "scalar":
        return [Series({}, [_point(found["result"])])]
    return [Series(one["metric"], [_point(one["value"])]) for one in found["result"]]


def over_time(url: str, query: str, window: Window, step_s: int) -> list[Series]:
    """The values of a query every `step_s` seconds of a window that begins and ends at whole steps."""
    start, end = (moment // step_s * step_s for moment in (window.start_s, window.end_s))
    found = ask(url, "query_range", query=query, start=start, end=end, step=step_s)["result"]
    return [Series(one["metric"], [_point(value) for value in one["values"]]) for one in found]


def _point(pair: tuple[float, str]) -> Point:
    return float(pair[0]), float(pair[1])


def answered(
    url: str, panel: Mapping[str, Any], values: Mapping[str, str], window: Window
) -> Iterator[tuple[Mapping[str, Any], list[Series]]]:
    """What Prometheus answers to each query of a panel, with the dashboard's variables set to `values`."""
    points = int(panel.get("maxDataPoints") or variables.POINTS)
    whole = {**values, **variables.built_in(window, points)}
    for target in panel["targets"]:
        query = variables.substituted(target["expr"], whole)
        if target.get("instant"):
            yield target, instant(url, query, window.end_s)
        else:
            yield target, over_time(url, query, window, window.interval_s(points))
