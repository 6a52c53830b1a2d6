"""One site under DiLoCo, whose outer step takes its model over (SGD, rate 1), is the same script run once: to the bit.

AdamW, a cosine schedule, dropout, batch normalisation, shuffling; rounds of five steps; killed on the way and resumed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedflow.local import Config, FunctionWorkload, ScriptWorkload
from fedflow.local.model import build_model
from fedflow.store.journal import Journal
from fedflow.store.tensors import read_tensors
from fedflow.testing.faults import fail_at
from fedflow.types import derive_seed
from tests.builders import blobs, head, in_child, recipe, run, run_with
from tests.local.by_hand import endless, seed_all
from tests.local.test_preserved import train

H, SEED, SITE = 5, 5, ("site-1",)
SCRIPT = Path(__file__).parent / "scripts" / "good.py"


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*blobs(22, seed=1)), batch_size=4, shuffle=True)


def function() -> FunctionWorkload:
    return FunctionWorkload(train, loader())


def script() -> ScriptWorkload:
    return ScriptWorkload([sys.executable, "-u", str(SCRIPT)])


def lightning() -> Any:
    from fedflow.local.lightning import LightningWorkload

    return LightningWorkload(loader())


def module() -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.25), nn.Linear(6, 3))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def fields(form: str, rounds: int) -> dict[str, Any]:
    outer = {"outer_optimizer": "sgd", "outer_learning_rate": 1.0, "local_steps_per_round": H}
    model = {"model": f"{__name__}:module"} if form == "lightning" else {}
    return {
        **model,
        "workload": f"{__name__}:{form}",
        "algorithm": {"kind": "diloco", **outer},
        "rounds": rounds,
        "seed": SEED,
    }


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The generators of round 0 at the site, one thread, and a path for scripts."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def once(steps: int) -> dict[str, torch.Tensor]:
    """`train` without fedflow."""
    model = build_model("tests.builders:Tiny", {}, seed=SEED)
    seed_all(derive_seed(SEED, 0, "train", "site-1"))
    train(model, islice(endless(loader()), steps), Config())
    return model.state_dict()


def once_by_lightning(steps: int) -> dict[str, torch.Tensor]:
    """Lightning without fedflow."""
    import lightning.pytorch as pl

    model: Any = build_model(f"{__name__}:module", {}, seed=SEED)
    seed_all(derive_seed(SEED, 0, "train", "site-1"))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, **quiet).fit(model, loader())
    return model.state_dict()  # type: ignore[no-any-return]


def same_bits(journal: Journal, expected: dict[str, torch.Tensor]) -> None:
    found = {n: t for ref in head(journal).model.values() for n, t in read_tensors(journal.store, ref).items()}
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if not torch.equal(found[n], t)] == []


@pytest.mark.parametrize("killed", ["never", "after the third step of round 6", "before round 6 is committed"])
def test_a_function(killed: str, alone: None, tmp_path: Path) -> None:
    given, store = fields("function", 12), str(tmp_path / "store")
    if killed != "never":
        options = {"token": tmp_path / "struck", "round": 6}
        step = fail_at("training", nth=3, **options) if "third" in killed else fail_at("manifest", **options)
        assert in_child(run_with, step, given, store, {"sites": SITE}) == -signal.SIGKILL and step.struck
    same_bits(run(recipe(**given), store, sites=SITE), once(60))


@pytest.mark.parametrize("killed", [False, True])
def test_lightning(killed: bool, alone: None, tmp_path: Path) -> None:
    given, store = fields("lightning", 12), str(tmp_path / "store")
    if killed:
        fault = fail_at("training", nth=3, round=6, token=tmp_path / "struck")
        assert in_child(run_with, fault, given, store, {"sites": SITE}) == -signal.SIGKILL and fault.struck
    same_bits(run(recipe(**given), store, sites=SITE), once_by_lightning(60))


@pytest.mark.parametrize(("rounds", "killed"), [(3, 1), pytest.param(12, 6, marks=pytest.mark.faults)])
def test_a_script(rounds: int, killed: int, alone: None, tmp_path: Path) -> None:
    """Each round starts a process; whoever started it is killed in one of them while it trains."""
    given, store = fields("script", rounds), str(tmp_path / "store")
    fault = fail_at("training", round=killed, token=tmp_path / "struck")
    assert in_child(run_with, fault, given, store, {"sites": SITE}) == -signal.SIGKILL and fault.struck
    same_bits(run(recipe(**given), store, sites=SITE), once(H * rounds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_outer_step_of_rate_1_ends_where_the_site_ended(dtype: torch.dtype) -> None:
    """x + (y − x) in float64 is not y where y is much smaller than x, or has as many digits as float64 has."""
    from fedflow.algorithms.diloco import DiLoCo
    from fedflow.types import RoundContext, Update

    x, y = torch.tensor([1.0, 1.0, 0.1, 0.0], dtype=dtype), torch.tensor([1e-20, 1 / 3, 0.7, -0.0], dtype=dtype)
    assert not torch.equal((x.double() + (y.double() - x.double())).to(dtype), y)
    algorithm = DiLoCo(outer_optimizer="sgd", outer_learning_rate=1.0)
    state = algorithm.init({"params": {"w": x}, "frozen": {}, "buffers": {}})
    update = Update("site-1", 0, examples=3, steps=1, lr_sum=0.1, tensors={"params": {"w": y}, "buffers": {}})
    ctx = RoundContext("run", 0, "train", None, num_sites=1, seed=0)
    after = algorithm.server_update(state, algorithm.aggregate([update], ctx), ctx)
    assert torch.equal(after.params["w"], y) and torch.equal(after.params["w"].signbit(), y.signbit())
