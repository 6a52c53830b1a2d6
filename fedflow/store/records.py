"""The journal's records: what each JSON object in the store says. Written once, never changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from fedflow.errors import StoreError
from fedflow.store.objects import ObjectRef
from fedflow.types import SiteId, canonical_json

__all__ = [
    "FORMAT",
    "Amendment",
    "Attempt",
    "Closing",
    "Contribution",
    "Evaluation",
    "Failure",
    "FederationRecord",
    "Manifest",
    "Opening",
    "Outcome",
    "Plan",
    "Reduced",
    "RunRecord",
    "SiteRecord",
    "SiteStart",
    "SiteStateRecord",
    "StateRecord",
    "TaskRecord",
    "UpdateManifest",
]

FORMAT: Literal[1] = 1
"""Version of the store's layout and records; a run of every released version can be resumed."""

Metric = float | None
"""A number for people; None stands for NaN and infinities, which JSON has not."""
Count = Annotated[int, Field(strict=True, gt=-(2**53), lt=2**53)]
"""A whole number as a site sends it: whatever it is, arithmetic with it ends in a number."""


def _unsigned(digest: str) -> str | None:
    return None


def _unseen(digest: str, signature: str | None) -> None:
    """Nobody asks who wrote it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    signer: ClassVar[Literal["coordinator", "site"] | None] = None
    """Who signs it, where there are keys."""

    def digest(self) -> str:
        """Digest of the record's canonical JSON."""
        return _digest(self.model_dump(mode="json"))

    def to_bytes(self, sign: Callable[[str], str | None] = _unsigned) -> bytes:
        """Canonical JSON with the record's own digest in it, so that no byte of it can change unseen, and the signature that
        `sign` gives that digest."""
        return self._encoded(sign)[0]

    def _encoded(self, sign: Callable[[str], str | None]) -> tuple[bytes, str]:
        """`to_bytes`, and the digest; each field is encoded once."""
        fields = {name: canonical_json(value) for name, value in self.model_dump(mode="json").items()}
        digest = f"blake3:{blake3(_joined(fields)).hexdigest()}"
        signature = sign(digest)
        signed = {} if signature is None else {"signature": canonical_json(signature)}
        return _joined({**fields, "digest": canonical_json(digest), **signed}), digest

    @classmethod
    def from_bytes(cls, data: bytes, check: Callable[[str, str | None], None] = _unseen) -> Self:
        """Raises ValueError, and nothing else, where a byte is not as it was written or a field not as it should be.

        check: called with digest and signature; what it raises goes on
        """
        try:
            fields = json.loads(data)
            canonical = isinstance(fields, dict) and canonical_json(fields) == data
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        if not canonical:
            raise ValueError("not the canonical JSON of a record")
        digest, signature = fields.pop("digest", None), fields.pop("signature", None)
        if not isinstance(signature, str | None):
            raise ValueError("a signature that is no text")
        if digest != _digest(fields):
            raise ValueError(f"digest {_digest(fields)}, expected {digest}")
        check(digest, signature)
        try:
            return cls.model_validate(fields)
        except StoreError as error:  # from an ObjectRef in it
            raise ValueError(str(error)) from error


def _joined(fields: dict[str, bytes]) -> bytes:
    """The canonical JSON of an object, of its fields' own."""
    return b"{%s}" % b",".join(b"%s:%s" % (canonical_json(name), fields[name]) for name in sorted(fields))


def _digest(fields: dict[str, Any]) -> str:
    return f"blake3:{blake3(canonical_json(fields)).hexdigest()}"


class RunRecord(_Record):
    """`public/<run>/run.json`: what the run is. nonce: tells this run from any other that ever had its name.

    coordinator: public key of who signs the coordinator's records; None: they are not signed
    keys:        site, or regional aggregator -> public key of who signs what is its; one that is not there need not sign
    """

    signer = "coordinator"
    format: Literal[1] = 1
    fedflow: str
    run: str
    nonce: str
    created: datetime
    recipe: dict[str, JsonValue]
    sites: list[SiteId]
    coordinator: str | None = None
    keys: dict[SiteId, str] = {}


class Amendment(_Record):
    """`public/<run>/amendments/<n>.json`: what a resume changed. recipe: fields with their new values; sites: joined; keys: of
    sites that have new ones."""

    signer = "coordinator"
    number: int
    at: datetime
    recipe: dict[str, JsonValue] = {}
    sites: list[SiteId] = []
    keys: dict[SiteId, str] = {}


class TaskRecord(_Record):
    """One site's part in a plan. state_base: the accepted update whose state the site starts from; None = none yet."""

    steps: int | None = None
    overrides: dict[str, JsonValue] = {}
    state_base: str | None = None


