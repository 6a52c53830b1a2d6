"""Who wrote a record: keys, signatures, and what is refused without them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedflow.engine import close_round, commit_round, next_step, open_round, site_step, start_run, survey
from fedflow.engine.elsewhere import ShareWork, aggregation_step
from fedflow.engine.rounds import amend_run
from fedflow.engine.shares import Share, reduced_of, shares
from fedflow.engine.site import SiteWork, failure_of, site_journal
from fedflow.errors import RoundError, SignatureInvalid, UserError
from fedflow.recipe import Federation, FederationSite, SiteConfig
from fedflow.store.journal import MOST_OF_A_SITE, Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Closing, Manifest, Opening, Plan, UpdateManifest
from fedflow.store.signing import COORDINATOR_KEY, Keys, PrivateKey, is_signed_by, message
from fedflow.types import canonical_json
from tests.builders import SITES, bits, keys, outcome, recipe, run


@dataclass(frozen=True)
class Signed:
    """A federation with keys: the coordinator's and three sites'."""

    folder: Path
    coordinator: PrivateKey
    sites: dict[str, PrivateKey]

    @property
    def store(self) -> ObjectStore:
        return ObjectStore(str(self.folder / "store"))

    def config(self, site: str, **fields: Any) -> SiteConfig:
        given = {
            "name": site,
            "store": self.store.url,
            "state": str(self.folder / "states" / site),
            "allowed_imports": ["*"],
            "key": str(self.folder / f"{site}.key"),
            "coordinator_key": self.coordinator.public,
        }
        return SiteConfig.load(given | fields)

    def begin(self, name: str = "run", **fields: Any) -> Journal:
        pins = {site: key.public for site, key in self.sites.items()}
        return start_run(self.store, name, recipe(**fields), SITES, pins)

    def train(self, journal: Journal, **fields: Any) -> dict[str, str]:
        """One phase, from its plan to its commit. Site -> why it failed."""
        plan, opening = opened(journal)
        failures = {}
        for site in SITES:
            work = SiteWork(journal.run, plan.round, plan.phase, opening.number)
            try:
                site_step(work, self.config(site, **fields))
            except (UserError, SignatureInvalid) as error:
                assert not failure_of(work, site, error).heals
                failures[site] = error.reason
        closing = close_round(journal, plan, opening, survey(journal, plan), why="every site answered")
        commit_round(journal, plan, closing)
        return failures


def opened(journal: Journal) -> tuple[Plan, Opening]:
    step = next_step(journal, journal.recipe())
    assert step is not None
    return open_round(journal, step)


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Signed]:
    made = {name: PrivateKey.create(tmp_path / f"{name}.key") for name in ("coordinator", *SITES)}
    monkeypatch.setenv(COORDINATOR_KEY, str(tmp_path / "coordinator.key"))
    yield Signed(tmp_path, made.pop("coordinator"), made)


# -- keys --------------------------------------------------------------------------------------------------------------
def test_a_private_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    made = PrivateKey.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    with pytest.raises(UserError, match="expected a path where there is nothing"):
        PrivateKey.create(path)
    assert path.read_bytes() == before and PrivateKey.load(path).public == made.public
    path.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        PrivateKey.load(path)


def test_a_key_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    with pytest.raises(UserError, match="fedflow site enroll"):
        PrivateKey.load(path)
    path.write_text("no key")
    path.chmod(0o600)
    with pytest.raises(UserError, match="an Ed25519 private key"):
        PrivateKey.load(path)


def test_a_signature_is_of_one_key_and_one_message(tmp_path: Path) -> None:
    one, other = (PrivateKey.create(tmp_path / name) for name in "ab")
    signature = one.sign(b"said")
    assert signature == one.sign(b"said")  # a record that is written again is the same bytes again
    assert is_signed_by(one.public, b"said", signature)
    assert not is_signed_by(one.public, b"sold", signature) and not is_signed_by(other.public, b"said", signature)
    for wrong in ("", "?", signature[:-4], signature + "AAAA", "ä"):
        assert not is_signed_by(one.public, b"said", wrong)


# -- what is signed ----------------------------------------------------------------------------------------------------
def test_signing_changes_no_bit_and_a_resume_gives_the_same_bytes(signed: Signed) -> None:
    """The model's digest is that of the same recipe without keys; what was committed is read again, and verified."""
    journal = signed.begin()
    assert signed.train(journal) == {}
    resumed = Journal(signed.store, "run")
    assert signed.train(resumed) == {}
    assert bits(resumed) == bits(run(recipe()))
    assert all(
        "signature" in json.loads(signed.store.get(key)) for key in keys(signed.store, r"(plan|run|manifest)\.json$")
    )
    before = {key: signed.store.get(key) for key in signed.store.list()}
    amend_run(resumed, recipe(), sites=SITES, keys={site: key.public for site, key in signed.sites.items()})
    again = SiteWork("run", 1, "train")
    site_step(again, signed.config("site-1"))
    assert {key: signed.store.get(key) for key in signed.store.list()} == before
    assert outcome(resumed)["updates"].keys() == set(SITES)


