"""The feature spec: the catalogue of events, the limits, the label and the features of one model, validated."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.core import advice
from service.core.advice import Location, Place, Problem, nearest
from service.core.errors import PropensityError
from service.core.events import MAX_KIND
from service.core.segments import SEGMENTS

_UNITS_MS: Final = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_DURATION: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|w)\s*")
ANY: Final = "any"


class InvalidSpec(PropensityError):
    """A feature spec that cannot be used; the message names each place and what to write instead."""


def parse_duration(text: object) -> int:
    """Milliseconds of a duration such as `30m`, `7d` or `500ms`."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number and a unit: 500ms, 30s, 30m, 1h, 7d or 2w")
    milliseconds = float(match[1]) * _UNITS_MS[match[2]]
    if not 1 <= milliseconds <= 36_500 * _UNITS_MS["d"]:
        raise ValueError(f"{match[0][:20]!r} is out of range; write a duration between 1ms and 36500d")
    return round(milliseconds)


def format_duration(milliseconds: int) -> str:
    """The shortest exact way to write a duration of whole milliseconds, weeks excepted: `90d`, `90m`, `1500ms`."""
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if milliseconds % _UNITS_MS[unit] == 0)
    return f"{milliseconds // _UNITS_MS[unit]}{unit}"


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("write a finite number")
    return number


