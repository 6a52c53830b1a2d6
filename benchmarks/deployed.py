"""Deployed rounds of a large model without training: seconds from plan to commit, and the peak memory of every role.

    python -m benchmarks.deployed [--mebibytes 512] [--sites 4] [--rounds 4] [--s3] [--folder DIR]

A PocEnv: Prefect server, a worker a site, the coordinator's. A site takes one step on one number and adds it to every parameter, so that every object of
every round is another one. Memory is VmHWM, the largest of all processes of a role, forked from a worker that has imported
torch; it is read all the time, since processes end with their flow run. The first round is not counted: it warms the workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from fedflow.environments.poc import PocEnv
from fedflow.local import TensorWorkload
from fedflow.recipe import Federation, Recipe

LAYER = 16  # MiB


class Big(nn.Module):
    """Layers of 16 MiB, to all of which every forward pass adds its input, and one small parameter to train."""

    def __init__(self, mebibytes: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.full((1024, LAYER << 8), float(i)) for i in range(mebibytes // LAYER))
        self.small = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for layer in self.layers:
                layer.add_(x.mean())
        return x * self.small


def adding(site: str) -> TensorWorkload:
    number = torch.full((1, 1), float(site.rpartition("-")[2]))
    return TensorWorkload(number, number, loss=nn.functional.mse_loss)


class Peaks:
    """VmHWM in MiB of this process's descendants, by role."""

    def __init__(self) -> None:
        self.of: dict[str, dict[int, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process().children():
                    with suppress(psutil.Error, OSError):
                        role = _role(child.cmdline())
                        for process in (child, *child.children(recursive=True)):
                            if peak := _peak(process.pid):
                                self.of.setdefault(role, {})[process.pid] = peak


def _role(command: list[str]) -> str:
    return command[command.index("--pool") + 1] if "--pool" in command else "server and database"


def _peak(pid: int) -> float | None:
    """None of a process that has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--s3", action="store_true", help="the objects in a real S3 server (SeaweedFS)")
    parser.add_argument("--folder", help="where everything lies; default: the system's for temporary files")
    options = parser.parse_args()
    recipe = Recipe.load(
        {
            "name": "big",
            "model": {"path": "benchmarks.deployed:Big", "args": {"mebibytes": options.mebibytes}},
            "workload": "benchmarks.deployed:adding",
            "rounds": options.rounds,
            "training": {"steps": 1},
        }
    )
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        store = None
        if options.s3:
            from tests.servers import s3_server

            server = stack.enter_context(s3_server())
            os.environ.update(server.env)
            store = f"s3://{server.bucket}/deployed"
        peaks = stack.enter_context(Peaks())
        env = stack.enter_context(PocEnv(Federation.of(options.sites), home=home, store=store))
        run = env.execute(recipe)
        run.result()
        manifests = [run.journal.manifest(number, "train") for number in range(options.rounds)]
        seconds = [(m.committed - m.opened).total_seconds() for m in manifests if m and m.opened]
        aggregations = [m.seconds for m in manifests if m and m.seconds]
    largest = {role: round(max(of.values())) for role, of in sorted(peaks.of.items())}
    print(
        json.dumps(
            {
                "MiB": options.mebibytes,
                "sites": options.sites,
                "rounds": [round(s, 1) for s in seconds],
                "median of the later": round(statistics.median(seconds[1:] or seconds), 1),
                "of that, aggregation": round(statistics.median(aggregations[1:] or aggregations), 1),
                "peaks": largest,
            }
        )
    )


if __name__ == "__main__":
    main()
