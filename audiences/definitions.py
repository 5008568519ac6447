"""Definitions of audiences: one YAML file that says who belongs to which, validated.

What depends on the models (which features and categories there are) is checked by `check`, once their specs are known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from audiences.destinations.protocol import Purpose
from files import documents
from files.documents import Document, Kind
from service.core import advice, movement
from service.core.advice import Location, Place, Problem, nearest
from service.core.errors import PropensityError
from service.core.segments import SEGMENTS
from service.core.spec import FeatureSpec, Finite, Name, Request, Trait, format_duration, parse_duration

OTHER: Final = "(other)"  # a category that the spec does not list
REST: Final = "rest"  # the micro-segment of whom no rule of a segment describes
CONTROL: Final = ".control"  # behind the name of an audience: who is held out of it

MOST_VISITORS: Final = 10**9
MOST_SHOWN: Final = 64
MOST_OF_FEATURE: Final = 3.4028234e38


class InvalidDefinitions(PropensityError):
    """Definitions of audiences that cannot be used; the message names each place and what to write instead."""


_DEFINITIONS: Final = Kind(InvalidDefinitions, "give the definitions with --definitions FILE", "begin with audiences:")


def _shown(value: object) -> str:
    """What was written, as far as it is short: a list of aliases of lists can stand for gigabytes."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a mapping"
    return repr(value)[:MOST_SHOWN]


def _percent(value: object) -> float:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", value) if isinstance(value, str) else None
    if match is None or not 0 < float(match[1]) <= 100:
        raise ValueError(f"{_shown(value)} is no share; write a number above 0 and a percent sign, as 5%")
    return float(match[1]) / 100


def _format_percent(share: float) -> str:
    return f"{round(100 * share, 9):g}%"


def _count_or_share(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_VISITORS:
        return value
    if isinstance(value, str) and "%" in value:
        return _percent(value)
    raise ValueError(f"{_shown(value)} is neither a number of visitors nor a share; write for example 1000 or 5%")


def _time(value: object) -> int:
    if isinstance(value, (list, dict)):
        raise ValueError("is no duration; write one number and a unit, as 3d")
    return 0 if value == 0 and not isinstance(value, bool) else parse_duration(value)


def _format_time(milliseconds: int) -> str | int:
    return format_duration(milliseconds) if milliseconds else 0


def _bound(value: object) -> object:
    return parse_duration(value) / 1000 if isinstance(value, str) else value


def _listed(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else (value,)


def _values(values: tuple[Any, ...]) -> tuple[str | float, ...]:
    plain = tuple(str(value).lower() if isinstance(value, bool) else value for value in values)
    if not plain or not all(isinstance(value, (str, int, float)) for value in plain):
        raise ValueError("write a value, or a list of values: categories by their names, or numbers")
    if any(isinstance(value, (int, float)) and abs(value) > MOST_OF_FEATURE for value in plain):
        raise ValueError("write numbers that a feature can have: float32, up to 3.4e38")
    return plain


def _whole(text: str) -> str:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds half a character; write it whole, as it is, without \\u")
    return text


def _segments(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if name not in SEGMENTS:
            raise ValueError(f"no segment {_shown(name)}{nearest(name[:MOST_SHOWN], SEGMENTS)}")
    return names


Percent = Annotated[float, BeforeValidator(_percent), PlainSerializer(_format_percent, return_type=str)]
Top = Annotated[
    int | float,
    BeforeValidator(_count_or_share),
    PlainSerializer(lambda top: top if isinstance(top, int) else _format_percent(top), return_type=int | str),
]
Time = Annotated[int, BeforeValidator(_time), PlainSerializer(_format_time, return_type=str | int)]
Bound = Annotated[Finite, Field(ge=-MOST_OF_FEATURE, le=MOST_OF_FEATURE), BeforeValidator(_bound)]
Margin = Annotated[Finite, Field(ge=0, le=10)]
Probability = Annotated[Finite, Field(gt=0, lt=1)]
Values = Annotated[tuple[Any, ...], BeforeValidator(_listed), AfterValidator(_values)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_listed), Field(min_length=1)]
SegmentNames = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1), AfterValidator(_segments)]
Text = Annotated[str, AfterValidator(_whole)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,63}$")]
AudienceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,55}$")]  # 64 with CONTROL behind it
Size = Annotated[int, Field(ge=1, le=MOST_VISITORS, strict=True)]


