"""`plot_runs`: which runs are one group, what a group is called, what the picture says."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedflow.engine.summary import RoundSummary, RunSummary
from fedflow.errors import UserError
from fedflow.plot import groups_of, plot_runs
from fedflow.store.records import ContributorSummary
from tests.builders import recipe

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def contributor(**fields: Any) -> ContributorSummary:
    known: dict[str, Any] = {"weight": 1, "examples": 1, "steps": 1, "seconds": 1, "bytes": 400, "received": 600}
    return ContributorSummary(update="", base_round=0, lr_sum=0.1, metrics={}, **(known | fields))


def run(run_id: str, values: list[float | None], *, sites: int = 2, finished: bool = True, **fields: Any) -> RunSummary:
    """Accuracies of the rounds; each round takes 10 s, and begins 5 s after the one before was committed."""
    names = [f"site-{n}" for n in range(sites)]
    rounds = []
    for number, value in enumerate(values):
        opened = BEGAN + timedelta(seconds=15 * number)
        committed = opened + timedelta(seconds=10)
        own = dict.fromkeys(names, contributor())
        rounds.append(RoundSummary(number, "", opened, committed, {}, {"accuracy": value}, own, {}, {}))
    return RunSummary(run_id, "nonce", recipe(rounds=9, **fields), names, BEGAN, rounds, finished, None, None)


def test_runs_that_differ_in_name_and_seed_only_are_one_group() -> None:
    runs = [run("a", [0.5], seed=1), run("b", [0.5], seed=2, name="other"), run("c", [0.5], seed=1, quorum=2)]
    assert [[r.run for r in group.runs] for group in groups_of(runs)] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ([{"algorithm": {"kind": "fedprox", "mu": m}} for m in (0.0, 0.01)], ["mu 0", "mu 0.01"]),
        ([{"algorithm": "fedavg"}, {"algorithm": {"kind": "fedprox", "mu": 0.1}}], ["fedavg", "fedprox"]),
        (
            [{"algorithm": "fedavg"}, *({"algorithm": {"kind": "fedprox", "mu": m}} for m in (0.1, 1.0))],
            ["fedavg", "fedprox, mu 0.1", "fedprox, mu 1"],
        ),
        (
            [
                {
                    "algorithm": {"kind": "fedopt", "server_optimizer": {"kind": "sgd", "lr": 1.0}},
                    "training": {"optimizer": {"lr": lr}},
                }
                for lr in (0.1, 0.2)
            ],
            ["lr 0.1", "lr 0.2"],
        ),
        (
            [
                {
                    "algorithm": {"kind": "fedopt", "server_optimizer": {"kind": "sgd", "lr": a}},
                    "training": {"optimizer": {"lr": b}},
                }
                for a, b in ((1.0, 0.1), (2.0, 0.2))
            ],
            [
                "algorithm.server_optimizer.lr 1, training.optimizer.lr 0.1",
                "algorithm.server_optimizer.lr 2, training.optimizer.lr 0.2",
            ],
        ),
        ([{"sites": 2}, {"sites": 3}], ["2 sites", "3 sites"]),
        ([{"training": {"epochs": 2}}, {"training": {"steps": 5}}], ["epochs 2, steps null", "epochs null, steps 5"]),
    ],
)
def test_a_group_is_called_by_what_sets_it_apart(fields: list[dict[str, Any]], labels: list[str]) -> None:
    runs = [run(f"r{number}", [0.5], **one) for number, one in enumerate(fields)]
    assert [group.label for group in groups_of(runs)] == labels


def drawn(runs: list[RunSummary], tmp_path: Path, **options: Any) -> str:
    """The picture as SVG, whose text is text."""
    return plot_runs(runs, tmp_path / "pictures" / "runs.svg", **options).read_text()


def test_picture_says_what_is_compared_and_how_it_ended(tmp_path: Path) -> None:
    """The last values' median, smallest and largest: 0.75 of 0.5, 0.75, 1; a run that ended in NaN has its last number."""
    runs = [run(f"a{n}", [0.25, v], seed=n) for n, v in enumerate([0.5, 0.75, 1.0])]
    runs += [run("b", [0.125, None], quorum=2), run("c", [0.5], quorum=1, finished=False)]
    svg = drawn(runs, tmp_path)
    for text in (
        "accuracy, 5 runs",
        "median, and smallest to largest",
        "quorum null: 0.75 (0.5–1), 3 seeds",
        "quorum 2: 0.125",
        "quorum 1: 0.5, 1 unfinished",
    ):
        assert f">{text}<" in svg, text


