"""`plot_run`: what the picture says."""

from __future__ import annotations

import math
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedflow.engine.summary import RoundSummary, RunSummary
from fedflow.errors import UserError
from fedflow.plot import plot_run
from fedflow.store.records import ContributorSummary
from tests.builders import recipe

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def contributor(metrics: dict[str, float | None]) -> ContributorSummary:
    return ContributorSummary(
        update="", base_round=0, weight=1, examples=1, steps=1, lr_sum=0.1, metrics=metrics, seconds=1, bytes=1
    )


def round_of(
    number: int, sites: list[str], excluded: list[str], server: dict[str, float | None] | None
) -> RoundSummary:
    loss = math.exp(-number)
    return RoundSummary(
        round=number,
        model_digest="blake3:0",
        opened=NOW,
        committed=NOW,
        metrics={"loss": loss},
        evaluation=server,
        sites={site: contributor({"loss": loss}) for site in sites},
        excluded=dict.fromkeys(excluded, "no update by the deadline"),
        partial={},
    )


def summary(rounds: list[RoundSummary], sites: list[str], best: int | None, **fields: Any) -> RunSummary:
    return RunSummary("run-1", "nonce", recipe(rounds=9, **fields), sites, NOW, rounds, False, best, None)


def drawn(of: RunSummary, tmp_path: Path) -> str:
    """The picture as SVG, whose text is text."""
    return plot_run(of, tmp_path / "pictures" / "run.svg").read_text()


def test_picture_names_run_metrics_sites_and_best_round(tmp_path: Path) -> None:
    sites = ["site-1", "site-2"]
    rounds = [round_of(n, sites, [], {"accuracy": a}) for n, a in enumerate([0.5, 0.875, 0.75])]
    svg = drawn(summary(rounds, sites, 1), tmp_path)
    for text in ("run-1: fedavg, 2 sites, 3 of 9 rounds", "best 0.875 in round 1", "accuracy", "loss", *sites):
        assert f">{text}<" in svg, text
    assert ">excluded<" not in svg


def test_excluded_sites_are_marked(tmp_path: Path) -> None:
    rounds = [round_of(n, ["site-1"], ["site-2"], None) for n in range(2)]
    svg = drawn(summary(rounds, ["site-1", "site-2"], None), tmp_path)
    assert ">excluded<" in svg
    assert "best" not in svg  # accuracy, the key metric, was never reported


def test_figures_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    rounds = [round_of(n, ["site-1"], [], {"accuracy": a}) for n, a in enumerate([0.5, None, 0.75])]
    assert ">best 0.75 in round 2<" in drawn(summary(rounds, ["site-1"], 2), tmp_path)


def test_one_round_and_no_figure_at_all(tmp_path: Path) -> None:
    only = RoundSummary(0, "blake3:0", None, NOW, {}, None, {}, {}, {})
    assert "run-1" in drawn(summary([only], ["site-1"], None), tmp_path)


def test_of_many_sites_those_with_exclusions_are_shown(tmp_path: Path) -> None:
    sites = [f"site-{n:03d}" for n in range(60)]
    rounds = [round_of(n, sites[:50], sites[50:], None) for n in range(2)]
    svg = drawn(summary(rounds, sites, None), tmp_path)
    assert ">site-059<" in svg and ">site-040<" not in svg
    assert ">sites (36 more)<" in svg and ">52 more sites<" in svg


def test_the_same_run_is_drawn_in_each_format(tmp_path: Path) -> None:
    of = summary([round_of(0, ["site-1"], [], None)], ["site-1"], None)
    assert plot_run(of, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert plot_run(of, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_the_callers_own_figures_and_settings_are_not_touched(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot  # in the test: another test imports this module where there is no matplotlib

    own = pyplot.figure()
    settings = dict(matplotlib.rcParams)
    try:
        plot_run(summary([round_of(0, ["site-1"], [], None)], ["site-1"], None), tmp_path / "a.png")
        assert pyplot.get_fignums() == [own.number]
        assert pyplot.gcf() is own
        assert own.axes == []
        assert dict(matplotlib.rcParams) == settings
    finally:
        pyplot.close(own)


def test_mistakes(tmp_path: Path) -> None:
    of = summary([round_of(0, ["site-1"], [], None)], ["site-1"], None)
    with pytest.raises(UserError, match=r"\.png, \.svg, \.pdf"):
        plot_run(of, tmp_path / "a.gif")
    with pytest.raises(UserError, match="no committed round"):
        plot_run(summary([], ["site-1"], None), tmp_path / "a.png")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a place that can be written"):
        plot_run(of, tmp_path / "file" / "a.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    """In a process in which matplotlib cannot be imported."""
    code = f"""
import sys
sys.modules["matplotlib"] = None
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from fedflow.errors import UserError
from tests.test_plot import plot_run, round_of, summary
try:
    plot_run(summary([round_of(0, ["site-1"], [], None)], ["site-1"], None), Path("a.png"))
except UserError as error:
    sys.exit(0 if "pip install 'fedflow[plot]'" in str(error) else str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "a.png").exists()
