"""Owns what the repository promises as a whole: locks, make targets, the image, continuous integration."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = (
    "requirements.lock",
    "requirements-training.lock",
    "requirements-dev.lock",
    "requirements-bootstrap.lock",
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAKE = shutil.which("make") or "make"


class Pin(NamedTuple):
    """One entry of a lock file."""

    requirement: Requirement
    hashes: list[str]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        assert specifier.operator == "==", self.requirement
        return specifier.version


def pins(lock: str) -> dict[str, Pin]:
    """Return the entries of a lock file by name; a name that comes twice is an error."""
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / lock).read_text("utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = [Pin(Requirement(line.split(" --hash=")[0]), line.split(" --hash=")[1:]) for line in lines]
    assert len({pin.name for pin in found}) == len(found), f"{lock} names a package twice"
    return {pin.name: pin for pin in found}


def declared(extra: str | None = None, group: str | None = None) -> Iterator[Requirement]:
    """Yield what pyproject.toml asks for: the dependencies, or those of an extra or a group."""
    project = PYPROJECT["project"]
    lines = project["dependencies"]
    if extra:
        lines = project["optional-dependencies"][extra]
    if group:
        lines = PYPROJECT["dependency-groups"][group]
    for line in lines:
        if isinstance(line, dict):
            yield from declared(group=line["include-group"])
        else:
            yield Requirement(line)


def files_of_the_repository() -> list[Path]:
    """Return what is under version control or would be, without the files that are not text."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a checkout of git")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def make(
    *arguments: str, cwd: Path = ROOT, path: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run make as from a fresh shell: without the flags of a make that may run these tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "CI"))}
    return subprocess.run(
        [MAKE, *arguments],
        cwd=cwd,
        env={**kept, "PATH": path or os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def programs(folder: Path, *names: str) -> str:
    """Return a search path that has these programs and no others."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name) or pytest.skip(f"{name} is not installed"))
    return str(folder)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(0o755)


# --- lock files ---


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_one_version_and_its_hashes(lock: str) -> None:
    for pin in pins(lock).values():
        assert pin.version
        assert pin.hashes, f"{pin.name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", hash) for hash in pin.hashes), pin.name


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_files_name_no_index_and_no_place_on_a_machine(lock: str) -> None:
    text = (ROOT / lock).read_text("utf-8")
    assert not re.search(r"https?:|file:|git\+|(?m:^\s*-)(?!-hash=)|--(extra-)?index-url|--find-links| @ |/", text)


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_files_agree_on_versions(lock: str) -> None:
    widest = pins("requirements-dev.lock")
    for name, pin in pins(lock).items():
        if name != "uv":
            assert pin.version == widest[name].version, name


def test_each_lock_file_holds_what_the_one_before_it_holds() -> None:
    serving, training, development = (set(pins(lock)) for lock in LOCKS[:3])
    assert serving < training < development


@pytest.mark.parametrize(
    ("lock", "extra", "group"),
    [
        ("requirements.lock", None, None),
        ("requirements-training.lock", "training", None),
        ("requirements-dev.lock", None, "dev"),
        ("requirements-bootstrap.lock", None, "bootstrap"),
    ],
)
def test_every_declared_dependency_is_locked_within_its_bounds(lock: str, extra: str | None, group: str | None) -> None:
    locked = pins(lock)
    for requirement in declared(extra, group):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is not in {lock}; run make lock"
        assert locked[name].version in requirement.specifier, f"{name} in {lock}; run make lock"


def test_the_serving_image_installs_no_training_library() -> None:
    serving = set(pins("requirements.lock"))
    training = {canonicalize_name(requirement.name) for requirement in declared("training")}
    assert "lightgbm" in training
    assert not serving & (training | {"scipy", "pandas"})


# --- the whole tree ---

HOME = re.compile(r"(?<![\w.$}])/(?:home|root|Users|work|private|mnt|opt/(?!propensity))/?\w*")


def test_no_file_names_a_place_on_someones_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files_of_the_repository()
        if path != Path(__file__)
        for match in HOME.finditer(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("text", ["see /home/ada/x", "='/Users/ada'", "at /work/main", "/root/.cache"])
def test_a_place_on_someones_machine_is_recognised(text: str) -> None:
    assert HOME.search(text)


@pytest.mark.parametrize("text", ["https://x.org/home/page", "network/work/x", "a/root/b", "/opt/propensity/bin"])
def test_a_path_inside_something_else_is_not_taken_for_one(text: str) -> None:
    assert not HOME.search(text)


def test_the_console_script_is_the_propensity_command() -> None:
    assert PYPROJECT["project"]["scripts"] == {"propensity": "cli.main:main"}


def test_the_licence_is_the_one_declared() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text("utf-8")


@pytest.mark.parametrize("command", ["make run", "make test"])
def test_the_readme_gives_the_two_commands(command: str) -> None:
    assert command in (ROOT / "README.md").read_text("utf-8")


# --- make ---


def targets() -> dict[str, str]:
    """Return the help of every target that a person would type."""
    text = (ROOT / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    found = dict(re.findall(r"^([a-z][a-z-]*):(?!=)([^\n]*)$", text, re.MULTILINE))
    assert set(phony[1].split()) == set(found)
    return {name: line.partition("## ")[2] for name, line in found.items() if name != "again"}


def test_every_make_target_says_what_it_does() -> None:
    assert {"setup", "run", "test", "lint", "lock"} <= set(targets())
    for name, text in targets().items():
        assert text, f"{name} has no ## help"


def test_make_alone_lists_every_target() -> None:
    shown = make().stdout
    for name, text in targets().items():
        assert re.search(rf"^make {name} +{re.escape(text)}$", shown, re.MULTILINE), name


@pytest.mark.parametrize("choice", ["", "old-python"])
def test_setup_without_a_fitting_python_says_which_one_is_needed(tmp_path: Path, choice: str) -> None:
    for name in ("Makefile", *LOCKS, "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    script(tmp_path / "old-python", "exit 1")
    result = make("setup", f"PYTHON={choice and tmp_path / choice}", cwd=tmp_path)
    assert result.returncode != 0
    assert "Python 3.11 to 3.14" in result.stderr
    assert "make setup PYTHON=" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_without_virtual_environments_names_the_package_to_install(tmp_path: Path) -> None:
    for name in ("Makefile", *LOCKS, "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    script(
        tmp_path / "python",
        'case "$2" in *ensurepip*) exit 1;; *version_info\\[:2\\]\\)*) echo python3.12-venv;; esac',
    )
    path = programs(tmp_path / "bin", "sh", "test", "id")
    result = make("setup", f"PYTHON={tmp_path / 'python'}", cwd=tmp_path, path=path)
    assert result.returncode != 0
    assert "sudo apt-get install python3.12-venv" in result.stderr


def test_missing_system_packages_are_named_and_do_not_stop_a_person(tmp_path: Path) -> None:
    result = make("system", "POSTGRES=none", path=programs(tmp_path / "bin", "sh", "id", "test"))
    assert result.returncode == 0, result.stderr
    assert "Missing: redis-server chromium prometheus postgresql" in result.stderr


def test_missing_system_packages_stop_continuous_integration(tmp_path: Path) -> None:
    result = make("system", "POSTGRES=none", path=programs(tmp_path / "bin", "sh", "id", "test"), CI="true")
    assert result.returncode != 0
    assert "Missing: redis-server chromium prometheus postgresql" in result.stderr


def test_present_system_packages_are_left_alone(tmp_path: Path) -> None:
    path = programs(tmp_path / "bin", "sh", "id", "test")
    for name in ("redis-server", "chromium", "prometheus", "postgres"):
        script(tmp_path / "bin" / name, "exit 0")
    result = make("system", path=path, CI="true")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_server_beside_the_path_is_found(tmp_path: Path) -> None:
    path = programs(tmp_path / "bin", "sh", "id", "test")
    for version in ("14", "15"):
        (tmp_path / version).mkdir()
        script(tmp_path / version / "postgres", "exit 0")
    given = ("system", "PROGRAMS=postgresql", f"POSTGRES={tmp_path}/*/postgres")
    assert make(*given, path=path, CI="true").returncode == 0
    (tmp_path / "15" / "postgres").unlink()
    (tmp_path / "14" / "postgres").unlink()
    assert "Missing: postgresql" in make(*given, path=path, CI="true").stderr


def test_a_server_that_is_installed_is_not_started(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    path = programs(tmp_path / "bin", "sh", "test", "chmod", "rm")
    script(tmp_path / "bin" / "id", "echo 0")
    script(tmp_path / "bin" / "apt-get", f'test "$1" != install || {{ {policy}; echo "may start: $?"; }} >&2')
    result = make("system", f"POLICY={policy}", path=path)
    assert result.stderr == "may start: 101\n", "what invoke-rc.d asks before it starts a service"
    assert not policy.exists()


# --- continuous integration ---


@pytest.mark.parametrize(
    ("prints", "status", "closing"),
    [
        ("12 passed in 0.52s", 0, "12 passed in 0.52s"),
        (
            "1 failed, 11 passed, 2 skipped in 3.00s\nmake: *** [test] Error 1",
            2,
            "1 failed, 11 passed, 2 skipped in 3.00s",
        ),
        ("====== 2 errors in 0.10s ======\nmake: *** [test] Error 2", 2, "====== 2 errors in 0.10s ======"),
        ("no tests ran in 0.01s\nmake: *** [test] Error 5", 2, "no tests ran in 0.01s"),
        ("ruff found something\nmake: *** [lint] Error 1", 2, "make: *** [lint] Error 1"),
    ],
)
def test_continuous_integration_fails_with_the_tests_and_ends_with_their_closing_line(
    tmp_path: Path, prints: str, status: int, closing: str
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    (tmp_path / "prints").write_text(prints + "\n", "utf-8")
    script(
        tmp_path / "bin" / "make",
        f'test "$*" = test && test "$CI" = true || exit 9\ncat prints\nexit {status}',
    )
    result = subprocess.run(
        ["bash", str(tmp_path / ".ci" / "run")],
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    assert result.returncode == status
    assert result.stdout.splitlines()[-1] == closing


def test_continuous_integration_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- the image ---


def stages() -> list[list[tuple[str, str]]]:
    """Return the Dockerfile's instructions as (word, rest), stage by stage."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text("utf-8"))
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: list[list[tuple[str, str]]] = []
    for word, rest in lines:
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def test_the_image_is_built_in_one_stage_and_run_in_another() -> None:
    build, final = stages()
    assert build[0][1].endswith(" AS build")
    assert ("COPY", "--from=build /opt/propensity /opt/propensity") in final
    assert not any(word == "RUN" and "pip" in rest for word, rest in final)


def test_the_image_runs_without_root() -> None:
    users = [rest for word, rest in stages()[-1] if word == "USER"]
    assert users
    assert users[-1] not in {"root", "0"}


def test_the_image_installs_from_hashes_and_copies_no_training_code() -> None:
    copied = [part for word, rest in stages()[0] if word == "COPY" for part in rest.split()[:-1]]
    assert {"requirements.lock", "service", "cli"} <= set(copied)
    assert not {"requirements-training.lock", "requirements-dev.lock", "training", "."} & set(copied)
    for rest in (rest for word, rest in stages()[0] if word == "RUN"):
        for command in re.findall(r"pip install [^&]*", rest):
            assert "--require-hashes" in command or "--no-deps" in command, command


def test_what_the_image_copies_is_let_through_and_exists() -> None:
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")
    }
    copied = {
        part.rstrip("/")
        for stage in stages()
        for word, rest in stage
        if word == "COPY" and "--from" not in rest
        for part in rest.split()[:-1]
    }
    assert copied == let_through
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_image_is_healthy_when_livez_answers() -> None:
    (check,) = [rest for word, rest in stages()[-1] if word == "HEALTHCHECK"]
    assert "/livez" in check
    assert '["python"' in check
    assert "curl" not in check


def test_the_image_listens_on_8000_and_serves() -> None:
    final = stages()[-1]
    assert ("EXPOSE", "8000") in final
    assert ("ENTRYPOINT", '["propensity"]') in final
    assert ("CMD", '["serve"]') in final
