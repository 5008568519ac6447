"""The commands as a person types them: help for everything, and one clear line for whatever is wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import typer

from cli import main as command_line
from service.core import bundle
from service.embedded import EmbeddedServer
from tests.cli.tree import COMMANDS, GROUPS, commands_of, groups_of
from tests.conftest import StartService, free_port

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "examples" / "shop.yaml"


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that says what is wrong."""
        assert self.status == 2, self
        assert self.out == "", self
        [line] = self.err.splitlines()
        assert line.startswith("propensity: "), line
        return line.removeprefix("propensity: ")


Run = Callable[..., Done]


def propensity(*arguments: object) -> Done:
    """Run `propensity` with arguments in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["propensity", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`propensity` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return propensity


def in_a_process(*arguments: object, cwd: Path, **environment: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a simulated shop and the model trained on it, all by commands."""
    directory = tmp_path_factory.mktemp("shop")
    made = propensity("simulate", "--out", directory, "--events", 60000, "--days", 40, "--seed", 3, "--truth")
    assert made.status == 0, made
    assert "events of" in made.err
    trained = propensity(
        *("train", "--events", directory / "events.parquet", "--spec", SHOP, "--artifacts", directory / "artifacts"),
        *("--max-rows", 5000, "--threads", 1, "--predictions", directory / "scores.parquet"),
    )
    assert trained.status == 0, trained
    assert trained.out == "", "summaries go to stderr"
    for said in ("ROC-AUC", "regression", "Bundle: ", "Report: "):
        assert said in trained.err
    return directory


# --- help ---


def test_alone_and_with_help_it_lists_every_command(run: Run) -> None:
    alone, asked = run(), run("--help")
    assert alone == asked
    assert (alone.status, alone.err) == (0, "")
    first = {name for name in (*COMMANDS, *GROUPS) if " " not in name}
    assert first == {
        "simulate",
        "train",
        "compact",
        "drift",
        "export",
        "features",
        "replay",
        "serve",
        "score",
        "models",
        "audiences",
    }
    for name in first:
        assert f" {name} " in alone.out


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_a_group_alone_and_with_help_lists_its_commands(run: Run, name: str) -> None:
    alone, asked = run(*name.split()), run(*name.split(), "--help")
    assert alone == asked
    assert (alone.status, alone.err) == (0, "")
    assert f"Usage: propensity {name} " in alone.out
    for below in GROUPS[name].commands:
        assert f" {below} " in alone.out


