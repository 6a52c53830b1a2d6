"""Children start from what is imported already, or fresh where that cannot be forked; they end whole."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from fedflow.engine.forks import Child, ForkServer, Start

WARM = "tests.engine.warm.loaded"
SECONDS = 100.0


def said(child: Child) -> dict[str, Any]:
    """What it says; it has ended by itself afterwards."""
    message = child.receive(SECONDS)
    assert message is not None
    assert child.receive(SECONDS) is None and (child.ended, child.exit) == (True, 0)
    child.end()
    return message


@pytest.fixture
def server() -> Iterator[ForkServer]:
    found = ForkServer([WARM])
    yield found
    found.close()


def test_children_share_what_was_imported_once_and_lead_a_group_of_their_own(server: ForkServer) -> None:
    first, second = (said(server.fork(f"{WARM}:who", {"number": n})) for n in (1, 2))
    assert first["imported by"] == second["imported by"] not in (first["runs"], second["runs"], os.getpid())
    assert first["group"] == first["runs"] != second["runs"] == second["group"]
    assert (first["given"], second["given"]) == ({"number": 1}, {"number": 2})


def test_what_a_child_used_of_what_is_dear_is_there_for_the_next() -> None:
    server = ForkServer([WARM], later=["colorsys", "this_is_not_there"])
    asked = ("chunk", "colorsys", "colorsys", "chunk")
    assert [said(server.fork(f"{WARM}:imports", m))["there"] for m in asked] == [False, False, True, False]
    server.close()


@pytest.mark.parametrize(
    ("module", "start_by", "logged"),
    [(WARM, "spawn", 0), ("tests.engine.warm.threaded", "fork", 1)],
    ids=["as asked", "more than one thread"],
)
def test_what_cannot_be_forked_is_spawned(
    module: str, start_by: Start, logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each imports for itself; with a line in the log, one, where a fork was asked for."""
    server = ForkServer([module], start_by)
    with caplog.at_level(logging.WARNING, "fedflow.engine.forks"):
        first, second = (said(server.fork(f"{module}:who")) for _ in range(2))
    server.close()
    assert first["imported by"] == first["runs"] == first["group"] != second["runs"] == second["imported by"]
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == logged and all(module in line and "2 are there" in line for line in lines)


def test_an_exit_code_and_a_signal_are_told(server: ForkServer) -> None:
    for code in (0, 3):
        child = server.fork(f"{WARM}:leave", code)
        assert child.receive(SECONDS) is None and child.exit == code
    child = server.fork(f"{WARM}:last_words", 300_000)  # more than a socket holds
    assert child.receive(SECONDS) is None and child.exit == -signal.SIGKILL
    # no such function: a traceback, and the server goes on
    assert server.fork(f"{WARM}:nothing").receive(SECONDS) is None
    assert said(server.fork(f"{WARM}:who"))["given"] is None


def test_a_killed_child_takes_along_what_it_started(server: ForkServer) -> None:
    child = server.fork(f"{WARM}:start_another")
    message = child.receive(SECONDS)
    assert message is not None
    started = psutil.Process(message["started"])
    assert child.receive(0.0) is None and not child.ended
    child.end()
    assert not psutil.pid_exists(child.pid)
    started.wait(SECONDS)


def test_a_killed_server_is_replaced(server: ForkServer) -> None:
    """And its last children are told to have been lost."""
    child = server.fork(f"{WARM}:start_another")
    assert child.receive(SECONDS) is not None
    psutil.Process(child.pid).parent().kill()
    before = said(server.fork(f"{WARM}:who"))
    assert before["imported by"] != child.pid
    child.kill()
    child.end()
    assert child.exit is None
