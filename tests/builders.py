"""Small federations for tests: a model with everything that makes bits differ, uneven sites, algorithms with memory."""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedflow.algorithm import Algorithm, Training
from fedflow.algorithms.fedavg import FedAvg
from fedflow.engine import simulate
from fedflow.local import TensorWorkload
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Manifest
from fedflow.testing.faults import Fault
from fedflow.types import Aggregate, Groups, RoundContext, Spec, Tensors, Update, spec_of

SITES = ("site-1", "site-2", "site-3")


# -- model and data ----------------------------------------------------------------------------------------------------
class Tiny(nn.Sequential):
    """Four numbers in, three classes out; with BatchNorm (float and integer buffers) and dropout."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.25), nn.Linear(6, 3))


def blobs(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """(examples, 4) points around three centres, and their (examples,) classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (examples,), generator=generator)
    centres = torch.tensor([[2.0, 0, 0, 1], [0, 2, 0, -1], [0, 0, 2, 0]])
    return centres[classes] + torch.randn(examples, 4, generator=generator), classes


class Blobs(TensorWorkload):
    """12 examples at site-1, 20 at site-2, 28 at site-3. log: a file that gets a line for every training."""

    def __init__(self, site: str, log: str | None = None) -> None:
        number = int(site.rpartition("-")[2])
        super().__init__(*blobs(4 + 8 * number, seed=number))
        self.site, self.log = site, log
        self._generator: torch.Generator | None = None  # of the newest training, whose epochs have one

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
        begins, self._generator = generator is not self._generator, generator
        if self.log is not None and begins:
            with Path(self.log).open("a") as file:
                file.write(f"{self.site}\n")
        return super().batches(batch_size, generator)


class HeldOut(TensorWorkload):
    """Thirty examples at the server."""

    def __init__(self) -> None:
        super().__init__(*blobs(30, seed=0), held_out=blobs(30, seed=0))


def summed(data: TensorWorkload, sum: Any = 1.0) -> dict[str, Any]:
    """What a task's sites answer: the sum of their rows, by what they were told of all sums."""
    return {"examples": len(data), "sum": data.inputs.double().sum(dim=0) / (1 + abs(torch.as_tensor(sum)).sum())}


def table(site: str) -> dict[str, Any]:
    """A column of 12, 20 or 28 numbers, and one of texts."""
    work = Blobs(site)
    return {"x": work.inputs[:, 0].double().numpy(), "site": [site] * len(work)}


def named(site: str) -> list[str]:
    """12, 20 or 28 texts, those of one site being those of the next one too."""
    return [f"row-{i}" for i in range(len(Blobs(site)))]


def labelled(site: str) -> Any:
    """As many rows of whole numbers, with labels 0 and 1."""
    features = (Blobs(site).inputs * 4).round().numpy()
    return features, (features[:, 0] > 0).astype("float32")


def trainings(log: Path) -> Counter[str]:
    """Site -> how often it was trained."""
    return Counter(log.read_text().split()) if log.exists() else Counter()


