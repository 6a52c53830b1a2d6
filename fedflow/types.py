"""Values that cross a boundary: between server and site, between a round and the next.

Signs everywhere: `delta = local - start`; `pseudo_gradient = -delta`. Rounds count from 0. A *step* is one completed
`optimizer.step()`, never a batch, a micro-batch or an epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "MODEL_GROUPS",
    "Aggregate",
    "FederationView",
    "Groups",
    "Result",
    "RoundContext",
    "RoundPlan",
    "SiteId",
    "SiteTask",
    "SiteView",
    "Spec",
    "TensorSpec",
    "Tensors",
    "Update",
    "canonical_json",
    "derive_seed",
    "spec_of",
]

SiteId = str
Tensors = Mapping[str, Tensor]
"""Parameter name -> tensor."""
Groups = Mapping[str, Tensors]
"""Group name ("params", "frozen", "buffers", "delta", "control", ...) -> tensors. Never merged by name prefix."""
MODEL_GROUPS = ("params", "frozen", "buffers")
"""The groups that are the model."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor. up_to: of what is to come, whether it may have fewer rows than `shape` says."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    up_to: bool = False

    def __str__(self) -> str:
        fewer = " or fewer rows" if self.up_to else ""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}{fewer}"

    def admits(self, found: TensorSpec) -> bool:
        """Whether a tensor that is `found` is as it should be."""
        if not self.up_to or len(found.shape) != len(self.shape):
            return found == self
        fits = found.shape[0] <= self.shape[0] and found.shape[1:] == self.shape[1:]
        return fits and found.dtype == self.dtype


Spec = Mapping[str, Mapping[str, TensorSpec]]
"""Group name -> tensor name -> shape and dtype: what a valid update consists of."""


def spec_of(groups: Groups) -> dict[str, dict[str, TensorSpec]]:
    """The spec that `groups` itself fulfils. Mappings that know theirs (`spec`) are asked for it, and no tensor is read."""
    return {group: getattr(tensors, "spec", None) or _specs(tensors) for group, tensors in groups.items()}


def _specs(tensors: Tensors) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Update:
    """What a site returns for one phase of one round.

    site:        who trained
    base_round:  the round whose broadcast the training started from
    attempt:     which attempt of the site this was (1-based; information only)
    state_base:  digest of the update that the site's state came from; None at first participation
    examples:    examples in the site's training data (count)
    steps:       completed optimizer steps K
    lr_sum:      sum of the learning rate over those steps
    tensors:     the payload, by group
    scalars:     numbers that the algorithm needs (a loss at the start, a norm)
    metrics:     numbers for people (loss, accuracy)
    numerics:    what decided the bits of this training
    staleness:   rounds that were committed since `base_round` when it counts: 0 for an update of the round itself
    """

    site: SiteId
    base_round: int
    examples: int
    steps: int
    lr_sum: float
    tensors: Groups
    attempt: int = 1
    state_base: str | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    staleness: int = 0


@dataclass(frozen=True)
class Aggregate:
    """The reduction of a round's updates.

    tensors:  reduced groups
    weight:   sum of the weights
    count:    number of updates
    metrics_by_site:  site -> metrics, as sent
    scalars: weighted means of the numbers that the updates carry for the algorithm
    """

    tensors: Groups
    weight: float
    count: int
    metrics_by_site: Mapping[SiteId, Mapping[str, float]]
    scalars: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a run found that is no model.

    values:  whatever JSON has, by name; tensors: by name
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class SiteView:
    """What the coordinator knows of one site when it plans a round.

    online:    a worker of the site was seen within the grace period
    in_flight: base round of an update that is still being made, None if there is none
    last_round: the last round it contributed to, None if none
    seconds:   duration of its last contribution, None if none; steps: optimizer steps in it
    failures:  exclusions in a row
    """

    online: bool = True
    in_flight: int | None = None
    last_round: int | None = None
    seconds: float | None = None
    failures: int = 0
    steps: int | None = None


FederationView = Mapping[SiteId, SiteView]
"""Every site of the federation, once a round, written into the plan."""


@dataclass(frozen=True)
class SiteTask:
    """What one site is asked to do. steps: local steps, None = as the recipe says; overrides: recipe fields for it."""

    steps: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Both, as a context's overrides."""
        return {**self.overrides, **({} if self.steps is None else {"steps": self.steps})}


@dataclass(frozen=True)
class RoundPlan:
    """Who takes part in a round and when it may close.

    tasks:        site -> task: the cohort
    quorum:       how many valid updates close the round (the recipe's own quorum goes before it)
    timeout:      from the opening to its deadline; None = the recipe's round_deadline
    accept_bases: how many rounds back an update may have started; 0 = this round's updates only
    late:         what becomes of an update that arrives after the closing; None = as the recipe says
    again:        whether a site whose update came is asked for another one while the round is open, to count in a later one
    aggregators:  sites at which the round is aggregated, in the order in which the role passes on; empty = the coordinator
    regions:      regional aggregator -> sites whose updates it sums up; those of other sites go to the aggregation itself
    """

    tasks: Mapping[SiteId, SiteTask]
    quorum: int
    timeout: timedelta | None = None
    accept_bases: int | None = None
    late: Literal["drop", "carry"] | None = None
    again: bool = False
    aggregators: Sequence[SiteId] = ()
    regions: Mapping[str, Sequence[SiteId]] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundContext:
    """Where in a run a piece of mathematics stands. Frozen: what must persist belongs into the state, not here.

    num_sites: N, all sites of the federation (not the cohort)
    seed:      63 bits, from (run seed, round, phase, site)
    measured:  what `Algorithm.measure` found over all updates, else empty
    """

    run: str
    round: int
    phase: str
    site: SiteId | None
    num_sites: int
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    measured: Tensors = field(default_factory=dict)

    @classmethod
    def at(
        cls,
        run_seed: int,
        run: str,
        round: int,
        phase: str,
        site: SiteId | None,
        num_sites: int,
        overrides: Mapping[str, Any] | None = None,
    ) -> RoundContext:
        """The context of that place in a run, its seed drawn from the run's: another one where the site is asked "again"."""
        settings = overrides if overrides is not None else {}
        again = [settings["again"]] if "again" in settings else []
        seed = derive_seed(run_seed, round, phase, site, *again)
        return cls(run, round, phase, site, num_sites, seed, settings)

    @property
    def place(self) -> dict[str, Any]:
        """Where an error here belongs to, as a FedflowError takes it."""
        return {"run": self.run, "round": self.round, "site": self.site}


def canonical_json(value: Any) -> bytes:
    """The one byte string for a JSON value: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value).encode()


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def derive_seed(*parts: str | int | None) -> int:
    """A 63-bit seed from JSON values, by BLAKE2: the same in every process and on every machine, unlike `hash()`."""
    # the canonical JSON of a list, made in half the time
    text = ",".join([str(part) if type(part) is int else _CANONICAL.encode(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(f"[{text}]".encode(), digest_size=8).digest(), "big") >> 1
