"""A simulation under fast numerics trains sites together, and comes to the model of the loop within rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedflow.simulation.engine import simulate
from fedflow.store.journal import Journal
from fedflow.store.tensors import read_tensors
from tests.builders import Blobs, head, recipe

SITES = [f"site-{number:02}" for number in range(1, 17)]
"""One worker has all of them at a time, of which a step together takes a third of the time or less: the trial cannot but say so."""


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Failing(Blobs):
    """Of the third site, whose data cannot be read."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        if site == "site-03":
            raise OSError("no such volume")


def model_of(journal: Journal) -> dict[str, torch.Tensor]:
    return {n: t for ref in head(journal).model.values() for n, t in read_tensors(journal.store, ref).items()}


def simulated(deterministic: str, **changes: Any) -> Journal:
    fields = {"model": f"{__name__}:Net", "rounds": 3, "numerics": {"deterministic": deterministic}, **changes}
    return simulate(recipe(**fields), SITES, workers=1)


ADAMW = {"steps": 3, "batch_size": 4, "optimizer": {"kind": "adamw", "lr": 0.01}}


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({"algorithm": {"kind": "fedavg"}}, True),
        ({"algorithm": {"kind": "scaffold"}}, True),
        ({"algorithm": {"kind": "fedprox", "mu": 0.1}}, True),
        ({"algorithm": {"kind": "diloco", "preserve_optimizer_state": False}, "training": ADAMW}, True),
        ({"algorithm": {"kind": "diloco"}, "training": ADAMW}, False),
    ],
    ids=["fedavg", "scaffold", "fedprox", "diloco", "diloco that goes on"],
)
def test_it_comes_to_the_model_of_the_loop(changes: dict[str, Any], together: bool) -> None:
    fast, exact = (simulated(d, **changes) for d in ("fast", "bitwise"))
    assert {"vectorised" in c.numerics for c in head(fast).contributors.values()} == {together}
    assert not any("vectorised" in c.numerics for c in head(exact).contributors.values())
    torch.testing.assert_close(model_of(fast), model_of(exact), rtol=1e-4, atol=1e-5)
    assert {s: c.steps for s, c in head(fast).contributors.items()} == {
        s: c.steps for s, c in head(exact).contributors.items()
    }


def test_a_site_that_fails_is_left_out_alone() -> None:
    journal = simulated("fast", workload=f"{__name__}:Failing", min_sites=2, quorum=15)
    assert set(head(journal).contributors) == set(SITES) - {"site-03"}
    assert "no such volume" in head(journal).excluded["site-03"]
