"""What federation and sites tell each other through the store besides rounds: whom a federation pins, how a site's start went.

public/_federation/<name>.json   who is in it, its keys and its fedflow, as the coordinator saw it last
sites/<site>/_start.json         what a site's worker found at its last start
Both are replaced when there is something new, and decide nothing: only a round's own records do.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from fedflow import __version__
from fedflow.engine.audit import audited
from fedflow.errors import StoreError
from fedflow.recipe import Federation, SiteConfig
from fedflow.store.objects import ObjectStore
from fedflow.store.records import FederationRecord, SiteStart, utc_now
from fedflow.types import SiteId

__all__ = ["federations_of", "publish_federation", "read_start", "report_start", "with_start"]

MOST = 1 << 20  # bytes of such a record
LONGEST = 300  # characters of a site's word that are shown
NAMES = "public/_federation"  # no run's name begins like this


def publish_federation(store: ObjectStore, federation: Federation) -> None:
    """Let the sites know whom `federation` pins, and with which fedflow it works. The store's errors are raised."""
    record = FederationRecord(
        name=federation.name,
        at=utc_now(),
        fedflow=__version__,
        sites=sorted(workplace.name for workplace in federation.workplaces),
        keys=federation.public_keys,
        coordinator=federation.coordinator_key,
    )
    store.put(f"{NAMES}/{federation.name}.json", record.to_bytes(), mode="overwrite")


def federations_of(store: ObjectStore, site: SiteId) -> list[FederationRecord]:
    """The federations that count `site` among theirs."""
    found = []
    for key in store.list(NAMES):
        with contextlib.suppress(ValueError):
            found.append(FederationRecord.from_bytes(store.get(key, at_most=MOST)))
    return [record for record in found if site in record.sites]


def report_start(config: SiteConfig, problems: Sequence[str], *, starts: bool) -> None:
    """Leave word for the coordinator. starts: whether the worker starts all the same. The store's errors are raised."""
    store = audited(ObjectStore(config.store, config.store_options), config, "", None, "start")
    record = SiteStart(
        site=config.name,
        at=utc_now(),
        host=socket.gethostname(),
        fedflow=__version__,
        problems=[problem[:LONGEST] for problem in problems],
        starts=starts,
    )
    store.put(_start(config.name), record.to_bytes(), mode="overwrite")


def read_start(store: ObjectStore, site: SiteId) -> str:
    """What `site` said of its last start, for people; "" where it found nothing wrong, or said nothing that can be read."""
    with contextlib.suppress(ValueError, StoreError):
        told = SiteStart.from_bytes(store.get(_start(site), at_most=MOST))
        if told.problems:
            said = "; ".join(told.problems)[:LONGEST]
            kept = "".join(letter if letter.isprintable() else "?" for letter in said)
            return f"{'started' if told.starts else 'refused'} {told.at:%Y-%m-%d %H:%M} UTC: {kept}"
    return ""


def with_start(reason: str, store: ObjectStore, site: SiteId) -> str:
    """`reason` why nothing is to be had from `site`, and what it said of its last start, if it did."""
    said = read_start(store, site)
    return f"{reason}; its last start: {said}" if said else reason


def _start(site: SiteId) -> str:
    return f"sites/{site}/_start.json"
