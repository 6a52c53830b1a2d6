"""The journal of a run: which records exist, and where. Every write is create-only; the loser adopts the winner's.

public/<run>/run.json, amendments/<n>.json, rounds/<r>/<phase>/{plan.json, open/<k>.json, closed/<k>[.<j>].json}
public/<run>/objects/        what sites may see
server/<run>/rounds/<r>/<phase>/{attempts/…, manifest.json}, rounds/<r>/evaluation.json, initial/manifest.json
server/<run>/objects/        what they may not
sites/<site>/<run>/<r>/<phase>/<digest>.{json,safetensors}
sites/<workplace>/<run>/{aggregated,objects}/<digest>.{json,safetensors}   what is aggregated there
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from pydantic import ValidationError

from fedflow.errors import (
    ObjectCorrupt,
    ObjectExists,
    ObjectMissing,
    RunMissing,
    SignatureInvalid,
    UserError,
    field_error,
)
from fedflow.recipe import NAME, Recipe, explain
from fedflow.store.objects import ObjectStore
from fedflow.store.records import (
    Amendment,
    Attempt,
    Closing,
    Evaluation,
    Failure,
    Manifest,
    Opening,
    Outcome,
    Plan,
    Reduced,
    RunRecord,
    UpdateManifest,
    _Record,
)
from fedflow.store.signing import COORDINATOR_KEY, Keys, is_signed_by, message
from fedflow.types import SiteId

__all__ = ["INITIAL", "Journal", "list_runs"]

R = TypeVar("R", bound=_Record)

INITIAL = -1
"""The "round" of the manifest that holds the state before round 0."""


MOST_OF_A_SITE = 16 << 20
"""Bytes of a record that a site has written; the digests of an object of 1 TiB take 5 MiB."""


def step_path(round: int, phase: str) -> str:
    return f"{round:05d}/{phase}"


class Journal:
    """The journal of one run in a store. Records are read again on every call: another process may have written them.

    keys: what is written is signed with, and who must have signed what is read; default: the coordinator's, if it has any
    """

    def __init__(self, store: ObjectStore, run: str, keys: Keys | None = None) -> None:
        self.store, self.run = store, run
        self.keys = Keys.here() if keys is None else keys
        self.public, self.server = f"public/{run}", f"server/{run}"

    # -- the run
    def create(self, record: RunRecord) -> RunRecord:
        return self._create(f"{self.public}/run.json", record)

    def record(self) -> RunRecord:
        """Raises RunMissing."""
        found = self._read(f"{self.public}/run.json", RunRecord)
        if found is None:
            raise RunMissing(
                f"run: found no run {self.run!r} in {self.store.url}; `fedflow runs ls` shows those that are there"
            )
        return found

    def amend(self, amendment: Amendment) -> Amendment:
        self.__dict__.pop("pins", None)
        return self._create(f"{self.public}/amendments/{amendment.number:05d}.json", amendment)

    def amendments(self) -> list[Amendment]:
        return self._read_all(f"{self.public}/amendments", Amendment)

    def recipe(self, context: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe with every amendment. context: as for `Recipe.model_validate`."""
        fields: dict[str, Any] = dict(self.record().recipe)
        for amendment in self.amendments():
            fields |= amendment.recipe
        return Recipe.model_validate(fields, context=dict(context or {}))

    def sites(self) -> list[SiteId]:
        """Every site of the federation, in order."""
        joined = [site for amendment in self.amendments() for site in amendment.sites]
        return sorted({*self.record().sites, *joined})

    @cached_property
    def begun(self) -> RunRecord:
        """`record()`, read once: it never changes."""
        return self.record()

    @cached_property
    def pins(self) -> dict[SiteId, str]:
        """Site -> the public key of who must have signed its records, with every amendment; read once. Raises RunMissing."""
        amended = [amendment.keys for amendment in self.amendments()]
        return {site: key for keys in (self.begun.keys, *amended) for site, key in keys.items()}

    # -- a round's phase
    def plan(self, round: int, phase: str) -> Plan | None:
        return self._read(f"{self._step(round, phase)}/plan.json", Plan)

    def put_plan(self, plan: Plan) -> Plan:
        return self._create(f"{self._step(plan.round, plan.phase)}/plan.json", plan)

    def openings(self, plan: Plan) -> list[Opening]:
        return sorted(self._read_all(f"{self._step(plan.round, plan.phase)}/open", Opening), key=lambda o: o.number)

    def put_opening(self, plan: Plan, opening: Opening) -> Opening:
        return self._create(f"{self._step(plan.round, plan.phase)}/open/{opening.number}.json", opening)

    def closing(self, plan: Plan, opening: int) -> Closing | None:
        """The closing in force of an opening: its last revision."""
        found = [c for c in self.closings(plan) if c.opening == opening]
        return max(found, key=lambda c: c.revision, default=None)

    def is_closed(self, plan: Plan, opening: int) -> bool:
        """Whether an opening has a closing: one request."""
        return self.store.exists(f"{self._step(plan.round, plan.phase)}/closed/{opening}.json")

    def closings(self, plan: Plan) -> list[Closing]:
        found = self._read_all(f"{self._step(plan.round, plan.phase)}/closed", Closing)
        return sorted(found, key=lambda c: (c.opening, c.revision))

    def closing_key(self, plan: Plan, closing: Closing) -> str:
        revision = f".{closing.revision}" if closing.revision else ""
        return f"{self._step(plan.round, plan.phase)}/closed/{closing.opening}{revision}.json"

    def put_closing(self, plan: Plan, closing: Closing) -> Closing:
        return self._create(self.closing_key(plan, closing), closing)

    def put_attempt(self, plan: Plan, attempt: Attempt) -> Attempt:
        name = f"{attempt.opening}.{attempt.site}.{attempt.attempt}"
        return self._create(f"{self._server_step(plan.round, plan.phase)}/attempts/{name}.json", attempt)

    def attempts(self, plan: Plan) -> list[Attempt]:
        return self._read_all(f"{self._server_step(plan.round, plan.phase)}/attempts", Attempt)

    # -- aggregations elsewhere than at the coordinator
    def put_delegation(self, plan: Plan, part: str, attempt: Attempt) -> Attempt:
        """Note, before it is sent, whom the aggregation of `part` is sent to next."""
        return self._create(f"{self._delegations(plan, part)}/{attempt.attempt:05d}.json", attempt)

    def delegations(self, plan: Plan, part: str) -> list[Attempt]:
        return sorted(self._read_all(self._delegations(plan, part), Attempt), key=lambda a: a.attempt)

    def _delegations(self, plan: Plan, part: str) -> str:
        return f"{self._server_step(plan.round, plan.phase)}/delegations/{part}"

    def workshop(self, workplace: str) -> str:
        """The prefix of what aggregations at a site, or at a regional aggregator, write."""
        return f"sites/{workplace}/{self.run}"

    def put_reduced(self, reduced: Reduced) -> Reduced:
        return self._create(self._reduced(reduced.workplace, reduced.of), reduced)

    def reduced(self, workplace: str, of: str) -> Reduced | None:
        """What an aggregation came to; None where there is nothing, or nothing that can be read. Raises SignatureInvalid where
        who did it has not signed it as the run asks for it."""
        with contextlib.suppress(ObjectCorrupt):
            return self._read(self._reduced(workplace, of), Reduced)
        return None

    def _reduced(self, workplace: str, of: str) -> str:
        return f"{self.workshop(workplace)}/aggregated/{of.partition(':')[2]}.json"

    # -- what the sites say
    def put_failure(self, failure: Failure) -> Failure:
        key = self._failure(failure.site, failure.round, failure.phase, failure.opening, failure.attempt)
        return self._create(key, failure)

    def failure(self, plan: Plan, site: SiteId, opening: int, attempt: int) -> Failure | None:
        """What the site said of an attempt that failed; None if it said nothing, or nothing that can be read."""
        with contextlib.suppress(ObjectCorrupt, SignatureInvalid):
            return self._read(self._failure(site, plan.round, plan.phase, opening, attempt), Failure)
        return None

    def put_update(self, key: str, manifest: UpdateManifest) -> None:
        """Raises ObjectExists."""
        self.store.put(key, manifest.to_bytes(self._sign(key, manifest)))

    def update(self, key: str, *, at_most: int | None = None) -> UpdateManifest:
        """The update's manifest under `key`. Raises ValueError where it is not as it was written, SignatureInvalid where it is
        not signed as the run asks for it."""
        return UpdateManifest.from_bytes(self.store.get(key, at_most=at_most), self._check(key, UpdateManifest))

    def _failure(self, site: SiteId, round: int, phase: str, opening: int, attempt: int) -> str:
        return f"sites/{site}/{self.run}/failures/{round:05d}.{phase}.{opening}.{attempt}.json"

    # -- commits
    def put_manifest(self, manifest: Manifest) -> Manifest:
        """The commit."""
        return self._create(f"{self._server_step(manifest.round, manifest.phase)}/manifest.json", manifest)

    def manifest(self, round: int, phase: str) -> Manifest | None:
        return self._read(f"{self._server_step(round, phase)}/manifest.json", Manifest)

    def is_committed(self, round: int, phase: str) -> bool:
        """Whether there is a commit: one request."""
        return self.store.exists(f"{self._server_step(round, phase)}/manifest.json")

    def glance(self, round: int, phase: str) -> dict[str, Any] | None:
        """A manifest's fields as they are in the store, not verified: a tenth of the time, for what is only looked at."""
        key = f"{self._server_step(round, phase)}/manifest.json"
        try:
            fields: dict[str, Any] = json.loads(self.store.get(key))
            if not Manifest.model_fields.keys() <= fields.keys():
                raise ValueError("other fields")
        except ObjectMissing:
            return None
        except (ValueError, AttributeError) as error:
            raise ObjectCorrupt(f"{key}: found {error}, expected a Manifest as it was written; restore it") from error
        return fields

    def committed(self) -> list[tuple[int, str]]:
        """(round, phase) of every commit, without reading them; rounds in order, phases of a round in no order."""
        keys = self.store.list(f"{self.server}/rounds")
        found = (re.search(r"/rounds/(\d+)/([^/]+)/manifest\.json$", key) for key in keys)
        return sorted((int(m[1]), m[2]) for m in found if m)

    def rounds(self, phase: str) -> list[int]:
        """The rounds whose `phase` is committed, without reading them, in order."""
        return [round for round, found in self.committed() if found == phase]

    def head(self, phases: tuple[str, ...]) -> Manifest | None:
        """The newest commit; the initial one if no round is committed; None if not even that is."""
        committed = self.committed()
        if not committed:
            return self.manifest(INITIAL, "initial")
        round, phase = max(committed, key=lambda step: (step[0], phases.index(step[1])))
        return self.manifest(round, phase)

    def put_evaluation(self, evaluation: Evaluation) -> Evaluation:
        return self._create(f"{self.server}/rounds/{evaluation.round:05d}/evaluation.json", evaluation)

    def evaluation(self, round: int) -> Evaluation | None:
        return self._read(f"{self.server}/rounds/{round:05d}/evaluation.json", Evaluation)

    def put_outcome(self, outcome: Outcome) -> Outcome:
        return self._create(f"{self.server}/outcomes/{outcome.number:05d}.json", outcome)

    def outcomes(self) -> list[Outcome]:
        return self._read_all(f"{self.server}/outcomes", Outcome)

    # -- where things are
    def inbox(self, site: SiteId, round: int, phase: str) -> str:
        """The prefix below which a site's updates for a phase lie."""
        return f"sites/{site}/{self.run}/{step_path(round, phase)}"

    def _step(self, round: int, phase: str) -> str:
        return f"{self.public}/rounds/{step_path(round, phase)}"

    def _server_step(self, round: int, phase: str) -> str:
        return f"{self.server}/initial" if round == INITIAL else f"{self.server}/rounds/{step_path(round, phase)}"

    # -- records
    def _create(self, key: str, record: R) -> R:
        try:
            self.store.put(key, record.to_bytes(self._sign(key, record)))
            return record
        except ObjectExists:
            found = self._read(key, type(record))
            assert found is not None
            return found

    def _read(self, key: str, cls: type[R]) -> R | None:
        try:
            data = self.store.get(key, at_most=MOST_OF_A_SITE if cls.signer == "site" else None)
        except ObjectMissing:
            return None
        try:
            return cls.from_bytes(data, self._check(key, cls))
        except ValueError as error:
            raise ObjectCorrupt(
                f"{key}: found {first_problem(error)}, expected a {cls.__name__} as it was written; restore it"
            ) from error

    def _sign(self, key: str, record: _Record) -> Callable[[str], str | None]:
        """Digest -> the signature of a record that is written under `key`. Raises UserError where the coordinator's key is not
        here, though the run's records are signed."""
        kind, own = type(record), self.keys.own
        if kind.signer == "coordinator":
            expected = record.coordinator if isinstance(record, RunRecord) else self._coordinator()
            if expected != self.keys.public:
                fix = f"set {COORDINATOR_KEY} as it was when the run began, or start a new run"
                raise UserError(field_error(COORDINATOR_KEY, self.keys.public, f"the private key of {expected}", fix))
        if kind.signer is None or own is None:
            return lambda digest: None
        nonce = self._nonce(kind)
        return lambda digest: own.sign(message(kind.__name__, nonce, key, digest))

    def _nonce(self, kind: type[_Record]) -> str:
        """What binds a signature to this run; a run's own record has it in its digest."""
        return "" if kind is RunRecord else self.begun.nonce

    def _coordinator(self) -> str | None:
        """Who signs the coordinator's records of this run."""
        with contextlib.suppress(RunMissing):
            return self.begun.coordinator
        return self.keys.public

    def _check(self, key: str, kind: type[_Record]) -> Callable[[str, str | None], None]:
        """Raises SignatureInvalid where a record under `key` has not the signature that this process asks for."""
        expected = self._signer(key, kind)

        def check(digest: str, signature: str | None) -> None:
            if expected is None:
                return
            signed = message(kind.__name__, self._nonce(kind), key, digest)
            if signature is None or not is_signed_by(expected, signed, signature):
                found = "none" if signature is None else "one of another key, run or place"
                fix = "whoever wrote it had not that key"
                raise SignatureInvalid(f"signature of {key}: found {found}, expected that of {expected}; {fix}")

        return check

    def _signer(self, key: str, kind: type[_Record]) -> str | None:
        """The public key of who must have signed such a record; None where nobody asks."""
        if kind.signer == "coordinator":
            return self.keys.coordinator
        if kind.signer == "site":
            site = key.split("/")[1]
            if site == self.keys.site:
                return self.keys.public
            with contextlib.suppress(RunMissing):
                return self.pins.get(site)
        return None

    def _read_all(self, prefix: str, cls: type[R]) -> list[R]:
        found = (self._read(key, cls) for key in self.store.list(prefix) if key.endswith(".json"))
        return [record for record in found if record is not None]


def first_problem(error: ValueError) -> str:
    """Why a record's bytes were refused."""
    return explain(error) if isinstance(error, ValidationError) else str(error)


def list_runs(store: ObjectStore) -> list[str]:
    """Names of all runs in a store."""
    found = (key.split("/") for key in store.list("public") if key.count("/") == 2 and key.endswith("/run.json"))
    return sorted(run for _, run, _ in found if re.fullmatch(NAME, run))  # a federation may be called "run"
