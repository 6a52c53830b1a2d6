"""A site that sends something else than a valid update is excluded with the reason; the others' round is committed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from torch import Tensor

from fedflow.algorithms.fedavg import FedAvg
from fedflow.engine import amend_run, close_round, commit_round, next_step, open_round, site_step, start_run, survey
from fedflow.engine.rounds import Step
from fedflow.engine.site import SiteWork
from fedflow.errors import QuorumLost
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.records import Closing, Manifest, Opening, Plan, UpdateManifest
from fedflow.store.tensors import read_tensors, write_tensors
from fedflow.types import canonical_json
from tests.builders import SITES, flip, head, keys, outcome, path_of, recipe, run

VICTIM = "site-2"
OTHERS = ["site-1", "site-3"]


class Round:
    """Round 0 of a run in a local store, that every site has answered and nobody has closed."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        self.folder = folder
        recipe_ = recipe(**{"quorum": 2, **fields})
        self.journal = start_run(ObjectStore(str(folder / "store")), "run", recipe_, SITES)
        step = next_step(self.journal, recipe_)
        assert step is not None
        self.plan, self.opening = open_round(self.journal, step)
        for site in self.plan.tasks:
            self.answer(site)

    def copy(self, folder: Path) -> Round:
        """The same round in a store of its own."""
        shutil.copytree(self.folder, folder)
        other = object.__new__(Round)
        other.folder, other.plan, other.opening = folder, self.plan, self.opening
        other.journal = Journal(ObjectStore(str(folder / "store")), "run")
        return other

    @property
    def store(self) -> ObjectStore:
        return self.journal.store

    def answer(self, site: str, opening: int = 1) -> UpdateManifest:
        config = SiteConfig(
            name=site, store=self.store.url, state=str(self.folder / "states" / site), allowed_imports=["*"]
        )
        return site_step(SiteWork("run", self.plan.round, self.plan.phase, opening), config)

    def sent(self, site: str = VICTIM) -> str:
        """The key of a site's manifest."""
        (key,) = keys(self.store, f"^sites/{site}/run/00000/.*json$")
        return key

    def manifest(self, site: str = VICTIM) -> UpdateManifest:
        return UpdateManifest.from_bytes(self.store.get(self.sent(site)))

    def resend(self, update: UpdateManifest, key: str | None = None) -> None:
        """Put `update` in place of what the victim sent."""
        self.store.delete(self.sent())
        inbox = self.journal.inbox(VICTIM, self.plan.round, self.plan.phase)
        self.store.put(key or f"{inbox}/{update.update_digest().partition(':')[2]}.json", update.to_bytes())

    def write(self, tensors: dict[str, Tensor], prefix: str | None = None) -> ObjectRef:
        return write_tensors(
            self.store, prefix or self.journal.inbox(VICTIM, self.plan.round, self.plan.phase), tensors
        )

    def close(self) -> Closing:
        return close_round(self.journal, self.plan, self.opening, survey(self.journal, self.plan), why="deadline")

    def commit(self) -> Manifest:
        return commit_round(self.journal, self.plan, self.close())


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Round:
    return Round(tmp_path_factory.mktemp("answered") / "round")


@pytest.fixture(scope="module")
def without(answered: Round, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """What the round gives if the victim sends nothing at all."""
    round = answered.copy(tmp_path_factory.mktemp("without") / "round")
    round.store.delete(round.sent())
    return round.commit()


@pytest.fixture
def round(answered: Round, tmp_path: Path) -> Round:
    return answered.copy(tmp_path / "round")


# -- what a site may get wrong -----------------------------------------------------------------------------------------
Wrong = Callable[[Round], None]


def fields(**changes: Any) -> Wrong:
    """A manifest with other fields, otherwise in order."""
    return lambda round: round.resend(round.manifest().model_copy(update=changes))


def params(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], group: str = "params") -> Wrong:
    """Another payload, otherwise in order."""

    def wrong(round: Round) -> None:
        update = round.manifest()
        ref = round.write(change(read_tensors(round.store, update.groups[group])))
        round.resend(update.model_copy(update={"groups": {**update.groups, group: ref}}))

    return wrong


def groups(change: Callable[[Round, dict[str, ObjectRef]], dict[str, ObjectRef]]) -> Wrong:
    """Other references, otherwise in order."""

    def wrong(round: Round) -> None:
        update = round.manifest()
        round.resend(update.model_copy(update={"groups": change(round, dict(update.groups))}))

    return wrong


