"""Updates at the coordinator: what makes one valid, and how one is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedflow.algorithm import Algorithm
from fedflow.errors import StoreError, StoreUnavailable, UpdateInvalid
from fedflow.store.journal import MOST_OF_A_SITE, Journal, first_problem
from fedflow.store.objects import CHUNK_SIZE, ObjectRef
from fedflow.store.records import Contribution, ContributorSummary, Plan, UpdateManifest
from fedflow.store.state import read_outline
from fedflow.store.tensors import Part, TensorReader, file_order, read_spec
from fedflow.tensors import cast, non_finite
from fedflow.types import MODEL_GROUPS, Groups, SiteId, Spec, Tensors, TensorSpec, Update, spec_of

__all__ = ["Checks", "Contributor", "as_update", "problem_of", "rebased", "told"]

MOST_METRICS = 1000
LONGEST_NAME = 200  # characters of a metric's or a scalar's name
LONGEST_REASON = 2000  # characters


def as_update(manifest: UpdateManifest, tensors: Groups, round: int) -> Update:
    """A site's manifest as the algorithm sees it, with `tensors`, where it counts in `round`."""
    return Update(
        site=manifest.site,
        base_round=manifest.round,
        examples=manifest.examples,
        steps=manifest.steps,
        lr_sum=manifest.lr_sum,
        tensors=tensors,
        attempt=manifest.attempt,
        state_base=manifest.state_base,
        scalars=manifest.scalars,
        metrics={name: v for name, v in manifest.metrics.items() if v is not None},
        numerics=manifest.numerics,
        staleness=round - manifest.round,
    )


class Checks:
    """What makes an update of a plan valid, from its header: run, plan, base, state, weight, names, shapes, dtypes."""

    def __init__(self, journal: Journal, plan: Plan) -> None:
        self.journal, self.plan = journal, plan
        self.recipe = journal.recipe()
        self._spec: Spec | None = None
        openings = journal.openings(plan)
        self._rejected = set(openings[-1].rejected) if openings else set()

    def keys(self, site: SiteId) -> list[str]:
        """Manifests of `site` that could count, oldest base first; without those that did not in an earlier opening."""
        found = []
        for base in sorted(self.plan.accept_bases):
            keys = self.journal.store.list(self.journal.inbox(site, base, self.plan.phase))
            found += [key for key in keys if key.endswith(".json") and key not in self._rejected]
        return found

    @property
    def spec(self) -> Spec:
        if self._spec is None:
            algorithm = self.recipe.computation
            head = self.journal.head(algorithm.phases)
            assert head is not None
            state = read_outline(self.journal.store, algorithm.State, head.state)
            self._spec = algorithm.expects(state, self.plan.phase)
        return self._spec

    @cached_property
    def _counted(self) -> dict[SiteId, set[str]]:
        """Updates that counted in one of the earlier rounds whose updates may count now; the plan names each site's last one."""
        found: dict[SiteId, set[str]] = {}
        for round in self.plan.accept_bases if len(self.plan.accept_bases) > 2 else ():
            if round < self.plan.round and (manifest := self.journal.manifest(round, self.plan.phase)):
                for site, contributor in manifest.contributors.items():
                    found.setdefault(site, set()).add(contributor.update)
        return found

    def judge(self, site: SiteId, key: str) -> Contribution | str | None:
        """A contribution, or the reason why not; None for an update that counted in an earlier round, or may in a later one."""
        found = self._judged(site, key)
        return told(found) if isinstance(found, str) else found

    def _judged(self, site: SiteId, key: str) -> Contribution | str | None:
        try:
            update = self.journal.update(key, at_most=MOST_OF_A_SITE)
            if update.update_digest() in {self.plan.tasks[site].state_base, *self._counted.get(site, ())}:
                return None
            if self.plan.again and self._is_for_later(site, update):
                return None
            self._check_header(site, key, update)
            _check_weight(self.recipe.computation, as_update(update, {}, self.plan.round))
            self._check_tensors(key, update)
        except ValueError as error:
            return f"unreadable manifest {key}: {first_problem(error)}"
        except StoreUnavailable:
            raise
        except (UpdateInvalid, StoreError) as error:
            return str(error)
        return Contribution(key=key, update=update.update_digest(), base_round=update.round)

    def _is_for_later(self, site: SiteId, update: UpdateManifest) -> bool:
        """Whether it goes on from another update that is there, and is not the one that the plan's task goes on from: once that one counts,
        this one can."""
        before = update.state_base
        if before is None or before == self.plan.tasks[site].state_base:
            return False
        return any(before.partition(":")[2] in key for key in self.keys(site))

    def _check_header(self, site: SiteId, key: str, update: UpdateManifest) -> None:
        plan = self.plan
        expected = {"run": plan.run, "nonce": plan.nonce, "site": site, "phase": plan.phase}
        for field, value in expected.items():
            if getattr(update, field) != value:
                raise UpdateInvalid(f"{field}: found {getattr(update, field)!r}, expected {value!r}")
        known = update.round in plan.accept_bases and key.startswith(
            f"{self.journal.inbox(site, update.round, plan.phase)}/"
        )
        base = plan if update.round == plan.round else self.journal.plan(update.round, plan.phase) if known else None
        if not known or base is None:
            raise UpdateInvalid(f"base round: found {update.round}, expected one of {plan.accept_bases}")
        if update.plan != base.digest():
            raise UpdateInvalid(f"plan: found {update.plan}, expected {base.digest()}")
        if update.state_base != plan.tasks[site].state_base:
            raise UpdateInvalid(f"stale state: found {update.state_base}, expected {plan.tasks[site].state_base}")
        names = [*update.metrics, *update.scalars]
        if len(names) > MOST_METRICS or any(len(name) > LONGEST_NAME or not name.isprintable() for name in names):
            raise UpdateInvalid(
                f"metrics: found {len(names)} of them, expected at most {MOST_METRICS}, with printable names of at most {LONGEST_NAME} characters"
            )
        if update.update_digest().partition(":")[2] not in key:
            raise UpdateInvalid(f"digest: found {update.update_digest()}, expected the one that names {key}")

    def _check_tensors(self, key: str, update: UpdateManifest) -> None:
        own = f"sites/{update.site}/{self.plan.run}/"
        _check_groups(update.groups, self.spec)
        for group, ref in update.groups.items():
            if not ref.key.startswith(own):
                raise UpdateInvalid(f"{group}: found an object outside {own}: {ref.key}")
            expected = self.spec[group]
            self._check_size(group, ref, expected)
            found = read_spec(self.journal.store, ref, largest_header=_largest_header(expected))
            _check_spec(group, found, expected, self.recipe.computation)
            if list(found) != file_order(found):  # else a part might be anywhere in it, and reading it take for ever
                raise UpdateInvalid(f"{group}: found its tensors in another order than safetensors.torch.save writes")

    def _check_size(self, group: str, ref: ObjectRef, expected: Mapping[str, TensorSpec]) -> None:
        """Nothing is read that could not be an update: a reference says how much of an object is held in memory at once."""
        most = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in expected.values())
        most += 8 + _largest_header(expected)
        if ref.size > most or ref.chunk_size != CHUNK_SIZE:
            raise UpdateInvalid(
                f"{group}: found an object of {ref.size} bytes in chunks of {ref.chunk_size}, expected at most {most} in chunks of {CHUNK_SIZE}"
            )


