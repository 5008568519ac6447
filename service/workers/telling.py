"""Once a second, and before an exposition, what was counted meanwhile goes to the client library of Prometheus."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from service import metrics
from service.models import Models
from service.scorer import Scorer

logger = logging.getLogger(__name__)

PAUSE_S: Final = 1.0


def tell(models: Models, scorer: Scorer) -> None:
    """Bring every metric of this process up to date."""
    metrics.QUEUE_LENGTH.set(scorer.waiting)
    metrics.tell()
    models.intake.tell()
    for population in models.populations.values():
        population.tell()


async def run(models: Models, scorer: Scorer) -> None:
    """Do so for ever; what a killed process has counted since the last time is lost."""
    while True:
        await asyncio.sleep(PAUSE_S)
        try:
            tell(models, scorer)
        except Exception:  # a bug, or no memory for files; scores are worth more than counts
            logger.exception("what was counted cannot be told")
