"""What a training remembers between rounds: to the bit, as files, and fresh with a reason where it does not fit."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset, WeightedRandomSampler

from fedflow.algorithm import LocalResult
from fedflow.errors import SiteError, TrainingInvalid
from fedflow.local import Config, FunctionWorkload, LocalTrainer, Session, Setup, TensorWorkload, training_of
from fedflow.local.data import DataView
from fedflow.local.generators import generators
from fedflow.local.state import Memory, TrainingState, decode, encode
from fedflow.recipe import LocalTraining, Numerics, Optimizer
from fedflow.types import Groups, RoundContext
from tests.builders import Tiny, blobs

INPUTS, TARGETS = blobs(22, seed=1)


def train(model: nn.Module, data: Any, config: Config) -> dict[str, float]:
    """AdamW, a cosine schedule, dropout (in the model), shuffling (in the data); evaluation and a return after the loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = schedulers.CosineAnnealingLR(optimizer, T_max=60)
    model.train()
    for inputs, targets in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()
    torch.rand(3), random.random()  # what comes after the loop belongs to no step
    return {"loss": float(loss.detach()), "lr": scheduler.get_last_lr()[0]}


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4, shuffle=True, **options)


def context(round: int) -> RoundContext:
    return RoundContext("run", round, "train", "site-1", num_sites=1, seed=100 + round)


def start() -> Groups:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tiny()
    return {"params": dict(model.named_parameters()), "frozen": {}, "buffers": dict(model.named_buffers())}


def through_files(state: TrainingState | None) -> TrainingState | None:
    """As it is written and read: safetensors and JSON."""
    if state is None:
        return None
    data = safetensors.torch.save({name: t.contiguous() for name, t in state.tensors.items()})
    return TrainingState(safetensors.torch.load(data), json.loads(json.dumps(state.structure)))


def rounds(workload: Any, steps: int, count: int, **settings: Any) -> LocalResult:
    """`count` rounds of one site whose model is replaced by its own (outer SGD with lr 1), each with memory from files."""
    broadcast, kept = start(), None
    for number in range(count):
        memory = Memory(lambda kept=kept: through_files(kept))  # type: ignore[misc]
        setup = Setup(Tiny, LocalTraining(**settings), Numerics(), lambda done, planned: None, memory)
        result = training_of(workload, setup).train(broadcast, context(number), steps=steps, preserve=True)
        broadcast = {"params": result.params, "frozen": {}, "buffers": result.buffers}
        kept = memory.after
        assert memory.note == ("continued" if number else "fresh (first participation)")
    return result


def by_hand(loader: Callable[[], DataLoader[Any]], steps: int) -> nn.Module:
    """The same script without fedflow, once, in the numerics of round 0."""
    model = Tiny()
    model.load_state_dict({n: t for group in start().values() for n, t in group.items()}, strict=False)
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.set_num_threads(1)
        torch.manual_seed(100)
        random.seed(100)
        np.random.seed(100)
        data = loader()

        def endless() -> Any:
            done = 0
            while True:
                for batch in data:
                    yield batch
                    done += 1
                    if done == steps:
                        return

        train(model, endless(), Config())
        torch.set_num_threads(threads)
    return model


def same(result: LocalResult, model: nn.Module) -> bool:
    found = {**result.params, **result.buffers}
    return all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


class Noise(TensorDataset):
    """Draws from every generator for each example, as augmentation does."""

    def __getitem__(self, index: int) -> Any:
        inputs, target = super().__getitem__(index)
        return inputs + torch.randn(4) / 10 + random.random() / 10 + float(np.random.rand()) / 10, target


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": shuffled,
    "own generator": lambda: shuffled(generator=torch.Generator().manual_seed(7)),
    "drop last": lambda: shuffled(drop_last=True),
    "augmented": lambda: DataLoader(Noise(INPUTS, TARGETS), batch_size=4, shuffle=True),
    "weighted": lambda: DataLoader(
        TensorDataset(INPUTS, TARGETS), batch_size=4, sampler=WeightedRandomSampler([1.0, 2.0] * 11, 22)
    ),
}


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_as_the_plain_loaders_do(persistent: bool) -> None:
    """Of a persistent worker that is so in its first epoch; then it is only another epoch's noise, and the same order."""

    def drawn(wrap: Callable[[Any], Any]) -> Any:
        torch.manual_seed(1)
        data = wrap(DataLoader(Noise(INPUTS, TARGETS), 22, shuffle=True, num_workers=1, persistent_workers=persistent))
        (noisy, order), (later, second) = [next(iter(data)) for _ in range(2)]
        return noisy, order, second, later

    found, expected = drawn(DataView), drawn(lambda loader: loader)
    same = range(3 if persistent else 4)
    assert all(torch.equal(found[n], expected[n]) for n in same)
    assert len({float(noise.sum()) for noise in (found[0], found[3])}) == 2


