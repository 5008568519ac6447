"""Owns the dashboard *Model*: what it scores, how far that has moved from the training population, which version."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    AMBER,
    BLUE,
    MODEL,
    RATE,
    RED,
    Any,
    Limit,
    Series,
    dashboard_of,
    instances,
    lines,
    listing,
    number,
    side_by_side,
    versions,
)
from deploy.grafana.thresholds import numbers

FOLKLORE: Final = (Limit(0.1, AMBER), Limit(0.25, RED))
SCORE: Final = 'feature="(score)"'
ENDS: Final = {"lowest": "below", "highest": "from"}


def build() -> Dashboard:
    """The dashboard, ready to be written as JSON."""
    return dashboard_of(
        "model",
        "What the models score, how far features and scores have moved from the training population, and which "
        "versions serve. Over all instances.",
        "now-24h",
        [*instances(), *versions()],
        {
            "At a glance": _glance(),
            "Scores and segments": _scores(),
            "Drift": _drift(),
            "Missing values and history": _missing(),
            "Versions": _versions(),
        },
    )


def of(rule: str) -> str:
    """A recorded series of the chosen model and versions."""
    return f"{rule}{{{MODEL}}}"


def _in_order(expr: str) -> str:
    """Give each bin its lower end as the label `from`, which is what bins are sorted by."""
    number = "-?[0-9.]+(?:e[-+]?[0-9]+)?"
    begin = f'label_replace({expr}, "from", "$1", "bin", "(?:from )?({number})(?: to .*)?")'
    return f'label_replace({begin}, "from", "-1e300", "bin", "below .*|any value")'


def _glance() -> list[Any]:
    worst = f"{of('propensity:psi:1h')} / {of('propensity:drift_threshold:1h')}"
    return [
        number(
            "Drifted, last hour",
            "Features (and the score) whose distribution is further from the training population than chance and the "
            "floor allow. 0 when all is well.",
            "short",
            Series(f"count({of('propensity:psi:1h')} > {of('propensity:drift_threshold:1h')}) or vector(0)"),
            limits=[Limit(1, RED)],
            runbook="feature-drift",
        ),
        number(
            "Drifted, last day",
            "The same over 24 hours, which sees smaller changes.",
            "short",
            Series(f"count({of('propensity:psi:24h')} > {of('propensity:drift_threshold:24h')}) or vector(0)"),
            limits=[Limit(1, RED)],
            runbook="feature-drift",
        ),
        number(
            "Furthest feature",
            "PSI of the feature that has moved most in the last hour, as a share of the level it is alarmed at. "
            "Above 100 % it is alarmed.",
            "percentunit",
            Series(f"max({worst})"),
            limits=[Limit(0.7, AMBER), Limit(1, RED)],
            runbook="feature-drift",
        ),
        number(
            "Scores, last hour",
            "How many scores the numbers of the last hour rest on. Of few scores, only large changes can be told from "
            "chance.",
            "short",
            Series(f"sum({of('propensity:population:1h')})"),
            base=BLUE,
            decimals=0,
        ),
        number(
            "Age of the model",
            "Time since the version that serves was trained; the oldest one where several serve.",
            "s",
            Series(f"time() - min({of('propensity_model_created_timestamp_seconds')})"),
            base=BLUE,
            limits=[Limit(86400 * numbers()["model_age_days"], AMBER)],
            runbook="model-stale",
        ),
        number(
            "Loaded since",
            "Time since the newest version was loaded.",
            "s",
            Series(f"time() - max({of('propensity_model_loaded_timestamp_seconds')})"),
            base=BLUE,
        ),
        number(
            "Time to load",
            "How long loading and verifying a version took.",
            "s",
            Series(f"max({of('propensity_model_load_seconds')})"),
            base=BLUE,
        ),
        number(
            "Models refused",
            "Models in the artifacts directory that failed their checks and are not served. 0 when all is well.",
            "short",
            Series('max(propensity_models{state="refused"})'),
            limits=[Limit(1, RED)],
            runbook="models-refused",
        ),
    ]


def _scores() -> list[Any]:
    served = f"sum by (bin) (increase(propensity_feature_bin_total{{{MODEL}, {SCORE}}}[$__range]))"
    everything = f"scalar(sum(increase(propensity_feature_bin_total{{{MODEL}, {SCORE}}}[$__range])))"
    reference = f"avg by (bin) (propensity_reference_share{{{MODEL}, {SCORE}}})"
    return [
        side_by_side(
            "Scores against the training population",
            "Which share of the scores in the chosen time fell into each bin, beside the share that the training "
            "population had there. Bins are tenths of the training population; choose one version to compare "
            "with its own.",
            "percentunit",
            "bin",
            [
                Series(_in_order(f"{served} / {everything}"), "served"),
                Series(_in_order(reference), "training population"),
            ],
            order="from",
        ),
        lines(
            "Segments against the training population",
            "Which share of the scores of the last hour fell into each segment. Dashed: what the cut-offs give on the "
            "training population.",
            "percentunit",
            Series(f"sum by (segment) ({of('propensity:segment_share:1h')})", "{{segment}}"),
            Series(f"avg by (segment) ({of('propensity_reference_segment_share')})", "{{segment}}, training"),
            span=12,
            height=9,
            dashed=", training$",
        ),
        lines(
            "Scores by segment",
            "Scores given in a second, by segment.",
            "cps",
            Series(f"sum by (segment) (rate(propensity_scores_total{{{MODEL}}}{RATE}))", "{{segment}}"),
            stacked=True,
            span=12,
        ),
        lines(
            "Lowest and highest scores",
            "Share of the scores of the last hour in the lowest and in the highest bin of the training population. "
            "Dashed: the share that these bins had there.",
            "percentunit",
            *(
                Series(
                    f'sum by (version) (propensity:feature_bin:increase1h{{{MODEL}, {SCORE}, bin=~"{bin} .*"}}) '
                    f"/ sum by (version) (propensity:feature_population:1h{{{MODEL}, {SCORE}}})",
                    f"{name}, {{{{version}}}}",
                )
                for name, bin in ENDS.items()
            ),
            *(
                Series(
                    f'max by (version) (propensity_reference_share{{{MODEL}, {SCORE}, bin=~"{bin} .*"}})',
                    f"{name}, {{{{version}}}}, training",
                )
                for name, bin in ENDS.items()
            ),
            span=12,
            dashed=", training$",
            runbook="score-drift",
        ),
    ]


def _drift() -> list[Any]:
    return [
        lines(
            "Distance of each feature from its alarm, last hour",
            "PSI of each feature over the last hour, as a share of the level it is alarmed at. That level knows how "
            "many scores there were: what chance alone gives, and a floor below which no change matters. Above 100 % "
            "it is alarmed.",
            "percentunit",
            Series(f"{of('propensity:psi:1h')} / {of('propensity:drift_threshold:1h')}", "{{feature}}"),
            span=12,
            height=9,
            limits=[Limit(1, RED)],
            runbook="feature-drift",
        ),
        lines(
            "The same, last day",
            "PSI over 24 hours, as a share of the level it is alarmed at. It sees smaller changes than an hour can "
            "show, and later.",
            "percentunit",
            Series(f"{of('propensity:psi:24h')} / {of('propensity:drift_threshold:24h')}", "{{feature}}"),
            span=12,
            height=9,
            limits=[Limit(1, RED)],
            runbook="feature-drift",
        ),
        lines(
            "PSI of each feature, last hour",
            "How far the distribution of each feature is from the training population (population stability index). "
            "Grey: the lowest and the highest level that a feature is alarmed at. The dashed lines at 0.1 and 0.25 "
            "are the usual rules of thumb, for orientation only: of few scores chance alone is above them, of many "
            "scores changes that matter are below.",
            "none",
            Series(of("propensity:psi:1h"), "{{feature}}"),
            Series(f"min({of('propensity:drift_threshold:1h')})", "alarm level, lowest"),
            Series(f"max({of('propensity:drift_threshold:1h')} < Inf)", "alarm level, highest"),
            span=12,
            height=9,
            limits=FOLKLORE,
            dashed="^alarm level",
            runbook="feature-drift",
        ),
        lines(
            "PSI of each feature, last day",
            "The same over 24 hours.",
            "none",
            Series(of("propensity:psi:24h"), "{{feature}}"),
            Series(f"min({of('propensity:drift_threshold:24h')})", "alarm level, lowest"),
            Series(f"max({of('propensity:drift_threshold:24h')} < Inf)", "alarm level, highest"),
            span=12,
            height=9,
            limits=FOLKLORE,
            dashed="^alarm level",
            runbook="feature-drift",
        ),
        listing(
            "Features",
            "Every feature, and the score as `(score)`: how far it has moved, the level it is alarmed at, and how "
            "often it is missing, now and in the training population. An infinite level means that the feature is "
            "never alarmed: an hour of traffic has one hour of the day.",
            [
                (Series(of("propensity:psi:1h"), "PSI, 1 h"), "none"),
                (Series(of("propensity:drift_threshold:1h"), "alarm, 1 h"), "none"),
                (Series(of("propensity:psi:24h"), "PSI, 24 h"), "none"),
                (Series(of("propensity:drift_threshold:24h"), "alarm, 24 h"), "none"),
                (Series(of("propensity:missing_share:1h"), "missing, 1 h"), "percentunit"),
                (Series(of("propensity:missing_threshold:1h"), "missing, alarm"), "percentunit"),
                (Series(of("propensity:reference_missing_share"), "missing, training"), "percentunit"),
            ],
            order="PSI, 1 h",
            runbook="feature-drift",
        ),
    ]


def _missing() -> list[Any]:
    age = "propensity_last_event_age_seconds"
    model = 'model=~"$model"'
    return [
        lines(
            "Missing values, last hour",
            "Share of scores in which a feature had no value. A feature that is suddenly always missing is a broken "
            "tracker or a changed name.",
            "percentunit",
            Series(of("propensity:missing_share:1h"), "{{feature}}"),
            runbook="feature-missing",
        ),
        lines(
            "Age of the newest event",
            "How long ago the newest event of the scored visitors was, at the moment of the score: of half of them, "
            "and of 90 of 100, at most. It rises when events come late or not at all.",
            "s",
            *(
                Series(
                    f"histogram_quantile({share}, sum by (le) (rate({age}_bucket{{{model}}}{RATE})))", f"{name} of 100"
                )
                for name, share in {"50": 0.5, "90": 0.9}.items()
            ),
            logarithmic=True,
            runbook="events-silent",
        ),
        lines(
            "Visitors without history",
            "Share of scores of visitors of whom no event is known. Degraded scores are not in it.",
            "percentunit",
            Series(
                f"sum by (model) (rate(propensity_scores_without_history_total{{{model}}}{RATE})) "
                f"/ sum by (model) (rate(propensity_scores_total{{{model}}}{RATE}))",
                "{{model}}",
            ),
        ),
    ]


def _versions() -> list[Any]:
    return [
        lines(
            "Scores by version",
            "Scores given in a second by each version of each model.",
            "cps",
            Series(
                f"sum by (model, version) (rate(propensity_scores_total{{{MODEL}}}{RATE}))", "{{model}} {{version}}"
            ),
            stacked=True,
            span=12,
        ),
        listing(
            "Versions that serve",
            "Which versions are served, how old each is, and how long loading it took.",
            [
                (
                    Series(
                        f"time() - max by (model, version) ({of('propensity_model_created_timestamp_seconds')})", "age"
                    ),
                    "s",
                ),
                (
                    Series(
                        f"time() - max by (model, version) ({of('propensity_model_loaded_timestamp_seconds')})",
                        "loaded since",
                    ),
                    "s",
                ),
                (Series(f"max by (model, version) ({of('propensity_model_load_seconds')})", "time to load"), "s"),
                (Series(f"sum by (model, version) ({of('propensity:population:1h')})", "scores, 1 h"), "short"),
            ],
            order="loaded since",
            span=12,
            height=8,
            runbook="model-stale",
        ),
    ]