def test_a_federation_without_keys_signs_nothing(tmp_path: Path) -> None:
    journal = run(recipe(rounds=1), str(tmp_path / "store"))
    assert not any(b'"signature"' in journal.store.get(key) for key in keys(journal.store, "json$"))


# -- what is refused by the coordinator --------------------------------------------------------------------------------
def put(signed: Signed, key: str, update: UpdateManifest, signature: str | None) -> None:
    """An update as somebody with the store's credential may write it."""
    fields = json.loads(update.to_bytes()) | ({"signature": signature} if signature else {})
    signed.store.put(key, canonical_json(fields))


@pytest.mark.parametrize(
    "how", ["unsigned", "signed by another site", "forged", "from another run", "from another round"]
)
def test_an_update_without_its_sites_signature_is_excluded_with_the_reason(signed: Signed, how: str) -> None:
    """site-2's manifest was written, or changed, by somebody who has the store's credential and not the site's key."""
    journal = signed.begin(quorum=2)
    if how == "from another round":
        signed.train(journal)
    other = signed.begin("other", quorum=2)
    plan, opening = opened(journal)
    elsewhere, _ = opened(other)
    for site in SITES:
        site_step(SiteWork("run", plan.round, plan.phase), signed.config(site))
    inbox = journal.inbox("site-2", plan.round, plan.phase)
    (key,) = [key for key in signed.store.list(inbox) if key.endswith(".json")]
    data, update = signed.store.get(key), journal.update(key)
    signed.store.delete(key)
    if how == "unsigned":
        put(signed, key, update, None)
    elif how == "signed by another site":
        digest = json.loads(data)["digest"]
        said = message("UpdateManifest", journal.begun.nonce, key, digest)
        put(signed, key, update, signed.sites["site-3"].sign(said))
    elif how == "forged":
        changed = update.model_copy(update={"examples": 10**6})
        key = f"{inbox}/{changed.update_digest().partition(':')[2]}.json"
        put(signed, key, changed, json.loads(data)["signature"])
    elif how == "from another run":
        site_step(SiteWork("other", elsewhere.round, elsewhere.phase), signed.config("site-2"))
        (there,) = [k for k in signed.store.list(other.inbox("site-2", 0, "train")) if k.endswith(".json")]
        signed.store.put(f"{inbox}/{there.rpartition('/')[2]}", signed.store.get(there))
    else:
        (before,) = [k for k in signed.store.list(journal.inbox("site-2", 0, "train")) if k.endswith(".json")]
        replayed = journal.update(before).model_copy(update={"attempt": 2})
        moved = replayed.model_copy(update={"round": 1, "plan": plan.digest(), "state_base": update.state_base})
        key = f"{inbox}/{moved.update_digest().partition(':')[2]}.json"
        put(signed, key, moved, json.loads(signed.store.get(before))["signature"])
    closing = close_round(journal, plan, opening, survey(journal, plan), why="every site answered")
    assert sorted(closing.contributors) == ["site-1", "site-3"]
    found = "none" if how == "unsigned" else "one of another key, run or place"
    assert f"found {found}, expected that of {signed.sites['site-2'].public}" in closing.excluded["site-2"]
    manifest = commit_round(journal, plan, closing)
    assert manifest.excluded["site-2"] == closing.excluded["site-2"]


