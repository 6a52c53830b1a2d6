"""How often to ask again."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

__all__ = ["CROWDED", "IDLE", "WORKING", "Pace"]

WORKING = 0.3
"""Seconds between two questions of a site's worker for work, right after it had some."""

IDLE = 5
"""Seconds between two questions of a worker where there has been no work for long."""


LATE = 0.1
"""Seconds that an answer of a busy API takes longer than it could for which a second is waited; twice as many: four, and so on."""

CROWDED = 15
"""Seconds of such a wait of a worker, at most: a hundred that ask every `IDLE` seconds would keep an API busy by asking."""


@dataclass
class Pace:
    """Waits of `shortest` seconds right after the last work, then of a twentieth of the time since it, at most of `longest`.

    So what asking seldom adds to a round is at most a twentieth of it, and a long round costs the API few requests. Two
    answers in a row that took longer than the quickest tell that the API is busy: then waits grow with the square of that, so
    that few are hardly slower for it, and of however many most wait, which leaves the API time for other things.
    """

    longest: float
    shortest: float = WORKING
    crowded: float = 0.0
    """Of a wait for a busy API, at most, where that is more than `longest`."""
    since: float = -math.inf
    quickest: float = math.inf
    """Seconds that the quickest answer took."""
    late: float = 0.0
    """How much longer the last one took."""
    busy: float = 0.0
    """And the last two, at least."""

    def worked(self) -> None:
        """There is work, or was until now."""
        self.since = time.monotonic()

    def answered(self, seconds: float) -> None:
        """A question took so long."""
        self.quickest = min(self.quickest, seconds)
        before, self.late = self.late, seconds - self.quickest
        self.busy = min(before, self.late)

    def mean(self) -> float:
        """Seconds to wait now."""
        usual = min(max((time.monotonic() - self.since) / 20, self.shortest), self.longest)
        return max(usual, min((self.busy / LATE) ** 2, max(self.longest, self.crowded)))

    def wait(self) -> float:
        """The same, a third more or less by chance, so that not all ask at once."""
        return self.mean() * random.uniform(2 / 3, 4 / 3)
