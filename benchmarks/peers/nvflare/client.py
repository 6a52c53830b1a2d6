"""What every simulated site runs, in a thread."""

from __future__ import annotations

import os
import time
from pathlib import Path

import nvflare.client as flare
import torch

from benchmarks.peers import common
from benchmarks.peers.common import SETTING


def main() -> None:
    torch.set_num_threads(1)
    flare.init()
    site = int(flare.get_site_name().rpartition("-")[2]) - 1  # site-1 ...
    model, stamps = common.make_model(), Path(os.environ["BENCH_STAMPS"])
    while flare.is_running() and (received := flare.receive()) is not None:
        model.load_state_dict({name: torch.as_tensor(value) for name, value in received.params.items()})
        round = received.current_round or 0
        loss = common.local_training(model, site, round)
        with stamps.open("a") as file:
            file.write(f"{round} {time.time()}\n")
        steps = -(-SETTING.samples // SETTING.batch) * SETTING.epochs
        params = {name: value.cpu() for name, value in model.state_dict().items()}
        flare.send(flare.FLModel(params=params, metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": steps}))


if __name__ == "__main__":
    main()
