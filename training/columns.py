"""Columns of normalised rows beside those of the event itself: what a spec reads of requests and traits."""

from __future__ import annotations

from service.core.spec import FeatureSpec


def kept(spec: FeatureSpec) -> list[str]:
    """Columns of a row beside its event: request features, and of each trait its number and the hash of its text."""
    requests = [f"request{place}" for place in range(len(spec.requests))]
    keys = list(enumerate(trait_keys(spec).values()))
    texts = [f"hash{place}" for place, is_text in keys if is_text]
    return [*requests, *(f"trait{place}" for place, _ in keys), *texts]


def trait_keys(spec: FeatureSpec) -> dict[str, bool]:
    """Name of each trait a spec reads -> whether it is kept as text: some feature lists its categories."""
    keys: dict[str, bool] = {}
    for feature in spec.traits.values():
        keys[feature.trait] = keys.get(feature.trait, False) or feature.categories is not None
    return keys
