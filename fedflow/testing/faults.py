"""Faults for tests: a real SIGKILL, or a wait, at a named write of the journal or at an optimizer step.

    fault = fail_at("manifest", round=1, token=tmp_path / "fired")
    subprocess.run(["fedflow", "run", ...], env={**os.environ, **fault.environment()})  # dies before round 1 is committed

The library has no hook for this. In the process that is to fail, `Fault.arm` wraps `ObjectStore.put`,
`ObjectStore.write_stream` and `Trainer.train`; `Fault.environment` does so in every Python process below one that is started with it, also in those
that a Prefect worker starts, as soon as they import fedflow's engine and not before.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from fedflow.store.objects import ObjectStore

__all__ = ["VARIABLE", "Effect", "Fault", "Step", "When", "arm_from_environment", "fail_at", "watching"]

VARIABLE = "FEDFLOW_FAULT"
"""The fault as JSON, for processes that somebody else starts; or "@" and the path of a file that may hold it one day."""

When = Literal["before", "after"]
Effect = Literal["kill", "hang", "stop", "slow", "hold"]
Step = Literal[
    "run",  # the run's record
    "initial objects",  # the state before round 0
    "initial manifest",
    "plan",
    "opening",
    "attempt",  # the journal entry that goes before a dispatch
    "training",  # an optimizer step
    "update objects",
    "site state",
    "update manifest",
    "closing",
    "server objects",  # of aggregation
    "delegation",  # the journal entry that goes before an aggregation is sent elsewhere
    "workplace objects",  # of an aggregation at a site or a region
    "workplace record",
    "manifest",  # the commit
    "evaluation",
]


@dataclass(frozen=True)
class Fault:
    """What happens where.

    at:      pattern of the URL of a write, or of "training/<site>/<round>/<step>" for an optimizer step
    when:    before or after that write is visible; optimizer steps have no before
    effect:  kill: SIGKILL to this process; hang: wait for ever; stop: SIGSTOP, so that nothing in it waits for anything either; slow: wait `seconds`; hold: wait until `release`
    nth:     at which match in this process, from 1
    given:   pattern of a key that must be in the store for a write to match
    token:   a file that is created when the fault strikes; while it is there no process is struck again
    """

    at: str
    when: When = "before"
    effect: Effect = "kill"
    nth: int = 1
    given: str | None = None
    token: str | None = None
    seconds: float = 0.0

    # -- how it gets into a process
    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Variables that arm the fault in every Python process below the one that gets them."""
        folder = str(Path(__file__).parent / "injected")
        paths = [folder, *filter(None, [base.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: json.dumps(asdict(self))}

    def arm(self) -> None:
        """Arm it in this process and its forks, for good."""
        _arm(_Trap(lambda: self))

    def write(self, path: Path) -> None:
        """Arm it in every process that was started with `watching(path)`; removing the file disarms it."""
        path.with_suffix(".new").write_text(json.dumps(asdict(self)))
        path.with_suffix(".new").replace(path)

    def release(self) -> None:
        """Let the process that is held at this place go on, or never hold one."""
        assert self.token is not None
        Path(self.token).write_text(_RELEASED)

    @property
    def struck(self) -> bool:
        """Whether it has happened; known only with a token."""
        return self.token is not None and Path(self.token).exists()


def watching(path: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables with which a process looks into `path` for its fault, again and again."""
    return {**Fault(at="").environment(base), VARIABLE: f"@{path}"}


def _arm(trap: _Trap) -> None:
    """Wrap the places where a fault can strike."""
    from fedflow.local.trainer import Trainer
    from fedflow.store.objects import ObjectStore

    put, write_stream, train = ObjectStore.put, ObjectStore.write_stream, Trainer.train

    def faulty_put(store: ObjectStore, key: str, data: Any, **options: Any) -> None:
        trap.reached(f"{store.url}/{key}", "before", store)
        put(store, key, data, **options)
        trap.reached(f"{store.url}/{key}", "after", store)

    def faulty_write_stream(store: ObjectStore, key: str, parts: Any, **options: Any) -> Any:
        trap.reached(f"{store.url}/{key}", "before", store)
        ref = write_stream(store, key, parts, **options)
        trap.reached(f"{store.url}/{key}", "after", store)
        return ref

    def faulty_train(trainer: Trainer, broadcast: Any, ctx: Any, **options: Any) -> Any:
        def on_step(done: int, planned: int | None) -> None:
            trap.reached(f"training/{ctx.site}/{ctx.round:05d}/{done}", "after")
            trainer.on_step(done, planned)

        return train(replace(trainer, on_step=on_step), broadcast, ctx, **options)

    ObjectStore.put = faulty_put  # type: ignore[assignment,method-assign]
    ObjectStore.write_stream = faulty_write_stream  # type: ignore[assignment,method-assign]
    Trainer.train = faulty_train  # type: ignore[assignment,method-assign]


class _Trap:
    """A fault in one process, and how often its place was reached there. read: the fault, if there is one now."""

    def __init__(self, read: Callable[[], Fault | None]) -> None:
        self.read, self.matches = read, 0

    def reached(self, event: str, when: When, store: ObjectStore | None = None) -> None:
        fault = self.read()
        if fault is None or when != fault.when or not re.search(fault.at, event) or not self._given(fault, store):
            return
        self.matches += 1
        if self.matches >= fault.nth and self._first(fault):
            strike(fault)

    def _given(self, fault: Fault, store: ObjectStore | None) -> bool:
        given = fault.given
        return given is None or store is None or any(re.search(given, key) for key in store.list())

    def _first(self, fault: Fault) -> bool:
        if fault.token is None:
            return True
        try:
            os.close(os.open(fault.token, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


_RELEASED = "released"


def strike(fault: Fault) -> None:
    """Do to this process what the fault says."""
    if fault.effect == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.effect == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.effect == "hang":
        threading.Event().wait()
    elif fault.effect == "hold":
        while fault.token is not None and Path(fault.token).read_text() != _RELEASED:
            time.sleep(0.05)
    else:
        time.sleep(fault.seconds)


def arm_from_environment() -> None:
    """Arm the fault that this process was started with, if there is one."""
    text = os.environ.get(VARIABLE, "")
    if text.startswith("@"):
        _arm(_Trap(partial(_read, Path(text[1:]))))
    elif text:
        Fault(**json.loads(text)).arm()


def _read(path: Path) -> Fault | None:
    return Fault(**json.loads(path.read_text())) if path.exists() else None


def fail_at(
    step: Step,
    *,
    site: str | None = None,
    round: int | None = None,
    when: When = "before",
    effect: Effect = "kill",
    nth: int = 1,
    token: Path | str | None = None,
    seconds: float = 0.0,
) -> Fault:
    """The fault at `step` of any run. site, round: only there; nth: for "training" the optimizer step, from 1."""
    if step not in get_args(Step):
        raise ValueError(f"step: found {step!r}, expected one of {get_args(Step)}")
    if effect == "hold" and token is None:
        raise ValueError(
            "token: missing, expected the file that is created when the fault holds and written at its release"
        )
    name = "[^/]+" if site is None else re.escape(site)
    number = r"\d{5}" if round is None else f"{round:05d}"
    digest = "[0-9a-f]{64}"
    public, server = f"public/[^/]+/rounds/{number}/[^/]+", f"server/[^/]+/rounds/{number}"
    places = {
        "run": r"public/[^/]+/run\.json$",
        "initial objects": rf"(public|server)/[^/]+/objects/{digest}",
        "initial manifest": r"server/[^/]+/initial/manifest\.json$",
        "plan": rf"{public}/plan\.json$",
        "opening": rf"{public}/open/\d+\.json$",
        "attempt": rf"{server}/[^/]+/attempts/\d+\.{name}\.\d+\.json$",
        "training": rf"^training/{name}/{number}/",
        "update objects": rf"sites/{name}/[^/]+/{number}/[^/]+/{digest}\.safetensors$",
        "site state": rf"{name}/[^/]+-[0-9a-f]{{12}}/state/{digest}\.json$",
        "update manifest": rf"sites/{name}/[^/]+/{number}/[^/]+/{digest}\.json$",
        "closing": rf"{public}/closed/\d+(\.\d+)?\.json$",
        "server objects": rf"(public|server)/[^/]+/objects/{digest}",
        "delegation": rf"{server}/[^/]+/delegations/[^/]+/\d+\.json$",
        "workplace objects": rf"sites/{name}/[^/]+/objects/{digest}",
        "workplace record": rf"sites/{name}/[^/]+/aggregated/{digest}\.json$",
        "manifest": rf"{server}/[^/]+/manifest\.json$",
        "evaluation": rf"{server}/evaluation\.json$",
    }
    return Fault(
        at=places[step],
        when="after" if step == "training" else when,
        effect=effect,
        nth=nth,
        given=f"^{public}/closed/" if step == "server objects" else None,
        token=None if token is None else str(token),
        seconds=seconds,
    )
