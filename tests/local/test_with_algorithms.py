"""Foreign training code under every kind of algorithm, from the recipe: the result is that of formulas and plain loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from fedflow.engine import simulate
from fedflow.local import FunctionWorkload, ScriptWorkload
from fedflow.local.model import build_model
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.tensors import read_tensors
from tests.builders import head
from tests.local import by_hand, foreign
from tests.local.by_hand import Descent, Site, federated

SEED, H = 11, 7
SITES = ("site-1", "site-2")
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"mu": by_hand.MU},
    "scaffold": {},
    "diloco": {"local_steps_per_round": H},
}
CORRECTED = ["fedprox", "scaffold", "diloco"]


def simulated(
    kind: str, model: str, workloads: Mapping[str, Any], *, rounds: int, training: Any, **own: Any
) -> Journal:
    fields = {"name": kind, "model": model, "workload": f"{__name__}:unused", "rounds": rounds, "seed": SEED}
    algorithm = {"kind": kind, **ALGORITHMS[kind], **own}
    return simulate(Recipe.load({**fields, "algorithm": algorithm, "training": training}), workloads)


def unused(site: str) -> Any:
    raise AssertionError("the workloads are given")


def model_of(journal: Journal) -> dict[str, torch.Tensor]:
    return {n: t for ref in head(journal).model.values() for n, t in read_tensors(journal.store, ref).items()}


def close(journal: Journal, expected: Mapping[str, torch.Tensor]) -> None:
    found = model_of(journal)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, dict(expected), rtol=1e-6, atol=1e-6)


def steps_of(journal: Journal) -> list[list[int]]:
    """Per round, by site."""
    manifests = (journal.manifest(n, "train") for n in range(head(journal).round + 1))
    return [[c.steps for _, c in sorted(m.contributors.items())] for m in manifests if m is not None]


# -- as PyTorch's MNIST example ----------------------------------------------------------------------------------------
MNIST = {
    "epochs": 3,
    "batch_size": 8,
    "optimizer": {"lr": 0.05},
    "config": {"gamma": 0.7, "log_interval": 4, "enough": 0.8},
}


def mnist_by_hand(site: str) -> Site:
    train, test = foreign.digits(site)

    def local(descent: Descent) -> None:
        train_loader, test_loader = DataLoader(train, batch_size=8, shuffle=True), DataLoader(test, batch_size=100)
        model, memory = descent.model, descent.memory
        rate = memory.get("rate", 0.05)
        for _ in range(3):
            model.train()
            for inputs, targets in train_loader:
                if descent.step(F.nll_loss(model(inputs), targets), rate):
                    memory["rate"] = rate
                    return
            if foreign.test(model, test_loader) > 0.8:
                break
            rate *= 0.7
        memory["rate"], memory["generators"] = rate, torch.get_rng_state()

    return Site(local, examples=len(train))


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_pytorchs_mnist_example(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It makes its own loaders, so a round is as long as the function says; under DiLoCo its optimizer, schedule and
    random state go on. Evaluation and early return are part of it."""
    data = {s: foreign.digits(s) for s in SITES}
    work = {s: FunctionWorkload(foreign.mnist, d, examples=len(d[0])) for s, d in data.items()}
    own = {"local_steps_per_round": None} if kind == "diloco" else {}
    journal = simulated(kind, "tests.local.foreign:Net", work, rounds=3, training=MNIST, **own)
    assert "Train Epoch: 1 [32]" in capsys.readouterr().out
    sites = {s: mnist_by_hand(s) for s in SITES}
    close(journal, federated(kind, build_model("tests.local.foreign:Net", {}, seed=SEED), sites, rounds=3, seed=SEED))
    steps = [number for numbers in steps_of(journal) for number in numbers]
    assert {8, 16, 24} & set(steps) and {6, 12, 18} & set(steps) and set(steps) <= {6, 8, 12, 16, 18, 24}
    assert set(steps) - {18, 24}, "somebody returned early"


def test_pytorchs_mnist_example_for_seven_steps(caplog: pytest.LogCaptureFixture) -> None:
    """It does not read the data that it is given: it is stopped before the eighth step, in its second epoch at one site,
    and what that would have read moves no statistics and no random state."""
    data = {s: foreign.digits(s) for s in SITES}
    work = {s: FunctionWorkload(foreign.mnist, d, examples=len(d[0])) for s, d in data.items()}
    journal = simulated("diloco", "tests.local.foreign:Net", work, rounds=3, training=MNIST)
    assert "the training went on after its 7 steps and was stopped" in caplog.text
    sites = {s: mnist_by_hand(s) for s in SITES}
    model = build_model("tests.local.foreign:Net", {}, seed=SEED)
    close(journal, federated("diloco", model, sites, rounds=3, seed=SEED, H=H))
    assert steps_of(journal) == [[H, H]] * 3


# -- as NVFlare's CIFAR-10 example -------------------------------------------------------------------------------------
CIFAR = {"epochs": 2, "batch_size": 8, "optimizer": {"lr": 0.01}}


