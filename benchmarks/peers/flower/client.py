"""One model a Ray actor, used again for every site that it trains."""

from __future__ import annotations

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from benchmarks.peers import common
from benchmarks.peers.common import SETTING

app = ClientApp()


@cache
def _model() -> nn.Module:
    torch.set_num_threads(1)
    return common.make_model()


@app.train()
def train(message: Message, context: Context) -> Message:
    model = _model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    site, round = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
    loss = common.local_training(model, site, round)
    arrays = ArrayRecord(model.state_dict())
    metrics = MetricRecord({"loss": loss, "num-examples": SETTING.samples})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
