"""What fedflow says with `logging`, in the logs of Prefect's runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["heard_by"]


@contextmanager
def heard_by(log: Any) -> Iterator[None]:
    """What fedflow says meanwhile, in whatever thread, goes to `log` too: a script's output, an outer step, what starts fresh."""
    ours, handler = logging.getLogger("fedflow"), _PassedOn(log)
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        ours.removeHandler(handler)


class _PassedOn(logging.Handler):
    def __init__(self, log: Any) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.log(record.levelno, "%s", record.getMessage())
