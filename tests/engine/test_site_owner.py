"""What a site's owner decides and sees: which recipes are trained, one tried alone, and what left the site."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from fedflow.algorithms.fedavg import FedAvg
from fedflow.engine import close_round, next_step, open_round, simulate, site_step, start_run, survey
from fedflow.engine.audit import read_audit
from fedflow.engine.elsewhere import ShareWork, aggregation_step
from fedflow.engine.review import decide, verdict
from fedflow.engine.site import SiteWork, failure_of, site_journal
from fedflow.engine.trying import try_recipe
from fedflow.errors import RecipeRefused, ResolveError, UserError
from fedflow.recipe import DEVICES, Recipe, SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore, digest
from fedflow.store.records import Plan
from fedflow.types import Update
from tests.builders import SITES, recipe

WORK, SHARE = SiteWork("run", 0, "train"), ShareWork("run", 0, "train", 1, "round")
KNOWS: dict[str, Any] = {"algorithm": {"kind": "scaffold"}, "training": {"optimizer": {"momentum": 0.0}}}


def config(folder: Path, site: str = "site-1", **fields: Any) -> SiteConfig:
    given = {
        "name": site,
        "store": str(folder / "store"),
        "state": str(folder / "states" / site),
        "allowed_imports": ["*"],
    }
    return SiteConfig.load(given | fields)


def opened(folder: Path, **fields: Any) -> tuple[Journal, Plan]:
    journal = start_run(ObjectStore(str(folder / "store")), "run", recipe(**fields), SITES)
    step = next_step(journal, journal.recipe())
    assert step is not None
    return journal, open_round(journal, step)[0]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -- review ------------------------------------------------------------------------------------------------------------
def test_a_recipe_is_trained_once_its_owner_has_approved_it(tmp_path: Path) -> None:
    """Refused with a reason that says how; approved by its digest, which a resume's changes leave; revoked again."""
    journal, _ = opened(tmp_path)
    reviewing = config(tmp_path, review={"approved": str(tmp_path / "approved.jsonl")})
    with pytest.raises(RecipeRefused, match=r"nobody has approved it.*fedflow site review run --approve") as refused:
        site_step(WORK, reviewing)
    told = failure_of(WORK, "site-1", refused.value)
    assert not told.heals and recipe().digest() in told.reason
    assert journal.store.list("sites") == []
    assert reviewing.review is not None
    decide(recipe(rounds=7), reviewing.review, True)
    assert verdict(recipe(), reviewing) == "approved"
    assert verdict(recipe(seed=6), reviewing) == "refused: nobody has approved it"
    site_step(WORK, reviewing)
    decide(recipe(), reviewing.review, False)
    assert verdict(recipe(), reviewing) == "refused: its approval was revoked"
    assert [json.loads(line)["approved"] for line in (tmp_path / "approved.jsonl").read_text().splitlines()] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"algorithms": ["fed*"]}, None),
        ({"algorithms": ["scaffold"]}, "algorithm: found 'fedavg', expected one of ['scaffold']"),
        ({"algorithms": ["*"], "models": ["hospital.*"]}, "model: found 'tests.builders:Tiny'"),
        ({"algorithms": ["*"], "workloads": ["tests.builders:*"]}, None),
        ({"algorithms": ["*"], "rounds": 1}, "rounds: found 2, expected at most 1"),
    ],
    ids=str,
)
def test_a_policy_approves_what_fits_all_of_it(tmp_path: Path, policy: dict[str, Any], why: str | None) -> None:
    here = config(tmp_path, review={"approved": str(tmp_path / "approved"), "policy": policy})
    assert here.review is not None
    assert verdict(recipe(), here).startswith("approved by policy" if why is None else f"refused: {why}")
    decide(recipe(), here.review, True)
    assert verdict(recipe(), here) == "approved"


def test_a_review_without_a_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"review\.approved: found .*make the folder"):
        config(tmp_path, review={"approved": str(tmp_path / "none" / "approved")})


# -- what it allows, and how much ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "asked", "why"),
    [
        ({"algorithms": ["scaffold", "hospital.*"]}, {}, "algorithm: found 'fedavg', expected one of"),
        ({"limits": {"gpus": 0}}, {"numerics": {"device": "cuda"}}, "numerics.device: found 'cuda', expected 'cpu'"),
        (
            {"limits": {"steps": 2}},
            {"training": {"steps": 3}},
            "steps: found 3, expected at most 2, this site's limits",
        ),
        ({"limits": {"steps": 1}}, {}, "steps: found 2, expected at most 1, this site's limits"),
    ],
    ids=["algorithm", "gpus", "steps", "epochs"],
)
def test_what_is_beyond_a_sites_limits_is_refused_and_the_coordinator_told(
    tmp_path: Path, fields: dict[str, Any], asked: dict[str, Any], why: str
) -> None:
    """Whoever approved of it; nothing is sent, and there is no second attempt."""
    journal, plan = opened(tmp_path, **asked)
    here = config(tmp_path, **fields, review={"approved": str(tmp_path / "approved")})
    assert here.review is not None
    decide(recipe(**asked), here.review, True)
    with pytest.raises(RecipeRefused) as refused:
        site_step(WORK, here)
    assert journal.store.list("sites") == []
    site_journal(here, WORK).put_failure(failure_of(WORK, "site-1", refused.value))
    told = journal.failure(plan, "site-1", 1, 1)
    assert told is not None and told.reason.startswith(why) and "ask the site's owner" in told.reason and not told.heals


