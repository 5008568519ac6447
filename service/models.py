"""The models that are served: which bundles lie in the artifacts directory, which of them can be loaded, and why not.

`artifacts/MODEL/aliases.json` names the version that is served, as `{"production": VERSION}`; without that file it is
the newest one by `created_at`. A bundle that fails a check is refused and reported while the others are served.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from service import ingest, metrics
from service.core import bundle
from service.core.bundle import Bundle, InvalidBundle
from service.core.errors import PropensityError
from service.core.spec import Limits
from service.errors import ModelNotNamed, ModelNotReady, UnknownModel
from service.ingest import Catalogue
from service.intake import Intake
from service.population import Population

logger = logging.getLogger(__name__)

ALIASES: Final = "aliases.json"
PRODUCTION: Final = "production"


@dataclass(frozen=True)
class Models:
    """Loaded bundles by name, and of those that were refused the reason. Made by `load`."""

    bundles: Mapping[str, Bundle]
    refused: Mapping[str, str]
    catalogue: Catalogue
    default: str | None

    @property
    def history_ms(self) -> int:
        """The longest history that any model looks back on, in milliseconds; the usual one without models."""
        return max((found.spec.limits.history for found in self.bundles.values()), default=Limits().history)

    def choose(self, name: str | None) -> Bundle | None:
        """The bundle to score with; None where rules must do: nothing is loaded, or what is asked for was refused.

        Raises UnknownModel, or ModelNotNamed if several are loaded and neither the request nor a setting names one.
        """
        name = name or self.default
        if name is None and len(self.bundles) + len(self.refused) > 1:
            raise ModelNotNamed(f"name a model: {self._names()}; or set PROPENSITY_DEFAULT_MODEL")
        if name is None:
            return next(iter(self.bundles.values()), None)
        if name in self.bundles or name in self.refused:
            return self.bundles.get(name)
        raise UnknownModel(f"no model {name[:64]!r}; there is {self._names()}")

    def find(self, name: str, version: str | None = None) -> Bundle:
        """The loaded bundle of a model, of exactly this version if given. Raises UnknownModel or ModelNotReady."""
        if name in self.refused:
            raise ModelNotReady(f"model {name} was refused: {self.refused[name]}")
        found = self.bundles.get(name)
        if found is None:
            raise UnknownModel(f"no model {name!r} is loaded; there is {self._names()}")
        if version is not None and found.version != version:
            raise UnknownModel(f"model {name} is loaded in version {found.version!r} only, not in {version!r}")
        return found

    def _names(self) -> str:
        return ", ".join(sorted({*self.bundles, *self.refused})) or "none: put one into the artifacts directory"

    @cached_property
    def populations(self) -> Mapping[str, Population]:
        """Who counts what each model scores."""
        return {name: Population(bundle) for name, bundle in self.bundles.items()}

    @cached_property
    def intake(self) -> Intake:
        """Who counts what comes in."""
        return Intake(self.catalogue)


def load(artifacts: Path, default: str | None = None) -> Models:
    """The served version of every model in `artifacts`, as far as it passes every check."""
    bundles: dict[str, Bundle] = {}
    refused: dict[str, str] = {}
    catalogue = ingest.catalogue([])
    for directory in sorted(path for path in artifacts.glob("*/") if not path.name.startswith(".")):
        try:
            began = time.perf_counter()
            found = _load_one(directory)
            catalogue = ingest.catalogue([*(known.spec for known in bundles.values()), found.spec])
            bundles[found.name] = found
            metrics.set_model(found, time.perf_counter() - began)
            logger.info("model %s: serving version %s", found.name, found.version)
        except PropensityError as error:
            refused[directory.name] = str(error)
            logger.error("model %s: refused: %s", directory.name, error)
    if default is not None and default not in {*bundles, *refused}:
        logger.error(
            "PROPENSITY_DEFAULT_MODEL is %s, which is not in %s; it is left out of account", default, artifacts
        )
        default = None
    if not bundles:
        logger.warning("no model in %s can be served; visitors are put into segments by rules", artifacts)
    metrics.set_models(len(bundles), len(refused))
    return Models(bundles, refused, catalogue, default)


def _load_one(directory: Path) -> Bundle:
    found = bundle.load(directory / served_version(directory))
    if found.name != directory.name:
        raise InvalidBundle(f"{found.path}: holds model {found.name!r}; put it into a directory of that name")
    return found


def served_version(directory: Path) -> str:
    """The version of a model that is served, by `aliases.json` or the time of creation. Raises InvalidBundle."""
    aliases = directory / ALIASES
    if aliases.exists():
        document = _read(aliases)
        version = document.get(PRODUCTION)
        if (
            not isinstance(version, str)
            or Path(version).name != version
            or not (directory / version / bundle.MANIFEST).is_file()
        ):
            raise InvalidBundle(
                f'{aliases}: {PRODUCTION} is {version!r}; write {{"{PRODUCTION}": VERSION}} of a bundle here'
            )
        return version
    created = {path.parent.name: str(_read(path).get("created_at")) for path in directory.glob(f"*/{bundle.MANIFEST}")}
    if not created:
        raise InvalidBundle(f"{directory}: holds no bundle; `propensity train` writes one")
    return max(created, key=lambda version: (created[version], version))


def _read(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidBundle(f"{path}: cannot be read ({error}); restore it") from None
    if not isinstance(document, dict):
        raise InvalidBundle(f"{path}: is not a JSON object; restore it")
    return document
