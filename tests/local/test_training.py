"""The built-in loop: so many steps and no other, the bits of its seed, and the caller's world as it was."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedflow.algorithm import LocalResult
from fedflow.errors import RecipeError, ResolveError, SiteError
from fedflow.local import LocalTrainer, TensorWorkload, TorchWorkload, model_groups
from fedflow.local.numerics import applied, recorded
from fedflow.local.workload import check_evaluator, check_workload
from fedflow.recipe import LocalTraining, Numerics, Optimizer
from fedflow.tensors import model_digest
from fedflow.types import Groups, RoundContext, derive_seed
from tests.builders import Blobs, Tiny, blobs, trainings

CONTEXT = RoundContext("run", 2, "train", "site-1", num_sites=3, seed=11)


def broadcast(model: type[nn.Module] = Tiny) -> Groups:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_groups(model())


class Counted(TensorWorkload):
    """Remembers the size of every batch and in which pass over the data it came."""

    def __init__(self, examples: int) -> None:
        super().__init__(*blobs(examples, seed=1))
        self.sizes: list[list[int]] = []

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
        self.sizes.append([])
        for batch in super().batches(batch_size, generator):
            self.sizes[-1].append(len(batch[0]))
            yield batch


def train(
    workload: TorchWorkload,
    settings: LocalTraining,
    ctx: RoundContext = CONTEXT,
    model: type[nn.Module] = Tiny,
    **options: Any,
) -> LocalResult:
    return LocalTrainer(model, workload, settings, Numerics(), **options).train(broadcast(model), ctx)


def digest(result: LocalResult) -> str:
    return model_digest({**result.params, **result.frozen, **result.buffers})


# -- how long ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, [[8, 8, 4]]),
        ({"epochs": 2}, [[8, 8, 4], [8, 8, 4]]),
        ({"steps": 2}, [[8, 8]]),
        ({"steps": 3}, [[8, 8, 4]]),
        ({"steps": 5}, [[8, 8, 4], [8, 8]]),
        ({"steps": 7}, [[8, 8, 4], [8, 8, 4], [8]]),
    ],
    ids=str,
)
def test_it_takes_exactly_the_steps_asked_for_going_round_the_data(
    settings: dict[str, int], passes: list[list[int]]
) -> None:
    """Twenty examples in batches of eight. A batch may be fetched to see that it is not needed; none is trained on."""
    workload, seen = Counted(20), []
    result = train(
        workload, LocalTraining(batch_size=8, **settings), on_step=lambda done, planned: seen.append((done, planned))
    )
    expected = sum(len(sizes) for sizes in passes)
    assert result.steps == expected
    assert seen == [(n + 1, settings.get("steps")) for n in range(expected)]
    used = [size for sizes in workload.sizes for size in sizes][:expected]
    assert used == [size for sizes in passes for size in sizes]


def test_a_plan_may_ask_for_another_number_of_steps() -> None:
    ctx = RoundContext("run", 2, "train", "site-1", 3, seed=11, overrides={"steps": 4})
    assert train(Counted(20), LocalTraining(epochs=1, batch_size=8), ctx).steps == 4


def test_every_example_is_seen_once_an_epoch_in_an_order_of_the_seed() -> None:
    """The loop's generator starts from derive_seed("data", seed); every pass shuffles with it."""
    seen: list[list[int]] = []

    class Rows(TensorWorkload):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append(batch[1].tolist())
            return model(torch.randn(2, 4)).sum()

    train(Rows(torch.zeros(6, 4), torch.arange(6)), LocalTraining(epochs=2, batch_size=4))
    generator = torch.Generator().manual_seed(derive_seed("data", CONTEXT.seed))
    orders = [torch.randperm(6, generator=generator).tolist() for _ in range(2)]
    assert seen == [part for order in orders for part in (order[:4], order[4:])]


