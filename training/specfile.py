"""Spec files: the YAML form of a feature spec, read with the line of every problem."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import ValidationError

from files import documents
from files.documents import Document, Kind
from service.core.spec import FeatureSpec, InvalidSpec, problems

_SPEC: Final = Kind(InvalidSpec, "give the feature spec with --spec FILE", "begin with model: NAME and features:")


def load(path: Path) -> FeatureSpec:
    """The validated spec of a YAML file. Raises InvalidSpec with one `file:line: place: advice` a problem."""
    return _of(documents.load(path, _SPEC))


def read(text: str, name: str) -> FeatureSpec:
    """The validated spec of YAML text; `name` stands before the line in messages."""
    return _of(documents.read(text, name, _SPEC))


def _of(found: Document) -> FeatureSpec:
    try:
        return FeatureSpec.model_validate(found.content)
    except ValidationError as error:
        raise InvalidSpec(found.told(problems(error))) from None
