"""A trained model on disk: what its directory holds, how it is sealed, verified, loaded and asked."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from service.core import events, features, segments
from service.core.errors import PropensityError
from service.core.features import Plan
from service.core.segments import SEGMENTS
from service.core.spec import FeatureSpec, InvalidSpec, parse, problems

MANIFEST: Final = "manifest.json"
FORMAT: Final = 1
REQUIRED: Final = ("model.onnx", "features.yaml", "reference.json", "golden.json")
VECTOR_TOLERANCE: Final = 1e-6
SCORE_TOLERANCE: Final = 1e-5


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

    @property
    def created(self) -> datetime | None:
        """The moment of `created_at`, in UTC unless it says; None if it is written otherwise than ISO 8601."""
        try:
            moment = datetime.fromisoformat(self.created_at)
        except ValueError:
            return None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Bins(_Model):
    """Reference distribution of one feature or of the score: `edges` between bins, and the share of each bin.

    Bin 0 holds missing values; bin i + 1 holds edges[i - 1] <= value < edges[i], so shares has len(edges) + 2 items.
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    rows: Annotated[int, Field(ge=0)] = (
        0  # independent ones that tell as much as the shares; 0 in bundles that do not say
    )

    @model_validator(mode="after")
    def _sound(self) -> Bins:
        if len(self.shares) != len(self.edges) + 2 or not np.all(np.diff(self.edges) > 0):
            raise ValueError("edges must ascend, and shares be two more than edges")
        return self


class Reference(_Model):
    """`reference.json`: what the training population looked like."""

    features: dict[str, Bins]
    score: Bins
    quantiles: tuple[float, ...]

    @model_validator(mode="after")
    def _sound(self) -> Reference:
        if len(self.quantiles) < 2 or not np.all(np.diff(self.quantiles) >= 0):
            raise ValueError("quantiles must be two or more ascending scores")
        return self