def _as_names(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _names_as_written(value: tuple[str, ...]) -> str | tuple[str, ...]:
    return value[0] if len(value) == 1 else value


Duration = Annotated[
    int, BeforeValidator(parse_duration, json_schema_input_type=str), PlainSerializer(format_duration, return_type=str)
]
Window = Annotated[
    int | Literal["session"],
    BeforeValidator(lambda value: value if value == "session" else parse_duration(value)),
    PlainSerializer(lambda value: value if value == "session" else format_duration(value), return_type=str),
]
Finite = Annotated[float, AfterValidator(_finite)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.\-]{0,63}$")]
Kinds = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(_as_names),
    PlainSerializer(_names_as_written, return_type=str | tuple[str, ...]),
]
Categories = Annotated[
    Annotated[tuple[str, ...], Tag("listed")] | Annotated[dict[str, Finite], Tag("coded")],
    Discriminator(
        lambda value: "coded" if isinstance(value, Mapping) else "listed" if isinstance(value, (list, tuple)) else None,
        custom_error_type="categories",
        custom_error_message="write a list of categories, or a mapping of each category to its number",
    ),
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EventKind(_Model):
    """One line of the catalogue: which event it is, its stable code, and what of it is kept."""

    code: Annotated[int, Field(ge=1, le=MAX_KIND, strict=True)]
    event: Annotated[str, Field(min_length=1)]
    value: str | None = None
    attribute: str | None = None


class Limits(_Model):
    """How much of a visitor's past counts, online and offline alike."""

    history: Duration = parse_duration("90d")
    records: Annotated[int, Field(ge=1, le=2048, strict=True)] = 2048
    session_gap: Duration = parse_duration("30m")


class Label(_Model):
    """What is predicted: `event` within `horizon` after the moment of asking, or that `absent` does not happen by then,
    or a `column` of a table.
    """

    event: str | None = None
    # Not in the hash where it is not written: bundles are older than it.
    absent: str | None = Field(None, exclude_if=lambda value: value is None)
    horizon: Duration | None = None
    column: str | None = None
    positive: Annotated[tuple[str, ...], BeforeValidator(_as_names)] = ("1", "true", "yes")

    @field_validator("positive", mode="before")
    @classmethod
    def _plain_values(cls, value: object) -> object:
        listed = value if isinstance(value, (list, tuple)) else [value]
        return tuple(str(item).lower() if isinstance(item, bool) else str(item) for item in listed)

    @model_validator(mode="after")
    def _one_form(self) -> Label:
        if [self.event, self.absent, self.column].count(None) != 2:
            raise ValueError("write one of event and horizon, absent and horizon, or column (for --table)")
        if self.kind is not None and self.horizon is None:
            raise ValueError("an event label needs a horizon; write for example horizon: 7d")
        return self

    @property
    def kind(self) -> str | None:
        """The kind of event that is looked for within the horizon; None of a table."""
        return self.event or self.absent


class Rows(_Model):
    """The moments a training row is taken at: after an event of the visitor, or on a calendar grid.

    A visitor's first `per_visitor` moments are all taken, moment number i later on with chance per_visitor / i: about
    per_visitor * (1 + log(n / per_visitor)) of n.
    """

    after: Kinds = (ANY,)
    every: Duration | None = None
    per_visitor: Annotated[int, Field(ge=1, le=1000, strict=True)] = 10
    cold_start: bool = True


class Fit(_Model):
    """Parameters of LightGBM to try where the defaults do not suit the data. There is no re-weighting of classes."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    num_leaves: Annotated[int, Field(ge=2, le=4096)] | None = None
    max_depth: int | None = None
    min_data_in_leaf: Annotated[int, Field(ge=1)] | None = None
    lambda_l1: Annotated[float, Field(ge=0)] | None = None
    lambda_l2: Annotated[float, Field(ge=0)] | None = None
    feature_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    bagging_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    max_bin: Annotated[int, Field(ge=2, le=65535)] | None = None


class EventColumn(_Model):
    """Where the event name of a foreign file comes from: a constant, or a column and how its values translate."""

    constant: str | None = None
    column: str | None = None
    names: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_form(self) -> EventColumn:
        if (self.constant is None) == (self.column is None):
            raise ValueError("write either constant: EVENT NAME or column: COLUMN")
        return self


class Source(_Model):
    """How a file with foreign names is read. Every value is a column or a SQL expression over the columns."""

    files: str = "*"
    query: str | None = None
    where: str | None = None
    visitor_id: str | None = None
    anonymous_id: str | None = None
    timestamp: str | None = None
    timestamp_format: str | None = None
    event: EventColumn | None = None
    message_id: str | None = None
    properties: dict[str, str] = {}
    context: dict[str, str] = {}
    traits: dict[str, str] = {}

    @field_validator("event", mode="before")
    @classmethod
    def _column_alone(cls, value: object) -> object:
        return {"column": value} if isinstance(value, str) else value


class Aggregate(_Model):
    """A statistic over the visitor's events of some kinds."""

    operation: ClassVar[str]
    window: Window | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the event kinds it reads; `("any",)` for all of the catalogue."""
        kinds: tuple[str, ...] = getattr(self, self.operation)
        return kinds


class Count(Aggregate):
    """How many events."""

    operation = "count"
    count: Kinds


class Sum(Aggregate):
    """Sum of values; 0 without any."""

    operation = "sum"
    sum: Kinds


class Mean(Aggregate):
    """Mean of values; NaN without any."""

    operation = "mean"
    mean: Kinds


class Min(Aggregate):
    """Smallest value; NaN without any."""

    operation = "min"
    min: Kinds


class Max(Aggregate):
    """Largest value; NaN without any."""

    operation = "max"
    max: Kinds


class Latest(Aggregate):
    """Value of the last event that has one; NaN without any."""

    operation = "latest"
    latest: Kinds


class Distinct(Aggregate):
    """How many different attributes; events without one do not count."""

    operation = "distinct"
    distinct: Kinds


class Recency(Aggregate):
    """Seconds since the last event; NaN without any."""

    operation = "recency"
    recency: Kinds


class Tenure(Aggregate):
    """Seconds since the first event still kept; NaN without any."""

    operation = "tenure"
    tenure: Kinds


class Decay(Aggregate):
    """Sum of 0.5 ** (age / half_life) over events."""

    operation = "decay"
    decay: Kinds
    half_life: Duration


class Session(_Model):
    """The session that is still going on: its number of events, or seconds since it began; 0 without one."""

    session: Literal["count", "duration"]


class Ratio(_Model):
    """(numerator + prior[0]) / (denominator + prior[1]) of two other features; NaN where that is 0 / 0."""

    ratio: tuple[str, str]
    prior: tuple[Annotated[Finite, Field(ge=0)], Annotated[Finite, Field(ge=0)]] = (0.0, 0.0)


class Clock(_Model):
    """A part of the moment of asking, in UTC moved by `offset`: hour 0-23, weekday 0-6 from Monday, day, month 1-12."""

    clock: Literal["hour", "weekday", "day", "month"]
    offset: Annotated[str, Field(pattern=r"^[+-](0[0-9]|1[0-4]):[0-5][0-9]$")] = "+00:00"

    @property
    def offset_ms(self) -> int:
        """Milliseconds to add to UTC."""
        minutes = int(self.offset[1:3]) * 60 + int(self.offset[4:6])
        return minutes * (-60_000 if self.offset[0] == "-" else 60_000)


class _Encoded(_Model):
    categories: Categories | None = None

    @field_validator("categories", mode="before")
    @classmethod
    def _text_categories(cls, value: object) -> object:
        if not isinstance(value, (Mapping, list, tuple)):
            return value
        names = [_as_text(name) for name in value]
        if not names:
            raise ValueError("list at least one category")
        if all(isinstance(name, str) for name in names) and len(set(names)) < len(names):
            raise ValueError("a category is listed twice; list each once")
        return dict(zip(names, value.values(), strict=True)) if isinstance(value, Mapping) else tuple(names)

    @cached_property
    def codes(self) -> dict[str, float]:
        """Category -> number: its place in the list, or the number the spec gives."""
        if isinstance(self.categories, dict):
            return dict(self.categories)
        return {name: float(place) for place, name in enumerate(self.categories or ())}

    @property
    def other(self) -> float:
        """Code of a category that the spec does not list: one past the last place; NaN where numbers are given."""
        return math.nan if isinstance(self.categories, dict) else float(len(self.codes))

    @property
    def key(self) -> str:
        """Name of the trait or request field it reads."""
        raise NotImplementedError


def _as_text(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, (int, float)) else value


class Trait(_Encoded):
    """The latest value of a trait of the visitor; NaN without one."""

    trait: Annotated[str, Field(min_length=1)]

    @property
    def key(self) -> str:
        """Name of the trait."""
        return self.trait


class Request(_Encoded):
    """A value of the request's context; NaN without one."""

    request: Annotated[str, Field(min_length=1)]

    @property
    def key(self) -> str:
        """Name of the context field."""
        return self.request


_FEATURES: Final[dict[str, type[_Model]]] = {
    kind.__name__.lower(): kind
    for kind in (
        *(Count, Sum, Mean, Min, Max, Latest, Distinct, Recency, Tenure, Decay),
        *(Session, Ratio, Clock, Trait, Request),
    )
}


def _kind_of(value: object) -> str | None:
    if isinstance(value, BaseModel):
        return type(value).__name__.lower()
    found = [kind for kind in _FEATURES if isinstance(value, Mapping) and kind in value]
    return found[0] if len(found) == 1 else None


Feature = Annotated[
    Annotated[Count, Tag("count")]
    | Annotated[Sum, Tag("sum")]
    | Annotated[Mean, Tag("mean")]
    | Annotated[Min, Tag("min")]
    | Annotated[Max, Tag("max")]
    | Annotated[Latest, Tag("latest")]
    | Annotated[Distinct, Tag("distinct")]
    | Annotated[Recency, Tag("recency")]
    | Annotated[Tenure, Tag("tenure")]
    | Annotated[Decay, Tag("decay")]
    | Annotated[Session, Tag("session")]
    | Annotated[Ratio, Tag("ratio")]
    | Annotated[Clock, Tag("clock")]
    | Annotated[Trait, Tag("trait")]
    | Annotated[Request, Tag("request")],
    Discriminator(
        _kind_of,
        custom_error_type="feature_kind",
        custom_error_message=f"a feature has exactly one of the keys {', '.join(_FEATURES)}",
    ),
]


class FeatureSpec(_Model):
    """Everything that turns events into the columns of one model. The order of `features` is the column order."""

    model: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,63}$")]
    events: Annotated[dict[Name, EventKind], Field(max_length=250)] = {}
    limits: Limits = Limits()
    label: Label | None = None
    rows: Rows = Rows()
    fit: Fit = Fit()
    source: tuple[Source, ...] = ()
    segments: dict[str, Annotated[Finite, Field(gt=0, lt=1)]] = {}
    features: Annotated[dict[Name, Feature], Field(min_length=1)]

    @field_validator("source", mode="before")
    @classmethod
    def _one_source(cls, value: object) -> object:
        return (value,) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _consistent(self) -> FeatureSpec:
        found = list(self._problems())
        if found:
            raise PydanticCustomError("inconsistent", "the parts do not fit together", {"problems": found})
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names in column order."""
        return tuple(self.features)

    @cached_property
    def hash(self) -> str:
        """sha256 over everything that decides a feature's value or a row; `source`, `fit` and `segments` do not."""
        text = json.dumps(self.model_dump(mode="json", exclude={"source", "fit", "segments"}))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def traits(self) -> dict[str, Trait]:
        """Features that read traits, by feature name."""
        return {name: feature for name, feature in self.features.items() if isinstance(feature, Trait)}

    @cached_property
    def requests(self) -> dict[str, Request]:
        """Features that read the request's context, by feature name."""
        return {name: feature for name, feature in self.features.items() if isinstance(feature, Request)}

    def codes(self, kinds: Sequence[str]) -> list[int]:
        """Catalogue codes of the named kinds; `any` stands for all."""
        names = self.events if ANY in kinds else kinds
        return [self.events[name].code for name in names]

    def _problems(self) -> Iterator[Problem]:
        yield from _repeated("code", {name: kind.code for name, kind in self.events.items()})
        yield from _repeated("event", {name: kind.event for name, kind in self.events.items()})
        used: dict[Place, tuple[str, ...]] = {
            ("features", name): feature.kinds
            for name, feature in self.features.items()
            if isinstance(feature, Aggregate)
        }
        used["rows", "after"] = self.rows.after
        if self.label is not None and self.label.kind is not None:
            used["label", "event" if self.label.event is not None else "absent"] = (self.label.kind,)
        for place, kinds in used.items():
            for kind in kinds:
                if kind != ANY and kind not in self.events:
                    yield place, f"no event {kind!r} in the catalogue{nearest(kind, self.events)}"
        if ANY in self.events:
            yield ("events", ANY), "the name stands for all events; choose another"
        for name in self.segments:
            if name not in SEGMENTS[:-1]:
                yield ("segments", name), f"is not a segment with a share; write {', '.join(SEGMENTS[:-1])}"
        if sum(self.segments.values()) >= 1:
            yield ("segments",), "the shares add up to 1 or more; leave a rest for low_priority"
        yield from self._ratio_problems()

    def _ratio_problems(self) -> Iterator[Problem]:
        ratios = {name: feature.ratio for name, feature in self.features.items() if isinstance(feature, Ratio)}
        for name, operands in ratios.items():
            for operand in operands:
                if operand not in self.features:
                    yield ("features", name), f"no feature {operand!r}{nearest(operand, self.features)}"
        for name in ratios:
            path, pending = {name}, list(ratios[name])
            while pending:
                operand = pending.pop()
                if operand == name:
                    way = " and ".join(sorted(path))
                    yield ("features", name), f"the ratio is built from itself (by way of {way}); break the cycle"
                    break
                if operand not in path and operand in ratios:
                    path.add(operand)
                    pending.extend(ratios[operand])