def test_workers_draw_anew_in_every_round() -> None:
    def first(batch: int) -> torch.Tensor:
        start = {"epoch": 0, "batch": batch, "length": 22, "start": {**states, "own": []}}
        loader = DataLoader(Noise(torch.zeros(22, 4), TARGETS), 1, num_workers=1)
        return next(iter(DataView(loader, place=start)))[0]  # type: ignore[no-any-return]

    states = generators()
    assert not torch.equal(first(0), first(1)) and torch.equal(first(1), first(1))


@pytest.mark.parametrize("name", LOADERS)
def test_twelve_rounds_of_five_steps_are_the_script_run_once_for_sixty(name: str) -> None:
    """Bitwise, against plain torch: the script never saw fedflow. A process a round: every round makes its loader anew."""

    class Fresh(FunctionWorkload):
        def __init__(self) -> None:
            super().__init__(train, LOADERS[name]())

        def training(self, setup: Setup) -> Any:
            self.data = LOADERS[name]()
            return super().training(setup)

    assert same(rounds(Fresh(), steps=5, count=12), by_hand(LOADERS[name], 60))


def test_what_is_drawn_between_epochs_that_are_left_over_belongs_to_no_step() -> None:
    def twice(model: nn.Module, data: Any, config: Config) -> None:
        train(model, data, config)  # draws after its loop
        assert list(data) == []

    assert same(rounds(FunctionWorkload(twice, shuffled()), steps=5, count=3), by_hand(shuffled, 15))


def test_the_built_in_loop_goes_on_too() -> None:
    workload = TensorWorkload(INPUTS, TARGETS)
    adamw = {"optimizer": Optimizer(kind="adamw", lr=0.01), "batch_size": 4}
    split, whole = rounds(workload, 5, 12, **adamw), rounds(workload, 60, 1, **adamw)
    assert all(torch.equal(split.params[n], whole.params[n]) for n in whole.params)
    assert all(torch.equal(split.buffers[n], whole.buffers[n]) for n in whole.buffers)


def test_a_retried_round_is_the_same_round() -> None:
    memory = Memory()
    setup = Setup(Tiny, LocalTraining(), Numerics(), lambda done, planned: None, memory)
    training_of(FunctionWorkload(train, shuffled()), setup).train(start(), context(0), steps=5, preserve=True)
    kept = memory.after
    results = []
    for _ in range(2):
        again = Setup(Tiny, LocalTraining(), Numerics(), lambda d, p: None, Memory(lambda: through_files(kept)))
        torch.rand(5)
        results.append(
            training_of(FunctionWorkload(train, shuffled()), again).train(start(), context(1), steps=5, preserve=True)
        )
    assert all(torch.equal(results[0].params[n], results[1].params[n]) for n in results[0].params)


def test_seven_steps_of_three_micro_batches_and_the_next_round_at_the_twenty_second() -> None:
    def accumulate(model: nn.Module, data: Any, config: Config) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for n, (inputs, targets) in enumerate(data, start=1):
            seen.append(inputs)
            nn.functional.cross_entropy(model(inputs), targets).backward()
            if n % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()

    seen: list[Any] = []
    data = DataLoader(TensorDataset(INPUTS[:20], TARGETS[:20]), batch_size=4)
    result = rounds(FunctionWorkload(accumulate, data), steps=7, count=2)
    assert result.steps == 7 and len(seen) == 42
    whole = [inputs for inputs, _ in data]
    assert all(torch.equal(inputs, whole[n % 5]) for n, inputs in enumerate(seen))


