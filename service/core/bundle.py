"""A trained model on disk: what its directory holds, how it is sealed, verified, loaded and asked."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict, ValidationError

from service.core import events, features, segments
from service.core.errors import PropensityError
from service.core.features import Plan
from service.core.spec import FeatureSpec, InvalidSpec, parse, problems

MANIFEST: Final = "manifest.json"
FORMAT: Final = 1
REQUIRED: Final = ("model.onnx", "features.yaml", "reference.json", "golden.json")
VECTOR_TOLERANCE: Final = 1e-6
SCORE_TOLERANCE: Final = 1e-5

_Shape = TypeVar("_Shape", bound=BaseModel)


class InvalidBundle(PropensityError):
    """A bundle that must not be served; the message names the file and what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Manifest(_Model):
    """`manifest.json`. `seal` is the sha256 of the rest of it, so that an edit of the manifest itself is seen too."""

    format: int
    model: str
    version: str
    created_at: str
    spec: dict[str, Any]
    spec_hash: str
    names: tuple[str, ...]
    dtype: str
    segments: dict[str, float]
    calibration: dict[str, float]
    data: dict[str, Any]
    metrics: dict[str, Any]
    files: dict[str, str]
    libraries: dict[str, str]
    seal: str


class Bins(_Model):
    """Reference distribution of one feature or of the score: `edges` between bins, and the share of each bin.

    Bin 0 holds missing values; bin i + 1 holds edges[i - 1] <= value < edges[i], so shares has len(edges) + 2 items.
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]


class Reference(_Model):
    """`reference.json`: what the training population looked like."""

    features: dict[str, Bins]
    score: Bins
    quantiles: tuple[float, ...]


class Golden(_Model):
    """One case of `golden.json`: records in base64, the request and the moment, and what they must give."""

    records: str
    traits: str
    request: dict[str, Any]
    now_ms: int
    vector: tuple[float | None, ...]
    score: float


@dataclass(frozen=True)
class Bundle:
    """A verified model, ready to be asked. Made by `load`."""

    path: Path
    manifest: Manifest
    spec: FeatureSpec
    plan: Plan
    reference: Reference
    session: ort.InferenceSession

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.manifest.model

    @property
    def version(self) -> str:
        """Version of the bundle."""
        return self.manifest.version

    def predict(self, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Calibrated probabilities float32[n] in [0, 1] of feature rows float32[n, F]."""
        if not len(matrix):
            return np.empty(0, np.float32)
        scores: npt.NDArray[np.float32] = self.session.run(["propensity"], {"features": matrix})[0]
        return scores

    def percentile(self, score: float) -> float:
        """Percent of the training population, 0 ... 100, that scored below."""
        quantiles = self.reference.quantiles
        below = float(np.searchsorted(quantiles, score, "left")) / max(len(quantiles) - 1, 1)
        return round(100 * min(below, 1.0), 1)

    def segment(self, score: float) -> str:
        """The segment of a score, by the cut-offs of the manifest."""
        return segments.assign(score, tuple(self.manifest.segments.values()))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(directory: Path, manifest: Mapping[str, Any]) -> Manifest:
    """Write `manifest.json` over the files now in `directory`; nothing may change in it afterwards."""
    files = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    body = {"format": FORMAT, **manifest, "files": files}
    made = Manifest.model_validate({**body, "seal": _digest(body)})
    text = json.dumps({**body, "seal": made.seal}, indent=2, allow_nan=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return made


def _digest(body: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in body.items() if name != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()


def load(directory: Path) -> Bundle:
    """The bundle in `directory`, after every check: hashes, spec, shape, golden vectors and scores.

    Raises InvalidBundle that names the first thing wrong. Nothing in a bundle is executed: no pickle.
    """
    manifest = _read_manifest(directory)
    _verify_files(directory, manifest)
    spec = _verify_spec(manifest, directory)
    reference = _read(Reference, directory / "reference.json")
    bundle = Bundle(directory, manifest, spec, features.compile(spec), reference, _session(directory))
    _verify_shape(bundle)
    _verify_golden(bundle)
    return bundle


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    manifest = _read(Manifest, path)
    if manifest.format != FORMAT:
        raise InvalidBundle(f"{path}: format {manifest.format} is not {FORMAT}; train again with this version")
    if _digest(json.loads(path.read_text(encoding="utf-8"))) != manifest.seal:
        raise InvalidBundle(f"{path}: was edited after it was sealed; restore it or train again")
    return manifest


def _read(shape: type[_Shape], path: Path) -> _Shape:
    try:
        return shape.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InvalidBundle(f"{path}: is missing; point at a directory that `propensity train` wrote") from None
    except ValidationError as error:
        place, text = problems(error)[0]
        raise InvalidBundle(
            f"{path}: {'.'.join(place) or 'the file'}: {text}; the file is damaged, restore it"
        ) from None


def _verify_files(directory: Path, manifest: Manifest) -> None:
    for name in REQUIRED:
        if name not in manifest.files:
            raise InvalidBundle(f"{directory}: the manifest lists no {name}; train again")
    for name, digest in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise InvalidBundle(f"{path}: is missing; restore it or train again")
        if sha256(path) != digest:
            raise InvalidBundle(f"{path}: differs from its sha256 in the manifest (truncated or edited); restore it")


def _verify_spec(manifest: Manifest, directory: Path) -> FeatureSpec:
    try:
        spec = parse(manifest.spec)
    except InvalidSpec as error:
        raise InvalidBundle(f"{directory / MANIFEST}: spec: {error}") from None
    if spec.hash != manifest.spec_hash:
        raise InvalidBundle(
            f"{directory / MANIFEST}: the spec's hash {spec.hash[:12]} is not the one the model was trained with, "
            f"{manifest.spec_hash[:12]}; serve the spec it was trained with or train again"
        )
    if spec.names != manifest.names:
        raise InvalidBundle(f"{directory / MANIFEST}: feature names differ from the spec's; train again")
    return spec


def _session(directory: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    path = directory / "model.onnx"
    try:
        return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes for a graph that it cannot run
        raise InvalidBundle(f"{path}: onnxruntime cannot load it ({error}); export it again") from error


def _verify_shape(bundle: Bundle) -> None:
    wanted = ("features", "tensor(float)", bundle.plan.width)
    inputs = [(node.name, node.type, node.shape[-1]) for node in bundle.session.get_inputs()]
    outputs = [(node.name, node.type) for node in bundle.session.get_outputs()]
    if inputs != [wanted] or outputs != [("propensity", "tensor(float)")]:
        raise InvalidBundle(
            f"{bundle.path / 'model.onnx'}: takes {inputs} and gives {outputs}; "
            f"the spec needs {wanted} and ('propensity', 'tensor(float)'); export it again"
        )


def golden_cases(bundle_path: Path) -> list[Golden]:
    """The cases of `golden.json`."""
    cases = json.loads((bundle_path / "golden.json").read_text(encoding="utf-8"))
    return [Golden.model_validate(case) for case in cases]


def golden_vectors(plan: Plan, cases: Sequence[Golden]) -> npt.NDArray[np.float32]:
    """float32[n, F]: the features of golden cases, computed now."""
    return features.matrix(
        plan,
        *_joined([case.records for case in cases]),
        np.array([case.now_ms for case in cases], np.int64),
        *_joined([case.traits for case in cases]),
        np.array([plan.encode_request(case.request) for case in cases], np.float32),
    )


def _joined(blobs: Sequence[str]) -> tuple[events.Records, npt.NDArray[np.int64]]:
    parts = [events.from_bytes(base64.b64decode(blob)) for blob in blobs]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    return np.concatenate(parts), starts


def _verify_golden(bundle: Bundle) -> None:
    path = bundle.path / "golden.json"
    try:
        cases = golden_cases(bundle.path)
    except (ValueError, TypeError) as error:
        raise InvalidBundle(f"{path}: {error}") from None
    if not cases:
        raise InvalidBundle(f"{path}: holds no case; train again")
    stored = np.array([case.vector for case in cases], np.float32)
    computed = golden_vectors(bundle.plan, cases)
    if not np.allclose(computed, stored, rtol=VECTOR_TOLERANCE, atol=0, equal_nan=True):
        wrong = np.argwhere(~np.isclose(computed, stored, rtol=VECTOR_TOLERANCE, atol=0, equal_nan=True))[0]
        raise InvalidBundle(
            f"{path}: case {wrong[0]}: feature {bundle.spec.names[wrong[1]]!r} is {computed[tuple(wrong)]}, "
            f"was {stored[tuple(wrong)]} in training; serve with the version of the library that trained it"
        )
    scores, wanted = bundle.predict(stored), np.array([case.score for case in cases])
    if not np.all(np.abs(scores - wanted) <= SCORE_TOLERANCE):
        worst = int(np.argmax(np.abs(scores - wanted)))
        raise InvalidBundle(f"{path}: case {worst}: scores {scores[worst]}, was {wanted[worst]}; export it again")