class Section(BaseModel):
    """A mapping of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def key_names(cls) -> list[str]:
        """The keys that may be written."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    def _says_something(self) -> None:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(f"says nothing; write one of {', '.join(self.key_names())}")


class Condition(Section):
    """What a feature has to be: all that is written holds. A missing value is below and above nothing."""

    at_least: Bound | None = None
    more_than: Bound | None = None
    at_most: Bound | None = None
    below: Bound | None = None
    is_: Values | None = Field(None, alias="is")
    is_not: Values | None = None
    missing: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _value_alone(cls, value: object) -> object:
        return value if isinstance(value, (Mapping, BaseModel)) or value is None else {"is": value}

    @model_validator(mode="after")
    def _sound(self) -> Condition:
        self._says_something()
        return self


Where = dict[str, Condition]


class Cut(Section):
    """A score that divides: `at` is widened by the margin, `enter` and `leave` are taken as they are."""

    at: Probability | None = None
    enter: Probability | None = None
    leave: Probability | None = None

    @model_validator(mode="before")
    @classmethod
    def _number_alone(cls, value: object) -> object:
        return {"at": value} if isinstance(value, (int, float, str)) else value

    @model_validator(mode="after")
    def _one_form(self) -> Cut:
        if (self.at is None) == (self.enter is None) or (self.enter is None) != (self.leave is None):
            raise ValueError("write either a number, or enter and leave")
        if self.enter is not None and self.leave is not None and self.leave > self.enter:
            raise ValueError(f"leave {self.leave:g} is above enter {self.enter:g}; nobody could stay, swap them")
        return self

    def thresholds(self, margin: float) -> tuple[float, float]:
        """The scores to leave below, and to enter from."""
        if self.enter is not None and self.leave is not None:
            return self.leave, self.enter
        assert self.at is not None
        return movement.widened(self.at, margin)


class Budget(Section):
    """What contacts may cost altogether, and what one costs, in one currency."""

    spend: Annotated[Finite, Field(gt=0)]
    per_contact: Annotated[Finite, Field(gt=0)]

    @property
    def contacts(self) -> int:
        """How many contacts it pays for. Division rounds: 0.3 / 0.1 is 2.9999999999999996, and pays for three."""
        return math.floor(self.spend / self.per_contact + 1e-9)

    @model_validator(mode="after")
    def _pays(self) -> Budget:
        if not self.spend / self.per_contact <= MOST_VISITORS:
            raise ValueError(f"spend pays for more than {MOST_VISITORS:,} contacts; write both in one currency")
        if self.contacts < 1:
            raise ValueError("spend pays for no contact; write a spend of at least per_contact")
        return self


class Scores(Section):
    """What a further model says of the visitor. Bounds are widened by the margin."""

    at_least: Probability | None = None
    below: Probability | None = None
    segment: SegmentNames | None = None

    @model_validator(mode="after")
    def _sound(self) -> Scores:
        self._says_something()
        return self


class LastEvent(Section):
    """How long ago the last event is. Who has none was here longer ago than anything."""

    within: Time | None = None
    older_than: Time | None = None

    @model_validator(mode="after")
    def _sound(self) -> LastEvent:
        self._says_something()
        if self.within is not None and self.older_than is not None and self.older_than >= self.within:
            raise ValueError("no event is older than that and within that; let within be longer than older_than")
        return self


