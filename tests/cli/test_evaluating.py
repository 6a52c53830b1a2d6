"""`fedflow evaluate`, `fedflow result`, `fedflow stats`."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.cli.project import SITES, Project

HELD_OUT = '''

class Both(Points):
    """Points, of which others are held out."""

    def __init__(self, site, broken="broken"):
        super().__init__(site, broken)
        self.held_out = points(10 + int(site[-1]))


def totals(data):
    return {"examples": len(data), "sum": data.inputs.sum(dim=0)}
'''


def test_a_runs_models_are_evaluated_at_every_site(project: Project) -> None:
    with (project.folder / "points_workload.py").open("a") as file:
        file.write(HELD_OUT)
    project.recipe(workload="points_workload:Both", rounds=2)
    assert project.call("run", "recipe.yaml", "--quiet").code == 0
    first = project.call("evaluate", "points-1", "--cross-site", "--quiet", "--out", "matrix.json")
    assert first.code == 0, first
    matrix = json.loads((project.folder / "matrix.json").read_text())
    assert matrix["rows"] == ["server:last", "server:best", *SITES] and matrix["columns"] == SITES
    assert all(0 <= value <= 1 for row in matrix["cells"] for value in row)
    assert "| server:last |" in first.out
    again = project.call("evaluate", "points-1", "--cross-site", "--quiet", "--metric", "loss", "--out", "heat.svg")
    assert again.code == 0 and (project.folder / "heat.svg").stat().st_size > 0
    assert "--metric: found 'recall'" in project.call("evaluate", "points-1", "--quiet", "--metric", "recall").problem


def test_a_tasks_result_is_printed_and_written(project: Project) -> None:
    with (project.folder / "points_workload.py").open("a") as file:
        file.write(HELD_OUT)
    fields = yaml.safe_load(Path(project.folder / "recipe.yaml").read_text())
    fields = {k: fields[k] for k in ("workload", "rounds")} | {"name": "totals", "rounds": 1}
    fields["algorithm"] = {"kind": "task", "function": "points_workload:totals", "reduction": "sum"}
    (project.folder / "task.yaml").write_text(yaml.safe_dump(fields))
    assert project.call("run", "task.yaml", "--quiet").code == 0
    assert json.loads(project.call("result", "totals-1").out) == {"examples": 48, "sum": "float64[4]"}
    assert project.call("result", "totals-1", "--out", "r.json").code == 0
    assert len(json.loads((project.folder / "r.json").read_text())["sum"]) == 4
    assert "--round: found 3" in project.call("result", "totals-1", "--round", 3).mistake


def test_statistics_are_shown_and_written(project: Project) -> None:
    with (project.folder / "points_workload.py").open("a") as file:
        file.write(
            "\n\ndef table(site):\n    return {'x': points(int(site[-1]))[0][:, 0].numpy(), 'name': [site] * 16}\n"
        )
    fields = {"name": "stats", "workload": "points_workload:table", "rounds": 1, "algorithm": "statistics"}
    (project.folder / "stats.yaml").write_text(yaml.safe_dump(fields))
    assert project.call("run", "stats.yaml", "--quiet").code == 0
    assert "| data / x | 48 | 0 |" in project.call("stats", "stats-1").out
    assert project.call("stats", "stats-1", "--out", "s.html").code == 0
    assert "<h2>data / x</h2>" in (project.folder / "s.html").read_text()
    assert "--out: found" in project.call("stats", "stats-1", "--out", "s.txt").mistake
    assert "found a run of statistics, expected one that trains" in project.call("evaluate", "stats-1").mistake
    fields = {"name": "totals", "workload": "points_workload:table", "rounds": 1}
    fields["algorithm"] = {"kind": "task", "function": "points_workload:total"}
    with (project.folder / "points_workload.py").open("a") as file:
        file.write("\n\ndef total(data):\n    return {'sum': data['x'].sum()}\n")
    (project.folder / "totals.yaml").write_text(yaml.safe_dump(fields))
    assert project.call("run", "totals.yaml", "--quiet").code == 0
    assert "found a result without statistics" in project.call("stats", "totals-1").mistake
