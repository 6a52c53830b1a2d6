"""Sites that train at the same time: they meet at one of them, which runs xgboost's federated server for this one training.

A site that goes away ends it for all, at once: each raises, is asked again, and they meet anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedflow.errors import SiteError
from fedflow.types import SiteId

__all__ = ["boosted_together"]

PROGRAM = Path(__file__).with_name("boosting.py")
_LINE = 4096
"""Bytes of a message, at most."""


def boosted_together(
    me: SiteId,
    sites: Sequence[SiteId],
    name: str,
    *,
    leader: SiteId,
    address: tuple[str, int] | None,
    patience: float,
    rows: Any,
    job: Mapping[str, Any],
    booster: bytes | None,
) -> bytes:
    """The new trees, as JSON, that `me` grew with all of `sites`.

    name:    of this meeting, nobody else's; address: where `leader` is reached, None = all are on this machine
    patience: seconds to wait for the others; rows: a DMatrix; job: what the process is told besides
    Raises SiteError where one of them does not come, goes away, or xgboost fails.
    """
    with tempfile.TemporaryDirectory(prefix="fedflow-") as made:
        folder = Path(made)
        rows.save_binary(str(folder / "rows"))
        if booster is not None:
            (folder / "before.json").write_bytes(booster)
        mine = {
            **job,
            "rows": str(folder / "rows"),
            "booster": str(folder / "before.json") if booster is not None else None,
            "out": str(folder / "trees.json"),
            "size": len(sites),
            "rank": sorted(sites).index(me),
            "patience": patience,
        }
        until = time.monotonic() + patience
        if me == leader:
            _lead(folder, mine, sorted(set(sites) - {me}), name, address, until)
        else:
            _follow(folder, mine, me, leader, name, address, until)
        return (folder / "trees.json").read_bytes()


# -- the one that the others come to -----------------------------------------------------------------------------------
def _lead(
    folder: Path,
    job: Mapping[str, Any],
    others: Sequence[SiteId],
    name: str,
    address: tuple[str, int] | None,
    until: float,
) -> None:
    with _listening(name, address) as listener, contextlib.ExitStack() as open_now:
        there = _gathered(listener, others, name, until)
        for connection in there.values():
            open_now.enter_context(connection)
        port = _free_port() if address is None else address[1] + 1
        server = open_now.enter_context(_Process(folder, "serve", {**job, "port": port}))
        while not _answers(port):
            if server.ended or time.monotonic() > until:
                raise SiteError(f"xgboost's federated server did not start: {server.why()}")
            time.sleep(0.05)
        for connection in there.values():
            _say(connection, {"port": port})
        training = open_now.enter_context(_Process(folder, "train", {**job, "server": f"127.0.0.1:{port}"}))
        while there or not training.done:
            waiting: list[Any] = [*there.values(), *([] if training.done else [training.gone])]
            ready = select.select(waiting, [], [])[0]
            if training.gone in ready and not training.finished():
                raise SiteError(f"training together failed: {training.why()}")
            for site in [site for site, connection in there.items() if connection in ready]:
                if not _hear(there.pop(site)) and not training.done:
                    raise SiteError(f"{site} went away while all trained together; they are asked again")


def _gathered(
    listener: socket.socket, others: Sequence[SiteId], name: str, until: float
) -> dict[SiteId, socket.socket]:
    """A connection to each of the others."""
    there: dict[SiteId, socket.socket] = {}
    try:
        while there.keys() != set(others):
            left = until - time.monotonic()
            ready = select.select([listener, *there.values()], [], [], max(left, 0))[0]
            if not ready:
                missing = ", ".join(sorted(set(others) - there.keys()))
                raise SiteError(f"found no {missing} to train together with, expected all of {sorted(others)} to come")
            for site in [site for site, connection in there.items() if connection in ready]:
                there.pop(site).close()  # it says nothing before it is spoken to: it has gone
            if listener in ready:
                connection, _ = listener.accept()
                connection.settimeout(5)
                told = _hear(connection)
                connection.settimeout(None)
                if told.get("name") == name and told.get("site") in others:
                    there[told["site"]] = connection
                else:
                    connection.close()
    except BaseException:
        for connection in there.values():
            connection.close()
        raise
    return there


@contextlib.contextmanager
def _listening(name: str, address: tuple[str, int] | None) -> Iterator[socket.socket]:
    if address is not None:
        with socket.create_server(("", address[1])) as listener:
            yield listener
        return
    place = _place(name)
    place.unlink(missing_ok=True)  # of a leader that was killed
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place))
        listener.listen()
        try:
            yield listener
        finally:
            place.unlink(missing_ok=True)


# -- the others ----------------------------------------------------------------------------------------------------------
def _follow(
    folder: Path,
    job: Mapping[str, Any],
    me: SiteId,
    leader: SiteId,
    name: str,
    address: tuple[str, int] | None,
    until: float,
) -> None:
    connection, told = _met(me, leader, name, address, until)
    server = f"{'127.0.0.1' if address is None else address[0]}:{told['port']}"
    with connection, _Process(folder, "train", {**job, "server": server}) as training:
        waiting: list[Any] = [connection, training.gone]
        select.select(waiting, [], [])
        if not training.finished():
            gone = "" if training.ended else f"{leader} went away, or another site did; all are asked again"
            raise SiteError(f"training together failed: {gone or training.why()}")
        with contextlib.suppress(OSError):
            _say(connection, {"done": True})


def _met(
    me: SiteId, leader: SiteId, name: str, address: tuple[str, int] | None, until: float
) -> tuple[socket.socket, dict[str, Any]]:
    """The connection to the leader, once all are there, and what it says then. The leader may be yet to come, and may come anew."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            connection = _connected(name, address)
            try:
                _say(connection, {"name": name, "site": me})
                connection.settimeout(max(until - time.monotonic(), 0.1))
                if told := _hear(connection):
                    connection.settimeout(None)
                    return connection, told
            except OSError:
                connection.close()
                raise
            connection.close()
        time.sleep(0.1)
    raise SiteError(f"found no {leader} to train together with, or not all of the others, expected all sites to come")


def _connected(name: str, address: tuple[str, int] | None) -> socket.socket:
    if address is not None:
        return socket.create_connection(address, timeout=5)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(_place(name)))
    except OSError:
        connection.close()
        raise
    return connection


def _place(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"fedflow-{os.getuid()}-{name}"


# -- messages, ports, processes ------------------------------------------------------------------------------------------
def _say(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(connection: socket.socket) -> dict[str, Any]:
    """A message; nothing where the other one has gone."""
    line = b""
    with contextlib.suppress(OSError, ValueError):
        while not line.endswith(b"\n") and len(line) < _LINE:
            if not (part := connection.recv(1)):
                return {}
            line += part
        told = json.loads(line)
        return told if isinstance(told, dict) else {}
    return {}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class _Process:
    """`boosting.py`, for as long as the block lasts. gone: readable when it has ended; done: whether it did what it was for"""

    def __init__(self, folder: Path, task: str, job: Mapping[str, Any]) -> None:
        self._job = folder / f"{task}.json"
        self._job.write_text(json.dumps(job), encoding="utf-8")
        self.done = False
        self.gone, theirs = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), task, str(self._job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs],
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        os.close(self.gone)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def finished(self) -> bool:
        """Whether it has ended, and well."""
        if select.select([self.gone], [], [], 0)[0]:
            self.done = self._process.wait() == 0
        return self.done

    def why(self) -> str:
        """Why it did not end well."""
        told = Path(f"{self._job}.error")
        return told.read_text(encoding="utf-8") if told.exists() else f"exit code {self._process.poll()}"
