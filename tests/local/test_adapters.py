"""Other people's trainers: the same numbers as the formula, exactly so many steps, and the model's tensors only."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedflow.algorithm import NO_CORRECTION, Correction, LocalResult
from fedflow.errors import SiteError, TrainingInvalid
from fedflow.local import FunctionWorkload, Setup, model_groups, training_of
from fedflow.local.arrays import ArrayModel, Arrays, ArrayWorkload, Fitted
from fedflow.local.model import with_aliases
from fedflow.local.state import Memory
from fedflow.recipe import LocalTraining, Numerics
from fedflow.types import Groups, RoundContext
from tests.builders import blobs

os.environ.setdefault("KERAS_BACKEND", "torch")
INPUTS, TARGETS = blobs(24, seed=1)


def context(round: int = 0) -> RoundContext:
    return RoundContext("run", round, "train", "site-1", num_sites=1, seed=100 + round)


def copied(groups: Groups) -> dict[str, dict[str, torch.Tensor]]:
    return {g: {n: t.detach().clone() for n, t in tensors.items()} for g, tensors in groups.items()}


def trained(
    workload: Any, model: Callable[[], nn.Module], broadcast: Groups, memory: Memory | None = None, **asked: Any
) -> LocalResult:
    settings = asked.pop("settings", LocalTraining(batch_size=4))
    ctx = context(asked.pop("round", 0))
    setup = Setup(model, settings, Numerics(), lambda done, planned: None, memory or Memory())
    return training_of(workload, setup).train(broadcast, ctx, preserve=memory is not None, **asked)


def correction_for(broadcast: Groups, **options: Any) -> Correction:
    generator = torch.Generator().manual_seed(3)
    offset = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) / 10 for n, p in broadcast["params"].items()}
    return Correction(offset=offset, proximal=0.3, **options)


def by_formula(
    model: nn.Module,
    loss: Callable[[nn.Module, slice], torch.Tensor],
    correction: Correction,
    steps: int,
    lr: float = 0.1,
    clip: float | None = None,
) -> dict[str, torch.Tensor]:
    """w ← w − lr·clip(g + offset + μ(w − x)), over batches of four in order."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    start = [p.detach().clone() for p in parameters]
    for step in range(steps):
        at = 4 * (step % 6)
        gradients = torch.autograd.grad(loss(model, slice(at, at + 4)), parameters)
        with torch.no_grad():
            terms = [
                g + correction.offset.get(n, torch.zeros_like(p)) + correction.proximal * (p - x)
                for n, p, g, x in zip(names, parameters, gradients, start, strict=True)
            ]
            norm = torch.stack([t.norm() for t in terms]).norm()
            factor = 1.0 if clip is None else min(1.0, clip / float(norm))
            for p, t in zip(parameters, terms, strict=True):
                p -= lr * factor * t
    return {n: p.detach() for n, p in zip(names, parameters, strict=True)}


