"""`fedflow runs ls`, `runs show`, `logs`."""

import re

from tests.cli.project import Project


def test_ls(trained: Project) -> None:
    header, line = trained.call("runs", "ls").out.splitlines()
    assert header.split()[:4] == ["run", "env", "status", "rounds"]
    assert re.match(r"points-1  sim  finished  3/3 +accuracy +[\d.]+ +[\d.]+ \(round \d\) +blake3:[0-9a-f]{12} ", line)


def test_ls_of_a_store_knows_the_run_too(trained: Project) -> None:
    here = trained.call("runs", "ls", "--json").json["runs"]
    there = trained.call("runs", "ls", "--store", "fedflow-runs/store", "--json").json["runs"]
    assert [run["run_id"] for run in here] == ["points-1"]
    assert [{**run, "env": "sim", "store": here[0]["store"]} for run in there] == here


def test_ls_without_runs(project: Project) -> None:
    result = project.call("runs", "ls")
    assert (result.code, result.out) == (0, "no runs in fedflow-runs\n")
    assert project.call("runs", "ls", "--json").json == {"runs": [], "unreadable": []}


def test_ls_names_what_it_cannot_read(project: Project) -> None:
    record = project.folder / "store" / "public" / "damaged" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    result = project.call("runs", "ls", "--store", "store")
    assert result.code == 0
    assert result.err.startswith("damaged: public/damaged/run.json: found ")


def test_show(trained: Project) -> None:
    out = trained.call("runs", "show", "points-1").out
    assert re.search(r"^status +finished *$", out, re.M)
    assert re.search(r"^sites +3: site-1, site-2, site-3 *$", out, re.M)
    rounds = re.findall(r"^(\d) +2 of 3 +32 +32 +4 +accuracy [\d.]+  loss [\d.]+ .* s +[\d.]+ \w?B", out, re.M)
    assert rounds == ["0", "1", "2"]
    assert len(re.findall(r"^ +site-[12] +16 +16 +2 +loss [\d.]+ .* s +[\d.]+ \w?B", out, re.M)) == 6
    reason = r"^ +site-3 +excluded: training failed: OSError: the disk of site-3 is gone"
    assert len(re.findall(reason, out, re.M)) == 3


def test_show_as_json(trained: Project) -> None:
    found = trained.call("runs", "show", "points-1", "--json").json
    assert (found["run_id"], found["status"], found["rounds"]) == ("points-1", "finished", 3)
    last = found["history"][-1]
    assert last["model_digest"] == found["model_digest"]
    assert last["sites"]["site-1"]["examples"] == 16
    assert "the disk of site-3 is gone" in last["excluded"]["site-3"]
    assert found["history"][found["best_round"]]["evaluation"]["accuracy"] == max(
        round["evaluation"]["accuracy"] for round in found["history"]
    )


def test_show_from_the_store_alone(trained: Project) -> None:
    by_store = trained.call("runs", "show", "points-1", "--store", "fedflow-runs/store", "--json").json
    assert by_store["history"] == trained.call("runs", "show", "points-1", "--json").json["history"]


def test_logs(trained: Project) -> None:
    everything = trained.call("logs", "points-1")
    assert everything.code == 0
    of_site = trained.call("logs", "points-1", "--site", "site-3")
    assert set(of_site.out.splitlines()) <= set(everything.out.splitlines())
