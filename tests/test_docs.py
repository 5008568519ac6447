"""Owns the promise that the documentation says what the code does: every name, default, link and command in it."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import numpy as np
import pytest
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

import audiences
import service.core
import training
from audiences import definitions, membership
from service import metrics
from service.app import create_app
from service.core import events, features, segments, spec
from service.core.errors import PropensityError
from service.errors import ServiceError
from service.settings import Settings
from tests.cli.tree import COMMANDS, GROUPS, split
from training import fit, specfile

ROOT = Path(__file__).parents[1]
Error = TypeVar("Error", bound=PropensityError)


class Block(NamedTuple):
    """A fenced block: where it is, what stands behind the fence, and its text."""

    page: str
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def pages() -> dict[str, str]:
    """Text of every page of the repository, by its path."""
    found = {path for pattern in ("*.md", "*/README.md", "docs/**/*.md") for path in ROOT.glob(pattern)}
    named = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in found}
    return {name: named[name] for name in sorted(named) if not name.startswith(".")}


def page(name: str) -> str:
    return pages()[f"docs/{name}"]


def blocks(*infos: str) -> list[Block]:
    """Every fenced block of the pages with one of these words behind its fence."""
    return [block for name, text in pages().items() for block in blocks_of(name, text) if block.info in infos]


def blocks_of(name: str, text: str) -> Iterator[Block]:
    for fence in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(name, text[: fence.start()].count("\n") + 1, fence[1].strip(), fence[2])


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next heading of its level or above."""
    level = heading.partition(" ")[0]
    start = f"\n{prose(text)}".index(f"\n{heading}\n")
    rest = f"\n{prose(text)}"[start + len(heading) + 2 :]
    end = re.search(rf"^#{{1,{len(level)}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """The cells of every line of every table, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = [place for place, line in enumerate(cells) if set("".join(line)) <= set("-: ")]
    return [line for place, line in enumerate(cells) if place not in rules and place + 1 not in rules]


def codes(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def table(text: str) -> dict[str, list[str]]:
    """The other cells of each table line by the code in its first cell; several codes are several lines."""
    found: dict[str, list[str]] = {}
    for first, *others in rows(text):
        for name in codes(first):
            assert name not in found, f"{name} is described twice"
            found[name] = others
    return found


# --- settings, metrics, commands, routes, errors ---


def test_every_setting_is_described_with_its_default_and_no_other() -> None:
    described = table(page("settings.md"))
    fields = {f"PROPENSITY_{name.upper()}": field for name, field in Settings.model_fields.items()}
    assert set(described) == set(fields)
    for name, field in fields.items():
        wanted = "none" if field.default is None else f"`{field.default}`"
        assert described[name][1] == wanted, name


def test_pages_name_no_setting_that_does_not_exist() -> None:
    known = {f"PROPENSITY_{name.upper()}" for name in Settings.model_fields}
    named = {name for text in pages().values() for name in re.findall(r"PROPENSITY_[A-Z_]*[A-Z]", text)}
    assert named <= known


def test_every_metric_is_described_with_its_type_and_labels_and_no_other() -> None:
    described = {
        name: (cells[0], tuple(codes(cells[1])))
        for name, cells in table(page("metrics.md")).items()
        if name.startswith("propensity_") and len(cells) == 3
    }
    ours = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    ending: dict[str | None, str] = {"counter": "_total"}
    assert described == {
        metric._name + ending.get(metric._type, ""): (metric._type, tuple(metric._labelnames)) for metric in ours
    }


def test_pages_name_no_metric_that_does_not_exist() -> None:
    known = {
        metric._name + ending
        for metric in vars(metrics).values()
        if isinstance(metric, MetricWrapperBase)
        for ending in ("", "_total", "_bucket", "_sum", "_count")
    }
    # What destinations keep on a platform has names of that kind too, and its own tests.
    ours = {page: text for page, text in pages().items() if not page.startswith("docs/destinations/")}
    named = {name for text in ours.values() for name in re.findall(r"\bpropensity_[a-z_]*[a-z]", text)}
    assert named <= known


def test_every_command_and_option_is_described_and_no_other() -> None:
    text = page("cli.md")
    assert set(re.findall(r"^## `propensity (.+)`$", text, re.MULTILINE)) == set(COMMANDS)
    for name, command in COMMANDS.items():
        lines = table(section(text, f"## `propensity {name}`"))
        described = {word.split()[0] for word in lines}
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        arguments = {
            parameter.name.upper()
            for parameter in command.params
            if parameter.param_type_name == "argument" and parameter.required
        }
        options = {option for option in options if option.startswith("--")}
        assert described == options | arguments, name


def test_defaults_of_options_are_those_of_the_code() -> None:
    text = page("cli.md")
    for name, command in COMMANDS.items():
        lines = {word.split()[0]: cells for word, cells in table(section(text, f"## `propensity {name}`")).items()}
        for parameter in command.params:
            plain = parameter.opts[0] in lines and not parameter.secondary_opts and not parameter.multiple
            if plain and parameter.default is not None:
                assert f"`{parameter.default}`" in lines[parameter.opts[0]][0], f"{name} {parameter.opts[0]}"


@cache
def routes() -> set[str]:
    """Every route of the application, as `POST /v1/score`."""
    app = create_app(Settings(_env_file=None))
    described = app.openapi()["paths"].items()
    return {f"{method.upper()} {path}" for path, methods in described for method in methods} | {
        f"GET {path}" for path in (app.docs_url, app.openapi_url)
    }


def test_every_route_is_described_and_no_other() -> None:
    assert set(re.findall(r"^### `(.+)`$", page("api.md"), re.MULTILINE)) == routes()


def subclasses(base: type[Error]) -> Iterator[type[Error]]:
    for one in base.__subclasses__():
        yield one
        yield from subclasses(one)


def test_every_problem_is_described_with_its_status_and_no_other() -> None:
    described = {
        name: int(cells[0])
        for name, cells in table(section(page("errors.md"), "## Of the HTTP API")).items()
        if len(cells) == 3
    }
    problems = {one for one in subclasses(ServiceError) if one.__module__ == "service.errors"}
    assert described == {one.code: one.status for one in problems}


def test_every_error_of_the_command_line_is_described() -> None:
    for package in (service.core, training, audiences):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    ours = {one.__name__ for one in subclasses(PropensityError) if one.__module__.split(".")[0] != "tests"}
    of_the_service = {one.__name__ for one in subclasses(ServiceError)}
    assert set(table(section(page("errors.md"), "## Of the command line"))) == ours - of_the_service


# --- the feature spec ---

SECTIONS: dict[str, type[BaseModel]] = {
    "## Sections": spec.FeatureSpec,
    "### `events`": spec.EventKind,
    "### `limits`": spec.Limits,
    "### `label`": spec.Label,
    "### `rows`": spec.Rows,
    "### `fit`": spec.Fit,
}


def keys(heading: str) -> dict[str, list[str]]:
    """The keys that the first table under a heading describes."""
    return first_table(page("feature-spec.md"), heading)


def first_table(text: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading."""
    first = re.search(r"^\|.*?\n(?!\|)", section(text, heading), re.MULTILINE | re.DOTALL)
    assert first, heading
    return table(first[0])


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_of_a_section_is_described_and_no_other(heading: str) -> None:
    assert list(keys(heading)) == list(SECTIONS[heading].model_fields)


def test_every_key_of_source_is_described_and_no_other() -> None:
    described = table(section(page("feature-spec.md"), "### `source`"))
    assert list(described) == [*spec.Source.model_fields, *spec.EventColumn.model_fields]


@pytest.mark.parametrize(("heading", "section"), [("### `limits`", spec.Limits()), ("### `rows`", spec.Rows())])
def test_defaults_of_a_section_are_those_of_the_code(heading: str, section: BaseModel) -> None:
    for key, value in section.model_dump(mode="json").items():
        wanted = "none" if value is None else f"`{json.dumps(value) if isinstance(value, bool) else value}`"
        assert keys(heading)[key][0] == wanted, key


def test_defaults_of_fitting_are_those_of_the_code() -> None:
    for key, cells in keys("### `fit`").items():
        assert cells[0] == (f"`{fit.DEFAULTS[key]}`" if key in fit.DEFAULTS else "LightGBM's"), key


def test_shares_of_segments_are_those_of_the_code() -> None:
    described = {name: cells[0] for name, cells in table(section(page("feature-spec.md"), "### `segments`")).items()}
    assert tuple(described) == segments.SEGMENTS
    for name, share in segments.SHARES.items():
        assert described[name] == f"{share:.0%}".replace("%", " %")


def test_every_kind_of_feature_and_each_of_its_keys_is_described_and_no_other() -> None:
    described = table(section(page("feature-spec.md"), "### `features`"))
    kinds = spec._FEATURES
    further = {key for kind, model in kinds.items() for key in model.model_fields} - set(kinds)
    assert set(described) == set(kinds) | further
    for key in further:
        for kind in codes(described[key][0]):
            assert key in kinds[kind].model_fields, f"{key} of {kind}"


# --- the definitions of audiences ---

OF_AUDIENCES: dict[str, type[definitions.Section]] = {
    "## The file": definitions.Definitions,
    "### `defaults`": definitions.Defaults,
    "### `segments`": definitions.SegmentRules,
    "### `audiences`": definitions.Audience,
    "### `cut`": definitions.Cut,
    "### `budget`": definitions.Budget,
    "### `scores`": definitions.Scores,
    "### Conditions": definitions.Condition,
    "### `last_event`": definitions.LastEvent,
    "### `holdout`": definitions.Holdout,
}


@pytest.mark.parametrize("heading", OF_AUDIENCES)
def test_every_key_of_the_definitions_is_described_and_no_other(heading: str) -> None:
    found = first_table(page("audiences.md"), heading)
    assert list(found) == OF_AUDIENCES[heading].key_names()


def test_every_section_of_the_definitions_is_described() -> None:
    assert set(subclasses_of_sections()) == set(OF_AUDIENCES.values())


def subclasses_of_sections() -> list[type[definitions.Section]]:
    return [one for one in definitions.Section.__subclasses__() if one.__module__ == definitions.__name__]


def test_defaults_of_audiences_are_those_of_the_code() -> None:
    for key, value in definitions.Defaults().model_dump(mode="json").items():
        wanted = "none" if value is None else f"`{value}`"
        assert first_table(page("audiences.md"), "### `defaults`")[key][0] == wanted, key


def test_every_reason_to_enter_or_leave_is_described() -> None:
    text = section(page("audiences.md"), "## Refreshing")
    assert {why.text for why in membership.Why if why} <= set(codes(text))


@pytest.mark.parametrize("block", blocks("yaml audiences"), ids=str)
def test_every_definition_of_audiences_in_the_pages_is_valid(block: Block) -> None:
    definitions.read(block.text, str(block))


def specs() -> list[Block]:
    return blocks("yaml spec")


@pytest.mark.parametrize("block", specs(), ids=str)
def test_every_spec_in_the_pages_is_valid(block: Block) -> None:
    specfile.read(block.text, str(block))


def test_every_yaml_block_that_is_a_spec_is_marked_as_one() -> None:
    assert len(specs()) >= 3
    assert [str(block) for block in blocks("yaml") if re.search(r"^features:", block.text, re.MULTILINE)] == []


def test_the_example_of_several_sources_is_valid() -> None:
    text = page("feature-spec.md")
    (mapping,) = [block for block in blocks_of("", text) if block.text.startswith("source:\n")]
    read = specfile.read(f"model: m\nfeatures: {{hour: {{clock: hour}}}}\n{mapping.text}", "example")
    assert [source.files for source in read.source] == ["orders*", "clicks*"]


def test_the_worked_example_is_what_the_kernel_computes() -> None:
    text = page("feature-spec.md")
    example = next(block for block in specs() if block.page == "docs/feature-spec.md")
    lines = rows(section(text, "## A worked example"))
    wanted = {codes(line[0])[0]: line[1] for line in lines if line[0].startswith("`")}
    happened = [line for line in lines if line[0].startswith(("today", "yesterday"))]
    assert len(wanted) >= 15
    assert len(happened) == 4
    catalogue = example.text[: example.text.index("features:")]
    listed = "".join(f"  f{place}: {feature}\n" for place, feature in enumerate(wanted))
    whole = f"{catalogue}features:\n  carts: {{count: cart}}\n  views: {{count: view}}\n{listed}"
    plan = features.compile(specfile.read(whole, "worked example"))
    noon = 1_790_000_000_000 // 86_400_000 * 86_400_000 + 12 * 3_600_000
    records = events.records(
        [noon + moment_ms(line[0]) for line in happened],
        [plan.spec.events[codes(line[1])[0]].code for line in happened],
        range(1, 5),
        [events.hash32(line[3]) for line in happened],
        [float(line[2]) for line in happened],
    )
    row = features.matrix(plan, records, np.array([0, 4]), np.array([noon]))[0, 2:]
    for value, (feature, said) in zip(row.tolist(), wanted.items(), strict=True):
        assert value == pytest.approx(float(said), abs=6e-5, nan_ok=True), feature


def moment_ms(text: str) -> int:
    """Milliseconds from today's noon to `today 11:40:00.000`."""
    day, clock = text.split()
    hours, minutes, seconds = clock.split(":")
    of_day = (int(hours) * 60 + int(minutes)) * 60_000 + round(float(seconds) * 1000)
    return of_day - 12 * 3_600_000 - (86_400_000 if day == "yesterday" else 0)


# --- events ---


def test_every_reason_to_refuse_an_event_is_described_and_no_other() -> None:
    code = "".join((ROOT / name).read_text("utf-8") for name in ("service/ingest.py", "service/api/events.py"))
    reasons = set(re.findall(r"(?:_Refusal|Refused)\(\s*\"(\w+)\"", code))
    text = section(page("events.md"), "## Outcomes")
    assert len(reasons) >= 8
    assert set(table(text[text.index("The reasons") :])) == reasons
    assert {labels for (labels,) in metrics.EVENTS_REFUSED._metrics} == reasons


# --- blocks of code ---


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a block of shell, prompts, variables, quotes over lines and pipes seen to."""
    joined = re.sub(r"(?m)(^|\s)# .*$", "", re.sub(r"\\\n\s*", " ", text))
    lines = shlex.shlex(joined, posix=True, punctuation_chars="|;&<>\n")
    lines.whitespace, lines.whitespace_split, lines.commenters = " \t", True, ""
    words: list[str] = []
    for word in [*lines, "\n"]:
        if set(word) <= set("|;&<>\n"):
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"\$|[A-Z_]+=.*", word, re.DOTALL):
            words.append(word)


def shell() -> list[tuple[Block, list[str]]]:
    return [(block, words) for block in blocks("sh") for words in commands(block.text)]


def ours() -> list[Any]:
    return [
        pytest.param(words, id=f"{block} {' '.join(words[:2])}")
        for block, words in shell()
        if Path(words[0]).name == "propensity"
    ]


@pytest.mark.parametrize("words", ours())
def test_every_command_line_in_the_pages_is_one_that_the_command_takes(words: list[str]) -> None:
    named = split(words[1:], COMMANDS)
    if named is None:
        assert words[1] == "--help" or (" ".join(words[1:-1]) in GROUPS and words[-1] == "--help")
    else:
        name, arguments = named
        COMMANDS[name].make_context(name, arguments)


def test_every_command_has_a_command_line_in_the_pages() -> None:
    named = [split(words.values[0][1:], COMMANDS) for words in ours()]
    assert {one[0] for one in named if one is not None} >= set(COMMANDS)


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=str(block)) for block, words in shell() if words[0] == "curl"]
)
def test_every_curl_in_the_pages_asks_a_route_that_exists(words: list[str]) -> None:
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if "-d" in words else "GET"
    (url,) = [word for word in words if word.startswith("http")]
    path = url.removeprefix("http://127.0.0.1:8000").partition("?")[0]
    templates = [route.partition(" ") for route in routes()]
    assert any(
        method == asked and re.fullmatch(re.sub(r"\\{.*?\\}", "[^/]+", re.escape(template)), path)
        for asked, _, template in templates
    )
    if "-d" in words:
        json.loads(words[words.index("-d") + 1])


def test_every_make_target_in_the_pages_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {
        word for _, words in shell() if words[0] == "make" for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)
    }
    named |= {text.split()[1] for body in pages().values() for text in codes(body) if re.match(r"make [a-z]", text)}
    assert {"run", "test"} <= named <= targets


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_every_block_of_json_is_json(block: Block) -> None:
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        for line in block.text.splitlines():  # one object a line
            json.loads(line)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_block_of_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_every_block_says_what_it_is() -> None:
    known = {"sh", "json", "python", "js", "text", "yaml", "yaml spec", "yaml audiences"}
    found = [block for name, text in pages().items() for block in blocks_of(name, text)]
    assert [str(block) for block in found if block.info not in known] == []


# --- links ---


def anchors(text: str) -> set[str]:
    """Fragments that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def links() -> Iterator[tuple[str, str]]:
    for name, text in pages().items():
        plain = re.sub(r"`[^`\n]*`", "``", prose(text))
        for target in re.findall(r"\]\(([^)\s]+)\)", plain):
            if not re.match(r"[a-z]+:", target):
                yield name, target


def broken(name: str, target: str) -> bool:
    """Whether a relative link leads to no file or, with a fragment, to no heading."""
    path, _, fragment = target.partition("#")
    file = (ROOT / name).parent / unquote(path) if path else ROOT / name
    if not file.exists():
        return True
    return bool(fragment) and fragment not in anchors(file.read_text("utf-8"))


def test_every_relative_link_leads_to_a_file_and_a_heading() -> None:
    found = list(links())
    assert len(found) > 50
    assert [f"{name}: {target}" for name, target in found if broken(name, target)] == []


@pytest.mark.parametrize("target", ["docs/nothing.md", "docs/api.md#nothing", "#nothing"])
def test_a_broken_link_is_recognised(target: str) -> None:
    assert broken("README.md", target)


def test_every_picture_is_one() -> None:
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg")]
    assert pictures
    for path in pictures:
        begin = path.read_bytes()[:400]
        assert begin.startswith(b"\x89PNG\r\n\x1a\n") if path.suffix == ".png" else b"<svg" in begin, path.name


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, pending = set(), ["README.md"]
    while pending:
        name = pending.pop()
        seen.add(name)
        targets = {
            ((ROOT / name).parent / target.partition("#")[0]).resolve() for page, target in links() if page == name
        }
        paths = {str(path.relative_to(ROOT)) for path in targets if path.suffix == ".md"}
        pending += sorted(paths - seen - set(pending))
    assert [name for name in pages() if name.startswith("docs/") and name not in seen] == []