def test_an_update_whose_signature_is_lost_before_it_is_aggregated_is_excluded(signed: Signed) -> None:
    """The coordinator looks again at what it reads."""
    journal = signed.begin(quorum=2)
    plan, opening = opened(journal)
    for site in SITES:
        site_step(SiteWork("run", 0, "train"), signed.config(site))
    closing = close_round(journal, plan, opening, survey(journal, plan), why="every site answered")
    key = closing.contributors["site-3"].key
    update = journal.update(key)
    signed.store.delete(key)
    put(signed, key, update, None)
    manifest = commit_round(journal, plan, closing)
    assert sorted(manifest.contributors) == ["site-1", "site-2"] and "signature" in manifest.excluded["site-3"]


def test_a_sites_failure_counts_only_signed(signed: Signed) -> None:
    """Else whoever can write into the store could have a site given up."""
    journal = signed.begin()
    plan, _ = opened(journal)
    work = SiteWork("run", 0, "train")
    told = failure_of(work, "site-1", UserError("no"))
    site_journal(signed.config("site-2", name="site-1"), work).put_failure(told)
    assert journal.failure(plan, "site-1", 1, 1) is None
    again = told.model_copy(update={"attempt": 2})
    site_journal(signed.config("site-1"), work).put_failure(again)
    assert journal.failure(plan, "site-1", 1, 2) == again


def test_a_new_key_counts_once_the_federation_pins_it(signed: Signed, tmp_path: Path) -> None:
    """A site that was set up anew: its pin is amended, and the round that is open counts what it signs from then on."""
    journal = signed.begin(quorum=3)
    plan, _ = opened(journal)
    new = PrivateKey.create(tmp_path / "new.key")
    config = signed.config("site-2", key=str(tmp_path / "new.key"))
    with pytest.raises(UserError, match=r"key: found 'ed25519:.*which the federation pins for site-2"):
        site_step(SiteWork("run", 0, "train"), config)
    amend_run(journal, sites=SITES, keys={"site-2": new.public})
    site_step(SiteWork("run", 0, "train"), config)
    assert list(survey(Journal(signed.store, "run"), plan).accepted) == ["site-2"]


# -- what others than the coordinator aggregate ------------------------------------------------------------------------
ROUND = ShareWork("run", 0, "train", 1, "round")


def closed(signed: Signed, **fields: Any) -> tuple[Journal, Plan, Closing, Share]:
    """A round that every site has answered, and what of its aggregation others do."""
    journal = signed.begin(**({"schedule": "swarm"} | fields))
    plan, opening = opened(journal)
    for site in SITES:
        site_step(SiteWork("run", 0, "train"), signed.config(site))
    closing = close_round(journal, plan, opening, survey(journal, plan), why="every site answered")
    (share,) = shares(plan, closing)
    return journal, plan, closing, share


def test_a_swarm_of_signed_sites_has_the_same_bits(signed: Signed) -> None:
    """Each reads the others' updates as the run pins them; another coordinator's round it does not aggregate."""
    journal, plan, closing, _ = closed(signed, rounds=1)
    PrivateKey.create(signed.folder / "other.key")
    other = PrivateKey.load(signed.folder / "other.key").public
    with pytest.raises(SignatureInvalid, match=rf"run\.json.*expected that of {re.escape(other)}"):
        aggregation_step(ROUND, signed.config("site-1", coordinator_key=other))
    with pytest.raises(UserError, match="which the federation pins for site-1"):
        aggregation_step(ROUND, signed.config("site-1", key=str(signed.folder / "other.key")))
    assert keys(signed.store, "^sites/site-1/run/aggregated/") == []
    made = aggregation_step(ROUND, signed.config("site-1"))
    assert aggregation_step(ROUND, signed.config("site-1")) == made  # found done
    assert commit_round(journal, plan, closing).aggregator == "site-1" and bits(journal) == bits(run(recipe(rounds=1)))


