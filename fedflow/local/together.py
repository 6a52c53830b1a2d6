"""Sites that train at the same time: they meet at one of them, which runs xgboost's federated server for this one training.

A site that goes away ends it for all, at once: each raises, is asked again, and they meet anew. Between machines all connections,
theirs and xgboost's, are encrypted, and closed to strangers, where the sites have certificates.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedflow.algorithms.xgboost import Meeting
from fedflow.errors import ResolveError, SiteError, field_error
from fedflow.local.own import OwnData
from fedflow.recipe import TLS
from fedflow.types import RoundContext, SiteId

__all__ = ["RowData", "boosted_together", "tls_context"]

PROGRAM = Path(__file__).with_name("boosting.py")
_LINE = 4096
"""Bytes of a message, at most."""


class RowData(OwnData):
    """A site's data as rows that all sites may train on together."""

    @property
    def encrypts(self) -> bool:
        """Whether it meets others on other machines with certificates."""
        return self.config is not None and self.config.tls is not None

    def boosted(
        self,
        rows: Any,
        params: Mapping[str, Any],
        iterations: int,
        booster: bytes | None,
        meeting: Meeting,
        ctx: RoundContext,
    ) -> bytes:
        assert ctx.site is not None
        job = {"params": dict(params), "iterations": iterations}
        tls = None if self.config is None else self.config.tls
        return boosted_together(ctx.site, meeting, rows=rows, job=job, booster=booster, tls=tls)


@dataclass(frozen=True)
class _Place:
    """Where all meet. name: of this meeting, nobody else's; address: of who leads, None = all are on this machine; context: None = unencrypted"""

    name: str
    address: tuple[str, int] | None
    context: ssl.SSLContext | None

    @property
    def socket(self) -> str:
        """Of a meeting on this machine. Some systems have room for 104 bytes."""
        folders = (tempfile.gettempdir(), "/tmp")
        found = (f"{folder}/fedflow-{os.getuid()}-{self.name}" for folder in folders)
        return next(path for path in found if len(os.fsencode(path)) < 104)


