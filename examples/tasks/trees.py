"""Boosted trees on real data. `fedflow run examples/tasks/trees.yaml`, then `fedflow export trees-1 model.ubj`"""

from typing import Any

from sites import breast_cancer


def patients(site: str, sites: list[str]) -> dict[str, Any]:
    """This site's rows; every fourth is held out."""
    rows, labels = breast_cancer(site, sites)
    held_out = [i % 4 == 0 for i in range(len(labels))]
    kept = [not held for held in held_out]
    return {"train": (rows[kept], labels[kept]), "held_out": (rows[held_out], labels[held_out])}
