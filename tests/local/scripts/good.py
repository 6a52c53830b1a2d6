"""A training script as anybody would write it: AdamW, a cosine schedule, dropout, shuffling."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedflow import client
from tests.builders import Tiny, blobs

model = Tiny()
data = TensorDataset(*blobs(22, seed=1))
while client.is_running():
    task = client.receive(model)
    print(f"training round {task.round} at {task.site}")
    if "sgd" in sys.argv:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        model.eval()  # no dropout
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
        model.train()
    for inputs, targets in client.data(DataLoader(data, batch_size=4, shuffle="sgd" not in sys.argv)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
    client.send(metrics={"loss": loss})