def tls_context(tls: TLS, *, leads: bool) -> ssl.SSLContext:
    """For connections in which both sides show a certificate; who comes to the one that `leads` looks for its name, too.

    Raises ResolveError where the files cannot be used, or everybody may read the key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if leads else ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_REQUIRED
    if leads:
        context.num_tickets = 0  # a connection is readable when the other one has said something, or has gone
    try:
        if Path(tls.private_key).stat().st_mode & 0o007:
            expected = "a file that not everybody may read"
            raise ResolveError(field_error("tls.private_key", tls.private_key, expected, f"chmod o= {tls.private_key}"))
        context.load_verify_locations(tls.authority)
        # without a password OpenSSL asks for one at the terminal
        context.load_cert_chain(tls.certificate, tls.private_key, password="")
    except OSError as error:
        expected = "PEM files that belong together, the key without a passphrase"
        fix = f"correct the site's configuration: {error}"
        raise ResolveError(field_error("tls", tls.model_dump(), expected, fix)) from error
    return context


def boosted_together(
    me: SiteId, meeting: Meeting, *, rows: Any, job: Mapping[str, Any], booster: bytes | None, tls: TLS | None = None
) -> bytes:
    """The new trees, as JSON, that `me` grew with all the sites of `meeting`.

    rows: a DMatrix; job: what the process is told besides; tls: where they are on several machines
    Raises SiteError where one of them does not come, goes away, or xgboost fails; before that ResolveError where certificates cannot be used.
    """
    tracker, sites = meeting.tracker, sorted(meeting.sites)
    leader = sites[0] if tracker is None else tracker.site
    address = None if tracker is None else (tracker.host, tracker.port)
    tls = tls if tracker else None
    place = _Place(meeting.name, address, None if tls is None else tls_context(tls, leads=me == leader))
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
            "rank": sites.index(me),
            "patience": meeting.patience,
            "tls": None if tls is None else tls.model_dump(),
        }
        until = time.monotonic() + meeting.patience
        if me == leader:
            _lead(folder, mine, [site for site in sites if site != me], place, until)
        else:
            _follow(folder, mine, me, leader, place, until)
        return (folder / "trees.json").read_bytes()


# -- the one that the others come to -----------------------------------------------------------------------------------
def _lead(folder: Path, job: Mapping[str, Any], others: Sequence[SiteId], place: _Place, until: float) -> None:
    with _listening(place) as listener, contextlib.ExitStack() as open_now:
        there = _gathered(listener, others, place, until)
        for connection in there.values():
            open_now.enter_context(connection)
        port = _free_port() if place.address is None else place.address[1] + 1
        server = open_now.enter_context(_Process(folder, "serve", {**job, "port": port}))
        while not _answers(port):
            if server.ended or time.monotonic() > until:
                raise SiteError(
                    f"found no federated server of xgboost at port {port}, expected it to start: {server.why()}; raise algorithm.patience"
                )
            time.sleep(0.05)
        for connection in there.values():
            _say(connection, {"port": port})
        host = place.address[0] if place.address and place.context else "127.0.0.1"  # the certificate has its name
        training = open_now.enter_context(_Process(folder, "train", {**job, "server": f"{host}:{port}"}))
        while there or not training.done:
            running: list[Any] = [process.gone for process in (server, training) if not process.done]
            ready = select.select([*there.values(), *running], [], [])[0]
            for process in (server, training):
                if process.gone in ready and not process.finished():
                    raise SiteError(f"training together failed: {process.why()}")
            for site in [site for site, connection in there.items() if connection in ready]:
                if not _hear(there.pop(site)) and not training.done:
                    raise SiteError(f"{site} went away while all trained together; they are asked again")


def _gathered(
    listener: socket.socket, others: Sequence[SiteId], place: _Place, until: float
) -> dict[SiteId, socket.socket]:
    """A connection to each of the others."""
    there: dict[SiteId, socket.socket] = {}
    refused = ""
    try:
        while there.keys() != set(others):
            left = until - time.monotonic()
            ready = select.select([listener, *there.values()], [], [], max(left, 0))[0]
            if not ready or left <= 0:  # strangers may go on coming
                missing = ", ".join(sorted(set(others) - there.keys()))
                expected = f"expected all of {sorted(others)} to come{refused}"
                raise SiteError(f"found no {missing} to train together with, {expected}")
            for site in [site for site, connection in there.items() if connection in ready]:
                there.pop(site).close()  # it says nothing before it is spoken to: it has gone
            if listener in ready:
                connection, _ = listener.accept()
                connection.settimeout(5)
                if place.context:
                    try:
                        connection = place.context.wrap_socket(connection, server_side=True)
                    except OSError as error:
                        refused = f"; who came last could not prove who it is: {error}"
                        connection.close()
                        continue
                told = _hear(connection)
                connection.settimeout(None)
                if told.get("name") == place.name and told.get("site") in others:
                    there[told["site"]] = connection
                else:
                    connection.close()
    except BaseException:
        for connection in there.values():
            connection.close()
        raise
    return there


@contextlib.contextmanager
def _listening(place: _Place) -> Iterator[socket.socket]:
    if place.address is not None:
        with socket.create_server(("", place.address[1])) as listener:
            yield listener
        return
    path = Path(place.socket)
    path.unlink(missing_ok=True)  # of a leader that was killed
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


# -- the others ----------------------------------------------------------------------------------------------------------
def _follow(folder: Path, job: Mapping[str, Any], me: SiteId, leader: SiteId, place: _Place, until: float) -> None:
    connection, told = _met(me, leader, place, until)
    server = f"{'127.0.0.1' if place.address is None else place.address[0]}:{told['port']}"
    with connection, _Process(folder, "train", {**job, "server": server}) as training:
        waiting: list[Any] = [connection, training.gone]
        select.select(waiting, [], [])
        if not training.finished():
            gone = "" if training.ended else f"{leader} went away, or another site did; all are asked again"
            raise SiteError(f"training together failed: {gone or training.why()}")
        with contextlib.suppress(OSError):
            _say(connection, {"done": True})


def _met(me: SiteId, leader: SiteId, place: _Place, until: float) -> tuple[socket.socket, dict[str, Any]]:
    """The connection to the leader, once all are there, and what it says then. The leader may be yet to come, and may come anew."""
    refused = ""
    while time.monotonic() < until:
        try:
            connection = _connected(place)
            try:
                _say(connection, {"name": place.name, "site": me})
                connection.settimeout(max(until - time.monotonic(), 0.1))
                if told := _hear(connection):
                    connection.settimeout(None)
                    return connection, told
            except OSError:
                connection.close()
                raise
            connection.close()
        except OSError as error:
            refused = f": {error}"
        time.sleep(0.1)
    expected = "or not all of the others, expected all sites to come"
    raise SiteError(f"found no {leader} to train together with, {expected}{refused}")


def _connected(place: _Place) -> socket.socket:
    """Raises OSError where nobody is there, or somebody else than expected."""
    if place.address is None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        connection = socket.create_connection(place.address, timeout=5)
    try:
        if place.address is None:
            connection.connect(place.socket)
        elif place.context is not None:
            return place.context.wrap_socket(connection, server_hostname=place.address[0])
    except OSError:
        connection.close()
        raise
    return connection


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