def raw(change: Callable[[dict[str, Any]], Any]) -> Wrong:
    """A manifest whose JSON was changed before its digest was made, so that the digest is right."""

    def wrong(round: Round) -> None:
        key = round.sent()
        changed = change(json.loads(round.store.get(key)))
        if isinstance(changed, dict):
            del changed["digest"]
            changed["digest"] = f"blake3:{blake3(canonical_json(changed)).hexdigest()}"
            changed = canonical_json(changed)
        round.store.put(key, changed, mode="overwrite")

    return wrong


def flipped_manifest(round: Round) -> None:
    flip(path_of(round.store, round.sent()))


def flipped_object(round: Round) -> None:
    flip(path_of(round.store, round.manifest().groups["params"].key), at=-1)


def cut_object(round: Round) -> None:
    path = path_of(round.store, round.manifest().groups["params"].key)
    path.write_bytes(path.read_bytes()[:-1])


def no_safetensors(round: Round) -> None:
    update = round.manifest()
    ref = round.store.write(round.journal.inbox(VICTIM, 0, "train"), b"\xff" * 100, ".safetensors")
    round.resend(update.model_copy(update={"groups": {**update.groups, "params": ref}}))


def filled(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda p: {**p, "0.weight": torch.full_like(p["0.weight"], value)}


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def deep_header(round: Round) -> None:
    large_header(round, depth=1000)


def large_header(round: Round, depth: int = 200_000) -> None:
    update, header = round.manifest(), b'{"a":' + nested(depth) + b"}"
    data = len(header).to_bytes(8, "little") + header
    ref = round.store.write(round.journal.inbox(VICTIM, 0, "train"), data, ".safetensors")
    round.resend(update.model_copy(update={"groups": {**update.groups, "params": ref}}))


def of_another_site(round: Round, refs: dict[str, ObjectRef]) -> dict[str, ObjectRef]:
    return {**refs, "params": round.manifest("site-1").groups["params"]}


def gone(round: Round, refs: dict[str, ObjectRef]) -> dict[str, ObjectRef]:
    round.store.delete(refs["params"].key)
    return refs


def ref(**changes: Any) -> Wrong:
    """Another reference to the parameters, otherwise in order."""
    return groups(lambda _, refs: {**refs, "params": replace(refs["params"], **changes)})


def bent(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A manifest whose reference to the parameters has other fields."""
    return lambda m: {**m, "groups": {**m["groups"], "params": {**m["groups"]["params"], **changes}}}


HEX = "0" * 64
WRONG: dict[str, tuple[Wrong, str]] = {
    "NaN": (params(filled(torch.nan)), r"not finite: params/0\.weight \(24 of 24 elements"),
    "infinity": (params(lambda p: {**p, "1.running_mean": torch.full((6,), -torch.inf)}, "buffers"), r"not finite: buffers/1\.running_mean"),
    "a name too few": (params(lambda p: {n: t for n, t in p.items() if n != "4.bias"}), r"names in params: missing \['4.bias'\]"),
    "a name too many": (params(lambda p: {**p, "5.bias": torch.zeros(1)}), r"names in params: .*unexpected \['5.bias'\]"),
    "another name": (
        params(lambda p: {n.replace("4.", "x."): t for n, t in p.items()}),
        r"missing \['4.bias', '4.weight'\], unexpected \['x.bias', 'x.weight'\]",
    ),
    "another shape": (params(lambda p: {**p, "4.bias": torch.zeros(3, 1)}), r"params/4\.bias: found float32\[3, 1\], expected float32\[3\]"),
    "another dtype": (params(lambda p: {**p, "4.bias": p["4.bias"].double()}), r"params/4\.bias: found float64\[3\], expected float32\[3\]"),
    "a float counter": (
        params(lambda b: {**b, "1.num_batches_tracked": torch.tensor(1.0)}, "buffers"),
        r"buffers/1\.num_batches_tracked: found float32\[\], expected int64\[\]",
    ),
    "a group too few": (groups(lambda _, g: {"params": g["params"]}), r"groups: found \['params'\], expected \['buffers', 'params'\]"),
    "a group too many": (groups(lambda _, g: {**g, "frozen": g["params"]}), r"groups: found \['buffers', 'frozen', 'params'\]"),
    "a later round": (fields(round=7), r"base round: found 7, expected one of \[0\]"),
    "an earlier round": (fields(round=-1), r"base round: found -1, expected one of \[0\]"),
    "another plan": (fields(plan=f"blake3:{HEX}"), rf"plan: found blake3:{HEX}, expected blake3:"),
    "another run": (fields(run="other"), "run: found 'other', expected 'run'"),
    "a run that had this name before": (fields(nonce=HEX[:32]), f"nonce: found '{HEX[:32]}'"),
    "another site": (fields(site="site-1"), "site: found 'site-1', expected 'site-2'"),
    "another phase": (fields(phase="test", round=1), "phase: found 'test', expected 'train'"),
    "a phase that leads out": (fields(phase="../../..", round=1), "phase: found '../../..'"),
    "a state that nobody accepted": (fields(state_base=f"blake3:{HEX}"), rf"stale state: found blake3:{HEX}, expected None"),
    "weight 0": (fields(examples=0), r"weight: found 0.*examples 0.*expected a finite number above 0"),
    "weight -1": (fields(examples=-1), r"weight: found -1"),
    "an enormous weight": (raw(lambda m: {**m, "examples": 10**400}), r"unreadable manifest sites/site-2/.*examples: found 1000"),
    "a weight that is true": (raw(lambda m: {**m, "examples": True}), r"unreadable manifest .*examples: found True"),
    "a weight in words": (raw(lambda m: {**m, "examples": "12"}), r"unreadable manifest .*examples: found '12'"),
    "a fraction of a step": (raw(lambda m: {**m, "steps": 1.5}), r"unreadable manifest .*steps: found 1.5"),
    "an unknown field": (raw(lambda m: {**m, "code": "print()"}), r"unreadable manifest .*code: unknown field"),
    "another digest than its name": (
        lambda round: round.resend(round.manifest(), f"{round.journal.inbox(VICTIM, 0, 'train')}/{HEX}.json"),
        "digest: found blake3:",
    ),
    "an object of another site": (groups(of_another_site), "params: found an object outside sites/site-2/run/: sites/site-1/"),
    "an object that is not there": (groups(gone), "found nothing there, expected an object"),
    "a key that leads out": (raw(bent(key="sites/site-2/run/../../site-1/x")), r"unreadable manifest .*'\.\.'"),
    "an absolute key": (raw(bent(key="/etc/passwd")), r"unreadable manifest .*'/etc/passwd'"),
    "a key longer than a file name": (ref(key=f"sites/site-2/run/{'x' * 5000}"), "sites/site-2/run/xxx.*too long"),
    "a size below zero": (raw(bent(size=-1)), "unreadable manifest .*sizes must be whole numbers"),
    "no digest": (raw(bent(digest="md5:0")), "unreadable manifest .*expected a digest"),
    "a size that is not the object's": (ref(size=17), "is corrupt: expected 17 bytes"),
    "a flipped byte in the manifest": (flipped_manifest, "unreadable manifest sites/site-2/run/00000/train/"),
    "a flipped byte in an object": (flipped_object, r"object 'sites/site-2/run/00000/train/\w+\.safetensors' is corrupt"),
    "half an object": (cut_object, "is corrupt: expected .* bytes"),
    "no tensors": (no_safetensors, "found a header of"),
    "a header nested too deeply": (deep_header, "header that is not safetensors"),
    "an object too large to be an update": (large_header, "found an object of 400014 bytes .* expected at most"),
    "no manifest": (raw(lambda m: b"hello"), "unreadable manifest"),
    "a list": (raw(lambda m: b"[1]"), "unreadable manifest .*not the canonical JSON of a record"),
    "NaN in the manifest": (raw(lambda m: canonical_json(m).replace(b'"lr_sum":', b'"lr_sum":NaN,"x":')), "unreadable manifest"),
    "a manifest nested too deeply": (raw(lambda m: nested(200_000)), "unreadable manifest .*nested too deeply"),
    "no text": (raw(lambda m: b"\xff\xfe\x00"), "unreadable manifest"),
    "nothing": (raw(lambda m: b""), "unreadable manifest"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_update_is_excluded_with_the_reason_and_the_round_goes_on(
    round: Round, without: Manifest, wrong: Wrong, reason: str
) -> None:
    wrong(round)
    manifest = round.commit()
    assert sorted(manifest.contributors) == OTHERS
    assert list(manifest.excluded) == [VICTIM]
    assert re.search(reason, manifest.excluded[VICTIM]), manifest.excluded[VICTIM]
    assert manifest.model_digest == without.model_digest
    assert manifest.sites[VICTIM].failures == 1 and manifest.sites[VICTIM].accepted is None
    closings = round.journal.closings(round.plan)
    assert closings[-1].excluded == manifest.excluded and manifest.closing_digest == closings[-1].digest()


def test_an_update_that_is_in_order_counts(round: Round) -> None:
    round.resend(round.manifest())
    assert sorted(round.commit().contributors) == list(SITES)


def test_of_two_updates_the_valid_one_counts(round: Round, answered: Round) -> None:
    good = round.manifest()
    bad = good.model_copy(update={"examples": -1})
    inbox = round.journal.inbox(VICTIM, 0, "train")
    for name in ("0" * 64, "f" * 64):
        round.store.put(f"{inbox}/{name}.json", bad.to_bytes())
    manifest = round.commit()
    assert manifest.contributors[VICTIM].update == good.update_digest() and not manifest.excluded


def test_a_weight_that_cannot_be_computed_excludes_the_site(tmp_path: Path) -> None:
    """The algorithm's weight needs a number that one site leaves out."""
    round = Round(tmp_path / "round", algorithm="tests.engine.test_updates:ByScalar")
    round.resend(round.manifest().model_copy(update={"scalars": {}}))
    assert "weight: cannot be computed from what was sent: KeyError('importance')" in round.commit().excluded[VICTIM]


class ByScalar(FedAvg):
    """FedAvg, weighted by a number that the site sends."""

    kind: Any = "by-scalar"

    def weight(self, update: Any) -> float:
        return float(update.scalars["importance"])

    def site_update(self, broadcast: Any, site_state: Any, work: Any, ctx: Any) -> Any:
        update, state = super().site_update(broadcast, site_state, work, ctx)
        return replace(update, scalars={"importance": 2.0}), state


# -- when it is found late ---------------------------------------------------------------------------------------------
def test_what_is_found_in_aggregation_is_written_into_a_new_revision_of_the_closing(round: Round) -> None:
    params(filled(torch.nan))(round)
    closing = round.close()
    assert sorted(closing.contributors) == list(SITES)
    manifest = commit_round(round.journal, round.plan, closing)
    first, second = round.journal.closings(round.plan)
    assert (first.revision, second.revision, second.why) == (0, 1, "site-2 excluded in aggregation")
    assert manifest.closing == round.journal.closing_key(round.plan, second)


def test_an_object_that_is_damaged_after_the_closing_excludes_its_site(round: Round, without: Manifest) -> None:
    closing = round.close()
    flipped_object(round)
    manifest = commit_round(round.journal, round.plan, closing)
    assert "is corrupt" in manifest.excluded[VICTIM] and manifest.model_digest == without.model_digest


def test_a_manifest_that_is_damaged_after_the_closing_excludes_its_site(round: Round, without: Manifest) -> None:
    closing = round.close()
    flipped_manifest(round)
    manifest = commit_round(round.journal, round.plan, closing)
    assert "sites/site-2/" in manifest.excluded[VICTIM] and manifest.model_digest == without.model_digest


# -- below the quorum --------------------------------------------------------------------------------------------------
@pytest.fixture
def lost(tmp_path: Path, request: pytest.FixtureRequest) -> Round:
    """A round that could not be committed: the victim sent what the parameter says, and everybody is needed."""
    round = Round(tmp_path / "round", quorum=3)
    WRONG[request.param][0](round)
    told = r"run run, round 0: found 2 valid updates, expected 3; missing: site-2: (not finite|weight|.*corrupt)"
    with pytest.raises(QuorumLost, match=told):
        round.commit()
    assert round.journal.committed() == [] and head(round.journal).round == -1
    return round


BAD = ["NaN", "weight 0", "a flipped byte in an object"]


@pytest.mark.parametrize("lost", BAD, indirect=True)
def test_a_lost_round_goes_on_with_a_lower_quorum_and_the_updates_that_are_there(lost: Round) -> None:
    amend_run(lost.journal, quorum=2)
    lost.plan, lost.opening = open_round(lost.journal, Step(0, "train"), reopen=True)
    manifest = lost.commit()
    assert sorted(manifest.contributors) == OTHERS and VICTIM in manifest.excluded


@pytest.mark.parametrize("lost", BAD, indirect=True)
def test_a_lost_round_asks_the_site_again_whose_update_did_not_count(lost: Round, tmp_path: Path) -> None:
    """Only that one; and the bytes are those of a run in which nothing went wrong."""
    before = {site: lost.sent(site) for site in OTHERS}
    journal = run(recipe(quorum=3), str(tmp_path / "round/store"), state=str(tmp_path / "round/states"))
    manifest = journal.manifest(0, "train")
    assert manifest is not None and sorted(manifest.contributors) == list(SITES) and not manifest.excluded
    assert {site: lost.sent(site) for site in OTHERS} == before
    assert head(journal).model_digest == head(run(recipe(quorum=3))).model_digest


def test_a_required_site_that_sends_nonsense_loses_the_quorum(tmp_path: Path) -> None:
    round = Round(tmp_path / "round", quorum=1, required_sites=[VICTIM])
    WRONG["weight 0"][0](round)
    with pytest.raises(QuorumLost, match="found 2 valid updates, expected 1 including site-2; missing: site-2: weight"):
        round.commit()


# -- late updates ------------------------------------------------------------------------------------------------------
def late_round(folder: Path, late: str) -> tuple[Round, Round]:
    """Round 0 is closed and committed without the victim, whose update arrives then; and round 0 as it was before."""
    before = Round(folder / "before", late=late, rounds=2)
    round = before.copy(folder / "round")
    round.store.delete(round.sent())
    round.commit()
    shutil.copytree(
        path_of(before.store, f"sites/{VICTIM}"), path_of(round.store, f"sites/{VICTIM}"), dirs_exist_ok=True
    )
    return round, before


def second_round(round: Round) -> tuple[Plan, Opening]:
    step = next_step(round.journal, round.journal.recipe())
    assert step is not None and step.round == 1
    return open_round(round.journal, step)


def test_a_late_update_is_dropped(tmp_path: Path) -> None:
    round, _ = late_round(tmp_path, "drop")
    first = head(round.journal)
    round.plan, round.opening = second_round(round)
    for site in OTHERS:
        round.answer(site)
    manifest = round.commit()
    assert sorted(manifest.contributors) == OTHERS and manifest.excluded == {VICTIM: "no update by the deadline"}
    assert round.journal.manifest(0, "train") == first


def test_a_late_update_is_carried_into_the_next_round_from_where_it_started(tmp_path: Path) -> None:
    """It counts as y + (x₁ − x₀): what the site learnt, moved to where the model is now; in float64, rounded once."""
    round, _before = late_round(tmp_path, "carry")
    first = head(round.journal)
    round.plan, round.opening = second_round(round)
    for site in OTHERS:
        round.answer(site)
    manifest = round.commit()
    assert {s: c.base_round for s, c in manifest.contributors.items()} == {"site-1": 1, "site-2": 0, "site-3": 1}

    def sent(site: str, number: int) -> dict[str, Tensor]:
        (key,) = keys(round.store, f"^sites/{site}/run/{number:05d}/.*json$")
        update = UpdateManifest.from_bytes(round.store.get(key))
        return read_tensors(round.store, update.groups["params"])

    x0, x1 = (read_tensors(round.store, m.model["params"]) for m in (_initial(round.journal), first))
    ys = [sent("site-1", 1), sent(VICTIM, 0), sent("site-3", 1)]
    ys[1] = {n: (y.double() + (x1[n].double() - x0[n].double())).float() for n, y in ys[1].items()}
    found = read_tensors(round.store, manifest.model["params"])
    for name in found:
        mean = sum(w * y[name].double() for w, y in zip((12, 20, 28), ys, strict=True)) / 60  # their examples
        torch.testing.assert_close(found[name], mean.float(), rtol=0, atol=0)


def _initial(journal: Journal) -> Manifest:
    found = journal.manifest(-1, "initial")
    assert found is not None
    return found


def test_an_update_counts_once(tmp_path: Path) -> None:
    """Carried into round 1, it isn't taken again in round 2."""
    round, _ = late_round(tmp_path, "carry")
    round.plan, round.opening = second_round(round)
    for site in OTHERS:
        round.answer(site)
    round.commit()
    step = next_step(round.journal, recipe(rounds=3))
    assert step is not None and step.round == 2
    round.plan, round.opening = open_round(round.journal, step)
    assert round.plan.accept_bases == [1, 2]
    assert survey(round.journal, round.plan).answered() == set()


def test_an_update_on_a_state_that_was_not_accepted_is_stale(tmp_path: Path) -> None:
    """A site with memory: its late update of round 0 was dropped; in round 1 it must not go on from that memory."""
    round, _ = late_round(tmp_path, "drop")
    plan, _ = second_round(round)
    assert plan.tasks[VICTIM].state_base is None
    assert plan.tasks["site-1"].state_base == round.manifest("site-1").update_digest()


def test_the_same_run_with_and_without_an_excluded_site_differs_only_by_it(round: Round, without: Manifest) -> None:
    everyone = round.commit()
    assert everyone.model_digest != without.model_digest
    assert outcome(round.journal)["model"] == everyone.model_digest
