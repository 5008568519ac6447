"""Settings from the environment and from `.env`."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service import metrics
from service.core.errors import PropensityError
from service.settings import Settings, load, log_unknown


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_setting_has_a_default_and_says_what_it_is() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.redis_url) == ("127.0.0.1", 8000, None)
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


def test_the_environment_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("PROPENSITY_PORT=9001\nPROPENSITY_DEADLINE_MS=20\nANOTHER=1\n")
    monkeypatch.setenv("PROPENSITY_PORT", "9002")
    settings = Settings()
    assert (settings.port, settings.deadline_ms) == (9002, 20)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("url", ["http://host", "host:6379", "redis://host:port"])
def test_a_url_of_no_feature_cache_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(redis_url=url)
    assert url not in str(caught.value)


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(Settings(redis_url="redis://:secret@host:6379/0"))


@pytest.mark.parametrize("change", [{"namespace": "a{b}"}, {"namespace": ""}, {"port": 0}, {"deadline_ms": 0}])
def test_values_that_would_break_something_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**change)  # type: ignore[arg-type]


def test_a_wrong_setting_is_named_as_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPENSITY_PORT", "abc")
    with pytest.raises(PropensityError, match="PROPENSITY_PORT: .*integer"):
        load()
    assert load(port=9000).port == 9000


@pytest.mark.parametrize("given", ["5", "10", "25", "50"])
def test_the_latency_objective_is_the_bound_of_a_bucket(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("PROPENSITY_LATENCY_OBJECTIVE_MS", given)
    assert load().latency_objective_ms / 1000 in metrics.REQUEST_SECONDS._kwargs["buckets"]


@pytest.mark.parametrize("given", ["0", "20", "100", "fast"])
def test_another_latency_objective_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("PROPENSITY_LATENCY_OBJECTIVE_MS", given)
    with pytest.raises(PropensityError, match="PROPENSITY_LATENCY_OBJECTIVE_MS: "):
        load()


def test_a_variable_that_is_no_setting_is_pointed_out_without_its_value(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PROPENSITY_LATENCY_OBJECTIVE", "canary")
    monkeypatch.setenv("PROPENSITY_PORT", "9000")
    log_unknown()
    assert [one.getMessage() for one in caplog.records] == [
        "PROPENSITY_LATENCY_OBJECTIVE is no setting; did you mean 'PROPENSITY_LATENCY_OBJECTIVE_MS'?"
    ]
