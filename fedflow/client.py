"""What a training script calls: three functions, and the current task.

    from fedflow import client

    while client.is_running():
        task = client.receive(model)              # the received values are in the model now
        for inputs, targets in client.data(loader):
            ...                                    # the loop, as it was
        client.send(metrics={"loss": loss})

Started by hand, the script runs once, with the values that its model has, and `send` only prints its metrics.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from fedflow.errors import SiteError
from fedflow.local import exchange, numerics
from fedflow.local.exchange import Result, Task
from fedflow.local.function import Config, examples_in, numbers
from fedflow.local.model import load_groups
from fedflow.local.session import Session
from fedflow.local.state import Memory
from fedflow.recipe import Numerics

__all__ = ["Task", "config", "data", "is_running", "receive", "send", "session", "task", "track"]


class _Client:
    """The one training of this process."""

    def __init__(self) -> None:
        self.folder = Path(os.environ[exchange.VARIABLE]) if exchange.VARIABLE in os.environ else None
        self.task = Task.read(self.folder) if self.folder else Task("", 0, "", {}, seed=0)
        self.rank = int(os.environ.get("RANK", "0"))
        self.memory = Memory(self._kept)
        self.session: Session | None = None
        self.examples: int | None = None
        self.sent = False
        self.stack = ExitStack()

    def _kept(self) -> Any:
        assert self.folder is not None
        return exchange.read_state(self.folder / "in" / str(self.rank))

    def begin(self, model: nn.Module) -> None:
        if self.session is not None:
            raise SiteError("client.receive: found a second call, expected one; a script trains one round")
        if self.folder is None:
            return
        broadcast = exchange.read_groups(self.folder / "in")
        load_groups(model, broadcast)
        wishes = exchange.read_groups(self.folder / "in", ("offset", "merge"))
        task = self.task
        settings = Numerics(threads=task.threads, device=task.device, deterministic=task.deterministic)
        self.stack.enter_context(numerics.applied(settings, task.seed))
        self.session = Session(
            model.to(task.device),
            correction=task.correction(wishes["offset"]),
            merge=task.merge(wishes["merge"]),
            steps=task.steps,
            strict=task.strict,
            memory=self.memory if task.preserve else None,
            on_step=self._progress,
            place={"run": task.run, "round": task.round, "site": task.site},
        )
        self.session.__enter__()

    def _progress(self, done: int, planned: int | None) -> None:
        if self.rank == 0 and self.folder is not None:
            exchange.write_json(self.folder / "progress", [done, planned])

    def end(
        self, metrics: Mapping[str, Any] | None = None, examples: int | None = None, error: BaseException | None = None
    ) -> None:
        metrics = metrics or {}
        self.sent = True
        if self.folder is None:
            print(dict(metrics))
            return
        if self.session is None:
            raise SiteError("client.send: found no call of client.receive before it, expected one; it loads the model")
        self.session.__exit__(None if error is None else type(error), error, None)
        self.stack.close()
        exchange.write_state(self.folder / "out" / str(self.rank), self.memory.after)
        if self.rank == 0:
            self._write(metrics, self.examples if examples is None else examples)

    def _write(self, metrics: Mapping[str, Any], examples: int | None) -> None:
        assert self.folder is not None and self.session is not None
        out = self.folder / "out"
        exchange.write_groups(out, self.session.groups())
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        done, lr_sum = self.session.done, self.session.lr_sum
        Result(examples, done, lr_sum, numbers(metrics), self.memory.note, processes).write(out)


_CLIENT: _Client | None = None


def _client() -> _Client:
    global _CLIENT
    if _CLIENT is None:
        _CLIENT = _Client()
        _stop_quietly(_CLIENT)
    return _CLIENT


def _stop_quietly(client: _Client) -> None:
    """A script that goes on after its last step ends there; what it has trained is sent."""
    before = sys.excepthook

    def hook(kind: Any, error: Any, traceback: Any) -> None:
        if client.session is not None and client.session.ended(error):
            client.end(error=error)
            sys.stdout.flush()
            os._exit(0)
        before(kind, error, traceback)

    sys.excepthook = hook


def is_running() -> bool:
    """Whether there is a task that nothing was sent for yet."""
    return not _client().sent


def receive(model: nn.Module) -> Task:
    """Load the received values into `model`; from here on its training is counted and corrected. Returns the task."""
    _client().begin(model)
    return _client().task


def data(loader: Any) -> Any:
    """`loader` as a stream that goes on where this site stopped reading, and ends once the task's steps are complete."""
    client = _client()
    if client.examples is None:
        client.examples = examples_in(loader)
    streams = client.session is not None and (client.task.steps is not None or client.task.preserve)
    return client.session.data(loader) if streams and client.session else loader


def send(*, metrics: Mapping[str, Any] | None = None, examples: int | None = None) -> None:
    """Hand over the trained model. examples: in the training data; default: those of the loader given to `data`.

    With torchrun every process calls it, and the one of rank 0 sends. Raises SiteError where the training cannot count.
    """
    _client().end(metrics, examples)


def task() -> Task:
    """The current task."""
    return _client().task


def config() -> Config:
    """The current task's configuration, by key and by attribute."""
    return Config(_client().task.config)


def track(*objects: Any) -> None:
    """Announce a scheduler, scaler or the like whose state is to be preserved and that does not refer to its optimizer."""
    if (active := _client().session) is not None:
        active.track(*objects)


def session() -> Session | None:
    """The session of this process, if fedflow started it and it has received."""
    return _client().session
