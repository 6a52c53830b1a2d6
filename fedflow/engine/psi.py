"""What a private set intersection left at a site: the items that all have."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fedflow.algorithms.psi import SiteSecrets
from fedflow.engine.export import write_file
from fedflow.errors import ObjectMissing, UserError, field_error
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import SiteStateRecord
from fedflow.store.state import read_state

__all__ = ["common_items", "write_items"]


def common_items(config: SiteConfig, run: str) -> list[str]:
    """The items that the sites of `run` have in common, sorted, out of the state of this site.

    Raises RunMissing, and UserError where the run has found none at this site yet.
    """
    journal = Journal(ObjectStore(config.store, config.store_options), run)
    store = ObjectStore(config.state)
    for key in store.list(f"{run}-{journal.record().nonce[:12]}/state"):
        with contextlib.suppress(ValueError, ObjectMissing):
            record = SiteStateRecord.from_bytes(store.get(key))
            if record.phase == "reveal":
                found: SiteSecrets = read_state(store, SiteSecrets, record.state)
                return found.texts
    expected = f"the state that the last phase of {run} writes at {config.name}"
    raise UserError(field_error("state", config.state, expected, "resume the run, or give this site's configuration"))


def write_items(items: list[str], out: Path) -> Path:
    """Write one item a line, whole or not at all; returns `out`. Raises UserError where an item has a line's end in it."""
    if bad := next((item for item in items if len(item.splitlines()) > 1 or item.endswith("\n")), None):
        raise UserError(field_error("--out", bad, "items of one line", "use `aligned` of KeyedTable"))
    write_file(out, lambda path: path.write_text("".join(f"{item}\n" for item in items), encoding="utf-8"), "--out")
    return out
