"""A site's training goes on where its last accepted update left it: over rounds, kills and losses."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedflow.algorithm import NoState, Training
from fedflow.algorithms.fedavg import FedAvg
from fedflow.local import FunctionWorkload
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.tensors import read_tensors
from fedflow.testing.faults import fail_at
from fedflow.types import Groups, RoundContext, Update
from tests.builders import blobs, flip, head, in_child, keys, path_of, recipe, run, run_with

SITE = ("site-1",)


class Preserving(FedAvg):
    """FedAvg over H steps of trainings that are never interrupted: with one site, one long training."""

    kind: Literal["preserving"] = "preserving"  # type: ignore[assignment]
    steps: int = 5

    def site_update(
        self, broadcast: Groups, site_state: NoState, work: Training, ctx: RoundContext
    ) -> tuple[Update, NoState]:
        local = work.train(broadcast, ctx, steps=self.steps, preserve=True)
        return local.update(ctx, {"params": local.params, "buffers": local.buffers}), site_state


def train(model: nn.Module, data: Any, config: Any) -> dict[str, float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    model.train()
    for inputs, targets in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return {"loss": float(loss.detach())}


def workload() -> FunctionWorkload:
    return FunctionWorkload(train, DataLoader(TensorDataset(*blobs(22, seed=1)), batch_size=4, shuffle=True))


def fields(rounds: int, steps: int) -> dict[str, Any]:
    return {
        "workload": f"{__name__}:workload",
        "algorithm": {"kind": f"{__name__}:Preserving", "steps": steps},
        "rounds": rounds,
    }


def model_of(journal: Journal) -> dict[str, torch.Tensor]:
    return {n: t for ref in head(journal).model.values() for n, t in read_tensors(journal.store, ref).items()}


def noted(journal: Journal, round: int) -> str | None:
    manifest = journal.manifest(round, "train")
    assert manifest is not None
    return manifest.contributors["site-1"].training_state


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, torch.Tensor]:
    """The same function, once, for sixty steps."""
    return model_of(run(recipe(**fields(1, 60)), sites=SITE))


def test_twelve_rounds_of_five_are_one_of_sixty_also_when_killed_in_the_sixth(
    uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    fault = fail_at("training", site="site-1", round=6, nth=3, token=tmp_path / "struck")
    assert in_child(run_with, fault, fields(12, 5), store, {"sites": SITE}) == -signal.SIGKILL and fault.struck
    journal = run(recipe(**fields(12, 5)), store, sites=SITE)
    found = model_of(journal)
    assert all(torch.equal(found[name], tensor) for name, tensor in uninterrupted.items())
    assert noted(journal, 0) == "fresh (first participation)"
    assert {noted(journal, n) for n in range(1, 12)} == {"continued"}
    assert not [k for k in journal.store.list() if "state/" in k], "site state never appears in the shared store"


@pytest.mark.parametrize("how", ["corrupt", "missing"])
def test_a_lost_training_state_is_a_fresh_start_and_no_exclusion(how: str, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    run(recipe(**fields(2, 5)), store, sites=SITE)
    states = ObjectStore(f"{store}-states/site-1")
    for key in keys(states, r"objects/.*safetensors"):
        if how == "corrupt":
            flip(path_of(states, key))
        else:
            states.delete(key)
    journal = run(recipe(**fields(3, 5)), store, sites=SITE)
    assert head(journal).round == 2 and (noted(journal, 2) or "").startswith("fresh (training state lost")


def test_older_training_states_are_deleted(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    run(recipe(**fields(4, 2)), store, sites=SITE)
    states = ObjectStore(f"{store}-states/site-1")
    assert len(keys(states, "/state/")) == 2 and len(keys(states, "/objects/")) == 2