def test_what_is_within_a_sites_limits_is_done(tmp_path: Path) -> None:
    opened(tmp_path)
    assert site_step(WORK, config(tmp_path, algorithms=["fed*"], limits={"steps": 2, "gpus": 0})).steps == 2


def test_steps_that_code_does_not_tell_of_count_too(tmp_path: Path) -> None:
    journal, _ = opened(tmp_path, algorithm=f"{__name__}:Silent")
    with pytest.raises(RecipeRefused, match="steps: found 9, expected at most 5"):
        site_step(WORK, config(tmp_path, limits={"steps": 5}))
    assert journal.store.list("sites") == []


class Silent(FedAvg):
    kind: Literal["silent"] = "silent"

    def site_update(self, *args: Any) -> Any:
        update, state = super().site_update(*args)
        return replace(update, steps=9), state


@pytest.mark.parametrize(("there", "seen"), [(None, "0,1"), ("GPU-b,GPU-a,GPU-c", "GPU-b,GPU-a"), ("3", "3"), ("", "")])
def test_a_trainer_sees_as_many_devices_as_the_sites_limits_have(
    there: str | None, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that its worker sees."""
    monkeypatch.setenv(DEVICES, there or "")
    if there is None:
        monkeypatch.delenv(DEVICES)
    for _ in range(2):
        config(tmp_path, limits={"gpus": 2}).in_force()
        assert os.environ[DEVICES] == seen
    config(tmp_path).in_force()
    assert os.environ[DEVICES] == seen


def test_a_recipe_beyond_the_limits_is_shown_as_refused(tmp_path: Path) -> None:
    assert verdict(recipe(), config(tmp_path)) == "trained: this site reviews nothing"
    assert verdict(recipe(), config(tmp_path, algorithms=["scaffold"])).startswith("refused: algorithm: found 'fedavg'")


def closed(folder: Path) -> Journal:
    """A round of a swarm that every site has answered."""
    journal, plan = opened(folder, schedule="swarm")
    for site in SITES:
        site_step(WORK, config(folder, site))
    close_round(journal, plan, journal.openings(plan)[0], survey(journal, plan), why="every site answered")
    return journal


def test_a_site_aggregates_what_its_owner_has_approved_and_its_audit_log_has_it(tmp_path: Path) -> None:
    journal, log = closed(tmp_path), tmp_path / "audit.jsonl"
    before = set(journal.store.list("sites"))
    here = config(tmp_path, review={"approved": str(tmp_path / "approved")}, audit=str(log))
    with pytest.raises(RecipeRefused, match="nobody has approved it"):
        aggregation_step(SHARE, here)
    assert set(journal.store.list("sites")) == before and not log.exists()
    assert here.review is not None
    decide(recipe(schedule="swarm"), here.review, True)
    aggregation_step(SHARE, here)
    lines = list(read_audit(log))
    sent = {line["object"]: line["digest"] for line in lines}  # of what was made while it was sent, the second line
    assert set(sent) == set(journal.store.list("sites")) - before != set()
    assert sent == {key: digest(journal.store.get(key)) for key in sent}
    assert any(line["digest"] is None for line in lines)  # and that was on the disk before a byte was sent


# -- audit -------------------------------------------------------------------------------------------------------------
def test_everything_that_leaves_a_site_is_in_its_audit_log(tmp_path: Path) -> None:
    """Updates, their manifests, failures: exactly the objects under the site's prefix, with their bytes and digests."""
    log = tmp_path / "audit.jsonl"
    journal, _ = opened(tmp_path, **KNOWS)
    here = config(tmp_path, audit=str(log))
    site_step(WORK, here)
    site_journal(here, WORK).put_failure(failure_of(WORK, "site-1", UserError("no")))
    lines = list(read_audit(log))
    stored = {key: journal.store.get(key) for key in journal.store.list("sites")}
    assert {line["object"]: line["bytes"] for line in lines} == {key: len(data) for key, data in stored.items()}
    small = [line for line in lines if line["object"].endswith(".json")]
    assert len(small) == 2 and all(line["digest"] == digest(stored[line["object"]]) for line in small)
    assert all(line["digest"].partition(":")[2] in line["object"] for line in lines if line not in small)
    assert {(line["site"], line["run"], line["round"], line["phase"]) for line in lines} == {
        ("site-1", "run", 0, "train")
    }
    assert files(tmp_path / "states")  # what stays at the site is not in it
    site_step(WORK, here)
    assert list(read_audit(log)) == lines  # nothing was sent again
    assert list(read_audit(log, "other")) == []


def test_nothing_leaves_a_site_whose_audit_log_cannot_be_written(tmp_path: Path) -> None:
    journal, _ = opened(tmp_path)
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(UserError, match=r"audit: found .*nothing is sent"):
        site_step(WORK, config(tmp_path, audit=str(tmp_path / "audit.jsonl")))
    assert journal.store.list("sites") == []


# -- try ---------------------------------------------------------------------------------------------------------------
def test_a_recipe_is_tried_without_a_trace(tmp_path: Path) -> None:
    """The bytes that the site would send in the first round, from a store that is not even there; the real state stays."""
    here = config(tmp_path, store="s3://nowhere/at-all", audit=str(tmp_path / "audit.jsonl"))
    (tried,) = try_recipe(recipe(), here, str(tmp_path / "tried"), SITES)
    assert files(tmp_path / "states") == [] and not (tmp_path / "audit.jsonl").exists()
    journal = simulate(recipe(rounds=1), SITES, store=str(tmp_path / "real"), run="run")
    manifest = journal.manifest(0, "train")
    assert manifest is not None and tried.objection is None
    (key,) = [key for key in journal.store.list("sites/site-1") if key.endswith(".json")]
    sent = journal.update(key)
    assert {g: ref.digest for g, ref in tried.update.groups.items()} == {g: r.digest for g, r in sent.groups.items()}
    assert tried.row()["would_send"]["params"]["bytes"] == sent.groups["params"].size


@pytest.mark.parametrize(
    "fields",
    [
        {
            "quorum": 3,
            "required_sites": ["site-3"],
            "min_sites": 2,
            "checkpoint": "run:other",
            "evaluation": "no:Where",
        },
        {"schedule": {"kind": "sampled", "sites_per_round": 2}},
        {"algorithm": {"kind": "tests.builders:Bounded"}},
        {"federated_evaluation": True, "workload": "tests.builders:HeldOut"},
        {"algorithm": {"kind": "fedavg", "reduction": {"kind": "median"}}},
        KNOWS,
    ],
    ids=["of the server", "sampled", "two phases", "evaluated", "robust", "stateful"],
)
def test_whatever_else_a_recipe_asks_for_a_site_can_try_its_own_part(tmp_path: Path, fields: dict[str, Any]) -> None:
    wanted = recipe(**fields)
    tried = try_recipe(wanted, config(tmp_path), str(tmp_path / "tried"), SITES)
    assert [phase.phase for phase in tried] == list(wanted.phases)
    assert [phase.objection for phase in tried] == [None] * len(tried)


def test_a_site_is_told_of_whom_the_recipe_names_and_waits_for_nobody(tmp_path: Path) -> None:
    """Where others are named without whom it does not go on, the first phase is all that can be tried. No model need be allowed where none is."""
    turns = recipe(schedule={"kind": "cyclic", "sites": ["site-9", "site-1"]})
    assert [phase.phase for phase in try_recipe(turns, config(tmp_path), str(tmp_path / "turns"), SITES)] == ["train"]
    boosted = {"kind": "xgboost", "mode": "histogram", "tracker": {"site": "site-2", "host": "localhost", "port": 9091}}
    fields = {"name": "trees", "workload": "tests.builders:labelled", "rounds": 1, "algorithm": boosted}
    here = config(tmp_path, allowed_imports=["tests.builders"])
    (tried,) = try_recipe(Recipe.load(fields), here, str(tmp_path / "trees"))
    assert (tried.phase, tried.objection) == ("meet", None)


class Weightless(FedAvg):
    kind: Literal["weightless"] = "weightless"

    def weight(self, update: Update) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("fields", "objection"),
    [
        ({"algorithm": f"{__name__}:Weightless"}, "weight: found 0.0"),
        ({"training": {"steps": 9, "optimizer": {"lr": 1e30}}}, "not finite: "),
    ],
    ids=["weight", "numbers"],
)
def test_what_would_not_count_is_said(tmp_path: Path, fields: dict[str, Any], objection: str) -> None:
    (tried,) = try_recipe(recipe(**fields), config(tmp_path), str(tmp_path / "tried"), SITES)
    assert tried.objection is not None and tried.objection.startswith(objection)


def test_a_recipe_is_tried_with_what_the_site_allows_and_no_more(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="allowed_imports"):
        try_recipe(recipe(), config(tmp_path, allowed_imports=["hospital.*"]), str(tmp_path / "tried"), SITES)


def test_a_refused_recipe_is_excluded_with_the_reason(tmp_path: Path) -> None:
    """What the coordinator sees."""
    journal, plan = opened(tmp_path)
    reviewing = config(tmp_path, review={"approved": str(tmp_path / "approved")})
    with pytest.raises(RecipeRefused) as refused:
        site_step(WORK, reviewing)
    site_journal(reviewing, WORK).put_failure(failure_of(WORK, "site-1", refused.value))
    assert survey(journal, plan).accepted == {}
    told = journal.failure(plan, "site-1", 1, 1)
    assert told is not None and "is not approved here (nobody has approved it)" in told.reason
