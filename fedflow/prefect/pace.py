"""How often to ask again."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

__all__ = ["IDLE", "WORKING", "Pace"]

WORKING = 0.3
"""Seconds between two questions of a site's worker for work, right after it had some."""

IDLE = 5
"""Seconds between two questions of a worker where there has been no work for long."""


@dataclass
class Pace:
    """Waits of `shortest` seconds right after the last work, then of a twentieth of the time since it, at most of `longest`.

    So what asking seldom adds to a round is at most a twentieth of it, and a long round costs the API few requests.
    """

    longest: float
    shortest: float = WORKING
    since: float = -math.inf

    def worked(self) -> None:
        """There is work, or was until now."""
        self.since = time.monotonic()

    def mean(self) -> float:
        """Seconds to wait now."""
        return min(max((time.monotonic() - self.since) / 20, self.shortest), self.longest)

    def wait(self) -> float:
        """The same, a third more or less by chance, so that not all ask at once."""
        return self.mean() * random.uniform(2 / 3, 4 / 3)