# -- what cannot be resumed --------------------------------------------------------------------------------------------
class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(INPUTS, TARGETS, strict=True))


class Forever(Sampler[int]):
    def __iter__(self) -> Any:
        return itertools.cycle(range(22))


class Negative(DataLoader[Any]):
    """It does something to its batches."""

    def __iter__(self) -> Any:
        return (tuple(-part for part in batch) for batch in super().__iter__())


UNORDERED: dict[str, tuple[DataLoader[Any], int]] = {
    "Endless": (DataLoader(Endless(), batch_size=4), 1),
    "Forever": (DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4, sampler=Forever()), 1),
    "Negative": (Negative(TensorDataset(INPUTS, TARGETS), batch_size=4), -1),
}


@pytest.mark.parametrize("name", UNORDERED)
def test_data_without_an_order_is_read_from_its_beginning_with_a_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    loader, sign = UNORDERED[name]
    with caplog.at_level(logging.WARNING, "fedflow"):
        view = DataView(loader, place={"epoch": 0, "batch": 3, "length": 6, "start": None})
        assert torch.equal(next(iter(view))[0], sign * INPUTS[:4])
    assert f"data: found '{name}', expected a DataLoader over a dataset with indices" in caplog.text
    with pytest.raises(TrainingInvalid, match=f"data: found '{name}'"):
        DataView(loader, strict=True)


def test_data_of_another_size_is_read_from_its_beginning(caplog: pytest.LogCaptureFixture) -> None:
    batches = list(range(4))
    with caplog.at_level(logging.WARNING, "fedflow"):
        view = DataView(batches, place={"epoch": 3, "batch": 2, "length": 6, "start": None})
        assert list(view) == batches
    assert "data: found 4 batches an epoch, expected the 6" in caplog.text


# -- fresh, with the reason --------------------------------------------------------------------------------------------
def one_round(code: Callable[[nn.Module], None], memory: Memory, model: nn.Module | None = None) -> None:
    with Session(model or Tiny(), memory=memory) as session:
        code(session.model)


def adam(model: nn.Module, **options: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **options)
    step(optimizer, model)


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    model(INPUTS).sum().backward()
    optimizer.step()


def scheduled(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = schedulers.StepLR(optimizer, 2)
    step(optimizer, model)
    schedule.step()


def reordered(model: nn.Module) -> None:
    step(torch.optim.Adam(list(model.parameters())[::-1], lr=0.1), model)


@pytest.mark.parametrize(
    ("code", "model", "says"),
    [
        (lambda m: step(torch.optim.SGD(m.parameters(), lr=0.1), m), Tiny, "optimizer: found SGD, kept Adam"),
        (scheduled, Tiny, r"schedulers: found \['StepLR'\], kept \[\]"),
        (reordered, Tiny, r"groups: found 4.bias float32\[3\], kept 0.weight float32\[6, 4\]"),
        (adam, lambda: Tiny().double(), r"groups: found 0.weight float64\[6, 4\], kept 0.weight float32\[6, 4\]"),
        (adam, lambda: nn.Sequential(nn.Linear(4, 5)), r"groups: found 0.weight float32\[5, 4\], kept 0.weight"),
    ],
    ids=["type", "scheduler", "order", "dtype", "shape"],
)
def test_state_that_does_not_fit_is_dropped_with_one_line(
    code: Callable[[nn.Module], None], model: Callable[[], nn.Module], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory()
    one_round(adam, memory)
    again = Memory(lambda: memory.after)
    net = model()
    inputs = INPUTS.to(next(net.parameters()).dtype)
    with caplog.at_level(logging.WARNING, "fedflow"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "INPUTS", inputs)
        one_round(code, again, net)
    assert again.note is not None and re.match(rf"fresh \({says}", again.note)
    assert len(caplog.records) == 1 and "starting fresh" in caplog.text
    assert again.after is not None


def lost() -> TrainingState:
    raise SiteError("training state lost: the file is gone")


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lost, "training state lost: the file is gone"),
        (lambda: TrainingState({}, "{"), "Expecting"),
        (lambda: TrainingState({}, '{"dict":[["optimizer",{"tensor":"0:x"}]]}'), "0:x"),
        (lambda: TrainingState({}, '{"dict":[]}'), "found nothing of 'data'"),
    ],
    ids=["missing", "no JSON", "a tensor is missing", "another tree"],
)
def test_lost_or_corrupt_state_is_a_fresh_start(read: Callable[[], TrainingState], says: str) -> None:
    memory = Memory(read)
    one_round(adam, memory)
    assert memory.note is not None and memory.note.startswith("fresh (") and says in memory.note


