"""Which kinds of destinations there are, and `destinations.yaml`, which says where lists go.

A kind's module is imported only where the file uses it, since each needs an extra of its own.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from audiences.destinations.options import FromEnvironment
from audiences.destinations.protocol import Destination
from service.core.errors import PropensityError

REFERENCE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Kind(NamedTuple):
    """Where a kind of destination is written, and what installs what it needs."""

    module: str
    extra: str


KINDS: Final[Mapping[str, Kind]] = {
    "files": Kind("audiences.destinations.files", "audiences"),
    "webhook": Kind("audiences.destinations.webhook", "audiences"),
    "google-ads": Kind("audiences.destinations.google", "google-ads"),
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
    where: str

    def build(self) -> Destination:
        """The destination. Raises PropensityError naming the extra that is missing, or the option that is wrong."""
        kind = KINDS[self.kind]
        try:
            module = importlib.import_module(kind.module)
        except ModuleNotFoundError as error:
            raise PropensityError(
                f"{self.where}.{self.name}: the kind {self.kind} needs {error.name}, which is not installed; "
                f"install it with pip install 'propensity[{kind.extra}]'"
            ) from None
        try:
            options = module.Options.model_validate(dict(self.options))
        except ValidationError as error:
            raise PropensityError(told(f"{self.where}.{self.name}", error)) from None
        built: Destination = module.build(self.name, options)
        return built


class File(NamedTuple):
    """What `destinations.yaml` holds, by name, as it is written there.

    Only what is asked for is looked up in the environment: who runs one destination needs no other one's secrets.
    """

    destinations: Mapping[str, Mapping[str, Any]]
    triggers: Mapping[str, Mapping[str, Any]]
    path: Path
    environment: Mapping[str, str]

    def destination(self, name: str) -> Entry:
        """The destination of this name. Raises PropensityError with those that there are, or with what is wrong."""
        if name not in self.destinations:
            raise PropensityError(
                f"{self.path}: no destination {name!r}; it has {', '.join(self.destinations) or 'none'}"
            )
        where = f"{self.path}: destinations"
        return _entry(name, _expanded(self.destinations[name], f"{where}.{name}", self.environment), where)

    def trigger(self, name: str) -> Mapping[str, Any]:
        """The options of the trigger of this name. Raises PropensityError with those that there are."""
        if name not in self.triggers:
            raise PropensityError(f"{self.path}: no trigger {name!r}; it has {', '.join(self.triggers) or 'none'}")
        expanded: Mapping[str, Any] = _expanded(self.triggers[name], f"{self.path}: triggers.{name}", self.environment)
        return expanded


def load(path: Path) -> File:
    """Read the file. Raises PropensityError that says what to write; no text of the environment is in it."""
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise PropensityError(
            f"{path}: {error.strerror}; name the file of destinations with --destinations FILE, see docs/sync.md"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise PropensityError(f"{path}{line}: is no YAML: {getattr(error, 'problem', None) or error}") from None
    return read(document, path, os.environ)


def read(document: object, path: Path, environment: Mapping[str, str]) -> File:
    """The same of a document that is read already."""
    if not isinstance(document, Mapping) or set(document) - {"destinations", "triggers"}:
        raise PropensityError(f"{path}: write the keys destinations and triggers at the top, each a mapping by name")
    return File(_named(document, "destinations", path), _named(document, "triggers", path), path, environment)


def _named(document: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Mapping[str, Any]]:
    found = document.get(key) or {}
    if not isinstance(found, Mapping):
        raise PropensityError(f"{path}: {key} is no mapping; write a name, a colon, and its options below it")
    for name, given in found.items():
        if not isinstance(given, Mapping):
            raise PropensityError(f"{path}: {key}.{name} is no mapping; write its options below it")
    return {str(name): given for name, given in found.items()}


def _entry(name: str, given: Mapping[str, Any], where: str) -> Entry:
    kind = given.get("kind")
    if kind not in KINDS:
        raise PropensityError(f"{where}.{name}.kind: write one of {', '.join(KINDS)}")
    ours = {key: value for key, value in given.items() if key in Sending.model_fields}
    theirs = {key: value for key, value in given.items() if key != "kind" and key not in ours}
    try:
        return Entry(name, str(kind), Sending.model_validate(ours), theirs, where)
    except ValidationError as error:
        raise PropensityError(told(f"{where}.{name}", error)) from None


def _expanded(value: Any, where: str, environment: Mapping[str, str]) -> Any:
    """The value with every ${NAME} replaced; what is nothing but a reference is marked as coming from there."""
    if isinstance(value, Mapping):
        return {str(key): _expanded(one, f"{where}.{key}", environment) for key, one in value.items()}
    if isinstance(value, list):
        return [_expanded(one, f"{where}.{place}", environment) for place, one in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        if match[1] not in environment:
            raise PropensityError(f"{where}: the environment variable {match[1]} is not set")
        return environment[match[1]]

    text = REFERENCE.sub(look_up, value)
    return FromEnvironment(text) if REFERENCE.fullmatch(value) else text


def told(where: str, error: ValidationError) -> str:
    """What pydantic found wrong, without the values."""
    return "; ".join(
        f"{'.'.join([where, *map(str, item['loc'])])}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_input=False, include_url=False, include_context=False)
    )
