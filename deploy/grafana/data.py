"""Owns the dashboard *Data*: do events come, do they come in time, and can they be used."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    AMBER,
    BLUE,
    RATE,
    SERVICE,
    Any,
    Series,
    choice,
    dashboard_of,
    heat_map,
    instances,
    lines,
    number,
)
from deploy.grafana.thresholds import above, line


def build() -> Dashboard:
    """The dashboard, ready to be written as JSON."""
    return dashboard_of(
        "data",
        "The stream of events: how many come, how late, and what is wrong with them.",
        "now-6h",
        [*instances(), choice("model", "Model", "label_values(propensity_model_info, model)")],
        {
            "At a glance": _glance(),
            "Volume": _volume(),
            "Time": _time(),
            "Quality": _quality(),
        },
    )


def _glance() -> list[Any]:
    return [
        number(
            "Events a second",
            "Events received in a second, whatever became of them.",
            "cps",
            Series(f"sum(rate(propensity_events_total{{{SERVICE}}}{RATE}))"),
            base=BLUE,
            span=4,
            runbook="events-silent",
        ),
        number(
            "Refused, last hour",
            "Share of the events of the last hour that could not be understood and were put into quarantine.",
            "percentunit",
            Series("sum(propensity:events_refused:ratio_rate1h) or vector(0)"),
            span=4,
            limits=[above("refused_share", AMBER)],
            runbook="events-refused",
        ),
        number(
            "Unknown, last hour",
            "Share of the sound events of the last hour whose name no model knows: something renamed, or not in the "
            "catalogue.",
            "percentunit",
            Series("sum(propensity:events_unknown:ratio_rate1h) or vector(0)"),
            span=4,
            runbook="events-unknown",
        ),
        number(
            "From the future, last hour",
            "Share of the accepted events of the last hour whose timestamp was ahead of the service's clock.",
            "percentunit",
            Series("sum(propensity:events_future:ratio_rate1h) or vector(0)"),
            span=4,
            limits=[above("future_share", AMBER)],
            runbook="events-from-the-future",
        ),
        number(
            "Late, last hour",
            "Share of the accepted events of the last hour that came long after they happened.",
            "percentunit",
            Series("sum(propensity:events_late:ratio_rate1h) or vector(0)"),
            span=4,
            limits=[above("late_share", AMBER)],
            runbook="events-late",
        ),
        number(
            "Bots, last hour",
            "Share of the scores of the last hour for visitors with as many events as are read at most: mostly bots.",
            "percentunit",
            Series("max(propensity:scores_capped:ratio_rate1h) or vector(0)"),
            span=4,
            limits=[above("capped_share", AMBER)],
            runbook="scores-of-bots",
        ),
    ]


def _volume() -> list[Any]:
    return [
        lines(
            "Events against the same hour of past weeks",
            "Events accepted in a second, over an hour, and what the same hour of the last weeks makes one expect "
            "(dashed). There is no expectation in the first week.",
            "cps",
            Series("sum(propensity:events:rate1h)", "now"),
            Series("sum(propensity:events:expected_rate1h)", "expected"),
            Series(
                "sum(propensity:events:expected_rate1h) * scalar(propensity:threshold:events_fallen_to)", "alarm level"
            ),
            span=12,
            dashed="^(expected|alarm level)$",
            runbook="events-silent",
        ),
        lines(
            "Events by outcome",
            "Events in a second: `accepted` (kept), `ignored` (sound, but no model reads any of it), `refused`; and "
            "`failed`, requests with events that were answered 5xx, each of which may have held many.",
            "cps",
            Series(f"sum by (outcome) (rate(propensity_events_total{{{SERVICE}}}{RATE}))", "{{outcome}}"),
            Series(
                f'sum(rate(propensity_request_seconds_count{{route="/v1/events", status=~"5..", {SERVICE}}}{RATE}))',
                "failed",
            ),
            stacked=True,
            span=12,
            runbook="events-failing",
        ),
        lines(
            "Events by kind",
            "Sound events in a second by their name in the catalogue; `unknown` is what no model knows.",
            "cps",
            Series(f"sum by (kind) (rate(propensity_events_by_kind_total{{{SERVICE}}}{RATE}))", "{{kind}}"),
            stacked=True,
            span=12,
            runbook="events-unknown",
        ),
        lines(
            "Requests with events",
            "Requests to send events, in a second, by HTTP status.",
            "reqps",
            Series(
                f'sum by (status) (rate(propensity_request_seconds_count{{{SERVICE}, route="/v1/events"}}{RATE}))',
                "{{status}}",
            ),
            stacked=True,
            span=12,
        ),
    ]


def _time() -> list[Any]:
    lag = "propensity_event_lag_seconds"
    return [
        heat_map(
            "How late events come",
            "Accepted events by the time from their timestamp to their receipt. The lowest row is events from the "
            "future. History that is loaded again shows as days.",
            "s",
            Series(f"sum by (le) (increase({lag}_bucket{{{SERVICE}}}{RATE}))", "{{le}}"),
            runbook="events-late",
        ),
        lines(
            "Lag",
            "The time from an event's timestamp to its receipt that half of the accepted events, and 95 of 100, stay "
            "within.",
            "s",
            *(
                Series(
                    f"histogram_quantile({share}, sum by (le) (rate({lag}_bucket{{{SERVICE}}}{RATE})))",
                    f"{name} of 100",
                )
                for name, share in {"50": 0.5, "95": 0.95}.items()
            ),
            span=6,
            logarithmic=True,
        ),
        lines(
            "From the future, and late",
            "Share of the accepted events of an hour whose timestamp was ahead of the service's clock, and of those "
            "that came long after they happened.",
            "percentunit",
            Series("sum(propensity:events_future:ratio_rate1h)", "from the future"),
            Series("sum(propensity:events_late:ratio_rate1h)", "late"),
            line("future_share", "alarm level, future"),
            line("late_share", "alarm level, late"),
            dashed="^alarm level",
            span=6,
            runbook="events-late",
        ),
    ]


def _quality() -> list[Any]:
    return [
        lines(
            "Refused, by reason",
            "Share of the events of an hour that were refused, by reason. They are in quarantine with what was wrong.",
            "percentunit",
            Series("propensity:events_refused:ratio_rate1h", "{{reason}}"),
            line("refused_share"),
            dashed="^alarm level$",
            runbook="events-refused",
        ),
        lines(
            "Missing properties",
            "Share of the events of a kind, over an hour, without a property that the catalogue names: a sender that "
            "has changed.",
            "percentunit",
            Series("propensity:property_missing:ratio_rate1h", "{{kind}}: {{property}}"),
            line("property_missing_share"),
            dashed="^alarm level$",
            runbook="property-missing",
        ),
        lines(
            "Unknown names, and bots",
            "Share of the sound events of an hour whose name no model knows; and of the scores of an hour, those of "
            "visitors with as many events as are read at most.",
            "percentunit",
            Series("sum(propensity:events_unknown:ratio_rate1h)", "unknown names"),
            Series('propensity:scores_capped:ratio_rate1h{model=~"$model"}', "bots, {{model}}"),
            line("capped_share", "alarm level, bots"),
            dashed="^alarm level",
            runbook="events-unknown",
        ),
    ]