def test_it_is_torchs_own_loop() -> None:
    """Bitwise: the loop written out with torch.optim, over the same batches, with clipping and momentum."""
    settings = LocalTraining(
        epochs=2, batch_size=8, clip_norm=0.5, optimizer=Optimizer(lr=0.1, momentum=0.9, nesterov=True)
    )
    workload = TensorWorkload(*blobs(20, seed=1))
    found = train(workload, settings)

    model = Tiny()
    for name, tensor in model.state_dict().items():
        tensor.copy_({n: t for group in broadcast().values() for n, t in group.items()}[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    generator, losses = torch.Generator().manual_seed(derive_seed("data", CONTEXT.seed)), []
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.set_num_threads(1)
        torch.manual_seed(CONTEXT.seed)
        model.train()
        for _ in range(2):
            for rows in torch.randperm(20, generator=generator).split(8):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(workload.inputs[rows]), workload.targets[rows])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                losses.append(loss.item())
        torch.set_num_threads(threads)
    assert digest(found) == model_digest(model.state_dict())
    assert found.metrics["loss"] == sum(losses) / len(losses)
    assert (found.steps, found.lr_sum, found.examples) == (6, pytest.approx(0.6), 20)


# -- bits --------------------------------------------------------------------------------------------------------------
def test_the_bits_are_those_of_the_seed_whatever_the_caller_did_before() -> None:
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        random.seed(noise)
        np.random.seed(noise)
        results.append(digest(train(TensorWorkload(*blobs(20, seed=1)), LocalTraining(batch_size=8))))
    other = RoundContext("run", 2, "train", "site-1", 3, seed=12)
    assert (
        results[0]
        == results[1]
        != digest(train(TensorWorkload(*blobs(20, seed=1)), LocalTraining(batch_size=8), other))
    )


class Noisy(TensorWorkload):
    """Draws from every generator that there is."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return super().loss(model, batch) * noise


def test_the_callers_generators_are_left_as_they_were() -> None:
    def drawn() -> tuple[Any, ...]:
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    def seeded() -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)

    seeded()
    expected = drawn()
    seeded()
    train(Noisy(*blobs(20, seed=1)), LocalTraining(batch_size=8))
    assert drawn() == expected


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)], ids=["off", "on", "warnings only"])
@pytest.mark.parametrize("fails", [False, True])
def test_threads_and_determinism_are_put_back_also_after_an_error(before: tuple[bool, bool], fails: bool) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        try:
            with applied(Numerics(threads=1), seed=1):
                assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert torch.get_num_threads() == 2
        found = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        assert found == before
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_fast_numerics_do_not_insist_on_determinism() -> None:
    with applied(Numerics(deterministic="fast"), seed=1):
        assert not torch.are_deterministic_algorithms_enabled()


class Conv(nn.Module):
    """Three channels of 6×6 in, three classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Linear(5 * 36, 3)

    def forward(self, images: Tensor) -> Tensor:
        assert images.is_contiguous(memory_format=torch.channels_last) == (not self.conv.weight.is_contiguous())
        return self.head(self.norm(self.conv(images)).relu().flatten(1))  # type: ignore[no-any-return]


class Viewing(Conv):
    """As is often written: a view, which only the ordinary layout has."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images)).relu().view(len(images), -1))  # type: ignore[no-any-return]


def on_images(model: type[nn.Module], deterministic: str) -> LocalResult:
    images = torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    work = TensorWorkload(images, torch.arange(20) % 3)
    settings = LocalTraining(batch_size=8, optimizer=Optimizer(lr=0.1, momentum=0.9))
    numerics = Numerics.model_validate({"deterministic": deterministic})
    return LocalTrainer(model, work, settings, numerics).train(broadcast(model), CONTEXT)


def test_fast_convolutions_have_their_channels_last_and_send_the_ordinary_layout() -> None:
    fast, exact = on_images(Conv, "fast"), on_images(Conv, "bitwise")
    assert (fast.numerics["memory_format"], "memory_format" in exact.numerics) == ("channels_last", False)
    for group, tensors in exact.groups.items():
        for name, tensor in tensors.items():
            assert fast.groups[group][name].is_contiguous()
            torch.testing.assert_close(fast.groups[group][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_model_that_needs_the_ordinary_layout_is_trained_in_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fedflow.local.training"):
        results = [on_images(Viewing, "fast") for _ in range(2)]
    assert len(caplog.records) == 1 and "without channels_last" in caplog.text
    assert [digest(result) for result in results] == [digest(on_images(Viewing, "bitwise"))] * 2
    assert "memory_format" not in results[0].numerics


def test_an_update_says_what_decided_its_bits() -> None:
    found = recorded(Numerics(threads=1))
    assert found.keys() == {"torch", "cpu", "machine", "device", "threads", "deterministic"}
    assert (found["torch"], found["threads"], found["device"]) == (torch.__version__, 1, "cpu")


def test_a_device_that_is_not_there_is_a_mistake_in_the_recipe() -> None:
    absent: Any = "cuda" if torch.backends.mps.is_available() else "mps"  # no machine has both
    with (
        pytest.raises(RecipeError, match=f"numerics.device: found '{absent}', expected a device of this machine"),
        applied(Numerics(device=absent), seed=1),
    ):
        pass


# -- what is not accepted ----------------------------------------------------------------------------------------------
class Empty(TensorWorkload):
    """Says that it has examples, and gives none."""

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[Any]:
        return []


@pytest.mark.parametrize("settings", [LocalTraining(), LocalTraining(steps=5), LocalTraining(epochs=3)], ids=str)
def test_no_step_is_an_error_of_the_site(settings: LocalTraining) -> None:
    with pytest.raises(SiteError, match="run run, round 2, site site-1: no optimizer step was taken"):
        train(Empty(*blobs(4, seed=1)), settings)


def test_no_data_is_an_error_of_the_site() -> None:
    with pytest.raises(SiteError, match="round 2, site site-1: the workload has no examples"):
        train(TensorWorkload(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)), LocalTraining())


class Half(nn.Sequential):
    """Its first layer is frozen."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3), nn.Linear(3, 3))
        self[0].requires_grad_(False)


class Meddling(TensorWorkload):
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            model[0].weight += 1  # type: ignore[index]
        return super().loss(model, batch)


def test_frozen_parameters_do_not_move_and_moving_them_is_an_error_of_the_site() -> None:
    result = train(TensorWorkload(*blobs(8, seed=1)), LocalTraining(), model=Half)
    assert list(result.frozen) == ["0.weight", "0.bias"] and list(result.params) == ["1.weight", "1.bias"]
    assert model_digest(result.frozen) == model_digest(broadcast(Half)["frozen"])
    with pytest.raises(SiteError, match="site site-1: frozen parameters were changed by the training"):
        train(Meddling(*blobs(8, seed=1)), LocalTraining(), model=Half)


def test_what_stops_a_training_passes_through() -> None:
    def stop(done: int, planned: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TensorWorkload(*blobs(20, seed=1)), LocalTraining(steps=10), on_step=stop)


# -- workloads ---------------------------------------------------------------------------------------------------------
def test_a_workload_evaluates_on_what_it_holds_out() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    targets = torch.tensor([0, 1, 1, 1])
    found = TensorWorkload(logits, targets, held_out=(logits, targets)).evaluate(nn.Identity())
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)))
    assert TensorWorkload(logits, targets).evaluate(nn.Identity()) == {}


def test_inputs_and_targets_have_as_many_rows() -> None:
    with pytest.raises(ValueError, match="found 3 and 2 rows"):
        TensorWorkload(torch.zeros(3, 1), torch.zeros(2))


def test_what_is_no_workload_is_told_with_what_it_lacks() -> None:
    with pytest.raises(
        ResolveError, match="found 'dict', expected an object with __len__, batches, loss; add batches, loss"
    ):
        check_workload({}, "workload")
    with pytest.raises(ResolveError, match="evaluation: found 'dict', expected an object with evaluate"):
        check_evaluator({}, "evaluation")
    workload = TensorWorkload(torch.zeros(1, 1), torch.zeros(1))
    assert check_workload(workload, "workload") is workload is check_evaluator(workload, "evaluation")


def test_progress_can_be_watched_and_a_log_be_kept(tmp_path: Path) -> None:
    train(Blobs("site-2", str(tmp_path / "log")), LocalTraining(batch_size=8))
    assert trainings(tmp_path / "log") == {"site-2": 1}
