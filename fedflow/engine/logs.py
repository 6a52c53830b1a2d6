"""What fedflow says with `logging`, told elsewhere too: in a Prefect run's log, in a child's answer, in a file that rotates."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

__all__ = ["LogFile", "passed_on"]


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


def _printable(value: Any) -> Any:
    """A text without what would begin another line: it may be anybody's."""
    return "".join(c if c.isprintable() else "?" for c in value) if isinstance(value, str) else value


class LogFile(logging.Handler):
    """Lines in a file that any number of processes write to; one that is full is renamed, and so many are kept.

    about: what each line says besides its text: site, run, round, phase; what is None is left out
    size: bytes from which a file is full
    """

    def __init__(
        self, path: Path, form: Literal["text", "json"], size: int, keep: int, about: Mapping[str, Any]
    ) -> None:
        super().__init__(logging.INFO)
        self._path, self._form, self._size, self._keep = path, form, size, keep
        self._about = {name: _printable(value) for name, value in about.items() if value is not None}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.write(handle, line)
                if os.fstat(handle).st_size >= self._size and os.fstat(handle).st_ino == self._path.stat().st_ino:
                    self._rotate()
            finally:
                os.close(handle)
        except Exception:
            self.handleError(record)

    def _line(self, record: logging.LogRecord) -> bytes:
        at, text = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"), record.getMessage()
        if record.exc_info:
            text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
        if self._form == "json":
            fields = {"at": at, "level": record.levelname, **self._about, "message": text}
            return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
        about = " ".join(f"{name}={value}" for name, value in self._about.items())
        return "".join(f"{at} {record.levelname} {about} | {part}\n" for part in text.splitlines() or [""]).encode()

    def _rotate(self) -> None:
        for number in range(self._keep - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