def rebased(tensors: Tensors, then: Tensors, now: Tensors) -> dict[str, Tensor]:
    """y + (x_now − x_then), in float64, rounded once: what a site learnt from `then`, moved to `now`."""
    return {
        name: y if y.dtype == torch.bool else cast(y.double() + (now[name].double() - then[name].double()), y.dtype)
        for name, y in tensors.items()
    }


def problem_of(update: Update, expects: Spec, algorithm: Algorithm) -> str | None:
    """Why an update in memory cannot count, whatever its numbers; None if it can."""
    try:
        _check_weight(algorithm, update)
        _check_groups(update.tensors, expects)
        for group, tensors in update.tensors.items():
            if not _fits(tensors, expects[group]):
                _check_spec(group, spec_of({group: tensors})[group], expects[group], algorithm)
        if bad := [name for name, value in update.scalars.items() if not math.isfinite(value)]:
            raise UpdateInvalid(f"scalars: found {update.scalars[bad[0]]!r} as {bad[0]}, expected a finite number")
    except UpdateInvalid as error:
        return str(error)
    return None


def _fits(found: Tensors, expected: Mapping[str, TensorSpec]) -> bool:
    """Whether these are all of them, as they should be."""
    return len(found) == len(expected) and all(
        name in expected and tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
        for name, tensor in found.items()
    )


def _check_weight(algorithm: Algorithm, update: Update) -> None:
    try:
        weight = algorithm.weight(update)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UpdateInvalid(f"weight: cannot be computed from what was sent: {error!r}") from error
    if isinstance(weight, bool) or not math.isfinite(weight) or weight <= 0:
        raise UpdateInvalid(
            f"weight: found {weight!r} (examples {update.examples}, steps {update.steps}), expected a finite number above 0"
        )


def _check_groups(found: Collection[str], expected: Collection[str]) -> None:
    if set(found) != set(expected):
        raise UpdateInvalid(f"groups: found {sorted(found)}, expected {sorted(expected)}")


def _check_spec(
    group: str, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec], algorithm: Algorithm
) -> None:
    missing = [] if algorithm.partial_updates else sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing or extra:
        raise UpdateInvalid(f"names in {group}: missing {missing[:5]}, unexpected {extra[:5]}")
    for name, spec in found.items():
        if not expected[name].admits(spec):
            raise UpdateInvalid(f"{group}/{name}: found {spec}, expected {expected[name]}")