def close(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


# -- Lightning ---------------------------------------------------------------------------------------------------------
def lightning_module() -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
            self.adam = False

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if not self.adam:
                self.net.eval()
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            if not self.adam:
                return torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Module()


def adam_module() -> Any:
    module = lightning_module()
    module.adam = True
    return module


def batches(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4, shuffle=shuffle)


def network_loss(model: nn.Module, rows: slice) -> torch.Tensor:
    return nn.functional.cross_entropy(model.eval()(INPUTS[rows]), TARGETS[rows])


@pytest.mark.parametrize("clip", [None, 0.2])
def test_lightning_trains_as_the_formula_says_with_clipping_after_the_correction(clip: float | None) -> None:
    from fedflow.local.lightning import LightningWorkload

    model = lightning_module()
    broadcast = copied(model_groups(model))
    correction = correction_for(broadcast)
    found = trained(
        LightningWorkload(batches(), trainer={"gradient_clip_val": clip}),
        lightning_module,
        broadcast,
        correction=correction,
        steps=8,
    )
    expected = by_formula(model.net, network_loss, correction_without("net.", correction), 8, clip=clip)
    close(found.params, {f"net.{name}": tensor for name, tensor in expected.items()})
    assert (found.steps, found.lr_sum, found.examples) == (8, pytest.approx(0.8), 24)
    assert "train_loss" in found.metrics


def correction_without(prefix: str, correction: Correction) -> Correction:
    offset = {name.removeprefix(prefix): t for name, t in correction.offset.items()}
    return Correction(offset=offset, proximal=correction.proximal)


def test_lightning_in_rounds_is_lightning_run_once() -> None:
    """AdamW, cosine schedule, dropout, shuffling; four rounds of five steps and one of twenty; bitwise."""
    from fedflow.local.lightning import LightningWorkload

    def run(rounds: int, steps: int) -> LocalResult:
        broadcast, kept = copied(model_groups(adam_module())), None
        for number in range(rounds):
            memory = Memory(lambda kept=kept: kept)  # type: ignore[misc]
            found = trained(LightningWorkload(batches(True)), adam_module, broadcast, memory, steps=steps, round=number)
            broadcast, kept = {"params": found.params, "frozen": {}, "buffers": found.buffers}, memory.after
        return found

    split, whole = run(4, 5), run(1, 20)
    assert all(torch.equal(split.params[n], whole.params[n]) for n in whole.params)


# -- Hugging Face, PEFT ------------------------------------------------------------------------------------------------
TOKENS = torch.randint(0, 50, (24, 6), generator=torch.Generator().manual_seed(1))


def tiny_transformer() -> nn.Module:
    """Randomly initialised, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config)  # type: ignore[no-any-return]


def tiny_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(  # type: ignore[no-any-return]
            tiny_transformer(), LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
        )


def hugging_face(folder: str, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from fedflow.local.huggingface import HuggingFaceWorkload

    rows = [{"input_ids": TOKENS[n], "labels": TARGETS[n]} for n in range(24)]

    def trainer(model: Any, config: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=4,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **options},
        )
        return Trainer(model=model, args=arguments, train_dataset=rows)

    return HuggingFaceWorkload(trainer, examples=24)


def in_order(workload: Any) -> Any:
    """Without the Trainer's own shuffling, so that a formula can follow."""
    make = workload.trainer

    def trainer(model: Any, config: Any) -> Any:
        made = make(model, config)
        made._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(made.train_dataset)
        return made

    workload.trainer = trainer
    return workload


@pytest.mark.parametrize("model", [tiny_transformer, tiny_lora], ids=["full", "lora"])
def test_hugging_face_trains_as_the_formula_says(model: Callable[[], nn.Module], tmp_path: Any) -> None:
    own = model()
    broadcast = copied(model_groups(own))
    correction = correction_for(broadcast)
    found = trained(
        in_order(hugging_face(str(tmp_path), max_steps=60)), model, broadcast, correction=correction, steps=8
    )

    def loss(net: nn.Module, rows: slice) -> torch.Tensor:
        return net(input_ids=TOKENS[rows], labels=TARGETS[rows]).loss  # type: ignore[no-any-return]

    close(found.params, by_formula(own, loss, correction, 8))
    assert found.steps == 8
    if model is tiny_lora:
        assert found.params and all(".lora_" in name for name in found.params)
        assert all(torch.equal(found.frozen[n], t) for n, t in broadcast["frozen"].items())


def test_hugging_face_in_rounds_is_hugging_face_run_once(tmp_path: Any) -> None:
    """AdamW and a cosine schedule over sixty steps, shuffled: three rounds of five and one of fifteen; bitwise."""
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine", "max_steps": 60}

    def run(rounds: int, steps: int) -> LocalResult:
        broadcast, kept = copied(model_groups(tiny_transformer())), None
        for number in range(rounds):
            memory = Memory(lambda kept=kept: kept)  # type: ignore[misc]
            workload = hugging_face(str(tmp_path), **options)
            found = trained(workload, tiny_transformer, broadcast, memory, steps=steps, round=number)
            assert memory.note == ("continued" if number else "fresh (first participation)")
            broadcast, kept = {"params": found.params, "frozen": {}, "buffers": found.buffers}, memory.after
        return found

    split, whole = run(3, 5), run(1, 15)
    assert all(torch.equal(split.params[n], whole.params[n]) for n in whole.params)


def test_adapter_names_without_the_adapter() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    names = ["x.lora_A.default.weight", "y.lora_A.default.weight", "base.weight"]
    given = {"x.lora_A.weight": a, "y.lora_A.weight": b, "y.lora_A.default.weight": c, "other": b}
    found = with_aliases(names, given)
    assert found == {"x.lora_A.default.weight": a, "y.lora_A.weight": b, "y.lora_A.default.weight": c, "other": b}


# -- NumPy, scikit-learn -----------------------------------------------------------------------------------------------
def least_squares(arrays: Arrays, data: Any, config: Any) -> Arrays:
    inputs, targets = data
    for _ in range(config.epochs):
        arrays["w"] -= 0.1 * inputs.T @ (inputs @ arrays["w"] - targets) / len(inputs)
    return arrays


def test_a_numpy_function_fits_on() -> None:
    inputs = np.random.default_rng(0).normal(size=(30, 2))
    targets = inputs @ np.array([1.0, -2.0])
    workload = ArrayWorkload(
        least_squares, (inputs, targets), examples=30, evaluate=lambda arrays: {"norm": np.linalg.norm(arrays["w"])}
    )
    settings = LocalTraining(epochs=3, evaluate="both")
    found = trained(workload, lambda: ArrayModel(w=[2]), copied(model_groups(ArrayModel(w=[2]))), settings=settings)
    w = np.zeros(2)
    for _ in range(3):
        w -= 0.1 * inputs.T @ (inputs @ w - targets) / 30
    np.testing.assert_array_equal(found.params["w"].numpy(), w)
    assert found.metrics == {"before.norm": 0.0, "norm": pytest.approx(float(np.linalg.norm(w)))}
    assert (found.examples, found.steps) == (30, 1)


@pytest.mark.parametrize(
    ("fit", "asked", "says"),
    [
        (lambda a, d, c: a, {"correction": Correction(proximal=0.1)}, "expected code that takes a gradient correction"),
        (lambda a, d, c: a, {"memory": Memory()}, "expected code that takes a preserved state"),
        (lambda a, d, c: a, {"steps": 5}, "steps: found 1, expected exactly 5"),
        (lambda a, d, c: {"v": a["w"]}, {}, "v is not in the model; w is missing"),
        (lambda a, d, c: {"w": a["w"].astype("float32")}, {}, r"w is float32\[2\], the model has float64\[2\]"),
    ],
)
def test_what_a_numpy_function_cannot_do_is_told(fit: Any, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainingInvalid, match=f"site site-1: .*{says}"):
        trained(
            ArrayWorkload(fit, [0], examples=3),
            lambda: ArrayModel(w=[2]),
            copied(model_groups(ArrayModel(w=[2]))),
            **asked,
        )


def test_a_numpy_function_may_say_how_far_it_went() -> None:
    workload = ArrayWorkload(lambda a, d, c: Fitted(a, steps=c.steps, lr_sum=0.5), [0])
    found = trained(workload, lambda: ArrayModel(w=[2]), copied(model_groups(ArrayModel(w=[2]))), steps=5)
    assert (found.steps, found.lr_sum) == (5, 0.5)


@pytest.mark.parametrize("kind", ["sgd", "logistic"])
def test_linear_models_of_scikit_learn_fit_on(kind: str) -> None:
    """Two rounds of one site: each is what an estimator does that is given the coefficients before."""
    from sklearn.linear_model import LogisticRegression, SGDClassifier

    from fedflow.local.sklearn import LinearModel, LinearWorkload

    inputs, targets = INPUTS.double().numpy(), TARGETS.numpy()
    make = {"sgd": lambda: SGDClassifier(shuffle=False), "logistic": lambda: LogisticRegression(warm_start=True)}[kind]
    broadcast: Groups = copied(model_groups(LinearModel(4, 3)))
    coef, intercept = np.zeros((3, 4)), np.zeros(3)
    for number in range(2):
        work = LinearWorkload(make(), inputs, targets, classes=[0, 1, 2], held_out=(inputs, targets))
        found = trained(work, lambda: LinearModel(4, 3), broadcast, settings=LocalTraining(epochs=4), round=number)
        broadcast = {"params": found.params, "frozen": {}, "buffers": {}}
        own = make()
        own.coef_, own.intercept_, own.classes_ = coef, intercept, np.array([0, 1, 2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "logistic":
                own.set_params(max_iter=4).fit(inputs, targets)
            else:
                for _ in range(4):
                    own.partial_fit(inputs, targets)
        coef, intercept = own.coef_, own.intercept_
    np.testing.assert_allclose(found.params["coef"].numpy(), coef, rtol=1e-9)
    np.testing.assert_allclose(found.params["intercept"].numpy(), intercept, rtol=1e-9)
    assert found.metrics["accuracy"] == own.score(inputs, targets) > 1 / 3


# -- Keras -------------------------------------------------------------------------------------------------------------
def keras_model() -> Any:
    import keras

    from fedflow.local.keras import KerasModel

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(3)]
    return KerasModel(keras.Sequential([keras.layers.Input((4,)), *layers]))


def keras_with_norm() -> Any:
    import keras

    from fedflow.local.keras import KerasModel

    layers = [keras.layers.Dense(6), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    return KerasModel(keras.Sequential([keras.layers.Input((4,)), *layers]))


def keras_workload(optimizer: Callable[[], Any] | None = None) -> Any:
    import keras

    from fedflow.local.keras import KerasWorkload

    def compile(model: Any, config: Any) -> None:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(
            optimizer=optimizer() if optimizer else keras.optimizers.SGD(0.1), loss=loss, metrics=["accuracy"]
        )

    held_out = (INPUTS.numpy(), TARGETS.numpy())
    return KerasWorkload(compile, INPUTS.numpy(), TARGETS.numpy(), held_out=held_out)


@pytest.mark.parametrize("corrected", [False, True])
def test_keras_trains_as_the_formula_says(corrected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    model = keras_model()
    fit = keras.Model.fit
    monkeypatch.setattr(keras.Model, "fit", lambda *args, **options: fit(*args, shuffle=False, **options))
    broadcast = copied(model_groups(model))
    correction = correction_for(broadcast) if corrected else NO_CORRECTION
    found = trained(keras_workload(), keras_model, broadcast, correction=correction, steps=8)
    names = list(broadcast["params"])
    weights = [broadcast["params"][n].clone().requires_grad_() for n in names]

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, weight in zip(names, weights, strict=True):
                self.register_parameter(name, nn.Parameter(weight.detach().clone()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            k1, b1, k2, b2 = self.parameters()
            return torch.tanh(x @ k1 + b1) @ k2 + b2

    close(found.params, by_formula(Same(), network_loss, correction, 8))
    assert (found.steps, found.lr_sum, found.examples) == (8, pytest.approx(0.8), 24)
    assert {"loss", "accuracy"} <= found.metrics.keys()


def test_keras_statistics_are_buffers_and_names_are_the_same_for_every_instance() -> None:
    first, second = (model_groups(keras_with_norm()) for _ in range(2))
    assert first["params"].keys() == second["params"].keys()
    assert [n.partition("/")[2] for n in first["buffers"]] == ["moving_mean", "moving_variance"]
    found = trained(keras_workload(), keras_with_norm, copied(first))
    assert not torch.equal(found.buffers["4/moving_mean"], first["buffers"]["4/moving_mean"])


def test_what_keras_cannot_do_is_told() -> None:
    import keras

    broadcast = copied(model_groups(keras_model()))
    with pytest.raises(TrainingInvalid, match="optimizer: found 'Adam', expected SGD without momentum"):
        trained(keras_workload(keras.optimizers.Adam), keras_model, broadcast, correction=Correction(proximal=0.1))
    with pytest.raises(TrainingInvalid, match="expected code whose optimizer state is preserved"):
        trained(keras_workload(), keras_model, broadcast, Memory())


# -- every kind --------------------------------------------------------------------------------------------------------
def test_only_a_workload_with_a_loss_can_be_asked_for_it() -> None:
    workload = FunctionWorkload(lambda model, data, config: None, [0])
    setup = Setup(lambda: nn.Linear(1, 1), LocalTraining(), Numerics(), lambda done, planned: None, Memory())
    training = training_of(workload, setup)
    for ask in (training.gradient, training.loss):
        with pytest.raises(SiteError, match="FunctionWorkload cannot be asked for"):
            ask(model_groups(nn.Linear(1, 1)), context())