class Holdout(Section):
    """Who is kept out at random, to compare with. The same salt draws the same visitors."""

    share: Percent
    salt: Annotated[Text, Field(min_length=1, max_length=64)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _share_alone(cls, value: object) -> object:
        return value if isinstance(value, (Mapping, BaseModel)) else {"share": value}

    @model_validator(mode="after")
    def _somebody_is_left(self) -> Holdout:
        if self.share >= 1:
            raise ValueError("holds everybody out; write less than 100%")
        return self


class Defaults(Section):
    """What counts where an audience does not say otherwise."""

    model: Slug | None = None
    margin: Margin = 0.5
    min_stay: Time = 0
    min_size: Size = 100
    purpose: Purpose | None = None


class SegmentRules(Section):
    """How visitors move between the segments of a model, and the micro-segments within each."""

    margin: Margin | None = None
    min_stay: Time | None = None
    micro: dict[str, dict[Name, Where]] = {}

    @field_validator("micro")
    @classmethod
    def _named(cls, micro: dict[str, dict[str, Where]]) -> dict[str, dict[str, Where]]:
        _segments(micro)
        for segment, rules in micro.items():
            if REST in rules:
                raise ValueError(f"{REST!r} of {segment} is whom no rule describes; choose another name")
        return micro


class Audience(Section):
    """Who belongs to an audience: the visitors for whom everything that is written holds."""

    description: Text = ""
    model: Slug | None = None
    segment: SegmentNames | None = None
    micro: Names | None = None
    cut: Cut | None = None
    top: Top | None = None
    budget: Budget | None = None
    scores: dict[Slug, Scores] = {}
    where: Where = {}
    last_event: LastEvent | None = None
    exclude: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    holdout: Holdout | None = None
    margin: Margin | None = None
    min_stay: Time | None = None
    min_size: Size | None = None
    purpose: Purpose | None = None
    destinations: Annotated[tuple[Name, ...], BeforeValidator(_listed)] = ()

    _name: str = PrivateAttr("")

    @model_validator(mode="after")
    def _one_choice(self) -> Audience:
        chosen = [key for key in ("segment", "cut", "top", "budget") if getattr(self, key) is not None]
        if len(chosen) > 1:
            raise ValueError(f"chooses by {' and by '.join(chosen)}; keep one of them")
        if self.micro is not None and self.segment is None:
            raise ValueError("micro divides a segment; write segment: NAME as well")
        return self

    @property
    def name(self) -> str:
        """Its key in the file."""
        return self._name

    @property
    def control(self) -> str:
        """The name that its hold-out is recorded under."""
        return f"{self._name}{CONTROL}"

    def completed(self, name: str, defaults: Defaults) -> Audience:
        """The audience with its name, and with the defaults where it says nothing."""
        filled = {key: value for key, value in defaults if getattr(self, key) is None}
        if self.holdout is not None and self.holdout.salt is None:
            filled["holdout"] = self.holdout.model_copy(update={"salt": name})
        whole = self.model_copy(update=filled)
        whole._name = name
        return whole

    def references(self) -> Iterator[tuple[Place, str | None, str]]:
        """Place, model and feature of each condition."""
        for key in self.where:
            yield ("where", key), *feature_of(key, self.model)

    def written(self) -> str:
        """Everything that counts, as one line of JSON."""
        plain = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return json.dumps({key: value for key, value in plain.items() if value not in ("", [], {})})


class Definitions(Section):
    """The whole file."""

    defaults: Defaults = Defaults()
    segments: dict[Slug, SegmentRules] = {}
    audiences: Annotated[dict[AudienceName, Audience], Field(min_length=1)]

    _document: Document | None = PrivateAttr(None)

    @field_validator("audiences")
    @classmethod
    def _completed(cls, audiences: dict[str, Audience], info: ValidationInfo) -> dict[str, Audience]:
        defaults = info.data.get("defaults", Defaults())
        return {name: audience.completed(name, defaults) for name, audience in audiences.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Definitions:
        found = list(self._problems())
        if found:
            raise PydanticCustomError("inconsistent", "the parts do not fit together", {"problems": found})
        return self

    @cached_property
    def ordered(self) -> tuple[Audience, ...]:
        """The audiences, each after those that it excludes."""
        graph = {name: audience.exclude for name, audience in self.audiences.items()}
        return tuple(self.audiences[name] for name in TopologicalSorter(graph).static_order())

    @property
    def models(self) -> tuple[str, ...]:
        """The models that some audience asks, in the order of the file."""
        asked: dict[str, None] = {}
        for audience in self.audiences.values():
            own = [audience.model] if audience.model is not None else []
            of_features = [model for _, model, _ in audience.references() if model is not None]
            asked |= dict.fromkeys([*own, *audience.scores, *of_features])
        return tuple(asked)

    def rules(self, model: str) -> SegmentRules:
        """How visitors move between the segments of a model, defaults filled in."""
        rules = self.segments.get(model, SegmentRules())
        filled = {key: getattr(self.defaults, key) for key in ("margin", "min_stay") if getattr(rules, key) is None}
        return rules.model_copy(update=filled)

    def features(self, model: str) -> tuple[str, ...]:
        """The features of a model that conditions look at, sorted."""
        named = {name for one in self.audiences.values() for _, of, name in one.references() if of == model}
        of_rules = self.segments.get(model, SegmentRules()).micro.values()
        return tuple(sorted(named | {name for rules in of_rules for where in rules.values() for name in where}))

    def check(self, specs: Mapping[str, FeatureSpec]) -> None:
        """Raise InvalidDefinitions unless the models have what conditions look at; `specs` by the model's name."""
        found = list(self._mismatches(specs))
        if found:
            raise InvalidDefinitions("\n".join(self._told(place, said) for place, said in found))

    def _told(self, place: Place, said: str) -> str:
        return f"{self._document.where(place) if self._document else '.'.join(place)}: {said}"

    def _problems(self) -> Iterator[Problem]:
        for name, audience in self.audiences.items():
            place = ("audiences", name)
            for other in audience.exclude:
                if other not in self.audiences:
                    yield (*place, "exclude"), f"no audience {other!r}{nearest(other, self.audiences)}"
            asks = [key for key in ("segment", "cut", "top", "budget") if getattr(audience, key) is not None]
            if asks and audience.model is None:
                yield (*place, asks[0]), "of which model? Write model: NAME here or in defaults"
            for where, model, _ in audience.references():
                if model is None:
                    yield (*place, *where), "of which model? Write model: NAME here or in defaults, or MODEL/FEATURE"
            if audience.destinations and audience.purpose is None:
                purposes = ", ".join(Purpose)
                yield (*place, "destinations"), f"get only who agreed to a purpose; write purpose: one of {purposes}"
            yield from self._micro_problems(name, audience)
        yield from self._cycles()

    def _micro_problems(self, name: str, audience: Audience) -> Iterator[Problem]:
        if audience.micro is None or audience.model is None:
            return
        rules = self.segments.get(audience.model, SegmentRules()).micro
        known = dict.fromkeys(rule for segment in audience.segment or () for rule in rules.get(segment, ()))
        for micro in audience.micro:
            if micro not in known and not (micro == REST and known):
                place = f"segments.{audience.model}.micro.{(audience.segment or ('',))[0]}"
                yield (
                    ("audiences", name, "micro"),
                    f"no micro-segment {micro!r} in {place}{nearest(micro, [*known, REST] if known else [])}",
                )

    def _cycles(self) -> Iterator[Problem]:
        graph = {name: [one for one in a.exclude if one in self.audiences] for name, a in self.audiences.items()}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            cycle = error.args[1]
            yield ("audiences", cycle[-1], "exclude"), f"{' excludes '.join(reversed(cycle))}; break the cycle"

    def _mismatches(self, specs: Mapping[str, FeatureSpec]) -> Iterator[Problem]:
        for name, audience in self.audiences.items():
            place = ("audiences", name)
            if audience.model is not None and audience.model not in specs:
                yield (*place, "model"), f"no scores of a model {audience.model!r}{nearest(audience.model, specs)}"
            for other in audience.scores:
                if other not in specs:
                    yield (*place, "scores", other), f"no scores of a model {other!r}{nearest(other, specs)}"
            for where, model, feature in audience.references():
                if model is not None and model in specs:
                    yield from _condition((*place, *where), feature, audience.where[where[-1]], specs[model])
                elif model is not None and model != audience.model:
                    yield (*place, *where), f"no scores of a model {model!r}{nearest(model, specs)}"
        for model, rules in self.segments.items():
            if model not in specs:
                yield ("segments", model), f"no scores of a model {model!r}{nearest(model, specs)}"
                continue
            for segment, micro in rules.micro.items():
                for rule, conditions in micro.items():
                    for feature, condition in conditions.items():
                        at = ("segments", model, "micro", segment, rule, feature)
                        yield from _condition(at, feature, condition, specs[model])


def feature_of(key: str, model: str | None) -> tuple[str | None, str]:
    """Model and feature of a key of `where`: `feature` of the audience's model, or `model/feature`."""
    named, slash, feature = key.partition("/")
    return (named, feature) if slash else (model, key)


def _condition(place: Place, feature: str, condition: Condition, spec: FeatureSpec) -> Iterator[Problem]:
    if feature not in spec.features:
        yield place, f"model {spec.model} has no feature {feature!r}{nearest(feature, spec.features)}"
        return
    found = spec.features[feature]
    encoded = found if isinstance(found, Trait | Request) and found.categories is not None else None
    codes = categories(spec, feature) if encoded is not None else None
    for value in (*(condition.is_ or ()), *(condition.is_not or ())):
        if codes is None and isinstance(value, str):
            yield place, f"{value!r}: the feature has no categories; write a number"
        elif codes is not None and str(value) not in codes:
            yield place, f"no category {value!r}{nearest(str(value), codes)}"
    bounds = (condition.at_least, condition.more_than, condition.at_most, condition.below)
    if encoded is not None and isinstance(encoded.categories, tuple) and any(bound is not None for bound in bounds):
        yield place, f"categories have no order; write is: or is_not: with some of {', '.join(encoded.codes)}"


def categories(spec: FeatureSpec, feature: str) -> dict[str, float]:
    """Category -> number of a feature, and OTHER for those that the spec does not list; empty for one without any."""
    found = spec.features[feature]
    if not isinstance(found, Trait | Request) or found.categories is None:
        return {}
    return found.codes if math.isnan(found.other) else {**found.codes, OTHER: found.other}


def load(path: Path) -> Definitions:
    """The validated definitions of a YAML file. Raises InvalidDefinitions, each line `file:line: place: advice`."""
    return of(documents.load(path, _DEFINITIONS))


def read(text: str, name: str) -> Definitions:
    """The validated definitions of YAML text; `name` stands before the line in messages."""
    return of(documents.read(text, name, _DEFINITIONS))


def of(found: Document) -> Definitions:
    """The validated definitions of a document."""
    try:
        definitions = Definitions.model_validate(found.content)
    except ValidationError as error:
        raise InvalidDefinitions(found.told(_told(error))) from None
    definitions._document = found
    return definitions


def _told(error: ValidationError) -> Iterator[Problem]:
    for item in error.errors():
        if item["type"] == "inconsistent":
            yield from item["ctx"]["problems"]
        else:
            yield tuple(str(part) for part in item["loc"] if part != "[key]"), _advice(item)


def _advice(item: Any) -> str:
    if item["type"] == "string_pattern_mismatch":
        most = 56 if item["loc"][0] == "audiences" else 64
        return f"{str(item['input'])[:64]!r} is no name; write lower-case letters, digits, _ and -, {most} at most"
    if item["type"] == "too_short":
        return "holds nothing; write at least one"
    return advice.of_section(item, _known_keys)


def _known_keys(location: Location) -> list[str]:
    """The keys of the section that has one at a place."""
    section: Any = Definitions
    for part in location[:-1]:
        if isinstance(section, type) and issubclass(section, Section):
            field = next((one for name, one in section.model_fields.items() if (one.alias or name) == part), None)
            section = field.annotation if field is not None else None
        else:  # dict[name, section]
            section = get_args(section)[-1] if get_args(section) else None
        if get_origin(section) is UnionType:
            section = get_args(section)[0]
    return section.key_names() if isinstance(section, type) and issubclass(section, Section) else []
