"""Splitting one data set over sites, for examples and simulations.

Every partitioner is seeded and gives row numbers per site, sorted; each row goes to one site. `labels` are one integer a row.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedflow.errors import RecipeError, field_error

__all__ = ["by_size", "dirichlet", "draw", "iid", "label_counts", "natural", "pathological", "shards"]

Rows = NDArray[np.int64]


def iid(examples: int, sites: int, *, seed: int = 0) -> list[Rows]:
    """Shuffled, in parts that differ by at most one row."""
    _check(sites, examples)
    order = np.random.default_rng(seed).permutation(examples)
    return [np.sort(part) for part in np.array_split(order, sites)]


def by_size(examples: int, shares: Sequence[float], *, seed: int = 0) -> list[Rows]:
    """Shuffled, in parts that are to each other as `shares` (quantity skew)."""
    total = float(sum(shares))
    if not shares or min(shares) < 0 or total <= 0:
        raise RecipeError(
            field_error("shares", list(shares), "one number ≥ 0 a site, not all 0", "give each site its share")
        )
    _check(len(shares), examples)
    order = np.random.default_rng(seed).permutation(examples)
    cuts = np.round(np.cumsum(shares)[:-1] / total * examples).astype(int)
    return [np.sort(part) for part in np.split(order, cuts)]


def dirichlet(
    labels: Sequence[int] | NDArray[Any], sites: int, *, alpha: float, seed: int = 0, least: int = 1, tries: int = 1000
) -> list[Rows]:
    """Of every label, shares drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv:1909.06335): the smaller, the more skewed.

    least: rows that every site must have; it is drawn anew until that holds, at most `tries` times
    """
    labels = np.asarray(labels)
    _check(sites, len(labels))
    if not alpha > 0:
        raise RecipeError(field_error("alpha", alpha, "a number above 0", "0.1 is strongly skewed, 100 nearly even"))
    random = np.random.default_rng(seed)
    for _ in range(tries):
        parts = _dirichlet_once(labels, sites, alpha, random)
        if min(len(part) for part in parts) >= least:
            return parts
    raise RecipeError(
        field_error("alpha", alpha, f"parts of at least {least} rows", "raise alpha, or lower least or sites")
    )


def _dirichlet_once(labels: NDArray[Any], sites: int, alpha: float, random: np.random.Generator) -> list[Rows]:
    rows: list[list[Rows]] = [[] for _ in range(sites)]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        cuts = (random.dirichlet([alpha] * sites).cumsum()[:-1] * len(members)).astype(int)
        for site, part in enumerate(np.split(members, cuts)):
            rows[site].append(part)
    return [np.sort(np.concatenate(parts)) for parts in rows]


def shards(labels: Sequence[int] | NDArray[Any], sites: int, *, per_site: int = 2, seed: int = 0) -> list[Rows]:
    """Sorted by label, cut into equal shards, `per_site` of them to each site (McMahan et al. 2017, section 3)."""
    labels = np.asarray(labels)
    _check(sites * per_site, len(labels))
    pieces = np.array_split(np.argsort(labels, kind="stable"), sites * per_site)
    order = np.random.default_rng(seed).permutation(len(pieces))
    return [np.sort(np.concatenate([pieces[i] for i in chosen])) for chosen in order.reshape(sites, per_site)]


def pathological(labels: Sequence[int] | NDArray[Any], sites: int, *, classes: int = 2, seed: int = 0) -> list[Rows]:
    """Each site sees exactly `classes` labels; the rows of a label are divided evenly among those that see it.

    Labels are dealt round, so that every label is seen where sites × classes reaches their number.
    """
    labels = np.asarray(labels)
    known = np.unique(labels)
    if not 1 <= classes <= len(known) or sites * classes < len(known):
        expected = f"1 to {len(known)} a site, together at least {len(known)}"
        raise RecipeError(field_error("classes", classes, expected, "change classes or sites"))
    random = np.random.default_rng(seed)
    dealt = np.resize(random.permutation(known), sites * classes).reshape(sites, classes)
    rows: list[list[Rows]] = [[] for _ in range(sites)]
    for label in known:
        seeing = np.flatnonzero((dealt == label).any(axis=1))
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) < len(seeing):
            expected = f"at most {len(members)} that see label {label}, which has no more rows"
            raise RecipeError(field_error("sites", len(seeing), expected, "lower sites or classes, or leave it out"))
        for site, part in zip(seeing, np.array_split(members, len(seeing)), strict=True):
            rows[site].append(part)
    return [np.sort(np.concatenate(parts)) for parts in rows]


def natural(ids: Sequence[Hashable]) -> dict[Hashable, Rows]:
    """One site for every id (hospital, writer, device), in the order in which they first occur."""
    rows: dict[Hashable, list[int]] = {}
    for row, name in enumerate(ids):
        rows.setdefault(name, []).append(row)
    return {name: np.array(part, dtype=np.int64) for name, part in rows.items()}


def label_counts(labels: Sequence[int] | NDArray[Any], parts: Sequence[Rows]) -> NDArray[np.int64]:
    """(sites, labels) how many rows of each label every site has; labels in ascending order."""
    labels = np.asarray(labels)
    known = np.unique(labels)
    return np.array([[int((labels[part] == label).sum()) for label in known] for part in parts], dtype=np.int64)


def draw(labels: Sequence[int] | NDArray[Any], parts: Sequence[Rows], path: str | Path) -> Path:
    """A picture (PNG, SVG, PDF, by the name) of the label distribution: a bar a site, a colour a label. Needs matplotlib."""
    from matplotlib.figure import Figure

    counts, known = label_counts(labels, parts), np.unique(np.asarray(labels))
    figure = Figure(figsize=(7, 1.5 + 0.3 * len(parts)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(parts), dtype=np.int64)
    for label, column in zip(known, counts.T, strict=True):
        axes.barh(range(len(parts)), column, left=left, label=str(label))
        left += column
    axes.set(xlabel="examples", ylabel="site", yticks=range(len(parts)))
    axes.invert_yaxis()
    figure.legend(title="label", loc="outside right upper")
    figure.savefig(path)
    return Path(path)


def _check(sites: int, examples: int) -> None:
    if not 1 <= sites <= examples:
        raise RecipeError(field_error("sites", sites, f"1 to {examples} parts of {examples} rows", "change sites"))
