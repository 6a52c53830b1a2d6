"""Sites trained together give what the loop gives, within rounding; and what cannot be trained together is trained by the loop."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedflow.algorithm import Algorithm, Correction, LocalResult, Training
from fedflow.algorithms.diloco import DiLoCo
from fedflow.algorithms.fedavg import FedAvg
from fedflow.algorithms.fedprox import FedProx
from fedflow.algorithms.qfedavg import QFedAvg
from fedflow.algorithms.scaffold import Scaffold
from fedflow.errors import SiteError
from fedflow.local import LocalTrainer, TensorWorkload, TorchWorkload, model_groups
from fedflow.local.vectorised import Part, Together, Wish, train_together
from fedflow.recipe import LocalTraining, Numerics, Optimizer
from fedflow.types import Groups, RoundContext, Update
from tests.builders import Tiny, blobs

FAST = Numerics(deterministic="fast")
SIZES = (30, 7, 20, 64, 5, 33)  # uneven steps, uneven last batches
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # absolute, of parameters of order 1 after some twenty steps


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


class Double(Net):
    def __init__(self) -> None:
        super().__init__()
        self.double()


def start(model: Callable[[], nn.Module] = Net) -> Groups:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_groups(model())


def context(site: int) -> RoundContext:
    return RoundContext("run", 0, "train", f"site-{site}", num_sites=len(SIZES), seed=40 + site)


def trainers(
    model: Callable[[], nn.Module] = Net,
    workload: Callable[..., TorchWorkload] = TensorWorkload,
    numerics: Numerics = FAST,
    sizes: Iterable[int] = SIZES,
    **settings: Any,
) -> list[LocalTrainer]:
    dtype = next(iter(model_groups(model())["params"].values())).dtype
    training = LocalTraining(**{"batch_size": 8, "epochs": 2, "evaluate": "never", **settings})
    made = []
    for site, size in enumerate(sizes):
        inputs, targets = blobs(size, seed=site)
        made.append(LocalTrainer(model, workload(inputs.to(dtype), targets), training, numerics))
    return made


def assert_close(found: LocalResult, expected: LocalResult, tolerance: float) -> None:
    assert (found.steps, found.lr_sum, found.examples) == (expected.steps, expected.lr_sum, expected.examples)
    assert found.metrics == pytest.approx(expected.metrics, abs=tolerance)
    for group, tensors in expected.groups.items():
        assert found.groups[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found.groups[group][name], tensor, rtol=0, atol=tolerance)


# -- the training ------------------------------------------------------------------------------------------------------
OPTIMIZERS = [
    Optimizer(lr=0.1),
    Optimizer(lr=0.1, momentum=0.9),
    Optimizer(lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.01),
    Optimizer(kind="adam", lr=0.01, weight_decay=0.1),
    Optimizer(kind="adamw", lr=0.01, weight_decay=0.1),
]


def offset(site: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(site)
    return {
        n: torch.randn(t.shape, generator=generator, dtype=torch.float64) / 10 for n, t in start()["params"].items()
    }


CORRECTIONS: dict[str, Callable[[int], Correction]] = {
    "plain": lambda site: Correction(),
    "proximal": lambda site: Correction(proximal=0.1),
    "offset": lambda site: Correction(offset=offset(site)),
    "both": lambda site: Correction(offset=offset(site), proximal=0.3),
    "after the step": lambda site: Correction(offset=offset(site), proximal=0.3, apply="after_step"),
}


@pytest.mark.parametrize("model", [Net, Double])
@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: f"{o.kind}-{o.momentum}")
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_it_is_the_loop(
    model: Callable[[], nn.Module], clip_norm: float | None, optimizer: Optimizer, correction: str
) -> None:
    works = trainers(model, optimizer=optimizer, clip_norm=clip_norm)
    wishes = [Wish("train", start(model), context(site), CORRECTIONS[correction](site)) for site in range(len(works))]
    together = train_together(works, wishes)
    for work, wish, found in zip(works, wishes, together, strict=True):
        dtype = next(iter(found.params.values())).dtype
        assert_close(found, wish.done(work), TOLERANCE[dtype])


@pytest.mark.parametrize("steps", [1, 4, 11])
def test_so_many_steps_are_so_many_whatever_the_data(steps: int) -> None:
    works = trainers(Double)
    wishes = [Wish("train", start(Double), context(site), steps=steps) for site in range(len(works))]
    for work, wish, found in zip(works, wishes, train_together(works, wishes), strict=True):
        assert found.steps == steps
        assert_close(found, wish.done(work), 1e-12)


class Partly(nn.Module):
    """A frozen layer, one that is not used, and a buffer that is only read."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused, self.head = nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.scale * self.frozen(inputs))  # type: ignore[no-any-return]