def loader(site: str) -> DataLoader[Any]:
    return DataLoader(foreign.digits(site)[0], batch_size=8, shuffle=True)


def with_momentum(data: DataLoader[Any], epochs: int, loss: Callable[[nn.Module, Any], torch.Tensor]) -> Site:
    """SGD at 0.01 with momentum 0.9: so many epochs; or H steps that go on in the data where the last ones stopped."""

    def local(descent: Descent) -> None:
        if descent.H is None:
            batches: Any = (batch for _ in range(epochs) for batch in data)
        else:
            batches = descent.memory.setdefault("batches", by_hand.endless(data))
        for batch in batches:
            if descent.step(loss(descent.model, batch), 0.01, momentum=0.9):
                break

    return Site(local, examples=len(data.dataset))  # type: ignore[arg-type]


def nll(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.nll_loss(model(batch[0]), batch[1])


def cifar_by_hand(kind: str, names: tuple[str, ...], rounds: int) -> dict[str, torch.Tensor]:
    model = build_model("tests.local.foreign:Net", {}, seed=SEED)
    sites = {s: with_momentum(loader(s), 2, nll) for s in names}
    return federated(kind, model, sites, rounds=rounds, seed=SEED, H=H if kind == "diloco" else None)


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_nvflares_client_loop(kind: str) -> None:
    """It reads the loader that it is given; under DiLoCo seven steps a round, over epochs of eight and six batches."""
    work = {s: FunctionWorkload(foreign.cifar, loader(s)) for s in SITES}
    journal = simulated(kind, "tests.local.foreign:Net", work, rounds=3, training=CIFAR)
    close(journal, cifar_by_hand(kind, SITES, rounds=3))
    assert steps_of(journal) == [[H, H] if kind == "diloco" else [16, 12]] * 3


SCRIPT = Path(__file__).parent / "scripts" / "cifar.py"


@pytest.mark.parametrize("kind", CORRECTED)
def test_the_same_as_a_script(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of one site; of two for SCAFFOLD, which corrects nothing where there is one."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    names = SITES if kind == "scaffold" else SITES[:1]
    work = {s: ScriptWorkload(f"python -u {SCRIPT}") for s in names}
    journal = simulated(kind, "tests.local.foreign:Net", work, rounds=2, training=CIFAR)
    close(journal, cifar_by_hand(kind, names, rounds=2))


# -- Lightning ---------------------------------------------------------------------------------------------------------
def module() -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = foreign.Net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nll(self.net, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    return Module()


@pytest.mark.parametrize("kind", CORRECTED)
def test_lightning(kind: str) -> None:
    from fedflow.local.lightning import LightningWorkload

    work = {s: LightningWorkload(loader(s)) for s in SITES}
    journal = simulated(kind, f"{__name__}:module", work, rounds=2, training={"epochs": 2})
    sites = {s: with_momentum(loader(s), 2, lambda m, batch: nll(m.net, batch)) for s in SITES}
    model = build_model(f"{__name__}:module", {}, seed=SEED)
    close(journal, federated(kind, model, sites, rounds=2, seed=SEED, H=H if kind == "diloco" else None))


# -- Hugging Face ------------------------------------------------------------------------------------------------------
TRANSFORMERS = {name: f"tests.local.test_adapters:tiny_{name}" for name in ("transformer", "lora")}


def sentences(site: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(int(site[-1]))
    rows = 20 if site == "site-1" else 12
    tokens = torch.randint(0, 50, (rows, 6), generator=generator)
    return [{"input_ids": t, "labels": t.sum() % 3} for t in tokens]


def hugging_face(site: str, folder: Path) -> Any:
    """SGD at 0.01 with momentum 0.9, four rows a batch, in order, so that a formula can follow."""
    from transformers import Trainer, TrainingArguments

    from fedflow.local.huggingface import HuggingFaceWorkload

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *given: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def trainer(model: Any, config: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            per_device_train_batch_size=4,
            num_train_epochs=2,
            max_steps=60 if config.steps else -1,
            learning_rate=0.01,
            optim="sgd",
            optim_args="momentum=0.9",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        return InOrder(model=model, args=arguments, train_dataset=sentences(site))

    return HuggingFaceWorkload(trainer, examples=len(sentences(site)))


@pytest.mark.parametrize("model", TRANSFORMERS)
@pytest.mark.parametrize("kind", CORRECTED)
def test_hugging_face(kind: str, model: str, tmp_path: Path) -> None:
    work = {s: hugging_face(s, tmp_path / s) for s in SITES}
    journal = simulated(kind, TRANSFORMERS[model], work, rounds=2, training={"epochs": 2})
    own = build_model(TRANSFORMERS[model], {}, seed=SEED)
    frozen = {n: p.detach().clone() for n, p in own.named_parameters() if not p.requires_grad}
    sites = {
        s: with_momentum(DataLoader(sentences(s), batch_size=4), 2, lambda m, batch: m(**batch).loss)  # type: ignore[arg-type]
        for s in SITES
    }
    found = federated(kind, own, sites, rounds=2, seed=SEED, H=H if kind == "diloco" else None)
    close(journal, {**found, **frozen})