def recipe(**changes: Any) -> Recipe:
    """Two rounds of FedAvg on `Tiny` and `Blobs`, with momentum; `changes` are fields as in a recipe file."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": "tests.builders:Tiny",
        "workload": "tests.builders:Blobs",
        "rounds": 2,
        "seed": 5,
        "training": {"batch_size": 8, "optimizer": {"lr": 0.1, "momentum": 0.9}},
    }
    return Recipe.load(fields | changes)


# -- algorithms --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lean:
    """What a site remembers: where it leant before, and how often it took part."""

    lean: Tensors
    rounds: int


class Leaning(FedAvg):
    """FedAvg whose sites send y + lean/10, where lean ← lean/2 + (y − x) is kept at the site."""

    kind: Literal["leaning"] = "leaning"
    SiteState: ClassVar[type[Any]] = Lean

    def init_site(self, broadcast: Groups, work: Training, ctx: RoundContext) -> Lean:
        return Lean({name: torch.zeros_like(x) for name, x in broadcast["params"].items()}, 0)

    def site_update(
        self, broadcast: Groups, site_state: Lean, work: Training, ctx: RoundContext
    ) -> tuple[Update, Lean]:
        local = work.train(broadcast, ctx)
        lean = {n: site_state.lean[n] / 2 + (y - broadcast["params"][n]) for n, y in local.params.items()}
        params = {n: y + lean[n] / 10 for n, y in local.params.items()}
        sent = {"params": params, "buffers": local.buffers}
        scalars = {"rounds": float(site_state.rounds)}
        return local.update(ctx, sent, scalars), Lean(lean, site_state.rounds + 1)


@dataclass(frozen=True)
class BoundedState:
    """The model, and how far a parameter may move in a round."""

    params: Tensors
    frozen: Tensors
    buffers: Tensors
    bound: Tensors
    phases_done: int


class Bounded(Algorithm):
    """Two phases: sites first agree on a bound for every parameter, then train within it."""

    kind: Literal["bounded"] = "bounded"
    phases: ClassVar[tuple[str, ...]] = ("bound", "train")
    State: ClassVar[type[Any]] = BoundedState

    def init(self, model: Groups) -> BoundedState:
        zero = {name: torch.zeros_like(x) for name, x in model["params"].items()}
        return BoundedState(model["params"], model["frozen"], model["buffers"], zero, 0)

    def model(self, state: BoundedState) -> Groups:
        return {"params": state.params, "frozen": state.frozen, "buffers": state.buffers}

    def broadcast(self, state: BoundedState, phase: str) -> Groups:
        bound = {"bound": state.bound} if phase == "train" else {}
        return {**self.model(state), **bound}

    def expects(self, state: BoundedState, phase: str) -> Spec:
        sent = {"bound": state.bound} if phase == "bound" else {"params": state.params, "buffers": state.buffers}
        return spec_of(sent)

    def weight(self, update: Update) -> float:
        return 1.0

    def server_update(self, state: BoundedState, aggregate: Aggregate, ctx: RoundContext) -> BoundedState:
        mean = {g: {n: t.to(torch.float32) for n, t in tensors.items()} for g, tensors in aggregate.tensors.items()}
        if ctx.phase == "bound":
            return replace(state, bound=mean["bound"], phases_done=state.phases_done + 1)
        buffers = {n: mean["buffers"][n].to(b.dtype) for n, b in state.buffers.items()}
        return replace(state, params=mean["params"], buffers=buffers, phases_done=state.phases_done + 1)

    def site_update(self, broadcast: Groups, site_state: Any, work: Training, ctx: RoundContext) -> tuple[Update, Any]:
        start = broadcast["params"]
        if ctx.phase == "bound":
            assert ctx.site is not None
            wish = int(ctx.site.rpartition("-")[2]) / 100
            bound = {name: torch.full_like(x, wish) for name, x in start.items()}
            update = Update(ctx.site, ctx.round, examples=1, steps=0, lr_sum=0.0, tensors={"bound": bound})
            return update, site_state
        local, bound = work.train(broadcast, ctx), broadcast["bound"]
        params = {n: torch.clamp(y, start[n] - bound[n], start[n] + bound[n]) for n, y in local.params.items()}
        return local.update(ctx, {"params": params, "buffers": local.buffers}), site_state


# -- running them ------------------------------------------------------------------------------------------------------
def run(
    recipe: Recipe, store: str | None = None, *, name: str = "run", sites: Iterable[str] = SITES, **options: Any
) -> Journal:
    """`simulate` under a run name that is always the same."""
    return simulate(recipe, list(sites), store=store, run=name, **options)


def head(journal: Journal) -> Manifest:
    """The newest commit."""
    found = journal.head(journal.recipe().phases)
    assert found is not None
    return found


def outcome(journal: Journal) -> dict[str, Any]:
    """Everything in a finished run that must not depend on what happened on the way: digests, but no times."""
    manifest = head(journal)
    return {
        "round": manifest.round,
        "model": manifest.model_digest,
        "state": {field: ref.digest for field, ref in manifest.state.tensors.items()} | manifest.state.scalars,
        "updates": {site: c.update for site, c in manifest.contributors.items()},
        "accepted": {site: record.accepted for site, record in manifest.sites.items()},
        "evaluations": [e.metrics if (e := journal.evaluation(r)) else None for r in range(manifest.round + 1)],
    }


def bits(journal: Journal) -> Any:
    """Of that what does not depend on the run's nonce either: digests of model and state."""
    found = outcome(journal)
    return found["model"], found["state"]


def in_child(function: Callable[..., Any], *args: Any) -> int:
    """The exit code of `function(*args)` in a process of its own; −9 if it was killed."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_with(fault: Fault, fields: Mapping[str, Any], store: str, options: Mapping[str, Any]) -> None:
    """For `in_child`: a run of `recipe(**fields)` that meets `fault`."""
    fault.arm()
    run(recipe(**fields), store, **options)


# -- stores ------------------------------------------------------------------------------------------------------------
OBJECTS = r"\.safetensors$"
"""The keys of tensors."""


def path_of(store: ObjectStore, key: str) -> Path:
    """The file of an object in a local store."""
    return Path(store.url.removeprefix("file://")) / key


def flip(path: Path, at: int | None = None) -> bytes:
    """Change one bit of the file (default: in its middle byte; −1: in its last); returns what it was."""
    data = path.read_bytes()
    at = len(data) // 2 if at is None else at % len(data)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    return data


def keys(store: ObjectStore, pattern: str) -> list[str]:
    """The keys that match."""
    return [key for key in store.list() if re.search(pattern, key)]
