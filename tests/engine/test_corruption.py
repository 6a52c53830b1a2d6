"""One byte of any stored object changes: the next read of that object says so, and says which."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedflow.engine import next_step, open_round, site_step
from fedflow.engine.rounds import recording_outcome
from fedflow.engine.site import SiteWork, _States, failure_of
from fedflow.engine.updates import Checks
from fedflow.errors import FedflowError
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.records import Attempt, Failure, SiteStateRecord, UpdateManifest, utc_now
from fedflow.store.tensors import read_tensors
from tests.builders import SITES, flip, path_of, recipe, run


@dataclass
class Stored:
    """A run with two committed rounds and a third that one site has answered; and everything that it has stored."""

    journal: Journal
    states: list[ObjectStore]

    @property
    def stores(self) -> list[ObjectStore]:
        return [self.journal.store, *self.states]

    def refs(self) -> dict[str, ObjectRef]:
        """Key -> reference of every tensor object that a record names."""
        found: list[ObjectRef] = []
        for number, phase in [(-1, "initial"), *self.journal.committed()]:
            manifest = self.journal.manifest(number, phase)
            assert manifest is not None
            found += manifest.objects()
        for key in self.journal.store.list("sites"):
            if re.search(r"/\d{5}/train/\w+\.json$", key):
                found += UpdateManifest.from_bytes(self.journal.store.get(key)).groups.values()
        for state in self.states:
            for key in state.list():
                if key.endswith(".json"):
                    found += SiteStateRecord.from_bytes(state.get(key)).state.tensors.values()
        return {ref.key: ref for ref in found}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    store = str(tmp_path_factory.mktemp("corruption") / "store")
    fields: dict[str, Any] = {
        "algorithm": "tests.builders:Leaning",
        "evaluation": "tests.builders:HeldOut",
        "quorum": 1,
    }
    run(recipe(**fields), store)
    journal = run(recipe(**{**fields, "quorum": 2}), store)
    with recording_outcome(journal):
        step = next_step(journal, recipe(rounds=3))
        assert step is not None
        plan, opening = open_round(journal, step)
        journal.put_attempt(plan, Attempt(opening=1, site="site-1", attempt=1, key="k", at=utc_now()))
        work = SiteWork("run", 2, "train", opening.number)
        journal.put_failure(failure_of(work, "site-2", OSError("disk full")))
        site_step(work, SiteConfig(name="site-1", store=store, state=f"{store}-states/site-1", allowed_imports=["*"]))
    return Stored(journal, [ObjectStore(f"{store}-states/{site}") for site in SITES])


def readers(stored: Stored) -> dict[str, Callable[[ObjectStore, str], object]]:
    """Pattern of a key -> how the library reads the object."""
    journal, refs = stored.journal, stored.refs()
    plan = journal.plan(2, "train")
    assert plan is not None

    def judged(store: ObjectStore, key: str) -> object:
        _, site, _, number, _, _ = key.split("/")
        of_round = journal.plan(int(number), "train")
        assert of_round is not None
        verdict = Checks(journal, of_round).judge(site, key)
        if isinstance(verdict, str):
            raise FedflowError(verdict)
        return verdict

    def remembered(store: ObjectStore, key: str) -> object:
        """What the site does at the start of a round whose plan names this state."""
        base = f"blake3:{Path(key).stem}"
        return _States(store, plan).read(journal.recipe().algorithm, base, "site-1")

    def said(store: ObjectStore, key: str) -> object:
        return Failure.from_bytes(store.get(key)) and journal.failure(plan, "site-2", 1, 1)

    return {
        r"^public/run/run\.json$": lambda s, k: journal.record(),
        r"^public/run/amendments/": lambda s, k: journal.amendments(),
        r"^public/run/rounds/.*/plan\.json$": lambda s, k: journal.plan(_round(k), "train"),
        r"^public/run/rounds/.*/open/": lambda s, k: journal.openings(plan.model_copy(update={"round": _round(k)})),
        r"^public/run/rounds/.*/closed/": lambda s, k: journal.closings(plan.model_copy(update={"round": _round(k)})),
        r"^server/run/rounds/.*/attempts/": lambda s, k: journal.attempts(plan),
        r"^server/run/rounds/.*/manifest\.json$": lambda s, k: journal.manifest(_round(k), "train"),
        r"^server/run/rounds/.*/evaluation\.json$": lambda s, k: journal.evaluation(_round(k)),
        r"^server/run/initial/manifest\.json$": lambda s, k: journal.manifest(-1, "initial"),
        r"^server/run/outcomes/": lambda s, k: journal.outcomes(),
        r"^sites/.*/failures/": said,
        r"^sites/[^/]+/run/\d+/train/\w+\.json$": judged,
        r"^run-\w+/state/": remembered,
        r"\.safetensors$": lambda s, k: read_tensors(s, refs[k]),
    }


def _round(key: str) -> int:
    found = re.search(r"/rounds/(\d+)/", key)
    assert found
    return int(found[1])


def test_the_run_has_objects_of_every_kind(stored: Stored) -> None:
    """Every object is read by one of the readers, and every reader has something to read."""
    patterns = readers(stored)
    keys = [key for store in stored.stores for key in store.list()]
    for key in keys:
        assert sum(bool(re.search(pattern, key)) for pattern in patterns) == 1, key
    for pattern in patterns:
        assert any(re.search(pattern, key) for key in keys), pattern
    assert {key for key in keys if key.endswith(".safetensors")} == stored.refs().keys()


def test_everything_can_be_read(stored: Stored) -> None:
    for store in stored.stores:
        for key in store.list():
            (read,) = (reader for pattern, reader in readers(stored).items() if re.search(pattern, key))
            assert read(store, key) is not None


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_changed_byte_is_found_and_the_object_named(stored: Stored, place: str) -> None:
    patterns, checked = readers(stored), 0
    for store in stored.stores:
        for key in store.list():
            (read,) = (reader for pattern, reader in patterns.items() if re.search(pattern, key))
            path = path_of(store, key)
            good = flip(path, at={"first": 0, "middle": None, "last": -1}[place])
            try:
                with pytest.raises((FedflowError, ValueError)) as caught:
                    read(store, key)
            finally:
                path.write_bytes(good)
            if "/failures/" not in key:  # read for people only, and passed over where it can't be
                assert key in str(caught.value), (key, str(caught.value))
            checked += 1
    assert checked > 40
