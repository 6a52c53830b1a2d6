"""A training script in a process of its own, with whatever command it is started."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fedflow.algorithm import LocalResult
from fedflow.errors import SiteError
from fedflow.local import exchange, guard, numerics
from fedflow.local.exchange import Task
from fedflow.local.function import config_for
from fedflow.local.model import mismatches, model_groups
from fedflow.local.state import TrainingState, join, split
from fedflow.local.trainer import Request, Trainer
from fedflow.local.workload import Setup
from fedflow.types import MODEL_GROUPS, Groups, RoundContext

__all__ = ["ScriptWorkload"]

log = logging.getLogger(__name__)

_POLL = 0.05  # seconds between two looks at a script that runs
_TAIL = 40  # lines of output in an error


class ScriptWorkload:
    """One site's training script: it calls `fedflow.client`, in a process (or several) of its own.

    command:  as in a shell, without its syntax: "python -u train.py", "torchrun --nproc_per_node=2 train.py". This
              interpreter's programs are found first
    examples: in the training data; default: what the script sends
    folder:   where it runs; default: this process's
    environment: variables besides this process's
    timeout:  seconds until it is killed with everything that it started; default: the attempt's own
    evaluate: `evaluate(model) -> metrics`, in this process; default: none
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        examples: int | None = None,
        folder: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ) -> None:
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        self.examples, self.folder, self.timeout = examples, folder, timeout
        self.environment = dict(environment or {})
        self._evaluate = evaluate

    def __len__(self) -> int:
        return 1 if self.examples is None else self.examples

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return {} if self._evaluate is None else self._evaluate(model)

    def training(self, setup: Setup) -> ScriptTrainer:
        return ScriptTrainer(**setup.options(self))


class ScriptTrainer(Trainer):
    """Starts the script, waits for it, and takes its output if it is whole and fits the model; else nothing of it counts."""

    workload: ScriptWorkload

    def perform(self, broadcast: Groups, request: Request) -> LocalResult:
        model = self.load_model(broadcast)
        metrics = self.evaluation(model, "before")
        with tempfile.TemporaryDirectory(prefix="fedflow-task-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            self._give(folder, broadcast, request)
            _Process(self.workload, folder, request.ctx.place).run(request.steps, self.on_step)
            result = self._take(folder, model, request)
        metrics |= result.metrics
        for group, tensors in model_groups(model).items():
            for key, tensor in tensors.items():
                tensor.copy_(getattr(result, group)[key])
        return replace(result, metrics=metrics | self.evaluation(model, "after"))

    def _give(self, folder: Path, broadcast: Groups, request: Request) -> None:
        (folder / "out").mkdir()
        inputs = {group: broadcast[group] for group in MODEL_GROUPS}
        exchange.write_groups(
            folder / "in", {**inputs, "offset": request.correction.offset, "merge": request.merge.values}
        )
        for rank, state in enumerate(self._kept(request)):
            exchange.write_state(folder / "in" / str(rank), state)
        self._task(request).write(folder)

    def _kept(self, request: Request) -> list[TrainingState]:
        """What the script's processes go on with; a state that is lost is a fresh start."""
        kept = None if request.memory is None else request.memory.read()
        return [] if kept is None else split(kept)

    def _task(self, request: Request) -> Task:
        ctx, correction = request.ctx, request.correction
        return Task(
            run=ctx.run,
            round=ctx.round,
            site=ctx.site or "",
            config=config_for(self.settings, ctx, request.steps),
            seed=ctx.seed,
            steps=request.steps,
            strict=self.settings.strict,
            preserve=request.memory is not None,
            proximal=correction.proximal,
            apply=correction.apply,
            assumes_sgd=correction.assumes_sgd,
            merge_after=request.merge.after,
            merge_keep=request.merge.keep,
            **self.numerics.model_dump(mode="json"),
        )

    def _take(self, folder: Path, model: nn.Module, request: Request) -> LocalResult:
        try:
            result = exchange.read_result(folder / "out")
            groups = exchange.read_groups(folder / "out")
            states = [exchange.read_state(folder / "out" / str(rank)) for rank in range(result.processes)]
            for group, own in model_groups(model).items():
                if problems := mismatches(own, groups[group]):
                    raise SiteError(f"{group}: {'; '.join(problems)}; send the model that was received")
            examples = self.workload.examples if result.examples is None else result.examples
            if not examples:
                raise SiteError(
                    "examples: found none, expected their number; give it to client.send or to the workload"
                )
        except SiteError as error:
            raise _failed(f"the script's output does not count: {error.reason}", request.ctx) from error
        if request.memory is not None:
            request.memory.leave(join([state for state in states if state is not None]), result.state)
        return LocalResult(
            **groups,
            examples=examples,
            steps=result.steps,
            lr_sum=result.lr_sum,
            metrics=result.metrics,
            numerics=numerics.recorded(self.numerics),
        )


def _failed(text: str, ctx: RoundContext) -> SiteError:
    return SiteError(text, **ctx.place)


class _Process:
    """The script's process, below a guard that leaves nothing of it running, also if this process is killed."""

    def __init__(self, workload: ScriptWorkload, folder: Path, place: Mapping[str, Any]) -> None:
        self.workload, self.folder, self.place = workload, folder, dict(place)
        self.tail: deque[str] = deque(maxlen=_TAIL)

    def run(self, planned: int | None, on_step: Callable[[int, int | None], None]) -> None:
        """Until it ends. Raises SiteError where it fails or outlives its timeout, and whatever `on_step` raises."""
        process = self._start()
        reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            self._wait(process, planned, on_step)
        finally:
            _end(process)
            reader.join(5)
        report = self.folder / "exit"
        code = int(report.read_text() or -1) if report.exists() else -1
        if code:
            raise self._error(f"the script ended with {_meaning(code)}")

    def _start(self) -> subprocess.Popen[bytes]:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(self.folder / "exit"), *self.workload.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=self.workload.folder,
            env={**os.environ, "PATH": programs, **self.workload.environment, exchange.VARIABLE: str(self.folder)},
        )

    def _read(self, output: Any) -> None:
        with output:
            for line in output:
                text = line.decode(errors="replace").rstrip()
                self.tail.append(text)
                log.info("%s", text)

    def _wait(
        self, process: subprocess.Popen[bytes], planned: int | None, on_step: Callable[[int, int | None], None]
    ) -> None:
        until = None if self.workload.timeout is None else time.monotonic() + self.workload.timeout
        reported, looked = -1, 0.0
        while process.poll() is None:
            done = self._progress()
            if done != reported or time.monotonic() - looked > 1:
                reported, looked = done, time.monotonic()
                on_step(done, planned)
            if until is not None and time.monotonic() > until:
                raise self._error(f"the script was killed after its timeout of {self.workload.timeout:g} s")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)

    def _progress(self) -> int:
        try:
            return int(json.loads((self.folder / "progress").read_text())[0])
        except (OSError, ValueError, LookupError, TypeError):
            return 0

    def _error(self, text: str) -> SiteError:
        output = "\n".join(self.tail)
        return SiteError(
            f"{text}; the end of its output:\n{output}" if output else f"{text}, without output", **self.place
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left: the guard does it when its standard input ends, and if it should not, its group goes."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _meaning(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}" if code != -1 else "no exit code"
