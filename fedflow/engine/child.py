"""Calls in a child process that a timeout really ends. Only JSON goes in and comes out."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedflow import errors
from fedflow.engine.aggregation import evaluate_round
from fedflow.engine.forks import ForkServer, Line
from fedflow.engine.logs import passed_on
from fedflow.engine.rounds import commit_round, start_run
from fedflow.errors import FedflowError, RoundError
from fedflow.memory import keep_freed
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.types import SiteId

__all__ = ["aggregate_in_child", "evaluate_in_child", "start_in_child", "warm_up"]

_server = ForkServer(preload=["fedflow.engine.child"])
_log = logging.getLogger("fedflow.engine")


def warm_up(*modules: str) -> None:
    """Have the fork server import everything, and `modules`, once; a child then starts in milliseconds."""
    _server.preload = ["fedflow.engine.child", *modules]
    _server.start()


def start_in_child(
    store: str,
    options: dict[str, Any],
    run: str,
    recipe: Recipe,
    sites: Sequence[SiteId],
    keys: Mapping[SiteId, str],
    *,
    timeout: float,
) -> None:
    """Begin a run, or find it begun: the model is built and written there, and its memory given back. Raises what
    `start_run` raises."""
    _call("start", [store, options, run, recipe.model_dump(mode="json"), list(sites), dict(keys)], timeout)


def aggregate_in_child(
    store: str, options: dict[str, Any], run: str, round: int, phase: str, opening: int, *, timeout: float
) -> None:
    """Aggregate and commit a closed phase. Raises what `commit_round` raises, and RoundError at the timeout."""
    _call("aggregate", [store, options, run, round, phase, opening], timeout)


def evaluate_in_child(store: str, options: dict[str, Any], run: str, round: int, phase: str, *, timeout: float) -> None:
    """Evaluate a committed round at the server."""
    _call("evaluate", [store, options, run, round, phase], timeout)


def _patient(journal: Journal) -> Journal:
    """The same, with the run's transfer_timeout."""
    limit = journal.recipe().durations.transfer_timeout
    assert limit
    return Journal(journal.store.patient(limit), journal.run)


def _start(
    store: str, options: dict[str, Any], run: str, recipe: dict[str, Any], sites: list[str], keys: dict[str, str]
) -> None:
    start_run(ObjectStore(store, options), run, Recipe.model_validate(recipe), sites, keys)


def _aggregate(store: str, options: dict[str, Any], run: str, round: int, phase: str, opening: int) -> None:
    keep_freed()
    journal = _patient(Journal(ObjectStore(store, options), run))
    plan = journal.plan(round, phase)
    closing = journal.closing(plan, opening) if plan else None
    assert plan is not None and closing is not None
    commit_round(journal, plan, closing)


def _evaluate(store: str, options: dict[str, Any], run: str, round: int, phase: str) -> None:
    journal = _patient(Journal(ObjectStore(store, options), run))
    manifest = journal.manifest(round, phase)
    assert manifest is not None
    evaluate_round(journal, manifest)


_CALLS: dict[str, Callable[..., None]] = {"start": _start, "aggregate": _aggregate, "evaluate": _evaluate}


def _call(name: str, args: list[Any], timeout: float) -> None:
    child = _server.fork("fedflow.engine.child:_serve", [name, args])
    try:
        answer = child.receive(timeout)
    finally:
        ended, code = child.ended, child.exit  # before it is killed: it has nothing more to do
        child.end()
    if answer is None and ended:
        raise RoundError(f"{name}: its process died with exit code {code}")
    if answer is None:
        raise RoundError(f"{name}: killed after {timeout:g} s; give it longer (round_deadline) or a faster store")
    for level, text in answer["log"]:
        _log.log(level, "%s", text)
    if "error" in answer:
        raise _error(name, answer)


def _error(name: str, answer: dict[str, Any]) -> FedflowError:
    cls = getattr(errors, answer["error"], RoundError)
    return (
        cls(answer["text"], **answer.get("place", {}))
        if issubclass(cls, FedflowError)
        else RoundError(f"{name}: {answer['text']}")
    )


def _serve(asked: list[Any], line: Line) -> None:
    name, args = asked
    threading.Thread(target=_end_with_the_caller, args=(line.socket.fileno(),), daemon=True).start()
    kept: list[tuple[int, str]] = []
    said: dict[str, Any] = {"log": kept}  # for the caller to say again
    try:
        with passed_on(lambda level, text: kept.append((level, text))):
            _CALLS[name](*args)
    except FedflowError as error:
        said |= {
            "error": type(error).__name__,
            "text": error.reason,
            "place": {"run": error.run, "round": error.round, "site": error.site},
        }
    except Exception:
        said |= {"error": "RoundError", "text": f"{name} failed:\n{traceback.format_exc()}"}
    line.send(said)


def _end_with_the_caller(answer: int) -> None:
    """Kill this process and what it started once nobody can read its answer any more: its caller was killed."""
    closed = select.poll()
    closed.register(answer, 0)  # an error is told without being asked for
    closed.poll()
    os.killpg(0, signal.SIGKILL)
