"""FedAvg over `cohort` of `sites` nodes."""

from __future__ import annotations

import random
import time
from importlib.metadata import version

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.peers import common
from benchmarks.peers.common import SETTING

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    random.seed(SETTING.seed)  # with which Flower samples
    torch.set_num_threads(1)
    model, ends = common.make_model(), []
    while len(list(grid.get_node_ids())) < SETTING.sites:
        time.sleep(0.05)

    def after_round(round: int, arrays: ArrayRecord) -> MetricRecord:
        """Round 0 is none: it is called before the first."""
        if round:
            ends.append(common.now())
        return MetricRecord({"round": round})

    strategy = FedAvg(
        fraction_train=SETTING.cohort / SETTING.sites,
        fraction_evaluate=0.0,
        min_train_nodes=SETTING.cohort,
        min_available_nodes=SETTING.sites,
    )
    started = common.now()
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=SETTING.rounds,
        timeout=3600,
        evaluate_fn=after_round,
    )
    model.load_state_dict(result.arrays.to_torch_state_dict())
    common.report("Flower", started, ends, model, version("flwr"))