def test_sites_may_differ_in_what_is_frozen_and_in_buffers() -> None:
    works, wishes = trainers(Partly, optimizer=Optimizer(lr=0.1, momentum=0.9)), []
    for site in range(len(works)):
        own = {group: {n: t + site / 10 for n, t in tensors.items()} for group, tensors in start(Partly).items()}
        wishes.append(Wish("train", own, context(site), Correction(proximal=0.1)))
    for work, wish, found in zip(works, wishes, train_together(works, wishes), strict=True):
        assert_close(found, wish.done(work), 1e-5)


class Centring(Net):
    """Rows have a part in each other's output: none can be added."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs - inputs.mean(dim=0))  # type: ignore[no-any-return]


class Regression(TensorWorkload):
    """A loss of which it is not known which rows it would leave out."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        super().__init__(inputs, nn.functional.one_hot(targets, 3).to(inputs), loss=nn.functional.mse_loss)


@pytest.mark.parametrize(("model", "workload"), [(Centring, TensorWorkload), (Net, Regression)])
def test_batches_of_other_sizes_are_steps_of_their_own_where_rows_cannot_be_added(
    model: type[nn.Module], workload: type[TensorWorkload]
) -> None:
    works = trainers(lambda: model().double(), workload)
    broadcast = start(lambda: model().double())
    wishes = [Wish("train", broadcast, context(site)) for site in range(len(works))]
    for work, wish, found in zip(works, wishes, train_together(works, wishes), strict=True):
        assert_close(found, wish.done(work), 1e-12)


# -- under algorithms --------------------------------------------------------------------------------------------------
def updates(
    algorithm: Algorithm,
    works: list[LocalTrainer],
    together: Together,
    model: Callable[[], nn.Module] = Double,
) -> list[Any]:
    state = algorithm.init(start(model))
    broadcast = algorithm.broadcast(state, "train")

    def part(site: int) -> Callable[[Training], tuple[Update, Any]]:
        def run(work: Training) -> tuple[Update, Any]:
            own = algorithm.init_site(broadcast, work, context(site))
            return algorithm.site_update(broadcast, own, work, context(site))

        return run

    return together.run([Part(work, part(site)) for site, work in enumerate(works)])


ANEW = DiLoCo(local_steps_per_round=5, preserve_optimizer_state=False)


@pytest.mark.parametrize(
    ("algorithm", "optimizer"),
    [
        *((a, Optimizer(lr=0.1)) for a in (FedAvg(), FedProx(mu=0.1), Scaffold(), Scaffold(option=1), QFedAvg(q=1.0))),
        (ANEW, Optimizer(kind="adamw", lr=0.01, weight_decay=0.1)),
    ],
    ids=lambda a: repr(a)[:30],
)
def test_algorithms_stay_as_they_are(algorithm: Algorithm, optimizer: Optimizer) -> None:
    works = trainers(Double, optimizer=optimizer)
    found = updates(algorithm, works, Together(quicker=True))
    expected = updates(algorithm, works, Together(quicker=False))
    for (ours, kept), (theirs, their_kept) in zip(found, expected, strict=True):
        assert ours.numerics["vectorised"] and "vectorised" not in theirs.numerics
        assert (ours.site, ours.steps) == (theirs.site, theirs.steps)
        assert ours.scalars == pytest.approx(theirs.scalars, rel=1e-12)
        torch.testing.assert_close(dict(ours.tensors), dict(theirs.tensors), rtol=0, atol=1e-12)
        torch.testing.assert_close(vars(kept), vars(their_kept), rtol=0, atol=1e-12)


def test_each_site_evaluates_its_own_model() -> None:
    class Evaluated(TensorWorkload):
        def __init__(self, inputs: Tensor, targets: Tensor) -> None:
            super().__init__(inputs, targets, held_out=(inputs, targets))

    works = trainers(Double, Evaluated, evaluate="both")
    wishes = [Wish("train", start(Double), context(site)) for site in range(len(works))]
    for work, wish, found in zip(works, wishes, train_together(works, wishes), strict=True):
        assert {"loss", "accuracy", "before.loss", "before.accuracy"} <= found.metrics.keys()
        assert_close(found, wish.done(work), 1e-12)


# -- what cannot be trained together -----------------------------------------------------------------------------------
class Drawing(TensorWorkload):
    """Its batches are noisy, by this module's generator."""

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[Any]:
        for inputs, targets in super().batches(batch_size, generator):
            yield inputs + torch.randn(inputs.shape), targets


class DrawingNumpy(TensorWorkload):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) * float(np.random.rand())


class DrawingPython(TensorWorkload):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) * random.random()


class Weighted(TensorWorkload):
    """Its loss depends on the site."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) * len(self.inputs)


class Looking(TensorWorkload):
    """Its loss looks at a value."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        return loss if float(loss.detach()) > 0.5 else loss * 2


