"""Runs a command, and leaves nothing of it behind: started by file name, by the process that wants the command run.

    python guard.py <file for the exit code> <command> ...

When the command ends, and when whoever holds the other end of this process's standard input ends, whatever it started is
killed: its process group, and on Linux also what left the group. Imports nothing but the standard library.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main(report: str, command: list[str]) -> None:
    adopt_orphans()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"cannot start {command[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
        Path(report).write_text("127")
        return
    threading.Thread(target=die_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: sweep())
    code = process.wait()
    Path(report).write_text(str(code))
    sweep()


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent ends, so that they can be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Standard input ends when the parent does."""
    while os.read(0, 1024):
        pass
    sweep()


def sweep() -> None:
    """Kill every descendant, then the group that this process leads, and so itself."""
    for _ in range(100):
        found = descendants(os.getpid())
        if not found:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    os.killpg(0, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes below `pid` that have not ended."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(entry.parent.name)] = int(parent)
    below: list[int] = []
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        below += frontier
    return below


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
