"""What of a run must be kept, what need not be, and whether what is kept is as it was written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fedflow.engine.best import best_round, key_metrics
from fedflow.errors import ObjectCorrupt, ObjectMissing, StoreError, StoreUnavailable
from fedflow.store.journal import INITIAL, MOST_OF_A_SITE, Journal
from fedflow.store.objects import ObjectRef
from fedflow.store.reading import Reader
from fedflow.store.records import Closing, Manifest, Plan, UpdateManifest

__all__ = ["Checked", "Policy", "check_run", "drop", "garbage"]


@dataclass(frozen=True)
class Policy:
    """Which committed rounds keep their objects. The newest commit always does, whatever this says.

    last:  so many of the newest; every: those whose number is a multiple of it; best: the one with the best key metric
    """

    last: int = 1
    every: int | None = None
    best: bool = True


def garbage(journal: Journal, policy: Policy) -> dict[str, str]:
    """Objects of the run that nobody needs to go on with it -> why. Records, which are small, are history and not among them.

    Safe while the run goes on: the store is listed before the journal is read, an object that belongs to an aggregation
    under way is not touched, nor is an update that may still count.
    """
    there = _objects(journal)
    manifests = _manifests(journal)
    if not manifests:
        return {}  # the initial state is being written
    plans = [plan for r, phase in _planned(journal) if (plan := journal.plan(r, phase))]
    committed = {(m.round, m.phase) for m in manifests}
    aggregating = any(c.quorate for p in plans if (p.round, p.phase) not in committed for c in journal.closings(p))
    chosen = _chosen(journal, policy, manifests)
    kept = {ref.key for m in manifests if m.round in chosen for ref in m.objects()}
    of_updates = {key for m in manifests if m.round in chosen for key in _update_keys(journal, _closing(journal, m))}
    kept |= {
        key for key in there if key in of_updates or key.startswith(tuple(k for k in of_updates if k.endswith("/")))
    }
    oldest = _oldest_base(plans, committed)
    kept |= {ref.key for plan in plans if plan.round >= oldest for ref in plan.broadcast.values()}
    named = {ref.key for m in manifests for ref in m.objects()}
    found = {}
    for key in there:
        sent = re.match(r"sites/[^/]+/[^/]+/(\d+)/", key)
        if key in kept or (sent and int(sent[1]) >= oldest) or (not sent and key not in named and aggregating):
            continue
        found[key] = "superseded" if key in named or sent else "orphan"
    return found


def drop(journal: Journal, keys: Iterable[str]) -> None:
    """Delete these objects."""
    for key in keys:
        journal.store.delete(key)


def _objects(journal: Journal) -> list[str]:
    prefixes = [f"{journal.public}/objects", f"{journal.server}/objects"]
    prefixes += [journal.workshop(name) for name in (*journal.sites(), *journal.recipe().schedule.regional)]
    return [key for prefix in prefixes for key in journal.store.list(prefix) if key.endswith(".safetensors")]


def _manifests(journal: Journal) -> list[Manifest]:
    """Every commit, the initial one first."""
    steps = [(INITIAL, "initial"), *journal.committed()]
    return [manifest for step in steps if (manifest := journal.manifest(*step))]


def _planned(journal: Journal) -> list[tuple[int, str]]:
    """Rounds and phases with a plan, in the order in which they were planned."""
    keys, phases = journal.store.list(f"{journal.public}/rounds"), journal.recipe().phases
    found = (re.search(r"/rounds/(\d+)/([^/]+)/plan\.json$", key) for key in keys)
    return sorted(((int(m[1]), m[2]) for m in found if m), key=lambda step: (step[0], phases.index(step[1])))


def _chosen(journal: Journal, policy: Policy, manifests: list[Manifest]) -> set[int]:
    """The rounds that keep their objects."""
    rounds = sorted({m.round for m in manifests})
    chosen = {rounds[-1], *rounds[len(rounds) - policy.last :]} if policy.last else {rounds[-1]}
    if policy.every:
        chosen |= {r for r in rounds if r >= 0 and r % policy.every == 0}
    recipe = journal.recipe()
    if policy.best and (best := best_round(key_metrics(journal, recipe), recipe)) is not None:
        chosen.add(best)
    return chosen


def _oldest_base(plans: list[Plan], committed: set[tuple[int, str]]) -> int:
    """The oldest round that an update may start from which is still to count, in a plan that is not committed or in the next."""
    waiting = [plan.accept_bases[0] for plan in plans if (plan.round, plan.phase) not in committed]
    if waiting or not plans:
        return min(waiting, default=0)
    oldest = plans[-1].accept_bases[0]
    return oldest + int(oldest > 0)  # from 0 on it may only seem to be the oldest


def _closing(journal: Journal, manifest: Manifest) -> Closing | None:
    plan = journal.plan(manifest.round, manifest.phase) if manifest.closing else None
    found = journal.closings(plan) if plan else []
    return next((c for c in found if c.digest() == manifest.closing_digest), None)


def _update_keys(journal: Journal, closing: Closing | None) -> Iterator[str]:
    """Objects of the updates that a closing counts; the folder of an update whose manifest cannot be read."""
    for contribution in closing.contributors.values() if closing else ():
        try:
            update = UpdateManifest.from_bytes(journal.store.get(contribution.key, at_most=MOST_OF_A_SITE))
        except StoreUnavailable:
            raise
        except (ValueError, StoreError):
            yield contribution.key.rpartition("/")[0] + "/"
        else:
            yield from (ref.key for ref in update.groups.values())


# -- checking ----------------------------------------------------------------------------------------------------------
@dataclass
class Checked:
    """What `check_run` found. missing: objects of rounds that are superseded; problems: anything that should not be."""

    objects: int = 0
    bytes: int = 0
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_run(journal: Journal) -> Checked:
    """Read every object that a commit names, byte by byte, and follow the chain of the commits. Memory holds a chunk's part.

    The updates that a commit was made of are not read: it does not rest upon them any more.
    """
    found, seen = Checked(), set[ObjectRef]()
    manifests = _in_order(_manifests(journal), journal.recipe().phases)
    for before, after in zip([None, *manifests], manifests, strict=False):
        name = f"round {after.round}, {after.phase}"
        if after.parent != (expected := before.digest() if before else None):
            found.problems.append(f"{name}: found the parent {after.parent}, expected {expected}")
        if after.closing and _closing(journal, after) is None:
            found.problems.append(f"{name}: found no closing {after.closing_digest}, expected it at {after.closing}")
        for ref in after.objects():
            if ref not in seen:
                seen.add(ref)
                _check_object(journal, ref, found)
    newest = {ref.key for ref in manifests[-1].objects()} if manifests else set()
    lost = [key for key in found.missing if key in newest]
    found.problems += [
        f"{key}: found nothing there, expected an object of the newest commit; restore it" for key in lost
    ]
    found.missing = [key for key in found.missing if key not in newest]
    return found


def _in_order(manifests: list[Manifest], phases: tuple[str, ...]) -> list[Manifest]:
    return sorted(manifests, key=lambda m: (m.round, phases.index(m.phase) if m.phase in phases else -1))


def _check_object(journal: Journal, ref: ObjectRef, found: Checked) -> None:
    try:
        Reader(journal.store, ref).verify()
        found.objects, found.bytes = found.objects + 1, found.bytes + ref.size
    except ObjectMissing:
        found.missing.append(ref.key)
    except ObjectCorrupt as error:
        found.problems.append(str(error))
