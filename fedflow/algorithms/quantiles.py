"""Quantiles of values that lie at several sites, from some order statistics of each.

A site with sorted values x₀ … xₙ₋₁ sends k + 1 of them, at ranks ⌊j(n−1)/k⌋, j = 0 … k. Between two of them a rank is known within
the gap, at most ⌈(n−1)/k⌉; so the rank of any value among all values is known within the sum of the sites' gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sketch", "quantiles", "rank_error", "sketch"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sketch:
    """points: (k + 1,) order statistics of so many values, in order"""

    points: Floats
    count: int

    @property
    def ranks(self) -> Floats:
        """(k + 1,) those of the points, from 0."""
        return _ranks(self.count, len(self.points) - 1)

    @property
    def gap(self) -> int:
        """By how much a rank may be wrong."""
        return -(-(self.count - 1) // max(len(self.points) - 1, 1)) if self.count > 1 else 0

    def counts(self, x: Floats) -> tuple[Floats, Floats]:
        """How many values are below each of `x`, and how many are not above it."""
        points, first, many = np.unique(self.points, return_index=True, return_counts=True)
        low, high = self.ranks[first], self.ranks[first + many - 1]
        at = np.searchsorted(points, x, side="right") - 1
        inside = np.clip(at, 0, max(len(points) - 2, 0))
        after = np.minimum(inside + 1, len(points) - 1)
        width = np.where(after > inside, points[after] - points[inside], 1.0)
        unknown = np.maximum(low[after] - high[inside] - 1, 0)  # values between two points
        between = high[inside] + unknown * (x - points[inside]) / width
        known = (at >= 0) & (points[np.maximum(at, 0)] == x)
        outside = np.where(at < 0, -1.0, high[-1])
        plain = 1 + np.where((at < 0) | (at >= len(points) - 1), outside, between)
        exact = np.maximum(at, 0)
        return np.where(known, low[exact], plain), np.where(known, 1 + high[exact], plain)


def _ranks(count: int, parts: int) -> Floats:
    return np.floor(np.arange(parts + 1) * (count - 1) / max(parts, 1))


def sketch(values: Floats, parts: int) -> Sketch:
    """That of `values`, at least one. parts: k, at most one less than there are values"""
    parts = max(1, min(parts, len(values) - 1)) if len(values) > 1 else 0
    return Sketch(np.sort(values)[_ranks(len(values), parts).astype(np.int64)], len(values))


def rank_error(sketches: Sequence[Sketch]) -> float:
    """By how much the rank of a quantile may be wrong, as a share of all values."""
    return sum(s.gap for s in sketches) / sum(s.count for s in sketches)


def quantiles(sketches: Sequence[Sketch], wanted: Sequence[float]) -> list[float]:
    """The values whose rank among all values, N of them, is q·(N − 1), within `rank_error`; for each q of `wanted`."""
    points = np.unique(np.concatenate([s.points for s in sketches]))
    counts = [s.counts(points) for s in sketches]
    # the ranks of each point: first and last
    low, high = (np.sum([pair[i] for pair in counts], axis=0) - i for i in (0, 1))
    found = []
    for q in wanted:
        rank = q * high[-1]
        at = int(np.argmax(high >= rank - 1e-9))
        if at == 0 or low[at] <= rank:
            found.append(float(points[at]))
            continue
        share = (rank - high[at - 1]) / (low[at] - high[at - 1])
        found.append(float(points[at - 1] + share * (points[at] - points[at - 1])))
    return found