def test_commands_of_groups_are_found_by_their_full_names() -> None:
    app, group = typer.Typer(), typer.Typer(name="outer")
    app.command("alone")(lambda: None)
    group.command("inner")(lambda: None)
    app.add_typer(group)
    assert (set(commands_of(app)), set(groups_of(app))) == ({"alone", "outer inner"}, {"outer"})


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_of_a_command_explains_every_option(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    done = run(*name.split(), "--help")
    assert (done.status, done.err) == (0, "")
    assert f"Usage: propensity {name} " in done.out
    text = " ".join(done.out.replace("│", " ").split())
    for parameter in COMMANDS[name].params:
        if parameter.name == "help":
            continue
        written = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
        assert all(option in text for option in written)
        assert parameter.help, f"{name} {parameter.name} has no text"
        assert " ".join(parameter.help.split()) in text


# --- what is wrong with the arguments ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'. See propensity --help"),
        (["--nonsense"], "No such option: --nonsense See propensity --help"),
        (["train", "--zzz"], "No such option: --zzz See propensity train --help"),
        (["train", "--evnts", "x"], "No such option: --evnts (Possible options: --events"),
        (["train"], "Missing option '--spec'. See propensity train --help"),
        (["score"], "give ids of visitors, or event files with --events FILES and --out DIR"),
        (["score", "v", "--out", "x"], "--out is for event files; give them with --events FILES"),
        (["score", "--features", "all"], "--features is for event files; give them with --events FILES"),
        (["score", "--events", "a.csv"], "give the directory to write scores to with --out DIR"),
        (["score", "--events", "a.csv", "--out", "o"], "artifacts: holds no model; propensity train writes one,"),
        (["score", "--events", "a.csv", "--out", "o", "--at", "soon"], "'soon' is no moment; write ISO 8601, as"),
        (["train", "--spec", SHOP, "a.csv", "--engine", "spark"], "--engine spark is unknown; write --engine local or"),
        (["train", "--spec", SHOP, "a.csv", "--scheduler", "tcp://a:1"], "--scheduler is for --engine dask; give both"),
        (["export", "model.txt"], "Missing option '--out'. See propensity export --help"),
        (["simulate", "--out"], "Option '--out' requires an argument. See propensity --help"),
        (["simulate", "--out", "x", "--events", "many"], "Invalid value for '--events': "),
        (["simulate", "--out", "x", "--events", "99"], "Invalid value for '--events': "),
        (["train", "--spec", "x", "--seed", "-1"], "Invalid value for '--seed': "),
        (["train", "--spec", "x", "--seed", str(2**31)], "Invalid value for '--seed': "),
        (["train", "--spec", "x", "--threads", "0"], "Invalid value for '--threads': "),
        (["train", "--spec", "x", "--max-rows", "10"], "Invalid value for '--max-rows': "),
        (["train", "--spec", "x", "--max-bad-rows", "-1"], "Invalid value for '--max-bad-rows': "),
        (["audiences", "nonsense"], "No such command 'nonsense'. See propensity audiences --help"),
        (["models", "extra"], "Got unexpected extra argument(s) (extra) See propensity models --help"),
        (["simulate", "--out", "x", "--days", "7"], "days is 7; write more than the horizon of 7 days"),
        (["simulate", "--out", "x", "--days", "-3"], "days is -3; write more than the horizon of 7 days"),
        (["simulate", "--out", "x", "--days", "5000"], "days is 5000; write more than the horizon of 7 days"),
        (["simulate", "--out", "x", "--seed", "-1"], "seed is -1; write 0 or a positive whole number"),
        (["simulate", "--out", "x", "--end", "soon"], "'soon' is no moment; write ISO 8601, as 2026-07-01T00:00:00Z"),
        (["simulate", "--out", "x", "--format", "xml"], "cannot write events to x/events.xml; let its name end in"),
        (["train", "--spec", SHOP], "give either --events FILES or --table FILE"),
        (["train", "--spec", SHOP, "--events", "a", "--table", "b"], "give either --events FILES or --table FILE"),
        (["train", "--spec", SHOP, "a.csv", "--table", "b"], "give either --events FILES or --table FILE"),
        (["replay", "--spec", SHOP], "give either --events FILES or --table FILE"),
        (["replay", "--spec", SHOP, "--events", "a", "--table", "b"], "give either --events FILES or --table FILE"),
        (["features", "--spec", SHOP, "--at", "a.csv", "--out", "b.csv"], "give the event files with --events FILES"),
        (["score", "v", "--context", "referrer"], "'referrer' is no field; write NAME=VALUE, as referrer=ads"),
        (["score", "v", "--context", "=ads"], "'=ads' is no field; write NAME=VALUE, as referrer=ads"),
        (["serve", "--port", "99999"], "PROPENSITY_PORT: "),
        (["serve", "--port", "0"], "PROPENSITY_PORT: "),
        (["serve", "--port", "http"], "Invalid value for '--port': "),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(SHOP), "SPEC") if isinstance(value, list) else "",
)
def test_wrong_arguments_are_told_in_one_line(run: Run, tmp_path: Path, arguments: list[object], said: str) -> None:
    assert run(*arguments).complaint.startswith(said)
    assert [path.name for path in tmp_path.iterdir() if path.name != "x"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--spec", "none.yaml", "--events", "e.csv"], "none.yaml: no such file; give the feature spec with"),
        (["train", "--spec", "bad.yaml", "--events", "e.csv"], "bad.yaml:2: features.n: a feature has exactly one of"),
        (
            ["train", "--spec", SHOP, "--events", "none.csv"],
            "none.csv: no such file, directory or glob with event files",
        ),
        (["train", "--spec", SHOP, "--events", "bad.yaml"], "bad.yaml: unknown kind of file; give one of .csv, .tsv"),
        (
            ["train", "--spec", SHOP, "--events", "e.csv"],
            "e.csv: has neither userId nor anonymousId; name the visitor's",
        ),
        (["train", "--spec", SHOP, "--events", "few.csv"], "the events span 0.00 days, less than 1.5 horizons of 7"),
        (["train", "--spec", SHOP, "--events", "few.csv", "--max-bad-rows", "0"], "1 of 3 rows are bad, more than"),
        (["train", "--spec", SHOP, "--events", "few.csv", "--memory-limit", "lots"], "--memory-limit lots: "),
        (["train", "--spec", SHOP, "--table", "e.csv"], "--table has no events for the feature 'views_10m'; train it"),
        (["train", "--spec", SHOP, "--events", "few.csv", "--artifacts", "e.csv"], "e.csv: File exists"),
        (["train", "--spec", SHOP, "--events", "few.csv", "--predictions", "e.csv/x"], "e.csv: File exists"),
        (["simulate", "--out", "e.csv"], "e.csv: File exists"),
        (["export", "none.txt", "--out", "x"], "cannot read none.txt: No such file or directory"),
        (["export", "bad.yaml", "--out", "x"], "bad.yaml: "),
        (
            ["features", "--spec", SHOP, "--events", "few.csv", "--at", "few.csv", "--out", "o.csv"],
            "few.csv: has no column",
        ),
        (
            ["features", "--spec", SHOP, "--events", "few.csv", "--at", "none.csv", "--out", "o.csv"],
            "none.csv: no such",
        ),
        (
            ["features", "--spec", SHOP, "--events", "few.csv", "--at", "few.csv", "--out", "o.txt"],
            "o.txt: cannot write",
        ),
        (["replay", "--spec", SHOP, "--events", "e.csv"], "e.csv: has neither userId nor anonymousId"),
        (["replay", "--spec", "none.yaml", "--events", "e.csv"], "none.yaml: no such file"),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(SHOP), "SPEC") if isinstance(value, list) else "",
)
def test_wrong_files_are_told_in_one_line(run: Run, tmp_path: Path, arguments: list[object], said: str) -> None:
    (tmp_path / "bad.yaml").write_text("model: m\nfeatures: {n: {cuont: view}}\n")
    (tmp_path / "e.csv").write_text("who,event,timestamp\na,b,1\n")
    rows = "a,Product Viewed,1764579600\nb,Order Completed,1764579700\nc,Product Viewed,[/b] soon [red]\n"
    (tmp_path / "few.csv").write_text("userId,event,timestamp\n" + rows)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(*arguments).complaint.startswith(said)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
    assert list(tmp_path.rglob("model.onnx")) == []