class Plan(_Record):
    """`…/rounds/<r>/<phase>/plan.json`: who does what. Made once a round and phase.

    parent:    digest of the manifest that the broadcast comes from
    broadcast: group -> object that sites train from
    absent:    site -> why it was not asked
    quorum:    updates that close the round, unless the recipe says otherwise at an opening
    accept_bases: rounds whose updates count
    again:     whether a site whose update came is asked for another one, to count in a later round
    aggregators: sites at which it is aggregated, in the order in which the role passes on; none: at the coordinator
    regions:   regional aggregator -> sites whose updates it sums up
    """

    signer = "coordinator"
    run: str
    nonce: str
    round: int
    phase: str
    parent: str
    broadcast: dict[str, ObjectRef]
    tasks: dict[SiteId, TaskRecord]
    absent: dict[SiteId, str] = {}
    quorum: int
    accept_bases: list[int]
    late: Literal["drop", "carry"]
    amendments: int
    num_sites: int
    again: bool = False
    aggregators: list[SiteId] = []
    regions: dict[str, list[SiteId]] = {}


class Opening(_Record):
    """`…/open/<k>.json`: the k-th attempt (from 1) to hold the round, with its absolute deadline.

    quorum, required: updates, and sites among them, without which it does not close; a resume may have changed them
    rejected: keys of manifests that did not count in earlier openings and are not looked at again
    """

    signer = "coordinator"
    number: int
    opened: datetime
    deadline: datetime
    why: str
    quorum: int
    required: list[SiteId] = []
    rejected: list[str] = []


class Attempt(_Record):
    """`…/attempts/<opening>.<site>.<attempt>.json`: a dispatch, journalled before it happens. key: its idempotency key.

    attempt: 0 where the site is asked again, after an update that counts
    """

    opening: int
    site: SiteId
    attempt: int
    key: str
    at: datetime


class UpdateManifest(_Record):
    """`sites/<site>/<run>/<r>/<phase>/<digest>.json`: a site's update. Written last; then the update exists.

    plan:   digest of the plan it answers
    groups: group -> object
    received: bytes of the broadcast that the site read
    state:  digest of the site state that goes with it; None if the algorithm keeps none
    The fields up to `state` decide `update_digest`; the rest (attempt, seconds, ...) does not.
    """

    signer = "site"
    format: Literal[1] = 1
    run: str
    nonce: str
    site: SiteId
    round: int
    phase: str
    plan: str
    state_base: str | None
    examples: Count
    steps: Count
    lr_sum: Annotated[float, Field(strict=True)]
    groups: dict[str, ObjectRef]
    scalars: dict[str, Annotated[float, Field(strict=True)]] = {}
    metrics: dict[str, Metric] = {}
    state: str | None = None
    # -- not part of the digest
    opening: Count = 1
    attempt: Count = 1
    seconds: float = 0.0
    received: Count = 0
    peak_rss: Count = 0
    numerics: dict[str, JsonValue] = {}
    fedflow: str = ""
    training_state: str | None = None

    def update_digest(self) -> str:
        """Names the update and the site state that commits with it."""
        parts = self.model_dump(
            mode="json",
            exclude={"opening", "attempt", "seconds", "received", "peak_rss", "numerics", "fedflow", "training_state"},
        )
        return _digest(parts)


class Failure(_Record):
    """`sites/<site>/<run>/failures/…json`: why an attempt failed, as the site tells it. heals: whether a retry may help."""

    signer = "site"
    site: SiteId
    round: int
    phase: str
    opening: int
    attempt: int
    reason: str
    traceback: str = ""
    heals: bool


class Contribution(_Record):
    """An update that counts. key: its manifest in the store; base_round: the round that it trained from."""

    key: str
    update: str
    base_round: int


class Closing(_Record):
    """`…/closed/<k>.json`, later `<k>.<j>.json`: exactly what counts, and why the rest does not.

    quorum, required: those of the opening
    quorate: whether the round can be committed; if not it stays open for another opening
    """

    signer = "coordinator"
    opening: int
    revision: int = 0
    closed: datetime
    why: str
    quorum: int
    required: list[SiteId] = []
    quorate: bool
    contributors: dict[SiteId, Contribution]
    excluded: dict[SiteId, str]


class StateRecord(_Record):
    """A frozen dataclass in the store. tensors: field -> object; scalars: field -> JSON value."""

    tensors: dict[str, ObjectRef] = {}
    scalars: dict[str, JsonValue] = {}


class SiteStateRecord(_Record):
    """`<site's url>/<run>-<nonce>/state/<update digest>.json`: what a site remembers if that update is accepted.

    state: the algorithm's; training: optimizer, scheduler, generators, place in the data, where the algorithm asked for it
    """

    update: str
    round: int
    phase: str
    state: StateRecord
    training: StateRecord | None = None

    def state_digest(self) -> str:
        """Names what is remembered, in the update that it goes with."""
        if self.training is None:
            return self.state.digest()
        return _digest({"state": self.state.digest(), "training": self.training.digest()})

    def objects(self) -> list[ObjectRef]:
        """Every object that it names."""
        training = self.training.tensors.values() if self.training else ()
        return [*self.state.tensors.values(), *training]


