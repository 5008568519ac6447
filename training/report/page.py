"""The page: sections of HTML around the plots, and the words that explain them."""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from service.core.segments import SEGMENTS
from training import evaluate
from training.evaluate import Floats
from training.report import figures
from training.report.data import ReportData, Scored, Span, spaced
from training.report.figures import compact, percent

MOST_FEATURES: Final = 30
_SAMPLE_ROWS: Final = 20_000
_HEAD: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
"""
_GLOSSARY: Final = {
    "Conversion": "What the model predicts, here: {label}. A row that converts is called positive.",
    "Row": "One visitor at one moment. The model saw only what was known then; whether the visitor converted, "
    "the time after it tells.",
    "Base rate": "The share of rows that convert. A model that knows nothing gives everyone this probability.",
    "Baseline": "A simpler way to predict, measured on the same rows. The class prior gives everyone the base rate "
    "of the training rows; logistic regression is the classic formula with one weight a feature.",
    "ROC-AUC": "Take one row that converts and one that does not: how often does the first have the higher score? "
    "50% (0.5) is a coin, 1 is perfect.",
    "Average precision": "Going down the list from the best score: how pure is it, on average, each time another "
    "conversion is found? A random list gives the base rate, 1 is perfect. It says more than ROC-AUC when "
    "conversions are rare.",
    "Log loss, Brier score": "How far probabilities are from what happened. Lower is better. Being very sure and wrong "
    "costs most in the log loss; the Brier score is the mean squared error.",
    "Calibrated": "Probabilities that can be taken at their word: of 100 rows scored 20%, about 20 convert.",
    "Expected calibration error": "The usual gap between what was predicted and what was observed, over groups of "
    "about the same score. With few rows, chance alone makes it larger than 0.",
    "Lift": "How many times more often a group converts than the average.",
    "Cumulative gains": "If only the best-scored 10% could be reached: which share of all conversions is among them?",
    "Segment": "A band of scores with a name. Every visitor is in exactly one.",
    "95% interval": "Where the number would mostly lie if the same were measured on other rows of the same kind. "
    "The fewer rows, the wider.",
    "Gain": "How much splitting on a feature helped the trees while they were trained.",
    "Effect (SHAP)": "How far a feature pushed one row's score up or down from the average score, in log-odds. Its "
    "mean size says how much the feature is used.",
    "Log-odds": "The scale on which effects add up: +0.7 doubles the odds, -0.7 halves them.",
    "Leak": "A feature that holds the answer because it is written after the fact. Such a model looks excellent "
    "here and fails when it is used.",
}


def render(report: ReportData) -> str:
    """The report as one HTML page that loads nothing; the same data gives the same bytes."""
    with figures.style():
        sections = [
            _header(report),
            _alerts(report),
            _summary(report),
            _ranking(report),
            _calibration(report),
            _targeting(report),
            _segments(report),
            _importance(report),
            _distributions(report),
            _training(report),
            _glossary(report),
        ]
    title = f"{_text(report.model)} {_text(report.version)}: training report"
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    body = "\n".join(section for section in sections if section)
    head = f"{_HEAD}<title>{title}</title>\n<style>\n{style}</style>\n</head>"
    return f"{head}\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"


def _header(report: ReportData) -> str:
    metrics = report.scored.metrics
    facts = {
        "Version": report.version,
        "Trained": report.created_at.replace("T", " ").replace("+00:00", " UTC"),
        "Predicts": report.label,
        "Data": _range(report),
        "Rows": f"{sum(span.rows for span in report.splits):,}",
        "Feature spec": report.spec_hash[:12],
    }
    tenth = metrics.gains[0]
    story = (
        f"Of {metrics.rows:,} rows that were kept out of training, {percent(metrics.base_rate)} converted. "
        f"The tenth with the highest scores holds {percent(tenth)} of all conversions, "
        f"{metrics.lift[0]:.1f} times its share. "
        f"Probabilities are off by {_points(metrics.calibration_error)} on average."
    )
    return (
        f'<header><p class="eyebrow">Training report</p><h1>{_text(report.model)}</h1>'
        f'<p class="lead">{_text(story)}</p>{_facts(facts)}</header>'
    )


def _alerts(report: ReportData) -> str:
    leaks = _alert("Possible leaks: check before serving", [leak.message for leak in report.leaks])
    return leaks + _alert("Worth knowing", report.warnings)


def _alert(title: str, messages: Sequence[str]) -> str:
    if not messages:
        return ""
    items = "".join(f"<li>{_text(_sentence(message))}</li>" for message in messages)
    return f'<section class="alert" role="alert"><h3>{title}</h3><ul>{items}</ul></section>'


def _summary(report: ReportData) -> str:
    metrics = report.scored.metrics
    chance = evaluate.calibration_error_by_chance(report.scored.probability)
    base = (
        f'<div class="card"><h3>Base rate</h3><p class="value">{percent(metrics.base_rate)}</p>'
        f'<p class="small">{metrics.positives:,} of {metrics.rows:,} rows convert</p></div>'
    )
    cards = [
        base,
        _card(report, "ROC-AUC", "roc_auc", "{:.3f}", _interval(metrics.roc_auc_interval)),
        _card(
            report, "Average precision", "average_precision", "{:.3f}", _interval(metrics.average_precision_interval)
        ),
        _card(report, "Lift of the top tenth", "lift", "{:.1f}×", "times the base rate"),
        _card(report, "Log loss", "log_loss", "{:.3f}", "lower is better"),
        _card(report, "Brier score", "brier", "{:.3f}", "lower is better"),
        _card(
            report, "Calibration error", "calibration_error", "{:.3f}", f"lower is better; chance alone: {chance:.3f}"
        ),
        _card(report, "Calibration slope", "calibration_slope", "{:.2f}", "1 is ideal"),
    ]
    return f'<section aria-label="Summary" class="cards">{"".join(cards)}</section>'


def _card(report: ReportData, title: str, metric: str, form: str, below: str) -> str:
    def shown(one: Scored) -> str:
        value = getattr(one.metrics, metric)
        return "–" if value is None else form.format(value[0] if isinstance(value, tuple) else value)

    versus = "".join(
        f"<div><span>{_text(name)}</span><span>{shown(one)}</span></div>" for name, one in report.baselines.items()
    )
    return (
        f'<div class="card"><h3>{title}</h3><p class="value">{shown(report.scored)}</p><p class="small">{below}</p>'
        f'<div class="versus">{versus}</div></div>'
    )


def _ranking(report: ReportData) -> str:
    scored = _scored(report)
    return _section(
        "Does it put the right ones on top?",
        "Ranking is what decides whom to address first. The numbers beside the names are the areas under the curves.",
        _figure(
            "ROC curve",
            "Further to the upper left is better; the diagonal is chance. " + _key(_lines(report, "roc_auc")),
            figures.roc(report.test_label, scored),
        ),
        _figure(
            "Precision and recall",
            "Further to the upper right is better. " + _key(_lines(report, "average_precision")),
            figures.precision_recall(report.test_label, scored),
        ),
    )  # fmt: skip


def _calibration(report: ReportData) -> str:
    metrics = report.scored.metrics
    chance = evaluate.calibration_error_by_chance(report.scored.probability)
    slope = "" if metrics.calibration_slope is None else _slope(metrics.calibration_slope)
    words = (
        f"<p>Predicted and observed rates differ by {_points(metrics.calibration_error)} on average; with this many "
        f"rows, perfect probabilities would still show about {_points(chance)}.</p><p>{slope}</p>"
    )
    groups = figures.groups(report.test_label)
    mean, rate, rows = evaluate.calibration_bins(
        report.scored.probability, report.test_label.astype(np.float64), min(groups, evaluate.DECILES)
    )
    low, high = evaluate.wilson(rate * rows, rows)
    table = _table(
        ("Predicted", "Observed", "95% interval", "Rows"),
        [
            (percent(one[0]), percent(one[1]), f"{percent(one[2])} to {percent(one[3])}", f"{one[4]:,}")
            for one in zip(mean, rate, low, high, rows.tolist(), strict=True)
        ],
    )
    return _section(
        "Can the probabilities be taken at their word?",
        "Rows are put into groups of about equal size by score. If the model is right, the dots follow the dashed "
        "line. Both axes are stretched near zero, where most scores are.",
        _figure(
            "Calibration", "Dots above the line convert more often than predicted, below it less often. "
            + _key({"observed, with 95% interval": "model", "perfect": "aim"}),
            figures.calibration(report.test_label, report.scored.probability),
        ),
        f'<div class="card"><h3>In numbers</h3><div class="how">{words}</div>{table}</div>',
    )  # fmt: skip


def _slope(slope: float) -> str:
    if 0.9 <= slope <= 1.1:
        said = "scores are spread about as widely as they should be"
    elif slope < 0.9:
        said = "scores are too extreme: high ones too high, low ones too low"
    else:
        said = "scores are too cautious: high ones could be higher, low ones lower"
    return f"Calibration slope {slope:.2f} (1 is ideal): {said}."


def _targeting(report: ReportData) -> str:
    scored = _scored(report)
    bars = {name: f"block {figures.kind(place)}" for place, (name, one) in enumerate(scored.items())}
    bars = {name: bar for name, bar in bars.items() if name == "model" or figures.ranks(scored[name])}
    return _section(
        "What does it buy to address the best first?",
        "Rows are sorted by score and cut into tenths.",
        _figure(
            "Cumulative gains", "How many of all conversions are found when only the best-scored are addressed. "
            + _key({**_lines(report), "a perfect model": "aim"}),
            figures.cumulative_gains(report.test_label, scored),
        ),
        _figure(
            "Lift by tenth", "How many times more often each tenth converts than the average row. "
            + _key({**bars, "average": "aim"}),
            figures.lift(scored),
        ),
    )  # fmt: skip


def _segments(report: ReportData) -> str:
    probability, label = report.scored.probability, report.test_label.astype(np.float64)
    cuts = [report.segments[name] for name in SEGMENTS[:-1]]
    segment = _places(probability, cuts)
    count = len(SEGMENTS)
    rows = np.bincount(segment, minlength=count).astype(np.float64)
    positives = np.bincount(segment, label, count).astype(np.float64)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(segment, probability, count) / rows
    names = [_name(segment_name) for segment_name in SEGMENTS]
    base = label.mean()
    lines = []
    for place, name in enumerate(names):
        swatch = f'<span class="swatch" style="background: var(--s{place})"></span>{name}'
        cut = f"from {percent(cuts[place])}" if place < len(cuts) else "below"
        share = percent(rows[place] / rows.sum())
        found = percent(positives[place] / positives.sum())
        observed = positives[place] / rows[place] if rows[place] else None
        shown = (
            ("–", "–", "–")
            if observed is None
            else (percent(predicted[place]), percent(observed), f"{observed / base:.2f}×")
        )
        lines.append((swatch, cut, f"{rows[place]:,.0f}", share, *shown, found))
    heads = ("Segment", "Score", "Rows", "Share of rows", "Predicted", "Converted", "Lift", "Share of conversions")
    return (
        _section(
            "Who is in which segment?",
            "Segments cut the score into six named bands; the dashed lines are the cut-offs.",
            _figure(
                "Scores by segment",
                "How many rows have which score.",
                figures.scores_by_segment(probability, segment, cuts),
            ),
            _figure(
                "Conversion by segment",
                "Bars: observed, with 95% interval. Diamonds: predicted. They should agree and fall from the top down.",
                figures.rates_by_segment(names, rows, positives, predicted),
            ),
        )  # fmt: skip
        + f'<div class="card">{_table(heads, lines)}</div>'
    )


def _importance(report: ReportData) -> str:
    importance = report.importance
    effect = np.abs(importance.shap).mean(axis=0)
    gain = importance.gain
    gain = gain / max(float(gain.sum()), 1e-300)
    columns = _leading(report)
    lines = "".join(
        f'<tr><td class="code"><span>{place}</span> {_text(importance.names[column])}</td>'
        f"<td>{_bar(effect[column] / max(effect.max(), 1e-300), compact(float(f'{effect[column]:.2g}')), '')}</td>"
        f"<td>{_bar(gain[column] / max(gain.max(), 1e-300), percent(gain[column]), 'gain')}</td></tr>"
        for place, column in enumerate(columns, 1)
    )
    head = "<tr><th>Feature</th><th>Mean effect, log-odds</th><th>Share of gain</th></tr>"
    table = f'<table class="used"><thead>{head}</thead><tbody>{lines}</tbody></table>'
    words = '<p class="how">Sorted by mean effect on the score.</p>'
    ramp = '<span class="key"><span>low <span class="ramp"></span> high value</span><span>grey: missing</span></span>'
    return _section(
        "What does it look at?",
        f"The features that move scores most, measured on {len(importance.shap):,} rows. {_how_many(report)}",
        f'<div class="card"><h3>Features by use</h3>{words}{table}</div>',
        _figure(
            "Effects, row by row", f"One dot a row. To the right: pushed the score up. {ramp}",
            figures.beeswarm(importance, columns),
        ),
    )  # fmt: skip


def _distributions(report: ReportData) -> str:
    rows = spaced(len(report.sample), _SAMPLE_ROWS)
    sample, positive = report.sample[rows], report.sample_label[rows].astype(np.bool_)
    cards = "".join(_distribution(report, column, sample[:, column], positive) for column in _leading(report))
    return (
        "<section><h2>What do the features look like?</h2>"
        '<p class="note">Each feature, most used first: <b style="color: var(--model)">rows that convert</b> against '
        "all others, each as shares of its own kind. Long tails are squeezed; the outermost 0.5% on each side are "
        f'drawn at the edge. {_how_many(report)}</p><div class="many">{cards}</div></section>'
    )


def _distribution(
    report: ReportData, column: int, values: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_]
) -> str:
    name = report.importance.names[column]
    missing = np.isnan(values)
    kept = np.clip(values[~missing].astype(np.float64), -3e38, 3e38)
    codes = {code: text for text, code in report.categories.get(name, {}).items()}
    drawn = figures.distribution(kept, positive[~missing], name, codes) if len(kept) else ""
    return (
        f'<figure class="card"><figcaption><h3 class="code">{_text(name)}</h3>'
        f'<p class="small">{_missing(missing, positive)}</p></figcaption>{drawn}</figure>'
    )


def _missing(missing: npt.NDArray[np.bool_], positive: npt.NDArray[np.bool_]) -> str:
    if missing.all():
        return "always missing"
    if not missing.any():
        return "never missing"
    if not positive.any() or positive.all():
        return f"missing {percent(missing.mean())}"
    return f"missing {percent(missing.mean())} ({percent(missing[positive].mean())} of converting rows)"


def _training(report: ReportData) -> str:
    lines = [
        (_text(span.name), _day(span.start_ms), _day(span.end_ms), f"{span.rows:,}", f"{span.positives:,}", _rate(span))
        for span in report.splits
    ]
    table = _table(("Rows for", "From", "To", "Rows", "Conversions", "Rate"), lines)
    data = {_name(key): _shown(value) for key, value in report.data.items()}
    facts = _facts({**data, "Feature spec hash": report.spec_hash})
    return _section(
        "How was it trained?",
        "The last rows in the table were used for nothing but this report.",
        _figure(
            "Learning curve", "Training stops when rows that the trees do not learn from stop getting better. "
            + _key({**_curves(report), f"kept: {report.best_round:,} trees": "aim"}),
            figures.learning_curve(report.learning_curve, report.best_round),
        ),
        f'<div class="card"><h3>Data</h3>{table}{facts}</div>',
    )  # fmt: skip


def _glossary(report: ReportData) -> str:
    terms = "".join(
        f"<div><dt>{term}</dt><dd>{_text(words.format(label=report.label))}</dd></div>"
        for term, words in _GLOSSARY.items()
    )
    return f'<section><h2>In plain words</h2><dl class="glossary">{terms}</dl></section>'


def _section(title: str, note: str, *cards: str) -> str:
    return f'<section><h2>{title}</h2><p class="note">{note}</p><div class="grid">{"".join(cards)}</div></section>'


def _figure(title: str, how: str, drawn: str) -> str:
    return f'<figure class="card"><figcaption><h3>{title}</h3><p class="how">{how}</p></figcaption>{drawn}</figure>'


def _key(kinds: Mapping[str, str]) -> str:
    """What each line of a plot is: {its name: its class in the style sheet}."""
    items = "".join(f'<span><i class="line {kind}"></i>{_text(name)}</span>' for name, kind in kinds.items())
    return f'<span class="key">{items}</span>'


def _lines(report: ReportData, metric: str = "") -> dict[str, str]:
    return {
        name + (f" {getattr(one.metrics, metric):.3f}" if metric else ""): figures.kind(place)
        for place, (name, one) in enumerate(_scored(report).items())
    }


def _curves(report: ReportData) -> dict[str, str]:
    return {name: figures.kind(place) for name, place in figures.curve_places(report.learning_curve).items()}


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _bar(share: float, text: str, kind: str) -> str:
    return f'<span class="bar"><i class="{kind}" style="width: {max(58 * share, 1):.1f}%"></i>{text}</span>'


def _scored(report: ReportData) -> dict[str, Scored]:
    return {"model": report.scored, **report.baselines}


def _leading(report: ReportData) -> list[int]:
    """Columns of the most used features, by mean effect and then by gain."""
    effect = np.abs(report.importance.shap).mean(axis=0)
    order = np.lexsort((-report.importance.gain, -effect))
    return [int(column) for column in order[:MOST_FEATURES]]


def _how_many(report: ReportData) -> str:
    count = len(report.importance.names)
    return f"Shown are the top {MOST_FEATURES} of {count}." if count > MOST_FEATURES else ""


def _places(probability: Floats, cuts: Sequence[float]) -> npt.NDArray[np.int64]:
    """Place in SEGMENTS of each score: the first segment whose cut-off it reaches."""
    return np.asarray(len(cuts) - np.searchsorted(np.array(cuts)[::-1], probability, "right"), np.int64)


def _range(report: ReportData) -> str:
    if "from" in report.data and "to" in report.data:
        return f"{_date(report.data['from'])} to {_date(report.data['to'])}"
    starts = [span.start_ms for span in report.splits if span.start_ms is not None]
    ends = [span.end_ms for span in report.splits if span.end_ms is not None]
    return f"{_day(min(starts))} to {_day(max(ends))}" if starts and ends else "a table without times"


def _date(value: object) -> str:
    return str(value)[:10]


def _day(moment_ms: int | None) -> str:
    if moment_ms is None:
        return "–"
    return datetime.datetime.fromtimestamp(moment_ms / 1000, datetime.UTC).strftime("%Y-%m-%d")


def _rate(span: Span) -> str:
    return percent(span.positives / span.rows) if span.rows else "–"


def _points(share: float) -> str:
    return f"{float(f'{100 * share:.2g}'):g} percentage points"


def _interval(bounds: tuple[float, float]) -> str:
    return f"95%: {bounds[0]:.3f} to {bounds[1]:.3f}"


def _name(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _shown(value: object) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}"
    if isinstance(value, Sequence):
        return ", ".join(_shown(one) for one in value[:5]) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    return str(value)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _text(value: str) -> str:
    return html.escape(value)
