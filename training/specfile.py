"""Spec files: the YAML form of a feature spec, read with the line of every problem."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from service.core.spec import FeatureSpec, InvalidSpec, Place, problems


class _Loader(yaml.SafeLoader):
    """YAML without the surprises of version 1.1; a repeated key is refused.

    `no`, `on`, dates, `1:30`, `007` and `1_000` stay text; numbers are written as in JSON.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is written twice; keep one", key.start_mark
                )
            seen.add(name)
        return {str(name): value for name, value in super().construct_mapping(node, deep).items()}


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(?:0|[1-9][0-9]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?", list("-0123456789.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def load(path: Path) -> FeatureSpec:
    """The validated spec of a YAML file. Raises InvalidSpec with one `file:line: place: advice` a problem."""
    return read(_text(path), str(path))


def read(text: str, name: str) -> FeatureSpec:
    """The validated spec of YAML text; `name` stands before the line in messages."""
    try:
        root = yaml.compose(text, _Loader)
        document = yaml.load(text, _Loader)  # noqa: S506 - derived from SafeLoader
    except yaml.YAMLError as error:
        raise InvalidSpec(f"{name}:{_yaml_problem(error, text)}") from None
    except RecursionError:
        raise InvalidSpec(f"{name}:1: is nested too deeply to be a spec") from None
    if not isinstance(root, yaml.MappingNode):
        raise InvalidSpec(f"{name}:1: is empty or no mapping; begin with model: NAME and features:")
    try:
        return FeatureSpec.model_validate(document)
    except ValidationError as error:
        lines = [f"{name}:{_line(root, place)}: {'.'.join(place)}: {advice}" for place, advice in problems(error)]
        raise InvalidSpec("\n".join(lines)) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidSpec(f"{path}: no such file; give the feature spec with --spec FILE") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"{line}: the character {chr(error.character)!r} cannot stand in YAML; remove it"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark is not None else 1
    return f"{line}: {getattr(error, 'problem', None) or error}"


def _line(root: yaml.MappingNode, place: Place) -> int:
    """The line of the deepest node on the way to a place."""
    node: Any = root
    line = root.start_mark.line
    for part in place:
        children = _children(node)
        if part not in children:
            break
        key, node = children[part]
        line = key.start_mark.line
    return line + 1


def _children(node: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): (key, value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return {str(index): (value, value) for index, value in enumerate(node.value)}
    return {}
