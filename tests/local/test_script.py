"""A script in a process of its own: the same numbers, whole output or none, and nothing left running."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedflow.algorithm import Correction, Merge
from fedflow.errors import OpeningClosed, SiteError
from fedflow.local import Config, FunctionWorkload, ScriptWorkload, Setup, exchange, training_of
from fedflow.local.state import Memory
from fedflow.recipe import LocalTraining, Numerics
from fedflow.types import Groups
from tests.builders import Tiny, blobs
from tests.local.test_preserved import context, start, train

GOOD = Path(__file__).parent / "scripts" / "good.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def script(text: str, folder: Path, **options: Any) -> ScriptWorkload:
    path = folder / "script.py"
    path.write_text(text)
    return ScriptWorkload([sys.executable, "-u", str(path)], **options)


def trained(workload: Any, broadcast: Groups, memory: Memory | None = None, round: int = 0, **asked: Any) -> Any:
    on_step = asked.pop("on_step", lambda done, planned: None)
    setup = Setup(Tiny, LocalTraining(), Numerics(), on_step, memory or Memory())
    return training_of(workload, setup).train(broadcast, context(round), preserve=memory is not None, **asked)


# -- the same numbers --------------------------------------------------------------------------------------------------
def in_this_process(model: nn.Module, data: Any, config: Config) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    model.eval()
    for inputs, targets in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()


def test_a_corrected_script_that_takes_something_in_gives_what_such_a_function_gives(
    caplog: pytest.LogCaptureFixture,
) -> None:
    offset = {name: torch.full_like(p, 0.1).detach() for name, p in start()["params"].items()}
    correction = Correction(offset=offset, proximal=0.2)
    merge = Merge(offset, after=3, keep=0.75)
    data = DataLoader(TensorDataset(*blobs(22, seed=1)), batch_size=4)
    seen: list[Any] = []
    with caplog.at_level(logging.INFO, "fedflow"):
        found = trained(
            ScriptWorkload(["python", "-u", str(GOOD), "sgd"]),
            start(),
            correction=correction,
            merge=merge,
            steps=8,
            on_step=lambda done, planned: seen.append((done, planned)),
        )
    expected = trained(FunctionWorkload(in_this_process, data), start(), correction=correction, merge=merge, steps=8)
    for name, tensor in expected.params.items():
        torch.testing.assert_close(found.params[name], tensor, rtol=0, atol=0)
    assert (found.steps, found.lr_sum, found.examples) == (8, expected.lr_sum, 22)
    assert found.params.keys() == start()["params"].keys() and found.buffers.keys() == start()["buffers"].keys()
    assert "loss" in found.metrics and seen
    assert "training round 0 at site-1" in caplog.text


def test_three_rounds_of_five_steps_are_the_function_run_once_for_fifteen() -> None:
    """AdamW, cosine schedule, dropout, shuffling: in a process a round, and in this one at once; bitwise."""
    broadcast, kept = start(), None
    for number in range(3):
        memory = Memory(lambda kept=kept: kept)  # type: ignore[misc]
        found = trained(ScriptWorkload(f"python -u {GOOD}"), broadcast, memory, number, steps=5)
        broadcast, kept = {"params": found.params, "frozen": {}, "buffers": found.buffers}, memory.after
        assert memory.note == ("continued" if number else "fresh (first participation)")
    data = DataLoader(TensorDataset(*blobs(22, seed=1)), batch_size=4, shuffle=True)
    whole = trained(FunctionWorkload(train, data), start(), Memory(), steps=15)
    assert all(torch.equal(found.params[n], whole.params[n]) for n in whole.params)
    assert all(torch.equal(found.buffers[n], whole.buffers[n]) for n in whole.buffers)


DDP = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.nn.parallel import DistributedDataParallel
from fedflow import client
from tests.builders import blobs

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = nn.Linear(4, 3)
client.receive(model)
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
inputs, targets = blobs(24, seed=1)
for n in range(3):
    half = slice(8 * n + 4 * rank, 8 * n + 4 * rank + 4)
    optimizer.zero_grad()
    nn.functional.cross_entropy(wrapped(inputs[half]), targets[half]).backward()
    optimizer.step()
client.send(examples=24, metrics={"rank": rank})
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_torchrun_are_one_training(tmp_path: Path) -> None:
    """DDP averages the halves' gradients, so three steps over halves are three steps over the whole batches."""
    (tmp_path / "ddp.py").write_text(DDP)
    model = nn.Linear(4, 3)
    broadcast = {"params": {n: p.detach().clone() for n, p in model.named_parameters()}, "frozen": {}, "buffers": {}}
    offset = {"bias": torch.tensor([0.1, 0.2, 0.3])}
    command = f"torchrun --standalone --nproc_per_node=2 {tmp_path / 'ddp.py'}"
    setup = Setup(lambda: nn.Linear(4, 3), LocalTraining(), Numerics(), lambda done, planned: None, Memory())
    trainer = training_of(ScriptWorkload(command, environment={"OMP_NUM_THREADS": "1"}), setup)
    found = trainer.train(broadcast, context(0), correction=Correction(offset=offset))
    inputs, targets = blobs(24, seed=1)
    for n in range(3):
        rows = slice(8 * n, 8 * n + 8)
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                assert p.grad is not None
                p -= 0.1 * (p.grad + offset.get(name, torch.zeros_like(p)))
    for name, p in model.named_parameters():
        torch.testing.assert_close(found.params[name], p.detach(), rtol=1e-6, atol=1e-6)
    assert found.steps == 3 and found.metrics == {"rank": 0.0}