def _largest_header(expected: Mapping[str, TensorSpec]) -> int:
    """Bytes, with names escaped as JSON allows it and some metadata."""
    return sum(6 * len(name.encode()) + 24 * len(spec.shape) + 128 for name, spec in expected.items()) + 1024


def told(reason: str) -> str:
    """A reason that may quote a site, fit for a record that everybody reads."""
    return reason.encode("utf-8", "backslashreplace").decode()[:LONGEST_REASON]


@dataclass(frozen=True)
class Contributor:
    """One update that counts, read a bucket at a time, every byte verified."""

    journal: Journal
    plan: Plan
    contribution: Contribution

    @cached_property
    def manifest(self) -> UpdateManifest:
        key = self.contribution.key
        try:
            manifest: UpdateManifest = self._verified(self.journal.update, key, at_most=MOST_OF_A_SITE)
        except ValueError as error:
            raise self._invalid(f"{key}: {first_problem(error)}") from error
        if manifest.update_digest() != self.contribution.update:
            raise self._invalid(
                f"{self.contribution.key}: found {manifest.update_digest()}, expected {self.contribution.update}"
            )
        return manifest

    @cached_property
    def _readers(self) -> dict[str, TensorReader]:
        store = self.journal.store
        return {group: self._verified(TensorReader, store, ref) for group, ref in self.manifest.groups.items()}

    @property
    def spec(self) -> Spec:
        """Groups, names, shapes and dtypes, of what was sent."""
        return {group: reader.spec for group, reader in self._readers.items()}

    @cached_property
    def names(self) -> set[str]:
        """Of all groups."""
        return {name for tensors in self.spec.values() for name in tensors}

    def load(self, part: Part) -> Update:
        """The update with those tensors, or rows of them; one that started from an older round is moved to this round's
        broadcast. Parts that come in the order of the files are read once; what was read is verified when `finish` returns."""
        groups = {group: self._verified(reader.read, part) for group, reader in self._readers.items()}
        if bad := non_finite(groups):
            raise self._invalid(f"not finite: {bad}")
        if self.contribution.base_round != self.plan.round:
            groups = self._rebased(groups, part)
        return as_update(self.manifest, groups, self.plan.round)

    @property
    def bare(self) -> Update:
        """The update without tensors."""
        return as_update(self.manifest, {}, self.plan.round)

    def finish(self) -> None:
        """Verify what was loaded and is not verified yet. Raises UpdateInvalid."""
        for reader in self._readers.values():
            self._verified(reader.finish)
        for then, now in self._bases.values():
            then.finish()
            now.finish()

    @cached_property
    def _bases(self) -> dict[str, tuple[TensorReader, TensorReader]]:
        """Group of the model -> the broadcast that the update started from, and this round's, where they are other ones."""
        if self.contribution.base_round == self.plan.round:
            return {}
        base = self.journal.plan(self.contribution.base_round, self.plan.phase)
        assert base is not None
        store, then, now = self.journal.store, base.broadcast, self.plan.broadcast
        both = [group for group in MODEL_GROUPS if group in self.manifest.groups and group in then]
        return {group: (TensorReader(store, then[group]), TensorReader(store, now[group])) for group in both}

    def _rebased(self, groups: Groups, part: Part) -> dict[str, dict[str, Tensor]]:
        """y + (x_now − x_then) for the model's groups; all others are differences, whatever they are called, and stay."""
        moved = {group: dict(tensors) for group, tensors in groups.items()}
        for group, readers in self._bases.items():
            then, now = (reader.read({name: part[name] for name in groups[group]}) for reader in readers)
            moved[group] = rebased(groups[group], then, now)
        return moved

    def _verified(self, read: Any, *args: Any, **options: Any) -> Any:
        """What the site's own objects give: whatever is wrong with them is the site's fault, an outage nobody's."""
        try:
            return read(*args, **options)
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise self._invalid(str(error)) from error

    def _invalid(self, reason: str) -> UpdateInvalid:
        site = self.contribution.key.split("/")[1]
        return UpdateInvalid(told(reason), run=self.plan.run, round=self.plan.round, site=site)

    def summary(self, weight: float) -> ContributorSummary:
        m = self.manifest
        return ContributorSummary(
            update=self.contribution.update,
            base_round=m.round,
            weight=weight,
            examples=m.examples,
            steps=m.steps,
            lr_sum=m.lr_sum,
            metrics=m.metrics,
            seconds=m.seconds,
            bytes=sum(ref.size for ref in m.groups.values()),
            received=m.received,
            peak_rss=m.peak_rss,
            attempt=m.attempt,
            numerics=m.numerics,
            training_state=m.training_state,
        )
