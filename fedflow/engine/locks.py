"""Locks of this machine that end with their holder, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedflow.errors import UserError, field_error

__all__ = ["held", "holder", "remove"]


def _path(name: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"fedflow-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        fix = "remove it: somebody else could say what runs here"
        raise UserError(field_error("locks", str(folder), "a folder that this user alone may write to", fix))
    return folder / name


@contextlib.contextmanager
def held(name: str) -> Iterator[None]:
    """Hold the lock of that name; a second process that asks for it waits."""
    path = _path(name)
    handle = _locked(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        if _is_at(path, handle):
            path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> int:
    """The file there, opened and locked; another one than before, if it was removed while this process waited."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))


def holder(name: str) -> int | None:
    """The process that holds the lock of that name; None where nobody does."""
    try:
        handle = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return int(os.read(handle, 20) or b"0") or None
    finally:
        os.close(handle)


def remove(name: str) -> None:
    """Forget a lock whose holder was killed, and that nobody will ask for any more."""
    _path(name).unlink(missing_ok=True)