class Counting(Net):
    """Its forward pass changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "workload", "told"),
    [
        (Tiny, TensorWorkload, ""),
        (Counting, TensorWorkload, "seen changes"),
        (Net, Drawing, "draw random numbers"),
        (Net, DrawingNumpy, "draw random numbers"),
        (Net, DrawingPython, "draw random numbers"),
        (Net, Weighted, "the loss reads inputs, which is not the same at all sites"),
        (Net, Looking, ""),
    ],
    ids=["BatchNorm, dropout", "counter", "data", "numpy", "python", "weighted", "looking"],
)
def test_what_cannot_be_is_done_by_the_loop_to_its_bits_with_one_line(
    model: type[nn.Module], workload: type[TensorWorkload], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    works, together = trainers(model, workload, sizes=(30, 7, 20)), Together(quicker=True)
    wishes = [Wish("train", start(model), context(site)) for site in range(len(works))]
    parts = [
        Part(work, lambda training, wish=wish: wish.done(training)) for work, wish in zip(works, wishes, strict=True)
    ]  # type: ignore[misc]
    with caplog.at_level(logging.INFO, "fedflow.local.vectorised"):
        found = [together.run(parts) for _ in range(2)][1]
    assert len(caplog.records) == 1 and f"one after the other: {told}" in caplog.text.replace(
        "the data or the loss ", ""
    )
    for work, wish, result in zip(works, wishes, found, strict=True):
        expected = wish.done(work)
        assert isinstance(result, LocalResult) and "vectorised" not in result.numerics
        for group, tensors in expected.groups.items():
            assert all(torch.equal(result.groups[group][name], tensor) for name, tensor in tensors.items())


def test_an_optimizer_that_goes_on_from_round_to_round_is_the_loops_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    works, together = trainers(optimizer=Optimizer(kind="adamw", lr=0.01)), Together()
    algorithm = DiLoCo(local_steps_per_round=5)
    with caplog.at_level(logging.INFO, "fedflow.local.vectorised"):
        found = [updates(algorithm, works, together, model=Net) for _ in range(2)][1]
    assert [r.getMessage() for r in caplog.records] == [
        "sites are trained one after the other: their optimizer goes on where it stopped in its last round "
        "(algorithm.preserve_optimizer_state)"
    ]
    assert together.quicker is False
    for (ours, _), (theirs, _) in zip(
        found, updates(algorithm, works, Together(quicker=False), model=Net), strict=True
    ):
        torch.testing.assert_close(dict(ours.tensors), dict(theirs.tensors), rtol=0, atol=0)


def test_bitwise_numerics_are_never_trained_together() -> None:
    found = updates(FedAvg(), trainers(Double, numerics=Numerics()), Together(quicker=True))
    assert all("vectorised" not in update.numerics for update, _ in found)


def test_a_site_that_fails_fails_alone() -> None:
    works = trainers(Double, sizes=(8, 0, 16))
    found = updates(FedAvg(), works, Together(quicker=True))
    assert isinstance(found[1], SiteError) and "has no examples" in str(found[1])
    assert [update.steps for update, _ in (found[0], found[2])] == [2, 4]
    assert all(update.numerics["vectorised"] for update, _ in (found[0], found[2]))


class Unreadable(TensorWorkload):
    """Of seven examples the second batch cannot be read."""

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[Any]:
        for number, batch in enumerate(super().batches(batch_size, generator)):
            if len(self) == 7 and number == 1:
                raise OSError("the disk is on fire")
            yield batch


class Narrow(TensorWorkload):
    """Of seven examples the loss, too, finds too few columns."""

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[Any]:
        for inputs, targets in super().batches(batch_size, generator):
            yield (inputs[:, :3] if len(self) == 7 else inputs), targets


@pytest.mark.parametrize(
    ("workload", "told"), [(Unreadable, "the disk is on fire"), (Narrow, "shapes cannot be multiplied")]
)
def test_a_site_whose_code_fails_costs_the_others_no_more_than_that_training(
    workload: type[TensorWorkload], told: str
) -> None:
    """Those beside it are done by the loop, to its bits; later ones together again."""
    together = Together(quicker=True)
    sizes, settings = (30, 7, 20), {"batch_size": 4, "epochs": 1}
    found = updates(FedAvg(), trainers(Double, workload, sizes=sizes, **settings), together)
    expected = updates(FedAvg(), trainers(Double, workload, sizes=sizes, **settings), Together(quicker=False))
    assert told in str(found[1]) and str(found[1]) == str(expected[1])
    for ours, theirs in ((found[0], expected[0]), (found[2], expected[2])):
        torch.testing.assert_close(dict(ours[0].tensors), dict(theirs[0].tensors), rtol=0, atol=0)
    again = updates(FedAvg(), trainers(Double, workload, sizes=(30, 20), **settings), together)
    assert all(update.numerics["vectorised"] for update, _ in again)


def test_a_trial_decides_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    works, together = trainers(Double), Together()
    with caplog.at_level(logging.INFO, "fedflow.local.vectorised"):
        found = updates(FedAvg(), works, together)
        updates(FedAvg(), works, together)
    assert [record.msg.split(":")[0] for record in caplog.records] == ["a step of a site"]
    assert together.quicker == all("vectorised" in update.numerics for update, _ in found)
    assert together.quicker in (True, False)