class Golden(_Model):
    """One case of `golden.json`: records in base64, the request and the moment, and what they must give."""

    records: Base64Bytes
    traits: Base64Bytes
    request: dict[str, Any]
    now_ms: Annotated[int, Field(ge=0, lt=2**53)]
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
        return round(100 * _place(quantiles, score) / (len(quantiles) - 1), 1)

    def segment(self, score: float) -> str:
        """The segment of a score, by the cut-offs of the manifest."""
        return segments.assign(score, self.cutoffs)

    def percentiles(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """`percentile` of each of the scores float32[n], the same to the bit."""
        quantiles = np.array(self.reference.quantiles)
        score = scores.astype(np.float64)
        above = quantiles.searchsorted(score, "left")
        place = np.maximum(above - 1, 0).astype(np.float64)
        inside = ((above > 0) & (above < len(quantiles))).nonzero()[0]
        low, high = quantiles[above[inside] - 1], quantiles[above[inside]]
        place[inside] += (score[inside] - low) / (high - low)
        exact = 100 * place / (len(quantiles) - 1)
        tenths = np.rint(exact * 10)
        # Near the middle of two tenths `round` looks at more digits than the product has.
        for row in (np.abs(np.abs(exact * 10 - tenths) - 0.5) < 1e-6).nonzero()[0].tolist():
            tenths[row] = round(10 * round(float(exact[row]), 1))
        return np.asarray(tenths / 10)

    def segment_places(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """int64[n]: the place in SEGMENTS of the `segment` of each of the scores float32[n]."""
        cuts = np.array(self.cutoffs[::-1])
        return np.asarray(len(cuts) - cuts.searchsorted(scores.astype(np.float64), "right"))

    @property
    def segment_shares(self) -> dict[str, float]:
        """Share of the scores of the reference in each segment, to one in the number of its quantiles."""
        quantiles = self.reference.quantiles
        below = [1.0, *(_place(quantiles, cut) / (len(quantiles) - 1) for cut in self.cutoffs), 0.0]
        return {name: upper - lower for name, (upper, lower) in zip(SEGMENTS, pairwise(below), strict=True)}

    @cached_property
    def cutoffs(self) -> tuple[float, ...]:
        """Lowest score of each segment but the last, best first."""
        return tuple(self.manifest.segments[name] for name in SEGMENTS[:-1])


def _place(quantiles: Sequence[float], score: float) -> float:
    """Between which two of the ascending quantiles a score lies, 0 ... len - 1, and where between them."""
    above = bisect.bisect_left(quantiles, score)
    if above == 0 or above == len(quantiles):
        return max(above - 1, 0)
    low, high = quantiles[above - 1], quantiles[above]
    return above - 1 + (score - low) / (high - low)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(directory: Path, manifest: Mapping[str, Any]) -> Manifest:
    """Write `manifest.json` over the files now in `directory`; nothing may change in it afterwards."""
    files = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    body = json.loads(json.dumps({"format": FORMAT, **manifest, "files": files}, allow_nan=False))
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
    if set(reference.features) != set(spec.names):
        raise InvalidBundle(f"{directory / 'reference.json'}: describes other features than the spec's; train again")
    bundle = Bundle(directory, manifest, spec, features.compile(spec), reference, _session(directory))
    _verify_shape(bundle)
    _verify_golden(bundle)
    return bundle


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    manifest: Manifest = _read(Manifest, path)
    if manifest.format != FORMAT:
        raise InvalidBundle(f"{path}: format {manifest.format} is not {FORMAT}; train again with this version")
    try:
        digest = _digest(json.loads(path.read_bytes()))
    except (ValueError, RecursionError):
        digest = ""
    if digest != manifest.seal:
        raise InvalidBundle(f"{path}: was edited after it was sealed; restore it or train again")
    return manifest


def _read(shape: Any, path: Path) -> Any:
    """The JSON of a file as a pydantic model or type."""
    try:
        return TypeAdapter(shape).validate_json(path.read_bytes())
    except ValidationError as error:
        place, text = problems(error)[0]
        raise InvalidBundle(
            f"{path}: {'.'.join(place) or 'the file'}: {text}; the file is damaged, restore it"
        ) from None
    except FileNotFoundError:
        raise InvalidBundle(f"{path}: is missing; point at a directory that `propensity train` wrote") from None
    except OSError as error:
        raise InvalidBundle(
            f"{path}: cannot be read ({error.strerror}); point at a directory that `propensity train` wrote"
        ) from None


def _verify_files(directory: Path, manifest: Manifest) -> None:
    for name in REQUIRED:
        if name not in manifest.files:
            raise InvalidBundle(f"{directory}: the manifest lists no {name}; train again")
    for name, digest in manifest.files.items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise InvalidBundle(f"{path}: is missing; restore it or train again")
        if sha256(path) != digest:
            raise InvalidBundle(f"{path}: differs from its sha256 in the manifest (truncated or edited); restore it")


def _verify_spec(manifest: Manifest, directory: Path) -> FeatureSpec:
    path = directory / MANIFEST
    try:
        spec = parse(manifest.spec)
    except InvalidSpec as error:
        raise InvalidBundle(f"{path}: spec: {error}") from None
    if spec.hash != manifest.spec_hash:
        raise InvalidBundle(
            f"{path}: the spec's hash {spec.hash[:12]} is not the one the model was trained with, "
            f"{manifest.spec_hash[:12]}; serve the spec it was trained with or train again"
        )
    if spec.names != manifest.names:
        raise InvalidBundle(f"{path}: feature names differ from the spec's; train again")
    if spec.model != manifest.model:
        raise InvalidBundle(f"{path}: is of {manifest.model!r}, its spec of {spec.model!r}; train again")
    cuts = [manifest.segments.get(name, np.nan) for name in SEGMENTS[:-1]]
    if len(manifest.segments) != len(cuts) or not np.all(np.diff(cuts) <= 0):
        raise InvalidBundle(f"{path}: segments: needs falling cut-offs of {', '.join(SEGMENTS[:-1])}; train again")
    return spec


def _session(directory: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    path = directory / "model.onnx"
    try:
        return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes for a graph that it cannot run
        raise InvalidBundle(f"{path}: onnxruntime cannot load it ({error}); export it again") from error


def _verify_shape(bundle: Bundle) -> None:
    inputs = [(node.name, node.type, node.shape) for node in bundle.session.get_inputs()]
    outputs = [(node.name, node.type) for node in bundle.session.get_outputs()]
    fits = len(inputs) == 1 and inputs[0][:2] == ("features", "tensor(float)") and len(inputs[0][2]) == 2
    fits = fits and not isinstance(inputs[0][2][0], int) and inputs[0][2][1] == bundle.plan.width
    if not fits or outputs != [("propensity", "tensor(float)")]:
        raise InvalidBundle(
            f"{bundle.path / 'model.onnx'}: takes {inputs} and gives {outputs}; the spec needs features float32 "
            f"[n, {bundle.plan.width}] and propensity float32 [n]; export it again"
        )


def golden_cases(directory: Path) -> list[Golden]:
    """The cases of `golden.json`."""
    cases: list[Golden] = _read(list[Golden], directory / "golden.json")
    return cases


def golden_vectors(plan: Plan, cases: Sequence[Golden]) -> npt.NDArray[np.float32]:
    """float32[n, F]: the features of golden cases, computed now."""
    return features.matrix(
        plan,
        *events.join([case.records for case in cases]),
        np.array([case.now_ms for case in cases], np.int64),
        *events.join([case.traits for case in cases]),
        np.array([plan.encode_request(case.request) for case in cases], np.float32),
    )


def _verify_golden(bundle: Bundle) -> None:
    path = bundle.path / "golden.json"
    cases = golden_cases(bundle.path)
    if not cases:
        raise InvalidBundle(f"{path}: holds no case; train again")
    if any(len(case.vector) != bundle.plan.width for case in cases):
        raise InvalidBundle(f"{path}: has vectors of another length than the spec's; train again")
    stored = np.array([case.vector for case in cases], np.float32)
    computed = golden_vectors(bundle.plan, cases)
    wrong = np.argwhere(~np.isclose(computed, stored, rtol=VECTOR_TOLERANCE, atol=0, equal_nan=True))
    if len(wrong):
        case, column = wrong[0]
        raise InvalidBundle(
            f"{path}: case {case}: feature {bundle.spec.names[column]!r} is {computed[case, column]}, "
            f"was {stored[case, column]} in training; serve with the version of the library that trained it"
        )
    try:
        scores = bundle.predict(stored)
    except Exception as error:  # as in _session
        raise InvalidBundle(f"{bundle.path / 'model.onnx'}: fails when it runs ({error}); export it again") from error
    wanted = np.array([case.score for case in cases])
    if scores.shape != wanted.shape:
        raise InvalidBundle(f"{bundle.path / 'model.onnx'}: gives {scores.shape}, not one score a row; export it again")
    if not np.all(np.abs(scores - wanted) <= SCORE_TOLERANCE):
        worst = int(np.argmax(~(np.abs(scores - wanted) <= SCORE_TOLERANCE)))
        raise InvalidBundle(f"{path}: case {worst}: scores {scores[worst]}, was {wanted[worst]}; export it again")