@pytest.mark.parametrize("how", ["unsigned", "signed by another site", "changed", "of another place"])
def test_an_aggregation_without_its_sites_signature_does_not_count_and_the_role_passes_on(
    signed: Signed, how: str
) -> None:
    """Somebody who may write site-1's prefix and has not its key cannot make the model."""
    journal, plan, closing, share = closed(signed)
    made = aggregation_step(ROUND, signed.config("site-1"))
    assert reduced_of(journal, share) == made
    (key,) = keys(signed.store, "^sites/site-1/run/aggregated/")
    fields = json.loads(signed.store.get(key))
    if how == "unsigned":
        del fields["signature"]
    elif how == "changed":
        forged = json.loads(made.model_copy(update={"model_digest": "blake3:0"}).to_bytes())
        fields = forged | {"signature": fields["signature"]}
    else:
        whose, place = ("site-2", key) if "site" in how else ("site-1", key.replace("/run/", "/other/"))
        said = message("Reduced", journal.begun.nonce, place, fields["digest"])
        fields |= {"signature": signed.sites[whose].sign(said)}
    signed.store.delete(key)
    signed.store.put(key, canonical_json(fields))
    assert reduced_of(journal, share) is None
    with pytest.raises(RoundError, match="found no aggregation of the round"):
        commit_round(journal, plan, closing)
    with pytest.raises(SignatureInvalid, match=f"signature of {key}: found"):  # and the site says so
        aggregation_step(ROUND, signed.config("site-1"))
    aggregation_step(ROUND, signed.config("site-2"))
    assert commit_round(journal, plan, closing).aggregator == "site-2"


def test_a_site_that_aggregates_counts_no_update_that_its_site_did_not_sign(signed: Signed) -> None:
    journal, _, closing, _ = closed(signed)
    key = closing.contributors["site-3"].key
    update = journal.update(key)
    signed.store.delete(key)
    put(signed, key, update, None)
    made = aggregation_step(ROUND, signed.config("site-1"))
    assert list(made.invalid) == ["site-3"] and signed.sites["site-3"].public in made.invalid["site-3"]


def test_a_regions_key_is_pinned_like_a_sites(signed: Signed) -> None:
    north = PrivateKey.create(signed.folder / "north.key")
    sites = [FederationSite(name=site, key=key.public) for site, key in signed.sites.items()]
    federation = Federation(sites=sites, regions=[FederationSite(name="north", key=north.public)])
    assert federation.public_keys["north"] == north.public and federation.without_keys().public_keys == {}
    signed.begin(schedule={"kind": "tree", "regions": {"north": ["site-1", "site-2"]}})
    amend_run(Journal(signed.store, "run"), sites=SITES, keys=federation.public_keys)
    journal, _, _, share = closed(signed, schedule={"kind": "tree", "regions": {"north": ["site-1", "site-2"]}})
    work = replace(ROUND, share="region-north")
    aggregation_step(work, signed.config("north"))
    assert reduced_of(journal, share) is not None
    (key,) = keys(signed.store, "^sites/north/run/aggregated/")
    fields = json.loads(signed.store.get(key))
    assert fields.pop("signature")
    signed.store.delete(key)
    signed.store.put(key, canonical_json(fields))
    assert reduced_of(journal, share) is None


def test_what_a_site_says_is_read_within_bounds(signed: Signed) -> None:
    """It may be of any size: the coordinator's memory does not depend on it."""
    journal, plan, _, share = closed(signed)
    work, config = SiteWork("run", 0, "train"), signed.config("site-1")
    site_journal(config, work).put_failure(failure_of(work, "site-1", UserError("no")))
    aggregation_step(ROUND, config)
    assert reduced_of(journal, share) and journal.failure(plan, "site-1", 1, 1)
    for key in keys(signed.store, "^sites/site-1/run/(aggregated|failures)/"):
        data = signed.store.get(key)
        signed.store.put(key, data + b" " * MOST_OF_A_SITE, mode="overwrite")
    assert reduced_of(journal, share) is None and journal.failure(plan, "site-1", 1, 1) is None


