"""Owns what the dashboards know of the thresholds of the alerts: numbers for colours, and series for lines."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import yaml

from deploy.grafana.panels import Limit, Series

RULES: Final = Path(__file__).parents[1] / "prometheus" / "rules" / "thresholds.yml"
PREFIX: Final = "propensity:threshold:"


@cache
def numbers() -> dict[str, float]:
    """Every threshold by its name; those that are not plain numbers are left out."""
    document = yaml.safe_load(RULES.read_text("utf-8"))
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    plain = {rule["record"].removeprefix(PREFIX): rule["expr"].strip() for rule in rules}
    return {
        name: float(expr.removeprefix("vector(").removesuffix(")"))
        for name, expr in plain.items()
        if expr.startswith("vector(")
    }


def above(name: str, color: str) -> Limit:
    """Another colour from the threshold on."""
    return Limit(numbers()[name], color)


def line(name: str, legend: str = "alarm level") -> Series:
    """The threshold that Prometheus compares with now, as a series."""
    if name not in numbers():
        raise KeyError(f"{RULES.name} has no threshold {name}; it has {', '.join(numbers())}")
    return Series(f"max({PREFIX}{name})", legend)
