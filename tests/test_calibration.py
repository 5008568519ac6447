"""Probabilities are true: on a shop whose true propensities are known, a trained model's are close to them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pytest

from training import simulate, train
from training.evaluate import calibration_error

ROOT = Path(__file__).parents[1]
PROMISED = 0.01


@pytest.mark.slow
def test_scores_of_a_simulated_shop_are_calibrated_against_the_true_propensity(tmp_path: Path) -> None:
    shop = simulate.sized(simulate.Shop(seed=11, end=datetime(2026, 7, 1, tzinfo=UTC)), 400_000)
    events, truth, predictions = (tmp_path / name for name in ("events.parquet", "truth.parquet", "scores.parquet"))
    simulate.simulate(shop, events, truth)
    options = train.Options(artifacts=tmp_path / "artifacts", predictions=predictions)
    train.from_events([str(events)], ROOT / "examples" / "shop.yaml", options)
    joined = duckdb.execute(
        f"""SELECT scored.propensity, known.propensity AS truth FROM '{predictions}' AS scored
            JOIN '{truth}' AS known ON hash(known.visitor_id) = visitor_hash AND known.at_ms = cutoff_ms"""
    ).fetchnumpy()
    scored, true = np.asarray(joined["propensity"]), np.asarray(joined["truth"])
    assert len(scored) > 10_000
    assert np.corrcoef(scored, true)[0, 1] > 0.2, "scores that say nothing would be calibrated, too"
    error = calibration_error(scored, true)
    print(f"expected calibration error against the true propensity: {error:.4f} over {len(scored):,} rows")
    assert error <= PROMISED
    assert calibration_error(np.clip(scored * 1.25, 0, 1), true) > PROMISED, "a bias of a quarter would be noticed"
