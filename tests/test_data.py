"""Partitions: every row at one site, the same for a seed, and skewed as their names say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedflow.data import by_size, dirichlet, draw, iid, label_counts, natural, pathological, shards
from fedflow.errors import RecipeError

LABELS = np.random.default_rng(0).integers(0, 10, 400)

PARTITIONERS: dict[str, Callable[[int], list[Any]]] = {
    "iid": lambda seed: iid(400, 7, seed=seed),
    "by size": lambda seed: by_size(400, [1, 2, 5], seed=seed),
    "dirichlet": lambda seed: dirichlet(LABELS, 7, alpha=0.3, seed=seed),
    "shards": lambda seed: shards(LABELS, 10, seed=seed),
    "pathological": lambda seed: pathological(LABELS, 7, classes=3, seed=seed),
}


@pytest.mark.parametrize("name", PARTITIONERS)
@given(seed=st.integers(0, 2**32))
def test_every_row_is_at_one_site_and_the_seed_decides_where(name: str, seed: int) -> None:
    parts = PARTITIONERS[name](seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(400))
    assert all(np.array_equal(a, b) for a, b in zip(parts, PARTITIONERS[name](seed), strict=True))


@pytest.mark.parametrize("name", PARTITIONERS)
def test_another_seed_is_another_partition(name: str) -> None:
    first, second = PARTITIONERS[name](1), PARTITIONERS[name](2)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_sizes() -> None:
    assert {len(part) for part in iid(400, 7)} == {57, 58}
    assert [len(part) for part in by_size(400, [1, 2, 5])] == [50, 100, 250]


def test_a_smaller_alpha_is_more_skewed() -> None:
    """The largest share of one label at a site, on the average over the sites: 1/10 where labels are even."""

    def skew(alpha: float) -> float:
        counts = label_counts(LABELS, dirichlet(LABELS, 5, alpha=alpha))
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert skew(0.05) > skew(1.0) > skew(1000.0)
    assert skew(1000.0) < 0.2


def test_every_site_has_its_least() -> None:
    assert min(len(part) for part in dirichlet(LABELS, 10, alpha=0.1, least=10)) >= 10
    with pytest.raises(RecipeError, match=r"alpha: found 0.001, expected parts of at least 40 rows; raise alpha"):
        dirichlet(LABELS, 10, alpha=0.001, least=40, tries=5)


def test_shards_hold_few_labels_and_pathological_sites_exactly_so_many() -> None:
    assert ((label_counts(np.sort(LABELS), shards(np.sort(LABELS), 10)) > 0).sum(axis=1) <= 4).all()
    counts = label_counts(LABELS, pathological(LABELS, 7, classes=3))
    assert ((counts > 0).sum(axis=1) == 3).all() and (counts.sum(axis=0) > 0).all()


def test_natural_ids_are_sites() -> None:
    found = natural(["b", "a", "b", "c", "a"])
    assert {name: rows.tolist() for name, rows in found.items()} == {"b": [0, 2], "a": [1, 4], "c": [3]}
    assert list(found) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (lambda: iid(3, 4), "sites: found 4, expected 1 to 3"),
        (lambda: iid(3, 0), "sites: found 0"),
        (lambda: by_size(10, [1, -1]), "shares: found"),
        (lambda: dirichlet(LABELS, 3, alpha=0), "alpha: found 0"),
        (lambda: dirichlet(LABELS, 3, alpha=float("nan")), "alpha: found nan"),
        (lambda: pathological(LABELS, 2, classes=3), "classes: found 3, expected 1 to 10 a site, together at least 10"),
        (
            lambda: pathological([0] * 9 + [1], 3, classes=2),
            "sites: found 3, expected at most 1 that see label 1, which has no more rows",
        ),
    ],
)
def test_what_cannot_be_split_is_told(split: Callable[[], Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        split()


def test_the_picture(tmp_path: Path) -> None:
    path = draw(LABELS, dirichlet(LABELS, 5, alpha=0.3), tmp_path / "labels.svg")
    text = path.read_text()
    assert "examples" in text or "<svg" in text