def points(svg_of: list[RunSummary], **options: Any) -> list[tuple[list[float], list[float]]]:
    """x and y of every line that is drawn, in the data's own units."""
    from matplotlib.figure import Figure

    lines: list[tuple[list[float], list[float]]] = []

    def collect(self: Figure, *args: object, **more: object) -> None:
        lines.extend((list(line.get_xdata()), list(line.get_ydata())) for line in self.axes[0].lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", collect)
        plot_runs(svg_of, Path("unused.png"), **options)
    return lines


def test_the_median_is_drawn_as_far_as_every_run_goes() -> None:
    """Medians by hand: of (1, 2, 6) and (2, 4, 9); the third value of the first two is drawn in their thin lines only."""
    runs = [run("a", [1.0, 2.0, 3.0]), run("b", [2.0, 4.0, 5.0], seed=1), run("c", [6.0, 9.0], seed=2)]
    *thin, median = points(runs)
    assert thin == [([0, 1, 2], [1, 2, 3]), ([0, 1, 2], [2, 4, 5]), ([0, 1], [6, 9])]
    assert median == ([0, 1], [2, 4])


def test_over_seconds_pauses_do_not_count_and_over_bytes_both_directions_do() -> None:
    (seconds,) = points([run("a", [1.0, 2.0, 3.0])], x="seconds")
    assert (min(seconds[0]), max(seconds[0])) == (10, 30)
    (sent,) = points([run("a", [1.0, 2.0, 3.0])], x="bytes")
    assert (min(sent[0]), max(sent[0])) == (2 * 1000, 3 * 2 * 1000)


def test_rounds_that_overlap_are_not_counted_twice() -> None:
    """Round 1 was opened 6 s before the commit of round 0, and committed 4 s after it."""
    whole = run("a", [1.0, 2.0])
    first, second = whole.rounds
    second = replace(
        second,
        opened=first.committed - timedelta(seconds=6),
        committed=first.committed + timedelta(seconds=4),
    )
    (line,) = points([replace(whole, rounds=[first, second])], x="seconds")
    assert max(line[0]) == 14


def test_between_rounds_a_run_is_taken_as_a_straight_line() -> None:
    """Over seconds runs have no x in common: at 15 s the one is half way from 0 to 1 and the other, half as fast, a quarter."""
    quick = run("a", [0.0, 1.0])
    slow = run("b", [0.0, 1.0], seed=1)
    first, second = slow.rounds
    slow = replace(slow, rounds=[first, replace(second, committed=second.opened + timedelta(seconds=20))])
    *_, (at, median) = points([quick, slow], x="seconds")
    assert (at[0], at[-1]) == (10, 20)
    assert median[-1] == pytest.approx((1.0 + 0.5) / 2)


def test_runs_with_nothing_in_common_have_their_own_lines_only() -> None:
    runs = [run("a", [1.0, None, None]), run("b", [None, 2.0, 3.0], seed=1)]
    assert points(runs) == [([0], [1]), ([1, 2], [2, 3])]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out: found '.*a\.gif', expected a name that ends in one of \.png"):
        plot_runs([run("a", [0.5])], tmp_path / "a.gif")
    with pytest.raises(UserError, match="RUN: found 'b', expected runs with a committed round"):
        plot_runs([run("a", [0.5]), run("b", [])], tmp_path / "a.png")
    with pytest.raises(UserError, match="--x: found 'time', expected one of round, seconds, bytes"):
        plot_runs([run("a", [0.5])], tmp_path / "a.png", x="time")  # type: ignore[arg-type]