def test_ctrl_c_in_the_middle_of_a_query_ends_without_a_traceback() -> None:
    asking = """if True:
        import os, signal, threading, duckdb
        from cli import main
        def app(*_, **__):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            one = duckdb.connect(config={"threads": 1})
            one.execute("SELECT sum(hash(range)) FROM range(100000000000)")
        main.app = app
        main.main()
    """
    done = subprocess.run([sys.executable, "-c", asking], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_wrong_setting_is_named_as_its_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPENSITY_PORT", "http")
    assert run("serve").complaint.startswith("PROPENSITY_PORT: ")
    monkeypatch.setenv("PROPENSITY_PORT", "8000")
    monkeypatch.setenv("PROPENSITY_REDIS_URL", "postgres://localhost")
    told = run("replay", "--spec", SHOP, "--events", "e.csv").complaint
    assert told.startswith("PROPENSITY_REDIS_URL: ")
    assert "redis://" in told


@pytest.mark.parametrize("workers", [1, 2])
def test_a_directory_of_metrics_that_is_not_there_is_told_in_one_line(tmp_path: Path, workers: int) -> None:
    missing = tmp_path / "missing"
    served = in_a_process("serve", "--workers", workers, cwd=tmp_path, PROMETHEUS_MULTIPROC_DIR=str(missing))
    assert served.complaint == f"PROMETHEUS_MULTIPROC_DIR: {missing} is no directory to write to; make it, empty"


def test_a_feature_cache_that_is_not_there_is_told_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROPENSITY_REDIS_URL", f"redis://127.0.0.1:{free_port()}")
    (tmp_path / "few.csv").write_text("userId,event,timestamp\na,Product Viewed,1764579600\n")
    told = run("replay", "--spec", SHOP, "--events", "few.csv").complaint
    assert told.startswith("the feature cache failed (ConnectionError)")


# --- the training side may be missing ---


BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {libraries}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def without(directory: Path, *libraries: str) -> str:
    """PYTHONPATH of a Python in which these libraries are not installed."""
    (directory / "sitecustomize.py").write_text(BLOCKER.format(libraries=libraries))
    return f"{directory}{os.pathsep}{ROOT}"


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("duckdb", ("train", "--events", "e.csv", "--spec", SHOP)),
        ("pyarrow", ("features", "--events", "e.csv", "--spec", SHOP, "--at", "a.csv", "--out", "o.csv")),
        ("yaml", ("replay", "--events", "e.csv", "--spec", SHOP)),
    ],
)
def test_without_the_training_side_it_is_said_what_to_install(
    tmp_path: Path, library: str, arguments: tuple[object, ...]
) -> None:
    told = in_a_process(*arguments, cwd=tmp_path, PYTHONPATH=without(tmp_path, library)).complaint
    assert told == f"{library} is not installed; install the training side with pip install 'propensity[training]'"


