"""Owns the dashboard *Serving*: is the service fast, does it answer, and how much can it still take."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    AMBER,
    GREEN,
    RATE,
    RED,
    SCORES,
    SERVICE,
    Any,
    Limit,
    Series,
    dashboard_of,
    heat_map,
    instances,
    lines,
    number,
)
from deploy.grafana.thresholds import above, line

WINDOWS: Final = ("5m", "30m", "1h", "6h", "3d")
OURS: Final = "and on (job, instance) propensity_build_info"
"""Leaves the instances of this service of what every program exports."""


def build() -> Dashboard:
    """The dashboard, ready to be written as JSON."""
    return dashboard_of(
        "serving",
        "Latency, errors, objectives and saturation of the scoring service.",
        "now-1h",
        instances(),
        {
            "At a glance": _glance(),
            "Latency": _latency(),
            "Traffic and errors": _traffic(),
            "Objectives": _objectives(),
            "Feature cache": _cache(),
            "Saturation": _saturation(),
        },
    )


def _quantile(quantile: float, metric: str, selector: str, by: str = "") -> str:
    return f"histogram_quantile({quantile}, sum by (le{by}) (rate({metric}_bucket{{{selector}}}{RATE})))"


def _mean(metric: str, selector: str, by: str = "") -> str:
    total = f"sum by ({by}) " if by else "sum"
    return f"{total}(rate({metric}_sum{{{selector}}}{RATE})) / {total}(rate({metric}_count{{{selector}}}{RATE}))"


def _requests(selector: str = "", by: str = "") -> str:
    inner = f"{SERVICE}, {selector}" if selector else SERVICE
    return f"sum{f' by ({by}) ' if by else ''}(rate(propensity_request_seconds_count{{{inner}}}{RATE}))"


def _glance() -> list[Any]:
    failed = _requests('status=~"5.."')
    degraded = f"sum(rate(propensity_degraded_total{{{SERVICE}}}{RATE}))"
    scores = f"sum(rate(propensity_scores_total{{{SERVICE}}}{RATE}))"
    return [
        number(
            "Alarms",
            "How many alarms of this service fire now. 0 when all is well.",
            "short",
            Series('count(ALERTS{alertstate="firing", alertname=~"Propensity.*"}) or vector(0)', now=True),
            limits=[Limit(1, RED)],
        ),
        number(
            "Instances",
            "How many of the addresses that Prometheus asks answer it.",
            "short",
            Series(f"sum(up{{{SERVICE}}} and on (job) propensity_build_info) or vector(0)", now=True),
            base=RED,
            limits=[Limit(1, GREEN)],
            runbook="service-down",
        ),
        number(
            "Scores a second",
            "Visitors scored in a second, in single requests and in batches.",
            "short",
            Series(scores),
            base="blue",
        ),
        number(
            "99 of 100 scores within",
            "The time that 99 of 100 requests for one score stay within, from the first byte of the request "
            "to the last of the answer.",
            "s",
            Series(_quantile(0.99, "propensity_request_seconds", SCORES)),
            limits=[Limit(0.05, AMBER), Limit(0.1, RED)],
            runbook="scores-slow",
        ),
        number(
            "Server errors",
            "Share of all requests that were answered 5xx.",
            "percentunit",
            Series(f"({failed} or vector(0)) / {_requests()}"),
            limits=[Limit(0.0001, AMBER), Limit(0.001, RED)],
            runbook="scores-slow",
        ),
        number(
            "Degraded",
            "Share of scores that were made without the visitor's history or without the model.",
            "percentunit",
            Series(f"{degraded} / {scores}"),
            limits=[Limit(0.001, AMBER), above("degraded_share", RED)],
            runbook="scores-degraded",
        ),
        number(
            "Refused for load",
            "Requests a second answered 429, since the queue or the requests in flight were full.",
            "reqps",
            Series(f"sum(rate(propensity_shed_total{{{SERVICE}}}{RATE}))"),
            limits=[Limit(0.01, AMBER), Limit(1, RED)],
        ),
        number(
            "Breakers open",
            "Workers that do not ask the feature cache, since it failed several times in a row.",
            "short",
            Series(f'sum(propensity_breaker_state{{{SERVICE}, state!="closed"}})'),
            limits=[Limit(1, RED)],
            runbook="breaker-open",
        ),
    ]


def _latency() -> list[Any]:
    quantiles = {"50 of 100": 0.5, "90 of 100": 0.9, "99 of 100": 0.99, "999 of 1000": 0.999}
    return [
        heat_map(
            "How long scores take",
            "Requests for one score by the time they took. Darker means more of them. A second band above the usual "
            "one is a group of slow requests that percentiles hide.",
            "s",
            Series(f"sum by (le) (increase(propensity_request_seconds_bucket{{{SCORES}}}{RATE}))", "{{le}}"),
            runbook="scores-slow",
        ),
        lines(
            "Percentiles of scores",
            "The time that so many requests for one score stay within. The dashed lines are the two objectives: "
            "100 ms, and the tighter one that a setting names.",
            "s",
            *(
                Series(_quantile(share, "propensity_request_seconds", SCORES), name)
                for name, share in quantiles.items()
            ),
            Series("max(propensity_latency_objective_seconds)", "objective, tighter"),
            Series("vector(0.1)", "objective, 100 ms"),
            span=12,
            dashed="^objective",
            logarithmic=True,
            runbook="scores-slow",
        ),
        lines(
            "Where the time goes",
            "Mean time of each stage of scoring a group of visitors: reading the feature cache, computing features, "
            "the model.",
            "s",
            Series(_mean("propensity_stage_seconds", SERVICE, "stage"), "{{stage}}"),
            stacked=True,
        ),
        lines(
            "Slowest of 100, by stage",
            "The time that 99 of 100 runs of a stage stay within.",
            "s",
            Series(_quantile(0.99, "propensity_stage_seconds", SERVICE, ", stage"), "{{stage}}"),
        ),
        lines(
            "Slowest of 100, by route",
            "The time that 99 of 100 requests stay within, for every route, by the template of its address.",
            "s",
            Series(_quantile(0.99, "propensity_request_seconds", SERVICE, ", route"), "{{route}}"),
            logarithmic=True,
        ),
    ]


def _traffic() -> list[Any]:
    return [
        lines(
            "Requests",
            "Requests answered in a second, by route. `none` is an address that does not exist.",
            "reqps",
            Series(_requests(by="route"), "{{route}}"),
            stacked=True,
        ),
        lines(
            "Answers by status",
            "Answers in a second by HTTP status. 4xx are the caller's mistakes, 5xx the service's.",
            "reqps",
            Series(_requests(by="status"), "{{status}}"),
            stacked=True,
        ),
        lines(
            "Server errors by route",
            "Answers 5xx in a second, by route and status. A line at 0 without a name means that there were none.",
            "reqps",
            Series(f"""{_requests('status=~"5.."', "route, status")} or vector(0)""", "{{route}} {{status}}"),
        ),
        lines(
            "Degraded scores, by what was missing",
            "Share of scores made without the visitor's history (`store`) or without a model (`model`), over five "
            "minutes and all instances. They are answered 200, in time, and are worth less.",
            "percentunit",
            Series("propensity:degraded:ratio_rate5m", "{{reason}}"),
            line("degraded_share"),
            dashed="^alarm level$",
            runbook="scores-degraded",
        ),
        lines(
            "Refused for load, by reason",
            "Requests a second answered 429: the `queue` of scores was full, or the requests `in_flight`.",
            "reqps",
            Series(f"sum by (reason) (rate(propensity_shed_total{{{SERVICE}}}{RATE}))", "{{reason}}"),
        ),
        lines(
            "Log of scores",
            "Served scores a second that went to the stream of scores, and that were dropped since it could not keep "
            "up.",
            "cps",
            Series(f"sum by (outcome) (rate(propensity_score_log_total{{{SERVICE}}}{RATE}))", "{{outcome}}"),
            runbook="score-log-dropped",
        ),
    ]


def _burn(rule: str, objective: str) -> list[Series]:
    """How many times faster than allowed errors come, by window."""
    allowed = f"(1 - scalar(propensity:threshold:{objective}))"
    return [Series(f"(1 - {rule}:ratio_rate{window}) / {allowed}", window) for window in WINDOWS]


def _objectives() -> list[Any]:
    good = "propensity:score_latency_good"
    return [
        number(
            "Within 100 ms, last hour",
            "Share of the scores asked for in the last hour that were answered within 100 ms and without an error. "
            "The objective is 99.9 %.",
            "percentunit",
            Series(f"{good}:ratio_rate1h"),
            base=RED,
            limits=[above("score_latency_objective", GREEN)],
            span=4,
            decimals=2,
            runbook="scores-slow",
        ),
        number(
            "Within the tighter objective",
            "Share of the scores asked for in the last hour that were answered within the time that the setting "
            "PROPENSITY_LATENCY_OBJECTIVE_MS names. The objective is 99 %.",
            "percentunit",
            Series("propensity:score_latency_tight:ratio_rate1h"),
            base=AMBER,
            limits=[above("score_tight_objective", GREEN)],
            span=4,
            decimals=2,
            runbook="scores-over-tight-objective",
        ),
        number(
            "Error budget left, 30 days",
            "Of what may go wrong in 30 days, how much is left. Below 0 the objective was missed. It begins five "
            "minutes after Prometheus does.",
            "percentunit",
            Series("propensity:score_latency_budget:remaining30d"),
            base=RED,
            limits=[above("error_budget_left", GREEN)],
            span=4,
            decimals=1,
            runbook="error-budget-low",
        ),
        lines(
            "Error budget over time",
            "The part of the error budget of 30 days that is left. Dashed: from here on an alarm asks to stop risky "
            "changes.",
            "percentunit",
            Series("propensity:score_latency_budget:remaining30d", "left"),
            line("error_budget_left"),
            span=12,
            height=4,
            dashed="^alarm level$",
            runbook="error-budget-low",
        ),
        lines(
            "Burn rate, 100 ms",
            "How many times faster than allowed scores are late or fail, over windows of several lengths. At 1 the "
            "budget of 30 days lasts just 30 days. An alarm needs a long and a short window to be above its level: "
            "it was bad for a while, and still is.",
            "none",
            *_burn(good, "score_latency_objective"),
            *(line(f"burn_{window}", f"alarm level, {window}") for window in ("1h", "6h", "3d")),
            span=12,
            dashed="^alarm level",
            runbook="scores-slow",
        ),
        lines(
            "Burn rate, tighter objective",
            "The same for the tighter objective.",
            "none",
            *_burn("propensity:score_latency_tight", "score_tight_objective"),
            *(line(f"burn_{window}", f"alarm level, {window}") for window in ("6h", "3d")),
            span=12,
            dashed="^alarm level",
            runbook="scores-over-tight-objective",
        ),
    ]


def _cache() -> list[Any]:
    redis = "propensity_redis_seconds"
    return [
        lines(
            "Round trip",
            "Time of one round trip to the feature cache: reads for a group of scores, writes of the events of a "
            "request. The middle one, and what 99 of 100 stay within.",
            "s",
            Series(_quantile(0.5, redis, SERVICE, ", operation"), "{{operation}}, 50 of 100"),
            Series(_quantile(0.99, redis, SERVICE, ", operation"), "{{operation}}, 99 of 100"),
        ),
        lines(
            "Reads, by how they ended",
            "Reads of the feature cache in a second: `ok`, `late` (not within the deadline), `failed`, or `skipped` "
            "since the breaker is open.",
            "ops",
            Series(f"sum by (outcome) (rate(propensity_store_reads_total{{{SERVICE}}}{RATE}))", "{{outcome}}"),
            stacked=True,
            runbook="breaker-open",
        ),
        lines(
            "Circuit breakers",
            "How many workers have their breaker closed (all is well), open (the cache is not asked), or half open "
            "(one read tries whether it is back).",
            "short",
            Series(f"sum by (state) (propensity_breaker_state{{{SERVICE}}})", "{{state}}"),
            stacked=True,
            runbook="breaker-open",
        ),
    ]


def _saturation() -> list[Any]:
    batch = "propensity_batch_visitors"
    return [
        lines(
            "In flight and waiting",
            "Scores that wait for their turn, and other requests that are being answered, at the moment of the "
            "scrape. Near the limits of the settings, requests are answered 429.",
            "short",
            Series(f"sum(propensity_queue_length{{{SERVICE}}})", "scores in the queue"),
            Series(f"sum(propensity_in_flight{{{SERVICE}}})", "other requests"),
        ),
        lines(
            "Visitors scored together",
            "How many visitors share one read and one run of the model. It grows with load, which is how the service "
            "keeps up.",
            "short",
            Series(_mean(batch, SERVICE), "mean"),
            Series(_quantile(0.95, batch, SERVICE), "95 of 100 at most"),
        ),
        lines(
            "Workers replaced",
            "Workers that ended unasked and were replaced, within the hour before. Always worth a look at the log.",
            "short",
            Series(f"sum by (instance) (increase(propensity_worker_restarts_total{{{SERVICE}}}[1h]))", "{{instance}}"),
            line("worker_restarts_1h"),
            dashed="^alarm level$",
            runbook="workers-restart",
        ),
        lines(
            "Processor",
            "Cores used by the process. Exported by a service with one worker; with several, take what the machine "
            "or the container measures.",
            "short",
            Series(f"rate(process_cpu_seconds_total{{{SERVICE}}}{RATE}) {OURS}", "{{instance}}"),
        ),
        lines(
            "Memory",
            "Resident memory of the process. Exported by a service with one worker; with several, take what the "
            "machine or the container measures.",
            "bytes",
            Series(f"process_resident_memory_bytes{{{SERVICE}}} {OURS}", "{{instance}}"),
        ),
        lines(
            "Broken records",
            "Stored records whose check is wrong, in a second. They are skipped. Above 0 something else writes to the "
            "keys of the feature cache.",
            "cps",
            Series(f"sum(rate(propensity_broken_records_total{{{SERVICE}}}{RATE}))", "skipped"),
        ),
    ]
