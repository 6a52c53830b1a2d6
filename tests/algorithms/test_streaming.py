"""Streaming DiLoCo: a fragment a round, merged τ steps later into what went on meanwhile; arXiv:2501.18512, Algorithm 2."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load
from torch import Tensor, nn

from fedflow.algorithm import Algorithm
from fedflow.algorithms import DiLoCo, StreamingDiLoCo
from fedflow.engine import simulate, site_step
from fedflow.errors import RecipeError, SiteError
from fedflow.local import TorchWorkload
from fedflow.recipe import LocalTraining, Optimizer
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import UpdateManifest
from fedflow.store.tensors import read_spec
from fedflow.testing.algorithm import AlgorithmConformance
from tests.algorithms.playing import Game, Point, quadratic
from tests.builders import SITES, head, keys, outcome, recipe, run


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_three_rounds_of_one_fragment_by_hand() -> None:
    """f = (θ − 8)²/2 from 0, η = 1/2: a step is half the way to 8. H = 2, τ = 1, α = 1/2; outer SGD of rate 1/2.

    Round 0: θ = 4, 6. x = 0 + (6 − 0)/2 = 3.
    Round 1: θ = 7, merged (7 + 3)/2 = 5, then 6.5. x = 3 + (6.5 − 3)/2 = 4.75.
    Round 2: θ = 7.25, merged (7.25 + 4.75)/2 = 6, then 7. x = 4.75 + (7 − 4.75)/2 = 5.875.
    """
    algorithm = StreamingDiLoCo(
        fragments=1, tau=1, alpha=0.5, local_steps_per_round=2, outer_optimizer="sgd", outer_learning_rate=0.5
    )
    game = Game(algorithm, {"a": quadratic(1.0, 8.0)}, Point(0.0), lr=0.5)
    for x, live in ((3.0, 6.0), (4.75, 6.5), (5.875, 7.0)):
        game.play()
        assert game.x.item() == x
        assert game.site_states["a"].live["x"].item() == game.sent["a"].tensors["params"]["x"].item() == live


class Pair(nn.Module):
    """A model of two layers, a number each."""

    def __init__(self, a: float = 4.0, b: float = -2.0) -> None:
        super().__init__()
        self.a, self.b = Point(a), Point(b)


class Bowl(TorchWorkload):
    """k/2 ((a − p)² + (b − q)² + (a − b)²): the layers pull at each other."""

    def __init__(self, k: float, p: float, q: float) -> None:
        self.k, self.p, self.q = k, p, q

    def __len__(self) -> int:
        return 1

    def batches(self, batch_size: int, generator: torch.Generator) -> list[None]:
        return [None]

    def loss(self, model: nn.Module, batch: None) -> Tensor:
        a, b = model.a.x, model.b.x  # type: ignore[union-attr]
        loss: Tensor = (self.k / 2 * ((a - self.p) ** 2 + (b - self.q) ** 2 + (a - b) ** 2)).sum()  # type: ignore[operator]
        return loss


BOWLS = {"i": (1.0, 3.0, -1.0), "j": (2.0, -2.0, 5.0)}


@dataclass
class PairGame(Game):
    @property
    def x(self) -> Tensor:
        return torch.cat([self.state.params["a.x"], self.state.params["b.x"]])

    def _model(self) -> nn.Module:
        return Pair()


def play(**settings: Any) -> PairGame:
    return PairGame(StreamingDiLoCo(**settings), {s: Bowl(*bowl) for s, bowl in BOWLS.items()}, Pair(), lr=0.05)


def as_published(tau: int, alpha: float, *, h: int, rounds: int, lr: float, beta: float) -> list[tuple[float, float]]:
    """Algorithm 2 in Python's own numbers, step after step: θ of fragment p is sent at the steps t = (p + 1) h, + 2h, ...
    and, τ steps later, merged with the outcome of the outer step. Returns x after every one of the rounds of h steps."""
    theta = {s: [4.0, -2.0] for s in BOWLS}
    x, m = [4.0, -2.0], [0.0, 0.0]
    coming: dict[int, tuple[int, float]] = {}  # step -> fragment, and its x, to be merged then
    found = []
    for t in range(1, rounds * h + 1):
        for s, (k, p, q) in BOWLS.items():
            a, b = theta[s]
            theta[s] = [a - 0.05 * k * ((a - p) + (a - b)), b - 0.05 * k * ((b - q) + (b - a))]
        if t in coming:
            f, outer = coming.pop(t)
            for s in BOWLS:
                theta[s][f] = alpha * theta[s][f] + (1 - alpha) * outer
        if t % h == 0:
            f = (t // h - 1) % 2
            g = sum(x[f] - theta[s][f] for s in BOWLS) / len(BOWLS)
            m[f] = beta * m[f] + g
            x[f] -= lr * (g + beta * m[f])
            found.append((x[0], x[1]))
            if tau:
                coming[t + tau] = (f, x[f])
            else:
                for s in BOWLS:
                    theta[s][f] = alpha * theta[s][f] + (1 - alpha) * x[f]
    return found


@pytest.mark.parametrize("transfer", ["full", "delta"])
@pytest.mark.parametrize(("tau", "alpha"), [(0, 0.0), (0, 0.3), (1, 0.5), (2, 0.0), (2, 0.5), (1, 1.0)])
def test_seven_rounds_of_two_fragments_are_the_papers_algorithm(tau: int, alpha: float, transfer: Any) -> None:
    game = play(tau=tau, alpha=alpha, local_steps_per_round=3, outer_learning_rate=0.4, transfer=transfer)
    for expected in as_published(tau, alpha, h=3, rounds=7, lr=0.4, beta=0.9):
        game.play()
        assert game.x.tolist() == pytest.approx(expected, rel=1e-9)


# -- what it equals ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("transfer", ["full", "delta"])
@pytest.mark.parametrize("schedule", ["everyone", {"kind": "sampled", "fraction": 0.7}], ids=str)
def test_one_fragment_without_delay_and_mixing_is_diloco_to_the_bit(schedule: Any, transfer: Any) -> None:
    """With BatchNorm, dropout, momentum that goes on, uneven sites, and sites that miss rounds."""
    algorithms = DiLoCo(transfer=transfer), StreamingDiLoCo(transfer=transfer, fragments=1, tau=0, alpha=0.0)
    found = [outcome(run(recipe(algorithm=a, schedule=schedule, rounds=4))) for a in algorithms]
    assert found[0]["model"] == found[1]["model"]
    assert found[0]["state"]["momentum"] == found[1]["state"]["momentum"]


# -- sites that were not there -----------------------------------------------------------------------------------------
SETTINGS: Mapping[str, Any] = {
    "tau": 1,
    "alpha": 0.5,
    "local_steps_per_round": 2,
    "outer_optimizer": "sgd",
    "outer_learning_rate": 0.5,
}


def after_steps(site: str, a: float, b: float, steps: int) -> tuple[float, float]:
    k, p, q = BOWLS[site]
    for _ in range(steps):
        a, b = a - 0.05 * k * ((a - p) + (a - b)), b - 0.05 * k * ((b - q) + (b - a))
    return a, b


def test_what_a_site_missed_replaces_its_own_and_the_rest_of_it_goes_on() -> None:
    """Fragment a is synchronised in rounds 0 and 2, b in round 1. Site i takes part in round 0 and in round 2: b is as the
    server has it, and so is a, which was synchronised after i had trained last."""
    game = play(**SETTINGS)
    game.play()
    game.play(["j"])
    x = game.x.tolist()
    game.play()
    found = game.site_states["i"].live
    assert (found["a.x"].item(), found["b.x"].item()) == pytest.approx(after_steps("i", *x, steps=2), rel=1e-12)


def test_a_fragment_that_nobody_synchronised_meanwhile_is_still_the_sites_own() -> None:
    """Three layers in three fragments: i misses round 1 only, so the third is its own in round 2."""

    class Triple(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.c = Point(1.0)

    @dataclass
    class TripleGame(Game):
        def _model(self) -> nn.Module:
            return Triple()

    class Falling(Bowl):
        """Adds −c: its gradient is −1, and a step moves c by 0.05."""

        def loss(self, model: nn.Module, batch: None) -> Tensor:
            return super().loss(model, batch) - model.c.x.sum()  # type: ignore[operator, union-attr]

    works = {s: Falling(*bowl) for s, bowl in BOWLS.items()}
    game = TripleGame(StreamingDiLoCo(fragments=3, **SETTINGS), works, Triple(), lr=0.05)
    game.play()
    game.play(["j"])
    game.play()
    assert game.site_states["i"].live["c.x"].item() == pytest.approx(1.0 + 4 * 0.05, rel=1e-12)
    assert game.state.params["c.x"].item() == pytest.approx(1.0 + (4 + 6) / 2 * 0.05 / 2, rel=1e-12)


def test_a_site_that_joins_starts_from_the_servers_model() -> None:
    game = play(**SETTINGS)
    game.play(["j"])
    game.play(["j"])
    x = game.x.tolist()
    game.play(["i", "j"])
    found = game.site_states["i"].live
    assert (found["a.x"].item(), found["b.x"].item()) == pytest.approx(after_steps("i", *x, steps=2), rel=1e-12)


def test_an_update_that_does_not_count_leaves_its_site_as_one_that_was_not_there() -> None:
    games = [play(**SETTINGS), play(**SETTINGS)]
    games[0].play()
    games[1].play()
    games[0].play(["j"], lost=["i"])
    games[1].play(["j"])
    for game in games:
        game.play()
    assert games[0].x.tolist() == games[1].x.tolist()


def test_a_site_that_lost_its_state_begins_as_one_that_joins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields: dict[str, Any] = {"algorithm": StreamingDiLoCo(tau=0)}
    store = str(tmp_path / "store")
    run(recipe(**fields), store)
    shutil.rmtree(f"{store}-states/site-2")
    journal = run(recipe(**fields, rounds=4), store)
    third = journal.manifest(2, "train")
    assert third is not None and sorted(third.contributors) == list(SITES) == sorted(head(journal).contributors)
    assert "site state lost" in caplog.text and "the site begins anew" in caplog.text
    assert (third.contributors["site-2"].training_state or "").startswith("fresh (training state lost")


# -- fragments ---------------------------------------------------------------------------------------------------------
class Blocks(nn.Module):
    """What a transformer's parameters are called: an embedding, five blocks, a norm. Seven layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(5)))
        self.norm = nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("pattern", "P", "expected"),
    [
        ("strided", 3, [0, 1, 2, 0, 1, 2, 0]),
        ("sequential", 3, [0, 0, 0, 1, 1, 2, 2]),
        ("sequential", 7, [0, 1, 2, 3, 4, 5, 6]),
        ("strided", 1, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_layers_are_dealt_out_in_strides_or_in_sequence(pattern: Any, P: int, expected: Sequence[int]) -> None:
    model = {"params": dict(Blocks().named_parameters()), "frozen": {}, "buffers": {}}
    found = StreamingDiLoCo(fragments=P, pattern=pattern).init(model).fragment
    layers = ["embedding", *(f"blocks.{i}" for i in range(5)), "norm"]
    of = {layer: {int(p) for name, p in found.items() if name.startswith(f"{layer}.")} for layer in layers}
    assert of == {layer: {p} for layer, p in zip(layers, expected, strict=True)} and len(found) == 1 + 5 * 4 + 2


def test_more_fragments_than_layers_are_refused_before_any_training() -> None:
    with pytest.raises(
        RecipeError, match=r"algorithm\.fragments: found 4, expected at most 3, the layers of the model"
    ):
        run(recipe(algorithm=StreamingDiLoCo(fragments=4, tau=0)))


# -- what travels ------------------------------------------------------------------------------------------------------
class Even(nn.Sequential):
    """Four layers of 90 thousand parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 300), *(nn.Linear(300, 300) for _ in range(4)), nn.Linear(300, 3))
        self[0].requires_grad_(False)
        self[5].requires_grad_(False)


def test_an_update_holds_its_rounds_fragment_and_a_site_reads_the_last_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fragments: a quarter of DiLoCo's bytes each way, as counted at the store, once a site has joined."""
    read: list[int] = []
    sized, fill = ObjectStore._read_sized, ObjectStore.fill

    def counts(store: ObjectStore, ref: Any) -> bool:
        return "/objects/" in ref.key and "states" not in store.url

    def counted(store: ObjectStore, ref: Any, start: int, end: int) -> bytes:
        read.extend([end - start] if counts(store, ref) else [])
        return sized(store, ref, start, end)

    def counted_fill(store: ObjectStore, ref: Any, start: int, buffers: Any) -> Any:
        read.extend(map(len, buffers) if counts(store, ref) else [])
        return fill(store, ref, start, buffers)

    def at_site(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as during:
            during.setattr(ObjectStore, "_read_sized", counted)
            during.setattr(ObjectStore, "fill", counted_fill)
            return site_step(*args, **options)

    monkeypatch.setitem(simulate.__globals__, "site_step", at_site)
    training = {"steps": 2, "optimizer": {"lr": 1e-3}}
    moved: dict[str, list[tuple[int, int]]] = {}
    for algorithm in (DiLoCo(), StreamingDiLoCo(fragments=4, tau=1)):
        still = recipe(algorithm=algorithm, model=f"{__name__}:Even", rounds=1, training=training)
        store = f"memory://moved-{algorithm.kind}"
        for rounds in range(1, 7):
            read.clear()
            journal = run(still.model_copy(update={"rounds": rounds}), store, sites=["site-1"])
            (sent,) = head(journal).contributors.values()
            moved.setdefault(algorithm.kind, []).append((sent.bytes, sum(read)))
            assert sent.received == sum(read)
    layer, still_there = 4 * (300 * 300 + 300), 4 * (4 * 300 + 300 + 300 * 3 + 3)
    for round, (whole, part) in enumerate(zip(moved["diloco"], moved["streaming_diloco"], strict=True)):
        assert 4 * layer <= whole[0] < 4 * layer + 3000 and layer <= part[0] < layer + 3000
        arrives = (4 * layer if round == 0 else layer) + still_there
        assert 4 * layer + still_there <= whole[1] < 4 * layer + still_there + 3000
        assert arrives <= part[1] < arrives + 3000


def test_the_fragments_take_turns() -> None:
    journal = run(recipe(algorithm=StreamingDiLoCo(fragments=3, transfer="delta"), rounds=4))
    sent = [{name.partition(".")[0] for name in names_sent(journal, round)} for round in range(4)]
    assert sent == [{"0"}, {"1"}, {"4"}, {"0"}]


def names_sent(journal: Journal, round: int) -> set[str]:
    (key, *_) = keys(journal.store, rf"^sites/site-1/run/0*{round}/train/.*\.json$")
    ref = UpdateManifest.from_bytes(journal.store.get(key)).groups["delta"]
    return set(read_spec(journal.store, ref))


def test_what_was_not_sent_is_remembered_until_its_fragment_is_due() -> None:
    """Error feedback keeps a residual for every fragment, not for the last one alone."""
    top_k = {"kind": "top_k", "fraction": 0.1}
    fields: dict[str, Any] = {"algorithm": StreamingDiLoCo(fragments=3, transfer="delta"), "transforms": [top_k]}
    store = "memory://residuals"
    run(recipe(**fields, rounds=3), store)
    states = ObjectStore(f"{store}-states/site-1")
    kept = [set(load(states.get(key))) for key in states.list() if key.endswith(".safetensors")]
    assert any({f"delta/{n}" for n in ("0.weight", "1.weight", "4.weight")} <= names for names in kept)


def test_every_outer_step_names_its_fragment_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fedflow"):
        run(recipe(algorithm=StreamingDiLoCo(fragments=2), rounds=2))
    lines = [r.getMessage() for r in caplog.records if "outer step" in r.getMessage()]
    assert [line[:45] for line in lines] == [f"run run, round {r}: fragment {r} of 2: outer step" for r in range(2)]
    assert [line[-20:] for line in lines] == ["3 updates, 4 tensors", "3 updates, 2 tensors"]


# -- settings ----------------------------------------------------------------------------------------------------------
BAD: Sequence[Mapping[str, Any]] = [
    {"fragments": 0},
    {"fragments": True},
    {"fragments": 2.0},
    {"pattern": "random"},
    {"tau": -1},
    {"tau": 1.0},
    {"tau": True},
    {"alpha": -0.1},
    {"alpha": 1.1},
    {"alpha": float("nan")},
    {"outer_momentum": 1.0},
    {"local_steps_per_round": 0},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_setting_is_refused_by_name(bad: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        StreamingDiLoCo(**bad)


@pytest.mark.parametrize("where", ["algorithm", "training"])
def test_a_merge_that_would_come_after_the_round_is_refused(where: str) -> None:
    fields = {"algorithm": {"kind": "streaming_diloco", "tau": 5}, "training": {}}
    fields[where] |= {"local_steps_per_round" if where == "algorithm" else "steps": 5}
    with pytest.raises(RecipeError, match=r"algorithm\.tau: found 5, expected less than the 5 steps of a round"):
        recipe(**fields)


def test_a_training_that_turns_out_shorter_is_an_error_of_the_site() -> None:
    game = Game(
        StreamingDiLoCo(fragments=1, tau=3),
        {"a": quadratic(1.0, 8.0)},
        Point(0.0),
        trainings={"a": LocalTraining(epochs=2, optimizer=Optimizer(lr=0.1))},
    )
    game.play()
    with pytest.raises(SiteError, match="steps: found 2, expected more than the 3 before the merge"):
        game.play()


VARIANTS = {
    "as published": StreamingDiLoCo(),
    "sequential, at once, differences": StreamingDiLoCo(pattern="sequential", tau=0, alpha=0.0, transfer="delta"),
    "all floating, personal": StreamingDiLoCo(
        fragments=1, apply_outer_optimizer_to="all_floating", personal=["1.*"], local_steps_per_round=3, tau=2
    ),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        found: Algorithm = request.param
        return found