def test_the_serving_side_needs_nothing_of_training(tmp_path: Path) -> None:
    path = without(
        tmp_path,
        "duckdb",
        "lightgbm",
        "pyarrow",
        "yaml",
        "sklearn",
        "scipy",
        "matplotlib",
        "onnx",
        "training",
        "audiences",
    )
    code = "import cli.main, cli.history, cli.online, service.app; print(cli.history.some_visitor.__name__)"
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "some_visitor\n", done.stderr


# --- what the commands make ---


def test_the_shop_and_its_truth_are_files(shop: Path) -> None:
    events, truth = pq.read_table(shop / "events.parquet"), pq.read_table(shop / "truth.parquet")
    assert events.num_rows > truth.num_rows > 40_000
    assert sorted(path.name for path in shop.iterdir()) == [
        *("artifacts", "events.parquet", "scores.parquet", "truth.parquet")
    ]


def test_the_model_is_promoted_and_loads(shop: Path) -> None:
    home = shop / "artifacts" / "purchase_7d"
    version = json.loads((home / "aliases.json").read_text())["production"]
    assert bundle.load(home / version).name == "purchase_7d"
    assert pq.read_table(shop / "scores.parquet").num_rows > 500


def test_bad_rows_and_odd_paths_are_shown_as_they_are(run: Run, shop: Path, tmp_path: Path) -> None:
    lines = ["userId,event,timestamp", "a,Product Viewed,[/b] soon [red]"]
    (tmp_path / "bad.csv").write_text("\n".join(lines) + "\n")
    arguments = ("train", shop / "events.parquet", "--spec", SHOP, "--artifacts", "[bold]", "--max-rows", "3000")
    done = run(*arguments, "--events", "bad.csv", "--threads", "1")
    assert done.status == 0, done
    assert "1 bad rows were left out, for example timestamp [/b] soon [red]" in " ".join(done.err.split())
    assert "Bundle: [bold]/purchase_7d/" in done.err


