"""What fedflow says with `logging`, told elsewhere too: in the log of a Prefect run, in the answer of a child process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["passed_on"]


@contextmanager
def passed_on(to: Callable[[int, str], object]) -> Iterator[None]:
    """Level and text of what fedflow says meanwhile, in whatever thread, go to `to` too: a script's output, an outer step,
    what starts fresh."""
    ours, handler = logging.getLogger("fedflow"), _PassedOn(to)
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        ours.removeHandler(handler)


class _PassedOn(logging.Handler):
    def __init__(self, to: Callable[[int, str], object]) -> None:
        super().__init__(logging.INFO)
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        self._to(record.levelno, record.getMessage())