# -- what is refused by a site -----------------------------------------------------------------------------------------
def test_a_site_refuses_a_round_that_its_coordinator_did_not_sign(
    signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another coordinator's whole run: no code that its recipe names is imported."""
    PrivateKey.create(tmp_path / "impostor.key")
    monkeypatch.setenv(COORDINATOR_KEY, str(tmp_path / "impostor.key"))
    journal = signed.begin(workload="tests.nowhere:Evil")
    opened(journal)
    with pytest.raises(SignatureInvalid, match=rf"run\.json.*expected that of {re.escape(signed.coordinator.public)}"):
        site_step(SiteWork("run", 0, "train"), signed.config("site-1"))


@pytest.mark.parametrize("record", ["run.json", "plan.json", "open/1.json", "amendments/00001.json"])
@pytest.mark.parametrize("how", ["unsigned", "changed"])
def test_a_site_refuses_a_broadcast_record_with_a_wrong_signature(signed: Signed, record: str, how: str) -> None:
    journal = signed.begin()
    amend_run(journal, quorum=2)
    opened(journal)
    (key,) = [key for key in signed.store.list("public/run") if key.endswith(record)]
    fields = json.loads(signed.store.get(key))
    signature = fields.pop("signature")
    signed.store.delete(key)
    signed.store.put(key, canonical_json(fields if how == "unsigned" else fields | {"signature": signature[::-1]}))
    with pytest.raises(SignatureInvalid, match=f"signature of {key}: found"):
        site_step(SiteWork("run", 0, "train"), signed.config("site-1"))


def test_a_plan_of_another_run_of_that_name_is_refused(signed: Signed) -> None:
    """Signed by the coordinator for that very place; but the run that it was for is gone."""
    before = signed.begin()
    opened(before)
    kept = {key: signed.store.get(key) for key in signed.store.list("public/run/rounds")}
    for key in signed.store.list():
        signed.store.delete(key)
    signed.begin()
    for key, data in kept.items():
        signed.store.put(key, data)
    with pytest.raises(SignatureInvalid, match=r"plan\.json.*run or place"):
        site_step(SiteWork("run", 0, "train"), signed.config("site-1"))


# -- the coordinator's own key -----------------------------------------------------------------------------------------
def test_nothing_is_written_into_a_signed_run_without_the_coordinators_key(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stop the run: an unsigned record stays where it is."""
    signed.begin()
    before = signed.store.list()
    monkeypatch.delenv(COORDINATOR_KEY)
    with pytest.raises(UserError, match=COORDINATOR_KEY):
        amend_run(Journal(signed.store, "run"), quorum=2)
    assert signed.store.list() == before
    assert Journal(signed.store, "run").recipe().rounds == 2  # anybody may look
    with pytest.raises(UserError, match="the federation's coordinator_key"):
        Keys.here(signed.coordinator.public)


def test_a_run_that_began_without_a_key_is_not_gone_on_with_under_one(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(COORDINATOR_KEY)
    signed.begin()
    monkeypatch.setenv(COORDINATOR_KEY, str(signed.folder / "coordinator.key"))
    with pytest.raises(SignatureInvalid, match="found none"):
        next_step(Journal(signed.store, "run"), recipe())


def test_a_commit_that_somebody_else_wrote_is_not_built_upon(signed: Signed) -> None:
    """The store's credential alone does not replace the model."""
    journal = signed.begin()
    signed.train(journal)
    (key,) = keys(signed.store, r"^server/run/rounds/00000/.*manifest\.json$")
    fields = json.loads(signed.store.get(key))
    forged = Manifest.model_validate({k: v for k, v in fields.items() if k not in ("digest", "signature")})
    signed.store.delete(key)
    signed.store.put(key, forged.model_copy(update={"metrics": {}}).to_bytes(lambda digest: fields["signature"]))
    with pytest.raises(SignatureInvalid, match=r"manifest\.json"):
        opened(journal)
