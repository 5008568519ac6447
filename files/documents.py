"""Documents: YAML files as people write them, with the line of every place in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from service.core.advice import Place, Problem
from service.core.errors import PropensityError

MOST_MERGED: Final = 100_000
_MERGE: Final = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML without the surprises of version 1.1; a repeated key is refused.

    `no`, `on`, dates, `1:30`, `007` and `1_000` stay text; numbers are written as in JSON.
    """

    merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what is merged into a mapping, each key once: PyYAML doubles those that meet again."""
        own: dict[str, Any] = {}
        for key, value in node.value:
            if str(key.value) in own:
                raise _refused(f"{str(key.value)!r} is written twice; keep one", key)
            own[str(key.value)] = key, value
        merges = [pair for pair in own.values() if pair[0].tag == _MERGE]
        own = {name: pair for name, pair in own.items() if pair[0].tag != _MERGE}
        node.value = list(own.values())  # what is left for a mapping that is merged into itself
        found: dict[str, Any] = {}
        for key, merged in merges:
            for one in reversed(merged.value if isinstance(merged, yaml.SequenceNode) else [merged]):
                found |= self._merged(key, one)
        node.value = list((found | own).values())

    def _merged(self, key: yaml.Node, node: yaml.Node) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _refused("<< takes a mapping or a list of mappings, as *NAME", key)
        self.flatten_mapping(node)
        self.merged += 1 + len(node.value)
        if self.merged > MOST_MERGED:
            raise _refused(f"more than {MOST_MERGED:,} keys are merged by <<; merge less, or less often", key)
        return {str(name.value): (name, value) for name, value in node.value}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        return {str(name): value for name, value in super().construct_mapping(node, deep).items()}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # `!!int x`, and a number of more digits than Python reads
            raise _refused(str(error), node) from None


def _refused(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(?:0|[1-9][0-9]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?", list("-0123456789.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class Kind(NamedTuple):
    """What a document is meant to be: how it is refused that it is none, and what to do instead."""

    error: type[PropensityError]
    missing: str  # where there is no such file
    empty: str  # where there is nothing in it


@dataclass(frozen=True)
class Document:
    """What a file holds, and where."""

    name: str
    content: dict[str, Any]
    root: yaml.MappingNode

    def where(self, place: Place) -> str:
        """`file:line: place` of the deepest node on the way to a place."""
        node: Any = self.root
        line = node.start_mark.line
        for part in place:
            children = _children(node)
            if part not in children:
                break
            key, node = children[part]
            line = key.start_mark.line
        return f"{self.name}:{line + 1}: {'.'.join(place)}"

    def told(self, problems: Iterable[Problem]) -> str:
        """What is wrong, a line each, and where."""
        return "\n".join(f"{self.where(place)}: {said}" for place, said in problems)


def load(path: Path, kind: Kind) -> Document:
    """The document of a file. Raises the error of its kind, as `file:line: what is wrong`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise kind.error(f"{path}: no such file; {kind.missing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise kind.error(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return read(text, str(path), kind)


def read(text: str, name: str, kind: Kind) -> Document:
    """The document of YAML text; `name` stands before the line in messages."""
    try:
        root = yaml.compose(text, _Loader)
        content = yaml.load(text, _Loader)  # noqa: S506 - derived from SafeLoader
    except yaml.YAMLError as error:
        raise kind.error(f"{name}:{_problem(error, text)}") from None
    except RecursionError:
        raise kind.error(f"{name}:1: is nested too deeply to be read") from None
    if not isinstance(root, yaml.MappingNode):
        raise kind.error(f"{name}:1: is empty or no mapping; {kind.empty}")
    return Document(name, content, root)


def _problem(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"{line}: the character {chr(error.character)!r} cannot stand in YAML; remove it"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark is not None else 1
    return f"{line}: {getattr(error, 'problem', None) or error}"


def _children(node: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): (key, value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return {str(index): (value, value) for index, value in enumerate(node.value)}
    return {}