RANKS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torch.nn.parallel import DistributedDataParallel
from fedflow import client
from tests.builders import blobs

torch.distributed.init_process_group("gloo")
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
task = client.receive(model)
torch.manual_seed(torch.distributed.get_rank())
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
data = TensorDataset(*blobs(22, seed=1))
for inputs, targets in client.data(DataLoader(data, batch_size=4, sampler=DistributedSampler(data))):
    optimizer.zero_grad()
    nn.functional.cross_entropy(wrapped(inputs), targets).backward()
    optimizer.step()
client.send(examples=22)
torch.distributed.destroy_process_group()
"""


def test_every_process_of_torchrun_goes_on_from_its_own_state(tmp_path: Path) -> None:
    """Dropout and shuffling differ by rank; two rounds of four steps are one of eight, bitwise."""
    (tmp_path / "ranks.py").write_text(RANKS)
    workload = ScriptWorkload(
        f"torchrun --standalone --nproc_per_node=2 {tmp_path / 'ranks.py'}", environment={"OMP_NUM_THREADS": "1"}
    )

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))

    begin = {n: p.detach().clone() for n, p in model().named_parameters()}

    def run(rounds: int, steps: int) -> Any:
        broadcast, kept = {"params": begin, "frozen": {}, "buffers": {}}, None
        for number in range(rounds):
            memory = Memory(lambda kept=kept: kept)  # type: ignore[misc]
            setup = Setup(model, LocalTraining(), Numerics(), lambda done, planned: None, memory)
            found = training_of(workload, setup).train(broadcast, context(number), steps=steps, preserve=True)
            broadcast, kept = {"params": found.params, "frozen": {}, "buffers": {}}, memory.after
        assert memory.note == ("continued" if rounds > 1 else "fresh (first participation)")
        return found

    split, whole = run(2, 4), run(1, 8)
    assert all(torch.equal(split.params[n], whole.params[n]) for n in whole.params)


def test_started_by_hand_it_runs_once() -> None:
    import subprocess

    done = subprocess.run([sys.executable, str(GOOD)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "training round 0" in done.stdout and "loss" in done.stdout


# -- whole or not at all -----------------------------------------------------------------------------------------------
HEAD = """
import sys
import torch
from torch import nn
from fedflow import client
from tests.builders import Tiny
model = Tiny()
task = client.receive(model)
def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""
GARBAGE = """
step(model)
client.send(examples=3)
from pathlib import Path
import os
(Path(os.environ["FEDFLOW_TASK"]) / "out" / "params.safetensors").write_bytes(b"garbage")
"""
ANOTHER = """
step(model)
model.add_module("more", nn.Linear(2, 2))
from fedflow.local import exchange
from pathlib import Path
import os
client.send(examples=3) if False else None
out = Path(os.environ["FEDFLOW_TASK"]) / "out"
exchange.write_groups(out, {"params": {"x": torch.ones(2)}, "frozen": {}, "buffers": {}})
exchange.Result(3, 1, 0.1).write(out)
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "print('before'); raise ValueError('my mistake')",
            "ended with exit code 1; the end of its output:\n(.*\n)*.*my mistake",
        ),
        ("import sys; sys.exit(3)", "ended with exit code 3, without output"),
        ("import os; os.kill(os.getpid(), 9)", "ended with signal SIGKILL"),
        ("pass", "output does not count: it sent nothing"),
        (HEAD + "client.send(examples=3)", "no optimizer step was taken"),
        (HEAD + GARBAGE, "output does not count: out: found"),
        (HEAD + ANOTHER, "output does not count: params: 0.bias is missing.*x is not in the model"),
        (HEAD + "step(model); client.send()", "examples: found none"),
        (HEAD + "client.receive(model)", "found a second call"),
    ],
    ids=["raises", "exits", "killed", "silent", "no step", "garbage", "another model", "no examples", "twice"],
)
def test_output_that_does_not_count(text: str, says: str, tmp_path: Path) -> None:
    memory = Memory()
    with pytest.raises(SiteError, match=f"run run, round 0, site site-1: (.|\n)*{says}"):
        trained(script(text, tmp_path), start(), memory)
    assert memory.after is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"examples": "many"},
        {"examples": -5},
        {"examples": 1.5},
        {"steps": 0},
        {"steps": True},
        {"lr_sum": float("nan")},
        {"lr_sum": None},
        {"metrics": {"loss": "small"}},
        {"metrics": None},
        {"state": 5},
        {"processes": 0},
        {"more": 1},
    ],
    ids=str,
)
def test_a_result_that_is_none(wrong: dict[str, Any], tmp_path: Path) -> None:
    whole = {"examples": 3, "steps": 1, "lr_sum": 0.1, "metrics": {"loss": float("nan")}, "state": None, "processes": 1}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert exchange.read_result(tmp_path).examples == 3
    (tmp_path / "result.json").write_text(json.dumps({**whole, **wrong}))
    with pytest.raises(SiteError, match="result.json: "):
        exchange.read_result(tmp_path)


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="exit code 127; the end of its output:\ncannot start 'no-such-program'"):
        trained(ScriptWorkload("no-such-program x"), start())


def test_a_script_may_say_how_many_examples_its_data_has(tmp_path: Path) -> None:
    """Data without a length is no reason to stop; only `send` needs their number."""
    text = HEAD + "list(client.data(x for x in range(3)))\nstep(model)\nclient.send(examples=3)\n"
    assert trained(script(text, tmp_path), start()).examples == 3


def test_a_script_that_asks_for_a_next_batch_in_vain_sends_what_it_has(tmp_path: Path) -> None:
    text = HEAD + "batches = iter(client.data([torch.ones(2, 4)] * 2))\n"
    text += "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nwhile True:\n"
    text += "    optimizer.zero_grad(); model(next(batches)).sum().backward(); optimizer.step()\n"
    assert trained(script(text, tmp_path), start(), steps=3).steps == 3


def test_a_script_that_goes_on_after_its_steps_sends_what_it_has(tmp_path: Path) -> None:
    text = HEAD + "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nwhile True:\n"
    text += "    optimizer.zero_grad(); model(torch.ones(2, 4)).sum().backward(); optimizer.step()\n"
    assert trained(script(text, tmp_path, examples=5), start(), steps=3).steps == 3


# -- nothing is left running -------------------------------------------------------------------------------------------
CHILDREN = """
import os, subprocess, sys, time
loop = [sys.executable, "-c", "import time; time.sleep(600)", "{mark}"]
subprocess.Popen(loop)
subprocess.Popen(loop, start_new_session=True)  # leaves the process group
if os.fork() == 0:
    os.setsid()
    subprocess.Popen(loop)
    os._exit(0)
