"""The journal's records: canonical JSON with a digest of its own, and nothing else is one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflow.errors import ObjectCorrupt, RunMissing
from fedflow.store import records
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.records import Closing, Contribution, Failure, Opening, Plan, TaskRecord, UpdateManifest, finite
from fedflow.types import canonical_json

NOW = datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
REF = ObjectRef.of("sites/a/run/00000/train/x.safetensors", b"tensors")
PLAN = Plan(
    run="run",
    nonce="0" * 32,
    round=0,
    phase="train",
    parent="blake3:" + "1" * 64,
    broadcast={"params": REF},
    tasks={"a": TaskRecord(), "b": TaskRecord(steps=3, overrides={"lr": 0.1})},
    quorum=2,
    accept_bases=[0],
    late="drop",
    amendments=0,
    num_sites=2,
)
UPDATE = UpdateManifest(
    run="run",
    nonce="0" * 32,
    site="a",
    round=0,
    phase="train",
    plan=PLAN.digest(),
    state_base=None,
    examples=10,
    steps=2,
    lr_sum=0.2,
    groups={"params": REF},
    metrics={"loss": 0.5, "bad": None},
    numerics={"threads": 1},
)
OPENING = Opening(number=1, opened=NOW, deadline=NOW, why="start", quorum=2, required=["a"])
CLOSING = Closing(
    opening=1,
    closed=NOW,
    why="deadline",
    quorum=1,
    quorate=True,
    contributors={"a": Contribution(key="k", update="u", base_round=0)},
    excluded={"b": "no update by the deadline"},
)
ALL = [PLAN, UPDATE, OPENING, CLOSING]


@pytest.mark.parametrize("record", ALL, ids=lambda r: type(r).__name__)
def test_a_record_comes_back_as_it_was(record: Any) -> None:
    again = type(record).from_bytes(record.to_bytes())
    assert again == record and again.to_bytes() == record.to_bytes()


@pytest.mark.parametrize("record", ALL, ids=lambda r: type(r).__name__)
def test_its_digest_is_blake3_of_its_canonical_json(record: Any) -> None:
    fields = json.loads(record.to_bytes())
    digest = fields.pop("digest")
    assert digest == record.digest() == f"blake3:{blake3(canonical_json(fields)).hexdigest()}"


@pytest.mark.parametrize("record", ALL, ids=lambda r: type(r).__name__)
@settings(max_examples=150)
@given(data=st.data())
def test_no_byte_of_a_record_can_change_unseen(record: Any, data: st.DataObject) -> None:
    good = record.to_bytes()
    at, byte = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 255))
    if byte != good[at]:
        with pytest.raises(ValueError):
            type(record).from_bytes(good[:at] + bytes([byte]) + good[at + 1 :])


@settings(max_examples=200)
@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_any_other_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        UpdateManifest.from_bytes(data)


def test_a_record_in_another_spelling_is_none() -> None:
    """Spaces, another order, a field twice: one record has one spelling."""
    good = OPENING.to_bytes()
    for other in (
        good + b"\n",
        json.dumps(json.loads(good)).encode(),
        good.replace(b'"number":1', b'"number":2,"number":1'),
    ):
        with pytest.raises(ValueError, match="not the canonical JSON of a record"):
            Opening.from_bytes(other)


@pytest.mark.parametrize("field", ["opening", "attempt", "seconds", "peak_rss", "numerics", "fedflow"])
def test_an_update_is_the_same_whichever_attempt_made_it(field: str) -> None:
    other = {"opening": 2, "attempt": 3, "seconds": 9.0, "peak_rss": 5, "numerics": {}, "fedflow": "9"}
    assert UPDATE.model_copy(update={field: other[field]}).update_digest() == UPDATE.update_digest()


@pytest.mark.parametrize(
    "changes",
    [{"examples": 11}, {"state_base": "u"}, {"lr_sum": 0.3}, {"groups": {}}, {"scalars": {"a": 1.0}}, {"state": "s"}],
    ids=str,
)
def test_an_update_is_another_if_anything_else_differs(changes: dict[str, Any]) -> None:
    assert UPDATE.model_copy(update=changes).update_digest() != UPDATE.update_digest()


def test_metrics_lose_what_json_has_not() -> None:
    assert finite({"a": 1, "b": float("nan"), "c": float("inf"), "d": True}) == {
        "a": 1.0,
        "b": None,
        "c": None,
        "d": 1.0,
    }


def test_every_record_is_frozen_and_takes_no_unknown_field() -> None:
    classes = [c for name in records.__all__ if isinstance(c := getattr(records, name), type)]
    assert len(classes) > 10
    assert all({"frozen": True, "extra": "forbid"}.items() <= c.model_config.items() for c in classes)  # type: ignore[attr-defined]


# -- the journal -------------------------------------------------------------------------------------------------------
def journal(tmp_path: Path) -> Journal:
    return Journal(ObjectStore(str(tmp_path)), "run")


def test_the_second_writer_gets_what_the_first_wrote(tmp_path: Path) -> None:
    here = journal(tmp_path)
    assert here.put_plan(PLAN) == PLAN
    assert here.put_plan(PLAN.model_copy(update={"quorum": 1})) == PLAN == here.plan(0, "train")


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    here = journal(tmp_path)
    assert here.plan(0, "train") is here.manifest(0, "train") is here.evaluation(0) is here.closing(PLAN, 1) is None
    assert here.openings(PLAN) == here.attempts(PLAN) == here.committed() == here.outcomes() == []
    assert here.head(("train",)) is None and not here.is_closed(PLAN, 1)
    with pytest.raises(RunMissing, match="'run'"):
        here.record()


def test_the_closing_in_force_is_the_last_revision(tmp_path: Path) -> None:
    here = journal(tmp_path)
    for revision in (0, 1, 2):
        here.put_closing(PLAN, CLOSING.model_copy(update={"revision": revision}))
    here.put_closing(PLAN, CLOSING.model_copy(update={"opening": 2}))
    assert here.closing(PLAN, 1) == CLOSING.model_copy(update={"revision": 2})
    assert [(c.opening, c.revision) for c in here.closings(PLAN)] == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert here.is_closed(PLAN, 1) and not here.is_closed(PLAN, 3)


def test_openings_are_in_their_order_also_from_the_tenth_on(tmp_path: Path) -> None:
    here = journal(tmp_path)
    for number in range(12, 0, -1):
        here.put_opening(PLAN, OPENING.model_copy(update={"number": number}))
    assert [o.number for o in here.openings(PLAN)] == list(range(1, 13))


def test_a_damaged_record_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    here = journal(tmp_path)
    here.put_plan(PLAN)
    here.store.put("public/run/rounds/00000/train/plan.json", b"{}", mode="overwrite")
    with pytest.raises(
        ObjectCorrupt,
        match=r"public/run/rounds/00000/train/plan\.json: found .*expected a Plan as it was written; restore it",
    ):
        here.plan(0, "train")


def test_a_sites_word_on_its_failure_is_taken_if_it_can_be_read(tmp_path: Path) -> None:
    """A site writes it: whatever it writes, the coordinator goes on."""
    here = journal(tmp_path)
    said = Failure(site="a", round=0, phase="train", opening=1, attempt=1, reason="disk full", heals=True)
    assert here.failure(PLAN, "a", 1, 1) is None
    here.put_failure(said)
    assert here.failure(PLAN, "a", 1, 1) == said
    here.store.put("sites/a/run/failures/00000.train.1.2.json", b"[" * 100_000)
    assert here.failure(PLAN, "a", 1, 2) is None
