"""What of a run is kept, what may go, and what is found to be damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflow.engine import read_model
from fedflow.engine.retention import Policy, check_run, drop, garbage
from fedflow.errors import ObjectMissing
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.testing.faults import fail_at
from fedflow.types import RoundContext
from tests.builders import OBJECTS, Bounded, bits, flip, head, in_child, keys, path_of, recipe, run, run_with


def kept_models(journal: Journal, rounds: int) -> list[int]:
    """Rounds whose model can still be read."""
    found = []
    for number in range(rounds):
        manifest = journal.manifest(number, "train")
        assert manifest is not None
        try:
            read_model(journal, manifest)
        except ObjectMissing:
            continue
        found.append(number)
    return found


@settings(max_examples=12)
@given(st.integers(1, 6), st.none() | st.integers(1, 4))
def test_the_rounds_of_the_policy_are_kept_and_no_others(last: int, every: int | None) -> None:
    journal = run(recipe(rounds=5), f"memory://policy-{last}-{every}")
    drop(journal, garbage(journal, Policy(last, every, best=False)))
    expected = {n for n in range(5) if n >= 5 - last or (every and n % every == 0)}
    assert kept_models(journal, 5) == sorted(expected)
    assert garbage(journal, Policy(last, every, best=False)) == {}
    assert check_run(journal).problems == []


def test_the_best_round_is_kept(tmp_path: Path) -> None:
    journal = run(recipe(rounds=4, evaluation="tests.builders:HeldOut", key_metric={"name": "loss", "mode": "max"}))
    drop(journal, garbage(journal, Policy()))
    losses = [e.metrics["loss"] for n in range(4) if (e := journal.evaluation(n))]
    assert kept_models(journal, 4) == sorted({losses.index(max(losses)), 3})


def test_a_run_goes_on_to_the_same_bytes_from_what_is_kept(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"algorithm": "scaffold", "rounds": 4}
    expected = bits(run(recipe(**fields)))
    store = str(tmp_path / "store")
    for rounds in (1, 2, 4):
        journal = run(recipe(**{**fields, "rounds": rounds}), store)
        assert drop(journal, found := garbage(journal, Policy(best=False))) is None and (found or rounds == 1)
    assert bits(journal) == expected


@pytest.mark.parametrize("step", ["update objects", "update manifest", "closing", "server objects", "manifest"])
def test_whatever_a_killed_process_leaves_does_no_harm_and_does_not_stay(step: Any, tmp_path: Path) -> None:
    store, fields = str(tmp_path / "store"), {"algorithm": "scaffold", "rounds": 2}
    expected = bits(run(recipe(**fields)))
    assert in_child(run_with, fail_at(step, round=1 if step != "server objects" else None), fields, store, {}) == -9
    drop(opened(store), garbage(opened(store), Policy(best=False)))
    journal = run(recipe(**fields), store)
    assert bits(journal) == expected
    drop(journal, garbage(journal, Policy(best=False)))
    named = {ref.key for ref in head(journal).objects()}
    assert {key for key in keys(journal.store, OBJECTS) if not key.startswith("sites/")} == named


class Wished(Bounded):
    """`Bounded` whose phases are not in the order of their names."""

    kind: Any = "wished"
    phases: ClassVar[tuple[str, ...]] = ("wish", "train")

    def expects(self, state: Any, phase: str) -> Any:
        return super().expects(state, phase.replace("wish", "bound"))

    def server_update(self, state: Any, aggregate: Any, ctx: RoundContext) -> Any:
        return super().server_update(state, aggregate, replace(ctx, phase=ctx.phase.replace("wish", "bound")))

    def site_update(self, broadcast: Any, site_state: Any, work: Any, ctx: RoundContext) -> Any:
        return super().site_update(broadcast, site_state, work, replace(ctx, phase=ctx.phase.replace("wish", "bound")))


def test_updates_of_a_phase_that_is_being_aggregated_are_kept(tmp_path: Path) -> None:
    store, fields = str(tmp_path / "store"), {"algorithm": "tests.engine.test_retention:Wished", "rounds": 2}
    expected = bits(run(recipe(**fields)))
    assert in_child(run_with, fail_at("manifest", round=1, nth=2), fields, store, {}) == -9
    found = garbage(opened(store), Policy(best=False))
    drop(opened(store), found)
    assert found and not any("/00001/train/" in key for key in found)
    assert bits(run(recipe(**fields), store)) == expected


def opened(store: str) -> Journal:
    return Journal(ObjectStore(store), "run")


def test_what_nobody_names_is_an_orphan() -> None:
    journal = run(recipe(rounds=1))
    journal.store.put("public/run/objects/" + "0" * 64 + ".safetensors", b"left")
    assert garbage(journal, Policy(last=9)) == {"public/run/objects/" + "0" * 64 + ".safetensors": "orphan"}


def test_damage_in_any_object_and_a_lost_one_are_found(tmp_path: Path) -> None:
    journal = run(recipe(rounds=2), str(tmp_path))
    whole = check_run(journal)
    assert whole.problems == whole.missing == [] and whole.objects > 2
    for ref in head(journal).objects():
        path = path_of(journal.store, ref.key)
        data = flip(path)
        assert [ref.key in problem for problem in check_run(journal).problems] == [True]
        path.unlink()
        assert any(f"{ref.key}: found nothing there" in problem for problem in check_run(journal).problems)
        path.write_bytes(data)
