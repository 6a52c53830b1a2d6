"""The client loop of NVFlare's CIFAR-10 example as a script that receives, trains and sends."""

from torch.utils.data import DataLoader

from fedflow import client
from tests.local.foreign import Net, cifar, digits

net = Net()
while client.is_running():
    task = client.receive(net)
    trainloader = client.data(DataLoader(digits(task.site)[0], batch_size=8, shuffle=True))
    metrics = cifar(net, trainloader, client.config())
    client.send(metrics=metrics)
