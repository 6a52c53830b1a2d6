"""Where a phase is aggregated: which shares of the work others than the coordinator do, and what became of them.

What a share comes to is a pure function of the plan and of what counts. Whoever does it writes objects and a record below a prefix of
its own, named by what determines them; the coordinator, which alone commits, looks for such a record at those who may do it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from fedflow.errors import SignatureInvalid
from fedflow.store.journal import Journal
from fedflow.store.records import Closing, Plan, Reduced
from fedflow.types import SiteId, canonical_json

__all__ = ["Share", "reduced_of", "shares"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """A part of an aggregation that does not run at the coordinator.

    region:     whose sites' updates are summed up; None: all of the phase is aggregated
    workplaces: who may do it, in the order in which the role passes on
    sites:      whose updates it reads
    of:         digest of what determines it
    """

    region: str | None
    workplaces: tuple[str, ...]
    sites: tuple[SiteId, ...]
    of: str

    @property
    def name(self) -> str:
        return "round" if self.region is None else f"region-{self.region}"

    @property
    def key(self) -> str:
        """Tells it from what is to be done once other updates count."""
        return f"{self.name}-{self.of.partition(':')[2][:16]}"


def shares(plan: Plan, closing: Closing) -> list[Share]:
    """What others than the coordinator do for `closing`: sums of regions in the order of their names, then all of it."""
    found = []
    for region, members in sorted(plan.regions.items()):
        counted = {site: closing.contributors[site] for site in sorted(members) if site in closing.contributors}
        if counted:
            updates = {site: contribution.model_dump(mode="json") for site, contribution in counted.items()}
            found.append(Share(region, (region,), tuple(counted), _digest("region", region, plan.digest(), updates)))
    if plan.aggregators:
        of = _digest("round", plan.digest(), closing.digest())
        found.append(Share(None, tuple(plan.aggregators), tuple(sorted(closing.contributors)), of))
    return found


def _digest(*parts: object) -> str:
    return f"blake3:{blake3(canonical_json(parts)).hexdigest()}"


def reduced_of(journal: Journal, share: Share, workplaces: Sequence[str] | None = None) -> Reduced | None:
    """What `share` came to at the first of `workplaces` (default: all that may do it) that has done it; None where nobody has.

    A record that names anything but objects of the run and sites of the share is passed over, and so is one that its workplace has
    not signed though the run pins its key.
    """
    for workplace in share.workplaces if workplaces is None else workplaces:
        try:
            found = journal.reduced(workplace, share.of)
        except SignatureInvalid as error:
            _log.warning("%s; it does not count", error)
            continue
        if found is None:
            continue
        known = re.compile(rf"((public|server)|sites/[^/]+)/{re.escape(journal.run)}/objects/[^/]+")
        foreign = [ref.key for ref in found.objects() if not known.fullmatch(ref.key)]
        if found.workplace != workplace or set(found.invalid) - set(share.sites) or foreign:
            _log.warning(
                "%s: its aggregation names what is not of this round (%s); it does not count", workplace, foreign[:1]
            )
            continue
        return found
    return None
