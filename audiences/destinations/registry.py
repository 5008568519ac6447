"""Which kinds of destinations there are, and `destinations.yaml`, which says where lists go.

A kind's module is imported only where the file uses it, since each needs an extra of its own.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from audiences.destinations.options import FromEnvironment
from audiences.destinations.protocol import Destination
from files import documents
from files.documents import Document
from service.core import advice
from service.core.advice import Place, Problem, nearest
from service.core.errors import PropensityError

_FILE: Final = documents.Kind(
    PropensityError,
    "name the file of destinations with --destinations FILE, see docs/sync.md",
    "write the keys destinations and triggers at the top, each a mapping by name",
)
REFERENCE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Kind(NamedTuple):
    """Where a kind of destination is written, and what installs what it needs."""

    module: str
    extra: str


KINDS: Final[Mapping[str, Kind]] = {
    "files": Kind("audiences.destinations.files", "audiences"),
    "webhook": Kind("audiences.destinations.webhook", "audiences"),
    "google-ads": Kind("audiences.destinations.google", "google-ads"),
    "google-data-manager": Kind("audiences.destinations.data_manager", "google-data-manager"),
    "meta": Kind("audiences.destinations.meta", "meta"),
    "hubspot": Kind("audiences.destinations.hubspot", "hubspot"),
    "klaviyo": Kind("audiences.destinations.klaviyo", "klaviyo"),
}


class Sending(BaseModel):
    """What the synchronisation itself wants to know of a destination."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patience_s: float = Field(300, gt=0, description="Seconds that a request is tried again before the run ends.")
    first_wait_s: float = Field(0.5, gt=0, description="Seconds before the second attempt; doubled for each further.")
    longest_wait_s: float = Field(60, gt=0, description="Seconds between two attempts at most.")


class Entry(NamedTuple):
    """One destination of the file, not built yet."""

    name: str
    kind: str
    sending: Sending
    options: Mapping[str, Any]
    document: Document

    def build(self) -> Destination:
        """The destination. Raises PropensityError naming the extra that is missing, or all options that are wrong."""
        kind, place = KINDS[self.kind], ("destinations", self.name)
        try:
            module = importlib.import_module(kind.module)
        except ModuleNotFoundError as error:
            raise PropensityError(
                f"{self.document.where(place)}: the kind {self.kind} needs {error.name}, which is not installed; "
                f"install it with pip install 'propensity[{kind.extra}]'"
            ) from None
        try:
            options = module.Options.model_validate(dict(self.options))
        except ValidationError as error:
            known = [*module.Options.model_fields, *Sending.model_fields]
            raise PropensityError(self.document.told(problems(place, error, known))) from None
        built: Destination = module.build(self.name, options)
        return built


class File(NamedTuple):
    """What `destinations.yaml` holds, by name, as it is written there.

    Only what is asked for is looked up in the environment: who runs one destination needs no other one's secrets.
    """

    destinations: Mapping[str, Mapping[str, Any]]
    triggers: Mapping[str, Mapping[str, Any]]
    document: Document
    environment: Mapping[str, str]

    def destination(self, name: str) -> Entry:
        """The destination of this name. Raises PropensityError with those that there are, or with all that is wrong."""
        given, wrong = self._given("destinations", name)
        place = ("destinations", name)
        kind = given.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            wrong.append(((*place, "kind"), f"{'is no kind' if kind else 'is missing'}{nearest(str(kind), KINDS)}"))
        ours = {key: value for key, value in given.items() if key in Sending.model_fields}
        theirs = {key: value for key, value in given.items() if key != "kind" and key not in ours}
        try:
            sending = Sending.model_validate(ours)
        except ValidationError as error:
            wrong += problems(place, error)
        if wrong:
            raise PropensityError(self.document.told(wrong))
        return Entry(name, str(kind), sending, theirs, self.document)

    def trigger(self, name: str) -> Mapping[str, Any]:
        """The options of the trigger of this name. Raises PropensityError with those that there are."""
        given, wrong = self._given("triggers", name)
        if wrong:
            raise PropensityError(self.document.told(wrong))
        return given

    def _given(self, key: str, name: str) -> tuple[Mapping[str, Any], list[Problem]]:
        """What is written below a name with every ${NAME} replaced, and the variables that are not set."""
        every: Mapping[str, Mapping[str, Any]] = getattr(self, key)
        if name not in every:
            known = ", ".join(every) or "none"
            raise PropensityError(f"{self.document.name}: no {key.removesuffix('s')} {name!r}; it has {known}")
        wrong: list[Problem] = []
        try:
            return _expanded(every[name], (key, name), self.environment, wrong, {}), wrong
        except RecursionError:  # of an alias that holds itself
            raise PropensityError(self.document.told([((key, name), "is nested too deeply to be read")])) from None


def load(path: Path) -> File:
    """Read the file. Raises PropensityError that says what to write; no text of the environment is in it."""
    return _of(documents.load(path, _FILE), os.environ)


def read(text: str, name: str, environment: Mapping[str, str]) -> File:
    """The same of YAML text; `name` stands before the line in messages."""
    return _of(documents.read(text, name, _FILE), environment)


def _of(document: Document, environment: Mapping[str, str]) -> File:
    known = ("destinations", "triggers")
    wrong: list[Problem] = [
        ((key,), f"unknown key{nearest(key, known)}") for key in document.content if key not in known
    ]
    for key in known:
        found = document.content.get(key) or {}
        if not isinstance(found, Mapping):
            wrong.append(((key,), "is no mapping; write a name, a colon, and its options below it"))
            continue
        for name, given in found.items():
            if not isinstance(given, Mapping):
                wrong.append(((key, name), "is no mapping; write its options below it"))
    if wrong:
        raise PropensityError(document.told(wrong))
    destinations, triggers = (document.content.get(key) or {} for key in known)
    return File(destinations, triggers, document, environment)


def _expanded(
    value: Any, place: Place, environment: Mapping[str, str], wrong: list[Problem], done: dict[int, Any]
) -> Any:
    """The value with every ${NAME} replaced; what is nothing but a reference is marked as coming from there.

    `done` holds what became of each mapping and list by its id: what aliases stand for is looked at once.
    """
    if isinstance(value, (Mapping, list)):
        if id(value) not in done:
            made = [
                _expanded(one, (*place, str(key)), environment, wrong, done)
                for key, one in (value.items() if isinstance(value, Mapping) else enumerate(value))
            ]
            done[id(value)] = dict(zip(value, made, strict=True)) if isinstance(value, Mapping) else made
        return done[id(value)]
    if not isinstance(value, str):
        return value
    unset = [name for name in REFERENCE.findall(value) if name not in environment]
    wrong += [(place, f"the environment variable {name} is not set") for name in unset]
    text = REFERENCE.sub(lambda match: environment.get(match[1], ""), value)
    return FromEnvironment(text) if REFERENCE.fullmatch(value) else text


def problems(place: Place, error: ValidationError, known: Iterable[str] = ()) -> list[Problem]:
    """What pydantic found wrong below a place, without the values; `known` are the keys that stand right below it."""
    found: list[Problem] = []
    for item in error.errors(include_input=False, include_url=False, include_context=False):
        at = tuple(map(str, item["loc"]))
        found.append(((*place, *at), advice.of(item, lambda loc: known if len(loc) == 1 else ())))
    return found
