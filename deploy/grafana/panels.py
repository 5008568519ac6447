"""Owns what the panels of all dashboards share: where their data comes from, how they look, and what they link to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

from grafana_foundation_sdk.builders import (
    barchart,
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE: Final = options.DataSourceRef(type_val="prometheus", uid="${datasource}")
SERVICE: Final = 'job=~"$job", instance=~"$instance"'
"""Selects the instances that the dashboard is set to."""
MODEL: Final = 'model=~"$model", version=~"$version"'
"""Selects the model and the versions that the dashboard is set to."""
SCORES: Final = f'{SERVICE}, route="/v1/score"'
"""Selects the requests for one score, which the latency objectives are about."""
RATE: Final = "[$__rate_interval]"

GREEN, AMBER, RED, BLUE, GREY = "green", "orange", "red", "blue", "#8e8e8e"
DASHED: Final = models.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 6]})
PLAIN: Final = models.DynamicConfigValue("custom.fillOpacity", 0)

Panel = TypeVar("Panel", timeseries.Panel, stat.Panel, heatmap.Panel, table.Panel, bargauge.Panel, barchart.Panel)


class Series(NamedTuple):
    """A query and what its series are called; `now` asks for the latest value alone."""

    expr: str
    legend: str = ""
    now: bool = False


class Limit(NamedTuple):
    """From which value on a panel has another colour."""

    value: float
    color: str


def _dressed(
    panel: Panel,
    title: str,
    text: str,
    unit: str,
    series: Sequence[Series],
    size: tuple[int, int],
    runbook: str | None,
    kind: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Panel:
    """What every panel has: a title, a description in plain words, a unit, queries, a size, and perhaps a runbook."""
    panel.title(title).description(text).unit(unit).datasource(SOURCE).span(size[0]).height(size[1])
    for place, (expr, legend, now) in enumerate(series):
        query = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + place)).format(kind)
        panel.with_target(query.instant() if now else query.range())
    if runbook:
        link = dashboard.DashboardLink(f"What to do: {runbook}").type(models.DashboardLinkType.LINK)
        panel.links([link.url(f"${{docs}}/runbooks/{runbook}.md").target_blank(True)])
    return panel


def _thresholds(limits: Sequence[Limit], base: str) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(None, base), *(models.Threshold(*limit) for limit in limits)]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _color(mode: models.FieldColorModeId, fixed: str | None = None) -> dashboard.FieldColor:
    color = dashboard.FieldColor().mode(mode)
    return color.fixed_color(fixed) if fixed else color


def lines(
    title: str,
    text: str,
    unit: str,
    *series: Series,
    span: int = 8,
    height: int = 8,
    stacked: bool = False,
    limits: Sequence[Limit] = (),
    dashed: str | None = None,
    logarithmic: bool = False,
    runbook: str | None = None,
) -> timeseries.Panel:
    """Values over time. `limits` are dashed lines; series whose name matches `dashed` are grey and dashed."""
    panel = _dressed(timeseries.Panel(), title, text, unit, series, (span, height), runbook)
    panel.line_width(1).fill_opacity(60 if stacked else 8).show_points(options.VisibilityMode.NEVER).axis_soft_min(0)
    panel.color_scheme(_color(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    legend = common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM)
    panel.legend(legend.display_mode(options.LegendDisplayMode.LIST))
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10))
    if limits:
        panel.thresholds(_thresholds(limits, "transparent"))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED))
    if dashed:
        grey = models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": GREY})
        apart = models.DynamicConfigValue("custom.stacking", {"mode": "none"})
        panel.override_by_regexp(f"/{dashed}/", [DASHED, PLAIN, apart, grey])
    return panel


def number(
    title: str,
    text: str,
    unit: str,
    *series: Series,
    span: int = 3,
    limits: Sequence[Limit] = (),
    base: str = GREEN,
    decimals: int | None = None,
    runbook: str | None = None,
) -> stat.Panel:
    """One latest value, large, with its course behind it; green (or `base`) up to the first limit."""
    panel = _dressed(stat.Panel(), title, text, unit, series, (span, 4), runbook)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.color_mode(options.BigValueColorMode.VALUE).thresholds(_thresholds(limits, base))
    panel.graph_mode(options.BigValueGraphMode.NONE if series[0].now else options.BigValueGraphMode.AREA)
    panel.color_scheme(_color(models.FieldColorModeId.THRESHOLDS))
    return panel if decimals is None else panel.decimals(decimals)


def heat_map(
    title: str, text: str, unit: str, series: Series, span: int = 12, height: int = 8, runbook: str | None = None
) -> heatmap.Panel:
    """How often values of each size came, over time; `series` is the increase of the buckets of a histogram."""
    panel = _dressed(
        heatmap.Panel(), title, text, unit, [series], (span, height), runbook, kind=PromQueryFormat.HEATMAP
    )
    colors = heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    panel.color(colors.scale(heat.HeatmapColorScale.EXPONENTIAL).exponent(0.4).reverse(False).fill("dark-orange"))
    panel.calculate(False).y_axis(heatmap.YAxisConfig().unit(unit)).cell_values(heatmap.CellValues().unit("short"))
    panel.tooltip(heatmap.HeatmapTooltip().mode(options.TooltipDisplayMode.SINGLE).y_histogram(True))
    return panel.max_data_points(120)


def bars(
    title: str, text: str, unit: str, *series: Series, span: int = 8, height: int = 8, limits: Sequence[Limit] = ()
) -> bargauge.Panel:
    """The latest value of each series as a bar."""
    panel = _dressed(bargauge.Panel(), title, text, unit, series, (span, height), None)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).min(0)
    panel.orientation(options.VizOrientation.HORIZONTAL).display_mode(options.BarGaugeDisplayMode.BASIC)
    panel.color_scheme(_color(models.FieldColorModeId.THRESHOLDS))
    return panel.thresholds(_thresholds(limits, BLUE))


def side_by_side(
    title: str, text: str, unit: str, by: str, columns: Sequence[Series], order: str, span: int = 12, height: int = 9
) -> barchart.Panel:
    """Bars beside each other for every value of the label `by`, in the order of the number in the label `order`."""
    series = [column._replace(now=True) for column in columns]
    panel = _dressed(barchart.Panel(), title, text, unit, series, (span, height), None, kind=PromQueryFormat.TABLE)
    numeric = {"conversions": [{"targetField": order, "destinationType": "number"}], "fields": {}}
    panel.with_transformation(models.DataTransformerConfig("merge", options={}))
    panel.with_transformation(models.DataTransformerConfig("convertFieldType", options=numeric))
    panel.with_transformation(models.DataTransformerConfig("sortBy", options={"sort": [{"field": order}]}))
    panel.with_transformation(_columns([column.legend for column in columns], hidden=["Time", order]))
    panel.x_field(by).orientation(options.VizOrientation.VERTICAL).show_value(options.VisibilityMode.NEVER)
    panel.color_scheme(_color(models.FieldColorModeId.PALETTE_CLASSIC)).x_tick_label_rotation(-30)
    panel.override_by_name(
        columns[-1].legend, [models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": GREY})]
    )
    legend = common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM)
    return panel.min(0).legend(legend.display_mode(options.LegendDisplayMode.LIST))


def listing(
    title: str,
    text: str,
    columns: Sequence[tuple[Series, str]],
    order: str,
    span: int = 24,
    height: int = 10,
    runbook: str | None = None,
) -> table.Panel:
    """A table with a row for each set of labels and a column, with its unit, for each query; largest `order` first."""
    series = [column._replace(now=True) for column, _ in columns]
    panel = _dressed(table.Panel(), title, text, "short", series, (span, height), runbook, kind=PromQueryFormat.TABLE)
    panel.with_transformation(models.DataTransformerConfig("merge", options={}))
    panel.with_transformation(_columns([column.legend for column, _ in columns], hidden=["Time"]))
    for column, unit in columns:
        panel.override_by_name(column.legend, [models.DynamicConfigValue("unit", unit)])
    return panel.sort_by([common.TableSortByFieldState().display_name(order).desc(True)]).filterable(True)


def _columns(names: Sequence[str], hidden: Sequence[str]) -> models.DataTransformerConfig:
    """Give the values of the queries their names, and hide what nobody needs."""
    values = {
        f"Value #{chr(ord('A') + place)}" if len(names) > 1 else "Value": name for place, name in enumerate(names)
    }
    renaming = {"renameByName": values, "excludeByName": dict.fromkeys(hidden, True), "indexByName": {}}
    return models.DataTransformerConfig("organize", options=renaming)


# --- the dashboard around the panels ---

Any = timeseries.Panel | stat.Panel | heatmap.Panel | table.Panel | bargauge.Panel | barchart.Panel
TITLES: Final = {"serving": "Serving", "model": "Model", "data": "Data"}


def dashboard_of(
    name: str, text: str, time_from: str, variables: Sequence[dashboard.QueryVariable], rows: dict[str, list[Any]]
) -> models.Dashboard:
    """A dashboard with rows of panels, its variables, and links to the other ones."""
    whole = dashboard.Dashboard(f"Propensity / {TITLES[name]}").uid(f"propensity-{name}").description(text)
    whole.tags(["propensity"]).readonly().tooltip(models.DashboardCursorSync.CROSSHAIR)
    whole.time(time_from, "now").refresh("30s").timezone("browser")
    whole.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for variable in variables:
        whole.with_variable(variable)
    whole.with_variable(_docs())
    for other, title in TITLES.items():
        if other != name:
            link = dashboard.DashboardLink(title).type(models.DashboardLinkType.LINK).icon("dashboard")
            whole.link(link.url(f"/d/propensity-{other}").keep_time(True).include_vars(True))
    whole.annotation(_versions_loaded())
    place = 0
    for title, panels in rows.items():
        place += 1
        whole.with_row(dashboard.Row(title).id(place))
        for panel in panels:
            place += 1
            whole.with_panel(panel.id(place))
    return whole.build()


def instances() -> list[dashboard.QueryVariable]:
    """Variables that choose the scrape job and the instances; all of them to begin with."""
    return [
        choice("job", "Job", "label_values(propensity_build_info, job)"),
        choice("instance", "Instance", 'label_values(propensity_build_info{job=~"$job"}, instance)'),
    ]


def versions() -> list[dashboard.QueryVariable]:
    """Variables that choose the model and its versions; all of them to begin with."""
    return [
        choice("model", "Model", "label_values(propensity_model_info, model)"),
        choice("version", "Version", 'label_values(propensity_model_info{model=~"$model"}, version)'),
    ]


def choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable of several values that Prometheus is asked for; all of them to begin with."""
    everything = models.VariableOption(selected=True, text=["All"], value=["$__all"])
    variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query)
    variable.multi(True).include_all(True).all_value(".*").current(everything)
    return variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)


def _docs() -> dashboard.TextBoxVariable:
    text = "Address below which docs/ of the repository can be read; links to runbooks begin with it."
    return dashboard.TextBoxVariable("docs").label("Docs at").description(text).default_value("/public/propensity/docs")


def _versions_loaded() -> dashboard.AnnotationQuery:
    """A mark in every panel where a version was loaded."""
    expr = "max by (model, version) (propensity_model_loaded_timestamp_seconds) * 1000"
    query = dashboard.AnnotationQuery().name("Versions loaded").datasource(SOURCE).enable(True).icon_color(BLUE)
    return query.expr(expr).use_value_for_time(True).title_format("{{model}}").text_format("{{version}} loaded")
