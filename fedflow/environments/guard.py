"""Ends what a process has started when that process dies, however it dies: a kill -9 of PocEnv leaves no server behind.

`Guard` is the process's side. The other side is this file as a program: it reads process ids from its standard input, and
at its end, which comes with the death of whoever holds the other end of the pipe, it stops those processes and all below.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

__all__ = ["Guard"]


class Guard:
    """Watches over processes until they are forgotten, or until this process dies.

    hold: file descriptors that stay open until everything is stopped: of locks, so that nobody starts the same meanwhile
    """

    def __init__(self, hold: Iterable[int] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=list(hold),
            start_new_session=True,
            text=True,
        )

    def watch(self, process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGKILL) -> None:
        """Stop `process` with the signal `how`, and all below it with SIGKILL, should this process die."""
        self._tell(f"{process.pid} {how.value}")

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """`process` has ended: its id may soon be another's."""
        self._tell(f"{process.pid} 0")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Stop what is still watched, and the guard."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


# -- the other side ----------------------------------------------------------------------------------------------------
GRACE = 15.0  # seconds for those that are asked with another signal than SIGKILL


def guard(lines: IO[str]) -> None:
    """Follow `lines` ("<pid> <signal>", 0 to forget) to their end; then stop what is left, the youngest first."""
    watched: dict[int, int] = {}
    for line in lines:
        pid, how = (int(part) for part in line.split())
        if how:
            watched[pid] = how
        else:
            watched.pop(pid, None)
    for pid, how in reversed(watched.items()):
        if how == signal.SIGKILL:
            send([pid, *below(pid)], how)
    asked = [pid for pid, how in watched.items() if how != signal.SIGKILL]
    for pid in asked:
        send([pid], watched[pid])
    until = time.monotonic() + GRACE
    while any(alive(pid) for pid in asked) and time.monotonic() < until:
        time.sleep(0.05)
    send([pid for pid in asked if alive(pid)], signal.SIGKILL)


def below(pid: int) -> list[int]:
    """All processes that `pid` started, and those that they started."""
    parents = dict(running())
    found, wanted = [], {pid}
    while new := {child for child, parent in parents.items() if parent in wanted}:
        found += sorted(new)
        wanted = new
    return found


def running() -> Iterator[tuple[int, int]]:
    """(process, its parent) of every process of this machine."""
    if Path("/proc/self/stat").exists():
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                yield int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        return
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    for line in table.splitlines():
        child, parent = line.split()
        yield int(child), int(parent)


def send(pids: Sequence[int], how: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, how)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    guard(sys.stdin)
