"""FedBuff on a real server: sites of different speed are never idle, and no update is counted twice or lost, whoever is killed."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedflow.engine.rounds import close_round, commit_round, next_step, open_round, start_run, survey
from fedflow.engine.site import SiteWork, site_step
from fedflow.local import FunctionWorkload
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import UpdateManifest
from fedflow.testing.faults import fail_at
from tests.builders import SITES, bits, blobs, recipe
from tests.prefect.conftest import Poc

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

ROUNDS = 4


class Paced(FunctionWorkload):
    """Takes `seconds` of its site; none where it is replayed."""

    def __init__(self, site: str, seconds: Sequence[float] = (0, 0, 0)) -> None:
        paced = {"wait": seconds[int(site[-1]) - 1]}
        super().__init__(train, blobs(16, seed=int(site[-1])), examples=16, config=paced)


def train(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], config: Any) -> None:
    threading.Event().wait(config.wait)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    rows = torch.randperm(len(data[0]))[:8]  # another draw for every training
    nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
    optimizer.step()


def fields(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "algorithm": "fedbuff",
        "schedule": {"kind": "buffered", "size": 2},
        "workload": {"path": "tests.prefect.test_buffered:Paced", "args": {"seconds": list(seconds)}},
        "rounds": ROUNDS,
        "timeouts": {"round_deadline": 3600, "quorum_grace": 0},
    }


def sent(journal: Journal, site: str) -> list[UpdateManifest]:
    """Every update that is in the store."""
    keys = [key for key in journal.store.list(f"sites/{site}/{journal.run}") if re.search(r"/train/\w+\.json$", key)]
    return [UpdateManifest.from_bytes(journal.store.get(key)) for key in keys]


def counted(journal: Journal) -> list[list[UpdateManifest]]:
    """The updates that count, round by round."""
    found = []
    for round in range(ROUNDS):
        manifest = journal.manifest(round, "train")
        assert manifest is not None
        of = {u.update_digest(): u for site in manifest.contributors for u in sent(journal, site)}
        found.append([of[c.update] for c in manifest.contributors.values()])
    return found


def check(journal: Journal) -> None:
    """Each site's updates that count are a chain, each made from the one before, so none counts twice; the others that are there, at most
    one a site, came when no round was left to count it."""
    rounds = counted(journal)
    assert all(len(updates) >= 2 for updates in rounds)
    for site in SITES:
        chain = [u for updates in rounds for u in updates if u.site == site]
        digests = [u.update_digest() for u in chain]
        assert [u.state_base for u in chain] == [None, *digests][: len(chain)]
        left = [u for u in sent(journal, site) if u.update_digest() not in digests]
        assert all(u.state_base == (digests[-1] if digests else None) for u in left), "an update was lost"


def replayed(journal: Journal, folder: Path) -> Journal:
    """The same contributions in the same rounds, by the engine's functions alone."""
    store = ObjectStore(str(folder / "store"))
    again = start_run(store, "replayed", recipe(**fields((0, 0, 0))), SITES)
    for round, updates in enumerate(counted(journal)):
        step = next_step(again, again.recipe())
        assert step is not None
        plan, opening = open_round(again, step)
        for update in updates:
            base = journal.plan(update.round, "train")
            assert base is not None
            was_asked_again = update.state_base != base.tasks[update.site].state_base
            after = plan.tasks[update.site].state_base if was_asked_again else None
            config = SiteConfig(
                name=update.site, store=store.url, state=str(folder / update.site), allowed_imports=["*"]
            )
            site_step(SiteWork("replayed", update.round, "train", after=after), config, unhurried=True)
        commit_round(again, plan, close_round(again, plan, opening, survey(again, plan), why=f"as in round {round}"))
    return again


def test_no_update_counts_twice_or_is_lost_though_coordinator_and_trainer_are_killed(poc: Poc, tmp_path: Path) -> None:
    """Site 1 is quick, site 3 slow. Round 1's closing is cut off by the coordinator's death, a training of site 2 by its own."""
    trainer = fail_at("update objects", site="site-2", round=0, token=tmp_path / "trainer")
    run = poc.execute(recipe(**fields((0.2, 1, 4))), "buffered", trainer)
    run.wait(600, until=lambda: trainer.struck)
    coordinator = fail_at("closing", round=1, token=tmp_path / "coordinator")
    coordinator.write(poc.fault_file)
    assert run.wait(600) == "interrupted" and coordinator.struck
    poc.heal()
    poc.env.resume(run.id).result(600)
    check(run.journal)
    asked_again = [
        a.site for r in range(ROUNDS) for a in run.journal.attempts(run.journal.plan(r, "train")) if not a.attempt
    ]  # type: ignore[arg-type]
    late = [u for round, updates in enumerate(counted(run.journal)) for u in updates if u.round < round]
    assert "site-1" in asked_again and late
    assert bits(replayed(run.journal, tmp_path / "again")) == bits(run.journal)