def test_features_of_moments_are_written(run: Run, shop: Path, tmp_path: Path) -> None:
    (tmp_path / "at.csv").write_text("visitor_id,at,referrer\nnobody,2026-07-01,ads\n")
    done = run(
        *("features", "--events", shop / "events.parquet", "--spec", SHOP, "--at", "at.csv", "--out", "out/out.parquet")
    )
    assert (done.status, done.err) == (0, "1 rows in out/out.parquet\n")
    [row] = pq.read_table(tmp_path / "out" / "out.parquet").to_pylist()
    assert (row["visitor_id"], row["views_90d"], row["referrer"]) == ("nobody", 0, 3)


def test_a_booster_is_exported(run: Run, shop: Path, tmp_path: Path) -> None:
    [model] = shop.glob("artifacts/purchase_7d/*/model.txt")
    done = run("export", model, "--out", "exported")
    assert done.status == 0, done
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["model.onnx", "parity.json"]


def test_event_files_may_be_named_in_every_place(run: Run, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text(f"userId,event,timestamp\n{name},Product Viewed,1764579600\n")
    (tmp_path / "at.csv").write_text("visitor_id,at\n" + "".join(f"{name},1764579600\n" for name in "abcd"))
    done = run(
        "features",
        "--spec",
        SHOP,
        "--at",
        "at.csv",
        "--out",
        "o.csv",
        "--events",
        "a.csv",
        "b.csv",
        "--events",
        "c.csv",
    )
    assert done.status == 0, done
    views = [line.split(",")[6] for line in (tmp_path / "o.csv").read_text().splitlines()]
    assert views == ['"views_90d"', "1", "1", "1", "0"]


# --- asking a service ---


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """A function that starts a server which gives one answer to everything, and returns its URL."""
    servers: list[HTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802 - the library's name
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:  # noqa: N802 - the library's name
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (502, b"<html>Bad Gateway</html>", "answers 502: Bad Gateway"),
        (500, b"[]", "answers 500: Internal Server Error"),
        (404, b'{"detail": "no model \'x\'; there is shop"}', "answers 404: no model 'x'; there is shop"),
        (200, b"<html>hello</html>", "is no propensity service"),
        (200, b"", "is no propensity service"),
        (200, b"\xff", "is no propensity service"),
    ],
)
def test_whatever_a_server_answers_is_told_in_one_line(
    run: Run, answering: Callable[[int, bytes], str], status: int, body: bytes, said: str
) -> None:
    url = answering(status, body)
    assert f"{url}/v1/score {said}" in run("score", "v", "--url", url).complaint
    assert f"{url}/v1/models {said}" in run("models", "--url", url).complaint


@pytest.mark.parametrize(
    "url", ["nonsense", "localhost:1", "http://", "ftp://127.0.0.1:1", "http://127.0.0.1:1", "file:///etc/hosts"]
)
def test_an_address_where_no_service_is_is_told_in_one_line(run: Run, url: str) -> None:
    assert run("models", "--url", url).complaint.startswith(f"{url}/v1/models ")
    assert run("score", "v", "--url", url).complaint.startswith(f"{url}/v1/score ")


def test_a_running_service_is_asked_for_scores_and_models(
    run: Run, shop: Path, start_service: StartService, embedded_server: EmbeddedServer
) -> None:
    service = start_service(artifacts=shop / "artifacts", redis_url=embedded_server.url, namespace="commands")
    service.wait_until_ready()
    done = run("score", "anna", "bert", "--url", service.url, "--context", "referrer=ads")
    assert (done.status, done.err) == (0, "")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["visitor_id"] for answer in answers] == ["anna", "bert"]
    assert all(0 < answer["propensity"] < 1 for answer in answers)
    models = run("models", "--url", service.url)
    assert (models.status, models.err) == (0, "")
    assert json.loads(models.out)["models"][0]["name"] == "purchase_7d"
    told = run("score", "anna", "--url", service.url, "--model", "none").complaint
    assert told.startswith(f"{service.url}/v1/score answers 404: no model 'none'")
    assert "purchase_7d" in told
