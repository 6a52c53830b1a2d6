"""A Keras model. `fedflow run examples/training/keras.yaml`; needs fedflow[keras]."""

from typing import Any

from sites import digits

from fedflow.local.keras import KerasModel, KerasWorkload  # before Keras: it chooses the torch backend

import keras  # isort: skip


def model() -> KerasModel:
    layers = [keras.layers.Dense(32, activation="relu"), keras.layers.BatchNormalization(), keras.layers.Dense(10)]
    return KerasModel(keras.Sequential([keras.layers.Input((64,)), *layers]))


def compile(model: Any, config: Any) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(config.get("lr", 0.1)), loss=loss, metrics=["accuracy"])


def site(site: str | None = None, sites: list[str] | None = None) -> KerasWorkload:
    inputs, labels = (tensor.numpy() for tensor in digits(site, sites))
    held_out = tuple(tensor.numpy() for tensor in digits())
    return KerasWorkload(compile, inputs, labels, held_out=held_out)


class HeldOut:
    def evaluate(self, model: KerasModel) -> dict[str, float]:
        return site().evaluate(model)