# -- optimizers and schedulers round trip ------------------------------------------------------------------------------
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adamax": lambda p: torch.optim.Adamax(p),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_nothing_had_been(name: str) -> None:
    """Six steps, against three, files, and three with a new optimizer over the same model."""
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    models[1].load_state_dict(models[0].state_dict())
    whole = OPTIMIZERS[name](list(models[0].parameters()))
    for _ in range(6):
        step(whole, models[0])
    memory = Memory()
    for _ in range(2):
        memory = Memory(lambda kept=memory.after: through_files(kept))  # type: ignore[misc]
        with Session(models[1], memory=memory):
            optimizer = OPTIMIZERS[name](list(models[1].parameters()))
            for _ in range(3):
                step(optimizer, models[1])
    assert memory.note == "continued"
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=2), schedulers.CosineAnnealingLR(o, 6)], [2]
    ),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=10),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=4),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
}


def test_every_scheduler_of_torch_is_here() -> None:
    known = {n for n in schedulers.__all__ if n not in ("LRScheduler",)}
    assert known <= SCHEDULERS.keys() | {"_LRScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_as_if_nothing_had_been(name: str) -> None:
    def schedule(model: nn.Module, steps: int) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        for _ in range(steps):
            step(optimizer, model)
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        return rates

    expected = schedule(nn.Linear(4, 3), 8)
    memory, found = Memory(), []
    for _ in range(2):
        memory = Memory(lambda kept=memory.after: through_files(kept))  # type: ignore[misc]
        with Session(nn.Linear(4, 3), memory=memory) as session:
            rates = schedule(session.model, 4)
        found += rates
    assert memory.note == "continued" and found == expected


def test_a_scheduler_of_ones_own_is_announced() -> None:
    class Own:
        def __init__(self) -> None:
            self.count = 0

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    memory = Memory()
    for expected in (1, 2):
        memory = Memory(lambda kept=memory.after: through_files(kept))  # type: ignore[misc]
        own = Own()
        with Session(nn.Linear(4, 3), memory=memory) as session:
            session.track(own)
            step(torch.optim.SGD(session.model.parameters(), lr=0.1), session.model)
            own.count += 1
        assert own.count == expected


# -- trees -------------------------------------------------------------------------------------------------------------
def test_a_tree_comes_back_with_its_kinds() -> None:
    tree = {
        "tensor": torch.arange(3),
        1: [1.5, float("inf"), None, True, "text", (1, [2])],
        "array": np.arange(4, dtype=np.uint32),
        "scalar": np.float64(0.5),
        "counter": Counter({3: 2}),
        "ordered": OrderedDict(b=1, a=2),
        "dtype": torch.bfloat16,
        "empty": {},
    }
    found = decode(encode(tree))
    assert torch.equal(found.pop("tensor"), tree.pop("tensor"))  # type: ignore[arg-type]
    assert np.array_equal(found["array"], tree["array"]) and found.pop("array").dtype == tree.pop("array").dtype  # type: ignore[arg-type,attr-defined]
    assert found == tree and [type(v) for v in found.values()] == [type(v) for v in tree.values()]


def test_another_kind_of_value_is_named() -> None:
    with pytest.raises(SiteError, match=r"state.a.1: found builtins.set, expected tensors, arrays, numbers"):
        encode({"a": [1, {2}]})


def test_nothing_is_kept_unless_an_algorithm_asks() -> None:
    memory = Memory(lost)
    LocalTrainer(Tiny, TensorWorkload(INPUTS, TARGETS), LocalTraining(), Numerics(), memory=memory).train(
        start(), context(0)
    )
    assert memory.after is None and memory.note is None