def parse(document: object) -> FeatureSpec:
    """The spec of a plain document (from YAML or JSON). Raises InvalidSpec that lists every problem."""
    try:
        return FeatureSpec.model_validate(document)
    except ValidationError as error:
        told = (f"{'.'.join(place)}: {said}" if place else said for place, said in problems(error))
        raise InvalidSpec("; ".join(told)) from None


def problems(error: ValidationError) -> list[Problem]:
    """Place and advice (what to write instead) of each problem that pydantic found."""
    found: list[Problem] = []
    for item in error.errors():
        if item["type"] == "inconsistent":
            found.extend(item["ctx"]["problems"])
        else:
            found.append((_place(item["loc"]), advice.of_section(item, _known_keys)))
    return found


def _place(location: Location) -> Place:
    # The tags of unions stand in pydantic's location, not in the document: features.NAME.TAG.categories.TAG.key
    if location[:1] != ("features",):
        return tuple(map(str, location))
    tags = {2, 4} if location[3:4] == ("categories",) else {2}
    return tuple(str(part) for index, part in enumerate(location) if index not in tags)


_SECTIONS: Final[dict[str, type[_Model]]] = {
    "events": EventKind,
    "limits": Limits,
    "label": Label,
    "rows": Rows,
    "fit": Fit,
    "source": Source,
}


def _known_keys(location: Location) -> list[str]:
    model: type[_Model] | None = FeatureSpec
    if len(location) > 1:
        model = _SECTIONS.get(str(location[0]))
    if location[0] == "features" and len(location) > 3:
        model = _FEATURES.get(str(location[2]))
    if location[0] == "source" and "event" in location[:-1]:
        model = EventColumn
    return list(model.model_fields) if model is not None else []


def _repeated(field: str, values: Mapping[str, object]) -> Iterator[Problem]:
    first: dict[object, str] = {}
    for name, value in values.items():
        if value in first:
            yield ("events", name, field), f"{value!r} is already used by {first[value]!r}; choose another"
        first.setdefault(value, name)