class Reduced(_Record):
    """`sites/<workplace>/<run>/aggregated/<of>.json`: what an aggregation came to that did not run at the coordinator.

    of:      digest of what determines it, by which it is named
    invalid: site -> why its update cannot count; then there is nothing else
    sums, weights: of a region's updates: group -> object with Σ wᵢ·tᵢ in float64, and group -> name -> Σ wᵢ
    state, model, broadcast, model_digest: of a whole phase, as its manifest will name them
    """

    signer = "site"
    workplace: str
    of: str
    invalid: dict[SiteId, str] = {}
    sums: dict[str, ObjectRef] = {}
    weights: dict[str, dict[str, float]] = {}
    state: StateRecord = StateRecord()
    model: dict[str, ObjectRef] = {}
    broadcast: dict[str, ObjectRef] = {}
    model_digest: str = ""
    seconds: float = 0.0

    def objects(self) -> list[ObjectRef]:
        """Every object that it names."""
        return [*self.sums.values(), *self.state.tensors.values(), *self.model.values(), *self.broadcast.values()]


class SiteRecord(_Record):
    """What the server remembers of a site. accepted: digest of its last accepted update, which took seconds and steps."""

    accepted: str | None = None
    last_round: int | None = None
    seconds: float | None = None
    failures: int = 0
    steps: int | None = None


class ContributorSummary(_Record):
    """One contributor in the manifest. bytes: of its update; received: of the broadcast that it read."""

    update: str
    base_round: int
    weight: float
    examples: int
    steps: int
    lr_sum: float
    metrics: dict[str, Metric]
    seconds: float
    bytes: int
    received: int = 0
    peak_rss: int = 0
    attempt: int = 1
    numerics: dict[str, JsonValue] = {}
    training_state: str | None = None


class Manifest(_Record):
    """`server/<run>/rounds/<r>/<phase>/manifest.json`: the commit. Written last, create-only; then the phase exists.

    parent:     digest of the manifest before it
    closing:    key of the closing that it aggregates, and the closing's digest
    partial:    "group/name" -> sites that sent it, where not all did
    state:      S; model: the global model by group; broadcast: what the next phase's sites receive
    sites:      every site that ever took part
    aggregator: site at which it was aggregated; None: at the coordinator
    """

    signer = "coordinator"
    format: Literal[1] = 1
    run: str
    nonce: str
    round: int
    phase: str
    parent: str | None
    closing: str | None = None
    closing_digest: str | None = None
    contributors: dict[SiteId, ContributorSummary] = {}
    excluded: dict[SiteId, str] = {}
    partial: dict[str, list[SiteId]] = {}
    numerics_differ: list[SiteId] = []
    state: StateRecord
    model: dict[str, ObjectRef]
    broadcast: dict[str, ObjectRef]
    model_digest: str
    metrics: dict[str, Metric] = {}
    sites: dict[SiteId, SiteRecord] = {}
    opened: datetime | None = None
    committed: datetime
    aggregator: SiteId | None = None
    seconds: float = 0.0  # of the aggregation alone; the round took from `opened` to `committed`

    @cached_property
    def own_digest(self) -> str:
        """`digest`, which the next manifest names."""
        return super().digest()

    def digest(self) -> str:
        return self.own_digest

    def to_bytes(self, sign: Callable[[str], str | None] = _unsigned) -> bytes:
        data, self.__dict__["own_digest"] = self._encoded(sign)
        return data

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("own_digest", None)
        return copied

    def objects(self) -> list[ObjectRef]:
        """Every object that this manifest names."""
        return [*self.state.tensors.values(), *self.model.values(), *self.broadcast.values()]


class FederationRecord(_Record):
    """`public/_federation/<name>.json`: a federation as its coordinator saw it last.

    sites: and regional aggregators; keys: of them -> the public key that it pins
    """

    name: str
    at: datetime
    fedflow: str
    sites: list[SiteId]
    keys: dict[SiteId, str] = {}
    coordinator: str | None = None


class SiteStart(_Record):
    """`sites/<site>/_start.json`: what a site's worker found wrong when it started; starts: whether it did all the same."""

    site: SiteId
    at: datetime
    host: str
    fedflow: str
    problems: list[str]
    starts: bool


class Outcome(_Record):
    """`server/<run>/outcomes/<n>.json`: how the n-th start of a run ended. A killed coordinator leaves none."""

    number: int
    status: Literal["finished", "failed", "aborted"]
    message: str = ""
    at: datetime


class Evaluation(_Record):
    """`server/<run>/rounds/<r>/evaluation.json`: metrics of the committed model of that digest."""

    round: int
    model_digest: str
    metrics: dict[str, Metric]
    seconds: float = 0.0


def utc_now() -> datetime:
    return datetime.now(UTC)


def finite(metrics: Any) -> dict[str, Metric]:
    """Metrics as JSON has them: NaN and infinities become None."""
    values = {name: float(value) for name, value in metrics.items()}
    return {name: v if v - v == 0 else None for name, v in values.items()}
