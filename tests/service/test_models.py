"""Which bundles are served, and which are refused and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service import models
from service.errors import ModelNotNamed, ModelNotReady, UnknownModel
from tests.conftest import DAY_MS, SHOP, WriteBundle


def named(model: str, **changes: Any) -> dict[str, Any]:
    return {**SHOP, "model": model, **changes}


def test_the_newest_bundle_is_served(tmp_path: Path, write_bundle: WriteBundle) -> None:
    for version, created_at in (("b", "2026-01-02T00:00:00Z"), ("a", "2026-01-03T00:00:00Z"), ("c", "2025-01-01")):
        write_bundle(tmp_path, version=version, created_at=created_at)
    assert models.load(tmp_path).find("shop").version == "a"


def test_the_alias_goes_before_the_newest(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path, version="old", created_at="2026-01-01")
    write_bundle(tmp_path, version="new", created_at="2026-01-02")
    (tmp_path / "shop" / "aliases.json").write_text('{"production": "old"}')
    assert models.load(tmp_path).find("shop").version == "old"


@pytest.mark.parametrize(
    "text", ['{"production": "gone"}', '{"production": 7}', "{}", "[]", "{", '{"production": ".."}']
)
def test_an_alias_to_nowhere_is_refused(tmp_path: Path, write_bundle: WriteBundle, text: str) -> None:
    write_bundle(tmp_path)
    (tmp_path / "shop" / "aliases.json").write_text(text)
    loaded = models.load(tmp_path)
    assert not loaded.bundles
    assert "aliases.json" in loaded.refused["shop"]


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("model.onnx", lambda text: text[:-1]),
        ("model.onnx", lambda text: text[:50] + b"\0" + text[51:]),
        ("manifest.json", lambda text: text.replace(b'"version": "1"', b'"version": "2"')),
        ("manifest.json", lambda text: text[:100]),
        ("features.yaml", lambda text: text + b"\n"),
        ("reference.json", lambda text: b""),
        ("golden.json", lambda text: b"[]"),
    ],
)
def test_an_edited_or_truncated_bundle_is_refused_and_the_others_are_served(
    tmp_path: Path, write_bundle: WriteBundle, file: str, spoil: Any
) -> None:
    spoilt = write_bundle(tmp_path, named("spoilt")) / file
    write_bundle(tmp_path, named("sound"))
    spoilt.write_bytes(spoil(spoilt.read_bytes()))
    loaded = models.load(tmp_path)
    assert list(loaded.bundles) == ["sound"]
    assert str(spoilt) in loaded.refused["spoilt"]


def test_a_bundle_in_a_directory_of_another_name_is_refused(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path).parent.rename(tmp_path / "other")
    assert "holds model 'shop'" in models.load(tmp_path).refused["other"]


def test_models_that_disagree_on_a_code_are_not_served_together(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path, named("a"))
    events = {"cart": {"code": 1, "event": "Product Added"}}
    write_bundle(tmp_path, named("b", events=events, features={"n": {"count": "cart"}}))
    loaded = models.load(tmp_path)
    assert list(loaded.bundles) == ["a"]
    assert "one catalogue" in loaded.refused["b"]


def test_without_artifacts_there_is_no_model_and_no_error(tmp_path: Path) -> None:
    loaded = models.load(tmp_path / "nothing")
    assert (loaded.bundles, loaded.refused, loaded.history_ms) == ({}, {}, 90 * DAY_MS)
    assert loaded.choose(None) is None
    with pytest.raises(UnknownModel, match="artifacts directory"):
        loaded.choose("shop")


def test_a_request_without_a_model_gets_the_only_one(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.choose(None) is loaded.choose("shop") is loaded.bundles["shop"]


def test_of_several_models_a_request_must_name_one_or_the_settings_must(
    tmp_path: Path, write_bundle: WriteBundle
) -> None:
    write_bundle(tmp_path, named("a"))
    write_bundle(tmp_path, named("b"))
    with pytest.raises(ModelNotNamed, match="a, b"):
        models.load(tmp_path).choose(None)
    chosen = models.load(tmp_path, default="b").choose(None)
    assert chosen is not None
    assert chosen.name == "b"


def test_a_default_that_does_not_exist_is_left_out_of_account(
    tmp_path: Path, write_bundle: WriteBundle, caplog: pytest.LogCaptureFixture
) -> None:
    write_bundle(tmp_path)
    assert models.load(tmp_path, default="gone").choose(None) is not None
    assert "PROPENSITY_DEFAULT_MODEL is gone" in caplog.text


def test_unknown_models_and_versions_are_told_what_exists(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path)
    spoilt = write_bundle(tmp_path, named("spoilt"))
    (spoilt / "model.onnx").unlink()
    loaded = models.load(tmp_path)
    with pytest.raises(UnknownModel, match="there is shop, spoilt"):
        loaded.choose("gone")
    with pytest.raises(UnknownModel, match="version '1' only"):
        loaded.find("shop", "2")
    with pytest.raises(ModelNotReady, match=r"model\.onnx"):
        loaded.find("spoilt")
    assert loaded.choose("spoilt") is None


def test_the_longest_history_is_what_must_be_kept(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path, named("a", limits={"history": "30d"}))
    write_bundle(tmp_path, named("b", limits={"history": "120d"}))
    assert models.load(tmp_path).history_ms == 120 * DAY_MS


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shop" / "1").mkdir(parents=True)
    (tmp_path / "shop" / "1" / "manifest.json").write_text(json.dumps([]))
    (tmp_path / "empty").mkdir()
    loaded = models.load(tmp_path)
    assert "not a JSON object" in loaded.refused["shop"]
    assert "holds no bundle" in loaded.refused["empty"]