"""


def running(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if mark in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.mark.parametrize("how", ["ends", "hangs", "round closes"])
def test_no_process_outlives_the_script(how: str, tmp_path: Path) -> None:
    mark = f"mark-{os.getpid()}-{how}"
    text = CHILDREN.replace("{mark}", mark) + ("" if how == "ends" else "time.sleep(600)\n")
    if how == "round closes":

        def close(done: int, planned: int | None) -> None:
            if len(running(mark)) >= 3:
                raise OpeningClosed("closed")

        with pytest.raises(OpeningClosed):
            trained(script(text, tmp_path), start(), on_step=close)
    else:
        says = {"ends": "it sent nothing", "hangs": "killed after its timeout of 2 s"}[how]
        with pytest.raises(SiteError, match=says):
            trained(script(text, tmp_path, timeout=2), start())
    assert running(mark) == []


def test_the_script_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """That process is killed with SIGKILL; the guard notices."""
    import subprocess

    mark = f"mark-{os.getpid()}-orphan"
    (tmp_path / "script.py").write_text(
        CHILDREN.replace("{mark}", mark) + "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    starter = (
        "import logging; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from fedflow.local.script import ScriptWorkload, _Process\nfrom pathlib import Path\n"
        f"_Process(ScriptWorkload('python {tmp_path}/script.py'), Path({str(tmp_path)!r}), {{}}).run(None, lambda d, p: None)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stderr is not None and "ready" in parent.stderr.readline()
    guards = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    psutil.wait_procs(guards, timeout=60)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in running(mark)], timeout=60)
    assert not alive
