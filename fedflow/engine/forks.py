"""Children that start at once: forked from a process that has imported what they need, or fresh ones where that can't fork.

`ForkServer` is the caller's side; the other side is this file as a program. It imports modules once, and forks a child for
each call; a child shares what was imported, and data that a module has loaded, until one of them writes to it. The
server has a single thread whenever it forks, it never touches CUDA, and no connection is open in it. A child leads a
process group of its own and survives its caller, unless the function that it calls sees to that.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

__all__ = ["Child", "ForkServer", "threads"]

_log = logging.getLogger(__name__)

Start = Literal["fork", "spawn"]


def threads() -> int:
    """How many this process has; 1 where the system does not say."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 1


class Line:
    """JSON messages over a socket, one a line of text."""

    def __init__(self, end: socket.socket) -> None:
        self.socket, self._rest = end, b""

    def send(self, message: Mapping[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None at the timeout. Raises EOFError where none will come any more.

        What a killed process left unfinished is passed over.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            while b"\n" not in self._rest:
                left = None if until is None else max(until - time.monotonic(), 0.0)
                if not select.select([self.socket], [], [], left)[0]:
                    return None
                try:
                    got = self.socket.recv(1 << 20)
                except ConnectionError:
                    got = b""
                if not got:
                    raise EOFError
                self._rest += got
            text, _, self._rest = self._rest.partition(b"\n")
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(text)
                return found


@dataclass
class Child:
    """A running call.

    last: the last message that the called function sent
    exit: its exit code once it has ended, -N where signal N ended it; None of one whose end nobody saw
    """

    pid: int
    line: Line
    last: dict[str, Any] | None = None
    ended: bool = False
    exit: int | None = None

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message that the called function sends; None at the timeout, or where it has ended."""
        try:
            message = None if self.ended else self.line.receive(timeout)
        except EOFError:  # the server died
            self.ended = True
            return None
        if message is not None and "exit" in message:
            self.ended, self.exit = True, message["exit"]
            return None
        self.last = message or self.last
        return message

    def kill(self) -> None:
        """Kill it and all that it started; nothing where they are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
            return
        if not self.ended:  # it does not lead its group yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill it, and return once it is gone."""
        self.kill()
        while not self.ended:
            self.receive()
        self.line.socket.close()


@dataclass
class ForkServer:
    """Starts children that call "module:function"(argument, line); started by the first of them, or by `start`.

    preload: modules that the server imports; what goes wrong there is printed, and met again by the child that needs it
    start_by: "spawn": a fresh interpreter for each child, with nothing imported
    later: modules that cost much and that not everybody needs: the server imports them once a child has used one
    A server that has more than one thread does not fork: its children are spawned, with a line in the log.
    """

    preload: Sequence[str] = ()
    start_by: Start = "fork"
    later: Sequence[str] = ()
    _process: subprocess.Popen[bytes] | None = None
    _control: socket.socket | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _told: bool = False

    def start(self) -> None:
        """Have the server import now, and return at once; nothing where it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        ours, theirs = socket.socketpair()
        told = json.dumps([sys.path, list(self.preload), list(self.later), self.start_by, os.environ.get(_BLAS)])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format("_serve"), str(theirs.fileno()), told],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={_ARROW: "background_thread:false", **os.environ, _BLAS: "1"},
            )
        if self._control is not None:
            self._control.close()
        self._control = ours

    def fork(self, target: str, argument: Any = None) -> Child:
        """A child that calls "module:function" with `argument` (JSON) and its `Line` to the caller.

        Returns when it runs, which takes as long as the server still imports. Raises OSError where the server cannot.
        """
        for again in (True, False):
            with self._lock:
                self.start()
                assert self._control is not None
                ours, theirs = socket.socketpair()
                with theirs, contextlib.suppress(BrokenPipeError, ConnectionError):
                    socket.send_fds(self._control, [b"."], [theirs.fileno()])
            line = Line(ours)
            try:
                hello = line.receive()
                assert hello is not None
                line.send({"target": target, "argument": argument, "path": sys.path})
            except (EOFError, ConnectionError):
                ours.close()
                if again:  # somebody killed the server: there is another one
                    self._forget()
                    continue
                raise OSError(
                    "the process that starts the others died; its last words are above, or in this log"
                ) from None
            self._tell(hello)
            return Child(hello["pid"], line)
        raise AssertionError

    def _tell(self, hello: Mapping[str, Any]) -> None:
        if "threads" in hello and not self._told:
            self._told = True
            _log.warning(
                "%s starts threads when it is imported (%d are there), which a fork could deadlock: children are spawned",
                " or ".join(self.preload),
                hello["threads"],
            )

    def _forget(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            self._process = None

    def close(self) -> None:
        """End the server once its children have ended."""
        if self._control is not None:
            self._control.close()
        self._process = self._control = None


# -- the other side ----------------------------------------------------------------------------------------------------
Children = dict[
    int, tuple[socket.socket, subprocess.Popen[bytes] | None]
]  # by process id; spawned ones as they are kept

_BLAS = (
    "OPENBLAS_NUM_THREADS"  # numpy's OpenBLAS starts its pool of threads when it is imported, unless it is told not to
)
_ARROW = "JE_ARROW_MALLOC_CONF"  # pyarrow's allocator starts a thread too; pandas imports it, and Prefect 3.8.3 and 3.8.4 that
_PROGRAM = "from fedflow.engine.forks import {0}; {0}()"


def _serve() -> None:
    """Until the caller's end of the control socket is closed and no child is left."""
    path, preload, later, start_by, blas = json.loads(sys.argv[2])
    sys.path[:] = path
    os.environ.pop(_BLAS)
    if blas is not None:
        os.environ[_BLAS] = blas
    control: socket.socket | None = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the caller's matter
    gc.disable()
    if start_by == "fork":
        _import(preload)
    children: Children = {}
    with _woken_by_children() as (woken, waking):
        end_of_child = partial(_tell_used, waking, later)
        while control is not None or children:
            ready = select.select([woken, *([control] if control else [])], [], [])[0]
            if woken in ready and _USED in woken.recv(4096):
                _import(later)
                later.clear()
            if (
                control in ready
                and control is not None
                and not _start_one(control, start_by, children, [woken], end_of_child)
            ):
                control.close()
                control = None
            _reap(children)


def _import(modules: Sequence[str]) -> None:
    """What goes wrong is printed: the child that needs the module meets it again."""
    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException:
            traceback.print_exc()
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, all that it shares


_USED = b"+"  # no signal's number that arrives here


def _tell_used(waking: socket.socket, modules: Sequence[str]) -> None:
    """In a forked child, at its end: whether it used what the server may import."""
    if any(module in sys.modules for module in modules):
        with contextlib.suppress(OSError):
            waking.send(_USED)


@contextlib.contextmanager
def _woken_by_children() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(one that can be read once a child has ended, the other end of it)."""
    woken, waking = socket.socketpair()
    woken.setblocking(False)
    waking.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    yield woken, waking
    signal.set_wakeup_fd(-1)


def _start_one(
    control: socket.socket,
    start_by: Start,
    children: Children,
    foreign: Sequence[socket.socket],
    at_end: Callable[[], None],
) -> bool:
    """The next child; False where nobody will ask for one any more."""
    try:
        asked, fds, _, _ = socket.recv_fds(control, 1, 1)
    except ConnectionError:
        return False
    if not asked:
        return False
    line, process = socket.socket(fileno=fds[0]), None
    hello: dict[str, Any] = {}
    if start_by == "fork" and (found := threads()) > 1:
        start_by, hello = "spawn", {"threads": found}
    if start_by == "spawn":
        command = [sys.executable, "-c", _PROGRAM.format("_spawned"), str(line.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[line.fileno()], start_new_session=True)
        pid = process.pid
    elif (pid := os.fork()) == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (control, *foreign, *(line for line, _ in children.values())):
            other.close()
        os.setsid()
        _run(line, at_end)
    children[pid] = line, process
    with contextlib.suppress(OSError):
        Line(line).send({"pid": pid, **hello})
    return True


def _reap(children: Children) -> None:
    """Tell of each child that has ended, how; on a line of its own, and never waiting for who does not listen."""
    for pid in list(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            line, _ = children.pop(pid)
            with line, contextlib.suppress(OSError):
                line.send(b'\n{"exit": %d}\n' % os.waitstatus_to_exitcode(status), socket.MSG_DONTWAIT)


def _spawned() -> None:
    """A fresh child: the caller's import path, then as a forked one."""
    _run(socket.socket(fileno=int(sys.argv[1])), lambda: None)


def _run(end: socket.socket, at_end: Callable[[], None]) -> NoReturn:
    """Call what the caller asks for, and end this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()
    line, code = Line(end), 0
    try:
        asked = line.receive()
        assert asked is not None
        sys.path[:] = asked["path"]
        module, _, function = asked["target"].partition(":")
        getattr(importlib.import_module(module), function)(asked["argument"], line)
    except SystemExit as end_of_it:
        code = end_of_it.code if isinstance(end_of_it.code, int) else int(end_of_it.code is not None)
    except EOFError:
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        at_end()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
