"""Unmodified training code in a session: corrected exactly, counted exactly, stopped exactly, and nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_hooks
from torch.utils.data import DataLoader, TensorDataset

from fedflow.algorithm import Correction
from fedflow.errors import OpeningClosed, SiteError, TrainingInvalid
from fedflow.local import Session, current
from tests.builders import blobs


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    yield
    assert not torch_hooks._global_optimizer_pre_hooks
    assert not torch_hooks._global_optimizer_post_hooks


def small(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loader(examples: int = 20, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*blobs(examples, seed=1)), batch_size=batch_size, **options)


def offset_for(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) / 10 for name, p in model.named_parameters()}


# -- training code that knows nothing of fedflow -----------------------------------------------------------------------
def train(model: nn.Module, data: Any, config: dict[str, Any]) -> dict[str, float]:
    """The basic loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=config.get("lr", 0.1), momentum=config.get("momentum", 0.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for _ in range(config.get("epochs", 1)):
        for inputs, targets in data:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step()
    return {"loss": float(loss.detach())}


def train_with_closure(model: nn.Module, data: Any, config: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for inputs, targets in data:

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()


def train_scaled(model: nn.Module, data: Any, config: dict[str, Any], fused: bool = True) -> None:
    """With a loss scaler, which halves its scale and skips the step where a gradient is infinite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=config.get("scale", 1024.0), growth_interval=1000)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for inputs, targets in data:
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(inputs), targets)).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            scheduler.step()


def train_a_gan(model: nn.Module, data: Any, config: dict[str, Any], other: nn.Module | None = None) -> None:
    """A second model with an optimizer of its own, stepped in between."""
    other = other or small(seed=9)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for inputs, targets in data:
        for network, step in ((other, other_optimizer), (model, optimizer)):
            step.zero_grad()
            nn.functional.cross_entropy(network(inputs), targets).backward()
            step.step()
        scheduler.step()


def train_compiled(model: nn.Module, data: Any, config: dict[str, Any]) -> None:
    train(torch.compile(model, backend="eager"), data, config)


FORMS: list[Callable[..., Any]] = [train, train_with_closure, train_scaled, train_a_gan, train_compiled]
FORMS.append(lambda model, data, config: train_scaled(model, data, config, fused=False))


def reference(model: nn.Module, data: Any, correction: Correction) -> tuple[int, float]:
    """The corrected loop as the papers write it: w ← w − lr (g + offset + μ (w − x)), lr halved every third step."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps, lr_sum = 0, 0.0
    for inputs, targets in data:
        lr = 0.1 * 0.5 ** (steps // 3)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), parameters)
        with torch.no_grad():
            for name, p, g in zip(names, parameters, gradients, strict=True):
                extra = correction.offset.get(name, torch.zeros_like(p)) + correction.proximal * (p - start[name])
                if correction.apply == "after_step":
                    p -= lr * g
                    extra = correction.offset.get(name, torch.zeros_like(p)) + correction.proximal * (p - start[name])
                    p -= lr * extra
                else:
                    p -= lr * (g + extra)
        steps += 1
        lr_sum += lr
    return steps, lr_sum


@pytest.mark.parametrize("form", FORMS, ids=["plain", "closure", "scaled fused", "gan", "compiled", "scaled"])
@pytest.mark.parametrize("kind", ["none", "proximal", "offset", "both", "offset after"])
def test_unmodified_code_trains_as_the_formula_says(form: Callable[..., Any], kind: str) -> None:
    model, expected = small(), small()
    offset = offset_for(model, 3) if kind not in ("none", "proximal") else {}
    correction = Correction(
        offset=offset,
        proximal=0.3 if kind in ("proximal", "both") else 0.0,
        apply="after_step" if kind == "offset after" else "gradient",
    )
    with Session(model, correction=correction) as session:
        form(model, loader(), {})
    found = reference(expected, loader(), correction)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert (session.done, session.lr_sum) == (found[0], pytest.approx(found[1]))


def test_without_a_correction_the_training_is_untouched() -> None:
    model, plain = small(), small()
    with Session(model):
        train(model, loader(), {"momentum": 0.9})
    train(plain, loader(), {"momentum": 0.9})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_no_step(fused: bool) -> None:
    """Five batches, the third with an infinite input: four steps."""
    model, (inputs, targets) = small(), blobs(20, seed=1)
    inputs[9] = torch.inf
    with Session(model, correction=Correction(offset=offset_for(model, 1))) as session:
        train_scaled(model, DataLoader(TensorDataset(inputs, targets), batch_size=4), {}, fused=fused)
    assert session.done == 4
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_step_around_the_parents_step_is_one() -> None:
    """torch has hooks on both, once it has seen an optimizer of the parent's class."""

    class Noted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    torch.optim.SGD(small().parameters(), lr=0.1)
    model, expected = small(), small()
    correction = Correction(offset=offset_for(model, 1))
    with Session(model, correction=correction, steps=5) as session:
        optimizer = Noted(model.parameters(), lr=0.1)
        for n, (inputs, targets) in enumerate(loader()):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** (n // 3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    assert (session.done, session.lr_sum) == (5, pytest.approx(reference(expected, loader(), correction)[1]))
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_threads_do_not_see_each_other() -> None:
    """Eight sites at once, each with its own correction, each beside an unrelated optimizer: bitwise as one by one."""

    batches = list(loader(40, 2))
    models = [(small(number), small(9)) for number in range(8)]

    def site(number: int) -> list[Tensor]:
        model, other = copy.deepcopy(models[number])
        correction = Correction(offset=offset_for(model, number), proximal=number / 10)
        with Session(model, correction=correction) as session:
            train_a_gan(model, batches, {}, other)
        assert session.done == 20
        return [p.detach().clone() for p in model.parameters()]

    alone = [site(number) for number in range(8)]
    together: dict[int, list[Tensor]] = {}
    begin = threading.Barrier(8)

    def in_thread(number: int) -> None:
        begin.wait()
        together[number] = site(number)

    threads = [threading.Thread(target=in_thread, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert all(torch.equal(a, b) for a, b in zip(alone[number], together[number], strict=True))


# -- exactly H steps ---------------------------------------------------------------------------------------------------
def accumulate(model: nn.Module, data: Any, every: int, seen: list[Any]) -> str:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (inputs, targets) in enumerate(data, start=1):
        seen.append(inputs)
        (nn.functional.cross_entropy(model(inputs), targets) / every).backward()
        if number % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return "the code after the loop ran"


def test_seven_steps_of_three_micro_batches_over_an_epoch_of_five() -> None:
    model, seen = small(), []
    with Session(model, steps=7) as session:
        stream = session.data(loader())
        assert accumulate(model, stream, 3, seen) == "the code after the loop ran"
    assert session.done == 7 and len(seen) == 21
    whole = list(loader())
    assert all(torch.equal(batch, whole[n % 5][0]) for n, batch in enumerate(seen))
    assert (stream.place()["epoch"], stream.place()["batch"]) == (4, 1)  # 21 of 5 an epoch: next is the 22nd


def test_the_stream_is_still_a_loader() -> None:
    with Session(small(), steps=1) as session:
        stream = session.data(loader())
        assert len(stream) == 5 and stream.batch_size == 4 and len(stream.dataset) == 20
        train(session.model, stream, {"epochs": 3})  # further epochs are empty
    assert session.done == 1


def test_code_that_reads_its_data_elsewhere_is_stopped_before_the_next_step(caplog: pytest.LogCaptureFixture) -> None:
    model, after = small(), []
    with caplog.at_level(logging.WARNING, "fedflow"), Session(model, steps=3) as session:
        train(model, loader(), {})
        after.append("not reached")
    assert session.done == 3 and not after
    assert "the training went on after its 3 steps" in caplog.text
    with pytest.raises(TrainingInvalid, match="went on after its 3 steps"), Session(small(), steps=3, strict=True) as s:
        train(s.model, loader(), {})


def cycling(data: Any) -> Iterator[Any]:
    def cycle() -> Iterator[Any]:
        while True:
            yield from data

    batches = cycle()
    for _ in range(20):
        yield next(batches)


def counting(data: Any) -> Iterator[Any]:
    done = 0
    while done < 20:
        for batch in data:
            yield batch
            done += 1


class Restarting:
    """The next batch, from the beginning where there is none."""

    def __init__(self, data: Any) -> None:
        self.data, self.batches = data, iter(data)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.data)
            return next(self.batches)


@pytest.mark.parametrize("loop", [cycling, counting])
def test_a_loop_without_end_is_stopped(loop: Callable[[Any], Any], caplog: pytest.LogCaptureFixture) -> None:
    """Data that has ended gives nothing, however often it is asked: without being stopped these would spin for ever."""
    with caplog.at_level(logging.WARNING, "fedflow"), Session(small(), steps=7) as session:
        train(session.model, loop(session.data(loader())), {})
    assert session.done == 7 and "the training went on after its 7 steps and was stopped" in caplog.text


def test_code_that_asks_for_a_next_batch_in_vain_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    def code(model: nn.Module, data: Any) -> None:
        optimizer, batches = torch.optim.SGD(model.parameters(), lr=0.1), Restarting(data)
        for _ in range(20):
            optimizer.zero_grad()
            model(next(batches)[0]).sum().backward()
            optimizer.step()

    with caplog.at_level(logging.WARNING, "fedflow"), Session(small(), steps=7) as session:
        code(session.model, session.data(loader()))
    assert session.done == 7 and "the training went on after its 7 steps and was stopped" in caplog.text
    with pytest.raises(StopIteration), Session(small()) as session:
        code(session.model, iter([]))


def test_code_that_stops_too_early_is_an_error() -> None:
    with (
        pytest.raises(TrainingInvalid, match="steps: found 5, expected exactly 9"),
        Session(small(), steps=9) as session,
    ):
        train(session.model, loader(), {})


def test_every_step_is_reported_and_what_a_report_raises_passes_through() -> None:
    seen: list[Any] = []
    with Session(small(), steps=2, on_step=lambda done, planned: seen.append((done, planned))) as session:
        train(session.model, session.data(loader()), {})
    assert seen == [(1, 2), (2, 2)]

    def close(done: int, planned: int | None) -> None:
        raise OpeningClosed("closed")

    with pytest.raises(OpeningClosed), Session(small(), on_step=close) as session:
        train(session.model, loader(), {})


def test_the_session_is_found_by_code_that_asks() -> None:
    assert current() is None
    with Session(small()) as outer:
        assert current() is outer
        train(outer.model, loader(), {})
    assert current() is None


def test_explicit_steps_are_those_of_the_formula() -> None:
    """A loop without torch.optim that calls `session.correct` after its own step."""
    model, expected = small(), small()
    correction = Correction(offset=offset_for(model, 2))
    with Session(model, correction=correction) as session:
        for n, (inputs, targets) in enumerate(loader()):
            lr = 0.1 * 0.5 ** (n // 3)
            gradients = torch.autograd.grad(
                nn.functional.cross_entropy(model(inputs), targets), list(model.parameters())
            )
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= lr * g
            session.correct(model, lr)
    steps, lr_sum = reference(expected, loader(), correction)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert (session.done, session.lr_sum) == (steps, pytest.approx(lr_sum))


# -- what is not accepted ----------------------------------------------------------------------------------------------
SGD_ONLY = Correction(offset={"0.bias": torch.ones(6)}, assumes_sgd=True)


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def two_optimizers(model: nn.Module) -> None:
    for part in (model[0], model[2]):  # type: ignore[index]
        step(torch.optim.SGD(part.parameters(), lr=0.1), model)


def lbfgs(model: nn.Module) -> None:
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(lambda: float(model(torch.ones(2, 4)).sum()))


def frozen_later(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(optimizer, model)
    model[0].requires_grad_(False)  # type: ignore[index]
    step(optimizer, model)


def made_anew(model: nn.Module) -> None:
    step(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model[2] = nn.Linear(6, 3)  # type: ignore[index]


def both_ways(model: nn.Module) -> None:
    step(torch.optim.SGD(model.parameters(), lr=0.1), model)
    session = current()
    assert session is not None
    session.correct(model, 0.1)


def uneven(model: nn.Module) -> None:
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.2}]  # type: ignore[index]
    step(torch.optim.SGD(groups), model)


@pytest.mark.parametrize(
    ("code", "correction", "says"),
    [
        (lambda model: None, Correction(), "no optimizer step was taken"),
        (lambda model: step(torch.optim.SGD(small().parameters(), lr=1.0), small()), Correction(), "no optimizer step"),
        (two_optimizers, Correction(), "optimizer: found 'SGD and SGD', expected one optimizer"),
        (lbfgs, Correction(), "optimizer: found 'LBFGS'"),
        (lambda model: step(torch.optim.SGD(model.parameters(), lr=0.0), model), Correction(), "lr: found 0.0"),
        (frozen_later, Correction(), "0.weight: found 'frozen during the training'"),
        (made_anew, Correction(), "2.weight, 2.bias: found 'parameters made anew"),
        (both_ways, Correction(), "session.correct: found 'steps of a torch optimizer too'"),
        (uneven, SGD_ONLY, r"lr: found \[0.1, 0.2\], expected the same in all parameter groups"),
        (
            lambda model: step(torch.optim.AdamW(model.parameters(), lr=0.1), model),
            SGD_ONLY,
            "optimizer: found 'AdamW', expected SGD.*allow_adaptive",
        ),
    ],
    ids=["no step", "another model", "two", "lbfgs", "lr 0", "frozen", "anew", "mixed", "uneven lr", "adaptive"],
)
def test_code_that_cannot_take_part_is_told_why(code: Callable[..., Any], correction: Correction, says: str) -> None:
    place = {"run": "run", "round": 2, "site": "site-1"}
    with (
        pytest.raises(SiteError, match=f"run run, round 2, site site-1: {says}"),
        Session(small(), correction=correction, place=place) as session,
    ):
        code(session.model)


def test_code_that_goes_on_after_being_told_cannot_take_part() -> None:
    def going_on(model: nn.Module) -> None:
        with contextlib.suppress(Exception):
            two_optimizers(model)

    with pytest.raises(TrainingInvalid, match="optimizer: found 'SGD and SGD'"), Session(small()) as session:
        going_on(session.model)


def test_a_model_is_in_one_session_at_a_time() -> None:
    model = small()
    with pytest.raises(SiteError, match="in another session already"), Session(model), Session(model):
        pass


def test_momentum_under_a_correction_for_plain_sgd_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedflow"), Session(small(), correction=SGD_ONLY) as session:
        step(torch.optim.SGD(session.model.parameters(), lr=0.1, momentum=0.9), session.model)
    assert "with momentum 0.9 its estimate inflates by up to 10" in caplog.text


@pytest.mark.parametrize("offset", [torch.ones(7), torch.full((6,), torch.nan)], ids=["shape", "nan"])
def test_a_correction_that_does_not_fit_is_refused(offset: Tensor) -> None:
    with pytest.raises(TrainingInvalid, match="correction of 0.bias: found"):
        Session(small(), correction=Correction(offset={"0.bias": offset}))


def test_an_exception_of_the_code_passes_through_and_no_hook_is_left() -> None:
    with pytest.raises(ZeroDivisionError), Session(small()) as session:
        step(torch.optim.SGD(session.model.parameters(), lr=0.1), session.model)
        1 / 0  # noqa: B018
