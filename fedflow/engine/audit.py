"""What left a site: a line in a file of the site's own, written before anything is sent."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedflow.errors import UserError, field_error
from fedflow.recipe import SiteConfig
from fedflow.store.objects import ObjectStore
from fedflow.store.records import utc_now
from fedflow.types import canonical_json

__all__ = ["append", "audited", "read_audit"]


def audited(store: ObjectStore, config: SiteConfig, run: str, round: int | None, phase: str) -> ObjectStore:
    """`store` as the site of `config` uses it: each object that is about to be sent gets a line in its `audit`, if it has one.

    A line is on the disk before a byte is sent; of what is made while it is sent, a second one with its digest follows. Where it
    cannot be written, nothing is sent: UserError.
    """
    path = config.audit
    if path is None:
        return store
    about = {"site": config.name, "run": run, "round": round, "phase": phase}

    def tell(key: str, size: int, digest: str | None) -> None:
        line = {
            "at": utc_now().isoformat(),
            **about,
            "store": store.url,
            "object": key,
            "bytes": size,
            "digest": digest,
        }
        append("audit", Path(path), canonical_json(line))

    return store.telling(tell)


def append(field: str, path: Path, line: bytes) -> None:
    """Add a line to a file that any number of processes write to; it is on the disk when this returns. Raises UserError."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, line + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        fix = f"nothing is sent or approved until it can be: {error.strerror}"
        raise UserError(field_error(field, str(path), "a file that can be written", fix)) from error


def read_audit(path: Path, run: str | None = None) -> Iterator[dict[str, Any]]:
    """Its lines, the oldest first; of one run, if named."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            lines = (json.loads(line) for line in file)
            yield from (line for line in lines if run is None or line["run"] == run)
